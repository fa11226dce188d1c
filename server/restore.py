"""Streams of an earlier process: their logs made again, and those that are not over handed to the engine.

Runs on the event loop once the model is loaded: before the server is ready, and when it takes over what another replica
has left. What was fed to a stream's generation is fed to one like it; a log has an entry per token, so every cursor
means what it did. The tokens themselves are computed again as part of the prompt.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import anyio
import anyio.lowlevel

from headrace.server.engine_client import EngineClient
from headrace.server.errors import BadRequestError, ContextLengthError, EngineFailedError, UnavailableError
from headrace.server.generation import Generation, Stages
from headrace.server.generator import Generator
from headrace.server.journal import Journal, Recording
from headrace.server.journal_rows import RecordedOutput, RecordedStream, StreamRecord
from headrace.server.standing import standing_of
from headrace.server.stream_registry import KeptStream, StreamRegistry

logger = logging.getLogger(__name__)

# Restarts without a token between, after which a stream may be what ends the process. It is taken up alone then, so
# that no other counts as suspicious for its sake, and after the latter number no more.
_NUM_SUSPICIOUS_RESTARTS = 2
_MAX_VAIN_RESTARTS = 5

# Outputs between which others have their turn.
_NUM_AT_ONCE = 32

_Unfinished = tuple[KeptStream, RecordedStream]
# By their ids, streams that are followed, each with how much of what was recorded it has been fed.
Followed = Mapping[str, tuple[KeptStream, int]]


class Shelf(NamedTuple):
    """Where the streams of a kind go: those whose ids have its prefix, unless a shelf before it has them. `on_end` is
    called with a stream's id, and its generation once that is over."""

    id_prefix: str
    kind: type[KeptStream]
    registry: StreamRegistry[Any]
    on_end: Callable[[str, Generation], None]


async def restore_streams(
    journal: Journal,
    generator: Generator,
    shelves: Sequence[Shelf],
    followed: Followed = MappingProxyType({}),
    *,
    leaves_others: bool = False,
) -> dict[str, float]:
    """Take in what the journal holds: what is finished can be read again, all else goes on at its next token. Readers
    of streams that were `followed` do not notice.

    Streams of another model and of tenants that are none any more are erased. Those that were taken up often and came
    no further end with an error, and so do those that no longer fit the server. Where it `leaves_others`, what is not
    for this server stays as it is instead: returned by its ids, with when it would not be kept any longer.
    """
    client = generator.client
    tenants = tenants_of(generator)
    recording = await _read(journal, client)
    gone = dict.fromkeys(recording.unreadable, "")
    left: dict[str, float] = {}

    def part_with(recorded: RecordedStream) -> None:
        record = recorded.record
        if leaves_others:
            left[record.id] = recorded.last_s + shelf_of(record.id, shelves).registry.ttl_s
        else:
            gone[record.id] = record.tenant

    for recorded in recording.others:
        part_with(recorded)
    suspects: list[_Unfinished] = []
    others: list[_Unfinished] = []
    for recorded in recording.streams:
        await anyio.lowlevel.checkpoint()
        record = recorded.record
        if record.tenant not in tenants:
            part_with(recorded)
            continue
        try:
            stream, num_outputs = followed.get(record.id) or (begun(generator, record, shelves), 0)
            if leaves_others and not recorded.is_finished:
                generator.check_fits(record.recipe, recorded.token_ids)
        except (BadRequestError, ContextLengthError) as error:
            logger.warning("a stream in the journal asks for what is not here: %s", error.param or error.code)
            part_with(recorded)
            continue
        stream.generation.journal = journal
        await replay(stream, recorded.outputs[num_outputs:])
        if stream.generation.is_over:
            registry = shelf_of(stream.id, shelves).registry
            registry.add(stream)
            registry.finish(stream.id)
            continue
        await replay(stream, [(client.clock(), None)])
        if recorded.num_vain_restarts < _NUM_SUSPICIOUS_RESTARTS:
            others.append((stream, recorded))
        else:
            suspects.append((stream, recorded))
    for id, tenant in gone.items():
        shelf_of(id, shelves).registry.remember_gone(id, tenant)
    try:
        for suspect in suspects:
            await _take_up([suspect], journal, generator, shelves)
            log = suspect[0].generation.log
            with log.subscribe(log.end) as subscriber:
                await subscriber.next()
        await _take_up(others, journal, generator, shelves)
    except UnavailableError:  # the server drains already: the next one's
        return left
    for stream, _ in (*suspects, *others):  # from here on each is missed where it has no reader
        shelf_of(stream.id, shelves).registry.unsubscribed(stream, client.clock())
    for shelf in shelves:
        shelf.registry.is_whole = True
    if recording.streams or gone or left:
        logger.info(
            "the journal held %d unfinished streams, %d that cannot go on, and %d that are left to others",
            len(suspects) + len(others),
            len(gone),
            len(left),
        )
    return left


def shelf_of(id: str, shelves: Sequence[Shelf]) -> Shelf:
    return next(shelf for shelf in shelves if id.startswith(shelf.id_prefix))


async def _read(journal: Journal, client: EngineClient) -> Recording:
    recordings: list[Recording] = []
    is_read = anyio.Event()

    def take(found: Recording) -> None:
        recordings.append(found)
        is_read.set()

    journal.read(partial(client.call_soon, take))
    await is_read.wait()
    return recordings[0]


async def _take_up(
    unfinished: Sequence[_Unfinished], journal: Journal, generator: Generator, shelves: Sequence[Shelf]
) -> None:
    """Have the engine go on with streams, or end them for good. Raises: UnavailableError, as `Generator.resume`."""
    client = generator.client
    client.check_accepting()  # else they would count as taken up
    is_recorded = anyio.Event()
    journal.resume(
        {stream.generation.request_id: stream.id for stream, _ in unfinished},
        partial(client.call_soon, is_recorded.set),
    )
    await is_recorded.wait()
    for stream, recorded in unfinished:
        try:
            if recorded.num_vain_restarts >= _MAX_VAIN_RESTARTS:
                raise EngineFailedError(f"{recorded.num_vain_restarts} times the server ended before the next token")
            record = recorded.record
            await generator.resume(record.recipe, stream.generation, recorded.token_ids, record.tenant, record.hints)
        except (EngineFailedError, BadRequestError, ContextLengthError) as error:
            client.cancel(stream.generation, error)
        shelf = shelf_of(stream.id, shelves)
        stream.generation.on_end.append(partial(shelf.on_end, stream.id))
        shelf.registry.add(stream)


def tenants_of(generator: Generator) -> frozenset[str]:
    """Whose streams there may be."""
    return frozenset({""}) if generator.keys is None else generator.keys.tenants


def begun(generator: Generator, record: StreamRecord, shelves: Sequence[Shelf]) -> KeptStream:
    """A recorded stream of which nothing has come yet. Raises: BadRequestError where it asks for what this version has
    not."""
    tier = standing_of(generator.keys, record.tenant, record.hints).tier
    stages = Stages(record.received_s, record.submitted_s, record.submitted_s)
    generation = generator.make(record.recipe, record.log_id, stages, tier)
    return shelf_of(record.id, shelves).kind.from_record(record, generation, generator.client.clock())


async def replay(stream: KeptStream, outputs: Sequence[RecordedOutput]) -> None:
    """Feed a stream what was recorded of it, with others' turns in between."""
    for i, (at_s, output) in enumerate(outputs, start=1):
        if stream.generation.is_over:
            break
        if output is not None:
            stream.generation.receive(output, at_s)
        else:
            stream.resumed_at.append(stream.generation.log.end)
            if stream.generation.num_output_tokens == 0:
                stream.generation.begin_again()
        if i % _NUM_AT_ONCE == 0:
            await anyio.lowlevel.checkpoint()
