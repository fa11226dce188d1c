"""Drafts of what a sequence will say next, looked up in what it has said or been told before.

The last tokens of a sequence are looked for at an earlier place in it, and what followed there is the draft, which the
next step verifies (see model_runner). Each sequence has its own: where its runs of tokens are, and how often drafts
have come true. Pure, and on the engine thread.
Papers: prompt lookup decoding (Saxena, 2023), LLMA (Yang et al., 2023); how many draft tokens pay is speculative
decoding's question (Leviathan et al., ICML 2023), here with a chance and a cost that are learned. Deviation: a draft
that comes to the sequence's end goes on in itself, as LZ77's copies do, so that what repeats is drafted at any length.
"""

from array import array
from collections.abc import Sequence as Seq
from typing import NamedTuple

import numpy as np

# Of so many tokens that are found again, the chance that what followed follows again, as long as a sequence has not
# told; and how fast the estimate follows.
_PRESUMED = {3: 0.7, 2: 0.3}
_FOLLOWING = 0.15
# Of every so many drafts that would not pay, a token is tried all the same: text changes, and what a token costs is
# known only where some are tried.
_PASSED_OVER = 16
# Runs of tokens are numbers: ids are below this.
_ID_BITS = 21
# Fewer are added one by one.
_MIN_BULK = 64


class _Runs:
    """Where each run of `size` tokens was last, of those that something follows."""

    __slots__ = ("chance", "last_ends", "num_seen", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self.chance = _PRESUMED[size]  # that the next token of a draft comes true, where those before it have
        self.last_ends: dict[int, int] = {}
        self.num_seen = 0

    def add(self, token_ids: "array[int]") -> None:
        """Enter the runs that end before the last token and are not in here."""
        size, end = self.size, len(token_ids) - 1
        first = max(self.num_seen, size - 1)  # the last token of the first new run
        if end - first >= _MIN_BULK:
            ids = np.array(token_ids[first - size + 1 : end], np.int64)
            keys = ids[: len(ids) - size + 1].copy()
            for i in range(1, size):
                keys = keys << _ID_BITS | ids[i : len(keys) + i]
            self.last_ends.update(zip(keys.tolist(), range(first + 1, end + 1), strict=True))
        else:
            for last in range(first, end):
                self.last_ends[_key(token_ids[last - size + 1 : last + 1])] = last + 1
        self.num_seen = max(first, end)


class Match(NamedTuple):
    """An earlier place of a sequence's last tokens: what followed begins at `start`."""

    runs: _Runs
    start: int

    @property
    def chance(self) -> float:
        """That the next token of its draft comes true, where those before it have."""
        return self.runs.chance


class PromptLookup:
    """A sequence's earlier places, and how far they can be trusted."""

    __slots__ = ("_num_passed_over", "_sizes", "_tried")

    def __init__(self) -> None:
        self._sizes = [_Runs(size) for size in _PRESUMED]  # the longest first
        self._tried = self._sizes[0]
        self._num_passed_over = 0

    def find(self, token_ids: "array[int]") -> Match | None:
        """The last earlier place of the last tokens, of as many of them as are found. Only ever more tokens come."""
        found = None
        for runs in self._sizes:
            runs.add(token_ids)
            if found is None and len(token_ids) > runs.size:
                start = runs.last_ends.get(_key(token_ids[-runs.size :]))
                found = None if start is None else Match(runs, start)
        return found

    def draft(self, match: Match, token_ids: "array[int]", num_tokens: int) -> tuple[int, ...]:
        """What followed at a place, so many tokens of it; where none would pay, mostly none."""
        self._tried = match.runs
        if num_tokens == 0:
            self._num_passed_over = (self._num_passed_over + 1) % _PASSED_OVER
            num_tokens = int(self._num_passed_over == 0)
        drafted = token_ids[match.start : match.start + num_tokens].tolist()
        period = len(token_ids) - match.start
        for i in range(len(drafted), num_tokens):
            drafted.append(drafted[i - period])
        return tuple(drafted)

    def learn(self, num_drafted: int, num_true: int) -> None:
        """Take note of how much of the last draft came true."""
        runs = self._tried
        for i in range(min(num_true + 1, num_drafted)):
            runs.chance += _FOLLOWING * ((i < num_true) - runs.chance)


def num_worthwhile(most: int, chance: float, num_expected: float, step_s: float, token_s: float) -> int:
    """How many draft tokens pay, each of that chance where those before it came true, in a step that takes `step_s` and
    makes `num_expected` tokens without them: as long as one more makes more tokens per second than the step does."""
    num, come_true = 0, chance
    while num < most and come_true * step_s >= token_s * num_expected:
        num += 1
        num_expected += come_true
        step_s += token_s
        come_true *= chance
    return num


def verified(draft: Seq[int], drawn: Seq[int | None]) -> tuple[int, ...]:
    """Of the tokens drawn at a draft's places, the first at the place before it, those that stand behind what came
    true: as would have been drawn one by one. `drawn` [len(draft) + 1] has None where there were no numbers."""
    token_ids: list[int] = []
    for i, token_id in enumerate(drawn):
        if token_id is None:
            break
        token_ids.append(token_id)
        if i == len(draft) or draft[i] != token_id:
            break
    return tuple(token_ids)


def _key(token_ids: "array[int]") -> int:
    key = 0
    for token_id in token_ids:
        key = key << _ID_BITS | token_id
    return key
