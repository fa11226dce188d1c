"""How long a step takes, learned while steps run; and how many prompt tokens fit beside the decoding ones.

    seconds = a + b P + g D + h K + e P C + f S

with P prompt tokens, D decoding sequences, K the tokens of context these read together, C the mean context of the
prompt tokens, and S the tokens drafted for decoding sequences. Least squares with forgetting: the normal equations fade
by 0.995 a step, and a sweep of Gauss-Seidel that keeps each coefficient from being negative follows every observation
(the equations hardly move between two, so that successive sweeps converge).
Source: the budget is that of Sarathi-Serve (OSDI 2024), chosen online in place of by hand.
A pure object, fed by the scheduler on the engine thread.
"""

import math
from collections import deque
from typing import NamedTuple

_FORGETTING = 0.995
# Until so many steps are known the coefficients move fast, and no step is taken for an outlier.
_NUM_YOUNG = 64
_YOUNG_SWEEPS = 8
# A longer step is one in which the machine did something else.
_MAX_OUTLIER = 4.0
_NUM_RESIDUALS = 256
# Sorting the residuals costs as much as all else.
_STEPS_PER_MARGIN = 16
# What of a target a step may take by its prediction: the rest is the host's.
USED_SHARE = 0.9
# Features as they are differ by five orders of magnitude, which squares in the equations.
_SCALES = (1.0, 1 / 2**8, 1 / 2**6, 1 / 2**14, 1 / 2**18, 1 / 2**4)
_NUM_FEATURES = len(_SCALES)
# What data does not tell apart goes to the first of these. The constant comes before the sequences: with one stream for
# long, a second that is thought free is soon known better, and one that is thought dear is never tried. So it is with
# drafts, which cost nothing before there were any.
_SWEEP = (1, 0, 2, 3, 4, 5)
_UNKNOWN = 1e-9
# However cheap a prompt's token seems, a decoded one is charged as no more of them.
_DEAREST_TOKEN = 100.0


class StepShape(NamedTuple):
    """What decides how long a step takes. `decode_context` adds up all decoding sequences' tokens, `prompt_context` is
    the mean over prompt tokens. `num_drafted` tokens are computed beyond the sequences' next ones."""

    num_prompt_tokens: float
    num_decoding: int
    decode_context: int
    prompt_context: float = 0.0
    num_drafted: int = 0


class StepTimeModel:
    """The coefficients, and the margin within which 95 % of the steps stay."""

    def __init__(self) -> None:
        self.num_observed = 0
        self._products = [[0.0] * _NUM_FEATURES for _ in range(_NUM_FEATURES)]
        self._moments = [0.0] * _NUM_FEATURES
        self._coefficients = [0.0] * _NUM_FEATURES
        self._residuals_s: deque[float] = deque(maxlen=_NUM_RESIDUALS)
        self.margin_s = 0.0

    def observe(self, shape: StepShape, seconds: float) -> None:
        """Learn from one step."""
        features = _features(shape)
        coefficients = self._coefficients
        predicted_s = sum(map(float.__mul__, features, coefficients))
        if self.num_observed >= _NUM_YOUNG and predicted_s > 0:
            seconds = min(seconds, _MAX_OUTLIER * predicted_s)
        self.num_observed += 1
        self._residuals_s.append(seconds - predicted_s)
        if self.num_observed % _STEPS_PER_MARGIN == 0:
            ordered = sorted(self._residuals_s)
            self.margin_s = max(0.0, ordered[int(0.95 * len(ordered))])
        for i, row in enumerate(self._products):
            feature = features[i]
            for j in range(_NUM_FEATURES):
                row[j] = _FORGETTING * row[j] + feature * features[j]
            self._moments[i] = _FORGETTING * self._moments[i] + feature * seconds
        for _ in range(_YOUNG_SWEEPS if self.num_observed <= _NUM_YOUNG else 1):
            for i in _SWEEP:
                row = self._products[i]
                if row[i] > _UNKNOWN:
                    others = sum(map(float.__mul__, row, coefficients)) - row[i] * coefficients[i]
                    coefficients[i] = max(0.0, (self._moments[i] - others) / row[i])

    def predict_s(self, shape: StepShape) -> float:
        """Seconds for a step of this shape; 0 as long as nothing is known."""
        return sum(map(float.__mul__, _features(shape), self._coefficients))

    def drafted_token_s(self) -> float:
        """Seconds that a token adds that is drafted for a decoding sequence."""
        return self._coefficients[5] * _SCALES[5]

    def prompt_token_s(self, context: float = 0.0) -> float:
        """Seconds that one more prompt token adds."""
        return self._coefficients[1] * _SCALES[1] + self._coefficients[4] * _SCALES[4] * context

    def prefill_budget(self, target_s: float, decoding: StepShape, prompt_context: float) -> float:
        """P* = (0.9 target - margin - a - g D - h K) / (b + e C): the prompt tokens with which a step stays within the
        target, where `prompt_context` tokens come before them and C is half of themselves more. 0 where decoding alone
        takes longer."""
        room_s = USED_SHARE * target_s - self.margin_s - self.predict_s(decoding)
        token_s = self.prompt_token_s(prompt_context)
        growth_s = self._coefficients[4] * _SCALES[4]
        if room_s <= 0:
            return 0.0
        if room_s == float("inf") or (token_s <= 0 and growth_s <= 0):
            return float("inf")
        # The root of growth / 2 P^2 + token P = room, in the form that stands growth 0.
        return 2 * room_s / (token_s + math.sqrt(token_s**2 + 2 * growth_s * room_s))

    def decode_cost(self) -> tuple[float, float]:
        """(g / b, h / b): what a decoded token costs, and each token of its context, in prompt tokens."""
        token_s = self.prompt_token_s()
        if token_s <= 0:
            return 1.0, 0.0
        sequence_s, context_s = self._coefficients[2] * _SCALES[2], self._coefficients[3] * _SCALES[3]
        return min(_DEAREST_TOKEN, sequence_s / token_s), min(1.0, context_s / token_s)


def _features(shape: StepShape) -> tuple[float, ...]:
    num_prompt, num_decoding, context, prompt_context, num_drafted = shape
    return (
        1.0,
        num_prompt * _SCALES[1],
        num_decoding * _SCALES[2],
        context * _SCALES[3],
        num_prompt * prompt_context * _SCALES[4],
        num_drafted * _SCALES[5],
    )
