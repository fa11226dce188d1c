"""The proxy's settings: its own variables, its shipped file, and what a server makes of them."""

from pathlib import Path

import pytest

from headrace.server.proxy_settings import ProxySettings, load_proxy_settings
from headrace.server.settings import SettingsError, load_settings

FILE = Path(__file__).parents[3] / "configs" / "proxy.toml"
URL = "http://127.0.0.1:8000"


def test_the_shipped_file_states_every_setting_with_its_default() -> None:
    shipped = load_proxy_settings(["--config", str(FILE)], {})
    assert shipped.model_dump() == load_proxy_settings(["--upstream", URL], {}).model_dump()
    text = FILE.read_text()
    for name in ProxySettings.model_fields:
        assert f"\n{name} = " in text or f"\n# {name} = " in text, f"proxy.toml does not mention {name}"


def test_variables_have_a_prefix_of_their_own_and_a_server_leaves_them_alone() -> None:
    environ = {"HEADRACE_PROXY_UPSTREAM": URL, "HEADRACE_PROXY_PORT": "9", "HEADRACE_DTYPE": "float32"}
    assert load_proxy_settings([], environ).port == 9
    assert load_settings([], environ).dtype == "float32"
    with pytest.raises(SettingsError, match="HEADRACE_PROXY_DTYPE: no such setting"):
        load_proxy_settings([], environ | {"HEADRACE_PROXY_DTYPE": "float32"})


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ([], "upstream"),
        (["--upstream", "127.0.0.1:8000"], "upstream"),
        (["--upstream", URL, "--retry-budget", "2"], "retry_budget"),
        (["--upstream", URL, "--generic-path", "batch"], "generic_path"),
        (["--upstream", URL, "--max-queue-size", "8"], "max_batch_size"),
    ],
)
def test_a_wrong_setting_is_named(flags: list[str], named: str) -> None:
    with pytest.raises(SettingsError, match=named):
        load_proxy_settings(flags, {})
