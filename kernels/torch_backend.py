"""Steps in torch: any decoder, on any device, with sampling in torch."""

import itertools
from collections.abc import Sequence

import torch

from headrace.kernels.backend import HostRead, PendingRead, StepBatch
from headrace.kernels.decoder import Decoder, KVCache, PackedBatch
from headrace.kernels.hf_decoder import HuggingFaceDecoder
from headrace.kernels.lora import rows_by_adapter
from headrace.kernels.ops import AttentionMetadata, Ops
from headrace.kernels.sampling import SamplingBatch, argmax, sample


class TorchBackend:
    """A decoder and the cache it fills. Its sampling waits for the device, so it gains nothing from running ahead."""

    is_asynchronous = False

    def __init__(self, decoder: Decoder | HuggingFaceDecoder, cache: KVCache, ops: Ops) -> None:
        self._decoder = decoder
        self._cache = cache
        self._ops = ops
        self._block_size = cache.block_size

    def forward(self, batch: StepBatch) -> torch.Tensor:
        return self._decoder.forward(self._pack(batch), self._cache)

    def argmax(self, batch: StepBatch) -> torch.Tensor:
        return argmax(self.forward(batch))

    def sample(self, logits: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
        return sample(logits, batch)

    def read(self, tensors: Sequence[torch.Tensor]) -> PendingRead:
        return HostRead([tensor.cpu() for tensor in tensors])

    def use_idle_time(self) -> bool:
        return False

    def profile(self) -> dict[str, float]:
        return {}

    def recover(self) -> None:
        pass

    def _pack(self, batch: StepBatch) -> PackedBatch:
        assert min(batch.token_ids, default=0) >= 0, "a token that is not known"
        positions: list[int] = []
        slots: list[int] = []
        new_blocks: list[int] = []
        size = self._block_size
        for query_len, end, blocks in zip(batch.query_lens, batch.context_lens, batch.block_tables, strict=True):
            own = range(end - query_len, end)
            positions += own
            slots += [blocks[i // size] * size + i % size for i in own]
            new_blocks += [blocks[i // size] for i in own if i % size == 0]
        query_starts = list(itertools.accumulate(batch.query_lens, initial=0))
        metadata = AttentionMetadata(query_starts, batch.context_lens, batch.block_tables)
        device = self._decoder.device

        def tensor(values: list[int]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        self._cache.clear(tensor(new_blocks))
        return PackedBatch(
            token_ids=tensor(batch.token_ids),
            positions=tensor(positions),
            slot_mapping=tensor(slots),
            logit_rows=tensor(batch.logit_rows),
            attention_plan=self._ops.plan_attention(metadata, size, device),
            adapter_rows=rows_by_adapter(batch.adapters, batch.query_lens, device),
        )
