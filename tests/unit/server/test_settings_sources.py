"""Settings from each source, alone and against the others, and the files that are shipped."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st
from pydantic_core import PydanticUndefined

from headrace.scheduler.messages import Tier
from headrace.server.settings import Settings, SettingsError, load_settings

CONFIGS = sorted(path for path in (Path(__file__).parents[3] / "configs").glob("*.toml") if path.name != "proxy.toml")

# Four different, acceptable values per setting: default, file, environment, flag.
VALUES: dict[str, tuple[Any, Any, Any, Any]] = {
    "model": (None, "file", "env", "flag"),
    "served_model_name": (None, "file", "env", "flag"),
    "host": ("127.0.0.1", "file", "env", "flag"),
    "port": (8000, 1, 2, 3),
    "log_level": ("info", "debug", "warning", "error"),
    "otlp_traces_endpoint": (None, "http://file", "http://env", "http://flag"),
    "device": ("auto", "cpu", "cuda", "cuda:1"),
    "tensor_parallel_size": (1, 2, 3, 4),
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "kv_cache_dtype": ("auto", "int8", "fp8", "int8"),
    "quantization": ("none", "fp8", "none", "fp8"),
    "load_format": ("auto", "dummy", "auto", "dummy"),
    "gpu_attention": ("triton", "flashinfer", "triton", "flashinfer"),
    "cpu_kernel": ("auto", "torch", "avx2", "avx512"),
    "cpu_activations": ("int8", "int16", "int8", "int16"),
    "batch_invariant": (False, True, False, True),
    "max_model_len": (None, 11, 12, 13),
    "block_size": (16, 1, 2, 3),
    "kv_cache_bytes": ("auto", 1, 2, 3),
    "max_num_seqs": (256, 1, 2, 3),
    "max_num_batched_tokens": (256, 301, 302, 303),
    "enable_prefix_caching": (True, False, True, False),
    "speculative_tokens": (8, 1, 2, 3),
    "speculation_max_seqs": (1, 2, 3, 4),
    "tier_weights": ((8.0, 3.0, 1.0), (1.0, 1.0, 1.0), (2.0, 2.0, 2.0), (3.0, 2.0, 1.0)),
    "itl_targets_ms": ("auto", (1.0, 2.0, 3.0), (4.0, 5.0, 6.0), (7.0, 8.0, 9.0)),
    "ttft_targets_s": ("auto", (1.0, 2.0, 3.0), (4.0, 5.0, 6.0), (7.0, 8.0, 9.0)),
    "one_shot_share": (0.25, 0.1, 0.2, 0.3),
    "preprocess_threads": (2, 1, 3, 4),
    "postprocess_threads": (1, 2, 3, 4),
    "max_image_bytes": (16 * 2**20, 1, 2, 3),
    "max_image_pixels": (50_000_000, 1, 2, 3),
    "max_queue_size": (1024, 1, 2, 3),
    "max_queue_tokens": (2**22, 1, 2, 3),
    "max_queue_bytes": (2**28, 1, 2, 3),
    "request_timeout_s": (600.0, 1.5, 2.5, 3.5),
    "queue_timeout_s": (600.0, 1.5, 2.5, 3.5),
    "ttft_timeout_s": (600.0, 1.5, 2.5, 3.5),
    "stall_timeout_s": (60.0, 1.5, 2.5, 3.5),
    "tokenizer_threads": (2, 1, 3, 4),
    "control_tokens_in_messages": ("text", "control", "text", "control"),
    "grammar_cache_bytes": (64 * 2**20, 1, 2, 3),
    "max_body_bytes": (4 * 2**20, 1, 2, 3),
    "max_header_bytes": (64 * 2**10, 2000, 3000, 4000),
    "receive_timeout_s": (60.0, 1.5, 2.5, 3.5),
    "max_connections": (4096, 1, 2, 3),
    "peer_timeout_s": (60, 5, 6, 7),
    "watchdog_soft_s": (10.0, 1.5, 2.5, 3.5),
    "watchdog_hard_s": (120.0, 11.5, 12.5, 13.5),
    "heartbeat_s": (15.0, 1.5, 2.5, 3.5),
    "keep_alive_s": (75, 1, 2, 3),
    "drain_delay_s": (0.0, 1.5, 2.5, 3.5),
    "drain_grace_s": (30.0, 1.5, 2.5, 3.5),
    "idempotency_ttl_s": (600.0, 1.5, 2.5, 3.5),
    "idempotency_bytes": (16 * 2**20, 1, 2, 3),
    "stream_grace_s": (15.0, 1.5, 2.5, 3.5),
    "stream_ttl_s": (600.0, 1.5, 2.5, 3.5),
    "stream_log_bytes": (64 * 2**20, 1, 2, 3),
    "stream_interval_ms": (0.0, 1.5, 2.5, 3.5),
    "stream_padding_bytes": (0, 1, 2, 3),
    "stream_retry_ms": (1000, 1, 2, 3),
    "response_ttl_s": (86400.0, 1.5, 2.5, 3.5),
    "response_store_bytes": (64 * 2**20, 1, 2, 3),
    "journal_file": (None, "file", "env", "flag"),
    "replica_name": ("", "file", "env", "flag"),
    "journal_fsync": ("never", "checkpoint", "step", "checkpoint"),
    "api_keys_file": (None, "file", "env", "flag"),
    "open_metrics": (False, True, False, True),
    "admin_port": (None, 1, 2, 3),
    "admin_host": ("127.0.0.1", "file", "env", "flag"),
    "cors_origins": ((), ("file",), ("env",), ("flag",)),
    "allowed_hosts": ((), ("file",), ("env",), ("flag",)),
    "trusted_proxies": ((), ("10.0.0.0/8",), ("fd00::/8", "::1"), ("127.0.0.1",)),
}


def test_every_setting_is_tried_here() -> None:
    # `workers` has one value only, the TLS files are of no use one by one, and tables have tests of their own.
    tls = {name for name in Settings.model_fields if name.startswith("tls_")}
    # The folder and the peers are of no use without a name.
    others = {"workers", "journal_dir"}
    tables = {"one_shot_models", "lora_adapters", "objectives", "peers"}
    assert set(VALUES) == set(Settings.model_fields) - others - tables - tls


def test_one_shot_models_are_tables_of_the_file_and_json_elsewhere(tmp_path: Path) -> None:
    path = tmp_path / "headrace.toml"
    path.write_text(
        '[[one_shot_models]]\nmodel = "a"\ntask = "embed"\n[[one_shot_models]]\nmodel = "b"\ntask = "score"\n'
    )
    found = load_settings(["--config", str(path)], {}).one_shot_models
    assert [(one.model, one.task) for one in found] == [("a", "embed"), ("b", "score")]
    models = [{"model": "c", "task": "classify", "max_batch_size": 4}]
    for args, environ in (
        (["--one-shot-models", json.dumps(models)], {}),
        ([], {"HEADRACE_ONE_SHOT_MODELS": json.dumps(models)}),
    ):
        [one] = load_settings(["--config", str(path), *args], environ).one_shot_models
        assert (one.model, one.task, one.max_batch_size) == ("c", "classify", 4)


def test_lora_adapters_are_a_table_of_the_file_json_in_the_environment_and_pairs_in_flags(tmp_path: Path) -> None:
    path = tmp_path / "headrace.toml"
    path.write_text('[lora_adapters]\npoet = "a"\n"a cook" = "b/c"\n')
    expected = {"poet": "a", "a cook": "b/c"}
    assert load_settings(["--config", str(path)], {}).lora_adapters == expected
    assert load_settings([], {"HEADRACE_LORA_ADAPTERS": json.dumps(expected)}).lora_adapters == expected
    for flags in (
        ["--lora-adapters", json.dumps(expected)],
        ["--lora-adapters", "poet=a", "--lora-adapters=a cook=b/c"],
    ):
        assert load_settings(flags, {}).lora_adapters == expected
    assert load_settings([], {}).lora_adapters == {}


@pytest.mark.parametrize("url", ["http://[x", "http://:80", "http://b:99999", "http://b:0", "http://b:c", "b:8000"])
def test_a_peers_address_that_leads_nowhere_is_refused(url: str) -> None:
    with pytest.raises(SettingsError, match="peers"):
        load_settings(["--replica-name", "a", "--peers", json.dumps({"b": url})], {})


def test_peers_are_a_table_of_the_file_json_in_the_environment_and_pairs_in_flags(tmp_path: Path) -> None:
    path = tmp_path / "headrace.toml"
    path.write_text('replica_name = "a"\n[peers]\nb-1 = "http://b:8000/llm/"\nc = ""\n')
    expected = {"b-1": "http://b:8000/llm", "c": ""}
    assert load_settings(["--config", str(path)], {}).peers == expected
    name = ["--replica-name", "a"]
    assert load_settings(name, {"HEADRACE_PEERS": json.dumps(expected)}).peers == expected
    for flags in (["--peers", json.dumps(expected)], ["--peers", "b-1=http://b:8000/llm", "--peers=c="]):
        assert load_settings([*name, *flags], {}).peers == expected


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        *(("replica_name", name) for name in ("A", "a_b", "-a", "a-", "a.b", "a" * 33, "é", "a\n", "../a")),
        *(("peers", json.dumps({name: "http://b"})) for name in ("", "B", "b_c", "-b", "b" * 33)),
        *(
            ("peers", json.dumps({"b": url}))
            for url in (
                "b:8000",
                "//b",
                "ftp://b",
                "javascript:alert(1)",
                "http://",
                "http://u:p@b",
                "http://b?x=1",
                "http://b#x",
                "http://b/a b",
                "http://b\r\nx: y",
                "http://b/é",
            )
        ),
    ],
)
def test_what_is_no_replica_or_no_address_of_one_is_refused(setting: str, value: str) -> None:
    name = [] if setting == "replica_name" else ["--replica-name=a"]
    with pytest.raises(SettingsError, match=setting):
        load_settings([*name, f"--{setting.replace('_', '-')}={value}"], {})


@pytest.mark.parametrize("flag", ["--peers=b=http://b", "--journal-dir=x"])
def test_replicas_need_a_name_and_one_journal(flag: str) -> None:
    with pytest.raises(SettingsError, match="needs a replica_name"):
        load_settings([flag], {})
    load_settings([flag, "--replica-name", "a"], {})
    with pytest.raises(SettingsError, match="journal_dir: is in place of journal_file"):
        load_settings(["--journal-dir=x", "--journal-file=y", "--replica-name=a"], {})


def test_objectives_are_a_table_of_the_file_json_in_the_environment_and_pairs_in_flags(tmp_path: Path) -> None:
    path = tmp_path / "headrace.toml"
    path.write_text('[objectives]\n"best-effort" = "batch"\ngold = "premium"\n')
    expected = {"best-effort": Tier.BATCH, "gold": Tier.PREMIUM}
    assert load_settings(["--config", str(path)], {}).objectives == expected
    assert load_settings([], {"HEADRACE_OBJECTIVES": json.dumps(expected)}).objectives == expected
    flags = ["--objectives", "best-effort=batch", "--objectives=gold=premium"]
    assert load_settings(flags, {}).objectives == expected
    path.write_text('[objectives]\ngold = "golden"\n')
    with pytest.raises(SettingsError, match=r"objectives: .*'premium'"):
        load_settings(["--config", str(path)], {})


@pytest.mark.parametrize("network", ["", "10.0.0.1/8", "10.0.0.0/33", "gateway.example", "*", "10.0.0"])
def test_what_is_no_network_is_refused_by_name(network: str) -> None:
    with pytest.raises(SettingsError, match=r"trusted_proxies: .* is no network"):
        load_settings([], {"HEADRACE_TRUSTED_PROXIES": json.dumps([network])})


@pytest.mark.parametrize(
    "table", ['poet = ""', '"" = "a"', "poet = 1", 'poet = {path = "a"}', f'{"a" * 513} = "a"', 'poet = ["a"]']
)
def test_what_is_no_name_and_directory_of_an_adapter_is_refused(tmp_path: Path, table: str) -> None:
    path = tmp_path / "headrace.toml"
    path.write_text(f"[lora_adapters]\n{table}\n")
    with pytest.raises(SettingsError, match="lora_adapters: "):
        load_settings(["--config", str(path)], {})


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ('model = "a"', "one_shot_models[0].task: Field required"),
        ('model = "a"\ntask = "sing"', "one_shot_models[0].task: Input should be"),
        ('model = "a"\ntask = "embed"\nmax_bach_size = 3', "one_shot_models[0].max_bach_size: no such setting"),
        ('model = "a"\ntask = "embed"\nmax_wait_ms = -1', "one_shot_models[0].max_wait_ms: "),
    ],
)
def test_what_is_wrong_in_a_one_shot_models_table_is_named(tmp_path: Path, table: str, message: str) -> None:
    path = tmp_path / "headrace.toml"
    path.write_text(f"[[one_shot_models]]\n{table}\n")
    with pytest.raises(SettingsError) as error:
        load_settings(["--config", str(path)], {})
    assert message in str(error.value)


def as_flags(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{'' if value else 'no-'}{name.replace('_', '-')}"]
    text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return [text] if name == "model" else [f"--{name.replace('_', '-')}", text]


@pytest.mark.parametrize("name", VALUES)
def test_each_source_wins_over_those_before_it(tmp_path: Path, name: str) -> None:
    default, in_file, in_environment, in_flag = VALUES[name]
    config = tmp_path / "headrace.toml"
    config.write_text(f"{name} = {json.dumps(in_file)}\n")
    written = json.dumps(in_environment) if isinstance(in_environment, tuple) else str(in_environment)
    others = Settings.model_construct().model_dump(exclude={name})
    for has_file, has_environment, has_flag in itertools.product((False, True), repeat=3):
        loaded = load_settings(
            [*(["--config", str(config)] if has_file else []), *(as_flags(name, in_flag) if has_flag else [])],
            {f"HEADRACE_{name.upper()}": written} if has_environment else {},
        )
        expected = in_flag if has_flag else in_environment if has_environment else in_file if has_file else default
        assert getattr(loaded, name) == expected
        assert loaded.model_dump(exclude={name}) == others


@pytest.mark.parametrize(
    ("environ", "toml"),
    [
        ({"HEADRACE_FIRST": "1", "HEADRACE_SECOND__X": "1", "headrace_third": "1"}, ""),
        ({}, "FIRST = 1\nSECOND__X = 1\nthird = 1"),
    ],
    ids=["environment", "file"],
)
def test_every_unknown_key_is_named(tmp_path: Path, environ: dict[str, str], toml: str) -> None:
    config = tmp_path / "headrace.toml"
    config.write_text(toml)
    with pytest.raises(SettingsError) as caught:
        load_settings(["--config", str(config)], environ)
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    for name, line in zip(("first", "second__x", "third"), lines, strict=True):
        assert name in line.lower()
        assert "no such setting" in line


@pytest.mark.parametrize("flag", ["--first", "--por", "--max_num_seqs", "--workers-of-the-world", "-p"])
def test_a_flag_that_is_unknown_or_cut_short_is_named(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load_settings([flag, "1"], {})
    assert caught.value.code == 2
    assert flag in capsys.readouterr().err


def test_variables_of_others_are_left_alone() -> None:
    environ = {"PORT": "1", "HEADRACEPORT": "2", "HEADRACE_CACHE": "/somewhere", "XHEADRACE_PORT": "3"}
    assert load_settings([], environ).model_dump() == load_settings([], {}).model_dump()


@pytest.mark.parametrize(
    "environ",
    [{"HEADRACE_CORS_ORIGINS": "[https:"}, {"HEADRACE_ALLOWED_HOSTS": "{my.box}"}, {"HEADRACE_PORT": ""}],
    ids=str,
)
def test_a_variable_that_cannot_be_read_is_named(environ: dict[str, str]) -> None:
    [name] = environ
    field = name.removeprefix("HEADRACE_").lower()
    with pytest.raises(SettingsError, match=field):
        load_settings([], environ)


@pytest.mark.parametrize(
    "content",
    [b"port = 1\nport = 2", b"\xff\xfe", b"port 1", b'port = "\xff"', b"[port]\nx = 1", b"port = nan", b"port = 1.5"],
    ids=repr,
)
def test_a_file_that_cannot_be_read_is_an_error_of_the_operator(tmp_path: Path, content: bytes) -> None:
    config = tmp_path / "headrace.toml"
    config.write_bytes(content)
    with pytest.raises(SettingsError, match=r"config|port"):
        load_settings(["--config", str(config)], {})


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent.toml"):
        with pytest.raises(SettingsError, match=path.name):
            load_settings(["--config", str(path)], {})


@pytest.mark.parametrize("workers", ["0", "2", "-1", "many"])
@pytest.mark.parametrize("source", ["flag", "environment"])
def test_one_engine_serves_one_process(workers: str, source: str) -> None:
    args, environ = (["--workers", workers], {}) if source == "flag" else ([], {"HEADRACE_WORKERS": workers})
    with pytest.raises(SettingsError, match="workers"):
        load_settings(args, environ)
    assert load_settings(["--workers", "1"], {}).workers == 1


@pytest.mark.parametrize("name", ["itl_targets_ms", "ttft_targets_s"])
def test_targets_can_be_left_to_the_device_by_every_source(tmp_path: Path, name: str) -> None:
    config = tmp_path / "headrace.toml"
    flag, variable = f"--{name.replace('_', '-')}", f"HEADRACE_{name.upper()}"
    for content, variables, flags in (
        ('"auto"', {}, []),
        ("[1, 2, 3]", {variable: "auto"}, []),
        ("[1, 2, 3]", {variable: "[4, 5, 6]"}, [flag, "auto"]),
        ("[1, 2, 3]", {variable: "[4, 5, 6]"}, [f"{flag}=auto"]),
    ):
        config.write_text(f"{name} = {content}\n")
        assert getattr(load_settings(["--config", str(config), *flags], variables), name) == "auto"


@pytest.mark.parametrize("name", ["tier_weights", "itl_targets_ms", "ttft_targets_s"])
@pytest.mark.parametrize(
    "content",
    ["[1, 2]", "[1, 2, 3, 4]", "[1, 0, 1]", "[1, -1, 1]", "[1, inf, 1]", "[1, nan, 1]", "5", '["a", 1, 1]', "[]"],
)
def test_what_is_not_a_positive_number_for_each_tier_is_refused(tmp_path: Path, name: str, content: str) -> None:
    config = tmp_path / "headrace.toml"
    config.write_text(f"{name} = {content}\n")
    with pytest.raises(SettingsError, match=name):
        load_settings(["--config", str(config)], {})


UNITS = {"": 1, "b": 1, "k": 2**10, "kb": 2**10, "KiB": 2**10, "M": 2**20, "mib": 2**20, "GB": 2**30, "TiB": 2**40}


@settings(max_examples=60, derandomize=True, deadline=None)
@given(number=st.integers(1, 2**40), unit=st.sampled_from(sorted(UNITS)), spaces=st.sampled_from(["", " "]))
def test_sizes_are_counted_in_powers_of_two(number: int, unit: str, spaces: str) -> None:
    written = f"{spaces}{number}{unit}{spaces}"
    loaded = load_settings([], {"HEADRACE_STREAM_LOG_BYTES": written, "HEADRACE_KV_CACHE_BYTES": written})
    assert loaded.stream_log_bytes == loaded.kv_cache_bytes == number * UNITS[unit]


@pytest.mark.parametrize(
    "written", ["", "B", "GiB", "one", "1X", "1GG", "nan", "inf", "1e999", "-1", "-1GiB", "0x10", "1,5G", "auto "]
)
def test_what_is_no_size_is_refused(written: str) -> None:
    with pytest.raises(SettingsError, match="stream_log_bytes"):
        load_settings([], {"HEADRACE_STREAM_LOG_BYTES": written})


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_a_file_that_is_shipped_can_be_read(path: Path) -> None:
    load_settings(["--config", str(path)], {})


def test_the_shipped_defaults_state_every_setting_with_its_default() -> None:
    [path] = [path for path in CONFIGS if path.name == "default.toml"]
    assert load_settings(["--config", str(path)], {}).model_dump() == load_settings([], {}).model_dump()
    text = path.read_text()
    for name, field in Settings.model_fields.items():
        assert field.default is not PydanticUndefined
        assert f"\n{name} = " in text or f"\n# {name} = " in text, f"default.toml does not mention {name}"


def test_the_operators_port_is_not_the_clients() -> None:
    with pytest.raises(SettingsError, match="admin_port: 8000 is where clients come in"):
        load_settings(["--admin-port", "8000"], {})
    assert load_settings(["--port", "0", "--admin-port", "0"], {}).admin_port == 0
