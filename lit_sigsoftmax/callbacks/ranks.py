"""Says which process of a distributed run has died."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_sigsoftmax.processes import Address, address, died, gather

__all__ = ["RankWatch"]


class RankWatch(Callback):
    """Names the process that died, where the others only see a connection closed.

    The library under the collectives ends the surviving processes with an error as soon as the connection to a dead one
    is closed; it knows nothing of ranks. One that is alive but silent is given up after the ``timeout`` of
    :class:`~lightning.pytorch.strategies.DDPStrategy`, 30 minutes by default.
    """

    def __init__(self) -> None:
        self._addresses: Sequence[Address] = ()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Learn where the processes are."""
        self._addresses = gather(address())

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Say which processes are no more, if that is why this one fails."""
        if len(self._addresses) < 2 or not isinstance(exception, RuntimeError):
            return
        if gone := died(self._addresses):
            names = ", ".join(f"rank {rank} (process {self._addresses[rank][1]})" for rank in gone)
            message = f"{names} on {address()[0]} has died, see the log of that process for the reason"
        elif "onnection" in str(exception):
            names = ", ".join(f"rank {rank} on {host}" for rank, (host, _) in enumerate(self._addresses))
            message = f"a process on another machine has died or cannot be reached: {names}"
        else:
            return
        print(
            f"error: {message}. Rank {trainer.global_rank} stops too; --ckpt_path last continues the run",
            file=sys.stderr,
            flush=True,
        )
