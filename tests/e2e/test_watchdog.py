"""An engine that hangs or dies, as supervisors and clients see it: a real process on a fake model."""

from pathlib import Path

import httpx

from raw_client import RawRequest
from server_process import ServerProcess, serving_script
from waiting import until


def stream(server: ServerProcess, prompt: str) -> RawRequest:
    return RawRequest(server.url(), "/v1/completions", {"prompt": prompt, "max_tokens": 4, "stream": True})


def probes(server: ServerProcess) -> list[tuple[int, str]]:
    answers = [httpx.get(f"{server.url()}/{probe}") for probe in ("health", "ready")]
    return [(answer.status_code, answer.json()["status"]) for answer in answers]


def test_a_step_that_takes_too_long_is_told_and_one_that_never_ends_ends_the_process(tmp_path: Path) -> None:
    release = tmp_path / "release"
    with serving_script("--watchdog-soft-s", "1", "--watchdog-hard-s", "3", FAKE_RELEASE=str(release)) as server:
        with stream(server, "hold on") as held:
            until(lambda: probes(server) == [(503, "engine_hung")] * 2, "it is said to hang")
            assert httpx.get(f"{server.url()}/health").json()["step_age_s"] >= 1
            assert server.metrics()["headrace_engine_hangs_total"] == 1
            assert server.metrics()["headrace_engine_step_age_seconds"] >= 1
            release.touch()
            until(lambda: probes(server) == [(200, "ok"), (200, "ready")], "it goes on")
            assert httpx.get(f"{server.url()}/health").json()["step_age_s"] == 0
            held.read_until(b"data: [DONE]\n\n")
        assert server.output.count("in launch") == 1, "the stacks of all threads, once"
        assert "the engine goes on" in server.output

        body = {"prompt": "hang on", "max_tokens": 4}
        events_url = httpx.post(f"{server.url()}/v1/streams", json=body).json()["events_url"]
        whole = RawRequest(server.url(), "/v1/completions", body)
        with stream(server, "hang on") as streamed, RawRequest(server.url(), events_url) as native, whole:
            for request in (streamed, native, whole):
                assert request.read_to_end().count(b"the engine hangs") == 1
            assert whole.received.startswith(b"HTTP/1.1 500")
            assert native.received.count(b"event: error") == streamed.received.count(b'"error":{') == 1
        assert server.process.wait(20) == 70


def test_an_engine_thread_that_dies_ends_the_process_once_its_stream_has_heard() -> None:
    with serving_script() as server, stream(server, "die now") as request:
        assert request.read_to_end().count(b'"code":"engine_error"') == 1
        assert server.process.wait(20) == 1
