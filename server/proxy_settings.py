"""Every setting of the proxy, in one schema beside a server's: defaults < TOML file < environment < flags.

Read once on the main thread before anything is opened, frozen afterwards. Its variables begin with HEADRACE_PROXY_, so
that a server and a proxy can be started from one environment.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import Field, model_validator
from pydantic_settings import SettingsConfigDict

from headrace.server.settings import PROXY_ENV_PREFIX, Bytes, ListenerSettings, read_settings


class ProxySettings(ListenerSettings):
    """The proxy's settings. Each field's description is its help text."""

    model_config = SettingsConfigDict(env_prefix=PROXY_ENV_PREFIX, cli_prog_name="headrace proxy")

    upstream: str = Field(pattern=r"^https?://[^\s?#]+$", description="URL of the model server behind this one")
    upstream_key_file: Path | None = Field(
        None, description="file with the key that the upstream is shown as a bearer token, in place of the client's"
    )
    health_path: str = Field("/health", pattern=r"^/", description="what /ready asks of the upstream")
    generic_path: str = Field("/batch", pattern=r"^/", description="the upstream's path for what POST /batch merges")
    port: int = Field(8001, ge=0, le=65535, description="port to listen on; 0 takes a free one")

    max_batch_size: int = Field(32, ge=1, le=4096, description="most items of one upstream request")
    max_batch_cost: float | None = Field(
        None, gt=0, description="most items times the largest one's tokens or rows; a larger one goes alone"
    )
    max_wait_ms: float = Field(5, ge=0, le=60_000, description="longest an item waits for others while nothing runs")
    max_concurrent_batches: int = Field(1, ge=1, le=1024, description="upstream requests at once, for each model")
    max_queue_size: int = Field(1024, ge=1, description="most items waiting for each model; beyond, 429")
    max_queue_bytes: Bytes = Field(2**28, ge=1, description="most memory for bodies that arrive (503), or wait (429)")
    max_models: int = Field(64, ge=1, le=4096, description="most models in use at once; beyond, 429")

    timeout_s: float = Field(60, gt=0, description="longest a request may take in all")
    retries: int = Field(2, ge=0, le=10, description="how often an upstream request that failed is sent again")
    retry_budget: float = Field(0.1, ge=0, le=1, description="most retries, as a share of the requests of late")
    breaker_failures: int = Field(5, ge=1, description="after so many failures in a row the upstream is left alone")
    breaker_reset_s: float = Field(5, gt=0, description="for so long")
    max_response_bytes: Bytes = Field(64 * 2**20, ge=1, description="largest answer of the upstream")

    @model_validator(mode="after")
    def _check(self) -> "ProxySettings":
        if self.max_batch_size > self.max_queue_size:
            raise ValueError(f"max_batch_size: {self.max_batch_size} is above max_queue_size ({self.max_queue_size})")
        return self


def load_proxy_settings(args: Sequence[str] = (), environ: Mapping[str, str] | None = None) -> ProxySettings:
    """Read the settings; `args` are the flags behind `headrace proxy`. Raises: SettingsError."""
    return read_settings(ProxySettings, "Merge single requests to a model server into batches.", args, environ)
