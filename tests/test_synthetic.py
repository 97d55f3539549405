"""The synthetic language: its rank and entropy are what it says, its text is what its matrix says."""

import math

import pytest
import torch
import torch.nn.functional as F

from lit_sigsoftmax.data import EOS
from lit_sigsoftmax.recipes.synthetic import SyntheticLanguage


def press_rank(matrix):
    """Numerical rank with the threshold of Press et al., Numerical Recipes, section 2.6."""
    singular_values = torch.linalg.svdvals(matrix)
    threshold = 0.5 * math.sqrt(sum(matrix.shape) + 1) * singular_values[0] * torch.finfo(matrix.dtype).eps
    return int((singular_values > threshold).sum())


def least_excess(language, hidden_size):
    """Nats per token by which the best softmax layer without bias, hidden vectors free, exceeds the entropy."""
    generator = torch.Generator().manual_seed(0)
    size = (2, len(language.log_probs), hidden_size)
    factors = (0.5 * torch.randn(size, generator=generator, dtype=torch.float64)).requires_grad_()
    joint = language.stationary[:, None] * language.log_probs.exp()
    optimizer = torch.optim.LBFGS([factors], max_iter=200, history_size=20, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = -(joint * F.log_softmax(factors[0] @ factors[1].T, dim=-1)).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return closure().item() - language.entropy


@pytest.fixture
def one_thread():
    """Matrices this small take far longer on several threads."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.mark.parametrize(("vocab_size", "rank"), [(64, 2), (64, 17), (64, 64), (256, 33)])
def test_rank_is_exact(vocab_size, rank):
    language = SyntheticLanguage(vocab_size=vocab_size, rank=rank)
    assert language.log_probs.shape == (vocab_size, vocab_size)
    assert language.log_probs.dtype == torch.float64
    assert language.rank == press_rank(language.log_probs) == rank


def test_rows_are_distributions_and_pi_is_stationary():
    language = SyntheticLanguage()
    probs = language.log_probs.exp()
    torch.testing.assert_close(probs.sum(dim=-1), torch.ones(256, dtype=torch.float64))
    torch.testing.assert_close(language.stationary @ probs, language.stationary)
    assert language.stationary.sum().item() == pytest.approx(1)
    assert language.stationary.min() > 0


def test_entropy_is_the_loss_of_the_truth_and_far_below_the_unigram():
    language = SyntheticLanguage(seed=3)
    text = language.corpus.train.long()
    losses = -language.log_probs[text[:-1], text[1:]]
    assert losses.mean().item() == pytest.approx(language.entropy, abs=0.015)  # 5 standard errors
    unigram = -(language.stationary * language.stationary.log()).sum().item()
    assert language.entropy < unigram - 1.5
    assert unigram < math.log(256)


@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_scale_is_the_standard_deviation_of_the_logits(scale):
    rows = SyntheticLanguage(scale=scale).log_probs  # the logits, each row shifted
    assert rows.var(dim=-1).mean().sqrt().item() == pytest.approx(scale, rel=0.1)


@pytest.mark.usefixtures("one_thread")
def test_the_bottleneck_can_be_seen():
    language = SyntheticLanguage(vocab_size=48, rank=17)
    assert least_excess(language, hidden_size=4) > 0.2
    assert least_excess(language, hidden_size=12) > 0.01
    assert least_excess(language, hidden_size=16) < 1e-4


def test_transitions_follow_the_matrix():
    language = SyntheticLanguage(vocab_size=4, rank=3, scale=1.0, n_tokens=200_000)
    text = torch.cat([torch.tensor([language.corpus.vocabulary.eos_id]), language.corpus.train.long()])
    counts = torch.zeros(4, 4, dtype=torch.float64)
    counts.index_put_((text[:-1], text[1:]), torch.ones(len(text) - 1, dtype=torch.float64), accumulate=True)
    n = counts.sum(dim=-1, keepdim=True)
    probs = language.log_probs.exp()
    z = (counts / n - probs) / (probs * (1 - probs) / n).sqrt()
    assert z.abs().max() < 4.5


def test_every_split_starts_after_eos():
    """Over many seeds, the first token is distributed as the row of <eos> says."""
    firsts = [SyntheticLanguage(vocab_size=2, rank=2, scale=1.0, n_tokens=10, seed=seed) for seed in range(200)]
    expected = sum(language.log_probs[0, 1].exp().item() for language in firsts)
    for split in ("train", "valid", "test"):
        found = sum(getattr(language.corpus, split)[0].item() for language in firsts)
        assert abs(found - expected) < 4.5 * math.sqrt(200 / 4)


def test_sizes_and_vocabulary():
    language = SyntheticLanguage(vocab_size=32, rank=5, n_tokens=1000, batch_size=4, bptt=7)
    corpus = language.corpus
    assert (len(corpus.train), len(corpus.valid), len(corpus.test)) == (1000, 100, 100)
    assert corpus.train.dtype == torch.int32
    assert language.vocab_size == len(corpus.vocabulary) == 32
    assert corpus.vocabulary.tokens[0] == EOS
    assert not torch.equal(corpus.valid, corpus.test)
    tokens, target = next(iter(language.train_dataloader()))
    assert tokens.shape == target.shape == (4, 7)
    assert tokens[0, 0] == corpus.vocabulary.eos_id


def test_same_seed_same_language_and_text():
    def make(seed):
        return SyntheticLanguage(vocab_size=32, rank=5, n_tokens=1000, seed=seed)

    assert make(1).corpus.fingerprint == make(1).corpus.fingerprint
    assert make(1).corpus.fingerprint != make(2).corpus.fingerprint
    assert not torch.equal(make(1).log_probs, make(2).log_probs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 1}, "data.rank must be from 2 to data.vocab_size, which is 256, got 1"),
        ({"rank": 9, "vocab_size": 8}, "which is 8, got 9"),
        ({"scale": 0.0}, "data.scale must be positive"),
        ({"scale": math.nan}, "data.scale must be positive"),
        ({"n_tokens": 9}, "data.n_tokens must be at least 10, got 9"),
        ({"bptt": 0}, "data.bptt"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        SyntheticLanguage(**arguments)
