"""How many rows of logits are held at a time: within an eighth of all, and enough for the matrix products."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["groups", "of_block", "of_chunks", "of_tiles"]

# A chunk has about this share of all rows, so that with what the passes over it hold it is within an eighth (but not
# where a program is not trusted, and the general way takes its chunk) ...
_SHARES = {"tiles": 8.2, "compiled": 9, "triton": 9, "closed form": 10, "derivative": 12, "general": 12}
_TILE = 128  # rows that a GPU's product takes at a time
_ROWS = 192  # ... and no more than this on a processor: the products do not get faster ...
_MOST = 31 * 2**18  # ... nor more logits: a block of 32 MB glibc takes from the system anew each time
_LEAST, _LEAST_ON_GPU = 2**18, 2**25  # logits of the smallest chunk
# ... nor fewer rows on a processor than this part of a hidden vector's size: its products would wait for the weight.
_OF_SIZE, _OF_SIZE_IN_HALF = 4, 2
_LANES = 16  # rows of a chunk whose products are compiled too: a multiple, ...
_TILED_ROWS, _TILED_LOGITS = 128, 2**20  # ... and no more than these: a library is faster with them
_BLOCKS = 9  # of a chunk that is differentiated by autograd
_LEAST_BLOCK_ON_GPU = 2**22  # logits: with fewer it waits for the host


def of_chunks(hidden: Tensor, weight: Tensor, way: str, in_half: bool, differentiated: bool) -> Iterator[slice]:
    """Return the tokens of each chunk.

    Args:
        hidden: Shape (N, K, d).
        weight: Shape (V, d).
        way: From logits to losses, a key of ``_SHARES``.
        in_half: Whether the products are of half precision.
        differentiated: Whether there are gradients. Without them little else is held: as many rows as the products are
            fastest with.
    """
    tokens, experts, _ = hidden.shape
    rows = tokens * experts
    alone = weight.is_cpu and not differentiated
    size = _most(rows, weight, in_half) if alone else _of_chunk(rows, weight, way, in_half)
    return groups(tokens, experts, size, 1 if weight.is_cpu else _TILE)


def of_tiles(rows: int, weight: Tensor, in_half: bool) -> int:
    """Return the rows of a chunk whose products are compiled too; 0 where a library's are faster."""
    vocab_size, size = weight.shape
    chunk = _of_chunk(rows, weight, "tiles", in_half)
    few = max(chunk, _least(weight, in_half)) <= _TILED_ROWS and chunk * vocab_size <= _TILED_LOGITS
    sums_are_small = 4 * torch.get_num_threads() * size <= vocab_size  # of each thread, beside the logits
    return chunk if few and sums_are_small else 0


def of_block(logits: Tensor) -> int:
    """Return the rows of a chunk that are differentiated at a time; several copies of them are held on the way."""
    return max(-(-len(logits) // _BLOCKS), _LEAST_BLOCK_ON_GPU // logits.shape[1] if logits.is_cuda else 0)


def groups(tokens: int, experts: int, most: int, multiple: int = 1) -> Iterator[slice]:
    """Tokens of up to so many rows at a time, or the next multiple: nearly equal, a small rest costs like a whole."""
    step = -(-tokens // max(1, -(-tokens * experts // most)))
    step = -(-step * experts // multiple) * multiple // experts
    return (slice(start, start + step) for start in range(0, tokens, max(1, step)))


def _of_chunk(rows: int, weight: Tensor, way: str, in_half: bool) -> int:
    share = _SHARES[way]
    if way != "tiles":
        return min(max(math.ceil(rows / share), _least(weight, in_half)), _most(rows, weight, in_half))
    # Beside its logits a chunk holds its rows, and each thread a gradient of them. Its products are float32.
    share *= 1 + (1 + torch.get_num_threads()) * weight.shape[1] / len(weight)
    size = min(max(math.ceil(rows / share), _least(weight, False)), _most(rows, weight, in_half))
    return size // _LANES * _LANES


def _least(weight: Tensor, in_half: bool) -> int:
    vocab_size, size = weight.shape
    if not weight.is_cpu:
        return max(32, _LEAST_ON_GPU // vocab_size)
    of_size = size // (_OF_SIZE_IN_HALF if in_half else _OF_SIZE)
    return max(32, _LEAST // vocab_size, min(of_size, _MOST // vocab_size))


def _most(rows: int, weight: Tensor, in_half: bool) -> int:
    return max(min(_ROWS, _MOST // len(weight)) if weight.is_cpu else rows, _least(weight, in_half))
