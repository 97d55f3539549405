"""Any elementwise function as a program of PyTorch's operations, for the compiled loss."""

import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from test_losses_compiled import LOGITS, draw, needs_compiler
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lit_sigsoftmax import activations
from lit_sigsoftmax.functional import linear_cross_entropy
from lit_sigsoftmax.losses import chunks, compiled, sizes, sweeps
from lit_sigsoftmax.losses.compiled import evaluator, score_and_differentiate

pytestmark = needs_compiler
aten = torch.ops.aten

# An expression for each operation of the interpreter.
OPERATIONS = {
    "add": lambda z: z + 1.5,
    "sub": lambda z: z - 1.5,
    "rsub": lambda z: 1.5 - z,
    "mul": lambda z: z * -0.7,
    "div": lambda z: 3 / z + z / 7,
    "neg": lambda z: -z,
    "reciprocal": torch.reciprocal,
    "abs": torch.abs,
    "sgn": torch.sgn,
    "square": torch.square,
    "cube": lambda z: z**3,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "exp": torch.exp,
    "expm1": torch.expm1,
    "log": torch.log,
    "log1p": torch.log1p,
    "tanh": torch.tanh,
    "tanh_backward": lambda z: aten.tanh_backward(z, 0.9 * torch.tanh(z)),
    "sigmoid": torch.sigmoid,
    "sigmoid_backward": lambda z: aten.sigmoid_backward(z, 0.9 * torch.sigmoid(z)),
    "log_sigmoid_forward": F.logsigmoid,
    "log_sigmoid_backward": lambda z: aten.log_sigmoid_backward(z, -z, torch.exp(-z.abs())),
    "silu": F.silu,
    "silu_backward": lambda z: aten.silu_backward(z, -z),
    "softplus": lambda z: F.softplus(z, beta=0.5, threshold=10) + F.softplus(z),
    "softplus_backward": lambda z: aten.softplus_backward(z, -z, 0.5, 10),
    "relu": F.relu,
    "threshold_backward": lambda z: aten.threshold_backward(z, -z, 0.5),
    "leaky_relu": lambda z: F.leaky_relu(z, 0.2),
    "leaky_relu_backward": lambda z: aten.leaky_relu_backward(z, -z, 0.2, False),
    "hardtanh": lambda z: F.hardtanh(z, -1.5, 2.0),
    "hardtanh_backward": lambda z: aten.hardtanh_backward(z, z + 1, -1.5, 2.0),
    "clamp": lambda z: z.clamp(-1.5, 2.0) + z.clamp(max=1.0) + z.clamp(min=-0.5),
    "clamp_min": lambda z: torch.clamp_min(z, -1.5),
    "clamp_max": lambda z: torch.clamp_max(z, 1.5),
    "minimum": lambda z: torch.minimum(z, -z),
    "maximum": lambda z: torch.maximum(z, -z),
    "eq": lambda z: (z == z.abs()).float(),
    "ne": lambda z: (z != z.abs()).float(),
    "lt": lambda z: (z < 1.5).float(),
    "le": lambda z: (z <= 1.5).float(),
    "gt": lambda z: (z > 1.5).float(),
    "ge": lambda z: (z >= 1.5).float(),
    "logical_and": lambda z: ((z > -1) & (z < 1)).float() + torch.logical_and(z, z > 1),
    "logical_or": lambda z: ((z < -1) | (z > 1)).float() + torch.logical_or(z, z > 1),
    "logical_not": lambda z: (~(z > 1)).float() + torch.logical_not(z),
    "where": lambda z: torch.where(z > 0, z, 2.0),
    "masked_fill": lambda z: z.masked_fill(z > 0, 2.0),
}
# As they fall: near zero, where exponentials and logarithms change their ways, and as far as float32 goes.
NUMBERS = torch.cat([
    torch.linspace(-4, 4, 4001),
    torch.linspace(-110, 110, 4001),
    *(sign * torch.logspace(-37, 38, 1000) for sign in (1, -1)),
    torch.tensor([0.0, 1.0, -1.0, 1.5, -1.5, 0.625, 1e-45, -1e-45, 3.4e38, -3.4e38]),
])  # fmt: skip


def test_every_operation_is_here():
    assert list(OPERATIONS) == compiled._operations()


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_is_torchs(name):
    """As the derivative of a constant, by which the probability of each type, 1 / V, is multiplied."""

    class Slope(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            ctx.save_for_backward(z)
            return torch.zeros_like(z)

        @staticmethod
        def backward(ctx, grad):
            (z,) = ctx.saved_tensors
            return grad * OPERATIONS[name](z)

    columns = 2**14  # so that nothing is rounded
    logits = F.pad(NUMBERS, (1, columns - len(NUMBERS) - 1)).unsqueeze(0)
    z = logits[0, 1:].clone()
    takes = evaluator(Slope.apply, columns, gradient=True)
    assert compiled._operations().index(name) in takes.program.steps[:, 0]
    score_and_differentiate(logits, torch.tensor([0]), takes, differentiate=True)
    actual, expected = columns * logits[0, 1:].double(), OPERATIONS[name](z.double()).float().double()
    normal = expected.abs() > 1e-33  # as much smaller as the probability, the others would have lost digits
    torch.testing.assert_close(actual[normal], expected[normal], rtol=1e-6, atol=1e-7, equal_nan=True)
    torch.testing.assert_close(actual[~normal], expected[~normal], rtol=0, atol=1e-33, equal_nan=True)


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_targets_score_is_the_one_in_the_sum(name):
    """Bit for bit: the loss of a row of one number is exactly log V."""
    numbers = NUMBERS[OPERATIONS[name](NUMBERS).isfinite()]
    logits = numbers.unsqueeze(1).repeat(1, 37)  # vectors of any size, and what is left over
    takes = evaluator(OPERATIONS[name], 37, gradient=False)
    nll = score_and_differentiate(logits, torch.zeros(len(numbers), dtype=torch.int64), takes, differentiate=False)
    assert set(nll.tolist()) == {torch.tensor(37.0).double().log().float().item()}


class Rounded(torch.autograd.Function):
    """A derivative of its own."""

    @staticmethod
    def forward(ctx, z):
        return z.clamp(-9, 9)

    @staticmethod
    def backward(ctx, grad):
        return 0.25 * grad


def without_a_graph(z):
    with torch.no_grad():
        shift = 0.1 * z
    return z - shift


def in_place(z):
    y = 0.5 * z
    y += 1
    return y.mul_(2)


class Capped(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("cap", torch.tensor(5.0))

    def forward(self, z):
        return self.cap * torch.tanh(z / self.cap)


FUNCTIONS = {
    "z": lambda z: z,
    "constant and z": lambda z: 1 + 0 * z,
    "sigsoftmax": lambda z: z + F.logsigmoid(z),
    "soft cap": lambda z: 30 * torch.tanh(z / 30),
    "module": Capped(),
    "scripted": torch.jit.script(nn.Hardtanh()),
    "compiled": torch.compile(lambda z: 30 * torch.tanh(z / 30)),
    "Taylor": lambda z: torch.log(1 + z + z**2 / 2),
    "spherical": lambda z: torch.log(z * z + 1e-4),
    "log of softplus": lambda z: torch.log(F.softplus(z) + 1e-6),
    "falling": lambda z: -z.abs(),
    "rising on both sides": lambda z: z.abs(),
    "ties": lambda z: torch.maximum(z, 0.5 * z) + torch.minimum(z, torch.zeros_like(z)),
    "cases": lambda z: torch.where((z > -1) & ~(z > 2), z, 0.5 * z),
    "detach": lambda z: z + (torch.tanh(z) - z).detach(),
    "without a graph": without_a_graph,
    "custom function": Rounded.apply,
    "in place": in_place,
}


def reference(logits, target, function):
    logits = logits.double().requires_grad_()
    nll = F.cross_entropy(function(logits), target, reduction="none")
    (gradient,) = torch.autograd.grad(nll.sum(), logits)
    return nll.detach(), gradient


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("kind", ["ordinary", "around 60", "around -60", "equal"])
def test_a_function_and_autograds_derivative(kind, function):
    noise, target = draw(5, 1000)
    logits = LOGITS[kind](noise)
    nll, gradient = reference(logits, target, function)
    takes = evaluator(function, 1000, gradient=True)
    given = logits.clone()
    actual = score_and_differentiate(given, target, takes, differentiate=True)
    alone = score_and_differentiate(logits, target, evaluator(function, 1000, gradient=False), differentiate=False)
    torch.testing.assert_close(actual, alone)
    assert takes.trusts(actual)
    # Scores are float32 as the function itself makes them.
    size = float(function(logits).abs().max())
    torch.testing.assert_close(actual.double(), nll, rtol=3e-7, atol=1e-6 + 2e-7 * size)
    torch.testing.assert_close(given.double(), gradient, rtol=1e-6 + 2e-7 * size, atol=1e-7)


def aliased(z):
    y = 2 * z
    other = y.detach()
    other.mul_(2)
    return y


def into_another(z):
    y = torch.zeros_like(z)
    torch.mul(z.detach(), 2, out=y)
    return z + y


def numpys_own(z):
    y = torch.zeros_like(z)
    with torch.no_grad():
        np.arctan(z.detach().numpy(), out=y.numpy())
    return z + y


def numpys_mask(z):
    y = torch.zeros_like(z)
    y.numpy()[z.detach().numpy() < 0] = -np.inf
    return z + y


def other_data(z):
    y = z.clone()
    y.data = torch.tanh(z.detach())
    return y


def otherwise_if_that_fails(z):
    try:
        return 3 * torch.erf(z)
    except Exception:
        return z


OTHERWISE = {
    "another operation": F.gelu,
    "float64": lambda z: torch.tanh(z.double()).to(z.dtype),
    "over the row": lambda z: z - z.mean(-1, keepdim=True),
    "vector": lambda z: z * torch.ones(z.shape[-1]),
    "branch": lambda z: z if z.max() > 0 else 2 * z,
    "number": lambda z: z * float(z.detach().abs().max() > -1),
    "numpy": lambda z: z + torch.from_numpy(z.detach().numpy() ** 0),
    "shape": lambda z: (2 * z).t().t(),
    "in place of what others see": aliased,
    "into another": into_another,
    "what PyTorch does not see": numpys_own,
    "a mask that PyTorch does not see": numpys_mask,
    "other data": other_data,
    "error caught": otherwise_if_that_fails,
    "truth as a number": lambda z: z * torch.full_like(z, 5, dtype=torch.bool),
    "truth filled": lambda z: z + (z > 0).masked_fill(z < -1, 5).float(),
    "truths": lambda z: z > 0,
    "of truth": lambda z: z * ((z > 0) + (z > 1)),
    "power": lambda z: (z.abs() + 1) ** 0.3,
    "rounded division": lambda z: z + torch.div(z, 3, rounding_mode="floor").detach(),
    "times": lambda z: torch.add(z, z, alpha=2),
    "without a derivative": lambda z: z.detach() * 1.0,
}


@pytest.mark.parametrize("function", OTHERWISE.values(), ids=OTHERWISE)
def test_anything_else_is_no_program(function):
    assert evaluator(function, 10, gradient=True) is None


def test_chance_is_not_recorded():
    assert evaluator(lambda z: F.dropout(z), 10, gradient=True) is None
    assert evaluator(lambda z: z + torch.rand_like(z), 10, gradient=False) is None
    assert evaluator(lambda z: z * torch.rand(()), 10, gradient=False) is None


def test_an_error_of_the_functions_own_is_not_hidden():
    def function(z):
        raise KeyError("mine")

    assert evaluator(function, 10, gradient=True) is None
    with pytest.raises(KeyError, match="mine"):
        losses_and_gradients(*layer(), function)


def test_zeros_have_signs():
    function = lambda z: z * (1 / torch.where(z > 0, 0.0, -0.0)).clamp(-1, 1)  # noqa: E731
    logits = torch.tensor([[-2.0, 3.0]])
    takes = evaluator(function, 10, gradient=False)
    nll = score_and_differentiate(logits, torch.tensor([0]), takes, differentiate=False)
    torch.testing.assert_close(nll, F.cross_entropy(logits.abs(), torch.tensor([0]), reduction="none"))


def layer(n=40, size=24, vocab_size=100, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(n, size, generator=generator), torch.randn(vocab_size, size, generator=generator)
    return scale * hidden, weight, torch.randint(vocab_size, (n,), generator=generator)


def losses_and_gradients(hidden, weight, target, activation, dtype=torch.float32, **kwargs):
    hidden, weight = (x.to(dtype, copy=True).requires_grad_() for x in (hidden, weight))
    loss = linear_cross_entropy(hidden, weight, target, activation=activation, reduction="none", **kwargs)
    return loss.detach(), *torch.autograd.grad(loss.sum(), (hidden, weight))


def check(activation, inputs, **kwargs):
    found = losses_and_gradients(*inputs, activation, **kwargs)
    expected = losses_and_gradients(*inputs, activation, torch.float64, backend="reference", **kwargs)
    for ours, exact_one in zip(found, expected, strict=True):
        size = max(1.0, float(exact_one.abs().max()))
        torch.testing.assert_close(ours.double() / size, exact_one / size, rtol=2e-5, atol=2e-5)


@pytest.fixture
def calls(monkeypatch):
    """The functions of the library that were called with a program."""
    seen, call = [], compiled.Evaluator.call

    def count(self, function, *arguments):
        assert self.program
        seen.append(function)
        call(self, function, *arguments)

    monkeypatch.setattr(compiled.Evaluator, "call", count)
    monkeypatch.setattr(sweeps, "bfloat16_pays", lambda: True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    return seen


def test_a_loss_of_any_function_takes_the_compiled_ways(calls, monkeypatch):
    function = FUNCTIONS["soft cap"]
    check(function, layer())
    assert set(calls) == {"rows"}
    calls.clear()
    monkeypatch.setattr(sizes, "_LEAST", 1)
    check(function, layer(n=90, size=96, vocab_size=400))
    assert set(calls) == {"tiles"}
    calls.clear()
    with torch.autocast("cpu", torch.bfloat16):
        losses_and_gradients(*layer(), function)
    assert set(calls) == {"add_band", "bands_losses", "differentiate_band"}
    calls.clear()
    for without in (torch.no_grad, torch.inference_mode):
        with without():
            hidden, weight, target = layer()
            loss = linear_cross_entropy(hidden, weight, target, activation=function)
            torch.testing.assert_close(loss, F.cross_entropy(function(hidden @ weight.T), target))
        assert calls == ["rows"]
        calls.clear()


@pytest.mark.parametrize("tiles", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    "function", [lambda z: -5 * z, lambda z: 4 * z.square(), lambda z: -4 * z.square()], ids=["falling", "high", "low"]
)
def test_g_of_another_logit_may_be_beyond_the_end_of_numbers(function, autocast, tiles, calls, monkeypatch):
    """What is relative to the largest logit is infinite then, and another way is taken."""
    if tiles:
        monkeypatch.setattr(sizes, "_LEAST", 1)
    inputs = layer(n=90, size=96, vocab_size=400, scale=3.0)
    if not autocast:
        check(function, inputs)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            loss, *gradients = losses_and_gradients(*inputs, function)
            naive, *naive_gradients = losses_and_gradients(*inputs, function, backend="reference")
        exact_loss, *exact_gradients = losses_and_gradients(*inputs, function, torch.float64, backend="reference")
        for ours, theirs, true in zip(
            (loss, *gradients), (naive, *naive_gradients), (exact_loss, *exact_gradients), strict=True
        ):
            ours_off, theirs_off = ((x.double() - true).norm() / true.norm() for x in (ours, theirs))
            assert ours_off <= theirs_off * 1.1 + 2**-9
    assert calls


@pytest.mark.parametrize("name", [name for name in OTHERWISE if name != "over the row"])  # which none may go
def test_the_loss_is_right_without_a_program(name, calls):
    function = OTHERWISE[name]
    if name == "truths":
        with pytest.raises(ValueError, match="does not depend on its input"):
            losses_and_gradients(*layer(), function)
    elif name == "without a derivative":
        with pytest.raises(ValueError, match="does not depend on its input"):
            check(function, layer())
    else:
        inputs = layer()
        expected = losses_and_gradients(*inputs, function, backend="reference")
        for ours, theirs in zip(losses_and_gradients(*inputs, function), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert not calls


def test_numbers_may_change_from_step_to_step(calls):
    class Tempered(nn.Module):
        scale = 1.0

        def __init__(self):
            super().__init__()
            self.register_buffer("temperature", torch.tensor(1.0))

        def forward(self, z):
            return self.scale * z / self.temperature

    activation, inputs = Tempered(), layer()
    for scale, temperature in ((1.0, 1.0), (2.0, 1.0), (2.0, 3.0)):
        activation.scale = scale
        activation.temperature.fill_(temperature)
        check(activation, inputs)
    assert set(calls) == {"rows"}


def test_parameters_keep_their_gradients_and_are_evaluated_as_numbers(calls):
    scale = torch.tensor(1.5, requires_grad=True)
    hidden, weight, target = layer()
    linear_cross_entropy(hidden, weight, target, activation=lambda z: scale * z).backward()
    assert scale.grad is not None
    assert not calls
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, target, activation=lambda z: scale * z)
    torch.testing.assert_close(loss, F.cross_entropy(1.5 * hidden @ weight.T, target))
    assert calls == ["rows"]


@pytest.mark.parametrize("reentrant", [True, False])
def test_under_checkpointing(reentrant, calls):
    function = FUNCTIONS["sigsoftmax"]
    hidden, weight, target = layer()
    expected = losses_and_gradients(hidden, weight, target, function)
    hidden.requires_grad_()
    weight.requires_grad_()
    loss = checkpoint(
        lambda h: linear_cross_entropy(h, weight, target, activation=function, reduction="none"),
        hidden,
        use_reentrant=reentrant,
    )
    loss.sum().backward()
    for found, exact_one in zip((loss.detach(), hidden.grad, weight.grad), expected, strict=True):
        torch.testing.assert_close(found, exact_one)
    assert set(calls) == {"rows"}


@pytest.mark.parametrize(
    "function",
    [
        lambda z: torch.log(torch.relu(z) + torch.finfo(z.dtype).eps),
        lambda z: z * len(z.shape) / 2 * z.shape[-1] ** -0.1,
        lambda z: z.where(torch.tensor(z.dtype == torch.float32), -z),
    ],
    ids=["precision", "shape", "dtype"],
)
def test_a_function_sees_rows_of_float32_alone(function, calls):
    inputs = layer()
    with torch.autocast("cpu", torch.bfloat16):
        found = losses_and_gradients(*inputs, function)
        naive = losses_and_gradients(*inputs, function, backend="reference")
    for ours, theirs in zip(found, naive, strict=True):
        assert (ours - theirs).norm() <= 0.05 * theirs.norm()


@pytest.mark.parametrize("function", [lambda z: z + 10 * F.relu(z - 0.1), lambda z: torch.where(z > 0.1, z + 2, z)])
def test_kinks_are_where_float32_has_them(function, calls):
    hidden, weight, target = layer()
    results = []
    for backend in ("chunked", "reference"):
        bias = torch.full((100,), 0.1).index_fill(0, torch.arange(50), 0.3).requires_grad_()
        loss = linear_cross_entropy(hidden, 0 * weight, target, bias, activation=function, backend=backend)
        results.append((loss.detach(), torch.autograd.grad(loss, bias)[0]))
    torch.testing.assert_close(results[0], results[1])
    assert calls == ["rows"]


@pytest.mark.parametrize("function", [lambda z: 100.1 * z, lambda z: z**3, lambda z: z / 0.003])
def test_losses_of_rows_that_are_certain_keep_their_digits(function, calls):
    hidden, weight, _ = layer(scale=3.0)
    target = (hidden @ weight.T).argmax(-1)
    loss, *gradients = losses_and_gradients(hidden, weight, target, function)
    expected, *exact_ones = losses_and_gradients(hidden, weight, target, function, backend="reference")
    assert loss.min() >= 0
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-7)
    for ours, theirs in zip(gradients, exact_ones, strict=True):
        assert (ours - theirs).norm() <= 0.1 * theirs.norm() + 1e-6
    assert calls == ["rows"]


def test_a_compiled_function_stays_compiled(calls):
    runs = []

    def backend(graph, example_inputs):
        return lambda *args: runs.append(1) or graph.forward(*args)

    function = torch.compile(lambda z: 30 * torch.tanh(z / 30), fullgraph=True, backend=backend)
    logits = torch.randn(3, 4)
    function(logits)
    losses_and_gradients(*layer(), function)
    before = len(runs)
    function(logits)
    assert len(runs) == before + 1
    assert calls == ["rows"]


def test_a_registered_derivative_needs_no_autograd(calls, monkeypatch):
    def function(z):
        return torch.from_numpy(5 * np.tanh(z.numpy() / 5))

    monkeypatch.setitem(activations._REGISTRY, "of numpy", function)
    slope = lambda z: torch.from_numpy(1 - np.tanh(z.numpy() / 5) ** 2)  # noqa: E731
    monkeypatch.setitem(activations._DERIVATIVES, "of numpy", slope)
    found = losses_and_gradients(*layer(), "of numpy")
    expected = losses_and_gradients(*layer(), lambda z: 5 * torch.tanh(z / 5), backend="reference")
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert not calls


def test_without_gradients_autograd_is_off(calls):
    scale = nn.Parameter(torch.tensor(-1.0))

    def function(z):
        scale.clamp_(min=0.5)
        return scale * z

    hidden, weight, target = layer()
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, target, activation=function)
    torch.testing.assert_close(loss, F.cross_entropy(0.5 * hidden @ weight.T, target))


def test_anomaly_detection_finds_nothing(calls):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Error detected")
        with torch.autograd.set_detect_anomaly(True):
            losses_and_gradients(*layer(), FUNCTIONS["sigsoftmax"])
    assert calls == ["rows"]


def test_threads_leave_the_process_as_it_was():
    """What is switched off while a function is recorded is the process's."""
    function = torch.compile(lambda z: 2 * z, backend=lambda graph, example_inputs: graph.forward)
    with torch.autograd.set_detect_anomaly(True), ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda _: evaluator(FUNCTIONS["sigsoftmax"], 10, gradient=True), range(300)))
        assert torch.is_anomaly_enabled()
    assert function(torch.ones(2)).tolist() == [2.0, 2.0]
    assert torch._dynamo.eval_frame._stance.stance == "default"


def test_a_derivative_of_another_shape_is_no_program(monkeypatch):
    one = torch.tensor(1.0)
    monkeypatch.setitem(activations._REGISTRY, "whole", lambda z: z + 0)
    monkeypatch.setitem(activations._DERIVATIVES, "whole", lambda z: one)
    assert evaluator(activations._REGISTRY["whole"], 1000, gradient=True) is None


def test_hooks_for_saved_tensors_are_no_hindrance(calls):
    def function(z):
        cube = torch.func.grad(lambda x: (x**4 / 4).sum())(z)
        return z + 0.01 * cube.detach()

    check(function, layer())
    calls.clear()
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        losses_and_gradients(*layer(), FUNCTIONS["sigsoftmax"])
    assert calls == ["rows"]


def test_a_masked_type_is_no_loss_of_ignored_tokens(calls, monkeypatch):
    monkeypatch.setattr(chunks, "general", None)
    hidden, weight, target = layer()
    target[3] = -100
    target[target == 0] = 1
    bias = torch.zeros(100).index_fill(0, torch.tensor([0]), -torch.inf)
    loss = linear_cross_entropy(hidden, weight, target, bias, activation=FUNCTIONS["sigsoftmax"])
    plain = F.cross_entropy(FUNCTIONS["sigsoftmax"](hidden @ weight.T + bias), target)
    torch.testing.assert_close(loss, plain)


def test_nothing_is_recorded_while_torchscript_traces(monkeypatch):
    """It would follow the recording, too, and crash."""
    monkeypatch.setattr(torch.jit, "is_tracing", lambda: True)
    assert evaluator(FUNCTIONS["soft cap"], 10, gradient=False) is None


def test_in_a_compiled_model(calls):
    function = FUNCTIONS["soft cap"]
    hidden, weight, target = layer()
    expected = losses_and_gradients(hidden, weight, target, function)[0].mean()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss = torch.compile(lambda h: linear_cross_entropy(2 * h / 2, weight, target, activation=function))(hidden)
    torch.testing.assert_close(loss, expected)
    assert calls
