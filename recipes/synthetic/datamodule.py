"""A language whose log-probability matrix has a known rank and whose perplexity has a known floor."""

import math
from bisect import bisect
from functools import cached_property

import torch
from torch import Generator, Tensor

from lit_sigsoftmax.data import EOS, Corpus, CorpusDataModule, Vocabulary

__all__ = ["SyntheticLanguage"]


class SyntheticLanguage(CorpusDataModule):
    r"""A Markov chain, in which the softmax bottleneck can be seen and no model can pass the floor.

    The next token depends on the last one alone: ``log p(y|x) = log_softmax(a_x . b_y)``, where ``a_x`` and ``b_y`` are
    random vectors of size ``rank - 1``. The (V, V) matrix of log-probabilities has rank ``rank``, which is the most
    that a softmax layer of hidden size ``rank - 1`` can reach (a bias adds one). Such a layer can be exact; narrower
    ones cannot. In the default language the best softmax layer of hidden size 8 stays 0.66 nats per token above the
    entropy, that of 16 stays 0.25 above, that of 24 stays 0.08 above, and that of 32 reaches it.

    Each split is a chain of its own that starts at ``<eos>``, which is a token like any other.

    Args:
        vocab_size: V, the number of types.
        rank: Rank of the matrix of log-probabilities, from 2 to V.
        scale: Standard deviation of the logits ``a_x . b_y``: the larger, the lower the entropy.
        n_tokens: Tokens of the training split; validation and test have a tenth each.
        seed: Of the language and of its text.
        **streams: The arguments of :class:`~lit_sigsoftmax.data.CorpusDataModule`.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self,
        vocab_size: int = 256,
        rank: int = 33,
        scale: float = 2.0,
        n_tokens: int = 400_000,
        seed: int = 0,
        **streams: int,
    ) -> None:
        super().__init__(**streams)
        if not 2 <= rank <= vocab_size:
            raise ValueError(f"data.rank must be from 2 to data.vocab_size, which is {vocab_size}, got {rank}")
        if not 0 < scale < math.inf:
            raise ValueError(f"data.scale must be positive and finite, got {scale}")
        if n_tokens < 10:
            raise ValueError(f"data.n_tokens must be at least 10, got {n_tokens}")
        self.rank = rank
        self.scale = scale
        self.n_tokens = n_tokens
        self.seed = seed
        self._vocab_size = vocab_size

    @cached_property
    def log_probs(self) -> Tensor:
        """(V, V) float64: in row x, the log-probability of each token after token x."""
        generator = torch.Generator().manual_seed(self.seed)
        size = (2, self._vocab_size, self.rank - 1)
        a, b = torch.randn(size, generator=generator, dtype=torch.float64)
        return torch.log_softmax(self.scale / math.sqrt(self.rank - 1) * a @ b.T, dim=-1)

    @cached_property
    def stationary(self) -> Tensor:
        """(V,) float64: how often each token occurs in the long run."""
        probs = self.log_probs.exp()
        ones = torch.ones_like(probs)
        # pi P = pi and pi 1 = 1 together: pi (I - P + 1 1^T) = 1^T
        return torch.linalg.solve((torch.eye(len(probs), dtype=probs.dtype) - probs + ones).T, ones[0])

    @property
    def entropy(self) -> float:
        """Nats per token: the expected loss of the true distribution. Its ``exp`` is the least expected perplexity."""
        log_probs = self.log_probs
        return -float(self.stationary @ (log_probs.exp() * log_probs).sum(dim=-1))

    def load_corpus(self) -> Corpus:
        """Sample the three splits."""
        vocabulary = Vocabulary([EOS, *(str(i) for i in range(1, self._vocab_size))])
        generator = torch.Generator().manual_seed(-1 - self.seed)  # not the numbers that made the language
        n_heldout = self.n_tokens // 10
        splits = [self._sample(n, vocabulary.eos_id, generator) for n in (self.n_tokens, n_heldout, n_heldout)]
        return Corpus("synthetic", vocabulary, *splits)

    def _sample(self, n_tokens: int, state: int, generator: Generator) -> Tensor:
        cumulative = self.log_probs.exp().cumsum(dim=-1)
        cumulative[:, -1] = 1  # whatever the rounding: above every sample
        rows = cumulative.tolist()
        tokens = []
        for uniform in torch.rand(n_tokens, generator=generator, dtype=torch.float64).tolist():
            state = bisect(rows[state], uniform)
            tokens.append(state)
        return torch.tensor(tokens, dtype=torch.int32)
