"""Gauges of the NVIDIA GPU that the model runs on, asked of the driver (NVML) when scraped.

There are none where the driver or its Python binding, `nvidia-ml-py`, is missing.
"""

import importlib.util
import logging
import os
from typing import Any

from headrace.server.metrics import Metrics

logger = logging.getLogger(__name__)


def watch_gpu(metrics: Metrics, device: str) -> None:
    """Add the gauges of `device`, named as torch does: "cuda:0"; of any other kind there are none."""
    kind, _, index = device.partition(":")
    if kind != "cuda" or importlib.util.find_spec("pynvml") is None:
        return
    import pynvml

    try:
        pynvml.nvmlInit()
        handle = _handle(pynvml, int(index or 0))
    except pynvml.NVMLError as error:
        logger.warning("no gauges of the GPU: %s", error)
        return
    metrics.watch(
        "gpu_utilization_ratio",
        "Share of the last sampling period in which the GPU ran a kernel",
        lambda: pynvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100,
    )
    metrics.watch(
        "gpu_memory_used_bytes",
        "Memory of the GPU in use, by whomever",
        lambda: pynvml.nvmlDeviceGetMemoryInfo(handle).used,
    )


def _handle(pynvml: Any, index: int) -> Any:
    """The driver's handle of the GPU that torch numbers so: it counts those only that it is shown."""
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    name = visible[index] if index < len(visible) else str(index)
    if name.isdigit():
        return pynvml.nvmlDeviceGetHandleByIndex(int(name))
    return pynvml.nvmlDeviceGetHandleByUUID(name)
