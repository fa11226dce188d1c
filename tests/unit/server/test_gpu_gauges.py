"""The GPU's gauges are the driver's, and /metrics survives a driver that does not answer."""

import sys
from types import SimpleNamespace

import pytest

pytest.importorskip("pynvml")

from headrace.scheduler.messages import LoadSnapshot
from headrace.server.gpu_gauges import watch_gpu
from headrace.server.metrics import Metrics


class DriverError(Exception):
    """What NVML raises."""


class FakeDriver:
    """One GPU. What of it cannot be asked raises."""

    NVMLError = DriverError

    def __init__(self, **cannot: bool) -> None:
        self._cannot = cannot

    def nvmlInit(self) -> None:
        self._ask("init")

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        self._ask("find")
        return uuid

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> SimpleNamespace:
        self._ask("utilization")
        assert handle == "GPU-1"
        return SimpleNamespace(gpu=97)

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> SimpleNamespace:
        return SimpleNamespace(used=12345)

    def _ask(self, what: str) -> None:
        if self._cannot.get(what):
            raise DriverError(f"cannot {what}")


def exposed(monkeypatch: pytest.MonkeyPatch, driver: FakeDriver) -> str:
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    metrics = Metrics("model", LoadSnapshot, lambda: 0)
    watch_gpu(metrics, "GPU-1")
    return metrics.expose().decode()


def test_they_are_what_the_driver_says(monkeypatch: pytest.MonkeyPatch) -> None:
    text = exposed(monkeypatch, FakeDriver())
    assert "headrace_gpu_utilization_ratio 0.97" in text
    assert "headrace_gpu_memory_used_bytes 12345.0" in text


def test_one_that_cannot_be_asked_is_not_a_number_and_the_others_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    text = exposed(monkeypatch, FakeDriver(utilization=True))
    assert "headrace_gpu_utilization_ratio NaN" in text
    assert "headrace_gpu_memory_used_bytes" in text


@pytest.mark.parametrize("cannot", ["init", "find"])
def test_without_a_driver_there_are_none(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, cannot: str
) -> None:
    assert "headrace_gpu" not in exposed(monkeypatch, FakeDriver(**{cannot: True}))
    assert f"cannot {cannot}" in caplog.text
