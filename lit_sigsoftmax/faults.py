"""What can go wrong in a training step, said with the remedy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["LossMemoryError", "NonFiniteLossError", "TrainingError", "loss_memory", "non_finite_loss"]

# torch's CPU allocator raises a plain RuntimeError
_CPU_ALLOCATOR = ("can't allocate memory", "not enough memory")


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why, where and what to do."""


class NonFiniteLossError(TrainingError):
    """The loss of a training step is infinite or not a number."""


class LossMemoryError(TrainingError):
    """The loss, or the backward pass that begins in it, does not fit into memory."""


@contextmanager
def loss_memory(vocab_size: int) -> Iterator[None]:
    """Name the remedy where a block runs out of memory.

    Args:
        vocab_size: Types: a plain loss holds so many logits at once for every position.

    Raises:
        LossMemoryError: The block ran out of memory.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        out_of_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if not out_of_memory and not any(words in str(error) for words in _CPU_ALLOCATOR):
            raise
        raise LossMemoryError(
            f"out of memory in the loss over {vocab_size} types: set model.loss_backend to "
            f"chunked, or lower data.batch_size or data.bptt ({str(error).splitlines()[0]})"
        ) from error


def non_finite_loss(loss: Tensor, step: int, epoch: int, place: str) -> NonFiniteLossError:
    """Return the error for a loss that is infinite or not a number.

    Args:
        loss: The loss, a scalar.
        step: Optimizer steps before this one.
        epoch: The epoch, from 0.
        place: Where in the corpus the batch is from.
    """
    return NonFiniteLossError(
        f"the loss of step {step} is {loss.item()}: epoch {epoch}, {place}. The checkpoints written before are kept. "
        "Lower the learning rate or set trainer.gradient_clip_val and start again, or leave such steps out with "
        "model.on_nonfinite_loss skip"
    )
