"""How much of the KV cache the running sequences will come to hold at most: what admission looks at.

With cur_j the tokens that sequence j holds and r_j how many it will still add, ordered by r from the longest, the cache
is fullest when some sequence i ends: max over i of (cur_1 + ... + cur_i + i r_i).
Source: Past-Future scheduler (ASPLOS 2025). Deviations: how long an answer becomes is its mean over the last answers
that were longer than it is already, where the paper draws from these; blocks that several share count once.
Pure, and on the engine thread.
"""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence as Seq

import numpy as np

_NUM_ANSWERS = 512
# What is presumed of answers before there were any: as many of each.
_PRESUMED = (64, 128, 256, 512) * 4
# Older tokens fade.
_MAX_COUNTED_TOKENS = 20_000


class OutputLengths:
    """The lengths of the last answers, in tokens."""

    def __init__(self) -> None:
        self._recent = deque(_PRESUMED, maxlen=_NUM_ANSWERS)
        self._ordered = sorted(_PRESUMED)
        self._is_real = False
        self._sums: np.ndarray | None = None  # of the lengths from each on
        self._num_ended = float(len(_PRESUMED))
        self._num_tokens = float(sum(_PRESUMED))

    def observe(self, num_tokens: int) -> None:
        """Learn of an answer that came to its end."""
        self._num_ended += 1
        if not self._is_real and len(self._recent) >= 2 * len(_PRESUMED):
            self._is_real = True
            for presumed in _PRESUMED:
                self._recent.popleft()
                del self._ordered[bisect_left(self._ordered, presumed)]
        if len(self._recent) == _NUM_ANSWERS:
            del self._ordered[bisect_left(self._ordered, self._recent[0])]
        self._recent.append(num_tokens)
        insort(self._ordered, num_tokens)
        self._sums = None

    def count_tokens(self, num_tokens: int) -> None:
        """Count tokens of answers that may go on."""
        self._num_tokens += num_tokens
        if self._num_tokens > _MAX_COUNTED_TOKENS:
            self._num_tokens /= 2
            self._num_ended /= 2

    @property
    def mean(self) -> float:
        """Tokens per end: unlike the mean of those that have ended, it counts the answers that are not over, which are
        the longer ones."""
        return self._num_tokens / self._num_ended

    def expected_remaining(self, num_tokens: np.ndarray) -> np.ndarray:
        """[N] how many more tokens answers get that have `num_tokens` [N]. One that is longer than any before is
        presumed to be half done."""
        ordered = np.asarray(self._ordered)
        first = np.searchsorted(ordered, num_tokens, side="right")
        num_longer = len(ordered) - first
        expected: np.ndarray = np.where(
            num_longer > 0,
            self._suffix_sums()[first] / np.maximum(num_longer, 1) - num_tokens,
            np.maximum(num_tokens, 1),
        )
        return expected

    def _suffix_sums(self) -> np.ndarray:
        if self._sums is None:
            self._sums = np.append(np.cumsum(self._ordered[::-1])[::-1], 0)
        return self._sums


def projected_peak(held: Seq[float] | np.ndarray, remaining: Seq[float] | np.ndarray) -> float:
    """The most tokens that sequences which hold `held` [N] and add `remaining` [N] will hold at once."""
    remaining = np.asarray(remaining, np.float64)
    order = np.argsort(-remaining, kind="stable")
    held_then = np.cumsum(np.asarray(held, np.float64)[order])
    return float((held_then + np.arange(1, len(order) + 1) * remaining[order]).max(initial=0.0))
