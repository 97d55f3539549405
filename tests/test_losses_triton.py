"""The Triton backend, on a GPU where there is one and in Triton's interpreter otherwise."""

import os
import subprocess
import sys
import textwrap
import warnings
from importlib.util import find_spec

import pytest
import torch
from references import KEEP_EVERY_TOKEN_POSSIBLE, probabilities
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lit_sigsoftmax.activations import get_activation
from lit_sigsoftmax.functional import linear_cross_entropy
from lit_sigsoftmax.losses import triton_backend
from lit_sigsoftmax.losses.reference import reference
from lit_sigsoftmax.losses.triton_backend import available, refusal, triton_linear_cross_entropy

ACTIVATIONS = ["softmax", "sigsoftmax", "sigmoid", "relu"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INSTALLED = find_spec("triton") is not None

needs_triton = pytest.mark.skipif(not INSTALLED, reason="Triton is not installed")
every_activation = pytest.mark.parametrize("name", ACTIVATIONS)


def make(n, v, d, dtype=torch.float32, bias=True, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=generator)
    weight = scale * torch.randn(v, d, generator=generator) / d**0.5
    offset = torch.randn(v, generator=generator) if bias else None
    target = torch.randint(v, (n,), generator=generator).to(DEVICE)
    leaves = [x if x is None else x.to(DEVICE, dtype).requires_grad_() for x in (hidden, weight, offset)]
    return (*leaves, target)


def run(backend, hidden, weight, bias, target, name="softmax", reduction="none", ignore_index=-100, upstream=None):
    """Loss and gradients, the missing bias left out."""
    loss = backend(hidden, weight, target, bias, get_activation(name), ignore_index=ignore_index, reduction=reduction)
    leaves = [x for x in (hidden, weight, bias) if x is not None]
    return loss.detach(), *torch.autograd.grad(loss, leaves, torch.ones_like(loss) if upstream is None else upstream)


def triton(*args, **kwargs):
    return run(triton_linear_cross_entropy, *args, **kwargs)


def exact(hidden, weight, bias, target, **kwargs):
    """The same in float64, by the reference."""
    wide = [None if x is None else x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    return run(reference, *wide, target, **kwargs)


def largest_error(actual, expected):
    return float((actual.double() - expected).abs().max())


# Values and gradients


@needs_triton
@every_activation
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("n", "v", "d"), [(1, 1, 1), (3, 5, 2), (128, 256, 64), (130, 259, 33), (2, 9000, 3)])
def test_agrees_with_float64(n, v, d, bias, name):
    """Shapes below, on and beyond the tiles' borders; an upstream gradient for each token."""
    hidden, weight, offset, target = make(n, v, d, bias=bias)
    upstream = torch.linspace(-1, 2, n, device=DEVICE)
    got = triton(hidden, weight, offset, target, name=name, upstream=upstream)
    expected = exact(hidden, weight, offset, target, name=name, upstream=upstream.double())
    for actual, value in zip(got, expected, strict=True):
        assert actual.dtype == torch.float32
        # relu's derivative, 1 / z, amplifies the logits' rounding where z is near zero
        tolerance = 1e-3 if name == "relu" else 3e-6
        torch.testing.assert_close(actual.double(), value, atol=tolerance * float(value.abs().max().clamp(1)), rtol=0)


@needs_triton
@every_activation
def test_agrees_with_probability_space(name):
    hidden, weight, bias, target = make(40, 300, 20)
    logits = hidden.double() @ weight.double().T + bias.double()
    p = probabilities(logits, get_activation(name)).gather(1, target[:, None])[:, 0]
    torch.testing.assert_close(triton(hidden, weight, bias, target, name=name)[0].double(), -p.log(), atol=2e-6, rtol=0)


@needs_triton
@every_activation
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_worse_than_naive(dtype, name):
    tensors = make(140, 300, 40, dtype, scale=3)
    upstream = torch.full((140,), 1.0, device=DEVICE)
    got, naive, expected = (
        triton(*tensors, name=name, upstream=upstream),
        run(reference, *tensors, name=name, upstream=upstream),
        exact(*tensors, name=name, upstream=upstream.double()),
    )
    assert got[0].dtype == torch.float32
    assert largest_error(got[0], expected[0]) < 2e-5
    assert largest_error(got[0], expected[0]) <= largest_error(naive[0], expected[0])
    for actual, other, value in zip(got[1:], naive[1:], expected[1:], strict=True):
        assert actual.dtype == dtype
        # The interpreter (3.9) truncates to bfloat16 where a GPU rounds: one unit in the last place more.
        allowance = torch.finfo(dtype).eps * float(value.abs().max())
        assert largest_error(actual, value) <= largest_error(other, value) + allowance


@needs_triton
@every_activation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits(dtype, name):
    """Logits of +-1e4, of every token or of one, have finite and right losses and finite gradients."""
    logits = torch.tensor([[1e4, -1e4, 0], [-1e4, -1e4, -1e4], [1e4, 1e4, 1e4], [-1e4, 0, -1e4]]).repeat(1, 100)
    hidden = torch.eye(4, device=DEVICE, dtype=dtype, requires_grad=True)
    weight = logits.T.to(DEVICE, dtype).contiguous().requires_grad_()
    for token in range(3):
        target = torch.full((4,), token, device=DEVICE)
        loss, *gradients = triton(hidden, weight, None, target, name=name)
        expected = exact(hidden, weight, None, target, name=name)[0]
        torch.testing.assert_close(loss.double(), expected, atol=2e-6, rtol=1e-6)
        assert all(gradient.isfinite().all() for gradient in gradients)


@needs_triton
@pytest.mark.parametrize("name", sorted(set(ACTIVATIONS) - KEEP_EVERY_TOKEN_POSSIBLE))
def test_minus_infinity_in_the_bias_masks(name):
    """A whole tile of masked entries among the others costs nothing and gets no gradient."""
    hidden, weight, bias, target = make(10, 600, 8)
    target = target % 200
    masked = torch.cat([bias[:200], torch.full((400,), -torch.inf, device=DEVICE)]).detach().requires_grad_()
    got = triton(hidden, weight, masked, target, name=name)
    expected = triton(
        hidden, weight[:200].detach().requires_grad_(), bias[:200].detach().requires_grad_(), target, name=name
    )
    torch.testing.assert_close(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1])
    for all_entries, kept in zip(got[2:], expected[2:], strict=True):
        torch.testing.assert_close(all_entries[:200], kept)
        assert not all_entries[200:].any()


@needs_triton
@pytest.mark.parametrize("name", ["softmax", "sigsoftmax", "sigmoid"])
def test_a_mask_over_more_than_is_combined_at_once(name):
    hidden, weight, bias, target = make(2, 9000, 3)
    masked = torch.cat([torch.full((8192,), -torch.inf, device=DEVICE), bias.detach()[8192:]]).requires_grad_()
    got = triton(hidden, weight, masked, target % 800 + 8192, name=name)
    kept = [x.detach()[8192:].requires_grad_() for x in (weight, bias)]
    expected = triton(hidden, *kept, target % 800, name=name)
    for actual, value in zip(got[:2], expected[:2], strict=True):
        torch.testing.assert_close(actual, value)
    assert not got[2][:8192].any()


@needs_triton
@every_activation
def test_nan_is_not_hidden(name):
    hidden, weight, bias, target = make(3, 10, 4)
    hidden.data[1, 2] = torch.nan
    loss = triton(hidden, weight, bias, target, name=name)[0]
    assert loss.isnan().tolist() == [False, True, False]


LOGITS = {
    "ordinary": lambda z: 3 * z,
    "wide": lambda z: 1e4 * torch.tanh(z),
    "around -60": lambda z: -60 + 5 * z,
    "equal": lambda z: 0 * z - 7,
}


@needs_triton
@every_activation
@pytest.mark.parametrize("columns", [1, 300, 4097])
@pytest.mark.parametrize("kind", LOGITS)
def test_rows_of_logits_become_losses_and_gradients(kind, columns, name):
    generator = torch.Generator().manual_seed(0)
    logits = LOGITS[kind](torch.randn(5, columns, generator=generator)).to(DEVICE)
    target = torch.randint(columns, (5,), generator=generator).to(DEVICE)
    log_g = get_activation(name)
    exact_logits = logits.double().requires_grad_()
    expected = F.cross_entropy(log_g(exact_logits), target, reduction="none")
    (gradient,) = torch.autograd.grad(expected.sum(), exact_logits)
    before = logits.clone()
    scored = triton_backend.score_and_differentiate(logits, target, log_g, differentiate=False)
    assert torch.equal(logits, before)
    assert torch.equal(scored, triton_backend.score_and_differentiate(logits, target, log_g, differentiate=True))
    torch.testing.assert_close(scored.double(), expected.detach(), rtol=1e-6, atol=3e-6)
    torch.testing.assert_close(logits.double(), gradient, rtol=1e-5, atol=1e-6)


@needs_triton
def test_rows_with_a_target_outside_cost_nan():
    logits = torch.zeros(3, 7, device=DEVICE)
    loss = triton_backend.score_and_differentiate(
        logits, torch.tensor([7, -100, 6], device=DEVICE), get_activation("softmax"), differentiate=True
    )
    assert loss.isnan().tolist() == [True, True, False]


@every_activation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_front_door_agrees_with_float64_here(dtype, name):
    """Whatever ``"auto"`` and ``"chunked"`` are on this machine: on a GPU, its kernels."""
    hidden, weight, bias, target = make(70, 300, 16, dtype)
    target[::7] = -100
    expected = exact(hidden, weight, bias, target, name=name, reduction="mean")
    for backend in ("auto", "chunked"):
        loss = linear_cross_entropy(hidden, weight, target, bias, activation=name, backend=backend)
        for actual, value in zip(
            (loss.detach(), *torch.autograd.grad(loss, (hidden, weight, bias))), expected, strict=True
        ):
            tolerance = (1e-3 if name == "relu" else 1e-5) if dtype == torch.float32 else 3e-2
            torch.testing.assert_close(
                actual.double(), value, rtol=tolerance, atol=tolerance * float(value.abs().max())
            )


# Targets and reductions


@needs_triton
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("ignore_index", [-100, 7])
def test_reductions_and_ignored_targets(reduction, ignore_index):
    hidden, weight, bias, target = make(133, 50, 16)
    target[::3] = ignore_index
    options = {"name": "sigsoftmax", "reduction": reduction, "ignore_index": ignore_index}
    got = triton(hidden, weight, bias, target, **options)
    for actual, value in zip(got, exact(hidden, weight, bias, target, **options), strict=True):
        torch.testing.assert_close(actual.double(), value, atol=2e-5, rtol=1e-5)
    assert not got[1][target == ignore_index].any()


@needs_triton
def test_targets_that_are_all_ignored():
    hidden, weight, bias, target = make(4, 9, 3)
    target.fill_(-100)
    for reduction, expected in (("mean", torch.nan), ("sum", 0.0)):
        loss, *gradients = triton(hidden, weight, bias, target, reduction=reduction)
        torch.testing.assert_close(loss, torch.tensor(expected, device=DEVICE), equal_nan=True)
        assert not any(gradient.any() for gradient in gradients)


@needs_triton
def test_a_target_outside_the_vocabulary_costs_nan():
    hidden, weight, bias, target = make(4, 300, 3)
    target[:3] = torch.tensor([300, -1, 511])
    loss = triton(hidden, weight, bias, target)[0]
    assert loss.isnan().tolist() == [True, True, True, False]


@needs_triton
def test_no_tokens():
    hidden, weight, bias, target = make(0, 20, 3)
    loss, d_hidden, d_weight, d_bias = triton(hidden, weight, bias, target)
    assert loss.shape == (0,)
    assert d_hidden.shape == (0, 3)
    assert not d_weight.any()
    assert not d_bias.any()


# Tiles, memory and work


class Recorder(TorchDispatchMode):
    """The names of the operations, and the most elements of a floating tensor that one returned."""

    def __init__(self):
        super().__init__()
        self.calls, self.largest = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.calls.append(function.overloadpacket.__name__)
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                self.largest = max(self.largest, tensor.numel())
        return result


@needs_triton
@pytest.mark.parametrize(("programs", "min_chunk"), [(1, 2**24), (3, 1), (1024, 1)])
def test_logits_are_never_held_whole(programs, min_chunk, monkeypatch):
    """Several tiles a program, several parts in the backward: same result, and small tensors where they are small."""
    monkeypatch.setattr(triton_backend, "PROGRAMS", programs)
    monkeypatch.setattr(triton_backend, "MIN_CHUNK", min_chunk)
    n, v, d = 150, 1300, 8
    tensors = make(n, v, d)
    upstream = torch.linspace(-1, 1, n, device=DEVICE)
    with Recorder() as recorder:
        got = triton(*tensors, name="sigsoftmax", upstream=upstream)
    for actual, value in zip(got, exact(*tensors, name="sigsoftmax", upstream=upstream.double()), strict=True):
        torch.testing.assert_close(actual.double(), value, atol=1e-5, rtol=1e-5)
    whole = n * v
    padded = n * -(-v // 32) * 32 if DEVICE == "cuda" else whole
    assert recorder.largest == padded if min_chunk > 1 else recorder.largest < whole / 4


@needs_triton
@pytest.mark.parametrize(("needed", "products"), [((0,), 1), ((1,), 1), ((2,), 0), ((0, 1, 2), 2)])
def test_only_what_is_needed_is_computed(needed, products):
    tensors = make(20, 32, 8)
    leaves = [x.detach().requires_grad_(i in needed) for i, x in enumerate(tensors[:3])]
    loss = triton_linear_cross_entropy(
        leaves[0], leaves[1], tensors[3], leaves[2], get_activation("softmax"), ignore_index=-100, reduction="sum"
    )
    with Recorder() as recorder:
        loss.backward()
    assert sum(name.startswith("mm") for name in recorder.calls) == products
    for i, (leaf, expected) in enumerate(zip(leaves, triton(*tensors, reduction="sum")[1:], strict=True)):
        assert (leaf.grad is not None) == (i in needed)
        assert leaf.grad is None or torch.equal(leaf.grad, expected)


@needs_triton
def test_any_strides():
    hidden, weight, bias, target = make(60, 70, 20)
    strided = (
        hidden.detach().T.contiguous().T.requires_grad_(),
        torch.cat([weight.detach()] * 2, 1)[:, :20].requires_grad_(),
        bias.detach().repeat_interleave(2)[::2].requires_grad_(),
        target.repeat_interleave(2)[::2],
    )
    assert not any(x.is_contiguous() for x in strided)
    for actual, expected in zip(triton(*strided), triton(hidden, weight, bias, target), strict=True):
        assert torch.equal(actual, expected)


@needs_triton
def test_same_bits_again():
    tensors = make(140, 300, 40)
    assert all(torch.equal(a, b) for a, b in zip(triton(*tensors), triton(*tensors), strict=True))


@needs_triton
def test_the_default_dtype_does_not_matter():
    """Lightning's ``precision="bf16-true"`` sets it for the whole step."""
    tensors = make(20, 30, 8, torch.bfloat16)
    expected = triton(*tensors)
    torch.set_default_dtype(torch.bfloat16)
    try:
        got = triton(*tensors)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


# What it takes and refuses


@needs_triton
def test_autocast_casts_as_linear_does():
    tensors = make(20, 30, 8)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        loss, *gradients = triton(*tensors)
    halves = [x.detach().bfloat16().requires_grad_() for x in tensors[:2]]
    expected, *expected_gradients = triton(*halves, *tensors[2:])
    assert torch.equal(loss, expected)
    for actual, value in zip(gradients, expected_gradients, strict=True):
        assert actual.dtype == torch.float32
        assert torch.equal(actual, value.float())


@needs_triton
@every_activation
@pytest.mark.parametrize("ignored", [False, True])
def test_mixture_through_the_front_door(name, ignored):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(9, 3, 5, generator=generator), torch.randn(20, 5, generator=generator)
    log_prior, target = torch.randn(9, 3, generator=generator).log_softmax(-1), torch.arange(9, device=DEVICE)
    if ignored:
        target[4] = -100
    found = []
    for backend in ("triton", "reference"):
        inputs = [x.to(DEVICE, copy=True).requires_grad_() for x in (hidden, weight, log_prior)]
        loss = linear_cross_entropy(
            inputs[0], inputs[1], target, log_prior=inputs[2], activation=name, reduction="none", backend=backend
        )
        found.append((loss, *torch.autograd.grad((loss * torch.linspace(0, 1, 9, device=DEVICE)).sum(), inputs)))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@needs_triton
def test_penalties_are_refused():
    hidden, weight, target = (x.to(DEVICE) for x in (torch.randn(3, 4), torch.randn(5, 4), torch.arange(3)))
    for penalty in ({"label_smoothing": 0.1}, {"z_loss": 0.1}):
        with pytest.raises(ValueError, match=r"neither label_smoothing nor z_loss.*'chunked'"):
            linear_cross_entropy(hidden, weight, target, backend="triton", **penalty)


@needs_triton
def test_second_derivatives_name_the_reference():
    hidden, weight, bias, target = make(4, 9, 3)
    loss = triton_linear_cross_entropy(
        hidden, weight, target, bias, get_activation("softmax"), ignore_index=-100, reduction="mean"
    )
    with pytest.raises(RuntimeError, match="backend='reference'"):
        torch.autograd.grad(loss, hidden, create_graph=True, retain_graph=True)
    with pytest.raises(RuntimeError, match=r"no batched gradients.*backend='reference'"):
        torch.autograd.grad(loss * torch.ones(2).to(loss), hidden, torch.eye(2).to(loss), is_grads_batched=True)


@needs_triton
def test_transforms_and_forward_mode_name_the_reference():
    hidden, weight, bias, target = (x.detach() for x in make(4, 9, 3))

    def loss(weight):
        log_g = get_activation("softmax")
        return triton_linear_cross_entropy(hidden, weight, target, bias, log_g, ignore_index=-100, reduction="mean")

    for transform in (torch.func.grad, torch.func.jacrev, torch.func.jacfwd, torch.func.vmap):
        given = weight[None] if transform is torch.func.vmap else weight
        with pytest.raises(RuntimeError, match=r"torch.func transforms.*backend='reference'"):
            transform(loss)(given)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=r"no forward mode.*backend='reference'"):
        loss(forward_ad.make_dual(weight, torch.ones_like(weight)))


@needs_triton
@pytest.mark.parametrize(
    ("dtypes", "name", "message"),
    [
        ((torch.float64,) * 3, "softmax", "hidden is torch.float64.*'chunked'"),
        ((torch.float32, torch.float32, torch.float64), "softmax", "bias is torch.float64.*'chunked'"),
        ((torch.float32,) * 3, lambda z: z, "no kernel for the output activation.*sigsoftmax.*'chunked'"),
        (
            (torch.float32, torch.bfloat16, torch.float32),
            "softmax",
            "hidden is torch.float32 and weight torch.bfloat16",
        ),
    ],
)
def test_refuses_with_a_reason(dtypes, name, message):
    tensors = make(4, 9, 3)
    with pytest.raises(ValueError, match=message):
        triton(*(x.detach().to(dtype) for x, dtype in zip(tensors, dtypes, strict=False)), tensors[3], name=name)


@pytest.mark.parametrize("missing", ["Triton", "GPU"])
def test_refuses_without_triton_or_gpu(missing, monkeypatch):
    if missing == "Triton":
        monkeypatch.setattr(triton_backend, "_installed", lambda: False)
    else:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not available()
    tensors = [x.cpu() for x in make(4, 9, 3)]
    assert "Triton or a GPU is missing" in str(refusal(*tensors[:3], get_activation("softmax")))
    with pytest.raises(ValueError, match=r"Triton or a GPU is missing.*'chunked'"):
        triton(*tensors)


@needs_triton
def test_a_break_in_the_graph_of_a_compiled_model():
    hidden, weight, _, target = make(40, 50, 8)

    def step(hidden, weight):
        return linear_cross_entropy(torch.tanh(hidden), weight, target, activation="sigsoftmax", backend="triton")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = torch.compile(step, backend="eager")(hidden, weight)
    inputs, expected = (hidden, weight), step(hidden, weight)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs))


def test_importing_it_does_not_import_triton():
    code = (
        "import sys, lit_sigsoftmax.losses.triton_backend; assert not any(m.startswith('triton') for m in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@needs_triton
@pytest.mark.slow
def test_compiles_for_gpus(tmp_path):
    """Down to machine code, which needs no GPU. The interpreter accepts what the compiler does not."""
    code = """
        from triton import compile
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
        from lit_sigsoftmax.losses import triton_kernels as kernels

        SIZES = ["n_rows", "vocab_size", "span", "spans", "first", "grad_stride", "stride", "ignore_index"]
        TYPES = {"target": "*i64", **dict.fromkeys(SIZES, "i32")}
        TILE = {
            "precision": "ieee", "block_n": 16, "block_v": 16, "block_d": 16, "hidden_size": 70,
            "differentiate": True, "block": 64, "block_spans": 64,
        }

        def check(kernel, activation, dtype, bias, capability):
            constants = {**TILE, "activation": activation, **({} if bias else {"bias": None, "d_bias": None})}
            floats = dict.fromkeys(["hidden", "weight", "bias", "d_logits"], "*" + dtype)
            names = kernel.arg_names
            signature = {x: "constexpr" if x in constants else {**TYPES, **floats}.get(x, "*fp32") for x in names}
            constants = {x: value for x, value in constants.items() if x in names}
            source = ASTSource(kernel, signature, constants)
            assert compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]

        for activation in kernels.ACTIVATIONS.values():
            check(kernels.gradient_kernel, activation, "bf16", True, 90)
            check(kernels.rows_kernel, activation, "fp32", True, 90)
        check(kernels.gradient_kernel, activation, "fp32", False, 80)
        check(kernels.statistics_kernel, activation, "fp16", True, 90)
        check(kernels.combine_kernel, None, "fp32", True, 90)
    """
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, env=environment)
