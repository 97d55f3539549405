"""The output head: hidden vectors to log-probabilities, one component or a mixture."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_sigsoftmax.activations import ActivationSpec, activation_spec, get_activation, widen
from lit_sigsoftmax.functional import IGNORE_INDEX, linear_cross_entropy, log_normalize
from lit_sigsoftmax.losses import check_backend, resolve_backend

__all__ = ["OutputHead"]


class OutputHead(nn.Module):
    r"""An output activation over a vocabulary, alone or mixed over ``n_experts`` projections of the hidden vector.

    One expert is :math:`\log p = \log g(z) - \operatorname{logsumexp}(\log g(z))` with :math:`z = W h + b`. A mixture
    is

    .. math:: \log p = \operatorname{logsumexp}_k(\log \pi_k(h) + \log p_k), \quad z_k = W \tanh(U_k h + c_k) + b,

    all in log space: with softmax the mixture of softmaxes (Yang et al., ICLR 2018), with sigsoftmax the mixture of
    sigsoftmaxes (Kanai et al., NeurIPS 2018).

    Args:
        hidden_size: Size d of the hidden vectors.
        vocab_size: Number V of tokens.
        activation: An output activation specification, callable or module (see :mod:`lit_sigsoftmax.activations`).
        n_experts: Number K of mixed distributions; 1 is the plain layer.
        bias: Whether the logits have a bias. It also lets sigsoftmax shift its logits, on which it depends.
        backend: The loss implementation, see :func:`lit_sigsoftmax.functional.linear_cross_entropy`.

    Attributes:
        weight: Shape (V, d); assign an embedding's weight to tie it.
        bias: Shape (V,) or None.

    Raises:
        ValueError: A size is below 1, or the activation or the backend is unknown.
    """

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        activation: ActivationSpec = "softmax",
        n_experts: int = 1,
        *,
        bias: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        for name, size in (("hidden_size", hidden_size), ("vocab_size", vocab_size), ("n_experts", n_experts)):
            if size < 1:
                raise ValueError(f"{name} is at least 1, not {size}")
        self.hidden_size, self.vocab_size, self.n_experts = hidden_size, vocab_size, n_experts
        check_backend(backend)
        self.backend = backend
        self.activation_spec = activation_spec(activation)
        # A generator state of its own, seeded by one draw: what is drawn after the head (dropout masks, other weights)
        # is the same for every output layer, and so is the weight itself.
        seed = int(torch.randint(2**62, ()))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size).uniform_(-0.1, 0.1))
            self.bias = nn.Parameter(torch.zeros(vocab_size)) if bias else None
            if n_experts > 1:
                self.prior = nn.Linear(hidden_size, n_experts, bias=False)
                self.latent = nn.Linear(hidden_size, n_experts * hidden_size)
            self.activation = get_activation(activation)

    @property
    def name(self) -> str:
        """The layer in words, as in ``sigsoftmax x4``; layers that differ have different names."""
        spec = self.activation_spec
        if isinstance(spec, dict):
            arguments = ", ".join(f"{key}={value}" for key, value in (spec.get("init_args") or {}).items())
            spec = spec.get("custom") or spec["class_path"] + (f"({arguments})" if arguments else "")
        return f"{spec} x{self.n_experts}"

    @property
    def loss_backend(self) -> str:
        """The implementation of the loss that serves this layer where it is now: what ``"auto"`` stands for."""
        return resolve_backend(self.backend, self.weight, self.weight, self.bias, self.activation)

    def log_prob(self, hidden: Tensor) -> Tensor:
        """Return the log-probability of every token.

        Args:
            hidden: Shape (..., d).

        Returns:
            Nats, shape (..., V), float32 or wider. A mixture holds (..., K, V) on the way.
        """
        if self.n_experts == 1:
            return log_normalize(F.linear(hidden, self.weight, self.bias), self.activation)
        log_prior, latent = self._experts(hidden)
        log_p = log_normalize(F.linear(latent, self.weight, self.bias), self.activation)
        return torch.logsumexp(log_prior.unsqueeze(-1) + log_p, dim=-2)

    def nll(self, hidden: Tensor, target: Tensor) -> Tensor:
        """Return the negative log-likelihood of the target tokens.

        Args:
            hidden: Shape (..., d).
            target: Token ids, int64, shape (...); ``-100`` is ignored and costs zero.

        Returns:
            Nats, shape (...), float32 or wider.
        """
        log_prior, experts = (None, hidden) if self.n_experts == 1 else self._experts(hidden)
        return linear_cross_entropy(
            experts,
            self.weight,
            target,
            self.bias,
            activation=self.activation,
            ignore_index=IGNORE_INDEX,
            reduction="none",
            log_prior=log_prior,
            backend=self.backend,
        )

    def _experts(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        log_prior = F.log_softmax(widen(self.prior(hidden)), dim=-1)  # (..., K)
        latent = torch.tanh(self.latent(hidden)).unflatten(-1, (self.n_experts, self.hidden_size))  # (..., K, d)
        return log_prior, latent

    def extra_repr(self) -> str:
        """Describe the head in a printed model."""
        return f"{self.hidden_size}, {self.vocab_size}, activation={self.activation_spec}, n_experts={self.n_experts}"
