"""The exposition, read by Prometheus's own parser."""

from collections.abc import Iterable
from functools import partial
from itertools import chain

import pytest
from hypothesis import given, settings, strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from fake_engine import byte_tokenizer
from headrace.scheduler.messages import FinishReason, LoadSnapshot, SequenceOutput, Tier
from headrace.server.detokenizer import Detokenizer
from headrace.server.generation import Generation, Stages
from headrace.server.metrics import (
    MAX_TENANTS,
    OTHER_TENANTS,
    PHASES,
    SHED_REASONS,
    HistogramCollector,
    LatencyHistogram,
    Metrics,
)

LOAD = LoadSnapshot(
    num_waiting=1,
    num_running=3,
    num_received=9,
    num_free_blocks=25,
    num_total_blocks=100,
    num_preemptions=4,
    num_steps=77,
    busy_s=1.5,
)
# The names that vLLM's dashboards and the routers in front of it read.
VLLM_NAMES = {
    "headrace_num_requests_running": ("vllm:num_requests_running",),
    "headrace_num_requests_waiting": ("vllm:num_requests_waiting",),
    "headrace_kv_cache_usage_ratio": ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"),
    "headrace_num_preemptions": ("vllm:num_preemptions",),
    "headrace_prompt_tokens": ("vllm:prompt_tokens",),
    "headrace_generation_tokens": ("vllm:generation_tokens",),
    "headrace_prefix_cache_queries": ("vllm:prefix_cache_queries", "vllm:gpu_prefix_cache_queries"),
    "headrace_prefix_cache_hits": ("vllm:prefix_cache_hits", "vllm:gpu_prefix_cache_hits"),
    "headrace_drafted_tokens": ("vllm:spec_decode_num_draft_tokens",),
    "headrace_accepted_tokens": ("vllm:spec_decode_num_accepted_tokens",),
    "headrace_requests_finished": ("vllm:request_success",),
    "headrace_time_to_first_token_seconds": ("vllm:time_to_first_token_seconds",),
    "headrace_inter_token_latency_seconds": ("vllm:inter_token_latency_seconds",),
    "headrace_request_queue_time_seconds": ("vllm:request_queue_time_seconds",),
    "headrace_e2e_request_latency_seconds": ("vllm:e2e_request_latency_seconds",),
}
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def families(metrics: Metrics) -> list[Metric]:
    return list(text_string_to_metric_families(metrics.expose().decode()))


def samples(found: Iterable[Metric]) -> Samples:
    read: Samples = {}
    for family in found:
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in read, f"{key} twice"
            read[key] = sample.value
    return read


def value(metrics: Metrics, name: str, **labels: str) -> float:
    return samples(families(metrics))[name, frozenset(labels.items())]


def make(name: str = "model") -> Metrics:
    return Metrics(name, lambda: LOAD, lambda: 6)


def over(reason: FinishReason, *, scheduled_s: float | None = 3.0, text: str = "a") -> Generation:
    generation = Generation(
        id="g",
        request_id=0,
        num_prompt_tokens=2,
        stages=Stages(received_s=1.0),
        detokenizer=Detokenizer(byte_tokenizer(), ()),
        on_end=[],
    )
    generation.receive(SequenceOutput(0, tuple(text.encode()), scheduled_s=scheduled_s), 4.0)
    generation.end(reason, 5.0)
    return generation


def test_gauges_show_the_last_load() -> None:
    read = samples(families(make()))
    expected = {
        "headrace_num_requests_running": 3,
        "headrace_num_requests_waiting": 6,
        "headrace_kv_cache_usage_ratio": 0.75,
        "headrace_kv_cache_free_blocks": 25,
        "headrace_kv_cache_total_blocks": 100,
        "headrace_num_preemptions_total": 4,
        "headrace_engine_steps_total": 77,
        "headrace_engine_busy_seconds_total": 1.5,
    }
    assert {name: read[name, frozenset()] for name in expected} == expected


def test_before_the_engine_is_ready_the_cache_is_empty_and_nothing_divides_by_it() -> None:
    metrics = Metrics("model", LoadSnapshot, lambda: 0)
    assert value(metrics, "headrace_kv_cache_usage_ratio") == 0


@pytest.mark.parametrize("model_name", ["model", 'we"ird\\name\n', "ünï/🌊"])
def test_every_vllm_metric_has_the_values_of_its_own_and_the_models_name(model_name: str) -> None:
    metrics = make(model_name)
    metrics.count_prompt("alice", 12)
    metrics.count_generated({"alice": 30, "bob": 4})
    for count, seconds in enumerate((0.003, 0.2, 7.0, 1000.0), start=1):
        metrics.e2e.observe(seconds)
        for histograms in (metrics.ttft, metrics.itl, metrics.queue_time):
            for i, tier in enumerate(Tier):
                histograms[tier].observe(seconds, count + i)
    for reason in FinishReason:
        metrics.observe_end(over(reason))
    found = families(metrics)
    by_name = {family.name: family for family in found}
    own = samples(family for family in found if family.name.startswith("headrace_"))
    for ours, theirs in ((ours, name) for ours, names in VLLM_NAMES.items() for name in names):
        assert by_name[theirs].type == by_name[ours].type
        assert by_name[theirs].documentation == by_name[ours].documentation
        renamed = samples([by_name[theirs]])
        if theirs == "vllm:request_success":
            continue
        assert {("model_name", model_name)} <= frozenset.intersection(*(labels for _, labels in renamed))
        # Tiers are ours: what they have is added up.
        sums: Samples = {}
        for (name, labels), number in own.items():
            if name in {sample.name for sample in by_name[ours].samples}:
                labels = frozenset(label for label in labels if label[0] != "tier") | {("model_name", model_name)}
                key = theirs + name.removeprefix(ours), labels
                sums[key] = sums.get(key, 0) + number
        assert renamed == sums
        assert len(renamed) > 0
    assert {name for name in by_name if not name.startswith("headrace_")} == set(chain(*VLLM_NAMES.values()))


def test_under_vllms_name_only_its_own_reasons_count_as_success() -> None:
    metrics = make("model")
    for reason in FinishReason:
        metrics.observe_end(over(reason))
    [family] = [family for family in families(metrics) if family.name == "vllm:request_success"]
    assert {sample.labels["finished_reason"]: sample.value for sample in family.samples} == {
        "stop": 1,
        "length": 1,
        "abort": 1,
    }
    assert {sample.labels["model_name"] for sample in family.samples} == {"model"}


def test_ends_are_counted_by_reason_and_cancellations_by_phase() -> None:
    metrics = make()
    metrics.observe_end(over(FinishReason.STOP))
    metrics.observe_end(over(FinishReason.STOP))
    metrics.observe_end(over(FinishReason.CANCELLED))
    metrics.observe_end(over(FinishReason.CANCELLED, text=""))
    metrics.observe_end(over(FinishReason.CANCELLED, scheduled_s=None, text=""))
    metrics.count_cancelled("body")
    finished = {
        reason.value: value(metrics, "headrace_requests_finished_total", finished_reason=reason.value)
        for reason in FinishReason
    }
    assert finished == {"stop": 2, "length": 0, "cancelled": 3, "deadline_exceeded": 0, "error": 0}
    cancelled = {phase: value(metrics, "headrace_requests_cancelled_total", phase=phase) for phase in PHASES}
    assert cancelled == {"body": 1, "tokenizing": 0, "queued": 1, "prefill": 1, "decode": 1}
    assert value(metrics, "headrace_e2e_request_latency_seconds_count") == 5
    assert value(metrics, "headrace_e2e_request_latency_seconds_sum") == 5 * 4.0


def test_labels_come_from_closed_sets_and_no_creation_times_are_shown() -> None:
    metrics = make()
    for tier in Tier:
        metrics.watch_tier(tier, lambda: 0, lambda: 0.5, lambda: 8.0)
    for status in (400, 429):
        metrics.rejected.labels(str(status)).inc()
    for family in families(metrics):
        for sample in family.samples:
            assert not sample.name.endswith("_created")
            assert set(sample.labels) <= {"finished_reason", "phase", "status", "le", "model_name", "tier", "reason"}
            assert sample.labels.get("tier", "batch") in set(Tier)
            assert sample.labels.get("reason", "queue_full") in SHED_REASONS
    assert value(metrics, "headrace_requests_rejected_total", status="429") == 1


def test_each_tier_and_reason_that_a_request_is_shed_for_is_counted_apart_and_there_from_the_start() -> None:
    metrics = make()
    for i, tier in enumerate(Tier):
        for reason in SHED_REASONS[i:]:
            metrics.count_shed(tier, reason)
    read = samples(families(metrics))
    for i, tier in enumerate(Tier):
        for j, reason in enumerate(SHED_REASONS):
            key = frozenset({("tier", tier.value), ("reason", reason)})
            assert read["headrace_requests_shed_total", key] == (1 if j >= i else 0)


def test_what_waits_in_each_tier_its_prediction_and_its_target_are_asked_for_when_they_are_shown() -> None:
    metrics = make()
    waiting = dict(zip(Tier, (3, 0, 7), strict=True))
    for tier in Tier:
        asked = partial(waiting.__getitem__, tier)
        metrics.watch_tier(tier, asked, lambda asked=asked: asked() / 4, lambda asked=asked: asked() / 2)  # type: ignore[misc]
    for num in (7, 8):
        waiting[Tier.BATCH] = num
        assert value(metrics, "headrace_tier_requests_waiting", tier="batch") == num
        assert value(metrics, "headrace_predicted_ttft_seconds", tier="batch") == num / 4
        assert value(metrics, "headrace_ttft_target_seconds", tier="batch") == num / 2
        assert value(metrics, "headrace_tier_requests_waiting", tier="premium") == 3


def test_tenants_have_names_only_where_they_may_be_told_and_no_more_of_them_than_a_scrape_can_bear() -> None:
    metrics = make()
    metrics.count_prompt("alice", 3)
    metrics.count_generated({"alice": 2})
    assert "alice" not in metrics.expose().decode()
    metrics.names_tenants = True
    for i in range(MAX_TENANTS + 20):
        metrics.count_prompt(f"tenant-{i}", 3)
    metrics.count_generated({"tenant-0": 2, f"tenant-{MAX_TENANTS}": 4, "late": 5})
    [family] = [family for family in families(metrics) if family.name == "headrace_tenant_tokens"]
    assert len({sample.labels["tenant"] for sample in family.samples}) == MAX_TENANTS + 1
    expected = {("tenant-0", "prompt"): 3, ("tenant-0", "generated"): 2}
    expected |= {(OTHER_TENANTS, "prompt"): 60, (OTHER_TENANTS, "generated"): 9}
    for (tenant, kind), num in expected.items():
        assert value(metrics, "headrace_tenant_tokens_total", tenant=tenant, kind=kind) == num
    assert value(metrics, "headrace_prompt_tokens_total") == 3 * (MAX_TENANTS + 21)
    assert value(metrics, "headrace_generation_tokens_total") == 13


def test_two_servers_in_one_process_do_not_share_their_counts() -> None:
    first, second = make("a"), make("b")
    first.count_prompt("", 5)
    assert value(second, "headrace_prompt_tokens_total") == 0


_SECONDS = st.sampled_from([0.0, 0.05, 0.1, 0.15, 1.0, 2.5, 3.0, 1e9])


@pytest.mark.parametrize("has_tiers", [False, True])
@settings(max_examples=50, derandomize=True, deadline=None)
@given(observed=st.lists(st.tuples(_SECONDS, st.integers(1, 5), st.sampled_from(Tier)), max_size=9))
def test_a_latency_histogram_is_exposed_as_the_library_s_own(
    has_tiers: bool, observed: list[tuple[float, int, Tier]]
) -> None:
    bounds = (0.1, 1.0, 2.5)
    theirs, ours = CollectorRegistry(), CollectorRegistry()
    reference = Histogram("x_seconds", "How long", ["tier"] * has_tiers, registry=theirs, buckets=bounds)
    histogram, by_tier = LatencyHistogram(bounds), {tier: LatencyHistogram(bounds) for tier in Tier}
    ours.register(HistogramCollector("x_seconds", "How long", by_tier if has_tiers else {None: histogram}))
    if has_tiers:
        for tier in Tier:
            reference.labels(tier.value)
    for seconds, count, tier in observed:
        (by_tier[tier] if has_tiers else histogram).observe(seconds, count)
        for _ in range(count):
            (reference.labels(tier.value) if has_tiers else reference).observe(seconds)
    expected, exposed = (list(text_string_to_metric_families(generate_latest(r).decode())) for r in (theirs, ours))
    assert samples(exposed) == pytest.approx(samples(expected))
    assert [(family.name, family.type, family.documentation) for family in exposed] == [
        (family.name, family.type, family.documentation) for family in expected
    ]
