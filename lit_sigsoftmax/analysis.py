r"""Rank of the log-probability matrix: how many linearly independent log-output vectors a model has.

The matrix has a row for each context and a column for each token. Softmax on ``d`` hidden units gives at most ``d + 1``
independent rows, ``d + 2`` with a bias: ``log p = W h + b - logsumexp`` lies in the span of the columns of W, of b, and
of the all-ones vector. Two measures of it are in use:

- the **count** of singular values above the threshold of Press et al. (Numerical Recipes, 3rd ed., section 2.6),
  ``0.5 * sqrt(N + V + 1) * sigma_max * eps``: :func:`log_prob_rank`, as in Yang et al. (ICLR 2018) and Kanai et al.
  (NeurIPS 2018). It is fragile: noise of 1e-12 on a matrix of rank ten makes it full. It says what a layer *can*
  express.
- the **effective rank**, the number of directions that hold all but a small part of the energy:
  :func:`effective_rank`, as in Parthiban et al. (AAAI 2021). It says what a layer *does* express.

The matrix is read in blocks of rows and never squared: in a Gram matrix everything below ``sqrt(eps)`` of the largest
singular value drowns, and the threshold lies far below that. See :func:`spectrum` for method and memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Spectrum", "effective_rank", "log_prob_rank", "plot_spectra", "spectrum"]

_BLOCK = 256  # rows taken at a time


@dataclass(frozen=True)
class Spectrum:
    """The singular values of a log-probability matrix, from which both ranks follow.

    Args:
        singular_values: Shape (k,), float64, in nats, descending. Those of a rounding error's size are left out.
        n_rows: Number N of contexts.
        n_columns: Number V of tokens.
        dtype: The dtype in which the log-probabilities were computed.
    """

    singular_values: Tensor
    n_rows: int
    n_columns: int
    dtype: torch.dtype

    def press_threshold(self, dtype: torch.dtype | None = None) -> float:
        """Return ``0.5 * sqrt(N + V + 1) * sigma_max * eps``, below which a singular value may be a rounding error.

        Args:
            dtype: Whose machine epsilon; by default that of the dtype the log-probabilities were computed in. The
                published counts are of float32.
        """
        if not len(self.singular_values):
            return 0.0
        eps = torch.finfo(dtype or self.dtype).eps
        return 0.5 * math.sqrt(self.n_rows + self.n_columns + 1) * float(self.singular_values[0]) * eps

    def log_prob_rank(self, dtype: torch.dtype | None = None) -> int:
        """Return the number of singular values above :meth:`press_threshold`."""
        return int((self.singular_values > self.press_threshold(dtype)).sum())

    def effective_rank(self, eps: float = 1e-3) -> int:
        """Return the smallest k for which the k largest singular values hold ``1 - eps`` of the sum of all squares.

        Raises:
            ValueError: ``eps`` is not in [0, 1).
        """
        if not 0 <= eps < 1:
            raise ValueError(f"eps is the part of the energy to leave out, at least 0 and below 1, not {eps}")
        # What is left after each k, added up from the smallest: a small rest keeps its digits.
        rest = self.singular_values.square().flip(0).cumsum(0).flip(0)
        return int((rest > eps * rest[:1]).sum())

    def to_json(self) -> str:
        """Return an object with the keys ``n_rows``, ``n_columns``, ``dtype`` (as in ``"float64"``) and
        ``singular_values`` (nats, descending, all digits).
        """  # noqa: D205
        dtype = str(self.dtype).removeprefix("torch.")
        size = {"n_rows": self.n_rows, "n_columns": self.n_columns, "dtype": dtype}
        return json.dumps({**size, "singular_values": self.singular_values.tolist()})

    @classmethod
    def from_json(cls, text: str) -> Spectrum:
        """Read what :meth:`to_json` wrote."""
        fields = json.loads(text)
        values = torch.tensor(fields["singular_values"], dtype=torch.float64)
        return cls(values, fields["n_rows"], fields["n_columns"], getattr(torch, fields["dtype"]))


def log_prob_rank(log_probs: Tensor | Iterable[Tensor]) -> int:
    """Count the linearly independent log-output vectors: singular values above the threshold of Press et al.

    The threshold's eps is that of the dtype of ``log_probs``, whose rounding it is there to ignore; the arithmetic is
    float64 either way. The published counts are of float32.

    Args:
        log_probs: Nats, shape (N, V), or blocks of rows, (n, V) each.

    Returns:
        The count, at most min(N, V).

    Raises:
        ValueError: See :func:`spectrum`.

    Example:
        >>> logits = torch.randn(400, 5, dtype=torch.float64) @ torch.randn(5, 60, dtype=torch.float64)
        >>> log_prob_rank(torch.log_softmax(logits, dim=-1))
        6
    """
    return spectrum(log_probs).log_prob_rank()


def effective_rank(log_probs: Tensor | Iterable[Tensor], eps: float = 1e-3) -> int:
    """Return the smallest k for which the k largest singular values hold ``1 - eps`` of the sum of all squares.

    Args:
        log_probs: Nats, shape (N, V), or blocks of rows, (n, V) each.
        eps: The part of the energy to leave out; Parthiban et al. (2021) use 1e-3, 1e-4 and 1e-5.

    Returns:
        k, at most min(N, V).

    Raises:
        ValueError: ``eps`` is not in [0, 1), or see :func:`spectrum`.
    """
    return spectrum(log_probs).effective_rank(eps)


@torch.no_grad()
def spectrum(log_probs: Tensor | Iterable[Tensor]) -> Spectrum:
    """Compute the singular values of a matrix that is given in blocks of rows and never held whole.

    An orthonormal basis of the row space grows as blocks come (Gram-Schmidt, twice), and the rows are kept as
    coordinates in it, reduced by QR to a triangle. Once the basis has k vectors that explain all further rows, as with
    softmax, a row costs O(kV). Where the basis exceeds V/4 it saves little, and the rows themselves are reduced, at
    O(V^2) each. All of it is orthogonal transformations in float64, on the device of the blocks.

    What 256 rows have outside the basis is dropped where it is below ``2 eps sigma_max``, with the eps of the blocks'
    dtype. Over all N rows that moves no singular value by more than ``2 eps sigma_max sqrt(ceil(N / 256))``: where N is
    256 or more, about a third of the Press threshold at the most.

    Memory, beside the blocks: about ``8 k (V + 2k)`` bytes for a basis of k vectors and ten times 256 rows; where the
    rank is full, at most ``70 V^2`` bytes (7 GB for 10,000 tokens), or ``30 N V`` where N is smaller than V.

    Args:
        log_probs: Nats, shape (N, V), or blocks of rows, (n, V) each, of any sizes.

    Returns:
        The singular values, at most min(N, V).

    Raises:
        ValueError: There are no rows, or a block has another shape or dtype than the first, is no matrix of floating
            point numbers, or has an entry that is not finite.
    """
    rows, n_rows = None, 0
    for block in _blocks([log_probs] if isinstance(log_probs, Tensor) else log_probs):
        rows = rows or _Rows(block)
        rows.add(block.to(torch.float64, copy=True))
        n_rows += len(block)
    if rows is None:
        raise ValueError(
            "there are no log-probabilities: expected (N, V) with N and V at least 1, or blocks of such rows"
        )
    return Spectrum(rows.singular_values().cpu(), n_rows, rows.width, rows.dtype)


class _Rows:
    """All rows so far, as ``cat(parts) @ basis``; without a basis, as ``cat(parts)``.

    Reducing the parts to the triangle of their QR decomposition leaves all singular values as they are.
    """

    def __init__(self, like: Tensor) -> None:
        self.dtype, self.width = like.dtype, like.shape[1]
        self.tolerance = 2 * torch.finfo(like.dtype).eps
        self.basis: Tensor | None = like.new_empty(0, self.width, dtype=torch.float64)
        self.parts: list[Tensor] = []

    def add(self, block: Tensor) -> None:
        if self.basis is not None:
            block = self._coordinates(block, self.basis)
        self.parts.append(block)
        if self.basis is not None and len(self.basis) > self.width // 4:
            self.parts = [self._triangle() @ self.basis]
            self.basis = None
        # At twice as many rows as columns: more rows take more memory, fewer make many reductions.
        if sum(map(len, self.parts)) >= max(2 * self.parts[0].shape[1], 2 * _BLOCK):
            self.parts = [self._triangle()]

    def singular_values(self) -> Tensor:
        rows = self._take()
        if len(rows) < rows.shape[1]:  # LAPACK's own path for wide matrices is many times slower
            rows = rows.T
        return torch.linalg.svdvals(torch.linalg.qr(rows, mode="r").R)

    def _triangle(self) -> Tensor:
        return torch.linalg.qr(self._take(), mode="r").R

    def _take(self) -> Tensor:
        # The parts are let go of before the decomposition makes its copies.
        rows, self.parts = torch.cat(self.parts), []
        return rows

    def _coordinates(self, block: Tensor, basis: Tensor) -> Tensor:
        coordinates = block @ basis.T
        rest = block - coordinates @ basis
        # The first basis vector is the main direction of the first block: how much of the rows lies in it bounds
        # sigma_max from below, closely.
        scale = torch.cat([part[:, 0] for part in self.parts]).norm() if len(basis) else rest.new_zeros(())
        if rest.norm() <= self.tolerance * scale:
            return coordinates
        again = rest @ basis.T
        coordinates, rest = coordinates + again, rest - again @ basis
        directions, triangle = torch.linalg.qr(rest.T)
        _, values, combinations = torch.linalg.svd(triangle.T)
        directions = directions @ combinations[values > self.tolerance * torch.maximum(scale, values[0])].T
        # A direction that is barely above the tolerance is not orthogonal to the basis yet.
        directions = torch.linalg.qr(directions - basis.T @ (basis @ directions)).Q
        self.basis = torch.cat([basis, directions.T])
        self.parts = [F.pad(part, (0, directions.shape[1])) for part in self.parts]
        return torch.cat([coordinates, rest @ directions], dim=1)


def _blocks(blocks: Iterable[Tensor]) -> Iterator[Tensor]:
    """Check blocks of any size and cut them anew, so that the result does not depend on how they were cut."""
    held: Tensor | None = None
    start, like = 0, None
    for block in blocks:
        like = block if like is None else like
        if block.dim() != 2 or not block.is_floating_point() or block.shape[1] != like.shape[1] or not block.shape[1]:
            raise ValueError(
                f"log-probabilities are floating point numbers of shape (N, V), here (rows, {like.shape[-1]}), "
                f"not {block.dtype} of shape {tuple(block.shape)}"
            )
        if block.dtype != like.dtype:
            raise ValueError(f"blocks of {like.dtype} and of {block.dtype} were given: compute all in one dtype")
        bad = (~block.isfinite()).any(dim=1).nonzero()
        if len(bad):
            raise ValueError(f"row {start + int(bad[0])} of the log-probabilities has an entry that is not finite")
        start += len(block)
        held = torch.cat([held, block]) if held is not None and len(held) else block
        while len(held) >= _BLOCK:
            yield held[:_BLOCK]
            held = held[_BLOCK:]
        held = held.clone()  # the caller may use the block's memory again
    if held is not None and len(held):
        yield held


def plot_spectra(spectra: Mapping[str, Spectrum]) -> Figure:
    """Draw singular values over their index, each spectrum relative to its largest, on logarithmic axes.

    Press et al.'s thresholds are dashed, at the eps of the spectrum's own dtype, and dotted, at that of float32, as in
    the published counts.

    Args:
        spectra: What to draw, by the name in the legend.

    Returns:
        A matplotlib figure, which needs no display.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for i, (name, one) in enumerate(spectra.items()):
        values, color = one.singular_values, f"C{i}"
        if not len(values):
            continue
        axes.loglog(range(1, len(values) + 1), values / values[0], color=color, label=f"{name}: {one.log_prob_rank()}")
        for dtype, style in ((one.dtype, "--"), (torch.float32, ":")):
            axes.axhline(one.press_threshold(dtype) / float(values[0]), color=color, linestyle=style, linewidth=0.8)
    axes.set(xlabel="index", ylabel="singular value / largest", title="Log-probability matrix: count above the dashes")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
