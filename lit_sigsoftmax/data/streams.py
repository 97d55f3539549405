"""Streams: a corpus as parallel rows of (input, target), cut into segments. Every token's target is that token, once.

A text of N tokens poses N prediction problems: the target is token n, the input is everything before it, and the first
token is predicted from ``<eos>`` alone. So ``input = [<eos>] + tokens[:-1]`` and ``target = tokens``.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lit_sigsoftmax.checkpoints import CheckpointError
from lit_sigsoftmax.functional import IGNORE_INDEX

__all__ = ["IGNORE_INDEX", "Segments", "eval_streams", "shard", "train_streams"]

Streams = tuple[Tensor, Tensor]
"""Input and target, each (n_streams, T) int32."""


def train_streams(tokens: Tensor, n_streams: int, eos_id: int) -> Streams:
    """Cut a text into equally long contiguous streams; the last ``N % n_streams`` tokens are dropped.

    Args:
        tokens: (N,) int32.
        n_streams: The number of streams.
        eos_id: Input of the first prediction.

    Returns:
        Input and target, each (n_streams, N // n_streams) int32. They share memory.

    Raises:
        ValueError: If there are fewer tokens than streams, or no stream.
    """
    length = _length(tokens, n_streams)
    text = torch.cat([tokens.new_tensor([eos_id]), tokens[: n_streams * length]])
    return text[:-1].view(n_streams, length), text[1:].view(n_streams, length)


def eval_streams(tokens: Tensor, n_streams: int, eos_id: int) -> Streams:
    """Cut a text into contiguous streams without dropping a token.

    Lengths differ by at most one; shorter streams end in a position with input ``eos_id`` and target ``IGNORE_INDEX``.

    Args:
        tokens: (N,) int32.
        n_streams: The number of streams.
        eos_id: Input of the first prediction.

    Returns:
        Input and target, each (n_streams, ceil(N / n_streams)) int32.

    Raises:
        ValueError: If there are fewer tokens than streams, or no stream.

    Example:
        >>> input, target = eval_streams(torch.tensor([1, 2, 3, 4, 5]), n_streams=2, eos_id=0)
        >>> input.tolist(), target.tolist()
        ([[0, 1, 2], [3, 4, 0]], [[1, 2, 3], [4, 5, -100]])
    """
    length = _length(tokens, n_streams)
    n_longer = len(tokens) % n_streams
    if n_longer == 0:
        return train_streams(tokens, n_streams, eos_id)
    cut = n_longer * (length + 1)  # the longer streams come first
    text = torch.cat([tokens.new_tensor([eos_id]), tokens])
    streams = []
    for shifted, fill in ((text[:-1], eos_id), (text[1:], IGNORE_INDEX)):
        shorter = shifted[cut:].view(n_streams - n_longer, length)
        padded = torch.nn.functional.pad(shorter, (0, 1), value=fill)
        streams.append(torch.cat([shifted[:cut].view(n_longer, length + 1), padded]))
    return streams[0], streams[1]


def _length(tokens: Tensor, n_streams: int) -> int:
    if not 1 <= n_streams <= len(tokens):
        raise ValueError(
            f"{len(tokens)} tokens cannot be cut into {n_streams} streams: change data.batch_size, "
            "data.eval_batch_size or data.test_batch_size"
        )
    return len(tokens) // n_streams


def shard(streams: Streams, rank: int, world_size: int, *, exact: bool) -> Streams:
    """The contiguous block of streams that a rank works on.

    Args:
        streams: Input and target, each (n_streams, T).
        rank: This process, from 0 to ``world_size - 1``.
        world_size: The number of processes.
        exact: For evaluation, blocks are as even as possible, and a rank without a stream gets one whose targets are
            all ``IGNORE_INDEX``, so that all ranks take the same number of steps. For training (False) the blocks must
            be even.

    Returns:
        Input and target of this rank.

    Raises:
        ValueError: If ``exact`` is False and the streams do not divide evenly.
    """
    n_streams = len(streams[0])
    if not exact and n_streams % world_size:
        raise ValueError(
            f"data.batch_size is the global number of training streams: {n_streams} do not divide over "
            f"{world_size} devices; use a multiple of {world_size}, or other trainer.devices"
        )
    block = slice(rank * n_streams // world_size, (rank + 1) * n_streams // world_size)
    if block.start == block.stop:
        return streams[0][:1], torch.full_like(streams[1][:1], IGNORE_INDEX)
    return streams[0][block], streams[1][block]


class Segments:
    """Truncated BPTT segments of streams: a sized iterable of ``(input, target)``, each (B, t) int64 with t <= bptt.

    It can be iterated again, and its position can be saved and restored, which is what Lightning does with the training
    loader to resume in the middle of an epoch.

    Args:
        input: (B, T) integers.
        target: (B, T) integers.
        bptt: Positions predicted by a segment; the last one may be shorter.
        context: Each segment also carries up to so many earlier positions, with target ``IGNORE_INDEX``: what a model
            without carried state looks back on. A segment then has up to ``context + bptt`` positions.

    Raises:
        ValueError: If ``bptt`` or ``context`` is out of range.
    """

    def __init__(self, input: Tensor, target: Tensor, bptt: int, context: int = 0) -> None:  # noqa: A002 (torch's name)
        if bptt < 1 or context < 0:
            raise ValueError(f"expected bptt >= 1 and context >= 0, got bptt={bptt} and context={context}")
        self.input = input
        self.target = target
        self.bptt = bptt
        self.context = context
        self._position = 0
        self._resumed = False

    def __len__(self) -> int:
        return -(-self.input.shape[1] // self.bptt)

    def __iter__(self) -> Iterator[Streams]:
        # Lightning stops at len() and never exhausts a sized iterator, so a new epoch is told by a new iterator
        first = self._position if self._resumed else 0
        self._resumed = False
        for index in range(first, len(self)):
            self._position = index + 1
            yield self._segment(index)

    def _segment(self, index: int) -> Streams:
        begin, end = index * self.bptt, (index + 1) * self.bptt
        window = slice(max(0, begin - self.context), end)
        target = self.target[:, window].to(torch.int64, copy=True)  # a copy, so that the streams stay as they are
        target[:, : begin - window.start] = IGNORE_INDEX
        return self.input[:, window].to(torch.int64, copy=True), target

    def place(self, index: int) -> str:
        """Say where a segment is in the text, for messages."""
        begin, length = index * self.bptt, self.input.shape[1]
        end = min(begin + self.bptt, length)
        return f"segment {index} of {len(self)}, tokens {begin} to {end - 1} of the {length} of every stream"

    def state_dict(self) -> dict[str, Any]:
        """The number of segments given out in this epoch, and that of all."""
        return {"position": self._position, "n_segments": len(self)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the segments already given out; from the start if that was a whole epoch.

        Raises:
            CheckpointError: If the position lies within an epoch of another number of segments.
        """
        position, n_segments = state["position"], state["n_segments"]
        if position >= n_segments:
            position = 0
        if position and n_segments != len(self):
            raise CheckpointError(
                f"the checkpoint was written after segment {position} of {n_segments}, but the training data now has "
                f"{len(self)} segments: resume with the same corpus, data.batch_size and data.bptt"
            )
        self._position, self._resumed = position, True
