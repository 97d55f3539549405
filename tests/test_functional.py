import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from references import FORMULAS, KEEP_EVERY_TOKEN_POSSIBLE, error, log_probabilities, probabilities, sigsoftmax_jacobian
from torch import nn
from torch.nn import functional as F

from lit_sigsoftmax.activations import available_activations, get_activation
from lit_sigsoftmax.functional import linear_cross_entropy, log_normalize, log_sigsoftmax, sigsoftmax

WIDE, HALF = [torch.float64, torch.float32], [torch.float16, torch.bfloat16]
ULP = 3  # measured: 1.5

every_activation = pytest.mark.parametrize("name", available_activations())
every_backend = pytest.mark.parametrize("backend", ["auto", "reference", "chunked"])
examples = settings(deadline=None, max_examples=60, database=None, derandomize=True)


def rand(*shape, seed=0):
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


ROWS = {
    "wide": 1e4 * (2 * rand(50, 8) - 1),
    "ordinary": 3 * randn(50, 8),
    "clustered far out": 1e4 * (2 * rand(50, 1) - 1) + randn(50, 8),
    "clustered near zero": 40 * (2 * rand(50, 1) - 1) + randn(50, 8),
    "one far below": torch.cat([randn(50, 7), -1e4 * rand(50, 1)], dim=1),
    "long": 3 * randn(3, 1000),
}


# log_sigsoftmax and sigsoftmax: values


@pytest.mark.parametrize("dtype", WIDE + HALF)
@pytest.mark.parametrize("kind", ROWS)
def test_agrees_with_fifty_digits(kind, dtype):
    logits = ROWS[kind].to(dtype)
    assert error(log_sigsoftmax(logits), logits, FORMULAS["sigsoftmax"]) < ULP


@pytest.mark.parametrize("dtype", WIDE)
@given(data=st.data())
@examples
def test_agrees_with_fifty_digits_on_any_row(dtype, data):
    level = data.draw(st.floats(-1e4, 1e4))
    values = st.one_of(st.floats(-1e4, 1e4), st.floats(-30, 30), st.floats(-1, 1).map(lambda x: level + x))
    logits = torch.tensor([data.draw(st.lists(values, min_size=1, max_size=12))], dtype=dtype)
    assert error(log_sigsoftmax(logits), logits, FORMULAS["sigsoftmax"]) < ULP


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("kind", ROWS)
def test_half_precision_is_no_worse_than_naive(kind, dtype):
    logits = ROWS[kind].to(dtype)
    naive = F.log_softmax(logits + F.logsigmoid(logits), dim=-1)
    ours, theirs = (error(log_p, logits, FORMULAS["sigsoftmax"]) for log_p in (log_sigsoftmax(logits), naive))
    assert ours <= theirs + 0.05
    assert ours < 0.51  # the rounding of the result alone


@pytest.mark.parametrize(
    ("logits", "expected"),
    [
        ([1.0, 2.0, 3.0], torch.tensor([0.0719267, 0.2355637, 0.6925095], dtype=torch.float64).log()),
        ([-300.0, -200.0, -150.0], torch.tensor([-300.0, -100.0, 0.0], dtype=torch.float64)),
        ([0.0, 0.0], torch.tensor([0.5, 0.5], dtype=torch.float64).log()),
        ([7.0], torch.zeros(1, dtype=torch.float64)),
    ],
)
def test_pinned_vectors(logits, expected):
    logits = torch.tensor(logits, dtype=torch.float64)
    torch.testing.assert_close(log_sigsoftmax(logits), expected, atol=2e-7, rtol=0)
    torch.testing.assert_close(sigsoftmax(logits), expected.exp(), atol=1e-7, rtol=0)


@pytest.mark.parametrize("dtype", WIDE + HALF)
def test_finite_for_every_finite_input(dtype):
    limits = torch.finfo(dtype)
    values = [limits.max, limits.max / 2, 1e3, 1.0, limits.tiny, 0.0, -1.0, -1e3, limits.min / 2, limits.min]
    logits = torch.tensor(list(itertools.product(values, repeat=3)), dtype=dtype, requires_grad=True)
    log_p, p = log_sigsoftmax(logits), sigsoftmax(logits)
    assert log_p.dtype == p.dtype == dtype
    assert log_p.isfinite().all()
    assert (log_p <= 0).all()
    assert ((p.double().sum(-1) - 1).abs() <= 2 * limits.eps).all()
    for output in (log_p, p):
        (gradient,) = torch.autograd.grad(output[:, 0].double().sum(), logits)
        assert gradient.isfinite().all()


@pytest.mark.parametrize(("dtype", "width"), [(torch.float64, 64), (torch.float32, 32), (torch.float16, 16)])
@given(data=st.data())
@examples
def test_finite_on_any_row(dtype, width, data):
    values = st.floats(allow_nan=False, allow_infinity=False, width=width)
    logits = torch.tensor(data.draw(st.lists(values, min_size=1, max_size=8)), dtype=dtype)
    assert log_sigsoftmax(logits).isfinite().all()
    assert sigsoftmax(logits).isfinite().all()


@pytest.mark.parametrize("dim", [-3, -2, -1, 0, 1, 2])
def test_every_dim(dim):
    logits = randn(2, 3, 4)
    moved = logits.movedim(dim, -1)
    expected = probabilities(moved, get_activation("sigsoftmax")).movedim(-1, dim)
    torch.testing.assert_close(sigsoftmax(logits, dim), expected)
    torch.testing.assert_close(log_sigsoftmax(logits, dim=dim), expected.log())
    torch.testing.assert_close(log_normalize(logits, get_activation("sigsoftmax"), dim), expected.log())


@pytest.mark.parametrize("dtype", WIDE)
def test_agrees_with_the_registered_activation(dtype):
    logits = 3 * randn(20, 50).to(dtype)
    expected = log_normalize(logits, get_activation("sigsoftmax"))
    torch.testing.assert_close(log_sigsoftmax(logits), expected)
    torch.testing.assert_close(sigsoftmax(logits), expected.exp())


@pytest.mark.parametrize("dtype", WIDE + HALF)
def test_minus_infinity_masks(dtype):
    """Values and gradients of the other entries are those of the shorter vector."""
    full = torch.tensor([[1.0, -torch.inf, -2.0, 0.0], [-torch.inf, 3.0, -torch.inf, -90.0]], dtype=dtype)
    for row in full:
        entries = row.isfinite()
        short, long = row[entries].requires_grad_(), row.clone().requires_grad_()
        expected, log_p = log_sigsoftmax(short), log_sigsoftmax(long)
        expected[0].backward()
        log_p[entries][0].backward()
        assert torch.equal(log_p[entries], expected)
        assert (log_p[~entries] == -torch.inf).all()
        assert (sigsoftmax(row)[~entries] == 0).all()
        assert torch.equal(long.grad[entries], short.grad)
        assert (long.grad[~entries] == 0).all()


# log_sigsoftmax and sigsoftmax: what they are and are not


def test_is_not_softmax():
    logits = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    assert (sigsoftmax(logits) - logits.softmax(-1)).abs().max() > 0.027


def test_depends_on_the_level_of_the_logits():
    """From softmax(2z) far below zero to softmax(z) far above."""
    logits = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    for sign, limit in ((1, logits.softmax(-1)), (-1, (2 * logits).softmax(-1))):
        distance = [float((sigsoftmax(logits + sign * k) - limit).abs().max()) for k in (0, 2, 5, 10, 20)]
        assert distance == sorted(distance, reverse=True)
        assert distance[0] > 0.02
        assert distance[3] > 1e-7
        assert distance[4] < 1e-8


# log_sigsoftmax and sigsoftmax: derivatives

ROWS_TO_DERIVE = [[1.0, 2.0, 3.0], [-5.0, 0.3, 20.0, -0.2], [0.0, 0.0, 0.0], [0.0, -2.0, 1.0], [-50.0, -49.0]]


@pytest.mark.parametrize("row", ROWS_TO_DERIVE)
def test_gradient_formula_of_the_paper(row):
    logits = torch.tensor(row, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(log_sigsoftmax, logits)
    torch.testing.assert_close(jacobian, sigsoftmax_jacobian(logits), atol=1e-14, rtol=0)


@pytest.mark.parametrize("row", ROWS_TO_DERIVE)
def test_second_derivatives(row):
    logits = torch.tensor(row, dtype=torch.float64)
    for i in range(len(row)):
        hessian = torch.autograd.functional.hessian(lambda z, i=i: log_sigsoftmax(z)[i], logits)
        expected = torch.autograd.functional.jacobian(lambda z, i=i: sigsoftmax_jacobian(z)[i], logits)
        torch.testing.assert_close(hessian, expected, atol=1e-13, rtol=0)


@pytest.mark.parametrize("function", [log_sigsoftmax, sigsoftmax])
def test_gradcheck(function):
    logits = (4 * randn(3, 5)).requires_grad_()
    for dim in (0, 1):
        assert torch.autograd.gradcheck(lambda z, dim=dim: function(z, dim), logits)
        assert torch.autograd.gradgradcheck(lambda z, dim=dim: function(z, dim), logits)


@pytest.mark.parametrize("dtype", WIDE + HALF)
def test_a_logit_far_below_the_others_has_a_finite_gradient(dtype):
    logits = torch.tensor([5.0, -150.0, 1.0], dtype=dtype, requires_grad=True)
    log_sigsoftmax(logits)[0].backward()
    expected = sigsoftmax_jacobian(logits.detach().double())[0]
    torch.testing.assert_close(logits.grad.double(), expected, atol=2 * torch.finfo(dtype).eps, rtol=0)


# log_normalize


@every_activation
@pytest.mark.parametrize("dtype", WIDE + HALF)
def test_log_normalize(name, dtype):
    logits = (3 * randn(4, 5, 30)).to(dtype)
    log_g = get_activation(name)
    log_p = log_normalize(logits, log_g)
    assert log_p.dtype == (dtype if dtype in WIDE else torch.float32)
    torch.testing.assert_close(log_p.double(), probabilities(logits, log_g).log(), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(log_p.double().exp().sum(-1), torch.ones(4, 5).double(), atol=1e-6, rtol=0)


@every_activation
def test_log_normalize_is_accurate_far_from_zero(name):
    """Where exp(log_g(z)) overflows or vanishes."""
    logits = torch.tensor([[-800.0, -790.0, -900.0], [800.0, 790.0, 900.0]], dtype=torch.float64)
    log_g = get_activation(name)
    log_p = log_normalize(logits, log_g)
    if name in FORMULAS:
        exact = [[float(value) for value in log_probabilities(row, FORMULAS[name])] for row in logits.tolist()]
        torch.testing.assert_close(log_p, torch.tensor(exact, dtype=torch.float64))
    torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(2, dtype=torch.float64))


# linear_cross_entropy

HIDDEN, VOCAB = 4, 9
SHAPES = [(), (5,), (2, 3), (2, 1, 3)]


class Scale(nn.Module):
    """An output activation with a parameter."""

    def __init__(self):
        super().__init__()
        self.by = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    def forward(self, z):
        return self.by * z + F.logsigmoid(z)


def layer(*shape, seed=0):
    """Hidden, weight, bias and target; the logits are of size one and some targets are the first and last token."""
    hidden, weight, bias = randn(*shape, HIDDEN, seed=seed), randn(VOCAB, HIDDEN, seed=seed + 1), randn(VOCAB)
    target = torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))
    if target.numel() > 1:
        target.view(-1)[:2] = torch.tensor([0, VOCAB - 1])
    return hidden, weight, bias, target


def oracle(hidden, weight, target, bias, log_g):
    """The loss of every target, nats in float64."""
    logits = hidden.double() @ weight.double().T + (0 if bias is None else bias.double())
    return -probabilities(logits, log_g).gather(-1, target.unsqueeze(-1)).squeeze(-1).log()


@every_backend
@every_activation
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("has_bias", [True, False])
def test_loss_equals_the_oracle(name, backend, shape, has_bias):
    hidden, weight, bias, target = layer(*shape)
    bias = bias if has_bias else None
    expected = oracle(hidden, weight, target, bias, get_activation(name))
    for reduction, value in (("none", expected), ("sum", expected.sum()), ("mean", expected.mean())):
        loss = linear_cross_entropy(hidden, weight, target, bias, activation=name, reduction=reduction, backend=backend)
        torch.testing.assert_close(loss, value)
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, target, bias, activation=name), expected.mean())


@every_backend
@every_activation
@pytest.mark.parametrize("ignore_index", [-100, -1, 3])
def test_ignored_targets_cost_nothing_and_do_not_count(name, backend, ignore_index):
    hidden, weight, bias, target = layer(2, 6)
    target[0, 2] = target[1, 5] = ignore_index
    counted = target != ignore_index
    expected = oracle(hidden[counted], weight, target[counted], bias, get_activation(name))
    hidden.requires_grad_()
    kwargs = {"activation": name, "ignore_index": ignore_index, "backend": backend}
    loss = linear_cross_entropy(hidden, weight, target, bias, reduction="none", **kwargs)
    torch.testing.assert_close(loss[counted], expected)
    assert (loss[~counted] == 0).all()
    loss.sum().backward()
    assert (hidden.grad[~counted] == 0).all()
    assert (hidden.grad[counted] != 0).any(-1).all()
    for reduction, value in (("sum", expected.sum()), ("mean", expected.mean())):
        torch.testing.assert_close(
            linear_cross_entropy(hidden, weight, target, bias, reduction=reduction, **kwargs), value
        )


@every_backend
@every_activation
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_loss_gradients(name, backend, reduction):
    hidden, weight, bias, target = layer(2, 3)
    target[0, 1] = -100
    inputs = [x.requires_grad_() for x in (hidden, weight, bias)]

    def loss(hidden, weight, bias):
        return linear_cross_entropy(hidden, weight, target, bias, activation=name, reduction=reduction, backend=backend)

    assert torch.autograd.gradcheck(loss, inputs)
    if backend == "reference":
        assert torch.autograd.gradgradcheck(loss, inputs)


@every_backend
def test_loss_gradient_of_the_activations_own_parameter(backend):
    hidden, weight, bias, target = layer(5)
    scale = Scale()
    inputs = [x.requires_grad_() for x in (hidden, weight, bias)]

    def loss(hidden, weight, bias, _):  # gradcheck varies scale.by in place
        return linear_cross_entropy(hidden, weight, target, bias, activation=scale, backend=backend)

    assert torch.autograd.gradcheck(loss, (*inputs, scale.by))
    torch.testing.assert_close(loss(*inputs, None), oracle(hidden, weight, target, bias, scale).mean())


@every_backend
@pytest.mark.parametrize(
    "activation",
    [
        lambda z: z - z.square() / 50,
        nn.LogSigmoid(),
        nn.LogSigmoid,
        "torch.nn.functional.logsigmoid",
        {"class_path": "torch.nn.Hardtanh", "init_args": {"max_val": 0.5}},
    ],
    ids=["lambda", "module", "class", "path", "mapping"],
)
def test_loss_takes_any_specification(activation, backend):
    hidden, weight, bias, target = layer(5)
    loss = linear_cross_entropy(hidden, weight, target, bias, activation=activation, backend=backend)
    torch.testing.assert_close(loss, oracle(hidden, weight, target, bias, get_activation(activation)).mean())


@every_backend
def test_loss_is_of_softmax_by_default(backend):
    hidden, weight, bias, target = layer(5)
    loss = linear_cross_entropy(hidden, weight, target, bias, backend=backend)
    torch.testing.assert_close(loss, F.cross_entropy(hidden @ weight.T + bias, target))


@every_backend
@every_activation
@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_loss(name, backend, dtype):
    """Float32 nats, no less exact than a computation in half precision; gradients of the inputs' dtype."""
    hidden, weight, bias, target = (x.to(dtype) if x.is_floating_point() else x for x in layer(40))
    inputs = [x.requires_grad_() for x in (hidden, weight, bias)]
    loss = linear_cross_entropy(hidden, weight, target, bias, activation=name, reduction="none", backend=backend)
    assert loss.dtype == torch.float32
    log_g = get_activation(name)
    expected = oracle(hidden, weight, target, bias, log_g)
    naive = F.nll_loss(F.log_softmax(log_g(F.linear(hidden, weight, bias)), dim=-1), target, reduction="none")
    assert (loss - expected).abs().mean() <= (naive - expected).abs().mean() + 1e-6
    loss.sum().backward()
    for x in inputs:
        assert x.grad.dtype == dtype
        assert x.grad.isfinite().all()
        assert (x.grad != 0).any()


@every_backend
@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("dtype", WIDE)
def test_loss_at_large_logits(name, dtype, backend):
    logits = torch.tensor([[-1e4, 0.0, 1e4, 30.0, -100.0]], dtype=dtype)
    weight = torch.eye(5, dtype=dtype)
    exact = log_probabilities(logits[0].tolist(), FORMULAS[name])
    for target, log_p in enumerate(exact):
        hidden = logits.clone().requires_grad_()
        loss = linear_cross_entropy(hidden, weight, torch.tensor([target]), activation=name, backend=backend)
        torch.testing.assert_close(loss, torch.tensor(-float(log_p), dtype=dtype))
        loss.backward()
        assert hidden.grad.isfinite().all()


@every_backend
@every_activation
def test_minus_infinity_in_the_bias_masks_a_token(name, backend):
    """Loss and gradients of the other tokens are those of the smaller vocabulary."""
    hidden, weight, bias, _ = layer(5)
    target = torch.arange(5)
    bias[5] = -torch.inf
    kept = bias.isfinite()
    inputs = [hidden, weight, bias]
    shorter = [hidden.clone(), weight[kept], bias[kept]]
    loss, expected = (
        linear_cross_entropy(h, w, target, b, activation=name, backend=backend)
        for h, w, b in ((x.requires_grad_() for x in arrays) for arrays in (inputs, shorter))
    )
    if name in KEEP_EVERY_TOKEN_POSSIBLE:
        assert loss > expected
        return
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(hidden.grad, shorter[0].grad)
    torch.testing.assert_close(weight.grad[kept], shorter[1].grad)
    torch.testing.assert_close(bias.grad[kept], shorter[2].grad)
    assert (weight.grad[~kept] == 0).all()
    assert (bias.grad[~kept] == 0).all()


@every_backend
def test_loss_of_no_tokens(backend):
    hidden, weight, bias, target = layer(0)
    assert linear_cross_entropy(hidden, weight, target, bias, reduction="none", backend=backend).shape == (0,)
    assert linear_cross_entropy(hidden, weight, target, bias, reduction="sum", backend=backend) == 0


@every_backend
@pytest.mark.parametrize(
    ("shapes", "named"),
    [
        (((5, 4), (9, 3), (5,), None), r"\(5, 4\).*\(9, 3\)"),
        (((5, 4), (9, 4), (6,), None), r"\(5, 4\).*\(6,\)"),
        (((2, 3, 4), (9, 4), (6,), None), r"\(2, 3, 4\).*\(6,\)"),
        (((5, 4), (4,), (5,), None), r"\(4,\)"),
        (((5, 4), (2, 9, 4), (5,), None), r"\(2, 9, 4\)"),
        (((), (9, 4), (), None), r"\(\)"),
        (((5, 4), (9, 4), (5,), (8,)), r"bias.*\(8,\)"),
        (((5, 4), (9, 4), (5,), (1,)), r"bias.*\(1,\)"),
    ],
)
def test_shapes_that_do_not_fit(shapes, named, backend):
    hidden, weight, target, bias = shapes
    with pytest.raises(ValueError, match=named):
        linear_cross_entropy(
            torch.zeros(hidden),
            torch.zeros(weight),
            torch.zeros(target, dtype=torch.int64),
            None if bias is None else torch.zeros(bias),
            backend=backend,
        )


def test_unknown_reduction_and_backend():
    hidden, weight, bias, target = layer(5)
    with pytest.raises(ValueError, match="'mean', 'sum' or 'none', not 'average'"):
        linear_cross_entropy(hidden, weight, target, bias, reduction="average")
    with pytest.raises(ValueError, match=r"unknown loss backend 'fast'.*'auto'.*reference"):
        linear_cross_entropy(hidden, weight, target, bias, backend="fast")
    with pytest.raises(ValueError, match=r"unknown output activation 'sofmax'.*'softmax'"):
        linear_cross_entropy(hidden, weight, target, bias, activation="sofmax")
    with pytest.raises(TypeError, match="not 'sigsoftmax': an activation is given by its keyword"):
        linear_cross_entropy(hidden, weight, target, "sigsoftmax")


@pytest.mark.parametrize("penalty", [{"label_smoothing": 1.5}, {"z_loss": -1.0}, {"z_loss": float("nan")}])
def test_penalties_out_of_their_range(penalty):
    hidden, weight, bias, target = layer(5)
    with pytest.raises(ValueError, match=r"label_smoothing is in \[0, 1\] and z_loss a weight of 0 or more"):
        linear_cross_entropy(hidden, weight, target, bias, **penalty)
