"""What is kept of answers, for how long and how much, and that every reader gets the whole of one."""

import anyio
import pytest
from starlette.types import Message, Send

from headrace.server.errors import IdempotencyKeyReusedError
from headrace.server.idempotency import Idempotency, Recording

pytestmark = pytest.mark.anyio


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


async def send_nowhere(message: Message) -> None:
    pass


async def answered(
    idempotency: Idempotency,
    key: str,
    *,
    body: bytes = b"",
    size: int = 1000,
    status: int = 200,
    has_failed: bool = False,
) -> bool:
    """Ask, and make the answer if there is none; returns whether there was one."""

    async def respond(send: Send) -> None:
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b"x" * size, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    recording, is_first = await idempotency.claim("/path", "", key, body)
    if is_first:
        await recording.make(respond)
        idempotency.settle(recording, has_failed=has_failed)
    await recording.read(send_nowhere, dict)
    return not is_first


async def test_an_answer_is_kept_for_its_time() -> None:
    clock = Clock()
    idempotency = Idempotency(clock, ttl_s=60, max_bytes=2**20)
    assert not await answered(idempotency, "a")
    clock.now += 59
    assert await answered(idempotency, "a")
    clock.now += 1
    assert not await answered(idempotency, "a")
    clock.now += 60
    idempotency.sweep()
    assert (len(idempotency._finished), idempotency._num_bytes) == (0, 0)


async def test_the_oldest_answers_make_room() -> None:
    idempotency = Idempotency(Clock(), ttl_s=60, max_bytes=10 * 4096)
    for key in "abcdefghijklmnopqrstuvwxyz":
        assert not await answered(idempotency, key, size=2048)
        assert idempotency._num_bytes <= 10 * 4096
    assert [key for _, key in idempotency._finished] == [*"qrstuvwxyz"]
    assert not await answered(idempotency, "huge", size=2**20)
    assert idempotency._num_bytes == 0


async def test_without_time_or_room_nothing_is_kept() -> None:
    for idempotency in (Idempotency(Clock(), ttl_s=0, max_bytes=2**20), Idempotency(Clock(), ttl_s=60, max_bytes=0)):
        assert [await answered(idempotency, "a") for _ in range(2)] == [False, False]


@pytest.mark.parametrize(
    ("status", "has_failed", "is_kept"),
    [(200, False, True), (201, False, True), (200, True, False), (400, False, False), (503, False, False)],
)
async def test_only_what_succeeded_is_kept(status: int, has_failed: bool, is_kept: bool) -> None:
    idempotency = Idempotency(Clock(), ttl_s=60, max_bytes=2**20)
    await answered(idempotency, "a", status=status, has_failed=has_failed)
    assert await answered(idempotency, "a") == is_kept


async def test_a_long_body_is_told_from_another() -> None:
    idempotency = Idempotency(Clock(), ttl_s=60, max_bytes=2**20)
    long = b"a" * 2**20
    assert not await answered(idempotency, "a", body=long)
    assert await answered(idempotency, "a", body=long)
    with pytest.raises(IdempotencyKeyReusedError):
        await answered(idempotency, "a", body=long + b"a")


async def test_every_reader_gets_everything_whenever_it_comes_and_however_slowly_it_reads() -> None:
    recording = Recording("", "key", b"")
    pieces = [bytes([i]) * i for i in range(1, 30)]
    may_go_on = [anyio.Event() for _ in pieces]

    async def respond(send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"X-Request-ID", b"a"), (b"b", b"c")]})
        for piece, event in zip(pieces, may_go_on, strict=True):
            await event.wait()
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    seen: list[list[Message]] = []

    async def read(num_waits: int) -> None:
        messages: list[Message] = []
        seen.append(messages)

        async def send(message: Message) -> None:
            messages.append(message)
            for _ in range(num_waits):
                await anyio.lowlevel.checkpoint()

        await recording.read(send, lambda: {"x-request-id": "own"})

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(recording.make, respond)
        for num_waits, event in enumerate(may_go_on):
            tasks.start_soon(read, num_waits % 7)
            event.set()
            await anyio.wait_all_tasks_blocked() if num_waits % 3 else await anyio.lowlevel.checkpoint()
    await read(0)
    assert len(seen) == len(pieces) + 1
    for messages in seen:
        assert messages[0]["headers"] == [(b"b", b"c"), (b"x-request-id", b"own")]
        assert b"".join(message["body"] for message in messages[1:]) == b"".join(pieces)
        assert [message["more_body"] for message in messages[1:]] == [True] * (len(messages) - 2) + [False]
