"""The loss of few rows by tiles of the vocabulary, products and all: what a library's products do for the others."""

import shutil

import pytest
import torch
from references import FORMULAS, log_probabilities
from test_losses_compiled import COMPILER, of

from lit_sigsoftmax.functional import linear_cross_entropy
from lit_sigsoftmax.losses import compiled, sizes, sweeps
from lit_sigsoftmax.losses.compiled import serves_tiles, tiled_losses_and_gradients

pytestmark = pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"needs a C++ compiler: no {COMPILER}")
every_activation = pytest.mark.parametrize("name", FORMULAS)


def layer(n, size, vocab_size, dtype=torch.float32, weight_dtype=None):
    """Targets have positive logits: relu's loss of one near zero has few digits in float32."""
    generator = torch.Generator().manual_seed(n)
    hidden = torch.randn(n, size, generator=generator)
    weight = torch.randn(vocab_size, size, generator=generator) * 2 / size**0.5
    bias = torch.randn(vocab_size, generator=generator)
    ranks = torch.randint(vocab_size // 4, (n, 1), generator=generator)
    target = (hidden @ weight.t() + bias).argsort(descending=True).gather(1, ranks).squeeze(1)
    return [hidden.to(dtype), weight.to(weight_dtype or dtype), bias.to(weight_dtype or dtype)], target


@pytest.fixture(autouse=True, params=["compiled", "program"])
def calls(request, monkeypatch):
    """Chunks of few rows whatever the vocabulary, and how often the tiles were asked."""
    seen = []
    if request.param == "program":
        monkeypatch.setattr(compiled, "serves", lambda name: False)

    def count(*args, **kwargs):
        seen.append(kwargs["chunk"])
        return tiled_losses_and_gradients(*args, **kwargs)

    monkeypatch.setattr(sizes, "_LEAST", 1)
    monkeypatch.setattr(sweeps, "bfloat16_pays", lambda: False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(compiled, "tiled_losses_and_gradients", count)
    return seen


def losses_and_gradients(inputs, target, weights=None, backend="chunked", **kwargs):
    if backend == "reference":
        inputs = [x.detach().double() for x in inputs]
    given = [x.detach().clone().requires_grad_() for x in inputs]
    hidden, weight, *bias = given
    loss = linear_cross_entropy(hidden, weight, target, *bias, reduction="none", backend=backend, **kwargs)
    total = loss.sum() if weights is None else (loss * weights).sum()
    return loss.detach(), torch.autograd.grad(total, given)


def check(inputs, target, weights=None, **kwargs):
    found, gradients = losses_and_gradients(inputs, target, weights, **kwargs)
    expected, exact = losses_and_gradients(inputs, target, weights, backend="reference", **kwargs)
    torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=2e-5)
    for gradient, reference in zip(gradients, exact, strict=True):
        torch.testing.assert_close(gradient.double(), reference, rtol=2e-5, atol=2e-5)


@every_activation
@pytest.mark.parametrize("n", [1, 15, 16, 17, 32, 90])
@pytest.mark.parametrize("size", [16, 80, 81, 96, 200])
def test_agrees_with_the_reference(name, n, size, calls):
    check(*layer(n, size, vocab_size=800), activation=name)
    assert calls
    assert max(calls) <= 48


@every_activation
@pytest.mark.parametrize("vocab_size", [400, 421, 59 * 8, 60 * 8, 60 * 8 + 1])
def test_any_vocabulary(name, vocab_size, calls):
    inputs, target = layer(40, 96, vocab_size)
    target[3] = target[-1] = -100
    check(inputs, target, activation=name)
    check(inputs[:2], target, activation=name)  # without a bias
    assert calls


@every_activation
def test_tokens_of_unequal_weight(name, calls):
    inputs, target = layer(90, 96, 400)
    target[5] = -100
    check(inputs, target, torch.linspace(-1, 2, 90), activation=name)
    assert len(calls) == 2  # backward makes them anew


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (1, 2)])
def test_frozen_inputs(frozen, calls):
    inputs, target = layer(40, 96, 400)
    _, exact = losses_and_gradients(inputs, target, backend="reference", activation="sigsoftmax")
    hidden, weight, bias = (x.requires_grad_(i not in frozen) for i, x in enumerate(inputs))
    linear_cross_entropy(hidden, weight, target, bias, activation="sigsoftmax", reduction="sum").backward()
    for x, reference in zip(inputs, exact, strict=True):
        if x.requires_grad:
            torch.testing.assert_close(x.grad.double(), reference, rtol=2e-5, atol=2e-5)
        else:
            assert x.grad is None
    assert calls


@every_activation
@pytest.mark.parametrize("level", [-1e4, -300.0, -70.0, 0.0, 90.0, 1e4])
def test_extreme_logits(name, level, calls):
    """Rows whose logits are all far from zero, beside one that is not."""
    logits = torch.full((3, 96), level - 3e3)
    logits[:, :3] = torch.tensor([[level, level + 1, level - 2], [0.0, 1.0, -1.0], [level - 3e3, level, level - 200]])
    logits[1, 3:] = -1.0
    target = torch.tensor([1, 0, 0])
    hidden, weight = logits.requires_grad_(), torch.eye(96, requires_grad=True)
    bias = torch.zeros(400).requires_grad_()
    padded = torch.cat([weight, torch.zeros(304, 96)])
    masked = torch.cat([bias[:96], torch.full((304,), -torch.inf)])  # types that cannot be
    loss = linear_cross_entropy(hidden, padded, target, masked, activation=name, reduction="none")
    assert calls
    if name != "relu":  # whose floor gives masked types some probability
        exact = [float(-log_probabilities(r, FORMULAS[name])[t]) for r, t in zip(logits.tolist(), target, strict=True)]
        torch.testing.assert_close(loss.double(), torch.tensor(exact).double(), rtol=2e-6, atol=2e-6)
    loss.sum().backward()
    for x in (hidden, weight, bias):
        assert x.grad.isfinite().all()


@every_activation
@pytest.mark.parametrize("place", ["hidden", "weight"])
def test_nan_is_not_hidden(name, place, calls):
    inputs, target = layer(20, 96, 400)
    inputs[0 if place == "hidden" else 1][7, 11] = torch.nan
    loss, gradients = losses_and_gradients(inputs, target, activation=name)
    assert loss.isnan().nonzero().flatten().tolist() == ([7] if place == "hidden" else list(range(20)))
    assert all(gradient.isnan().any() for gradient in gradients)
    assert calls


@every_activation
@pytest.mark.parametrize(
    ("dtype", "weight_dtype", "autocast"),
    [
        (torch.bfloat16, torch.bfloat16, False),
        (torch.float32, torch.float32, True),
        (torch.bfloat16, torch.float32, True),
        (torch.float32, torch.bfloat16, True),
    ],
)
def test_bfloat16_products_round_their_factors_alone(name, dtype, weight_dtype, autocast, calls):
    inputs, target = layer(90, 96, 400, dtype, weight_dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss, gradients = losses_and_gradients(inputs, target, activation=name)
    assert calls
    assert loss.dtype == torch.float32
    rounded = [x.bfloat16().float() for x in inputs]
    expected, exact = losses_and_gradients(rounded, target, backend="reference", activation=name)
    torch.testing.assert_close(loss.double(), expected, rtol=2e-5, atol=2e-5)
    for gradient, x, reference in zip(gradients, inputs, exact, strict=True):
        assert gradient.dtype == x.dtype
        tolerance = 2e-5 if x.dtype == torch.float32 else 2**-8  # their own rounding
        torch.testing.assert_close(gradient.double(), reference, rtol=tolerance, atol=tolerance)


def test_where_bfloat16_pays_sweeps_go_first(calls, monkeypatch):
    monkeypatch.setattr(sweeps, "bfloat16_pays", lambda: True)
    inputs, target = layer(90, 96, 400)
    with torch.autocast("cpu", torch.bfloat16):
        losses_and_gradients(inputs, target, activation="sigsoftmax")
    assert not calls
    losses_and_gradients(inputs, target, activation="sigsoftmax")  # in float32 they do not
    assert calls


def test_rounding_is_torchs():
    """Ties, subnormals, infinities: the loss of each must be what torch's own rounding gives."""
    bits = torch.tensor([0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F808001, 0x00000001, 0x00008000, 0x00018000])
    numbers = torch.cat([bits.int().view(torch.float32), -bits.int().view(torch.float32)])
    weight = torch.zeros(400, 96)
    weight[: len(numbers), 0] = numbers
    hidden = torch.zeros(16, 96)
    hidden[:, 0] = 1.0
    target = torch.arange(16) % len(numbers)
    kwargs = {"row_weight": torch.ones(16), "evaluator": of("softmax"), "chunk": 16, "wanted": [True, True, False]}
    nll, (of_hidden, _, _) = tiled_losses_and_gradients(hidden, weight, None, target, rounded=True, **kwargs)
    as_torch, (expected, _, _) = tiled_losses_and_gradients(
        hidden, weight.bfloat16(), None, target, rounded=False, **kwargs
    )
    assert torch.equal(nll, as_torch)
    assert torch.equal(of_hidden, expected)


def test_chunks_of_any_size():
    (hidden, weight, bias), target = layer(300, 96, 400)
    found = [
        tiled_losses_and_gradients(
            *(hidden, weight, bias, target, torch.ones(300), of("sigsoftmax")),
            rounded=False,
            chunk=chunk,
            wanted=[True] * 3,
        )
        for chunk in (16, 128, 304)
    ]
    for nll, gradients in found[1:]:
        torch.testing.assert_close(nll, found[0][0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(gradients, found[0][1], rtol=1e-5, atol=1e-5)


def test_threads_agree(monkeypatch):
    inputs, target = layer(90, 96, 1000)
    found = []
    for threads in (1, 2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found += [losses_and_gradients(inputs, target, activation="sigsoftmax") for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(found[-1][1], found[-2][1], strict=True))  # the same bits again
    for loss, gradients in found[1:]:
        torch.testing.assert_close(loss, found[0][0], rtol=1e-6, atol=1e-6)
        for gradient, other in zip(gradients, found[0][1], strict=True):
            torch.testing.assert_close(gradient, other, rtol=1e-5, atol=1e-5)


def test_no_rows(calls):
    inputs, target = layer(0, 96, 400)
    loss, gradients = losses_and_gradients(inputs, target, activation="sigsoftmax")
    assert loss.shape == (0,)
    assert not any(gradient.any() for gradient in gradients)


def test_any_strides(calls):
    (hidden, weight, bias), target = layer(40, 96, 400)
    check([hidden.t().contiguous().t(), weight, bias.repeat(2)[::2]], target.repeat(2)[::2], activation="sigsoftmax")
    assert calls


@pytest.mark.parametrize(
    ("hidden", "weight", "dtype", "served"),
    [
        (torch.zeros(1, 96), torch.zeros(5, 96), torch.float32, True),
        (torch.zeros(1, 96), torch.zeros(5, 96), torch.bfloat16, True),
        (torch.zeros(1, 96), torch.zeros(5, 96), torch.float16, False),
        (torch.zeros(1, 96).double(), torch.zeros(5, 96), torch.float64, False),
        (torch.zeros(1, 96), torch.zeros(96, 5).t(), torch.float32, False),
        (torch.zeros(1, 5), torch.zeros(5, 5), torch.float32, False),
        (torch.zeros(1, 0), torch.zeros(5, 0), torch.float32, False),
    ],
)
def test_what_is_served(hidden, weight, dtype, served):
    assert serves_tiles(hidden, weight, dtype) == served


@pytest.mark.parametrize(
    ("n", "size", "vocab_size", "threads", "tiled"),
    [
        (700, 200, 10_000, 2, True),
        (1400, 400, 10_000, 2, False),  # chunks for which a library is faster
        (700, 200, 33_278, 2, False),
        (700, 1024, 10_000, 2, False),
        (700, 200, 10_000, 64, False),  # whose sums would be larger than the logits
    ],
)
def test_when_tiles_are_taken(n, size, vocab_size, threads, tiled, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert bool(sizes.of_tiles(n, torch.empty(vocab_size, size), in_half=False)) == tiled


@pytest.mark.parametrize("n", [700, 760, 816])
@pytest.mark.parametrize(("size", "vocab_size", "threads"), [(200, 10_000, 2), (200, 10_000, 8), (256, 8_192, 4)])
def test_a_chunk_holds_an_eighth_of_the_logits(n, size, vocab_size, threads, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    rows = sizes.of_tiles(n, torch.empty(vocab_size, size), in_half=False)
    assert rows
    held = rows * (vocab_size + size + threads * size)  # logits, rows, and each thread's gradient of them
    assert held <= n * vocab_size / 8


def test_penalties_and_mixtures_go_another_way(calls):
    inputs, target = layer(40, 96, 400)
    check(inputs, target, activation="sigsoftmax", z_loss=0.1)
    hidden, weight, bias = inputs
    mixed = hidden.unsqueeze(1).requires_grad_()
    linear_cross_entropy(mixed, weight, target, bias, log_prior=torch.zeros(40, 1), activation="sigsoftmax").backward()
    assert not calls
