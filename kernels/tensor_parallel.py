"""Tensor parallelism: what one rank of a group has of each weight, and what the ranks of a group tell each other.

A product whose outputs are split needs nothing from other ranks, one whose inputs are split is summed over all of them:
two sums per layer. Which is which says the plan that transformers has for a family. The embedding and the head are
split by the tokens of the vocabulary, in equal parts, the last one padded: they may be one weight. Runs on each rank's
own thread; who starts the ranks it does not know.
Paper: Megatron-LM (Shoeybi et al., 2019).
"""

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from headrace.kernels.lora import Adapter, LowRank
from headrace.kernels.quantised import GROUP_BYTES, GROUP_SIZE, QuantisedWeight

_EMBEDDING, _HEAD = "model.embed_tokens", "lm_head"
# The axis of its weight that each style splits. What is computed alike by all ranks is not split.
_AXES = {
    "colwise": 0,
    "colwise_gather_output": 0,
    "embedding_rowwise": 0,
    "rowwise": 1,
    "replicated_with_grad_allreduce": None,
}
# How the decoder computes: heads and the feed-forward's inside are split, what a layer adds to the stream is summed.
_LAYOUT = {
    **{f"model.layers.*.self_attn.{name}_proj": 0 for name in "qkv"},
    **{f"model.layers.*.mlp.{name}_proj": 0 for name in ("gate", "up")},
    "model.layers.*.self_attn.o_proj": 1,
    "model.layers.*.mlp.down_proj": 1,
}
_VOCABULARY = {_EMBEDDING: 0, _HEAD: 0}


class UnsupportedPlanError(ValueError):
    """A model cannot be split so, or into so many parts; the message says why."""


class Group:
    """The ranks that compute one model, to one of them. Each calls the same methods in the same order."""

    def __init__(self, ranks: dist.ProcessGroup) -> None:
        self._ranks = ranks
        self.rank, self.size = ranks.rank(), ranks.size()

    @classmethod
    def open(cls, meeting_place: Path, rank: int, size: int, device: torch.device, timeout_s: float) -> "Group":
        """Meet the others at a file that is nobody else's; one group in a process at a time. What the ranks do
        together then fails where one of them keeps the others waiting for `timeout_s`.

        Raises: RuntimeError where they do not come.
        """
        # All ranks are on this machine, and nobody else shall reach them.
        loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(variable, loopback)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            init_method=meeting_place.as_uri(),
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=timeout_s),
            device_id=device if device.type == "cuda" else None,
        )
        assert dist.group.WORLD is not None
        return cls(dist.group.WORLD)

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Add up what the ranks have, in place."""
        dist.all_reduce(x, group=self._ranks)
        return x

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """Put what the ranks have side by side, in their order: [R, n] -> [R, size * n]."""
        parts = [torch.empty_like(x) for _ in range(self.size)]
        if x.numel():
            dist.all_gather(parts, x.contiguous(), group=self._ranks)
        return torch.cat(parts, dim=1)

    def share(self, x: torch.Tensor) -> None:
        """Overwrite x with rank 0's."""
        dist.broadcast(x, group_src=0, group=self._ranks)

    def abort(self) -> None:
        """Give up what the ranks are doing together, from any thread; the group is of no use afterwards."""
        self._ranks.abort()

    def close(self) -> None:
        dist.destroy_process_group(self._ranks)


@dataclass(frozen=True, slots=True)
class Sharding:
    """What rank `rank` of `size` has. `axes` is the axis along which a module's weights are split, if they are, by the
    module's name with a * for its layer."""

    rank: int
    size: int
    axes: Mapping[str, int]

    @classmethod
    def by_plan(cls, plan: Mapping[str, str], rank: int, size: int) -> "Sharding":
        """By the plan of a Hugging Face model. Raises: UnsupportedPlanError where the decoder does not compute so."""
        if unknown := {style for style in plan.values() if style not in _AXES}:
            raise UnsupportedPlanError(f"its plan has the style {min(unknown)}")
        axes = {name: axis for name, style in plan.items() if (axis := _AXES[style]) is not None} | _VOCABULARY
        for name in sorted(axes.keys() ^ (_LAYOUT | _VOCABULARY).keys()):
            raise UnsupportedPlanError(f"its plan {'splits' if name in axes else 'does not split'} {name}")
        for name, axis in _LAYOUT.items():
            if axes[name] != axis:
                raise UnsupportedPlanError(f"its plan splits {name} along another axis")
        return cls(rank, size, axes)

    def shape(self, name: str, shape: torch.Size) -> torch.Size:
        """Of this rank's part of a parameter with that name and shape."""
        axis = self._axis(name, len(shape))
        if axis is None:
            return shape
        return torch.Size(-(-n // self.size) if i == axis else n for i, n in enumerate(shape))

    def take(self, name: str, weight: Any) -> Any:
        """This rank's part of a parameter: of a tensor, of a quantised weight, or of a safetensors slice, of which no
        more is read. A bias that is added behind a sum is rank 0's alone, and zeros to the others."""
        if isinstance(weight, QuantisedWeight):
            return self._take_quantised(name, weight)
        shape = torch.Size(weight.shape if isinstance(weight, torch.Tensor) else weight.get_shape())
        axis = self._axis(name, len(shape))
        if axis is None:
            whole: torch.Tensor = weight[:]
            is_behind_sum = self.axes.get(_module(name)) == 1
            return torch.zeros_like(whole) if is_behind_sum and self.rank else whole
        own, size = self._own(shape[axis])
        part: torch.Tensor = weight[own] if axis == 0 else weight[:, own]
        if isinstance(weight, torch.Tensor):
            part = part.clone()  # a view would hold the whole
        missing = size - part.shape[axis]
        return torch.cat((part, part.new_zeros(missing, *part.shape[1:]))) if missing else part

    def take_adapter(self, adapter: Adapter) -> Adapter:
        """This rank's part of what an adapter adds."""

        def part(name: str, whole: LowRank) -> LowRank:
            if self.axes[_module(f"{name}.weight")] == 0:
                return whole._replace(up=whole.up[self._own(len(whole.up))[0]])
            return whole._replace(down=whole.down[:, self._own(whole.down.shape[1])[0]])

        return {name: part(name, whole) for name, whole in adapter.items()}

    def _take_quantised(self, name: str, weight: QuantisedWeight) -> QuantisedWeight:
        axis = self._axis(name, 2)
        if axis is None:
            return weight
        if axis == 1:
            num_groups, rest = divmod(weight.shape[1], GROUP_SIZE * self.size)
            if rest:
                groups = f"the groups of {GROUP_SIZE} that {name} is quantised in"
                raise UnsupportedPlanError(f"tensor_parallel_size {self.size} does not divide {groups}")
            width = num_groups * GROUP_BYTES[weight.type_name]
            return replace(weight, rows=weight.rows[:, self.rank * width : (self.rank + 1) * width].copy())
        own, size = self._own(len(weight.rows))
        rows = torch.from_numpy(weight.rows[own])
        padded = torch.cat((rows, rows.new_zeros(size - len(rows), rows.shape[1])))  # a scale of zero: zeros
        return replace(weight, rows=padded.numpy())

    def _own(self, length: int) -> tuple[slice, int]:
        """This rank's part of an axis, and how long all ranks' parts are."""
        size = -(-length // self.size)
        return slice(self.rank * size, min((self.rank + 1) * size, length)), size

    def _axis(self, name: str, num_axes: int) -> int | None:
        axis = self.axes.get(_module(name))
        return axis if axis is not None and axis < num_axes else None


def _module(name: str) -> str:
    """Of a parameter's name, as plans have it."""
    return re.sub(r"\.\d+\.", ".*.", name.rpartition(".")[0])
