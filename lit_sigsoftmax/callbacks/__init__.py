"""Lightning callbacks."""

from lit_sigsoftmax.callbacks.checkpoint import RunCheckpoint
from lit_sigsoftmax.callbacks.last import LastCheckpoint
from lit_sigsoftmax.callbacks.ranks import RankWatch
from lit_sigsoftmax.callbacks.recorder import RunRecorder
from lit_sigsoftmax.callbacks.throughput import Throughput

__all__ = ["LastCheckpoint", "RankWatch", "RunCheckpoint", "RunRecorder", "Throughput"]
