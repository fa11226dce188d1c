"""How many replicas there should be, for how much is asked of those that are there.

Pure. A replica's pressure is the larger of two shares: of its running batch, what runs and what waits, and of what a
first token may take, what is predicted. Replicas are added or taken until the mean of it comes to what is aimed for.
Source: the rule of Kubernetes' HorizontalPodAutoscaler, its tolerance included.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass

TARGET_PRESSURE = 0.6
# Of the target: nearer than this nothing is changed.
_TOLERANCE = 0.1


@dataclass(frozen=True, slots=True)
class ReplicaPressure:
    """`batch_share` of the running batch run and wait, more than 1 where they do not fit; `ttft_share` of what a first
    token may take is predicted."""

    batch_share: float
    ttft_share: float

    @property
    def value(self) -> float:
        return max(self.batch_share, self.ttft_share)


def desired_replicas(num_replicas: int, pressures: Collection[ReplicaPressure], target: float = TARGET_PRESSURE) -> int:
    """How many replicas bring the mean pressure to `target`; as many as there are where none of them has told."""
    if not pressures:
        return num_replicas
    mean = sum(pressure.value for pressure in pressures) / len(pressures)
    if abs(mean / target - 1) <= _TOLERANCE:
        return num_replicas
    return math.ceil(num_replicas * mean / target - 1e-9)
