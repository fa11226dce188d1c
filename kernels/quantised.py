"""Weights as a GGUF quantises them: groups of 32 inputs that share a scale.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; the block layouts are ggml's.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

GROUP_SIZE = 32
# Bytes of a group: an fp16 scale, in Q4_1 an fp16 minimum, then the quants.
GROUP_BYTES = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}


@dataclass(frozen=True, slots=True)
class QuantisedWeight:
    """A weight [out, in] of one of the types of GROUP_BYTES.

    `rows` uint8 [out, in / 32 * GROUP_BYTES]. A 4-bit group's byte i has inputs i and i + 16.
    """

    type_name: str
    rows: npt.NDArray[np.uint8]

    @property
    def shape(self) -> torch.Size:
        num_groups, rest = divmod(self.rows.shape[1], GROUP_BYTES[self.type_name])
        assert rest == 0, "a row of broken groups"
        return torch.Size((len(self.rows), num_groups * GROUP_SIZE))
