"""The loss in bfloat16 by two sweeps over the vocabulary, each in bands of it."""

from itertools import pairwise

import pytest
import torch
from references import FORMULAS
from test_losses_compiled import LOGITS, draw, exact, needs_compiler
from torch.nn import functional as F

from lit_sigsoftmax.activations import get_activation
from lit_sigsoftmax.functional import linear_cross_entropy
from lit_sigsoftmax.losses import chunks, closed_forms, compiled, gemm, sizes, sweeps

every_activation = pytest.mark.parametrize("name", FORMULAS)


@pytest.fixture(
    params=[
        pytest.param("compiled", marks=needs_compiler),
        pytest.param("program", marks=needs_compiler),
        "closed form",
        "derivative",
    ]
)
def bands(request, monkeypatch):
    """Bands of 32 types of up to 64 rows, in blocks of 20, and how many there were."""
    seen = []
    module = compiled if request.param in ("compiled", "program") else closed_forms

    class Counted(module.Bands):
        def add(self, logits, first):
            seen.append(first)
            super().add(logits, first)

    monkeypatch.setattr(module, "Bands", Counted)
    if request.param == "derivative":
        monkeypatch.setattr(closed_forms, "_CLOSED_FORMS", {})
    if request.param != "compiled":
        monkeypatch.setattr(compiled, "serves", lambda name: False)
    if module is closed_forms:
        monkeypatch.setattr(compiled, "evaluator", lambda *activation: None)
    monkeypatch.setattr(closed_forms, "_BLOCK_OF_BAND", 20 * 32)
    monkeypatch.setattr(sweeps, "_types", lambda *shape: 32)
    monkeypatch.setattr(sweeps, "ROWS", 64)
    monkeypatch.setattr(sweeps, "bfloat16_pays", lambda: True)
    return seen


def by_bands(logits, target, name, edges, row_weight=None):
    """The losses of bfloat16 logits, and the derivatives, as they come in bands between the edges."""
    evaluator = compiled.evaluator(get_activation(name), 10, True)
    rows = compiled.Bands(target, evaluator) if evaluator else closed_forms.Bands(target, get_activation(name))
    for start, end in pairwise(edges):
        rows.add(logits[:, start:end].contiguous(), start)
    losses = rows.losses()
    derivative = torch.empty_like(logits)
    for start, end in pairwise(edges):
        band = logits[:, start:end].clone(memory_format=torch.contiguous_format)
        rows.differentiate(band, start, torch.ones(len(target)) if row_weight is None else row_weight)
        derivative[:, start:end] = band
    return losses, derivative


@every_activation
@pytest.mark.parametrize("edges", [[0, 1100], [0, 2, 33, 700, 1100], [0, 1050, 1100]])
@pytest.mark.parametrize("kind", LOGITS)
def test_bands_are_the_whole_rounded(kind, edges, name, bands):
    noise, target = draw(5, 1100)
    logits = LOGITS[kind](noise).bfloat16()
    if kind == "masked":  # whole bands
        logits[:, : edges[1] if len(edges) > 2 else 1000] = -torch.inf
        target = target.clamp(min=1050)
    logits.scatter_(1, target[:, None], logits.gather(1, target[:, None]).nan_to_num(neginf=0.0))
    expected, gradient = exact(logits, target, name)
    nll, derivative = by_bands(logits, target, name, edges)
    if nll is None:  # the closed form takes no such numbers
        assert compiled.evaluator(get_activation(name), 10, True) is None
        assert logits[logits.isfinite()].abs().max() > 55
        return
    if kind == "masked":  # autograd has 0 / 0 there
        gradient = gradient.nan_to_num(0.0)
    torch.testing.assert_close(nll.double(), expected, rtol=3e-7, atol=1e-6)
    torch.testing.assert_close(derivative.double(), gradient, rtol=2**-8, atol=1e-6)


@every_activation
def test_rows_are_weighted(name, bands):
    logits, target = draw(5, 100)
    weight = torch.tensor([1.0, 0.0, -2.0, 0.5, 1e6])
    (_, plain), (_, found) = (by_bands(logits.bfloat16(), target, name, [0, 60, 100], w) for w in (None, weight))
    torch.testing.assert_close(found.float(), plain.float() * weight[:, None], rtol=2**-7, atol=0)


@every_activation
@pytest.mark.parametrize("place", [0, 7, 90])
def test_nan_is_not_hidden(place, name, bands):
    logits, target = draw(2, 100)
    logits[1, place] = torch.nan
    nll, derivative = by_bands(logits.bfloat16(), target, name, [0, 60, 100])
    if not compiled.serves(name):
        assert nll is None
        return
    assert nll.isnan().tolist() == [False, True]
    assert derivative.isnan().any(1).tolist() == [False, True]


def test_rounding_is_torchs(bands):
    """Ties, overflow, subnormals and signs: the derivative of a softmax that is certain and wrong is its weight."""
    bits = torch.tensor([0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F808001, 0x00018000, 0x7F7FFFFF], dtype=torch.int32)
    weights = torch.cat([bits.view(torch.float32), -bits.view(torch.float32)])
    logits = torch.tensor([[0.0, -torch.inf]]).expand(len(weights), 2).bfloat16()
    target = torch.ones(len(weights), dtype=torch.int64)
    _, derivative = by_bands(logits, target, "softmax", [0, 1, 2], weights)
    assert torch.equal(derivative[:, 0], weights.bfloat16())


def layer(n, size, vocab_size, experts=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, experts, size, generator=generator)
    weight = torch.randn(vocab_size, size, generator=generator) * 2 / size**0.5
    bias, prior = torch.randn(vocab_size, generator=generator), torch.randn(n, experts, generator=generator)
    target = torch.randint(vocab_size, (n,), generator=generator)
    return [hidden.squeeze(1), weight, bias, *([prior.log_softmax(-1)] if experts > 1 else [])], target


def losses_and_gradients(inputs, target, weights=None, dtype=None, backend="chunked", frozen=(), **kwargs):
    given = [
        None if x is None else x.detach().to(dtype or x.dtype).clone().requires_grad_(i not in frozen)
        for i, x in enumerate(inputs)
    ]
    hidden, weight, bias, *prior = given
    kwargs |= {"log_prior": prior[0]} if prior else {}
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is None):
        loss = linear_cross_entropy(hidden, weight, target, bias, reduction="none", backend=backend, **kwargs)
        (loss.sum() if weights is None else (loss * weights).sum()).backward()
    return loss.detach(), [x.grad for x in given if x is not None]


def check(inputs, target, weights=None, dtype=None, **kwargs):
    """As near to the exact loss of exact numbers as the plain one in bfloat16, with a tolerance."""
    found = losses_and_gradients(inputs, target, weights, dtype, **kwargs)
    naive = losses_and_gradients(inputs, target, weights, dtype, backend="reference", **kwargs)
    exact = losses_and_gradients(inputs, target, weights, torch.float64, backend="reference", **kwargs)
    assert found[0].dtype == torch.float32
    for ours, theirs, true in zip((found[0], *found[1]), (naive[0], *naive[1]), (exact[0], *exact[1]), strict=True):
        if true is None:
            assert ours is None
            continue
        ours_off, theirs_off = ((x.double() - true).norm() / true.norm().clamp(min=1e-9) for x in (ours, theirs))
        assert ours_off <= theirs_off + 2**-9


@every_activation
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize(("n", "vocab_size"), [(1, 5), (37, 32), (37, 33), (300, 100)])
def test_is_no_worse_than_plain(n, vocab_size, dtype, name, bands):
    inputs, target = layer(n, 24, vocab_size)
    check(inputs, target, dtype=dtype, activation=name)
    assert bands == -(-n // 64) * list(range(0, vocab_size, 32))


@every_activation
def test_a_mixture(name, bands):
    inputs, target = layer(40, 24, 100, experts=3)
    target[3] = -100
    check(inputs, target, activation=name)
    assert len(bands) == 2 * 4
    check(inputs, target, activation=name, frozen=(3,))


@every_activation
def test_tokens_of_unequal_weight(name, bands):
    inputs, target = layer(90, 24, 100)
    target[5] = -100
    check(inputs, target, torch.linspace(-1, 2, 90), activation=name)
    assert len(bands) == 2 * 2 * 4  # backward makes them anew


@pytest.mark.parametrize(
    ("name", "factor"), [("softmax", 500), ("sigsoftmax", 500), *((name, torch.nan) for name in FORMULAS)]
)
def test_a_row_that_the_closed_form_does_not_take(name, factor, bands, monkeypatch):
    """The group before it has added to gradients already."""
    by_chunks = []
    again = chunks._by_chunks
    monkeypatch.setattr(chunks, "_by_chunks", lambda *args: by_chunks.append(args) or again(*args))
    inputs, target = layer(90, 24, 100)
    expected = losses_and_gradients(inputs, target, activation=name)[0]
    assert not by_chunks
    inputs[0][70] *= factor
    loss, gradients = losses_and_gradients(inputs, target, activation=name)
    without_a_maximum = compiled.evaluator(get_activation(name), 100, True) is None
    assert bool(by_chunks) == (without_a_maximum or (factor != 500 and not compiled.serves(name)))
    others = torch.arange(90) != 70
    torch.testing.assert_close(loss[others], expected[others])
    if factor == 500:
        check(inputs, target, activation=name)
    else:
        assert loss[70].isnan()
        assert gradients[0][70].isnan().any()  # torch 2.13's bfloat16 product may take a neighbour with it
    assert bands


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
def test_frozen_tensors(frozen, bands):
    inputs, target = layer(40, 24, 100)
    check(inputs, target, activation="sigsoftmax", frozen=frozen)
    assert bands


def test_without_a_bias(bands):
    (hidden, weight, bias), target = layer(40, 24, 100)
    expected = losses_and_gradients([hidden, weight, bias * 0], target, activation="sigsoftmax")
    found = losses_and_gradients([hidden, weight, None], target, activation="sigsoftmax")
    assert torch.equal(found[0], expected[0])
    assert all(torch.equal(a, b) for a, b in zip(found[1], expected[1][:2], strict=True))
    assert bands


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_bias_of_another_dtype(dtype, bands):
    (hidden, weight, bias), target = layer(40, 24, 100)
    found = losses_and_gradients([hidden, weight, bias.to(dtype)], target, activation="sigsoftmax")
    expected = losses_and_gradients([hidden, weight, bias], target, activation="sigsoftmax")
    assert found[1][2].dtype == dtype
    torch.testing.assert_close(found[1][2].float(), expected[1][2], rtol=2**-8, atol=1e-6)
    assert torch.equal(found[0], expected[0])
    assert bands


def test_without_gradients_one_sweep_is_enough(bands, monkeypatch):
    inputs, target = layer(40, 24, 100)
    expected, _ = losses_and_gradients(inputs, target, activation="sigsoftmax")
    monkeypatch.setattr(compiled.Bands, "differentiate", None)
    monkeypatch.setattr(closed_forms.Bands, "differentiate", None)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        hidden, weight, bias = inputs
        loss = linear_cross_entropy(hidden, weight, target, bias, activation="sigsoftmax", reduction="none")
    assert torch.equal(loss, expected)


@pytest.mark.parametrize("experts", [1, 3])
def test_no_rows(experts, monkeypatch):
    monkeypatch.setattr(sweeps, "bfloat16_pays", lambda: True)
    inputs, target = layer(0, 24, 100, experts)
    loss, gradients = losses_and_gradients(inputs, target, activation="sigsoftmax")
    assert loss.shape == (0,)
    assert not any(gradient.any() for gradient in gradients)


def test_any_strides(bands):
    (hidden, weight, bias), target = layer(40, 24, 100)
    strided = [hidden.t().contiguous().t(), weight.t().contiguous().t(), bias.repeat_interleave(2)[::2]]
    found = losses_and_gradients(strided, target.repeat_interleave(2)[::2], activation="sigsoftmax")
    expected = losses_and_gradients([hidden, weight, bias], target, activation="sigsoftmax")
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("bands", [pytest.param("compiled", marks=needs_compiler)], indirect=True)
def test_threads_agree(bands, monkeypatch):
    inputs, target = layer(90, 24, 100)
    found = []
    for threads in (1, 2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.append(losses_and_gradients(inputs, target, activation="sigsoftmax"))
    for loss, gradients in found[1:]:
        assert torch.equal(loss, found[0][0])
        assert all(torch.equal(a, b) for a, b in zip(gradients, found[0][1], strict=True))


@pytest.mark.parametrize("kwargs", [{"z_loss": 0.1}, {"label_smoothing": 0.1}, {"activation": F.gelu}])
def test_penalties_and_other_activations_go_another_way(kwargs, bands):
    inputs, target = layer(40, 24, 100)
    check(inputs, target, **{"activation": "sigsoftmax", **kwargs})
    assert not bands


@pytest.mark.parametrize(
    ("n", "size", "vocab_size"), [(700, 200, 10_000), (1400, 400, 10_000), (1400, 400, 33_278), (2048, 768, 50_257)]
)
def test_what_is_held_is_an_eighth_of_the_logits(n, size, vocab_size):
    types = sweeps._types(n, size, vocab_size)
    band = 2 * types * (n + size + size)  # logits, weight, and its gradient
    rows = n * size * (2 + 2 + 4)  # hidden, and its gradient, of a band and in all
    assert band + rows <= 4 * n * vocab_size / 8
    hidden, without_a_compiler = 2 * n * size, 4 * 2 * closed_forms._BLOCK_OF_BAND  # two copies of a block in float32
    assert 2 * types * (n + size) + hidden + without_a_compiler <= 4 * n * vocab_size / 8


@pytest.mark.parametrize(
    ("rows", "size", "types"), [(1, 200, 10_000), (300, 200, 1536), (700, 1024, 1280), (2048, 200, 512)]
)
def test_few_rows_and_large_ones_make_wide_bands(rows, size, types):
    assert min(sweeps._types(rows, size, 10_000), 10_000) == types


@pytest.mark.parametrize(
    ("tokens", "experts", "lengths"),
    [(0, 3, []), (64, 1, [64]), (65, 1, [33, 32]), (5, 100, [1] * 5), (40, 3, [20, 20])],
)
def test_groups_are_nearly_equal(tokens, experts, lengths):
    assert [len(range(tokens)[group]) for group in sizes.groups(tokens, experts, 64)] == lengths


@pytest.fixture
def not_asked_yet():
    gemm.bfloat16_pays.cache_clear()
    yield
    gemm.bfloat16_pays.cache_clear()


def test_whether_bfloat16_pays_is_measured_once(not_asked_yet, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(gemm, "cache_dir", lambda: tmp_path)
    monkeypatch.setattr(gemm, "_measure", lambda ways: asked.append(list(ways)) or "bfloat16")
    for _ in range(2):
        gemm.bfloat16_pays.cache_clear()
        assert gemm.bfloat16_pays()
    assert asked == [["bfloat16", "float32"]]
