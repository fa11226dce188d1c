"""A target's start and end, and a worker's answer as a client would have seen it."""

import asyncio
import sys
from pathlib import Path
from typing import Any

import pytest

from headrace.benchmarks.compared_target import ComparedTarget, TargetError, timeline_of
from headrace.benchmarks.measurement import Outcome, Run
from headrace.benchmarks.peers import Recipe
from headrace.benchmarks.prompts import PromptMaker
from headrace.benchmarks.settings import ClosedLoop

# Sheds its first request, as a server does that is still loading.
LOADING_SERVER = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    num_posts = 0
    def do_GET(self):
        self.send_error(404)
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        Handler.num_posts += 1
        if Handler.num_posts == 1:
            self.send_error(503)
            return
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'data: {"choices": [{"text": "hi"}]}\\n\\n' * 3 + b"data: [DONE]\\n\\n")
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
LOAD = ClosedLoop(prompt_tokens=154, output_tokens=3)


def answer(**fields: Any) -> dict[str, Any]:
    return {"wave": 1, "launched_s": 5.0, "token_s": [5.5, 6.0, 6.25], "prompt_tokens": 150, "error": "", **fields}


def test_times_and_lengths_are_those_of_the_worker() -> None:
    timeline = timeline_of(answer(), LOAD)
    assert timeline.outcome is Outcome.OK
    assert (timeline.wave, timeline.ttft_s, timeline.itls_s) == (1, 0.5, [0.5, 0.25])
    assert timeline.itls_per_token_s == timeline.itls_s
    assert (timeline.prompt_tokens, timeline.num_output_tokens) == (150, 3)


def test_an_error_or_an_answer_without_tokens_is_a_failure() -> None:
    assert timeline_of(answer(error="no room"), LOAD).outcome is Outcome.FAILED
    assert timeline_of(answer(error="no room"), LOAD).detail == "no room"
    assert timeline_of(answer(token_s=[]), LOAD).outcome is Outcome.FAILED


def test_a_server_is_asked_until_it_listens_and_has_loaded(tmp_path: Path) -> None:
    async def start_and_measure() -> tuple[float, Run]:
        command = (sys.executable, "-c", LOADING_SERVER, "{port}")
        target = ComparedTarget.of(Recipe(name="server", command=command), tmp_path / "log")
        try:
            first_token_s = await target.start("hello")
            run, _ = await target.measure(ClosedLoop(requests_per_stream=2, output_tokens=3), 2, PromptMaker(1))
        finally:
            await target.end()
        return first_token_s, run

    first_token_s, run = asyncio.run(start_and_measure())
    assert first_token_s > 0
    assert [timeline.outcome for timeline in run.timelines] == [Outcome.OK] * 4


@pytest.mark.parametrize(
    ("script", "complaint"),
    [("import sys; sys.exit('no such model')", "exit code 1"), ("", "exit code 0")],
    ids=["fails", "ends"],
)
def test_a_server_that_ends_before_it_answers_is_told_with_what_it_printed(
    script: str, complaint: str, tmp_path: Path
) -> None:
    async def start() -> None:
        target = ComparedTarget.of(Recipe(name="s", command=(sys.executable, "-c", script, "{port}")), tmp_path / "log")
        await target.start("hello")

    with pytest.raises(TargetError, match=complaint):
        asyncio.run(start())


def test_a_program_that_is_not_there_is_told(tmp_path: Path) -> None:
    target = ComparedTarget.of(Recipe(name="s", command=("/no/such/program",)), tmp_path / "log")
    with pytest.raises(TargetError, match="cannot be started"):
        asyncio.run(target.start("hello"))
