"""Every setting of a server, in one schema: defaults < TOML file < environment < flags.

Read once on the main thread before anything is loaded, frozen afterwards. A key that does not exist, in any of the
sources, is an error that names it.
"""

import argparse
import ipaddress
import os
import socket
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    CliPositionalArg,
    CliSettingsSource,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError as SourceError,
    TomlConfigSettingsSource,
)

from headrace.scheduler.config import OneShotTask
from headrace.scheduler.messages import Tier

ENV_PREFIX = "HEADRACE_"
PROXY_ENV_PREFIX = "HEADRACE_PROXY_"
# Not settings of a server, but of where downloads go.
_OTHER_ENV = {"HEADRACE_CACHE"}

_UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class SettingsError(Exception):
    """A setting is wrong or unknown; the message names it, one line each."""


def _parse_bytes(value: Any) -> Any:
    """Accept 1073741824 as well as "1GiB", "512MB" and "2G", all in powers of two."""
    if not isinstance(value, str) or value == "auto":
        return value
    number = value.strip().upper().removesuffix("IB").removesuffix("B")
    unit = number[-1:] if number[-1:].isalpha() else ""
    try:
        return int(float(number.removesuffix(unit)) * _UNITS[unit])
    except (ValueError, KeyError, OverflowError):
        raise ValueError('expected a number of bytes such as 1073741824, "512MiB" or "2GiB"') from None


def _check_network(value: str) -> str:
    try:
        ipaddress.ip_network(value)
    except ValueError:
        raise ValueError(f"{value!r} is no network such as 10.0.0.0/8 or fd00::/8, nor an address") from None
    return value


_Network = Annotated[str, AfterValidator(_check_network)]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Share = Annotated[float, Field(ge=1e-3, le=1e3)]
_PerTier = tuple[_Positive, _Positive, _Positive]
# A flag that may be a list comes as one.
_PerTierOrAuto = Annotated[
    _PerTier | Literal["auto"], BeforeValidator(lambda value: "auto" if value == ["auto"] else value)
]

Bytes = Annotated[int, BeforeValidator(_parse_bytes), Field(ge=0)]
_AdapterName = Annotated[str, Field(min_length=1, max_length=512)]  # as `model` in a request may be
_AdapterFolder = Annotated[str, Field(min_length=1)]
_REPLICA_NAME = r"[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?"
_ReplicaName = Annotated[str, Field(pattern=f"^{_REPLICA_NAME}$")]


def _check_base_url(value: str) -> str:
    try:
        parts = urlsplit(value)
        if value and not (parts.hostname and parts.port != 0):
            raise ValueError
    except ValueError:
        raise ValueError(f"{value!r} has no host, or a port that is none") from None
    return value.rstrip("/")


# As it goes into a Location: no user, no query, nothing that would have to be encoded.
_BaseUrl = Annotated[
    str,
    Field(pattern=r"^(https?://[A-Za-z0-9.:\[\]_-]+(/[A-Za-z0-9._~/-]*)?)?$"),
    AfterValidator(_check_base_url),
]
_ObjectiveName = Annotated[str, Field(min_length=1, max_length=253)]


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens there; where a name does not resolve, better so."""
    try:
        return ipaddress.ip_address(socket.gethostbyname(host) if ":" not in host else host).is_loopback
    except (OSError, ValueError):
        return True


class OneShotModelSettings(BaseModel):
    """A model that answers in one pass, and how its batches are formed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(min_length=1, description="directory, hub id, all-minilm-l6-v2 or resnet-50")
    task: OneShotTask = Field(description="embed, score (pairs of texts) or classify (images)")
    name: str | None = Field(None, min_length=1, description="name that clients use; the model's own by default")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="weights")
    max_batch_size: int = Field(32, ge=1, le=4096, description="most items in a batch")
    max_batch_tokens: int = Field(16384, ge=1, description="most tokens in a batch of texts, padding counted")
    max_wait_ms: float = Field(5, ge=0, le=60_000, description="longest an item waits for others while nothing runs")
    max_padding: float = Field(0.2, ge=0, lt=1, description="most of a batch that may be padding")
    max_queue_size: int = Field(2048, ge=1, description="most items waiting; beyond, 429")


class ListenerSettings(BaseSettings):
    """What every server here has settings for: where it listens, what a connection may cost, who may call."""

    model_config = SettingsConfigDict(extra="forbid", frozen=True, cli_kebab_case=True, cli_implicit_flags=True)

    host: str = Field("127.0.0.1", min_length=1, description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least severe log line shown")
    max_body_bytes: Bytes = Field(4 * 2**20, ge=1, description="largest request body")
    max_header_bytes: Bytes = Field(64 * 2**10, ge=1024, description="largest request line and headers; beyond, 431")
    receive_timeout_s: float = Field(
        60, gt=0, description="how long a request's headers, and then its body, may take to arrive"
    )
    max_connections: int = Field(
        4096, ge=1, description="most connections; the longest idle one makes room for a new one, else 503"
    )
    peer_timeout_s: int = Field(
        60,
        ge=4,
        le=3600,
        description="how long a client may not acknowledge what it is sent, or read less than 1 KiB of what waits",
    )
    keep_alive_s: int = Field(75, ge=1, description="how long an idle connection is kept")
    drain_delay_s: float = Field(
        0, ge=0, description="on SIGTERM, how long requests are still taken while /ready fails, for routers to notice"
    )
    drain_grace_s: float = Field(30, ge=0, description="after that, how long running requests may go on")
    api_keys_file: str | None = Field(
        None,
        min_length=1,
        description="TOML file of API keys; with one every request needs a key; SIGHUP reads it again",
    )
    open_metrics: bool = Field(False, description="serve /metrics without a key")
    admin_port: int | None = Field(
        None,
        ge=0,
        le=65535,
        description="port of its own for /metrics and probes, without keys; none for clients then",
    )
    admin_host: str = Field("127.0.0.1", min_length=1, description="address to listen on with admin_port")
    cors_origins: tuple[str, ...] = Field((), description="other origins whose pages may call this server, or *")
    allowed_hosts: tuple[str, ...] = Field((), description="further names for the Host header on loopback")

    @property
    def is_private(self) -> bool:
        """Whether clients are this machine's own users, who need no key, and not a proxy's, for which there are
        `allowed_hosts`."""
        return self.api_keys_file is None and is_loopback(self.host) and not self.allowed_hosts

    @model_validator(mode="after")
    def _check_admin(self) -> Self:
        if self.admin_port and self.admin_port == self.port:
            raise ValueError(f"admin_port: {self.port} is where clients come in (port)")
        return self


class Settings(ListenerSettings):
    """A server's settings. Each field's description is its help text."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, cli_prog_name="headrace serve")
    # Whether what starts a server names it, and no setting needs to.
    is_named_by_others: ClassVar[bool] = False

    model: CliPositionalArg[str | None] = Field(
        None, description="directory, .gguf file, gemma3-270m or hub id; the demo model where none is named"
    )
    served_model_name: str | None = Field(None, description="name that clients use; the model's own by default")
    workers: int = Field(1, description="must be 1: one engine serves one process")
    tls_cert_file: Path | None = Field(None, description="PEM certificate chain; with it the server speaks HTTPS")
    tls_key_file: Path | None = Field(None, description="PEM private key of the certificate")
    tls_key_password_file: Path | None = Field(None, description="file with the key's password, where it has one")
    otlp_traces_endpoint: str | None = Field(
        None,
        pattern=r"^https?://",
        description="URL of an OpenTelemetry collector, such as http://127.0.0.1:4318/v1/traces; needs headrace[otel]",
    )

    lora_adapters: dict[_AdapterName, _AdapterFolder] = Field(
        {}, description="LoRA adapters of the model: PEFT's directories, by the names that clients use"
    )

    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
        description="cpu, cuda, cuda:N; auto takes a GPU where torch sees one",
    )
    tensor_parallel_size: int = Field(
        1, ge=1, le=64, description="GPUs, from the device on, that share the model, with a process for each"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="weights and KV cache; auto is bfloat16 where the hardware has it"
    )
    kv_cache_dtype: Literal["auto", "int8", "fp8"] = Field(
        "auto", description="KV cache; auto is as the weights, int8 and (GPU only) fp8 take half of it"
    )
    quantization: Literal["none", "fp8"] = Field(
        "none", description="fp8 rounds weights to 8 bits when they are loaded (GPU only)"
    )
    load_format: Literal["auto", "dummy"] = Field(
        "auto", description="dummy serves random weights in the shape of the model's config, to measure speed"
    )
    gpu_attention: Literal["triton", "flashinfer"] = Field(
        "triton", description="what attends on a GPU; flashinfer needs headrace[flashinfer], and nvcc to compile"
    )
    cpu_kernel: Literal["auto", "amx", "avx512_bf16", "avx512_vnni", "avx512", "avx2", "torch"] = Field(
        "auto", description="what computes on a CPU; auto is the best of this machine, torch does without our kernel"
    )
    cpu_activations: Literal["int8", "int16"] = Field(
        "int8", description="what our CPU kernel multiplies quantised weights with; int16 is more exact, and slower"
    )
    batch_invariant: bool = Field(
        False, description="compute each row alike however many there are; quantised weights are slower then"
    )
    max_model_len: int | None = Field(
        None, ge=2, description="longest prompt + output in tokens; the model's own limit"
    )
    block_size: int = Field(16, ge=1, le=256, description="tokens per KV cache block")
    kv_cache_bytes: Annotated[Bytes, Field(gt=0)] | Literal["auto"] = Field(
        "auto", description="KV cache size, on each device; auto takes a share of free memory"
    )
    max_num_seqs: int = Field(256, ge=1, le=4096, description="most sequences in the running batch")
    max_num_batched_tokens: int = Field(256, ge=1, le=65536, description="token budget of one step")
    enable_prefix_caching: bool = Field(True, description="share the KV blocks of prompts that begin alike")
    speculative_tokens: int = Field(
        8, ge=0, le=15, description="most tokens drafted for a sequence from its own earlier ones; 0 drafts none"
    )
    speculation_max_seqs: int = Field(1, ge=1, le=8, description="most sequences in the batch with which some are")

    tier_weights: tuple[_Share, _Share, _Share] = Field(
        (8.0, 3.0, 1.0), description="shares of premium, standard and batch under load"
    )
    itl_targets_ms: _PerTierOrAuto = Field(
        "auto", description="between two tokens of a stream, for premium, standard and batch; steps are sized for it"
    )
    ttft_targets_s: _PerTierOrAuto = Field(
        "auto",
        description="longest that a first token may be predicted to take, beside its prompt's own time; beyond, 429",
    )

    one_shot_models: tuple[OneShotModelSettings, ...] = Field(
        (), description="models for embeddings, scores and images beside the generating one"
    )
    one_shot_share: float = Field(
        0.25, gt=0, lt=1, description="of the time beside streams, what is theirs; without streams all is"
    )
    preprocess_threads: int = Field(2, ge=1, le=64, description="worker threads for their texts and images")
    postprocess_threads: int = Field(1, ge=1, le=64, description="worker threads for their answers")
    max_image_bytes: Bytes = Field(16 * 2**20, ge=1, description="largest request body with an image")
    max_image_pixels: int = Field(50_000_000, ge=1, description="most pixels of an image")

    max_queue_size: int = Field(1024, ge=1, description="most requests waiting; beyond, 429")
    max_queue_tokens: int = Field(2**22, ge=1, description="most prompt tokens waiting; beyond, 429")
    max_queue_bytes: Bytes = Field(
        2**28, ge=1, description="most memory for bodies that arrive (503), or are read (429)"
    )
    request_timeout_s: float = Field(600, gt=0, description="longest a request may take in all")
    queue_timeout_s: float = Field(600, gt=0, description="longest until the engine begins a request")
    ttft_timeout_s: float = Field(600, gt=0, description="longest until a request's first token")
    stall_timeout_s: float = Field(60, gt=0, description="longest between two tokens of a request")
    watchdog_soft_s: float = Field(
        10, ge=1, description="after so long in one step the engine is said to hang: not ready, not healthy"
    )
    watchdog_hard_s: float = Field(
        120, ge=2, description="after so long in one step, or without a turn of the event loop, the process ends"
    )
    tokenizer_threads: int = Field(2, ge=1, le=64, description="worker threads for templates and tokenizing")
    grammar_cache_bytes: Bytes = Field(64 * 2**20, ge=0, description="most memory for grammars of earlier requests")
    control_tokens_in_messages: Literal["text", "control"] = Field(
        "text", description="what control tokens spelled in a chat's messages are; as control they can forge turns"
    )
    heartbeat_s: float = Field(15, ge=1, description="silence on a stream before a comment is sent")

    idempotency_ttl_s: float = Field(
        600, ge=0, description="how long a request with an Idempotency-Key can be repeated"
    )
    idempotency_bytes: Bytes = Field(16 * 2**20, description="most memory for finished answers that can be repeated")

    stream_grace_s: float = Field(15, ge=0, description="how long a native stream runs without readers")
    stream_ttl_s: float = Field(600, ge=0, description="how long a finished native stream can be read again")
    stream_log_bytes: Bytes = Field(64 * 2**20, description="most memory for finished native streams")
    stream_interval_ms: float = Field(
        0, ge=0, le=10_000, description="least time between two events of any stream; hides when each token came"
    )
    stream_padding_bytes: int = Field(
        0,
        ge=0,
        le=4096,
        description="streamed texts are padded to a multiple of so many bytes; hides their lengths",
    )
    stream_retry_ms: int = Field(1000, ge=1, description="reconnection delay that EventSource is told")
    response_ttl_s: float = Field(86_400, ge=0, description="how long a finished response is stored")
    response_store_bytes: Bytes = Field(64 * 2**20, description="most memory for finished responses")
    journal_file: str | None = Field(
        None,
        min_length=1,
        description="file that native streams and background responses are recorded in, prompts and answers; a restart "
        "resumes them",
    )
    journal_dir: str | None = Field(
        None,
        min_length=1,
        description="folder that replicas share, in place of journal_file: each reads there what another one makes, "
        "and goes on with it where that one has died; needs replica_name",
    )
    journal_fsync: Literal["never", "checkpoint", "step"] = Field(
        "never", description="when the journal is forced to the disk, for a machine that loses power"
    )

    replica_name: str = Field(
        "",
        pattern=f"^({_REPLICA_NAME})?$",
        description="name of this server among several, a part of the ids of its streams and responses; lower case",
    )
    peers: dict[_ReplicaName, _BaseUrl] = Field(
        {},
        description="the replicas by their names, each with the URL that clients are sent to, or an empty one",
    )

    trusted_proxies: tuple[_Network, ...] = Field(
        (),
        description="networks whose gateways are believed what they say of requests: objective, fairness, TTFT target",
    )
    objectives: dict[_ObjectiveName, Tier] = Field(
        {}, description="tiers by the names of a gateway's objectives; the tiers' own names are some by themselves"
    )

    @property
    def has_journal(self) -> bool:
        return self.journal_file is not None or self.journal_dir is not None

    @model_validator(mode="after")
    def _check(self) -> "Settings":
        if self.workers != 1:
            raise ValueError(
                "workers: must be 1, since one engine thread owns the model and batches all requests; "
                "for more, run more servers behind a router"
            )
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens: {self.max_num_batched_tokens} is below max_num_seqs ({self.max_num_seqs}), "
                "but every running sequence must get a token in every step"
            )
        if self.watchdog_hard_s <= self.watchdog_soft_s:
            raise ValueError(f"watchdog_hard_s: must be above watchdog_soft_s ({self.watchdog_soft_s:g})")
        if (self.tls_cert_file is None) != (self.tls_key_file is None):
            raise ValueError("tls_cert_file, tls_key_file: one is of no use without the other")
        if self.tls_key_password_file is not None and self.tls_key_file is None:
            raise ValueError("tls_key_password_file: there is no tls_key_file that it could open")
        if self.journal_dir is not None and self.journal_file is not None:
            raise ValueError("journal_dir: is in place of journal_file, and not beside it")
        is_unnamed = not self.replica_name and not self.is_named_by_others
        if is_unnamed and (self.peers or self.journal_dir is not None):
            name = "peers" if self.peers else "journal_dir"
            raise ValueError(f"{name}: needs a replica_name, by which ids tell whose they are")
        return self


SettingsT = TypeVar("SettingsT", bound=ListenerSettings)


def load_settings(args: Sequence[str] = (), environ: Mapping[str, str] | None = None) -> Settings:
    """Read a server's settings; `args` are the flags behind `headrace serve`.

    Raises: SettingsError, naming every key that is wrong.
    """
    return read_settings(Settings, "Serve a model.", args, environ)


def read_settings(
    cls: type[SettingsT], summary: str, args: Sequence[str] = (), environ: Mapping[str, str] | None = None
) -> SettingsT:
    """Read the settings of a class from all their sources; `args` are the flags behind its command.

    Raises: SettingsError, naming every key that is wrong.
    """
    variables = dict(os.environ if environ is None else environ)
    prefix, command = cls.model_config["env_prefix"], cls.model_config["cli_prog_name"]
    parser = argparse.ArgumentParser(command, add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path)
    known, flags = parser.parse_known_args(list(args))
    unknown = [
        name
        for name in variables
        if name.upper().startswith(prefix)
        and name not in _OTHER_ENV
        and (prefix == PROXY_ENV_PREFIX or not name.upper().startswith(PROXY_ENV_PREFIX))
        and name.upper().removeprefix(prefix).lower() not in cls.model_fields
    ]
    if unknown:
        raise SettingsError("\n".join(f"{name}: no such setting (environment)" for name in unknown))

    class Sourced(cls):  # type: ignore[valid-type,misc]
        @classmethod
        def settings_customise_sources(
            cls, settings_cls: type[BaseSettings], *_: PydanticBaseSettingsSource, **__: PydanticBaseSettingsSource
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            env = EnvSettingsSource(settings_cls)
            env.env_vars = {name.lower(): value for name, value in variables.items()}
            sources: list[PydanticBaseSettingsSource] = [
                CliSettingsSource(
                    settings_cls,
                    cli_parse_args=flags,
                    cli_prog_name=command,
                    cli_hide_none_type=True,
                    formatter_class=argparse.HelpFormatter,
                ),
                env,
            ]
            if known.config is not None:
                sources.append(TomlConfigSettingsSource(settings_cls, known.config))
            return tuple(sources)

    Sourced.__doc__ = f"{summary} --config FILE reads settings from a TOML file; flags win over it."
    if known.config is not None and not known.config.is_file():
        raise SettingsError(f"config: {known.config} is not a file")
    try:
        return Sourced()
    except ValidationError as error:
        # A setting of several types has an error for each, and the first says most.
        details = {detail["loc"][:1]: detail for detail in reversed(error.errors())}
        raise SettingsError("\n".join(_describe(detail) for detail in reversed(details.values()))) from None
    except SourceError as error:  # a variable that is no JSON where a list is wanted
        name = str(error).partition('"')[2].partition('"')[0]
        raise SettingsError(f'{name}: must be a list as JSON, such as ["a", "b"]') from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"config: {known.config} is not valid TOML: {error}") from None


def _describe(detail: Any) -> str:
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in _place(detail["loc"])).lstrip(".")
    if detail["type"] == "extra_forbidden":
        return f"{key}: no such setting"
    message = str(detail["msg"]).removeprefix("Value error, ")
    return f"{key}: {message} (got {detail['input']!r})" if key else message


def _place(loc: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """Where an error is: the setting, and inside one of several models its own."""
    return loc[:3] if loc[:1] == ("one_shot_models",) else loc[:1]
