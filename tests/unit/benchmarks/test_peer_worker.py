"""The workers' closed loop, over an engine that yields a token of every request at every step."""

from collections.abc import Iterable
from itertools import count

from headrace.benchmarks.peer_worker import closed_loop


class FakeEngine:
    """Ends a request after its tokens; `widths` has the number that ran at each step."""

    def __init__(self, failing: str = "") -> None:
        self.left: dict[int, int] = {}
        self.widths: list[int] = []
        self.prompts: list[str] = []
        self._failing = failing

    def add(self, request_id: int, prompt: str, max_tokens: int) -> int:
        self.prompts.append(prompt)
        self.left[request_id] = 0 if prompt == self._failing else max_tokens
        return len(prompt)

    def step(self) -> Iterable[tuple[int, int, bool, str]]:
        self.widths.append(len(self.left))
        for request_id, left in list(self.left.items()):
            is_ended = left <= 1
            self.left[request_id] = left - 1
            if is_ended:
                del self.left[request_id]
            yield request_id, min(left, 1), is_ended, "" if left else "no room"


def test_each_stream_sends_its_share_one_after_the_other() -> None:
    engine = FakeEngine()
    requests = closed_loop(engine, ["a", "b", "cc", "dd"], 2, 3)
    assert engine.widths == [2] * 6
    assert engine.prompts == ["a", "b", "cc", "dd"]
    assert [request["wave"] for request in requests] == [0, 0, 1, 1]
    assert [request["prompt_tokens"] for request in requests] == [1, 1, 2, 2]


def test_every_token_has_its_time_and_a_request_the_time_of_its_launch() -> None:
    clock = count()
    [first, second] = closed_loop(FakeEngine(), ["a", "b"], 1, 2, lambda: float(next(clock)))
    assert (first["launched_s"], first["token_s"]) == (0.0, [1.0, 2.0])
    assert (second["launched_s"], second["token_s"]) == (3.0, [4.0, 5.0])


def test_a_failed_request_says_why_and_its_stream_goes_on() -> None:
    requests = closed_loop(FakeEngine(failing="a"), ["a", "b"], 1, 2)
    assert [request["error"] for request in requests] == ["no room", ""]
    assert [len(request["token_s"]) for request in requests] == [0, 2]


def test_request_ids_go_on_from_an_earlier_loop() -> None:
    engine = FakeEngine()
    closed_loop(engine, ["a", "b"], 2, 1, first_id=7)
    assert engine.left == {}
    assert len(closed_loop(engine, ["c"], 8, 1, first_id=9)) == 1
