"""Processor, memory and GPU use, read by MLflow's monitors and logged like every other metric."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping

from mlflow.environment_variables import (
    MLFLOW_SYSTEM_METRICS_SAMPLES_BEFORE_LOGGING,
    MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL,
)
from mlflow.system_metrics.metrics.base_metrics_monitor import BaseMetricsMonitor
from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor
from mlflow.system_metrics.metrics.rocm_monitor import ROCMMonitor

__all__ = ["SystemMetrics"]

_log = logging.getLogger(__name__)


class SystemMetrics(threading.Thread):
    """Samples the machine's use until :meth:`finish`, as often as MLflow's own environment variables say.

    MLflow's SystemMetricsMonitor has the same samples, but asks the store before each whether the run still goes on:
    with a server away it ends for good after four minutes of trying, and the run's end waits for that.

    Args:
        log: Called with metrics and their step, in this thread.
        first_step: The step of the first sample.
    """

    def __init__(self, log: Callable[[Mapping[str, float], int], None], first_step: int = 0) -> None:
        super().__init__(name="SystemMetrics", daemon=True)
        self.step = first_step
        self._log = log
        self._finished = threading.Event()
        self._interval = MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL.get() or 10.0  # seconds
        self._samples = MLFLOW_SYSTEM_METRICS_SAMPLES_BEFORE_LOGGING.get() or 1
        self._monitors: list[BaseMetricsMonitor] = [CPUMonitor(), DiskMonitor(), NetworkMonitor(), *_gpu_monitors()]

    def run(self) -> None:
        """Sample and log."""
        try:
            while self._collect():
                samples = [monitor.aggregate_metrics() for monitor in self._monitors]
                self._log({f"system/{name}": value for sample in samples for name, value in sample.items()}, self.step)
                self.step += 1
                for monitor in self._monitors:
                    monitor.clear_metrics()
        except Exception as error:  # a sensor that fails is not the training's concern
            _log.warning("no more samples of processor, memory and GPU use: %s", error)

    def finish(self) -> None:
        """End the thread."""
        self._finished.set()
        self.join()

    def _collect(self) -> bool:
        for _ in range(self._samples):
            for monitor in self._monitors:
                monitor.collect_metrics()
            if self._finished.wait(self._interval):
                return False
        return True


def _gpu_monitors() -> list[BaseMetricsMonitor]:
    for monitor in (GPUMonitor, ROCMMonitor):
        try:
            return [monitor()]
        except Exception:  # no such GPU, or no package that reads it
            _log.debug("no %s", monitor.__name__, exc_info=True)
    return []
