"""The rank of a log-probability matrix, against a dense SVD and on matrices whose rank is known."""

import math
import subprocess
import sys

import pytest
import torch

from lit_sigsoftmax.activations import available_activations, get_activation
from lit_sigsoftmax.analysis import Spectrum, effective_rank, log_prob_rank, plot_spectra, spectrum
from lit_sigsoftmax.functional import log_normalize

DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def log_probs(n_rows, n_columns, hidden_size, activation="softmax", bias=False, dtype=DOUBLE):
    """What a head of this hidden size says in as many contexts, computed in ``dtype`` throughout."""
    hidden, weight = torch.randn(n_rows, hidden_size, dtype=dtype), torch.randn(hidden_size, n_columns, dtype=dtype)
    return log_normalize(hidden @ weight + bias * torch.randn(n_columns, dtype=dtype), get_activation(activation))


def with_singular_values(values, n_rows):
    """A matrix of (n_rows, len(values)) with these singular values."""
    left = torch.linalg.qr(torch.randn(n_rows, len(values), dtype=DOUBLE)).Q
    right = torch.linalg.qr(torch.randn(len(values), len(values), dtype=DOUBLE)).Q
    return left * torch.as_tensor(values, dtype=DOUBLE) @ right


def press(values, n_rows, n_columns, eps):
    """The count as the literature's code has it."""
    return int((values > 0.5 * math.sqrt(n_rows + n_columns + 1) * values[0] * eps).sum())


# Against a dense SVD

SHAPES = [(400, 60, 5), (3000, 500, 20), (1500, 400, 100), (300, 900, 40), (100, 40, 60), (1, 7, 3), (257, 1100, 250)]


@pytest.mark.parametrize("activation", available_activations())
@pytest.mark.parametrize("shape", SHAPES)
def test_the_spectrum_is_that_of_a_dense_svd(shape, activation):
    matrix = log_probs(*shape, activation)
    dense, found = torch.linalg.svdvals(matrix), spectrum(matrix)
    k = len(found.singular_values)
    assert (found.n_rows, found.n_columns, found.dtype) == (*shape[:2], DOUBLE)
    assert torch.allclose(found.singular_values, dense[:k], rtol=0, atol=1e-14 * dense[0])
    assert (dense[k:] < 1e-14 * dense[0]).all()
    assert found.log_prob_rank() == log_prob_rank(matrix) == press(dense, *shape[:2], 2**-52)
    for eps in (0.1, 1e-3, 1e-5):
        held = dense.square().cumsum(0) >= (1 - eps) * dense.square().sum()
        assert effective_rank(matrix, eps) == 1 + int(held.nonzero()[0])
    assert effective_rank(matrix) == effective_rank(matrix, 1e-3)


# Matrices of known rank


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("hidden_size", [1, 7, 30])
def test_softmax_has_a_rank_of_one_more_than_the_hidden_size_and_two_with_a_bias(hidden_size, dtype):
    assert log_prob_rank(log_probs(1000, 200, hidden_size, dtype=dtype)) == hidden_size + 1
    assert log_prob_rank(log_probs(1000, 200, hidden_size, bias=True, dtype=dtype)) == hidden_size + 2
    assert log_prob_rank(log_probs(1000, 200, hidden_size, "sigsoftmax")) > hidden_size + 2


@pytest.mark.parametrize("smallest", [1e-7, 1e-10, 1e-13])
@pytest.mark.parametrize("n_columns", [60, 800])
def test_small_singular_values_that_a_gram_matrix_loses_are_counted(smallest, n_columns):
    """20 of size one, 20 that are small: those below 1e-8 of the largest are not to be seen in the squared matrix."""
    values = [1.0] * 20 + [smallest] * 20 + [0.0] * (n_columns - 40)
    matrix = with_singular_values(values, 2000)
    assert log_prob_rank(matrix) == 40
    squared = torch.linalg.eigvalsh(matrix.T @ matrix).clamp(min=0).sqrt().flip(0)
    assert bool(((squared[20:40] / smallest - 1).abs() < 0.5).all()) == (smallest > 1e-8)


@pytest.mark.parametrize("n_columns", [50, 400])
def test_the_count_is_exact_down_to_the_threshold(n_columns):
    threshold = 0.5 * math.sqrt(1000 + n_columns + 1) * 2**-52
    values = [1.0] * 10 + [1.5 * threshold] * 5 + [0.5 * threshold] * 5 + [0.0] * (n_columns - 20)
    assert log_prob_rank(with_singular_values(values, 1000)) == 15


@pytest.mark.parametrize(("noise", "count"), [(0, 10), (1e-20, 10), (1e-12, 300)])
def test_noise_makes_the_count_full_and_leaves_the_effective_rank(noise, count):
    matrix = with_singular_values([10.0 - i for i in range(10)] + [0.0] * 290, 1000)
    matrix = matrix + noise * torch.randn_like(matrix)
    assert log_prob_rank(matrix) == count
    assert effective_rank(matrix, 1e-5) == 10
    assert effective_rank(matrix, 0.5) == 3  # 100 + 81 + 64 of 385


def test_a_float64_spectrum_can_be_counted_at_the_precision_of_the_published_counts():
    values = [1.0] * 5 + [1e-8] * 5 + [0.0] * 40
    found = spectrum(with_singular_values(values, 500))
    assert (found.log_prob_rank(), found.log_prob_rank(torch.float32)) == (10, 5)
    assert found.press_threshold(torch.float32) == pytest.approx(0.5 * math.sqrt(551) * 2**-23)


# In blocks


@pytest.mark.parametrize("activation", ["softmax", "sigsoftmax"])
@pytest.mark.parametrize("size", [1, 7, 256, 600])
def test_the_blocks_may_be_cut_anywhere(size, activation):
    matrix = log_probs(1000, 80, 6, activation)
    whole = spectrum(matrix)
    blocks = (block for part in matrix.split(size) for block in (part, part[:0]))  # a generator, empty blocks and all
    assert torch.equal(spectrum(blocks).singular_values, whole.singular_values)


@pytest.mark.parametrize("activation", ["softmax", "sigsoftmax"])
def test_a_block_may_be_written_over_when_the_next_is_due(activation):
    matrix, buffer = log_probs(1000, 80, 6, activation), torch.empty(100, 80, dtype=DOUBLE)
    again = spectrum(buffer.copy_(block) for block in matrix.split(100))
    assert torch.equal(again.singular_values, spectrum(matrix).singular_values)


def test_directions_that_come_late_are_found():
    """Zeros first, then small rows of one space, then large ones of another, then the same again."""
    first, second = (torch.randn(600, 10, dtype=DOUBLE) @ torch.randn(10, 500, dtype=DOUBLE) for _ in range(2))
    matrix = torch.cat([torch.zeros(300, 500, dtype=DOUBLE), 1e-6 * first, second, first, 1e3 * second])
    dense, found = torch.linalg.svdvals(matrix), spectrum(matrix)
    assert found.log_prob_rank() == 20
    assert torch.allclose(found.singular_values[:20], dense[:20], rtol=1e-9)


def test_memory_does_not_grow_with_the_rows():
    """40,000 x 2,000 numbers are 640 MB."""
    code = (
        "import resource, torch\n"
        "from lit_sigsoftmax.analysis import log_prob_rank\n"
        "torch.set_num_threads(1)\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "weight = torch.randn(20, 2000, dtype=torch.float64)\n"
        "block = lambda: torch.log_softmax(torch.randn(500, 20, dtype=torch.float64) @ weight, dim=-1)\n"
        "log_prob_rank([block(), block()])\n"  # libraries are loaded
        "before = peak()\n"
        "print(log_prob_rank(block() for _ in range(80)), int(peak() - before))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    rank, megabytes = map(int, done.stdout.split())
    assert rank == 21
    assert megabytes < 100


def test_gradients_are_left_out():
    assert not spectrum(log_probs(10, 5, 2).requires_grad_()).singular_values.requires_grad


# What is no log-probability matrix


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "there are no log-probabilities"),
        (torch.zeros(0, 5), "there are no log-probabilities"),
        (torch.zeros(5), r"shape \(N, V\).* not torch.float32 of shape \(5,\)"),
        (torch.zeros(2, 3, 4), r"not torch.float32 of shape \(2, 3, 4\)"),
        (torch.zeros(3, 0), r"not torch.float32 of shape \(3, 0\)"),
        (torch.zeros(3, 4, dtype=torch.int64), "not torch.int64"),
        ([torch.zeros(3, 4), torch.zeros(3, 5)], r"\(rows, 4\), not torch.float32 of shape \(3, 5\)"),
        ([torch.zeros(3, 4), torch.zeros(3, 4, dtype=DOUBLE)], "torch.float32 and of torch.float64"),
        ([torch.zeros(300, 4), torch.tensor([[0.0, 0.0, -torch.inf, 0.0]])], "row 300 .* not finite"),
        (torch.tensor([[0.0], [torch.nan]]), "row 1 .* not finite"),
    ],
)
def test_what_is_no_log_probability_matrix_is_an_error(given, message):
    with pytest.raises(ValueError, match=message):
        log_prob_rank(given)


@pytest.mark.parametrize("eps", [-0.1, 1.0, 2.0])
def test_the_energy_left_out_is_a_part(eps):
    with pytest.raises(ValueError, match="at least 0 and below 1"):
        effective_rank(torch.ones(2, 2), eps)


def test_a_matrix_of_zeros_has_no_rank():
    found = spectrum(torch.zeros(300, 4))
    assert (found.log_prob_rank(), found.effective_rank()) == (0, 0)
    assert plot_spectra({"zeros": found}).axes


# What is kept and drawn


def test_a_spectrum_comes_back_from_its_file_digit_by_digit():
    found = spectrum(log_probs(300, 40, 5, "sigsoftmax", dtype=torch.float32))
    again = Spectrum.from_json(found.to_json())
    assert torch.equal(again.singular_values, found.singular_values)
    assert (again.n_rows, again.n_columns, again.dtype) == (300, 40, torch.float32)
    assert again.log_prob_rank() == found.log_prob_rank()


def test_the_plot_shows_the_spectra_and_their_thresholds(tmp_path):
    spectra = {name: spectrum(log_probs(300, 40, 5, name)) for name in ("softmax", "sigsoftmax")}
    figure = plot_spectra(spectra)
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["softmax: 6", "sigsoftmax: 40"]
    curve, dashed, dotted = axes.lines[:3]
    first = spectra["softmax"]
    assert list(curve.get_ydata()) == (first.singular_values / first.singular_values[0]).tolist()
    assert dashed.get_ydata()[0] == pytest.approx(0.5 * math.sqrt(341) * 2**-52)
    assert dotted.get_ydata()[0] == pytest.approx(0.5 * math.sqrt(341) * 2**-23)
    figure.savefig(tmp_path / "spectrum.png")
    assert (tmp_path / "spectrum.png").read_bytes().startswith(b"\x89PNG")
