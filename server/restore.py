"""Streams of an earlier process: their logs made again, and those that are not over handed to the engine.

Runs on the event loop once the model is loaded, before the server is ready. What was fed to a stream's generation is
fed to one like it; a log has an entry per token, so every cursor means what it did. The tokens themselves are computed
again as part of the prompt.
"""

import logging
from collections.abc import Callable
from functools import partial

import anyio
import anyio.lowlevel

from headrace.server.api_keys import standing_of
from headrace.server.errors import UnavailableError
from headrace.server.generation import Generation, Stages
from headrace.server.generator import Generator
from headrace.server.journal import Journal, RecordedStream, Recording
from headrace.server.stream_registry import NativeStream, StreamRegistry

logger = logging.getLogger(__name__)

# What is resumed so often without a token between may be what ends the process.
_MAX_VAIN_RESTARTS = 5

# Called with the id of a native stream, and its generation, once that is over.
OnEnd = Callable[[str, Generation], None]


async def restore_streams(journal: Journal, generator: Generator, registry: StreamRegistry, on_end: OnEnd) -> None:
    """Take in what the journal holds: what is finished can be read again, all else goes on at its next token.

    Streams of tenants that are none any more are erased, and those that were taken up often and came no further.
    """
    call_soon = generator.client.call_soon
    tenants = frozenset({""}) if generator.keys is None else generator.keys.tenants
    recording = Recording()
    is_read, is_recorded = anyio.Event(), anyio.Event()

    def take(found: Recording) -> None:
        nonlocal recording
        recording = found
        is_read.set()

    journal.read(partial(call_soon, take))
    await is_read.wait()
    gone = dict(recording.gone)
    unfinished: list[tuple[NativeStream, RecordedStream]] = []
    for recorded in recording.streams:
        await anyio.lowlevel.checkpoint()
        record = recorded.record
        latest = [output for _, output in recorded.outputs[-_MAX_VAIN_RESTARTS:]]
        if record.tenant not in tenants or latest == [None] * _MAX_VAIN_RESTARTS:
            gone[record.id] = record.tenant
            continue
        stream = _replay(generator, recorded)
        if stream.generation.is_over:
            registry.add(stream)
            registry.finish(stream.id)
        else:
            unfinished.append((stream, recorded))
    for id, tenant in gone.items():
        registry.remember_gone(id, tenant)
    journal.resume(
        {stream.generation.request_id: stream.id for stream, _ in unfinished}, partial(call_soon, is_recorded.set)
    )
    await is_recorded.wait()
    for stream, recorded in unfinished:
        outputs = (output for _, output in recorded.outputs if output is not None)
        token_ids = tuple(token_id for output in outputs for token_id in output.token_ids)
        recipe = recorded.record.recipe
        try:
            generator.resume(recipe, stream.generation, token_ids, partial(on_end, stream.id), stream.tenant)
        except UnavailableError:  # the server drains already: the next one's
            return
        registry.add(stream)
    registry.is_whole = True
    if recording.streams or gone:
        logger.info("the journal held %d streams that go on, and %d that cannot", len(unfinished), len(gone))


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
        record.id, record.tenant, make(), record.created_s, record.continues_alone, now, record.grace_s
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
