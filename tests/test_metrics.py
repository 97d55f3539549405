import math
import random

import pytest
import torch
from torch import distributed, multiprocessing

from lit_sigsoftmax.functional import linear_cross_entropy
from lit_sigsoftmax.metrics import NegativeLogLikelihood


def batches(seed=0, sizes=(7, 7, 7, 2)):
    """Token losses of a few batches; the last one is short and dear."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(size, generator=generator) + 10 * (size < 7) for size in sizes]


def test_every_token_weighs_the_same():
    metric = NegativeLogLikelihood()
    for nll in batches():
        metric.update(nll, nll.numel())
    tokens = torch.cat(batches()).double()
    torch.testing.assert_close(metric.compute(), tokens.mean())
    mean_of_means = torch.stack([nll.mean() for nll in batches()]).mean()
    assert mean_of_means > 1.3 * metric.compute()  # what it must not be


def test_ignored_targets_do_not_count():
    metric = NegativeLogLikelihood()
    metric.update(torch.tensor([[2.0, 0.0], [4.0, 0.0]]), torch.tensor(2))
    metric.update(torch.zeros(2, 2), 0)
    assert metric.compute() == 3


def test_a_million_tokens_in_float64():
    metric = NegativeLogLikelihood()
    numbers = random.Random(0)
    tokens = torch.tensor([numbers.expovariate(0.2) for _ in range(1_000_000)])
    for nll in tokens.split(1000):
        metric.update(nll, len(nll))
    exact = math.fsum(tokens.tolist()) / len(tokens)
    assert metric.compute().dtype == torch.float64
    assert abs(float(metric.compute()) / exact - 1) < 1e-13
    assert float(metric.tokens) == 1_000_000


def test_an_all_but_impossible_token_gives_a_finite_value():
    """Probability exp(-120) underflows in float32; its logarithm does not."""
    metric = NegativeLogLikelihood()
    logits = torch.zeros(1000, 2)
    logits[0, 1] = 120
    target = torch.ones(1000, dtype=torch.int64)
    target[0] = 0
    nll = linear_cross_entropy(logits, torch.eye(2), target, reduction="none")
    assert torch.exp(-nll[0]) == 0
    metric.update(nll, 1000)
    torch.testing.assert_close(float(metric.compute()), (120 + 999 * math.log(2)) / 1000)
    assert metric.compute().exp().isfinite()


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_reset_forgets_everything():
    metric = NegativeLogLikelihood()
    metric.update(torch.tensor([100.0]), 1)
    metric.reset()
    assert metric.compute().isnan()
    metric.update(torch.tensor([3.0]), 1)
    assert metric.compute() == 3


def test_holds_no_graph():
    metric = NegativeLogLikelihood()
    metric.update(torch.ones(3, requires_grad=True) * 2, 3)
    assert not metric.compute().requires_grad


def _one_of_two(rank, folder):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    metric = NegativeLogLikelihood()
    for nll in batches()[rank::3]:  # two batches against one
        metric.update(nll, nll.numel())
    values = [metric.compute(), metric.compute()]
    metric.reset()
    metric.update(torch.full((1 + rank,), float(rank)), 1 + rank)
    torch.save([*values, metric.compute()], f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    multiprocessing.spawn(_one_of_two, (str(tmp_path),), nprocs=2)
    one = NegativeLogLikelihood()
    for nll in (batches()[0], batches()[3], batches()[1]):
        one.update(nll, nll.numel())
    for rank in range(2):
        first, again, after_reset = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(first, one.compute())
        assert first == again
        torch.testing.assert_close(float(after_reset), 2 / 3)


@pytest.mark.parametrize("cast", [lambda m: m.to(dtype=torch.bfloat16), lambda m: m.half(), lambda m: m.float()])
def test_sums_keep_their_precision_when_the_model_is_cast(cast):
    model = torch.nn.ModuleDict({"nll": NegativeLogLikelihood()})
    metric = cast(model)["nll"]
    metric.reset()
    for _ in range(2000):
        metric.update(torch.full((35,), 4.6, dtype=torch.bfloat16), 35)
    assert metric.compute().dtype == torch.float64
    assert metric.compute().item() == pytest.approx(torch.tensor(4.6, dtype=torch.bfloat16).item(), rel=1e-12)
