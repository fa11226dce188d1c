"""Starts a stream that is kept: its client hears of it once the engine, the registry and the journal have.

Runs on the event loop, for native streams and for responses. It does not know what readers of either are sent.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import anyio
from starlette.requests import Request

from headrace.server.generation import Generation, Recipe, Stages
from headrace.server.generator import Generator
from headrace.server.protocol import GenerationParams
from headrace.server.stream_registry import StreamRegistry, StreamT


async def start_stream(
    generator: Generator,
    registry: StreamRegistry[StreamT],
    request: Request,
    params: GenerationParams,
    make: Callable[[Generation], StreamT],
    on_end: Callable[[Generation], None],
    *,
    is_journaled: bool,
    num_bytes: int,
) -> StreamT:
    """Start the one generation that `params` ask for, and keep it as `make` has it. `on_end` hears of its end.

    Raises: ApiError. One whose client leaves before the journal has it is ended and forgotten.
    """
    client = generator.client
    journal = client.journal if is_journaled else None
    is_recorded = anyio.Event()
    streams: list[StreamT] = []

    def accept(generation: Generation, recipe: Recipe) -> None:
        streams.append(make(generation))
        if journal is not None:
            generation.journal = journal
            record = replace(streams[0].record(recipe, client.clock()), hints=hints)
            journal.accept(generation.request_id, record, partial(client.call_soon, is_recorded.set))

    stages = Stages(request.state.received_s)
    tenant, hints = request.state.tenant, request.state.hints
    id = request.state.id
    await generator.start(params, id, stages, on_end, accept, tenant=tenant, hints=hints, num_bytes=num_bytes)
    request.state.is_accepted = True
    [stream] = streams
    registry.add(stream)
    if journal is not None:
        try:
            await is_recorded.wait()
        except anyio.get_cancelled_exc_class():
            if stream.generation.is_over:
                registry.forget(stream)
            else:
                stream.generation.on_end.append(lambda _: registry.forget(stream))
                client.cancel(stream.generation)
            raise
    return stream
