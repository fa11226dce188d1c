"""When requests run out of time: queue, first token, stall and total, in one heap that is read once per step.

Owned by the engine thread. A sequence has one entry or two, with the earliest of its deadlines when it was made; one
that turns out to lie later is moved there when it comes up. No timer runs for any request.
"""

import heapq
from collections.abc import Iterator, Mapping

from headrace.scheduler.sequence import Sequence

# How many entries of finished requests are kept before the heap is rebuilt, beside as many as there are sequences.
_MIN_STALE = 64


class DeadlineHeap:
    """The deadlines of the sequences in `alive`, which maps request ids to them."""

    def __init__(self, alive: Mapping[int, Sequence]) -> None:
        self._alive = alive
        self._heap: list[tuple[float, int]] = []

    def watch(self, sequence: Sequence) -> None:
        """Look at a sequence whose next deadline is new."""
        at_s = sequence.next_deadline_s
        if at_s == float("inf"):
            return
        heapq.heappush(self._heap, (at_s, sequence.request.request_id))
        if len(self._heap) > 4 * len(self._alive) + _MIN_STALE:
            # Most of the heap belongs to requests that are over.
            self._heap = [entry for entry in self._heap if entry[1] in self._alive]
            heapq.heapify(self._heap)

    def pop_expired(self, now: float) -> Iterator[Sequence]:
        """The sequences that are out of time, each once as long as the caller ends it."""
        while self._heap and self._heap[0][0] <= now:
            _, request_id = heapq.heappop(self._heap)
            if (sequence := self._alive.get(request_id)) is None:
                continue
            if (at_s := sequence.next_deadline_s) <= now:
                yield sequence
            elif at_s != float("inf"):
                heapq.heappush(self._heap, (at_s, request_id))
