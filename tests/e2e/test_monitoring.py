"""The files that watch a server, under a real Prometheus: it accepts them, their every expression evaluates on what a
server exposes, and each alert is raised by what it is about and by nothing else.
"""

import json
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml  # type: ignore[import-untyped]

from headrace.server.api_keys import append_key, create_key
from requirements import need_program
from server_process import serving_script
from waiting import until

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
GPU_GAUGES = (ROOT / "server" / "gpu_gauges.py").read_text()
DASHBOARD = json.loads((CONFIGS / "grafana.json").read_text())
ALERTS = yaml.safe_load((CONFIGS / "alerts.yml").read_text())["groups"][0]["rules"]
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
KEDA = yaml.safe_load((CONFIGS / "kubernetes" / "components" / "keda" / "scaled-object.yaml").read_text())
ADAPTER = yaml.safe_load((CONFIGS / "kubernetes" / "components" / "hpa" / "prometheus-adapter.yaml").read_text())
EXPRESSIONS = [target["expr"] for panel in PANELS for target in panel["targets"]] + [alert["expr"] for alert in ALERTS]
# Of what a server without one-shot models and without a GPU has no samples.
ABSENT = re.compile(r"headrace_(batch|gpu)_\w+")


@dataclass(frozen=True)
class Watched:
    """A Prometheus, and the metrics of the server that it scrapes."""

    prometheus: httpx.Client
    metrics: str

    def ask(self, path: str, **parameters: str) -> Any:
        answer = self.prometheus.get(f"/api/v1/{path}", params=parameters)
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]

    def query(self, expression: str) -> list[Any]:
        found: list[Any] = self.ask("query", query=expression)["result"]
        return found


@contextmanager
def prometheus(folder: Path, target: str) -> Iterator[httpx.Client]:
    """Run Prometheus with the committed files; only the target and the times between scrapes are changed."""
    program = need_program("prometheus")
    config = yaml.safe_load((CONFIGS / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(CONFIGS / name) for name in config["rule_files"]]
    [scraped] = config["scrape_configs"][0]["static_configs"]
    scraped["targets"] = [target]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    flags = [f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/series", "--log.level=warn"]
    process = subprocess.Popen([program, *flags, f"--web.listen-address={address}"])
    try:
        with httpx.Client(base_url=f"http://{address}") as client:

            def is_ready() -> bool:
                assert process.poll() is None, "Prometheus has ended"
                try:
                    return client.get("/-/ready").status_code == 200
                except httpx.ConnectError:
                    return False

            until(is_ready, "Prometheus is ready", 60)
            yield client
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """A server with all that has metrics but a GPU and one-shot models, scraped a few times after it answered."""
    folder = tmp_path_factory.mktemp("monitoring")
    need_program("prometheus")
    secret, key = create_key("alice")
    append_key(folder / "keys.toml", key)
    flags = ["--admin-port", "0", "--api-keys-file", str(folder / "keys.toml")]
    with serving_script(*flags, "--journal-file", str(folder / "journal")) as server:
        body = {"prompt": "slow now", "max_tokens": 40}
        answer = httpx.post(f"{server.url()}/v1/completions", json=body, headers={"x-api-key": secret})
        assert answer.status_code == 200
        assert httpx.get(f"{server.url()}/v1/models").status_code == 401  # so that a refusal is counted
        address = server.wait_for(r"metrics: http://(\S+)/metrics")[1]
        with prometheus(folder, address) as client:
            watched = Watched(client, httpx.get(f"http://{address}/metrics").text)
            # Of its last metric, so that nothing of a scrape is on its way.
            until(lambda: bool(watched.query("count_over_time(headrace_connections[1m]) > 1")), "it is scraped twice")
            yield watched


def test_prometheus_accepts_the_configuration_and_the_rules() -> None:
    result = subprocess.run(
        [need_program("promtool"), "check", "config", str(CONFIGS / "prometheus.yml")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{len(ALERTS)} rules found" in result.stdout


def test_every_expression_evaluates_on_what_a_server_exposes(watched: Watched) -> None:
    for expression in EXPRESSIONS:
        # Grafana's variables: what was chosen, and a few times the time between scrapes.
        found = watched.query(expression.replace("$instance", ".*").replace("$__rate_interval", "10s"))
        is_alert = any(expression == alert["expr"] for alert in ALERTS)
        assert found or is_alert or ABSENT.search(expression), f"nothing comes of {expression}"


def test_no_expression_names_a_metric_that_does_not_exist(watched: Watched) -> None:
    exposed = set(re.findall(r"^# TYPE (\S+)", watched.metrics, re.MULTILINE))
    for expression in EXPRESSIONS:
        for name in re.findall(r"headrace_\w+", expression):
            is_gpus = f'"{name.removeprefix("headrace_")}"' in GPU_GAUGES
            assert name in exposed or re.sub("_(bucket|sum|count)$", "", name) in exposed or is_gpus, name


def test_what_replicas_are_scaled_by_is_one_number_for_all_of_them_or_for_each(watched: Watched) -> None:
    queries = [trigger["metadata"]["query"] for trigger in KEDA["spec"]["triggers"]]
    for rule in ADAPTER["rules"]["custom"]:
        # The adapter's variables; without Kubernetes an instance is what a pod is there.
        query = rule["metricsQuery"].replace("<<.Series>>", rule["seriesQuery"].partition("{")[0])
        queries.append(query.replace("<<.LabelMatchers>>", 'job="headrace"').replace("<<.GroupBy>>", "instance"))
    answers = [watched.query(query) for query in queries]
    assert [len(answer) for answer in answers] == [1] * 4
    shares = [float(answer[0]["value"][1]) for answer in answers[1::2]]
    assert shares[0] == shares[1]
    assert 0 <= shares[0] < 1, "a server that has nothing to do"


def test_the_alerts_are_loaded_and_none_is_raised_by_a_server_that_is_well(watched: Watched) -> None:
    def rules() -> list[Any]:
        return [rule for group in watched.ask("rules", type="alert")["groups"] for rule in group["rules"]]

    until(lambda: all(rule["health"] != "unknown" for rule in rules()), "they are evaluated")
    assert [rule["name"] for rule in rules()] == [alert["alert"] for alert in ALERTS]
    for rule in rules():
        assert (rule["health"], rule.get("lastError", ""), rule["state"]) == ("ok", "", "inactive"), rule


def test_grafanas_panels_are_told_apart_and_ask_the_source_that_is_chosen() -> None:
    names = [variable["name"] for variable in DASHBOARD["templating"]["list"]]
    assert names == ["datasource", "instance"]
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])}
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
    for panel in PANELS:
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert all('instance=~"$instance"' in target["expr"] for target in panel["targets"])


def test_the_page_and_prometheus_have_the_same_percentiles(watched: Watched, tmp_path: Path) -> None:
    module = shutil.copy(ROOT / "server" / "static" / "exposition.js", tmp_path / "exposition.mjs")
    quantiles = [0.01, 0.3, 0.5, 0.95, 0.99, 1.0]
    script = f"""
        import {{ readFileSync }} from 'node:fs';
        import {{ History, parse }} from '{module}';
        const history = new History(60);
        const text = readFileSync(0, 'utf8');
        history.add(0, parse(text.replace(/ \\S+$/gm, ' 0')), 'headrace_engine_steps_total');
        history.add(1, parse(text), 'headrace_engine_steps_total');
        const name = 'headrace_inter_token_latency_seconds';
        console.log(JSON.stringify({quantiles}.map((q) => history.quantile(q, name, 60, {{ tier: 'standard' }}))));
    """
    command = [need_program("node"), "--input-type=module", "-e", script]
    result = subprocess.run(command, input=watched.metrics, capture_output=True, text=True, check=True)
    buckets = 'headrace_inter_token_latency_seconds_bucket{tier="standard"}'
    expected = [watched.query(f"histogram_quantile({q}, {buckets})")[0]["value"][1] for q in quantiles]
    assert json.loads(result.stdout) == pytest.approx([float(value) for value in expected])


def _series(metric: str, values: str, **labels: str) -> dict[str, str]:
    pairs = ", ".join(f'{name}="{value}"' for name, value in ({"job": "headrace", "instance": "a"} | labels).items())
    return {"series": f"{metric}{{{pairs}}}", "values": values}


def _histogram(metric: str, *, is_late: bool, **labels: str) -> list[dict[str, str]]:
    """One whose observations, ten a minute, all lie below 0.05, or between that and 10."""
    bounds = {"0.05": "0x60" if is_late else "0+10x60", "10": "0+10x60", "+Inf": "0+10x60"}
    return [_series(f"{metric}_bucket", values, le=bound, **labels) for bound, values in bounds.items()]


_WELL = [
    _series("up", "1x60"),
    _series("headrace_num_requests_running", "5x60"),
    _series("headrace_num_requests_waiting", "0 3 1 0 2x56"),
    _series("headrace_engine_steps_total", "0+900x60"),
    _series("headrace_engine_hangs_total", "1x60"),
    _series("headrace_engine_step_age_seconds", "0 1 0x58"),
    _series("headrace_requests_finished_total", "3x60", finished_reason="error"),
    _series("headrace_requests_finished_total", "0+60x60", finished_reason="stop"),
    _series("headrace_requests_shed_total", "0+1x60", reason="queue_full", tier="batch"),
    _series("headrace_requests_shed_total", "0+500x60", reason="rate_limit", tier="batch"),
    _series("headrace_journal_active", "1x60"),
    _series("headrace_kv_cache_usage_ratio", "0.99 0.9x59"),
    _series("headrace_num_preemptions_total", "0+1x60"),
    *_histogram("headrace_time_to_first_token_seconds", is_late=False, tier="standard"),
    _series("headrace_ttft_target_seconds", "8x60", tier="standard"),
    *_histogram("headrace_inter_token_latency_seconds", is_late=False, tier="standard"),
    *_histogram("headrace_event_loop_lag_seconds", is_late=False),
]
# What makes each alert be raised, in place of the same series above; its further labels and what it says.
_ILL: dict[str, tuple[list[dict[str, str]], dict[str, str], str]] = {
    "HeadraceDown": ([_series("up", "1x50 0x10")], {}, "a does not answer"),
    "HeadraceNoSteps": (
        [_series("headrace_engine_steps_total", "0+900x50 45000x10")],
        {},
        "a has 7 requests and computes none of them",
    ),
    "HeadraceEngineHangs": (
        [_series("headrace_engine_hangs_total", "1x50 2x10")],
        {},
        "a step of a takes or took longer than watchdog_soft_s; its log says what all threads did",
    ),
    "HeadraceAnswersFail": (
        [_series("headrace_requests_finished_total", "3x50 4+1x10", finished_reason="error")],
        {"finished_reason": "error"},
        "a ends answers with errors",
    ),
    "HeadraceRestarts": (
        [_series("headrace_engine_steps_total", "0+900x10 0+900x10 0+900x10 0+900x30")],
        {},
        "a has started 3 times within an hour",
    ),
    "HeadraceJournalInactive": (
        [_series("headrace_journal_active", "1x50 0x10")],
        {},
        "a cannot write its journal: a restart would end its streams",
    ),
    "HeadraceQueueGrows": (
        [_series("headrace_num_requests_waiting", "0x30 0+10x30")],
        {},
        "more and more requests wait at a",
    ),
    "HeadraceFirstTokensLate": (
        _histogram("headrace_time_to_first_token_seconds", is_late=True, tier="standard"),
        {"tier": "standard"},
        "of the standard requests of a one in a hundred waits 9.9s for its first token",
    ),
    "HeadraceTokensLate": (
        _histogram("headrace_inter_token_latency_seconds", is_late=True, tier="standard"),
        {"tier": "standard"},
        "standard streams of a stand for 9.9s between two tokens",
    ),
    "HeadraceSheds": (
        [_series("headrace_requests_shed_total", "0+21x60", reason="queue_full", tier="batch")],
        {},
        "a refuses 25.93% of all requests for want of time or room",
    ),
    "HeadraceCacheFull": (
        [_series("headrace_kv_cache_usage_ratio", "0.9x45 0.97x15")],
        {},
        "a holds 97% of its KV cache: requests wait for memory",
    ),
    "HeadracePreempts": (
        [_series("headrace_num_preemptions_total", "0+9x60")],
        {},
        "a computes sequences again that it had no room for",
    ),
    "HeadraceEventLoopLate": (
        _histogram("headrace_event_loop_lag_seconds", is_late=True),
        {},
        "the event loop of a is 9.9s late: something blocks it, or the CPU is not its own",
    ),
}


def _case(name: str, ill: list[dict[str, str]], labels: dict[str, str], summary: str) -> dict[str, Any]:
    """A test of promtool's: an hour of these series, at whose end this alert is raised and no other."""
    replaced = {series["series"] for series in ill}
    severity = next((alert["labels"]["severity"] for alert in ALERTS if alert["alert"] == name), "")
    own = {"job": "headrace", "instance": "a", "severity": severity} | labels
    raised = [{"exp_labels": own, "exp_annotations": {"summary": summary}}]
    return {
        "name": name,
        "interval": "1m",
        "input_series": ill + [series for series in _WELL if series["series"] not in replaced],
        "alert_rule_test": [
            {"eval_time": "1h", "alertname": rule["alert"], "exp_alerts": raised if rule["alert"] == name else []}
            for rule in ALERTS
        ],
    }


def test_each_alert_is_raised_by_what_it_is_about_and_by_nothing_else(tmp_path: Path) -> None:
    assert set(_ILL) == {alert["alert"] for alert in ALERTS}
    cases = [_case("none", [], {}, ""), *(_case(name, *what) for name, what in _ILL.items())]
    (tmp_path / "cases.yml").write_text(yaml.safe_dump({"rule_files": [f"{CONFIGS}/alerts.yml"], "tests": cases}))
    command = [need_program("promtool"), "test", "rules", str(tmp_path / "cases.yml")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
