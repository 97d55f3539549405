"""The losses that ``loss.py`` compares, each as a step of training or evaluation on the same tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_sigsoftmax import OutputHead
from lit_sigsoftmax.activations import ActivationSpec, available_activations
from lit_sigsoftmax.functional import linear_cross_entropy
from lit_sigsoftmax.losses import compiled, gemm

__all__ = ["Candidate", "Inputs", "Size", "Step", "candidates", "inputs_of", "products"]

Step = Callable[[], Sequence[Tensor]]
"""Runs once and returns the gradients."""

_Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


class Size(NamedTuple):
    """The size of an output layer: N tokens, d, V and K."""

    tokens: int
    hidden_size: int
    vocab_size: int
    n_experts: int = 1

    @property
    def logits(self) -> int:
        """How many logits there are."""
        return self.tokens * self.n_experts * self.vocab_size

    def __str__(self) -> str:
        experts = f", K={self.n_experts}" if self.n_experts > 1 else ""
        return f"N={self.tokens:,}, d={self.hidden_size:,}, V={self.vocab_size:,}{experts}"


class Inputs(NamedTuple):
    """Hidden vectors (N, d), weight (V, d), targets (N,)."""

    hidden: Tensor
    weight: Tensor
    target: Tensor
    size: Size


@dataclass(frozen=True)
class Candidate:
    """One way to compute a loss.

    Attributes:
        name: As in the table.
        baseline: Name of what its time is compared with.
        make: From the inputs to a step.
        peer: Name of another one that its time is compared with.
    """

    name: str
    baseline: str
    make: Callable[[Inputs], Step]
    peer: str | None = None


def inputs_of(size: Size, device: torch.device) -> Inputs:
    """Draw float32 inputs whose logits have a standard deviation of 2."""
    generator = torch.Generator(device).manual_seed(0)
    draw = functools.partial(torch.randn, generator=generator, device=device)
    hidden, weight = draw(size.tokens, size.hidden_size), draw(size.vocab_size, size.hidden_size)
    weight.mul_(2 / size.hidden_size**0.5)
    target = torch.randint(size.vocab_size, (size.tokens,), generator=generator, device=device)
    return Inputs(hidden.requires_grad_(), weight.requires_grad_(), target, size)


def candidates(size: Size, device: torch.device) -> list[Candidate]:
    """Return what is to be compared at a size."""
    if size.n_experts > 1:
        return _mixtures(device)
    found = [Candidate("stock softmax", "stock softmax", _training(_stock))]
    if torchs := _torchs_chunked():
        found.append(Candidate("torch's chunked softmax", "stock softmax", _training(torchs)))
    naive = functools.partial(linear_cross_entropy, activation="sigsoftmax", backend="reference")
    found.append(Candidate("naive sigsoftmax", "stock softmax", _training(naive)))
    found += _registered(
        "", "stock softmax", lambda name: _training(functools.partial(linear_cross_entropy, activation=name)), device
    )
    users = functools.partial(linear_cross_entropy, activation=lambda z: z + F.logsigmoid(z))
    found += _both("a lambda, sigsoftmax's", "stock softmax", _training(users), device, "sigsoftmax")
    sigsoftmax = functools.partial(linear_cross_entropy, activation="sigsoftmax")
    softmax = functools.partial(linear_cross_entropy, activation="softmax")
    bfloat16 = functools.partial(torch.autocast, device.type, torch.bfloat16)
    for kind, of in (
        ("bfloat16", functools.partial(_training, context=bfloat16)),
        ("evaluation", _evaluation),
        ("evaluation in bfloat16", functools.partial(_evaluation, context=bfloat16)),
    ):
        baseline = f"{kind}: stock softmax"
        found.append(Candidate(baseline, baseline, of(_stock)))
        found += _both(f"{kind}: sigsoftmax", baseline, of(sigsoftmax), device)
        found += _both(f"{kind}: softmax", baseline, of(softmax), device)
        found += _both(f"{kind}: a lambda, sigsoftmax's", baseline, of(users), device, f"{kind}: sigsoftmax")
    if device.type == "cpu":
        found.append(Candidate("three products in chunks", "stock softmax", _chunked_products))
    return found + (_public_kernels(bfloat16) if device.type == "cuda" else [])


def products(inputs: Inputs, dtype: torch.dtype = torch.float32) -> dict[str, dict[str, Step]]:
    """The three products that every loss takes, over all rows at once, by each library of the machine.

    On a GPU the vocabulary is rounded up to a multiple of 64: its library is several times slower on others.
    """
    weight = inputs.weight.detach().to(dtype)
    if weight.is_cuda:
        weight = F.pad(weight, (0, 0, 0, -len(weight) % 64))
    rows = inputs.hidden.detach().to(dtype).repeat_interleave(inputs.size.n_experts, 0)
    logits = F.linear(rows, weight)
    out, of_rows, of_weight = torch.empty_like(logits), torch.empty_like(rows), torch.empty_like(weight)
    found: dict[str, dict[str, Step]] = {
        "logits": {"torch": lambda: [torch.mm(rows, weight.t(), out=out)]},
        "of hidden": {"torch": lambda: [torch.mm(logits, weight, out=of_rows)]},
        "of weight": {"torch": lambda: [torch.mm(logits.t(), rows, out=of_weight)]},
    }
    if rows.device.type == "cpu" and dtype == torch.float32 and gemm._onednn_works():
        found["logits"]["onednn"] = lambda: [gemm._onednn(rows, weight, None)]
        found["of hidden"]["onednn"] = lambda: [gemm._onednn(logits, weight.t(), None)]
        found["of weight"]["onednn"] = lambda: [gemm._onednn(logits.t(), rows.t(), None)]
    return found


def _chunked_products(inputs: Inputs) -> Step:
    """The floor of a loss that holds an eighth of the logits: its products alone, in as many chunks."""
    hidden, weight, _, size = inputs
    rows = -(-size.tokens // 9)

    def step() -> Sequence[Tensor]:
        with torch.no_grad():
            of_hidden, of_weight = torch.empty_like(hidden), torch.zeros_like(weight)
            for chunk, of_chunk in zip(hidden.split(rows), of_hidden.split(rows), strict=True):
                logits = gemm.linear(chunk, weight)
                of_chunk.copy_(gemm.linear(logits, weight.t()))
                of_weight.addmm_(logits.t(), chunk)
                del logits  # or the next chunk's would stand beside it
        return of_hidden, of_weight

    return step


def _stock(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), target)


def _training(
    loss: _Loss, context: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> Callable[[Inputs], Step]:
    def make(inputs: Inputs) -> Step:
        def step() -> Sequence[Tensor]:
            with context():
                nats = loss(inputs.hidden, inputs.weight, inputs.target)
            return torch.autograd.grad(nats, (inputs.hidden, inputs.weight))

        return step

    return make


def _evaluation(
    loss: _Loss, context: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> Callable[[Inputs], Step]:
    def make(inputs: Inputs) -> Step:
        def step() -> Sequence[Tensor]:
            with torch.no_grad(), context():
                loss(inputs.hidden, inputs.weight, inputs.target)
            return ()

        return step

    return make


def _mixture(activation: ActivationSpec, naive: bool = False) -> Callable[[Inputs], Step]:
    def make(inputs: Inputs) -> Step:
        size = inputs.size
        head = OutputHead(size.hidden_size, size.vocab_size, activation, size.n_experts, bias=False)
        head.to(inputs.hidden.device).weight = nn.Parameter(inputs.weight.detach())

        def step() -> Sequence[Tensor]:
            if naive:
                nll = -head.log_prob(inputs.hidden).gather(-1, inputs.target.unsqueeze(-1))
            else:
                nll = head.nll(inputs.hidden, inputs.target)
            return torch.autograd.grad(nll.mean(), (inputs.hidden, *head.parameters()))

        return step

    return make


def _mixtures(device: torch.device) -> list[Candidate]:
    baseline = "naive mixture of sigsoftmaxes"
    naive = Candidate(baseline, baseline, _mixture("sigsoftmax", naive=True))
    return [naive, *_registered("mixture, ", baseline, _mixture, device)]


def _registered(
    kind: str, baseline: str, of: Callable[[str], Callable[[Inputs], Step]], device: torch.device
) -> list[Candidate]:
    peer = f"{kind}sigsoftmax"
    return [c for name in available_activations() for c in _both(f"{kind}{name}", baseline, of(name), device, peer)]


def _both(
    name: str, baseline: str, make: Callable[[Inputs], Step], device: torch.device, peer: str | None = None
) -> list[Candidate]:
    """A candidate as it is, and as on a machine without a compiler."""

    def without(inputs: Inputs) -> Step:
        step = make(inputs)

        def alone() -> Sequence[Tensor]:
            with mock.patch.object(compiled, "_library", return_value=None):
                return step()

        return alone

    found = [Candidate(name, baseline, make, peer)]
    if device.type == "cpu":
        found.append(Candidate(f"{name}, no compiler", baseline, without, peer and f"{peer}, no compiler"))
    return found


def _torchs_chunked() -> _Loss | None:
    if not hasattr(F, "linear_cross_entropy"):  # torch 2.13
        return None
    return functools.partial(F.linear_cross_entropy, options=nn.LinearCrossEntropyOptions())


def _public_kernels(bfloat16: Callable[[], AbstractContextManager[Any]]) -> list[Candidate]:
    found, baseline = [], "bfloat16: stock softmax"
    if find_spec("liger_kernel"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss()
        loss: _Loss = lambda hidden, weight, target: liger(weight, hidden, target)  # noqa: E731
        found.append(Candidate("Liger Kernel, softmax", "stock softmax", _training(loss)))
        found.append(Candidate("bfloat16: Liger Kernel, softmax", baseline, _training(loss, bfloat16)))
    if find_spec("cut_cross_entropy"):  # 16 bits only
        from cut_cross_entropy import linear_cross_entropy as cut

        loss = lambda hidden, weight, target: cut(hidden.bfloat16(), weight.bfloat16(), target)  # noqa: E731
        found.append(Candidate("bfloat16: Cut Cross-Entropy, softmax", baseline, _training(loss)))
    return found
