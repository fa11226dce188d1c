"""The settings of a deployment, and the Serve config that is shipped."""

from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]

from headrace.server.deployment_settings import DeploymentSettings, load_deployment_settings
from headrace.server.settings import Settings, SettingsError, load_settings

CONFIG = Path(__file__).parents[3] / "configs" / "serve.yaml"


def test_a_deployment_has_a_servers_settings_and_its_own() -> None:
    settings = load_deployment_settings(["model", "--replicas", "2", "--max-num-seqs", "8"], {"HEADRACE_PORT": "9"})
    assert (settings.model, settings.replicas, settings.max_num_seqs, settings.port) == ("model", 2, 8, 9)
    assert set(Settings.model_fields) < set(DeploymentSettings.model_fields)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--replicas", "0"], "replicas"),
        (["--replicas", "3", "--max-replicas", "2"], "max_replicas"),
        (["--journal-file", "streams.db"], "journal_file"),
        (["--admin-port", "9000"], "admin_port"),
        (["--tls-cert-file", "a", "--tls-key-file", "b"], "tls_cert_file"),
        (["--replica-name", "mill"], "replica_name"),
        (["--replica-cpus", "0"], "replica_cpus"),
        (["--replica-gpus", "2"], "replica_gpus"),
        (["--replica-gpus", "1", "--tensor-parallel-size", "2"], "replica_gpus"),
    ],
)
def test_what_replicas_cannot_be_is_refused_by_its_name(flags: list[str], named: str) -> None:
    with pytest.raises(SettingsError, match=rf"^{named}:"):
        load_deployment_settings(flags, {})


def test_a_folder_of_journals_needs_no_name_where_serve_gives_one() -> None:
    assert load_deployment_settings(["--journal-dir", "journals"], {}).has_journal
    with pytest.raises(SettingsError, match=r"^journal_dir: needs a replica_name"):
        load_settings(["--journal-dir", "journals"], {})


def test_the_replicas_are_given_a_servers_settings_as_json_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_MAX_NUM_SEQS", "7")  # a replica's environment says nothing
    settings = load_deployment_settings(["--replicas", "2", "--kv-cache-bytes", "1GiB"], {})
    values = settings.model_dump(mode="json", include=set(Settings.model_fields))
    assert Settings(**values) == Settings(**{name: getattr(settings, name) for name in Settings.model_fields})
    assert Settings(**values).max_num_seqs == 256


def test_the_serve_configs_arguments_are_settings() -> None:
    config = yaml.safe_load(CONFIG.read_text())
    [application] = config["applications"]
    settings = DeploymentSettings(**application["args"])
    assert settings.host == config["http_options"]["host"]
    assert settings.max_replicas is not None
    assert application["import_path"] == "headrace.server.ray_serve:build"
