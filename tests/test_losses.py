"""The loss in chunks: what test_functional.py and test_heads.py, whose layers fit one chunk, cannot show."""

import subprocess
import sys
import textwrap
import warnings
import weakref
from functools import partial

import pytest
import torch
from fork_helpers import free_port
from references import FORMULAS, log_probabilities
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lit_sigsoftmax import OutputHead
from lit_sigsoftmax.activations import available_activations, derivative_of, get_activation
from lit_sigsoftmax.functional import linear_cross_entropy
from lit_sigsoftmax.losses import chunks, closed_forms, compiled, gemm, sizes, sweeps
from lit_sigsoftmax.losses.pointwise import Penalty, general

N, HIDDEN, VOCAB = 90, 6, 40
WAYS = ["compiled", "program", "closed form", "derivative", "general"]

every_activation = pytest.mark.parametrize("name", available_activations())


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of 32 rows, the last one shorter."""
    monkeypatch.setattr(sizes, "_LEAST", 1)
    monkeypatch.setattr(sizes, "_ROWS", 32)


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """Each way from logits to losses, on the activations that it serves; the general one otherwise."""

    def choose(layer, weight, held, evaluator):
        if evaluator:
            return "compiled"
        if request.param == "closed form" and chunks.shares_exponentials(layer.log_g):
            return "closed form"
        if request.param == "derivative" and chunks.has_closed_form(layer.log_g):
            return "derivative"
        return "general"

    if request.param == "derivative":
        monkeypatch.setattr(closed_forms, "_CLOSED_FORMS", {})
    if request.param == "program":
        monkeypatch.setattr(compiled, "serves", lambda name: False)
    if request.param not in ("compiled", "program"):
        monkeypatch.setattr(compiled, "evaluator", lambda *activation: None)
    monkeypatch.setattr(chunks, "_way", choose)
    monkeypatch.setattr(sweeps, "serves", lambda *layer: False)
    return request.param


def layer(dtype=torch.float64, n=N, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    hidden = scale * torch.randn(n, HIDDEN, dtype=torch.float64, generator=generator)
    weight = torch.randn(VOCAB, HIDDEN, dtype=torch.float64, generator=generator)
    bias = torch.randn(VOCAB, dtype=torch.float64, generator=generator)
    target = torch.randint(VOCAB, (n,), generator=generator)
    target[3] = target[n - 1] = -100
    return [x.to(dtype).requires_grad_() for x in (hidden, weight, bias)], target


def mixture(dtype=torch.float64, experts=3):
    (_, weight, bias), target = layer(dtype)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(N, experts, HIDDEN, dtype=torch.float64, generator=generator).to(dtype)
    log_prior = torch.randn(N, experts, dtype=torch.float64, generator=generator).log_softmax(-1).to(dtype)
    return [hidden.requires_grad_(), weight, bias, log_prior.requires_grad_()], target


def loss_and_gradients(inputs, target, backend, weights=None, **kwargs):
    """The loss, weighted over tokens, and its gradients; in float64 for the reference."""
    names = ("hidden", "weight", "bias", "log_prior")
    if backend == "reference":
        inputs = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
    given = dict(zip(names, inputs, strict=False))
    loss = linear_cross_entropy(target=target, reduction="none", backend=backend, **given, **kwargs)
    total = loss.sum() if weights is None else (loss * weights).sum()
    return loss, torch.autograd.grad(total, [x for x in inputs if x.requires_grad])


def check(inputs, target, weights=None, **kwargs):
    loss, gradients = loss_and_gradients(inputs, target, "chunked", weights, **kwargs)
    expected, exact = loss_and_gradients(inputs, target, "reference", weights, **kwargs)
    tolerance = {"rtol": 1e-10, "atol": 1e-12} if inputs[0].dtype == torch.float64 else {"rtol": 2e-5, "atol": 2e-5}
    torch.testing.assert_close(loss.double(), expected, **tolerance)
    for gradient, reference in zip(gradients, exact, strict=True):
        torch.testing.assert_close(gradient.double(), reference, **tolerance)


def test_the_precision_of_float32_products_may_be_set_the_new_way():
    """In processes of their own, since it is set for all: forks of one that has imported everything."""
    code = """
        import os
        import torch
        from lit_sigsoftmax.functional import linear_cross_entropy
        from lit_sigsoftmax.losses.triton_backend import tf32_allowed
        for setting in (torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):
            if not os.fork():
                setting.fp32_precision = "tf32"
                assert tf32_allowed() == (setting is not torch.backends.mkldnn.matmul), setting
                linear_cross_entropy(torch.zeros(3, 2), torch.zeros(4, 2), torch.arange(3))
                os._exit(7)
            assert os.waitstatus_to_exitcode(os.wait()[1]) == 7, setting
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


@every_activation
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_agrees_with_the_reference(name, dtype, way):
    check(*layer(dtype), activation=name)


@every_activation
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_mixture_agrees_with_the_reference(name, dtype, way):
    check(*mixture(dtype), activation=name)


@every_activation
@pytest.mark.parametrize("make", [layer, mixture])
def test_tokens_of_unequal_weight(name, make, way):
    inputs, target = make(torch.float32)
    check(inputs, target, weights=torch.linspace(-1, 2, N), activation=name)


@pytest.mark.parametrize("activation", [lambda z: z + F.logsigmoid(z), nn.Softplus()])
@pytest.mark.parametrize("make", [layer, mixture])
def test_any_callable(activation, make):
    check(*make(), activation=activation)


@every_activation
def test_registered_derivative(name):
    derivative = derivative_of(get_activation(name))
    if derivative is None:
        return
    z = torch.cat([torch.linspace(-700, 700, 400), torch.linspace(-5, 5, 400)]).double().requires_grad_()
    (expected,) = torch.autograd.grad(get_activation(name)(z).sum(), z)
    torch.testing.assert_close(derivative(z.detach()), expected)


@every_activation
@pytest.mark.parametrize(("label_smoothing", "z_loss"), [(0.1, 0.0), (0.0, 1e-2), (0.2, 1e-3)])
def test_penalties(name, label_smoothing, z_loss):
    inputs, target = layer()
    check(inputs, target, activation=name, label_smoothing=label_smoothing, z_loss=z_loss)
    hidden, weight, bias = (x.detach() for x in inputs)
    scores = get_activation(name)(hidden @ weight.T + bias)
    log_p, lse = scores.log_softmax(-1), scores.logsumexp(-1)
    counted = target != -100
    nll = -log_p.gather(-1, target.where(counted, 0).unsqueeze(-1)).squeeze(-1)
    by_hand = (1 - label_smoothing) * nll - label_smoothing * log_p.mean(-1) + z_loss * lse.square()
    for backend in ("chunked", "reference"):
        loss = linear_cross_entropy(
            *(hidden, weight, target, bias),
            activation=name,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            backend=backend,
        )
        torch.testing.assert_close(loss, by_hand[counted].mean())


def test_a_mixture_has_no_penalties():
    (hidden, weight, bias, log_prior), target = mixture()
    with pytest.raises(ValueError, match="neither label_smoothing nor z_loss"):
        linear_cross_entropy(hidden, weight, target, bias, log_prior=log_prior, z_loss=0.1)
    with pytest.raises(ValueError, match="do not fit"):
        linear_cross_entropy(hidden, weight, target, bias)


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("level", [-1e4, -300.0, -70.0, 0.0, 90.0, 1e4])
def test_extreme_logits(name, level, way):
    """Rows whose logits are all far from zero, beside one that is not, in float32."""
    logits = torch.tensor([[level, level + 1, level - 2], [0.0, 1.0, -1.0], [level - 3e3, level, level - 200]])
    target = torch.tensor([1, 0, 0])
    hidden, weight = logits.requires_grad_(), torch.eye(3, requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, target, activation=name, reduction="none", backend="chunked")
    exact = [float(-log_probabilities(row, FORMULAS[name])[t]) for row, t in zip(logits.tolist(), target, strict=True)]
    torch.testing.assert_close(loss.double(), torch.tensor(exact).double(), rtol=2e-6, atol=2e-6)
    loss.sum().backward()
    assert hidden.grad.isfinite().all()
    assert weight.grad.isfinite().all()


@pytest.mark.parametrize("name", ["softmax", "sigsoftmax", "sigmoid"])
@pytest.mark.parametrize("level", [-90.0, -40.0, -33.0, 40.0, 66.0, 80.0, 88.4])
def test_logits_near_the_end_of_exponentials(name, level, way, monkeypatch):
    """Their gradients keep their digits, also with the small weights of rows that a mean gives."""
    monkeypatch.setattr(sizes, "_ROWS", 1024)  # what is in a chunk repeats every three rows
    logits = level + torch.tensor([[0.0, -15.0, -1.0], [-2.0, 0.3, -1.0], [-3.0, -50.0, 0.0]]).repeat(1000, 1)
    target = torch.tensor([0, 2, 1]).repeat(1000)
    found = []
    for dtype, backend in ((torch.float32, "chunked"), (torch.float64, "reference")):
        hidden, weight = logits.to(dtype).requires_grad_(), torch.eye(3, dtype=dtype, requires_grad=True)
        loss = linear_cross_entropy(hidden, weight, target, activation=name, backend=backend)
        each = linear_cross_entropy(hidden, weight, target, activation=name, backend=backend, reduction="none")
        found.append((each.detach().double(), *(g.double() for g in torch.autograd.grad(loss, (hidden, weight)))))
    (loss, of_hidden, of_weight), (expected, exact_hidden, exact_weight) = found
    torch.testing.assert_close(loss, expected, rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(1e3 * of_hidden, 1e3 * exact_hidden, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(of_weight, exact_weight, rtol=1e-5, atol=2e-5 * float(exact_weight.abs().max()))


@every_activation
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [layer, mixture])
def test_half_precision_is_no_worse_than_naive(name, dtype, make):
    inputs, target = make(dtype)
    kwargs = {"activation": name}
    _, exact = loss_and_gradients(inputs, target, "reference", **kwargs)
    ours, gradients = loss_and_gradients(inputs, target, "chunked", **kwargs)
    naive_inputs = [x.detach().clone().requires_grad_() for x in inputs]
    hidden, weight, bias, *prior = naive_inputs
    scores = get_activation(name)(F.linear(hidden, weight, bias))
    log_p = scores.log_softmax(-1) if not prior else (prior[0].unsqueeze(-1) + scores.log_softmax(-1)).logsumexp(-2)
    F.nll_loss(log_p, target, reduction="sum").backward()
    assert ours.dtype == torch.float32
    for gradient, x, reference in zip(gradients, naive_inputs, exact, strict=True):
        assert gradient.dtype == dtype
        size = reference.abs().max()
        error, naive = ((g.double() - reference).abs().mean() / size for g in (gradient, x.grad))
        assert error <= naive.nan_to_num(torch.inf) + 1e-4


def test_autocast_computes_in_half_precision_and_keeps_float32():
    inputs, target = layer(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss, gradients = loss_and_gradients(inputs, target, "chunked", activation="sigsoftmax")
    exact, expected = loss_and_gradients(inputs, target, "reference", activation="sigsoftmax")
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=0.03, atol=0.03)
    assert not torch.allclose(loss.double(), exact, rtol=1e-5)  # it did use bfloat16
    for gradient, reference in zip(gradients, expected, strict=True):
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient.double(), reference, rtol=0.1, atol=0.1)


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("experts", [1, 3])
@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("activation", [*available_activations(), lambda z: z.square()])
def test_the_logits_never_exist_whole(activation, experts, gradient, monkeypatch):
    monkeypatch.setattr(sizes, "_ROWS", 192)
    rows, hidden_size = 1200, 2
    head = OutputHead(hidden_size, VOCAB, activation, experts)
    hidden = torch.randn(rows // experts, hidden_size)
    target = torch.randint(VOCAB, (rows // experts,))
    gemm.uses_onednn()  # measures products of its own, once
    with torch.set_grad_enabled(gradient), LargestTensor() as largest:
        nll = head.nll(hidden, target)
        if gradient:
            nll.mean().backward()
    assert largest.elements <= (rows / 8 if gradient else 192) * VOCAB


def test_hooks_of_a_parameter_see_one_gradient():
    inputs, target = layer()
    found = []
    for backend in ("chunked", "reference"):
        seen = []
        scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
        scale.register_hook(lambda gradient, seen=seen: seen.append(gradient) or 0.1 * gradient)
        log_g = lambda z, scale=scale: scale * z  # noqa: E731
        linear_cross_entropy(*inputs[:2], target, inputs[2], activation=log_g, backend=backend).backward()
        assert len(seen) == 1
        found.append(scale.grad)
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("activation", [lambda z: z + F.logsigmoid(z), lambda z: 30 * torch.tanh(z / 30)])
def test_what_weighs_nothing_is_no_denormal_number(activation):
    """Products with denormal numbers take a hundred times as long."""
    inputs, target = layer(torch.float32, scale=40.0)
    _, gradients = loss_and_gradients(inputs, target, "chunked", activation=activation)
    _, expected = loss_and_gradients(inputs, target, "reference", activation=activation)
    for gradient, reference in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient.double(), reference, rtol=1e-3, atol=1e-4)
    logits = torch.linspace(-150, 0, 500).expand(3, -1).contiguous()
    general(logits, torch.full((3,), 499), activation, Penalty(), gradient=True, block=3)
    assert not ((logits != 0) & (logits.abs() < torch.finfo(torch.float32).tiny)).any()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda z: z.sum(-1), r"one by one: given \(1, 40\) it returned \(1,\)"),
        (lambda z: None, "it returned NoneType"),
        (lambda z: (z, z), "it returned tuple"),
        (lambda z: z.mul_(2), "changes its input"),
    ],
)
def test_an_activation_of_the_wrong_kind_is_named(wrong, message):
    (hidden, weight, bias), target = layer()
    with pytest.raises((ValueError, RuntimeError), match=message):
        linear_cross_entropy(hidden, weight, target, bias, activation=wrong, backend="chunked")
    if message.startswith("it"):
        with torch.no_grad(), pytest.raises(ValueError, match=message):
            linear_cross_entropy(hidden, weight, target, bias, activation=wrong, backend="chunked")


def test_scores_are_let_go_of_before_the_graph_is_run():
    held = []

    class Score(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            return 2 * z

        @staticmethod
        def backward(ctx, gradient):
            held.append(scores() is not None)
            return 2 * gradient

    def log_g(z):
        nonlocal scores
        out = Score.apply(z)
        scores = weakref.ref(out)
        return out

    scores = None
    inputs, target = layer()
    loss_and_gradients(inputs, target, "chunked", activation=log_g)
    assert held
    assert not any(held)


def test_a_parameter_that_only_some_logits_meet():
    (hidden, weight, bias), target = layer()
    with torch.no_grad():
        hidden[45:, 0], weight[:, 0] = 100, 1
    found = []
    for backend in ("chunked", "reference"):
        scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
        low = lambda z, s=scale: torch.where(z < 50, s * z, z) if bool((z < 50).any()) else z  # noqa: E731
        loss = linear_cross_entropy(hidden, weight, target, bias, activation=low, backend=backend)
        found.append(torch.autograd.grad(loss, (hidden, weight, scale)))
    torch.testing.assert_close(found[0], found[1])
    high = lambda z: torch.where(z > 50, scale * z, z) if bool((z > 50).any()) else z  # noqa: E731
    with pytest.raises(ValueError, match="for some logits and not for zeros"):
        linear_cross_entropy(hidden, weight, target, bias, activation=high, backend="chunked")


@pytest.mark.parametrize("log_g", [torch.zeros_like, torch.Tensor.detach])
def test_an_activation_that_cuts_the_graph_is_refused(log_g):
    inputs, target = layer()
    with pytest.raises(ValueError, match="does not depend on its input"):
        linear_cross_entropy(inputs[0], inputs[1], target, inputs[2], activation=log_g, backend="chunked")


def test_frozen_inputs_cost_no_product(monkeypatch):
    products = []
    monkeypatch.setattr(chunks, "linear", lambda *args: products.append("linear") or F.linear(*args))
    monkeypatch.setattr(torch.Tensor, "addmm_", lambda *args: products.append("addmm"))
    inputs, target = layer(torch.float32, n=30)
    for frozen, expected in (
        ([], ["linear", "linear", "addmm"]),
        ([0], ["linear", "addmm"]),
        ([1], ["linear", "linear"]),
        ([0, 1], ["linear"]),
    ):
        products.clear()
        given = [x.detach().requires_grad_(i not in frozen) for i, x in enumerate(inputs)]
        linear_cross_entropy(given[0], given[1], target, given[2], backend="chunked")
        assert products == expected
    with torch.no_grad():
        products.clear()
        assert not linear_cross_entropy(inputs[0], inputs[1], target, inputs[2], backend="chunked").requires_grad
    assert products == ["linear"]


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_frozen_inputs_leave_the_other_gradients_alone(frozen):
    inputs, target = layer()
    inputs[frozen].requires_grad_(False)
    check(inputs, target, activation="sigsoftmax")


def test_a_tensor_that_a_closure_holds_gets_its_gradient():
    inputs, target = layer()
    results = []
    for backend in ("chunked", "reference"):
        sharpness = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
        hidden, weight, bias = inputs
        linear_cross_entropy(
            hidden, weight, target, bias, activation=lambda z, s=sharpness: s * z + F.logsigmoid(z), backend=backend
        ).backward()
        results.append(sharpness.grad)
    torch.testing.assert_close(*results)


class PerToken(nn.Module):
    """A parameter for each token of the vocabulary."""

    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.linspace(0.5, 2, VOCAB, dtype=torch.float64))

    def forward(self, z):
        return self.slope * z + F.logsigmoid(z)


@pytest.mark.parametrize("make", [layer, mixture])
def test_parameters_of_the_activation(make):
    inputs, target = make()
    weights = torch.linspace(0, 1, N, dtype=torch.float64)
    found = []
    for backend in ("chunked", "reference"):
        activation = PerToken()
        given = dict(zip(("hidden", "weight", "bias", "log_prior"), inputs, strict=False))
        loss = linear_cross_entropy(target=target, activation=activation, reduction="none", backend=backend, **given)
        (loss * weights).sum().backward()
        found.append(activation.slope.grad)
    torch.testing.assert_close(*found)


def test_gradcheck_of_the_mixture_through_priors_and_projections():
    head = OutputHead(4, 9, "sigsoftmax", n_experts=3, backend="chunked").double()
    hidden = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    target = torch.tensor([0, 8, -100, 3, 4])
    names, parameters = zip(*head.named_parameters(), strict=True)

    def loss(hidden, *values):
        return torch.func.functional_call(
            _Nll(head), {f"head.{n}": v for n, v in zip(names, values, strict=True)}, (hidden, target)
        )

    assert torch.autograd.gradcheck(loss, (hidden, *parameters))


class _Nll(nn.Module):
    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, hidden, target):
        return self.head.nll(hidden, target)


# What the chunked loss does not do, said rather than done wrong


def test_second_derivatives_are_refused():
    (hidden, weight, bias), target = layer()
    loss = linear_cross_entropy(hidden, weight, target, bias, backend="chunked")
    with pytest.raises(RuntimeError, match=r"first derivatives only.*backend='reference'"):
        torch.autograd.grad(loss, hidden, create_graph=True)


def test_transforms_are_refused():
    (hidden, weight, bias), target = (x if isinstance(x, torch.Tensor) else [y.detach() for y in x] for x in layer())
    for transform in (torch.func.grad, torch.func.jacrev, torch.func.jacfwd):
        with pytest.raises(RuntimeError, match=r"torch.func transforms.*backend='reference'"):
            transform(lambda w: linear_cross_entropy(hidden, w, target, bias, backend="chunked"))(weight)
    with pytest.raises(RuntimeError, match=r"torch.func transforms.*backend='reference'"):
        torch.func.vmap(lambda h: linear_cross_entropy(h, weight, target, bias, backend="chunked"))(hidden[None])


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("carrier", [0, 1, 2])
@pytest.mark.parametrize("activation", ["sigsoftmax", lambda z: 2 * z])
def test_forward_mode_is_refused(activation, carrier, trained):
    inputs, target = layer()
    inputs = [x.detach().requires_grad_(trained) for x in inputs]
    with forward_ad.dual_level():
        inputs[carrier] = forward_ad.make_dual(inputs[carrier].detach(), torch.ones_like(inputs[carrier]))
        hidden, weight, bias = inputs
        with pytest.raises(RuntimeError, match=r"no forward mode.*backend='reference'"):
            linear_cross_entropy(hidden, weight, target, bias, activation=activation, backend="chunked")


@pytest.mark.parametrize("trained", [True, False])
def test_forward_mode_by_what_an_activation_holds_is_refused(trained):
    (hidden, weight, bias), target = layer()
    with forward_ad.dual_level():
        scale = forward_ad.make_dual(torch.tensor(2.0, requires_grad=trained), torch.tensor(1.0))
        with pytest.raises(RuntimeError, match=r"no forward mode.*backend='reference'"):
            linear_cross_entropy(hidden, weight, target, bias, activation=lambda z: scale * z, backend="chunked")


@pytest.mark.parametrize("activation", ["sigsoftmax", lambda z: 2 * z])
def test_batched_gradients_are_refused(activation):
    (hidden, weight, bias), target = layer()
    loss = linear_cross_entropy(hidden, weight, target, bias, activation=activation, backend="chunked")
    with pytest.raises(RuntimeError, match=r"no batched gradients.*backend='reference'"):
        torch.autograd.grad(loss * torch.ones(2), hidden, torch.eye(2), is_grads_batched=True)


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["sigsoftmax", lambda z: 2 * z])
@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev, torch.func.vmap])
def test_transforms_are_refused_inside_and_around_a_compiled_model(transform, activation):
    (hidden, weight, bias), target = layer()
    of = hidden.expand(1, -1, -1) if transform is torch.func.vmap else hidden

    def step(hidden):
        return linear_cross_entropy(hidden, weight, target, bias, activation=activation)

    for function in (
        lambda compiled: compiled(transform(step)),
        lambda compiled: transform(compiled(step)),
    ):
        torch.compiler.reset()
        with pytest.raises(RuntimeError, match="first derivatives only"):
            function(partial(torch.compile, backend="eager"))(of)
    torch.compiler.reset()
    compiled_step = torch.compile(step, backend="eager")
    compiled_step(hidden)  # and so it is there when the transform comes
    with pytest.raises(RuntimeError, match="first derivatives only"):
        transform(compiled_step)(of)


@pytest.mark.slow
def test_forward_mode_is_refused_inside_a_compiled_model():
    (hidden, weight, bias), target = (x if isinstance(x, torch.Tensor) else [y.detach() for y in x] for x in layer())

    def step(hidden):
        return linear_cross_entropy(hidden, weight, target, bias, activation="sigsoftmax")

    def derivative(hidden):
        return torch.func.jvp(step, (hidden,), (torch.ones_like(hidden),))[1]

    def tangent_within(hidden):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(step(forward_ad.make_dual(hidden, torch.ones_like(hidden)))).tangent

    for function in (derivative, tangent_within):
        torch.compiler.reset()
        with pytest.raises(RuntimeError, match="first derivatives only"):
            torch.compile(function, backend="eager")(hidden)
    compiled_step = torch.compile(step, backend="eager")
    compiled_step(hidden)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="first derivatives only"):
        compiled_step(forward_ad.make_dual(hidden, torch.ones_like(hidden)))


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("tokens", [0, 1, 35, 350, 5000])
@pytest.mark.parametrize("experts", [1, 15])
@pytest.mark.parametrize("vocab_size", [3, 10_000, 2**26])
@pytest.mark.parametrize("differentiated", [True, False])
def test_chunks_are_all_tokens_once(kind, tokens, experts, vocab_size, differentiated):
    with FakeTensorMode():
        hidden, weight = torch.empty(tokens, experts, 8, device=kind), torch.empty(vocab_size, 8, device=kind)
    slices = list(sizes.of_chunks(hidden, weight, "general", False, differentiated))
    assert [token for part in slices for token in range(tokens)[part]] == list(range(tokens))


@every_activation
@pytest.mark.parametrize("tokens", [0, 1, 2])
def test_a_mixture_of_few_tokens(name, tokens, way):
    (hidden, weight, bias, log_prior), target = mixture(torch.float32)
    hidden, log_prior = (x.detach()[:tokens].requires_grad_() for x in (hidden, log_prior))
    check([hidden, weight, bias, log_prior], target[:tokens], activation=name)


@pytest.mark.parametrize("wrong", [-1, VOCAB])
@pytest.mark.parametrize("make", [layer, mixture])
def test_a_target_out_of_bounds_is_an_error(make, wrong, way):
    inputs, target = make(torch.float32)
    target[5] = wrong
    for backend in ("chunked", "reference"):
        with pytest.raises(IndexError, match=f"{wrong} is out of bounds"):
            loss_and_gradients(inputs, target, backend, activation="sigsoftmax")


def test_targets_and_smoothing_are_checked():
    (hidden, weight, bias), target = layer()
    with pytest.raises(ValueError, match="int64"):
        linear_cross_entropy(hidden, weight, target.int(), bias)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        linear_cross_entropy(hidden, weight, target, bias, label_smoothing=1.5)


# What goes on around it


@pytest.mark.parametrize("make", [layer, mixture])
def test_a_masked_token_and_an_ignored_target(make, way):
    """Whatever an ignored token's own loss is, it reaches no gradient."""
    inputs, target = make(torch.float32)
    with torch.no_grad():
        inputs[2][0] = -torch.inf
    target[target == 0] = 1
    check(inputs, target, activation="sigsoftmax")


@pytest.mark.parametrize("make", [layer, mixture])
def test_no_target_counts(make):
    inputs, target = make()
    loss, gradients = loss_and_gradients(inputs, torch.full_like(target, -100), "chunked", activation="sigsoftmax")
    assert not loss.any()
    assert not any(gradient.any() for gradient in gradients)


def test_a_loss_scaler_comes_in_time_for_float16():
    """Derivatives of 1e-8 and below vanish in float16 unless they are scaled before they are rounded."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(500, 8, generator=generator), 0.1 * torch.randn(3000, 8, generator=generator)
    target, scale = torch.randint(3000, (500,), generator=generator), 2.0**16
    weight.requires_grad_()
    (exact,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, target, backend="reference"), weight)
    found = []
    for backend in ("chunked", "reference"):
        with torch.autocast("cpu", torch.float16):
            loss = linear_cross_entropy(hidden, weight, target, backend=backend)
        found.append(torch.autograd.grad(loss * scale, weight)[0] / scale)
    ours, naive = ((gradient - exact).abs().mean() / exact.abs().mean() for gradient in found)
    assert ours <= naive + 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_strides(dtype, way):
    (hidden, weight, bias), target = layer(dtype)
    wide = [torch.stack([x.detach(), -x.detach()], dim=-1)[..., 0].requires_grad_() for x in (hidden, weight, bias)]
    assert not any(x.is_contiguous() for x in wide)
    narrow = [x.detach().clone().contiguous().requires_grad_() for x in wide]
    spread = target.repeat_interleave(2)[::2]
    for found, expected in zip(
        loss_and_gradients(wide, spread, "chunked", activation="sigsoftmax")[1],
        loss_and_gradients(narrow, target, "chunked", activation="sigsoftmax")[1],
        strict=True,
    ):
        torch.testing.assert_close(found, expected)


def test_weight_decay_sees_the_weight_and_not_its_chunks():
    found = []
    for backend in ("chunked", "reference"):
        (hidden, weight, bias), target = layer()
        optimizer = torch.optim.AdamW([weight, bias], lr=0.1, weight_decay=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            linear_cross_entropy(
                hidden.detach(), weight, target, bias, activation="sigsoftmax", backend=backend
            ).backward()
            optimizer.step()
        found.append(weight.detach())
    torch.testing.assert_close(*found)


def test_backward_twice():
    (hidden, weight, bias), target = layer()
    loss = linear_cross_entropy(hidden, weight, target, bias, activation="sigsoftmax", backend="chunked")
    first = torch.autograd.grad(loss, (hidden, weight, bias), retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    second = torch.autograd.grad(2 * loss, (hidden, weight, bias))
    for a, b, c in zip(first, second, kept, strict=True):
        torch.testing.assert_close(2 * a, b)
        assert torch.equal(a, c)


def test_tied_weights_and_accumulated_gradients():
    embedding = nn.Embedding(VOCAB, HIDDEN, dtype=torch.float64)
    tokens, target = torch.arange(N) % VOCAB, torch.arange(N).flip(0) % VOCAB
    found = []
    for backend in ("chunked", "reference"):
        embedding.zero_grad()
        for half in (slice(0, N // 2), slice(N // 2, N)):
            hidden = torch.tanh(embedding(tokens[half]))
            linear_cross_entropy(hidden, embedding.weight, target[half], activation="relu", backend=backend).backward()
        found.append(embedding.weight.grad.clone())
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_around_it(use_reentrant):
    inputs, target = layer()

    def loss(hidden, weight, bias):
        return linear_cross_entropy(torch.tanh(hidden), weight, target, bias, activation="sigsoftmax")

    plain = torch.autograd.grad(loss(*inputs), inputs)
    for x in inputs:
        x.grad = None
    checkpoint(loss, *inputs, use_reentrant=use_reentrant).backward()
    for x, gradient in zip(inputs, plain, strict=True):
        torch.testing.assert_close(x.grad, gradient)


def _gradient_of_a_shard(rank, port, folder):
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    head, hidden, target = _head_and_tokens("chunked")
    shard = slice(rank * 15, rank * 15 + 15)
    replica = nn.parallel.DistributedDataParallel(_Nll(head))
    replica(hidden[shard], target[shard]).mean().backward()
    torch.save([parameter.grad for parameter in head.parameters()], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def _head_and_tokens(backend):
    torch.manual_seed(0)
    head = OutputHead(HIDDEN, VOCAB, "sigsoftmax", n_experts=2, backend=backend)
    return head, torch.randn(30, HIDDEN), torch.randint(VOCAB, (30,))


@pytest.mark.slow
def test_gradients_of_two_processes_are_those_of_the_reference(tmp_path):
    torch.multiprocessing.spawn(_gradient_of_a_shard, (free_port(), str(tmp_path)), nprocs=2)
    head, hidden, target = _head_and_tokens("reference")
    head.nll(hidden, target).mean().backward()
    for rank in (0, 1):
        gradients = torch.load(tmp_path / f"{rank}.pt")
        for gradient, parameter in zip(gradients, head.parameters(), strict=True):
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-5, atol=1e-7)


def compiled_step(loss, calls, dynamic=None):
    """``loss`` of tensors as a step that torch.compile traces, and the functions in its graphs."""

    def backend(graph, example_inputs):
        calls.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    torch.compiler.reset()
    return torch.compile(loss, backend=backend, dynamic=dynamic)


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 0.01}, {"mixed": True}], ids=str)
def test_inside_a_compiled_model(reduction, options):
    """An operator in its one graph, with the gradients that it has outside."""
    (hidden, weight, bias), target = layer(torch.float32)
    options = {"activation": "sigsoftmax", "reduction": reduction, **options}
    tensors = [hidden, weight, bias]
    if options.pop("mixed", False):
        tensors = [hidden.detach().view(N // 3, 3, HIDDEN).requires_grad_(), weight, bias]
        tensors.append(torch.randn(N // 3, 3).log_softmax(-1).requires_grad_())
        target = target[: N // 3]

    def step(hidden, weight, bias, log_prior=None):
        hidden = torch.tanh(hidden)
        return linear_cross_entropy(hidden, weight, target, bias, log_prior=log_prior, **options) * 2

    def gradients(loss):
        return torch.autograd.grad(loss, tensors, torch.linspace(1, 2, loss.numel()).view(loss.shape))

    calls, expected = [], step(*tensors)
    found = compiled_step(step, calls)(*tensors)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(found), gradients(expected))
    assert len(calls) == 1
    torch.compiler.reset()
    torch.testing.assert_close(gradients(torch.compile(step, fullgraph=True)(*tensors)), gradients(step(*tensors)))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_frozen_or_ignored_inside_a_compiled_model(dtype):
    (hidden, weight, bias), target = layer(torch.float32)
    weight = weight.detach()

    def step(hidden, bias, target):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            return linear_cross_entropy(hidden, weight, target, bias, activation="sigsoftmax")

    calls = []
    compiled_one = compiled_step(step, calls)
    for some in (target, torch.full_like(target, -100)):
        found = torch.autograd.grad(compiled_one(hidden, bias, some), (hidden, bias))
        torch.testing.assert_close(found, torch.autograd.grad(step(hidden, bias, some), (hidden, bias)))
    assert len(calls) == 1


@pytest.mark.slow
def test_a_lambda_breaks_the_graph_of_a_compiled_model():
    """An operator takes no callable; what is around it is compiled."""
    (hidden, weight, bias), target = layer(torch.float32)

    def step(hidden, weight, bias):
        return linear_cross_entropy(torch.tanh(hidden), weight, target, bias, activation=lambda z: 2 * z)

    calls = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = torch.autograd.grad(compiled_step(step, calls)(hidden, weight, bias), (hidden, weight, bias))
    torch.testing.assert_close(found, torch.autograd.grad(step(hidden, weight, bias), (hidden, weight, bias)))
    assert [torch.tanh] in calls  # before the break


def test_the_operator_keeps_its_promises():
    """PyTorch's own checks: schema, autograd, fake tensors, and tracing with changing sizes."""
    (hidden, weight, bias), target = layer(torch.float32)
    log_prior = torch.zeros(N, 1, requires_grad=True)
    for tensors in ((hidden.unsqueeze(1), weight, bias, None), (hidden.unsqueeze(1), weight.detach(), None, log_prior)):
        wanted = [tensor is not None and tensor.requires_grad for tensor in tensors]
        arguments = (*tensors, target, wanted, "sigsoftmax", -100, 0.0, 0.0, torch.float32)
        torch.library.opcheck(torch.ops.lit_sigsoftmax.token_losses, arguments)


@pytest.mark.slow
def test_batches_of_changing_size_inside_a_compiled_model():
    (hidden, weight, bias), target = layer(torch.float32)

    def step(hidden, target):
        return linear_cross_entropy(hidden, weight, target, bias, activation="sigsoftmax")

    calls = []
    compiled_one = compiled_step(step, calls, dynamic=True)
    for n in (N, 50, 70):
        batch = hidden.detach()[:n].clone(), target[:n].clone()
        found, expected = compiled_one(*batch), step(*batch)
        torch.testing.assert_close(torch.autograd.grad(found, weight), torch.autograd.grad(expected, weight))
    assert len(calls) == 1


def test_the_operator_has_no_second_derivatives():
    (hidden, weight, bias), target = layer(torch.float32)
    calls = []
    step = compiled_step(lambda h: linear_cross_entropy(h, weight, target, bias, activation="sigsoftmax"), calls)
    (gradient,) = torch.autograd.grad(step(hidden), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(gradient.sum(), hidden)


# Products


def test_products_agree_whichever_library_makes_them(monkeypatch):
    x, weight, bias = torch.randn(50, 30), torch.randn(70, 30), torch.randn(70)
    exact = (x.double() @ weight.double().T + bias.double()).float()
    for fast in (False, True):
        monkeypatch.setattr(gemm, "uses_onednn", lambda fast=fast: fast)
        torch.testing.assert_close(gemm.linear(x, weight, bias), exact, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gemm.linear(x, weight.t().contiguous().t()), exact - bias, rtol=1e-5, atol=1e-5)


def test_the_library_is_chosen_once_for_a_machine(tmp_path, monkeypatch):
    """So that a run and its continuation compute the same bits."""
    code = "from lit_sigsoftmax.losses import gemm; print(gemm.uses_onednn())"
    env = {"PATH": "", "LIT_SIGSOFTMAX_CACHE": str(tmp_path)}
    first = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    (kept,) = tmp_path.glob("gemm-*.txt")
    assert first.stdout.strip() == str(kept.read_text() == "onednn")
    # This process stands for the later ones: it asks as if it had never asked before.
    monkeypatch.setenv("LIT_SIGSOFTMAX_CACHE", str(tmp_path))
    monkeypatch.delenv("LIT_SIGSOFTMAX_GEMM", raising=False)
    monkeypatch.setattr(gemm, "_measure", None)
    ask = gemm.uses_onednn.__wrapped__
    for other in ("torch", "onednn"):
        kept.write_text(other)
        assert ask() == (other == "onednn")
    monkeypatch.setenv("LIT_SIGSOFTMAX_GEMM", "torch")
    assert not ask()
    monkeypatch.setenv("LIT_SIGSOFTMAX_GEMM", "fast")
    with pytest.raises(ValueError, match="LIT_SIGSOFTMAX_GEMM is 'onednn' or 'torch', not 'fast'"):
        ask()


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_default_dtype_does_not_matter(default, dtype, way):
    """Lightning's bf16-true sets it while a model trains."""
    inputs, target = layer(dtype)
    expected = loss_and_gradients(inputs, target, "chunked", activation="sigsoftmax")
    custom = loss_and_gradients(inputs, target, "chunked", activation=lambda z: z - z.square() / 50)
    torch.set_default_dtype(default)
    try:
        found = loss_and_gradients(inputs, target, "chunked", activation="sigsoftmax")
        again = loss_and_gradients(inputs, target, "chunked", activation=lambda z: z - z.square() / 50)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.testing.assert_close(again, custom, rtol=0, atol=0)
