"""flashinfer's wrapper as its documentation has it, computed in torch: what it is asked that it could not do, raises.

`plan` leaves what it made in the wrapper's integer workspace, and `run` reads that and the buffers, as its kernels do:
run again without a plan it computes the same, like a graph. The signatures are held to the real ones by
e2e/test_flashinfer.py.
"""

import math
from typing import Any

import torch


class BatchPrefillWithPagedKVCacheWrapper:
    """Query tokens [T, H, D] of B sequences over a cache of pages [N, S, G, D], all int32 on the host but the pages."""

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf: torch.Tensor | None = None,
        paged_kv_indptr_buf: torch.Tensor | None = None,
        paged_kv_indices_buf: torch.Tensor | None = None,
        paged_kv_last_page_len_buf: torch.Tensor | None = None,
        backend: str = "auto",
    ) -> None:
        assert kv_layout == "NHD"
        assert backend in ("auto", "fa2")
        self._workspace = float_workspace_buffer
        self._plan_workspace = torch.empty(8 * 2**20, dtype=torch.uint8, device=float_workspace_buffer.device)
        self._is_graph = use_cuda_graph
        self._buffers = (qo_indptr_buf, paged_kv_indptr_buf, paged_kv_indices_buf, paged_kv_last_page_len_buf)
        if use_cuda_graph:
            starts, page_starts, _, last_lens = self._filled()
            self._batch_size = len(starts) - 1
            assert len(page_starts) == self._batch_size + 1
            assert len(last_lens) == self._batch_size
        self._most_rows: int | None = None
        self.num_plans = 0

    def workspace_size(
        self,
        qo_indptr: torch.Tensor,
        paged_kv_indptr: torch.Tensor,
        paged_kv_indices: torch.Tensor,
        paged_kv_last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        causal: bool = False,
        sm_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        q_data_type: str | torch.dtype = "float16",
        kv_data_type: str | torch.dtype | None = None,
        seq_lens: torch.Tensor | None = None,
    ) -> tuple[int, int]:
        del num_kv_heads, page_size, causal, sm_scale, window_left, logits_soft_cap, q_data_type, kv_data_type, seq_lens
        del paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len
        num_rows = self._most_rows or int(qo_indptr[-1])
        return 4 * num_rows * num_qo_heads * (head_dim_qk + 1), 4 * 2 * (len(qo_indptr) - 1)

    def reset_workspace_buffer(self, float_workspace_buffer: torch.Tensor, int_workspace_buffer: torch.Tensor) -> None:
        self._workspace, self._plan_workspace = float_workspace_buffer, int_workspace_buffer

    def plan(
        self,
        qo_indptr: torch.Tensor,
        paged_kv_indptr: torch.Tensor,
        paged_kv_indices: torch.Tensor,
        paged_kv_last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        causal: bool = False,
        sm_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        q_data_type: str | torch.dtype = "float16",
        kv_data_type: str | torch.dtype | None = None,
        non_blocking: bool = True,
        seq_lens: torch.Tensor | None = None,
    ) -> None:
        del non_blocking
        given = (qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
        assert all(each.dtype == torch.int32 and each.ndim == 1 for each in given)
        batch_size, num_rows = len(qo_indptr) - 1, int(qo_indptr[-1])
        assert len(paged_kv_indptr) == batch_size + 1
        assert len(paged_kv_last_page_len) == batch_size
        assert len(paged_kv_indices) == int(paged_kv_indptr[-1])
        assert ((paged_kv_last_page_len >= 1) & (paged_kv_last_page_len <= page_size)).all()
        query_lens, num_pages = qo_indptr.diff(), paged_kv_indptr.diff()
        assert (query_lens >= 0).all()
        assert (num_pages >= 0).all()
        lens = torch.where(num_pages > 0, (num_pages - 1) * page_size + paged_kv_last_page_len, 0).int()
        assert seq_lens is None or torch.equal(seq_lens, lens)
        assert (query_lens <= lens).all(), "more queries than there are tokens"
        assert num_qo_heads % num_kv_heads == 0
        if self._is_graph:
            self._most_rows = self._most_rows or num_rows
            if num_rows > self._most_rows:
                raise ValueError("The total number of rows cannot exceed the number of rows set during initialization.")
            if batch_size != self._batch_size:
                raise ValueError("The batch size should be fixed during the lifecycle of the wrapper.")
            buffers = self._filled()
            if len(paged_kv_indices) > len(buffers[2]):
                raise ValueError("The length of paged_kv_indices exceeds the allocated buffer size.")
            for buffer, values in zip(buffers, given, strict=True):
                buffer[: len(values)].copy_(values)
            needed, _ = self.workspace_size(*given, num_qo_heads, num_kv_heads, head_dim_qk, page_size)
            if self._workspace.nbytes < needed:
                raise ValueError("Buffer overflow when allocating memory")
            self._partial = self._workspace[:needed]
        else:
            self._batch_size, self._most_rows = batch_size, num_rows
            starts, page_starts, last_lens = (given[i].to(self._workspace.device).clone() for i in (0, 1, 3))
            self._buffers = starts, page_starts, paged_kv_indices, last_lens
        self._planned = self._plan_workspace.view(torch.int32)[: 2 * batch_size].view(2, -1)
        self._planned.copy_(torch.stack([query_lens, lens]))
        self._shape = num_qo_heads, num_kv_heads, head_dim_qk
        self._page_size, self._is_causal = page_size, causal
        self._scale = head_dim_qk**-0.5 if sm_scale is None else sm_scale
        self._window_left, self._softcap = window_left, logits_soft_cap or 0.0
        self._dtypes = q_data_type, kv_data_type or q_data_type
        self.num_plans += 1

    def run(
        self,
        q: torch.Tensor,
        paged_kv_cache: tuple[torch.Tensor, torch.Tensor],
        *args: Any,
        out: torch.Tensor | None = None,
        return_lse: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        assert not args
        keys, values = paged_kv_cache
        num_heads, num_kv_heads, head_dim = self._shape
        assert (q.dtype, keys.dtype) == self._dtypes
        assert q.shape == (self._most_rows, num_heads, head_dim), "not the rows that were planned"
        assert q.stride()[1:] == (head_dim, 1)
        assert keys.shape[1:] == values.shape[1:] == (self._page_size, num_kv_heads, head_dim)
        if self._is_graph:
            self._partial.fill_(255)  # as what is merged later overwrites it
        if out is None:
            out = torch.zeros_like(q, memory_format=torch.contiguous_format)
        assert out.shape == q.shape
        lse = torch.full(q.shape[:2], float("nan"))
        starts, page_starts, pages, last_lens = (each.tolist() for each in self._filled())
        for b, (query_len, length) in enumerate(zip(*self._planned.tolist(), strict=True)):
            own = pages[page_starts[b] : page_starts[b + 1]]
            assert starts[b + 1] - starts[b] == query_len, "planned for another step"
            assert length == (len(own) - 1) * self._page_size + last_lens[b] if own else not length
            k, v = (
                part[own].flatten(0, 1)[:length].float().repeat_interleave(num_heads // num_kv_heads, 1)
                for part in (keys, values)
            )
            rows = slice(starts[b], starts[b + 1])
            scores = torch.einsum("qhd,khd->hqk", q[rows].float(), k) * self._scale
            if self._softcap > 0:
                scores = self._softcap * torch.tanh(scores / self._softcap)
            place = torch.arange(length - query_len, length)[:, None]
            token = torch.arange(length)[None, :]
            if self._is_causal:
                scores.masked_fill_(token > place, float("-inf"))
            if self._window_left >= 0:
                scores.masked_fill_(token < place - self._window_left, float("-inf"))
            out[rows] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).to(out.dtype)
            lse[rows] = scores.logsumexp(-1).T / math.log(2)
        return (out, lse) if return_lse else out

    def _filled(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        starts, page_starts, pages, last_lens = self._buffers
        assert starts is not None
        assert page_starts is not None
        assert pages is not None
        assert last_lens is not None
        return starts, page_starts, pages, last_lens
