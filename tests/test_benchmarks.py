"""The benchmarks run, are complete, and compare what is the same. Nobody's speed is tested here."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from cli_helpers import run_process

from lit_sigsoftmax.activations import available_activations

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
TRAINING_WAYS = ["train: plain", "train: loop", "train: trainer", "train: logger", "train: fit"]
EVALUATION_WAYS = ["evaluate: plain", "evaluate: loop", "evaluate: validate"]
SMALL_RECIPE = ("data.n_tokens=6000", "data.eval_batch_size=2", "data.vocab_size=20", "data.rank=5")
CPU = torch.device("cpu")


@pytest.fixture
def scripts(monkeypatch):
    """The benchmarks' modules, importable as from a script beside them."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield
    for name in ("candidates", "loss", "measure"):
        sys.modules.pop(name, None)


def run_benchmark(script, *arguments, cwd):
    done = run_process((sys.executable, str(BENCHMARKS / script), *arguments, "--json=found.json"), cwd)
    assert done.returncode == 0, done.stderr
    found = json.loads((cwd / "found.json").read_text())
    assert {"date", "commit", "processor", "threads", "torch"} <= set(found["machine"])
    return done.stdout, found["results"]


def rows(output):
    """The cells of the tables' rows, by the name in the first."""
    lines = [line.strip("| ").split(" | ") for line in output.splitlines() if line.startswith("| ")]
    return {cells[0]: cells[1:] for cells in lines}


def test_loss_compares_every_activation(tmp_path):
    sizes = ("--sizes", "20,8,50", "12,8,50,3")
    output, (plain, mixture) = run_benchmark("loss.py", *sizes, "--repeats=2", "--memory-repeats=1", cwd=tmp_path)
    names = {c["name"] for c in plain["candidates"]}
    every = {f"{name}{suffix}" for name in (*available_activations(), "softcap") for suffix in ("", ", no compiler")}
    assert every | {"stock softmax", "naive sigsoftmax", "bfloat16: sigsoftmax", "evaluation: sigsoftmax"} < names
    assert {f"mixture, {name}" for name in every} < {c["name"] for c in mixture["candidates"]}
    for result in (plain, mixture):
        assert len(result["floor_seconds"]["floor"]) == 2
        for candidate in result["candidates"]:
            assert len(candidate["seconds"]) == 2
            assert min(candidate["seconds"]) > 0
            assert len(candidate["extra_bytes"]) == 1
            assert candidate["ratios"][candidate["baseline"]]["median"] > 0
            cells = rows(output)[candidate["name"]]
            assert f"{1000 * sum(candidate['seconds']) / 2:.2f}" == cells[0]  # the median of two
            assert cells[-2].split(" ± ")[1] == "0.0"


def test_loss_measures_what_is_chosen(tmp_path):
    chosen = ("--sizes", "20,8,50", "--only", "^relu$", "--repeats=0", "--memory-repeats=1")
    output, (result,) = run_benchmark("loss.py", *chosen, cwd=tmp_path)
    assert [c["name"] for c in result["candidates"]] == [
        "stock softmax",
        "relu",
        "sigsoftmax",
    ]  # what it is compared with
    assert all(c["seconds"] is None and c["extra_bytes"] for c in result["candidates"])
    assert rows(output)["relu"][0].strip() == ""


@pytest.mark.parametrize("size", ["1,2", "1,2,3,4,5", "a,2,3", "0,2,3", ""])
def test_loss_refuses_other_sizes(size, scripts, monkeypatch, capsys):
    from loss import main

    monkeypatch.setattr(sys, "argv", ["loss.py", "--sizes", size])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    assert f"a size is N,d,V or N,d,V,K, all positive, not '{size}'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "message"),
    [("--repeats=-1", "0 or more, not '-1'"), ("--only=nobody", "matches none of stock softmax, ")],
)
def test_loss_refuses_what_it_cannot_measure(option, message, scripts, monkeypatch, capsys, registry):
    from loss import main

    monkeypatch.setattr(sys, "argv", ["loss.py", "--sizes", "20,8,50", option])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert message in f"{exit_.value} {capsys.readouterr().err}"


@pytest.mark.parametrize("n_experts", [1, 3])
def test_candidates_of_one_distribution_have_the_same_gradients(n_experts, scripts):
    from candidates import Size, candidates, inputs_of

    inputs, found = inputs_of(Size(30, 6, 40, n_experts), CPU), {}
    for candidate in candidates(inputs.size, CPU):
        if candidate.name == "three products in chunks":  # of no loss
            continue
        torch.manual_seed(0)
        gradients = candidate.make(inputs)()
        assert bool(gradients) != candidate.name.startswith("evaluation")
        kind = next((name for name in ("sigsoftmax", "softmax", "sigmoid", "relu") if name in candidate.name), None)
        half = candidate.name.startswith("bfloat16")
        first = found.setdefault(kind, gradients)
        for gradient, other in zip(gradients, first, strict=bool(gradients)):
            torch.testing.assert_close(gradient, other, rtol=0.1 if half else 1e-3, atol=3e-3 if half else 1e-6)
    assert set(found) == set(available_activations())


def test_floor_is_made_of_the_losses_three_products(scripts):
    from candidates import Size, inputs_of, products

    inputs = inputs_of(Size(10, 4, 9, 2), CPU)
    rows = inputs.hidden.detach().repeat_interleave(2, 0)
    logits = rows @ inputs.weight.detach().T
    expected = {"logits": logits, "of hidden": logits @ inputs.weight, "of weight": logits.T @ rows}
    found = products(inputs)
    assert set(found) == set(expected)
    for name, by_library in found.items():
        assert "torch" in by_library
        for step in by_library.values():
            torch.testing.assert_close(step()[0], expected[name])


def test_extra_memory_is_the_peak_beyond_the_gradients(scripts):
    from measure import extra_memory, in_child

    def step():
        _ = torch.ones(10_000_000)
        return [torch.ones(2_000_000)]

    room = [bytes(2**16 - 100) for _ in range(2000)]  # a heap that has been used, and has room for it
    del room
    assert in_child(lambda: extra_memory(step, CPU)) == pytest.approx(40e6, rel=0.05)


def test_a_process_that_dies_is_said(scripts):
    from measure import in_child

    with pytest.raises(RuntimeError, match="ended with code 3"):
        in_child(lambda: __import__("os")._exit(3))


@pytest.mark.slow
def test_training_times_every_way_by_part(tmp_path):
    small = ("--recipes", "synthetic/lstm.yaml", "--steps=3", "--repeats=1", "--blocks=3", "--set", *SMALL_RECIPE)
    output, (result,) = run_benchmark("training.py", *small, cwd=tmp_path)
    assert result["recipe"] == "synthetic/lstm.yaml"
    assert result["tokens"] == {"train": 3 * 35 * 20, "evaluate": 3 * 35 * 2}
    assert list(result["seconds"]) == [*TRAINING_WAYS, *EVALUATION_WAYS]
    for name, (parts,) in result["seconds"].items():
        assert all(seconds > 0 and math.isfinite(seconds) for seconds in parts.values())
        loop, training = name.endswith(("plain", "loop")), name.startswith("train")
        expected = ["data", "backbone", "loss", *(["optimizer"] if training else [])] if loop else ["all"]
        assert list(parts) == expected
        rate = result["tokens"][name.split(":")[0]] / sum(parts.values())
        assert rows(output)[name][0] == f"{rate:,.0f}"
    assert all(len(seconds) == 3 and min(seconds) > 0 for seconds in result["blocks"].values())
    assert "3 pairs of blocks of 3 steps" in output
    assert not (tmp_path / "mlruns").exists()


@pytest.mark.slow
def test_outage_trains_with_and_without_a_server_and_finds_every_point(tmp_path):
    recipe = ("--recipe", "synthetic/lstm.yaml", "--set", "data.n_tokens=30000", "data.vocab_size=20", "data.rank=5")
    recipe = (*recipe, "model.backbone.hidden_size=8", "trainer.max_epochs=1")  # 42 steps
    output, (result,) = run_benchmark("outage.py", "--repeats=1", *recipe, cwd=tmp_path)
    assert result["seconds"].keys() == {"there", "frozen", "killed"}
    assert all(len(seconds) == 1 and seconds[0] > 0 for seconds in result["seconds"].values())
    assert rows(output)["there"][1].startswith("1.000")
