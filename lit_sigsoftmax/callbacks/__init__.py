"""Lightning callbacks."""

from lit_sigsoftmax.callbacks.checkpoint import RunCheckpoint
from lit_sigsoftmax.callbacks.last import LastCheckpoint
from lit_sigsoftmax.callbacks.rank_probe import RankProbe
from lit_sigsoftmax.callbacks.ranks import RankWatch
from lit_sigsoftmax.callbacks.recorder import RunRecorder
from lit_sigsoftmax.callbacks.throughput import Throughput
from lit_sigsoftmax.callbacks.token_losses import TokenLosses

__all__ = ["LastCheckpoint", "RankProbe", "RankWatch", "RunCheckpoint", "RunRecorder", "Throughput", "TokenLosses"]
