"""Gauges of the NVIDIA GPU that the model runs on, asked of the driver (NVML) when scraped.

There are none where the driver or its Python binding, `nvidia-ml-py`, is missing.
"""

import logging
from collections.abc import Callable

from headrace.server.metrics import Metrics

logger = logging.getLogger(__name__)


def watch_gpu(metrics: Metrics, uuid: str) -> None:
    """Add the gauges of a GPU; one that the driver does not answer for is not a number."""
    try:
        import pynvml
    except ImportError:
        return
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
    except pynvml.NVMLError as error:
        logger.warning("no gauges of the GPU: %s", error)
        return

    def watch(name: str, text: str, ask: Callable[[], float]) -> None:
        def value() -> float:
            try:
                return ask()
            except pynvml.NVMLError:
                return float("nan")

        metrics.watch(name, text, value)

    watch(
        "gpu_utilization_ratio",
        "Share of the driver's last sampling period in which the GPU ran a kernel",
        lambda: pynvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100,
    )
    watch(
        "gpu_memory_used_bytes",
        "Memory of the GPU in use, by whomever",
        lambda: pynvml.nvmlDeviceGetMemoryInfo(handle).used,
    )
