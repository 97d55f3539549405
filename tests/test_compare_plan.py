"""The plan of a comparison, what it calls fair, and how it divides a machine."""

import pytest

from lit_sigsoftmax.compare.cluster import make_executor
from lit_sigsoftmax.compare.fairness import config_hash, same_key, unfair_differences
from lit_sigsoftmax.compare.plan import default_baseline, plan, tuning_runs
from lit_sigsoftmax.compare.run import Share, shares

VARY = {"model.backbone.init_args.hidden_size": ["100", "200"]}


def test_varied_keys_make_arms_and_name_them_shortly():
    runs = plan(["softmax", "sigsoftmax"], [1, 4], [0, 1], VARY)
    assert len(set(runs)) == len(runs) == 16
    assert runs[7].arm == "sigsoftmax x4 hidden_size=200"
    assert runs[7].name == "sigsoftmax x4 hidden_size=200 seed 0"
    assert "--model.backbone.init_args.hidden_size=200" in runs[7].arguments
    assert {run.seed for run in runs[:8]} == {0}


def test_keys_with_the_same_last_part_keep_as_much_before_it_as_tells_them_apart():
    classes, hidden = ["a.One", "b.Two"], ["100"]
    vary = {"optimizer.class_path": classes, "model.backbone.class_path": classes, "model.backbone.hidden_size": hidden}
    runs = plan(["softmax"], [1], [0], vary)
    assert len({run.arm for run in runs}) == 4
    assert runs[1].arm == "softmax x1 optimizer.class_path=a.One backbone.class_path=b.Two hidden_size=100"
    tried = tuning_runs(plan(["softmax"], [1], [0], {"model.dropout": ["0"]}), {"model.backbone.dropout": ["0.1"]})
    assert tried[0].name == "softmax x1 dropout=0 backbone.dropout=0.1 seed 0"
    (one,) = plan(["softmax"], [1], [0], {"dropout": ["0"], "model.dropout": ["1"]})
    assert one.arm == "softmax x1 dropout=0 model.dropout=1"


def test_an_arm_may_be_named_with_its_own_number_of_experts():
    runs = plan(["softmax", "my.module.log_g", "softmax x4", "relu x2"], [1, 3], [0])
    assert [run.arm for run in runs] == [
        "softmax x1",
        "my.module.log_g x1",
        "softmax x4",
        "relu x2",
        "softmax x3",
        "my.module.log_g x3",
    ]


def test_arms_of_one_seed_differ_in_one_key_at_a_time_from_their_neighbours():
    runs = [run for run in plan(["softmax", "relu"], [1, 4], [0], VARY) if run.seed == 0]
    base = set(runs[0].arguments)
    changed = {run.name: sorted(set(run.arguments) - base) for run in runs}
    assert changed["relu x1 hidden_size=100 seed 0"] == ["--model.activation=relu"]
    assert changed["softmax x4 hidden_size=100 seed 0"] == ["--model.n_experts=4"]
    assert changed["softmax x1 hidden_size=200 seed 0"] == ["--model.backbone.init_args.hidden_size=200"]


def test_every_arm_is_tuned_over_the_same_grid_with_the_first_seed():
    tried = tuning_runs(plan(["softmax", "relu"], [1], [3, 4]), {"optimizer.lr": ["1", "2"], "data.bptt": ["5", "9"]})
    grids = {arm: {run.tuned for run in tried if run.arm == arm} for arm in ("softmax x1", "relu x1")}
    assert len(tried) == 8
    assert grids["softmax x1"] == grids["relu x1"]
    assert {run.seed for run in tried} == {3}
    assert tried[0].name == "softmax x1 lr=1 bptt=5 seed 3"
    assert tried[0].arm == "softmax x1"


def test_the_baseline_is_softmax_where_it_is_planned():
    assert default_baseline(plan(["relu", "softmax"], [4, 1], [0])) == "softmax x4"
    assert default_baseline(plan(["relu", "sigmoid"], [1], [0])) == "relu x1"


PARAMS = {"model.activation": "softmax", "trainer.max_epochs": "2", "corpus.fingerprint": "ab", "seed_everything": "0"}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("corpus.fingerprint", "cd"),
        ("corpus.types", "10000"),
        ("trainer.max_epochs", "3"),
        ("data.eval_batch_size", "5"),
        ("optimizer.lr", "0.1"),
    ],
)
def test_what_makes_a_comparison_unfair_is_named(key, value):
    other = {**PARAMS, key: value, "model.activation": "sigsoftmax"}
    found = unfair_differences({"one": PARAMS, "two": other, "three": other})
    assert found == {key: {str(PARAMS.get(key)): ["one"], value: ["two", "three"]}}
    assert config_hash(PARAMS) != config_hash({**PARAMS, key: value})


@pytest.mark.parametrize("key", ["trainer.logger.study", "data.root", "trainer.enable_progress_bar", "ckpt_path"])
def test_what_changes_no_result_is_fair_and_the_same_run(key):
    other = {**PARAMS, key: "another"}
    assert unfair_differences({"one": PARAMS, "two": other}) == {}
    assert config_hash(PARAMS) == config_hash(dict(reversed(other.items())))


def test_seeds_are_other_runs_and_fair():
    other = {**PARAMS, "seed_everything": "1"}
    assert unfair_differences({"one": PARAMS, "two": other}) == {}
    assert config_hash(PARAMS) != config_hash(other)


def test_an_axis_holds_for_what_is_below_it():
    one, two = {"model.backbone": "a.LSTM"}, {"model.backbone": "b.GRU", "model.backbone.cell": "gru", "modelx": "1"}
    assert list(unfair_differences({"one": one, "two": two}, ["model.init_args.backbone"])) == ["modelx"]
    assert same_key("model.init_args.backbone.class_path") == "model.backbone"


@pytest.mark.parametrize(
    ("workers", "cpus", "gpus", "expected"),
    [
        (1, 8, "", [Share(8)]),
        (3, 8, "", [Share(2)] * 3),
        (4, 2, "", [Share(1)] * 4),
        (1, 8, "01", [Share(8, "0,1")]),
        (2, 8, "0123", [Share(4, "0,1"), Share(4, "2,3")]),
        (3, 6, "0123", [Share(2, "0,1"), Share(2, "2"), Share(2, "3")]),
        (3, 6, "57", [Share(2, "5"), Share(2, "7"), Share(2, "5")]),
    ],
)
def test_processor_and_gpus_are_divided_among_the_workers(workers, cpus, gpus, expected):
    assert shares(workers, cpus, list(gpus)) == expected


@pytest.mark.parametrize(("name", "parameters"), [("mainframe", {}), ("local", {"timeout": 3})])
def test_an_executor_that_submitit_does_not_have(name, parameters, tmp_path):
    with pytest.raises(ValueError, match=f"submitit does not take --executor {name} "):
        make_executor(name, parameters, tmp_path)
