"""Every setting of a deployment on Ray Serve: those of a server, which each replica is, and how many there are.

Read once, by `headrace deploy` or out of a Serve config, frozen afterwards.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import Field, model_validator
from pydantic_settings import SettingsConfigDict

from headrace.server.settings import Settings, read_settings

# What belongs to one process at one address, which replicas are not; Serve names them, and the router finds them.
_OF_ONE_SERVER = (
    "admin_port",
    "journal_file",
    "peers",
    "replica_name",
    "tls_cert_file",
    "tls_key_file",
    "tls_key_password_file",
)


class DeploymentSettings(Settings):
    """A deployment's settings. Each field's description is its help text."""

    model_config = SettingsConfigDict(cli_prog_name="headrace deploy")
    is_named_by_others: ClassVar[bool] = True

    replicas: int = Field(1, ge=1, description="servers; with max_replicas the fewest")
    max_replicas: int | None = Field(
        None, ge=1, description="most servers; their number follows what waits and when first tokens are predicted"
    )
    replica_cpus: float = Field(1, gt=0, description="CPUs that Ray sets aside for each; torch has as many threads")
    replica_gpus: int = Field(0, ge=0, description="GPUs that Ray gives each: none, or tensor_parallel_size")
    ray_address: str | None = Field(
        None, min_length=1, description="of a cluster that runs, or auto; otherwise Ray is started on this machine"
    )

    @model_validator(mode="before")
    @classmethod
    def _refuse_one_servers(cls, values: dict[str, Any]) -> dict[str, Any]:
        for name in _OF_ONE_SERVER:
            if values.get(name):
                raise ValueError(f"{name}: replicas cannot share it")
        return values

    @model_validator(mode="after")
    def _check_deployment(self) -> "DeploymentSettings":
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(f"max_replicas: {self.max_replicas} is below replicas ({self.replicas})")
        if self.replica_gpus and self.replica_gpus != self.tensor_parallel_size:
            raise ValueError(f"replica_gpus: a replica has use for tensor_parallel_size ({self.tensor_parallel_size})")
        return self


def load_deployment_settings(args: Sequence[str] = (), environ: Mapping[str, str] | None = None) -> DeploymentSettings:
    """Read the settings; `args` are the flags behind `headrace deploy`. Raises: SettingsError."""
    return read_settings(DeploymentSettings, "Serve replicas of a model on Ray.", args, environ)
