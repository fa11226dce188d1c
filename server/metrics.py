"""Prometheus metrics: counters and histograms of the event loop, gauges read off the engine's last snapshot.

Lives on the event loop. Many are also exposed under the `vllm:` names that dashboards and routers read, older ones
among them, with vLLM's `model_name` label (docs/routers.md says who reads which). Labels come from closed sets; of
tenants, which have names, so many at most have their own.
"""

import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample
from prometheus_client.utils import floatToGoString

from headrace.scheduler.messages import FinishReason, LoadSnapshot, StepPauses, Tier
from headrace.server.errors import RateLimitError
from headrace.server.generation import Generation

# A creation time beside every series would double what is scraped.
disable_created_metrics()

_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5, 10)
_PAUSES = (5e-5, 1e-4, 2e-4, 5e-4, 0.001, 0.0015, 0.002, 0.003, 0.005, 0.01, 0.025, 0.1, 0.5, 1, 5)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_LONG = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)

SHED_REASONS = ("queue_full", "predicted_too_late", "rate_limit")
OUTCOMES = ("ok", "error", "cancelled", "deadline", "refused")
PHASES = ("body", "tokenizing", "queued", "prefill", "decode")

MAX_TENANTS = 100
OTHER_TENANTS = "(others)"  # no key can be called so

_VLLM_NAMES = {
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

_LOAD_GAUGES = ("headrace_num_requests_running", "headrace_num_requests_waiting", "headrace_kv_cache_usage_ratio")

# Dashboards add vLLM's reasons up to requests that succeeded: what failed is in none of them.
_VLLM_REASONS = {"stop": "stop", "length": "length", "cancelled": "abort"}


class RequestMetrics:
    """What every server of ours counts, the proxy too: refusals, departures, and batches by model."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.rejected = self._counter("requests_rejected", "Requests refused before the first byte", "status")
        self._cancelled = self._counter("requests_cancelled", "Requests whose client left, by phase", "phase")
        for phase in PHASES:
            self._cancelled.labels(phase)
        self._shed = self._counter("requests_shed", "Requests refused under load, by tier", "tier", "reason")
        for tier in Tier:
            for shed_reason in SHED_REASONS:
                self._shed.labels(tier.value, shed_reason)
        self.connections_closed = self._counter("connections_closed", "Connections closed to make room")
        self._batch_size = self._label_histograms("batch_size", "Items of a batch", "model")
        self._batch_wait = self._label_histograms("batch_wait_seconds", "An item's arrival to its batch", "model")
        self._batch_compute = self._label_histograms("batch_compute_seconds", "What a batch took", "model")
        self._batch_items = self._counter("batch_items", "Items that ended, by how", "model", "outcome")
        self._batch_cost = self._counter("batch_cost", "Tokens or images of batches, padding too", "model")
        self._batch_padding = self._counter("batch_padding", "Of those, the padding", "model")
        self._batch_queue = self._gauge("batch_queue_depth", "Items that wait for a batch", "model")

    def expose(self) -> bytes:
        """The text exposition of all metrics."""
        return b"".join(self.expose_each())

    def expose_each(self) -> Iterator[bytes]:
        """The same metric by metric: all at once would hold up the loop."""
        for metric in self.registry.collect():
            yield generate_latest(_Collected(metric))

    def watch(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Add a gauge whose value is asked when scraped."""
        self._gauge(name, text).set_function(value)

    def open_lane(self, model: str) -> "LaneMetrics":
        """The metrics of a dynamic batcher, or of several that count under one name."""
        return LaneMetrics(
            self._batch_queue.labels(model),
            self._batch_size.setdefault(model, LatencyHistogram(_SIZES)),
            self._batch_wait.setdefault(model, LatencyHistogram(_SHORT)),
            self._batch_compute.setdefault(model, LatencyHistogram(_SHORT)),
            {outcome: self._batch_items.labels(model, outcome) for outcome in OUTCOMES},
            self._batch_cost.labels(model),
            self._batch_padding.labels(model),
        )

    def count_shed(self, tier: Tier, reason: str) -> None:
        """Count a request that was refused for one of SHED_REASONS."""
        self._shed.labels(tier.value, reason).inc()

    @contextmanager
    def counting_shed(self, tier: Tier) -> Iterator[None]:
        """Count a request that a tenant's limit refuses inside the block."""
        try:
            yield
        except RateLimitError:
            self.count_shed(tier, "rate_limit")
            raise

    def count_cancelled(self, phase: str) -> None:
        self._cancelled.labels(phase).inc()

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"headrace_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"headrace_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, bounds: tuple[float, ...]) -> "LatencyHistogram":
        histogram = LatencyHistogram(bounds)
        self.registry.register(HistogramCollector(f"headrace_{name}", text, {None: histogram}))
        return histogram

    def _label_histograms(self, name: str, text: str, label: str) -> "dict[str, LatencyHistogram]":
        histograms: dict[str, LatencyHistogram] = {}
        self.registry.register(HistogramCollector(f"headrace_{name}", text, histograms, label))
        return histograms


class Metrics(RequestMetrics):
    """All metrics of a server with an engine. `load` and `num_waiting` are asked at scrape time.

    `names_tenants` where they may be seen by name: whoever scrapes is no tenant.
    """

    names_tenants = False

    def __init__(self, model_name: str, load: Callable[[], LoadSnapshot], num_waiting: Callable[[], int]) -> None:
        super().__init__()
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of accepted requests")
        self._generation_tokens = self._counter("generation_tokens", "Tokens generated")
        self._tenant_tokens = self._counter("tenant_tokens", "The same by tenant, at admin_port", "tenant", "kind")
        self._named_tenants: set[str] = set()
        self._finished = self._counter("requests_finished", "Answers that ended, by reason", "finished_reason")
        self.ttft = self._tier_histograms("time_to_first_token_seconds", "Arrival to first token", _LONG)
        self.itl = self._tier_histograms("inter_token_latency_seconds", "Between a request's tokens", _SHORT)
        self.queue_time = self._tier_histograms("request_queue_time_seconds", "Submitted to first scheduled", _LONG)
        self.e2e = self._histogram("e2e_request_latency_seconds", "Arrival to the last token", _LONG)
        self.loop_lag = self._histogram("event_loop_lag_seconds", "How late the event loop wakes a timer", _PAUSES)
        self.engine_hangs = self._counter("engine_hangs", "Steps that took longer than watchdog_soft_s")
        self.step_gap = self._histogram("engine_step_gap_seconds", "From one step's computing to the next's", _PAUSES)
        self.lock_wait = self._histogram(
            "engine_lock_wait_seconds", "From a step's end until the engine has the interpreter's lock", _PAUSES
        )
        for reason in FinishReason:
            self._finished.labels(reason.value)
        self._tier_waiting = self._gauge("tier_requests_waiting", "Requests accepted and not begun, by tier", "tier")
        self._ttft_target = self._gauge("ttft_target_seconds", "The longest predicted that is let in, by tier", "tier")
        self._predicted_ttft = self._gauge(
            "predicted_ttft_seconds", "First token of the next request, without its prompt's own time, by tier", "tier"
        )
        self._model_bytes = self._gauge("model_bytes", "Memory of a one-shot model's weights", "model")
        self._load = load
        self._num_waiting = num_waiting
        self._load_collectors: list[Collector] = [_LoadCollector(load, num_waiting)]
        self.registry.register(self._load_collectors[0])
        self._model_name = model_name

    def expose_each(self) -> Iterator[bytes]:
        for metric in self.registry.collect():
            yield generate_latest(_Collected(metric))
            yield from self._as_vllms(metric)

    def _as_vllms(self, metric: Metric) -> Iterator[bytes]:
        for name in _VLLM_NAMES.get(metric.name, ()):
            yield generate_latest(_Collected(_renamed(metric, name, self._model_name)))

    def describe(self, block_size: int, adapters: Sequence[str]) -> None:
        """Add what routers want to know of an engine beside its load."""
        self._load_collectors.append(_EngineCollector(self._load, self._model_name, block_size, adapters))
        self.registry.register(self._load_collectors[-1])

    def expose_load(self) -> bytes:
        """What routers read of all metrics, under the names that they read: a tenth of them, for who asks often."""
        parts: list[bytes] = []
        for collector in self._load_collectors:
            for metric in collector.collect():
                if metric.name in _LOAD_GAUGES:
                    parts += self._as_vllms(metric)
                elif metric.name.startswith("vllm:"):
                    parts.append(generate_latest(_Collected(metric)))
        return b"".join(parts)

    def load_report(self) -> dict[str, float]:
        """The load in the few numbers that a router is told beside an answer, by vLLM's names."""
        return {
            "kv_cache_usage_perc": self._load().kv_usage,
            "num_requests_waiting": float(self._num_waiting()),
        }

    def watch_tier(
        self,
        tier: Tier,
        num_waiting: Callable[[], float],
        predicted_ttft_s: Callable[[], float],
        ttft_target_s: Callable[[], float],
    ) -> None:
        """Set where a tier's number of waiting requests, its prediction and its target are asked when scraped."""
        self._tier_waiting.labels(tier.value).set_function(num_waiting)
        self._predicted_ttft.labels(tier.value).set_function(predicted_ttft_s)
        self._ttft_target.labels(tier.value).set_function(ttft_target_s)

    def count_prompt(self, tenant: str, num_tokens: int) -> None:
        self._prompt_tokens.inc(num_tokens)
        self._count_tenant(tenant, "prompt", num_tokens)

    def count_generated(self, num_tokens: Mapping[str, int]) -> None:
        """Count the tokens of a step, by tenant."""
        self._generation_tokens.inc(sum(num_tokens.values()))
        for tenant, num in num_tokens.items():
            self._count_tenant(tenant, "generated", num)

    def _count_tenant(self, tenant: str, kind: str, num_tokens: int) -> None:
        if not self.names_tenants:
            return
        if tenant not in self._named_tenants:
            if len(self._named_tenants) == MAX_TENANTS:
                tenant = OTHER_TENANTS
            else:
                self._named_tenants.add(tenant)
        self._tenant_tokens.labels(tenant, kind).inc(num_tokens)

    def set_model_bytes(self, model: str, num_bytes: int) -> None:
        self._model_bytes.labels(model).set(num_bytes)

    def observe_pauses(self, pauses: StepPauses) -> None:
        if pauses.gap_s is not None:
            self.step_gap.observe(pauses.gap_s)
        if pauses.lock_wait_s is not None:
            self.lock_wait.observe(pauses.lock_wait_s)

    def observe_end(self, generation: Generation) -> None:
        """Count a generation that is over."""
        assert generation.log.terminal is not None
        reason = generation.log.terminal.finish_reason
        stages = generation.stages
        self._finished.labels(reason.value).inc()
        if reason is FinishReason.CANCELLED and generation.log.terminal.error is None:  # else nobody left
            self.count_cancelled(generation.phase)
        if stages.end_s is not None:
            self.e2e.observe(stages.end_s - stages.received_s)

    def _tier_histograms(self, name: str, text: str, bounds: tuple[float, ...]) -> "Mapping[Tier, LatencyHistogram]":
        histograms = {tier: LatencyHistogram(bounds) for tier in Tier}
        self.registry.register(HistogramCollector(f"headrace_{name}", text, histograms))
        return histograms


class LaneMetrics(NamedTuple):
    """What a dynamic batcher tells: how many items wait, of each batch its size, cost and padding, of each item its
    wait and its end."""

    waiting: Gauge
    size: "LatencyHistogram"
    wait_s: "LatencyHistogram"
    compute_s: "LatencyHistogram"
    items: Mapping[str, Counter]
    cost: Counter
    padding: Counter


class LatencyHistogram:
    """A histogram that one thread writes, and that takes many equal observations at once: every stream of a step has
    the same gap. The library's locks several times for each."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self.sum_s = 0.0

    def observe(self, seconds: float, count: int = 1) -> None:
        self._counts[bisect_left(self._bounds, seconds)] += count
        self.sum_s += seconds * count

    def buckets(self) -> list[tuple[str, int]]:
        """(Upper bound, how many observations are not above it)."""
        bounds = [*map(floatToGoString, self._bounds), "+Inf"]
        return list(zip(bounds, accumulate(self._counts), strict=True))


class HistogramCollector(Collector):
    """One metric: a histogram without a label, under None, or one for each value of it."""

    def __init__(self, name: str, text: str, histograms: Mapping[Any, LatencyHistogram], label: str = "tier") -> None:
        self._name = name
        self._text = text
        self._histograms = histograms
        self._label = label

    def describe(self) -> Iterable[Metric]:
        """What the registry knows its name by."""
        return self.collect()

    def collect(self) -> Iterable[Metric]:
        has_label = None not in self._histograms
        family = HistogramMetricFamily(self._name, self._text, labels=[self._label] if has_label else [])
        for value, histogram in self._histograms.items():
            family.add_metric([] if value is None else [str(value)], histogram.buckets(), histogram.sum_s)
        yield family


class _LoadCollector(Collector):
    """The engine's load as gauges, taken from the last snapshot when scraped."""

    def __init__(self, load: Callable[[], LoadSnapshot], num_waiting: Callable[[], int]) -> None:
        self._load = load
        self._num_waiting = num_waiting

    def collect(self) -> Iterable[Metric]:
        load = self._load()
        for name, text, value in (
            ("num_requests_running", "Sequences in the running batch", load.num_running),
            ("num_requests_waiting", "Requests accepted and not yet running", self._num_waiting()),
            ("kv_cache_usage_ratio", "Share of KV cache blocks held", load.kv_usage),
            ("kv_cache_free_blocks", "KV cache blocks free", load.num_free_blocks),
            ("kv_cache_cached_blocks", "Free blocks that hold a reusable prefix", load.num_cached_blocks),
            ("kv_cache_total_blocks", "KV cache blocks in all", load.num_total_blocks),
        ):
            yield GaugeMetricFamily(f"headrace_{name}", text, value=value)
        for name, text, count in (
            ("num_preemptions", "Sequences preempted for want of blocks", load.num_preemptions),
            ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache", load.num_prefix_queries),
            ("prefix_cache_hits", "Prompt tokens found in the prefix cache", load.num_prefix_hits),
            ("drafted_tokens", "Tokens tried ahead of their turn by prompt lookup", load.num_drafted_tokens),
            ("accepted_tokens", "Of those tokens the ones that came true", load.num_accepted_tokens),
            ("engine_steps", "Steps the engine has computed", load.num_steps),
            ("engine_busy_seconds", "Time in which steps were computed", load.busy_s),
        ):
            yield CounterMetricFamily(f"headrace_{name}", text, value=count)


class _EngineCollector(Collector):
    """What routers read in vLLM's words alone: the cache's shape, its hit rate, and the adapters.

    All adapters are loaded and can be in one batch, so that all run and none waits for a place; the value is when that
    was so, as the Inference Extension wants it.
    """

    def __init__(
        self, load: Callable[[], LoadSnapshot], model_name: str, block_size: int, adapters: Sequence[str]
    ) -> None:
        self._load = load
        self._model = {"model_name": model_name}
        self._block_size = block_size
        self._adapters = adapters

    def collect(self) -> Iterable[Metric]:
        load = self._load()
        blocks = {"block_size": str(self._block_size), "num_gpu_blocks": str(load.num_total_blocks)}
        yield self._gauge("vllm:cache_config_info", "The KV cache's blocks", 1, blocks)
        hit_rate = load.num_prefix_hits / load.num_prefix_queries if load.num_prefix_queries else 0.0
        yield self._gauge("vllm:gpu_prefix_cache_hit_rate", "Share of prompt tokens found cached", hit_rate, {})
        if self._adapters:
            adapters = {
                "max_lora": str(len(self._adapters)),
                "running_lora_adapters": ",".join(self._adapters),
                "waiting_lora_adapters": "",
            }
            yield self._gauge("vllm:lora_requests_info", "The adapters, at this time", time.time(), adapters)

    def _gauge(self, name: str, text: str, value: float, labels: dict[str, str]) -> Metric:
        labels = labels | self._model
        family = GaugeMetricFamily(name, text, labels=list(labels))
        family.add_metric(list(labels.values()), value)
        return family


class _Collected(Collector):
    """A metric that has been collected, as the library writes it out."""

    def __init__(self, metric: Metric) -> None:
        self._metric = metric

    def collect(self) -> Iterable[Metric]:
        return [self._metric]


def _renamed(metric: Metric, name: str, model_name: str) -> Metric:
    """The same numbers under a name of vLLM's, of all tiers together."""
    renamed = Metric(name, metric.documentation, metric.type)
    sums: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
    for sample in metric.samples:
        labels = {key: value for key, value in sample.labels.items() if key != "tier"}
        labels["model_name"] = model_name
        if (reason := labels.get("finished_reason")) is not None:
            if reason not in _VLLM_REASONS:
                continue
            labels["finished_reason"] = _VLLM_REASONS[reason]
        series = name + sample.name.removeprefix(metric.name), tuple(labels.items())
        sums[series] = sums.get(series, 0.0) + sample.value
    renamed.samples += [Sample(series, dict(labels), value) for (series, labels), value in sums.items()]
    return renamed
