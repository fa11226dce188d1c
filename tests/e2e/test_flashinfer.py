"""The package flashinfer itself, without a GPU: its wrapper is real, what it would compile is computed in torch."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import fake_flashinfer
from attention_cases import MIXES, AttentionCase
from headrace.kernels import flashinfer_ops
from headrace.kernels.flashinfer_ops import FlashinferPlan
from requirements import long, need

PACKAGES = Path(__file__).parent / "clients" / ".venvs" / "flashinfer"
CPU = torch.device("cpu")

pytestmark = long


class Kernels:
    """What flashinfer would compile: its plans by where they would lie on the device, and the launches so far."""

    def __init__(self) -> None:
        self.plans: dict[int, tuple[Any, ...]] = {}
        self.launches: list[tuple[Any, ...]] = []

    def workspace_size(self, *arguments: Any) -> tuple[int, int]:
        return 2**28, 4096

    def plan(self, *arguments: Any) -> list[int]:
        self.plans[arguments[1].data_ptr()] = arguments[3:]
        return [0]

    def paged_run(self, *arguments: Any) -> None:
        self.launches.append(arguments)
        self.run(*arguments)

    def run(self, *arguments: Any) -> None:
        """Compute a launch: the lengths are its plan's, the rest its buffers'."""
        workspace, plan_workspace, _, q, k, v, starts, page_starts, pages, last_lens, out, *others = arguments
        lse, mask_mode, layout, window_left, _, *others = others
        softcap, scale = others[6:8]
        planned_starts, planned_page_starts, context_lens, *sizes = self.plans[plan_workspace.data_ptr()]
        num_rows, batch_size, num_heads, num_kv_heads, page_size, _, head_dim, _, is_causal, planned_left, *_ = sizes
        assert torch.equal(planned_starts, starts)
        assert torch.equal(planned_page_starts, page_starts)
        assert (mask_mode, layout, is_causal, planned_left) == (1, 0, True, window_left)
        assert num_rows == len(q) == len(out)
        assert batch_size == len(context_lens)
        wrapper = fake_flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace)
        wrapper.plan(
            starts,
            page_starts,
            pages[: int(page_starts[-1])],
            last_lens,
            num_heads,
            num_kv_heads,
            head_dim,
            page_size,
            causal=True,
            sm_scale=scale,
            window_left=window_left,
            logits_soft_cap=softcap,
            q_data_type=q.dtype,
            kv_data_type=k.dtype,
            seq_lens=context_lens,
        )
        num_used = int(starts[-1])
        found = wrapper.run(q[:num_used], (k, v), return_lse=True)
        out[:num_used] = found[0]
        if lse is not None:
            lse[:num_used] = found[1]


@pytest.fixture
def real_wrapper(monkeypatch: pytest.MonkeyPatch) -> Any:
    folders = list(PACKAGES.glob("lib/python*/site-packages"))
    need(bool(folders), "what `make setup-clients` installs")
    monkeypatch.syspath_prepend(folders[0])
    import flashinfer

    return flashinfer.BatchPrefillWithPagedKVCacheWrapper


@pytest.fixture
def kernels(real_wrapper: Any, monkeypatch: pytest.MonkeyPatch) -> Kernels:
    from flashinfer import prefill

    kernels, empty = Kernels(), torch.empty
    monkeypatch.setattr(prefill, "get_batch_prefill_module", lambda *arguments: kernels)
    monkeypatch.setattr(prefill, "device_support_pdl", lambda device: False)
    # Which only a GPU's driver pins.
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **options: empty(*size, **options))
    return kernels


@pytest.mark.parametrize("name", ["__init__", "workspace_size", "reset_workspace_buffer", "plan", "run"])
def test_the_double_has_the_real_ones_parameters(real_wrapper: Any, name: str) -> None:
    real = inspect.signature(getattr(real_wrapper, name)).parameters
    double = inspect.signature(getattr(fake_flashinfer.BatchPrefillWithPagedKVCacheWrapper, name)).parameters
    for each in double.values():
        assert (real[each.name].kind, real[each.name].default) == (each.kind, each.default), each.name
    positional = [each.name for each in double.values() if each.default is each.empty]
    assert positional == [*real][: len(positional)]


@pytest.mark.parametrize(
    "options", [{}, {"window": 24}, {"softcap": 1.5, "window": 5}, {"sinks": torch.linspace(-3, 5, 6)}]
)
def test_a_step_launched_op_by_op_agrees_with_the_reference(kernels: Kernels, options: dict[str, Any]) -> None:
    case = AttentionCase(MIXES["all of it"])
    plan = flashinfer_ops.plan_attention(case.metadata, case.block_size, CPU)
    q = case.q[: case.metadata.query_starts[-1]]
    found = flashinfer_ops.paged_attention(q, case.cache, plan, case.scale, **options)
    torch.testing.assert_close(found, case.expected(**options), rtol=2e-5, atol=2e-5)
    assert len(kernels.launches) == 1


def test_a_graph_of_a_padded_size_computes_the_steps_that_are_planned_for_it(
    real_wrapper: Any, kernels: Kernels
) -> None:
    plan = FlashinferPlan(real_wrapper, block_size=16, max_num_seqs=9, max_num_blocks=200, device=CPU)
    mixes = ["chunks", "decode", "all of it"]
    cases = [AttentionCase(MIXES[mix]) for mix in mixes]
    q = torch.zeros(96, 6, 32)
    k, v = (torch.zeros(60, 16, 2, 32) for _ in range(2))
    lens = [11] * 6 + [10] * 3
    plan.begin(lens, lens, 9, "a size")
    out = flashinfer_ops.paged_attention(q, cases[0].cache._replace(keys=k, values=v), plan, cases[0].scale, 24)
    [launch] = kernels.launches
    for case in cases:
        starts, contexts = case.metadata.query_starts, case.metadata.context_lens
        q[: starts[-1]] = case.q[: starts[-1]]
        for cache, own in ((k, case.cache.keys), (v, case.cache.values)):
            cache.fill_(float("nan"))
            cache[: len(own)] = own
        plan.begin([starts[b + 1] - starts[b] for b in range(len(contexts))], contexts, 9, "a size")
        widest = max(map(len, case.metadata.block_tables))
        tables = [table + [0] * (widest - len(table)) for table in case.metadata.block_tables]
        plan.take_blocks(torch.tensor(tables).int(), torch.arange(9).int().clamp(max=len(contexts) - 1))
        kernels.run(*launch)
        torch.testing.assert_close(out[: starts[-1]], case.expected(window=24), rtol=2e-5, atol=2e-5)
