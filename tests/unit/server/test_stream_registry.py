"""How long native streams are kept, on a clock of the test's own."""

from typing import Any

import pytest

from headrace.scheduler.messages import FinishReason
from headrace.server.errors import GoneError, NotFoundError
from headrace.server.generation import Generation, Stages
from headrace.server.stream_registry import NativeStream, StreamRegistry


class _NoText:
    is_stopped = False

    def flush(self) -> str:
        return ""


class Clocked:
    """A registry, its streams, and the time."""

    def __init__(self, **settings: Any) -> None:
        defaults = {"grace_s": 15.0, "ttl_s": 600.0, "max_finished_bytes": 10_000}
        self.registry: StreamRegistry[NativeStream] = StreamRegistry(cancel=self.cancel, **(defaults | settings))
        self.now = 0.0
        self.cancelled: list[str] = []

    def cancel(self, generation: Generation) -> None:
        self.cancelled.append(generation.id)
        generation.end(FinishReason.CANCELLED, self.now)

    def add(self, id: str, *, continues_alone: bool = False) -> NativeStream:
        on_end = [lambda generation: self.registry.finish(generation.id)]
        generation = Generation(id, 0, 1, Stages(self.now), _NoText(), on_end)  # type: ignore[arg-type]
        stream = NativeStream(id, "", generation, 0, continues_alone, self.now)
        self.registry.add(stream)
        return stream

    def finish(self, id: str, num_chars: int = 10) -> None:
        generation = self.registry.get(id).generation
        generation.log.append("x" * num_chars, 1)
        generation.end(FinishReason.STOP, self.now)

    def sweep(self, now: float) -> None:
        self.now = now
        self.registry.sweep(now)


def test_a_stream_is_cancelled_when_nobody_has_read_it_for_the_grace_time() -> None:
    clocked = Clocked()
    clocked.add("unread")
    clocked.add("alone", continues_alone=True)
    read = clocked.add("read")
    with clocked.registry.subscribe(read, 0):
        clocked.sweep(14.9)
        assert clocked.cancelled == []
        clocked.sweep(15.0)
        assert clocked.cancelled == ["unread"]
        clocked.sweep(100.0)
    clocked.registry.unsubscribed(read, 100.0)
    clocked.sweep(114.0)
    assert clocked.cancelled == ["unread"]
    clocked.sweep(115.0)
    assert clocked.cancelled == ["unread", "read"]


def test_the_last_of_several_readers_starts_the_grace_time() -> None:
    clocked = Clocked()
    stream = clocked.add("s")
    with clocked.registry.subscribe(stream, 0):
        with clocked.registry.subscribe(stream, 0):
            pass
        clocked.registry.unsubscribed(stream, 1.0)
        clocked.sweep(50.0)
        assert clocked.cancelled == []


def test_a_finished_stream_is_kept_for_its_time_then_remembered_as_gone() -> None:
    clocked = Clocked()
    clocked.add("s")
    clocked.finish("s")
    clocked.sweep(599.9)
    assert clocked.registry.get("s").generation.is_over
    clocked.sweep(600.0)
    with pytest.raises(GoneError):
        clocked.registry.get("s")
    with pytest.raises(NotFoundError):
        clocked.registry.get("never was")


def test_over_the_byte_limit_the_least_recently_read_finished_stream_goes_and_never_a_running_one() -> None:
    clocked = Clocked(max_finished_bytes=11_000)
    for id in ("a", "b", "c", "running"):
        clocked.add(id, continues_alone=True)
    clocked.registry.get("running").generation.log.append("x" * 50_000, 1)
    clocked.finish("a", 1000)
    clocked.finish("b", 1000)
    with clocked.registry.subscribe(clocked.registry.get("a"), 0):
        pass
    clocked.finish("c", 1000)
    clocked.sweep(1.0)
    with pytest.raises(GoneError):
        clocked.registry.get("b")
    for id in ("a", "c", "running"):
        clocked.registry.get(id)


def test_only_so_many_gone_streams_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headrace.server.stream_registry._MAX_TOMBSTONES", 2)
    clocked = Clocked(ttl_s=0.0)
    for id in ("first", "second", "third"):
        clocked.add(id)
        clocked.finish(id)
    clocked.sweep(1.0)
    with pytest.raises(NotFoundError):
        clocked.registry.get("first")
    for id in ("second", "third"):
        with pytest.raises(GoneError):
            clocked.registry.get(id)


def test_a_stream_that_another_process_makes_is_read_like_any_and_never_swept() -> None:
    clocked = Clocked()
    generation = Generation("s", 0, 1, Stages(0.0), _NoText())  # type: ignore[arg-type]
    stream = NativeStream("s", "alice", generation, 0, False, 0.0)
    clocked.registry.follow(stream)
    assert clocked.registry.is_followed("s")
    assert clocked.registry.get("s") is clocked.registry.get_owned("s", "alice") is stream
    with pytest.raises(NotFoundError):
        clocked.registry.get_owned("s", "bob")
    clocked.sweep(1000.0)
    assert clocked.cancelled == []
    clocked.registry.unfollow("s")
    assert "s" not in clocked.registry
    with pytest.raises(NotFoundError):
        clocked.registry.get("s")
    clocked.registry.follow(stream)
    clocked.registry.add(stream)
    assert not clocked.registry.is_followed("s"), "it is this one's now"
    clocked.sweep(2000.0)
    assert clocked.cancelled == ["s"]


def test_who_reads_elsewhere_is_a_reader_for_another_grace_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clocked = Clocked()
    clocked.add("s")
    with monkeypatch.context() as patch:
        patch.setattr(NativeStream, "is_read_elsewhere", True)
        clocked.sweep(15.0)
        assert clocked.cancelled == []
    clocked.sweep(29.9)
    assert clocked.cancelled == []
    clocked.sweep(30.0)
    assert clocked.cancelled == ["s"]
