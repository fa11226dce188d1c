"""The registry against a plain list of streams, through any sequence of events on a clock of the test's own."""

import dataclasses
from typing import Any

import pytest
from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fake_engine import byte_tokenizer
from headrace.scheduler.messages import FinishReason
from headrace.server.detokenizer import Detokenizer
from headrace.server.errors import GoneError, NotFoundError
from headrace.server.generation import Generation, Stages
from headrace.server.stream_log import Subscriber
from headrace.server.stream_registry import NativeStream, StreamRegistry

TOKENIZER = byte_tokenizer()
GRACE_S, TTL_S = 5.0, 20.0


@dataclasses.dataclass
class Expected:
    """What the test knows of a stream."""

    stream: NativeStream
    readers: list[Subscriber] = dataclasses.field(default_factory=list)
    unread_since_s: float | None = None
    last_read: int = 0
    is_gone: bool = False

    @property
    def generation(self) -> Generation:
        return self.stream.generation


class RegistryMachine(RuleBasedStateMachine):
    @initialize(max_kib=st.integers(0, 64))
    def start(self, max_kib: int) -> None:
        self.max_bytes = max_kib * 1024
        self.registry: StreamRegistry[NativeStream] = StreamRegistry(
            cancel=self.cancel, grace_s=GRACE_S, ttl_s=TTL_S, max_finished_bytes=self.max_bytes
        )
        self.now = 0.0
        self.num_reads = 0
        self.streams: dict[str, Expected] = {}
        self.cancelled: list[str] = []

    def cancel(self, generation: Generation) -> None:
        self.cancelled.append(generation.id)
        generation.end(FinishReason.CANCELLED, self.now)

    @property
    def kept(self) -> list[str]:
        return [id for id, expected in self.streams.items() if not expected.is_gone]

    @rule(continues_alone=st.booleans())
    def add(self, continues_alone: bool) -> None:
        id = f"stream{len(self.streams)}"
        generation = Generation(
            id=id,
            request_id=len(self.streams),
            num_prompt_tokens=1,
            stages=Stages(self.now),
            detokenizer=Detokenizer(TOKENIZER, ()),
            on_end=[lambda generation: self.finished(generation.id)],
        )
        stream = NativeStream(id, "", generation, 0, continues_alone, self.now)
        self.registry.add(stream)
        self.streams[id] = Expected(stream, unread_since_s=self.now)

    def finished(self, id: str) -> None:
        self.registry.finish(id)
        self.num_reads += 1
        self.streams[id].last_read = self.num_reads

    @precondition(lambda self: self.streams)
    @rule(data=st.data(), num_chars=st.integers(0, 20_000))
    def produce_and_finish(self, data: st.DataObject, num_chars: int) -> None:
        expected = self.streams[data.draw(st.sampled_from(sorted(self.streams)))]
        if not expected.generation.is_over:
            expected.generation.log.append("x" * num_chars, 1)
            expected.generation.end(FinishReason.STOP, self.now)

    @precondition(lambda self: self.kept)
    @rule(data=st.data())
    def begin_to_read(self, data: st.DataObject) -> None:
        expected = self.streams[data.draw(st.sampled_from(self.kept))]
        subscriber = self.registry.subscribe(self.registry.get(expected.stream.id), 0)
        subscriber.__enter__()
        expected.readers.append(subscriber)
        expected.unread_since_s = None
        self.num_reads += 1
        expected.last_read = self.num_reads

    @rule(data=st.data())
    def end_reading(self, data: st.DataObject) -> None:
        read = sorted(id for id, expected in self.streams.items() if expected.readers)
        if read:
            expected = self.streams[data.draw(st.sampled_from(read))]
            expected.readers.pop().__exit__(None, None, None)
            self.registry.unsubscribed(expected.stream, self.now)
            if not expected.readers:
                expected.unread_since_s = self.now

    @rule(seconds=st.sampled_from([0.0, 1.0, GRACE_S, TTL_S - 1, TTL_S]))
    def sweep(self, seconds: float) -> None:
        self.now += seconds
        due = [
            id
            for id, expected in self.streams.items()
            if not expected.generation.is_over
            and not expected.stream.continues_alone
            and expected.unread_since_s is not None
            and self.now - expected.unread_since_s >= GRACE_S
        ]
        before = {id for id in self.kept if self.streams[id].generation.is_over}
        self.cancelled.clear()
        self.registry.sweep(self.now)
        assert sorted(self.cancelled) == sorted(due), "cancelled when nobody has read it for the grace time"
        gone = [id for id in self.kept if not self.is_kept(id)]
        for id in gone:
            self.streams[id].is_gone = True
        finished = [self.streams[id] for id in self.kept if self.streams[id].generation.is_over]
        for expected in finished:
            end_s = expected.generation.stages.end_s
            assert end_s is not None
            assert self.now - end_s < TTL_S, "kept beyond its time"
        assert sum(expected.generation.log.num_bytes for expected in finished) <= self.max_bytes
        for id in gone:
            assert self.streams[id].generation.is_over, "a running stream is never forgotten"
            end_s = self.streams[id].generation.stages.end_s
            assert end_s is not None
            if self.now - end_s < TTL_S:
                # Room was wanted: whoever stayed of those that could have gone was read later.
                assert all(self.streams[other].last_read > self.streams[id].last_read for other in before - set(gone))

    def is_kept(self, id: str) -> bool:
        try:
            return self.registry.get(id) is self.streams[id].stream
        except GoneError:
            return False

    @invariant()
    def what_is_kept_is_found_and_what_was_kept_is_remembered(self) -> None:
        for id, expected in getattr(self, "streams", {}).items():
            assert self.is_kept(id) != expected.is_gone

    @invariant()
    def what_never_was_is_not_found(self) -> None:
        if hasattr(self, "registry"):
            with pytest.raises(NotFoundError):
                self.registry.get("never")

    def teardown(self) -> None:
        for expected in getattr(self, "streams", {}).values():
            for reader in expected.readers:
                reader.__exit__(None, None, None)


TestRegistryMachine: Any = RegistryMachine.TestCase
TestRegistryMachine.settings = settings(
    max_examples=40,
    stateful_step_count=40,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
