"""Streams of an earlier process: their logs made again, and those that are not over handed to the engine.

Runs on the event loop once the model is loaded, before the server is ready. What was fed to a stream's generation is
fed to one like it; a log has an entry per token, so every cursor means what it did. The tokens themselves are computed
again as part of the prompt.
"""

import logging
from collections.abc import Callable, Sequence
from functools import partial

import anyio
import anyio.lowlevel

from headrace.server.api_keys import standing_of
from headrace.server.engine_client import EngineClient
from headrace.server.errors import BadRequestError, ContextLengthError, EngineFailedError, UnavailableError
from headrace.server.generation import Generation, Stages
from headrace.server.generator import Generator
from headrace.server.journal import Journal, RecordedStream, Recording
from headrace.server.stream_registry import NativeStream, StreamRegistry

logger = logging.getLogger(__name__)

# Restarts without a token between, after which a stream may be what ends the process. It is taken up alone then, so
# that no other counts as suspicious for its sake, and after the latter number no more.
_NUM_SUSPICIOUS_RESTARTS = 2
_MAX_VAIN_RESTARTS = 5

# Called with the id of a native stream, and its generation, once that is over.
OnEnd = Callable[[str, Generation], None]

_Unfinished = tuple[NativeStream, RecordedStream]


async def restore_streams(journal: Journal, generator: Generator, registry: StreamRegistry, on_end: OnEnd) -> None:
    """Take in what the journal holds: what is finished can be read again, all else goes on at its next token.

    Streams of tenants that are none any more are erased. Those that were taken up often and came no further end with an
    error, and so do those that no longer fit the server.
    """
    client = generator.client
    tenants = frozenset({""}) if generator.keys is None else generator.keys.tenants
    recording = await _read(journal, client)
    gone = dict(recording.gone)
    suspects: list[_Unfinished] = []
    others: list[_Unfinished] = []
    for recorded in recording.streams:
        await anyio.lowlevel.checkpoint()
        record = recorded.record
        if record.tenant not in tenants:
            gone[record.id] = record.tenant
            continue
        stream = _replay(generator, recorded)
        if stream.generation.is_over:
            registry.add(stream)
            registry.finish(stream.id)
        elif recorded.num_vain_restarts < _NUM_SUSPICIOUS_RESTARTS:
            others.append((stream, recorded))
        else:
            suspects.append((stream, recorded))
    for id, tenant in gone.items():
        registry.remember_gone(id, tenant)
    try:
        for suspect in suspects:
            await _take_up([suspect], journal, generator, registry, on_end)
            log = suspect[0].generation.log
            with log.subscribe(log.end) as subscriber:
                await subscriber.next()
        await _take_up(others, journal, generator, registry, on_end)
    except UnavailableError:  # the server drains already: the next one's
        return
    for stream, _ in (*suspects, *others):
        registry.unsubscribed(stream, client.clock())  # from here on it is missed where it has no reader
    registry.is_whole = True
    if recording.streams or gone:
        num_unfinished = len(suspects) + len(others)
        logger.info("the journal held %d unfinished streams, and %d that cannot go on", num_unfinished, len(gone))


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
    unfinished: Sequence[_Unfinished], journal: Journal, generator: Generator, registry: StreamRegistry, on_end: OnEnd
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
        outputs = (output for _, output in recorded.outputs if output is not None)
        token_ids = tuple(token_id for output in outputs for token_id in output.token_ids)
        try:
            if recorded.num_vain_restarts >= _MAX_VAIN_RESTARTS:
                raise EngineFailedError(f"{recorded.num_vain_restarts} times the server ended before the next token")
            await generator.resume(recorded.record.recipe, stream.generation, token_ids, stream.tenant)
        except (EngineFailedError, BadRequestError, ContextLengthError) as error:
            client.cancel(stream.generation, error)
        stream.generation.on_end.append(partial(on_end, stream.id))
        registry.add(stream)


def _replay(generator: Generator, recorded: RecordedStream) -> NativeStream:
    """A stream with the log that it had, as far as it is recorded; one that is not over counts as resumed there."""
    record, now = recorded.record, generator.client.clock()
    tier, _ = standing_of(generator.keys, record.tenant)

    def make() -> Generation:
        stages = Stages(record.received_s, record.submitted_s, record.submitted_s)
        generation = generator.make(record.recipe, record.log_id, stages, tier)
        generation.is_journaled = True
        return generation

    stream = NativeStream(
        record.id,
        record.tenant,
        make(),
        record.created_s,
        record.continues_alone,
        unread_since_s=None,
        grace_s=record.grace_s,
        restored_s=now,
    )
    for at_s, output in (*recorded.outputs, (now, None)):
        if stream.generation.is_over:
            break
        if output is not None:
            stream.generation.receive(output, at_s)
            continue
        stream.resumed_at.append(stream.generation.log.end)
        if stream.generation.num_output_tokens == 0:
            stream.generation = make()  # its prompt is computed from the beginning, and scored
    return stream
