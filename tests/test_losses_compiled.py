import os
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from references import FORMULAS
from torch.nn import functional as F

from lit_sigsoftmax.activations import get_activation
from lit_sigsoftmax.losses import compiled
from lit_sigsoftmax.losses.compiled import COMPILE_VARIABLE, available, evaluator, score_and_differentiate, serves
from lit_sigsoftmax.storage import CACHE_VARIABLE, cache_dir

COMPILER = os.environ.get("CXX") or "c++"

needs_compiler = pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"needs a C++ compiler: no {COMPILER}")
every_activation = pytest.mark.parametrize("name", FORMULAS)


@pytest.fixture(params=["compiled", "program"])
def kind_of_evaluator(request, monkeypatch):
    """Activations as they are compiled, and as programs."""
    if request.param == "program":
        monkeypatch.setattr(compiled, "serves", lambda name: False)
    return request.param


def of(name, gradient=True):
    """What takes an activation."""
    found = evaluator(get_activation(name), 10, gradient)
    assert (found.program is None) == compiled.serves(name)
    return found


def draw(rows, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, columns, generator=generator)
    return logits, torch.randint(columns, (rows,), generator=generator)


def exact(logits, target, name):
    """The loss of each row and the gradient of their sum, by autograd in float64."""
    logits = logits.double().requires_grad_()
    nll = F.cross_entropy(get_activation(name)(logits), target, reduction="none", ignore_index=-100)
    (gradient,) = torch.autograd.grad(nll.sum(), logits)
    return nll.detach(), gradient


LOGITS = {
    "ordinary": lambda z: 3 * z,
    "wide": lambda z: 1e4 * torch.tanh(z),
    "around 60": lambda z: 60 + 5 * z,
    "around -60": lambda z: -60 + 5 * z,
    "far above": lambda z: 1e4 + z,
    "far below": lambda z: -1e4 + z,
    "equal": lambda z: 0 * z - 7,
    "masked": lambda z: torch.where(torch.arange(z.shape[1]) % 3 == 1, -torch.inf, z),
}


@needs_compiler
@every_activation
@pytest.mark.parametrize("columns", [1, 3, 16, 1000, 33278])
@pytest.mark.parametrize("kind", LOGITS)
def test_rows_match_autograd_in_float64(kind, columns, name, kind_of_evaluator):
    noise, target = draw(5, columns)
    logits = LOGITS[kind](noise)
    target[logits.gather(1, target[:, None])[:, 0] == -torch.inf] = 0  # a masked target costs infinitely much
    nll, gradient = exact(logits, target, name)
    if kind == "masked":  # autograd has 0 / 0 there
        gradient = gradient.nan_to_num(0.0)

    actual = score_and_differentiate(logits, target, of(name), differentiate=True)

    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), nll, rtol=3e-7, atol=1e-6)
    torch.testing.assert_close(logits.double(), gradient, rtol=3e-7, atol=1e-6)


@needs_compiler
@every_activation
def test_gradient_of_a_small_probability_keeps_its_digits(name, kind_of_evaluator):
    logits, target = draw(8, 500)
    logits[:, 0] += 15  # the others have some e^-15 of the probability
    target[:] = 0
    _, gradient = exact(logits, target, name)
    score_and_differentiate(logits, target, of(name), differentiate=True)
    torch.testing.assert_close(logits[:, 1:].double(), gradient[:, 1:], rtol=3e-6, atol=0)


@needs_compiler
@every_activation
def test_without_gradient_the_logits_stay(name, kind_of_evaluator):
    logits, target = draw(7, 1100)
    before = logits.clone()
    nll = score_and_differentiate(logits, target, of(name, gradient=False), differentiate=False)
    assert torch.equal(logits, before)
    torch.testing.assert_close(nll, score_and_differentiate(logits, target, of(name), differentiate=True))


@needs_compiler
@every_activation
@pytest.mark.parametrize("differentiate", [True, False])
@pytest.mark.parametrize("place", [0, 7, 1050])
def test_nan_is_not_hidden(place, differentiate, name, kind_of_evaluator):
    logits, target = draw(2, 1060)
    logits[1, place] = torch.nan
    nll = score_and_differentiate(logits, target, of(name), differentiate)
    assert nll.isnan().tolist() == [False, True]


@needs_compiler
@every_activation
def test_threads_do_not_change_the_result(name, kind_of_evaluator):
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            logits, target = draw(50, 300)
            results.append((score_and_differentiate(logits, target, of(name), differentiate=True), logits))
    finally:
        torch.set_num_threads(before)
    for nll, gradient in results[1:]:
        assert torch.equal(nll, results[0][0])
        assert torch.equal(gradient, results[0][1])


@needs_compiler
def test_no_rows():
    logits, target = draw(0, 5)
    assert score_and_differentiate(logits, target, of("softmax"), differentiate=True).shape == (0,)


@needs_compiler
def test_serves_registered_names_alone():
    assert available()
    assert all(serves(name) for name in FORMULAS)
    assert not any(serves(name) for name in (None, "", "program", "torch.nn.functional.logsigmoid"))


@needs_compiler
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(2, 3).double()}, r"logits is \(2, 3\), torch.float64 on cpu: expected .*float32"),
        ({"logits": torch.zeros(3, 2).t()}, "logits .* contiguous"),
        ({"target": torch.zeros(2, dtype=torch.int32)}, "target is .*int32 .*expected .*int64"),
        ({"target": torch.zeros(3, dtype=torch.int64)}, r"target is \(3,\).*expected \(2,\)"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, message):
    arguments = {
        "logits": torch.zeros(2, 3),
        "target": torch.zeros(2, dtype=torch.int64),
        "evaluator": of("softmax"),
    }
    with pytest.raises(ValueError, match=message):
        score_and_differentiate(**{**arguments, **change}, differentiate=True)


@needs_compiler
@pytest.mark.parametrize("wrong", [3, -1])
def test_target_outside_the_vocabulary_is_an_error(wrong):
    logits, _ = draw(2, 3)
    with pytest.raises(IndexError, match=f"target {wrong} is out of bounds for a vocabulary of 3"):
        score_and_differentiate(logits, torch.tensor([0, wrong]), of("softmax"), differentiate=True)


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """An empty cache folder, and a module that has not looked for its library yet."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    compiled._library.cache_clear()
    yield tmp_path / "compiled"
    compiled._library.cache_clear()


def libraries(folder):
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


ASK = "from lit_sigsoftmax.losses.compiled import serves; print(serves('sigsoftmax'))"


@needs_compiler
@pytest.mark.slow
def test_processes_that_start_together_share_one_compilation(fresh):
    asking = [subprocess.Popen([sys.executable, "-c", ASK], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate()[0] for process in asking] == ["True\n", "True\n"]
    (library,) = libraries(fresh)
    assert fresh.stat().st_mode & 0o777 == 0o700
    written = (fresh / library).stat().st_mtime_ns

    assert available()
    assert (fresh / library).stat().st_mtime_ns == written


@pytest.mark.parametrize("switch", [{COMPILE_VARIABLE: "0"}, {"PATH": ""}])
def test_off_without_a_word(switch, fresh, monkeypatch):
    for variable, value in switch.items():
        monkeypatch.setenv(variable, value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not available()
        assert not serves("softmax")
        assert evaluator(torch.tanh, 10, gradient=True) is None
    assert not fresh.exists()


def test_a_compiler_that_is_not_there_is_named(fresh, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler -pipe")
    with pytest.warns(UserWarning, match="no compiler CXX='no-such-compiler -pipe'"):
        assert not available()


@needs_compiler
@pytest.mark.slow
def test_a_compiler_may_have_arguments(fresh, monkeypatch):
    monkeypatch.setenv("CXX", f"env {COMPILER} -pipe")
    assert serves("softmax")


def test_failing_compiler_warns_once(fresh, tmp_path, monkeypatch):
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'out of order' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.warns(UserWarning, match=f"could not be compiled(?s:.)*out of order(?s:.)*{COMPILE_VARIABLE}=0"):
        assert not available()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not serves("softmax")


def expose(folder):
    folder.mkdir()
    folder.chmod(0o777)


@needs_compiler
@pytest.mark.parametrize(
    ("spoil", "message"),
    [(expose, "can be written by others"), (lambda folder: folder.write_text(""), "File exists")],
    ids=["writable by others", "a file"],
)
def test_folder_that_is_not_safe_is_refused(spoil, message, fresh):
    spoil(fresh)
    with pytest.warns(UserWarning, match=message):
        assert not available()


@pytest.fixture
def library():
    """The file name of the library on this machine, from the cache that the other tests use."""
    assert available()
    (name,) = libraries(cache_dir() / "compiled")
    return name


@needs_compiler
def test_damaged_library_is_named(library, fresh):
    fresh.mkdir(mode=0o700)
    (fresh / library).write_bytes(b"damaged")  # before this process has loaded it from there, which it would keep
    with pytest.warns(UserWarning, match=library):
        assert not available()
