"""Where a setting comes from, and what a wrong one says."""

from pathlib import Path
from typing import Any

import pytest

from headrace.server.settings import Settings, SettingsError, is_loopback, load_settings


def test_flags_win_over_the_environment_over_the_file_over_defaults(tmp_path: Path) -> None:
    config = tmp_path / "headrace.toml"
    config.write_text('port = 1\nhost = "file"\nmax_num_seqs = 3\n')
    settings = load_settings(
        ["some/model", "--config", str(config), "--port", "3"], {"HEADRACE_PORT": "2", "HEADRACE_HOST": "environment"}
    )
    assert (settings.port, settings.host, settings.max_num_seqs) == (3, "environment", 3)
    assert settings.model == "some/model"
    assert settings.block_size == Settings().block_size


@pytest.mark.parametrize(
    ("written", "num_bytes"), [("1024", 1024), ("2GiB", 2 << 30), ("512MB", 512 << 20), ("1.5k", 1536), ("3g", 3 << 30)]
)
def test_bytes_may_have_a_unit(written: str, num_bytes: int) -> None:
    assert load_settings(["--kv-cache-bytes", written], {}).kv_cache_bytes == num_bytes


@pytest.mark.parametrize(
    ("args", "environ", "toml", "named"),
    [
        ([], {"HEADRACE_PROT": "1"}, "", "HEADRACE_PROT"),
        ([], {}, "prot = 1", "prot"),
        ([], {}, "[server]\nport = 1", "server"),
        ([], {}, "port = ", "config"),
        ([], {}, 'port = "many"', "port"),
        ([], {"HEADRACE_PORT": "-1"}, "", "port"),
        (["--kv-cache-bytes", "2XB"], {}, "", "kv_cache_bytes"),
        (["--kv-cache-bytes", "inf"], {}, "", "kv_cache_bytes"),
        (["--kv-cache-bytes", "-5"], {}, "", "kv_cache_bytes"),
        (["--device", "tpu"], {}, "", "device"),
        (["--workers", "2"], {}, "", "workers"),
        ([], {"HEADRACE_CORS_ORIGINS": "https://a.b"}, "", "cors_origins"),
        (["--kv-cache-bytes", "0"], {}, "", "kv_cache_bytes"),
        (["--host", ""], {}, "", "host"),
        (["--api-keys-file", ""], {}, "", "api_keys_file"),
        (["--max-header-bytes", "100"], {}, "", "max_header_bytes"),
        (["--receive-timeout-s", "0"], {}, "", "receive_timeout_s"),
        (["--peer-timeout-s", "3"], {}, "", "peer_timeout_s"),
        ([], {}, 'open_metrics = "perhaps"', "open_metrics"),
        (["--max-num-batched-tokens", "8", "--max-num-seqs", "9"], {}, "", "max_num_batched_tokens"),
    ],
)
def test_a_wrong_or_unknown_setting_is_named(
    tmp_path: Path, args: list[str], environ: dict[str, str], toml: str, named: str
) -> None:
    config = tmp_path / "headrace.toml"
    config.write_text(toml)
    with pytest.raises(SettingsError, match=named):
        load_settings([*args, "--config", str(config)], environ)


def test_an_unknown_flag_ends_with_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load_settings(["--prot", "1"], {})
    assert "--prot" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.0.0.2", True),
        ("127.1", True),
        ("localhost", True),
        ("::1", True),
        ("0:0:0:0:0:0:0:1", True),
        ("0.0.0.0", False),
        ("192.168.1.2", False),
        ("10.0.0.7", False),
        ("::", False),
    ],
)
def test_a_loopback_address_is_known_in_every_spelling(host: str, expected: bool) -> None:
    assert is_loopback(host) == expected


def test_a_config_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    config = tmp_path / "headrace.toml"
    config.write_bytes(b"\xff\xfe")
    with pytest.raises(SettingsError, match="config"):
        load_settings(["--config", str(config)], {})


@pytest.mark.parametrize(
    ("flags", "environ", "line"),
    [
        (["--kv-cache-bytes", "2XB"], {}, "kv_cache_bytes: expected a number of bytes"),
        ([], {"HEADRACE_CORS_ORIGINS": "https://a.b"}, "cors_origins: must be a list as JSON"),
    ],
)
def test_a_wrong_setting_has_one_line_that_begins_with_its_key(
    flags: list[str], environ: dict[str, str], line: str
) -> None:
    with pytest.raises(SettingsError) as wrong:
        load_settings(flags, environ)
    assert str(wrong.value).startswith(line)
    assert len(str(wrong.value).splitlines()) == 1


def test_settings_are_frozen() -> None:
    settings: Any = Settings()
    with pytest.raises(ValueError, match="frozen"):
        settings.port = 1
