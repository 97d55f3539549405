import functools
import os
import signal
import subprocess
import sys
import textwrap
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from mpmath import log as mp_log
from mpmath import mpf
from references import FORMULAS, KEEP_EVERY_TOKEN_POSSIBLE, LINEAR_IN_LOG_SPACE, press_rank
from torch import nn

from lit_sigsoftmax.activations import activation_spec, available_activations, get_activation, register_activation
from lit_sigsoftmax.functional import linear_cross_entropy, log_normalize

every_activation = pytest.mark.parametrize("name", available_activations())


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    """The import name of a user's file."""
    name = "a_users_activations"
    source = """
        import torch
        from torch import nn
        NUMBER = 3
        def double(z): return 2 * z
        class Scale(nn.Module):
            def __init__(self, by=2.0):
                super().__init__()
                self.by = nn.Parameter(torch.tensor(by))
            def forward(self, z): return self.by * z
        class NoModule:
            def __call__(self, z): return z
    """
    Path(tmp_path, f"{name}.py").write_text("\n".join(line[8:] for line in source.splitlines()))
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    sys.modules.pop(name, None)


# Every activation


@every_activation
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_is_elementwise_and_keeps_shape_and_dtype(name, dtype):
    log_g = get_activation(name)
    z = 5 * torch.randn(3, 4, 7, dtype=dtype, generator=torch.Generator().manual_seed(0))
    scores = log_g(z)
    assert (scores.shape, scores.dtype) == (z.shape, dtype)
    alone = torch.stack([log_g(entry) for entry in z.flatten()]).view_as(z)
    torch.testing.assert_close(scores, alone)


@every_activation
def test_scores_and_gradients_are_finite_at_large_logits(name):
    z = torch.tensor([-1e4, -150.0, -1.0, 0.0, 1.0, 150.0, 1e4], requires_grad=True)
    scores = get_activation(name)(z)
    scores.sum().backward()
    assert scores.isfinite().all()
    assert z.grad.isfinite().all()


@every_activation
def test_gradient(name):
    z = torch.tensor([[-9.0, -1.5, -0.3, 0.4, 2.0, 8.0]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(get_activation(name), z)


@every_activation
def test_minus_infinity_masks(name):
    """Values and gradients of the other entries are those of the shorter vector."""
    kept = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    full = torch.tensor([0.5, -torch.inf, -1.0, 2.0, -torch.inf], dtype=torch.float64)
    entries = full.isfinite()
    log_g = get_activation(name)
    if name in KEEP_EVERY_TOKEN_POSSIBLE:
        assert log_normalize(full, log_g).isfinite().all()
        return
    short, long = kept.requires_grad_(), full.requires_grad_()
    expected, log_p = log_normalize(short, log_g), log_normalize(long, log_g)
    expected[0].backward()
    log_p[0].backward()
    torch.testing.assert_close(log_p[entries], expected)
    assert (log_p[~entries] == -torch.inf).all()
    torch.testing.assert_close(long.grad[entries], short.grad)
    assert (long.grad[~entries] == 0).all()


@every_activation
def test_rank_of_the_log_probabilities(name):
    """The softmax bottleneck: hidden_size + 1 if log g is linear, and full if it is not."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 5, dtype=torch.float64, generator=generator) for n in (400, 60))
    log_p = log_normalize(hidden @ weight.T, get_activation(name))
    assert press_rank(log_p) == (6 if name in LINEAR_IN_LOG_SPACE else 60)


@pytest.mark.parametrize("name", FORMULAS)
def test_formula_of_the_paper(name):
    z = torch.tensor([-700.0, -40.0, -3.0, -0.1, 0.0, 0.2, 1.0, 25.0, 700.0], dtype=torch.float64)
    for value, score in zip(z.tolist(), get_activation(name)(z).tolist(), strict=True):
        exact = mp_log(FORMULAS[name](mpf(value)))
        assert abs(score - exact) <= 1e-15 * max(abs(exact), 1), value


# Registry


def test_available_activations_are_sorted_and_hold_the_papers():
    names = available_activations()
    assert list(names) == sorted(names)
    assert set(FORMULAS) <= set(names)


def test_a_registered_function_serves_by_its_name_everywhere(registry):
    @register_activation("doubled")
    def doubled(z):
        return 2 * z

    assert "doubled" in available_activations()
    assert get_activation("doubled") is doubled
    assert activation_spec(doubled) == "doubled"
    hidden, weight, target = torch.randn(4, 3), torch.randn(6, 3), torch.arange(4)
    loss = linear_cross_entropy(hidden, weight, target, activation="doubled")
    torch.testing.assert_close(loss, nn.functional.cross_entropy(2 * hidden @ weight.T, target))


def test_a_registered_module_class_is_built_anew_for_every_user(registry):
    @register_activation("learned_scale")
    class LearnedScale(nn.Module):
        def __init__(self):
            super().__init__()
            self.by = nn.Parameter(torch.ones(()))

        def forward(self, z):
            return self.by * z

    first, second = get_activation("learned_scale"), get_activation("learned_scale")
    assert type(first) is type(second) is LearnedScale
    assert first.by is not second.by


SCALE = torch.ones((), requires_grad=True)


@pytest.mark.parametrize(
    ("log_g", "derivative", "message"),
    [
        (lambda z: z + z.tanh(), lambda z: 1 - z.tanh() ** 2, r"which at z = -3.7 is .*the function's is \[\[1.00"),
        (lambda z: 2 * z, lambda z: z.mean(), "which at z"),
        (lambda z: z.mul_(2), lambda z: torch.full_like(z, 2.0), "changes its input"),
        (nn.Softplus, torch.sigmoid, "a class.*leave the derivative out"),
        (lambda z: SCALE * z, torch.ones_like, "holds tensors that want a gradient"),
    ],
)
def test_a_derivative_that_is_not_the_functions_is_refused(log_g, derivative, message, registry):
    with pytest.raises(ValueError, match=message):
        register_activation("wrong", derivative=derivative)(log_g)
    assert "wrong" not in available_activations()
    register_activation("wrong")(log_g)  # and its name is still free


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_process_that_has_registered_can_fork():
    """One that has OpenMP's threads cannot: the child stops at its first parallel operation."""
    code = textwrap.dedent("""
        import os
        import torch

        torch.set_num_threads(2)
        from lit_sigsoftmax.activations import register_activation

        register_activation("twice", derivative=lambda z: torch.full_like(z, 2))(lambda z: 2 * z)
        child = os.fork()
        if not child:
            torch.ones(1_000_000).exp_()
            os._exit(0)
        os.waitpid(child, 0)
    """)
    with subprocess.Popen([sys.executable, "-c", code], start_new_session=True) as process:
        try:
            assert process.wait(timeout=60) == 0
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # the child too


@every_activation
def test_a_name_is_registered_once(name):
    z = torch.tensor([-1.0, 2.0])
    before = get_activation(name)(z)
    with pytest.raises(ValueError, match=rf"'{name}' is already registered.*another name"):
        register_activation(name)(lambda z: 5 * z)
    assert torch.equal(get_activation(name)(z), before)


# Specifications


def test_import_path_of_a_function(user_module):
    assert get_activation(f"{user_module}.double")(torch.tensor(3.0)) == 6


def test_import_path_of_a_module_class(user_module):
    assert get_activation(f"{user_module}.Scale")(torch.tensor(3.0)) == 6


@pytest.mark.parametrize(("init_args", "expected"), [({"by": 5.0}, 15), ({}, 6), (None, 6)])
def test_class_path_with_init_args(user_module, init_args, expected):
    log_g = get_activation({"class_path": f"{user_module}.Scale", "init_args": init_args})
    assert isinstance(log_g, nn.Module)
    assert log_g(torch.tensor(3.0)) == expected
    assert get_activation({"class_path": f"{user_module}.Scale"})(torch.tensor(3.0)) == 6


def test_callables_serve_as_they_are():
    def function(z):
        return z

    for log_g in (function, nn.LogSigmoid(), functools.partial(torch.mul, 2)):
        assert get_activation(log_g) is log_g
    assert isinstance(get_activation(nn.LogSigmoid), nn.LogSigmoid)


@pytest.mark.parametrize("spec", ["sigsoftmx", "Sigsoftmax"])
def test_unknown_name_suggests_the_nearest(spec):
    with pytest.raises(
        ValueError, match=rf"unknown output activation '{spec}'.*[Dd]id you mean 'sigsoftmax'"
    ) as caught:
        get_activation(spec)
    assert all(name in str(caught.value) for name in available_activations())
    assert "import path" in str(caught.value)


@pytest.mark.parametrize("spec", ["", "nothing_like_it"])
def test_unknown_name_without_a_near_one(spec):
    with pytest.raises(ValueError, match="unknown output activation") as caught:
        get_activation(spec)
    assert "mean" not in str(caught.value)


@pytest.mark.parametrize("path", ["no_such_module.f", "a_users_activations.no_such_name"])
def test_import_path_that_does_not_resolve(user_module, path):
    for spec in (path, {"class_path": path}):
        with pytest.raises(ValueError, match=f"'{path}' cannot be imported: .*no_such"):
            get_activation(spec)


def test_import_path_of_something_else(user_module):
    with pytest.raises(TypeError, match=f"'{user_module}.NUMBER' is a int, not a function"):
        get_activation(f"{user_module}.NUMBER")


@pytest.mark.parametrize("name", ["NoModule", "double"])
def test_class_path_that_is_no_module_class(user_module, name):
    with pytest.raises(TypeError, match=rf"'{user_module}\.{name}' .* not an nn.Module class"):
        get_activation({"class_path": f"{user_module}.{name}"})


def test_a_specification_cannot_start_a_program(tmp_path):
    file = tmp_path / "made"
    command = {"args": [sys.executable, "-c", f"open({str(file)!r}, 'w')"]}
    for spec in ("subprocess.Popen", {"class_path": "subprocess.Popen", "init_args": command}, subprocess.Popen):
        with pytest.raises(TypeError, match=r"not an nn\.Module class"):
            get_activation(spec)
    assert not file.exists()


def test_init_args_that_do_not_fit(user_module):
    spec = {"class_path": f"{user_module}.Scale", "init_args": {"factor": 2}}
    with pytest.raises(TypeError, match=rf"'{user_module}\.Scale'.*'factor': 2.*unexpected keyword"):
        get_activation(spec)
    with pytest.raises(TypeError, match=r"'torch\.nn\.Linear'.*missing"):
        get_activation("torch.nn.Linear")


def test_mapping_with_other_keys():
    with pytest.raises(ValueError, match=r"'class_path'.*'init_args', not .*'args'"):
        get_activation({"class_path": "torch.nn.LogSigmoid", "args": {}})
    with pytest.raises(ValueError, match=r"'class_path'.*'init_args'") as caught:
        get_activation({"init_args": {}})
    assert "True" not in str(caught.value)


@pytest.mark.parametrize("spec", [3, None, ["sigsoftmax"]])
def test_specification_of_another_type(spec):
    with pytest.raises(TypeError, match=f"a name, an import path, a mapping or a callable, not {type(spec).__name__}"):
        get_activation(spec)


# Specifications as data


@every_activation
def test_registered_activations_are_recorded_by_name(name):
    assert activation_spec(name) == name
    log_g = get_activation(name)
    if not isinstance(log_g, nn.Module):  # whose parameters no name tells
        assert activation_spec(log_g) == name


def test_what_can_be_imported_is_recorded_by_path(user_module):
    for spec in (f"{user_module}.double", f"{user_module}.Scale", {"class_path": f"{user_module}.Scale"}):
        assert activation_spec(spec) == spec
    double = get_activation(f"{user_module}.double")
    assert activation_spec(double) == f"{user_module}.double"
    assert get_activation(activation_spec(double)) is double
    assert activation_spec(nn.LogSigmoid) == "torch.nn.modules.activation.LogSigmoid"


def custom_callables():
    def local(z):
        return z

    in_main = lambda z: z  # noqa: E731
    in_main.__module__, in_main.__qualname__ = "__main__", "log_g"  # as in a script that is run
    return {
        "lambda": lambda z: z,
        "local": local,
        "__main__": in_main,
        "module": nn.LogSigmoid(),
        "partial": functools.partial(torch.mul, 2),
    }


@pytest.mark.parametrize("kind", custom_callables())
def test_what_cannot_be_imported_is_recorded_as_custom_and_refused(kind):
    spec = activation_spec(custom_callables()[kind])
    assert set(spec) == {"custom"}
    assert isinstance(spec["custom"], str)
    with pytest.raises(ValueError, match=r"custom callable.*activation=\.\.\.") as caught:
        get_activation(spec)
    assert spec["custom"] in str(caught.value)
