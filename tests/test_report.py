"""``lit-sigsoftmax report``: everything about a study from the store alone."""

import itertools
import json
import re
import xml.etree.ElementTree as ET
from contextlib import redirect_stdout
from io import StringIO

import numpy as np
import pytest
from report_helpers import IDS, TYPES, write_run

from lit_sigsoftmax.cli import main
from lit_sigsoftmax.compare.figures import colours
from lit_sigsoftmax.compare.results import read_study
from lit_sigsoftmax.compare.table import rows
from lit_sigsoftmax.compare.tokens import buckets, largest_gains, read_losses, read_text, token_pair

BASE = np.full(len(IDS), 3.0) + 0.01 * np.arange(len(IDS))
BETTER = BASE - np.where(IDS == 4, 2.0, 0.25) - 1e-4 * np.arange(len(IDS))
HOSTILE = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def told(workplace):
    """The study ``demo`` of two seeds, with all that can happen to a run, and ``more`` with a third seed."""
    with workplace() as store:
        for seed, study in ((0, "demo"), (1, "demo"), (2, "more")):
            nll = {"softmax x1": BASE + 0.1 * seed, "sigsoftmax x1": BETTER + 0.1 * seed}
            for layer, test in (("softmax x1", 100.0 - seed), ("sigsoftmax x1", 97.0 - 1.5 * seed)):
                write_run(store, layer, seed, test, nll=nll[layer], spectrum=[4.0, 2.0, 1.0, 1e-14], study=study)
        write_run(store, "relu x1", 0, diverged="train/loss at step 7")
        write_run(store, "relu x1", 1, status="failed")
        write_run(store, "relu x1", 2, status="running", machine=HOSTILE)
        write_run(store, "softmax x1", 0, 90.0, role="tuning")
        return store


@pytest.fixture
def again(told, monkeypatch):
    monkeypatch.chdir(told.folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", told.uri)
    return told


@pytest.fixture(scope="module")
def demo(told):
    """What ``report --study demo`` printed, and the folder that it wrote."""
    with pytest.MonkeyPatch.context() as monkeypatch, redirect_stdout(StringIO()) as out:
        monkeypatch.chdir(told.folder)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", told.uri)
        main(["report", "--study", "demo"])
    return out.getvalue(), told.folder / "mlruns" / "reports" / "demo"


def run_report(capsys, *arguments):
    main(["report", *arguments])
    return capsys.readouterr().out


def error_of(capsys, *arguments):
    with pytest.raises(SystemExit) as exit_:
        main(["report", *arguments])
    assert exit_.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def artifacts(store, run):
    def walk(path=None):
        for file in store.client.list_artifacts(run.info.run_id, path):
            yield from walk(file.path) if file.is_dir else [file.path]

    return set(walk())


def test_what_is_printed(again, demo):
    out, _ = demo
    study = read_study(again.client, ["demo"])
    table = [[cell.strip() for cell in line.strip("│ ").split("│")] for line in out.splitlines() if line[:1] == "│"]
    assert [line[0] for line in table] == [arm.name for arm in study.arms] == ["sigsoftmax x1", "softmax x1", "relu x1"]
    assert table[1][3] == "baseline"
    words = " ".join(out.split())
    assert f"sigsoftmax x1: {study.comparisons['sigsoftmax x1'].sentence}." in words
    assert "relu x1 seed 0 (diverged), relu x1 seed 1 (failed), relu x1 seed 2 (running)" in words
    assert "Runs with values that were not chosen, in no mean: 1." in words
    assert re.search(r"^Report: .*mlruns/reports/demo/report\.html$", out.replace("\n/", "/"), re.M)
    assert re.search(r"^Compare: http://127\.0\.0\.1:5000/#/experiments/\d+/runs\?\S+head-to-head-demo$", out, re.M)


def test_files_are_written_and_logged_to_one_summary_run_that_is_replaced(again, capsys, tmp_path):
    files = {"report.html", "table.csv", "table.md", "table.tex", "table.json", "tokens.tsv"}
    files |= {f"figures/{name}.svg" for name in ("curves", "perplexities", "frequencies", "spectra", "speed")}
    for _ in range(2):
        run_report(capsys, "--study", "demo", "--out", str(tmp_path / "out"))
    assert {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.*")} == files
    (summary,) = again.runs("tags.kind = 'summary' and tags.study = 'demo'")
    assert (summary.info.run_name, summary.info.status) == ("study demo", "FINISHED")
    assert artifacts(again, summary) == files
    table = json.loads(again.artifact(summary, "table.json").read_text())
    assert [tuple(row) for row in table["data"]] == rows(read_study(again.client, ["demo"]))
    assert again.client.load_table(summary.info.experiment_id, "table.json", [summary.info.run_id]).shape[0] == 3
    assert summary.data.tags["mlflow.note.content"] == (tmp_path / "out" / "table.md").read_text()


def test_studies_are_combined(again, capsys):
    out = run_report(capsys, "--study", "demo", "more")
    study = read_study(again.client, ["demo", "more"])
    assert study.comparisons["sigsoftmax x1"].seeds == (0, 1, 2)
    assert study.comparisons["sigsoftmax x1"].sentence in " ".join(out.split())
    assert len(again.runs("tags.kind = 'summary' and tags.study = 'demo + more'")) == 1
    assert len(re.findall(r"^Compare: ", out, re.M)) == 2


def test_the_page_shows_every_run_and_needs_nothing_else(again, demo):
    page = (demo[1] / "report.html").read_text()
    for run in read_study(again.client, ["demo"]).runs:
        assert run.id in page
    for state in ("finished", "diverged", "failed", "running", "tuning"):
        assert f'<td class="left">{state}' in page
    assert "train/loss at step 7" in page
    assert page.count("lit-sigsoftmax fit --config demo.yaml") == 8
    assert HOSTILE not in page
    assert HOSTILE.replace("<", "&lt;").replace(">", "&gt;") in page
    assert not re.search(r"<(link|script|img|iframe)|@import|\bsrc=|url\((?!#)", page)
    assert all(reference.startswith("#") for reference in re.findall(r'href="([^"]*)"', page))


def test_an_arm_has_one_colour_throughout(again, demo):
    _, folder = demo
    study = read_study(again.client, ["demo"])
    tints = colours(study)
    assert len(set(tints.values())) == len(tints) == 3
    page = (folder / "report.html").read_text()
    assert f'background: {tints["sigsoftmax x1"]}"></span>sigsoftmax x1' in page
    for figure in (folder / "figures").iterdir():
        ET.parse(figure)
        assert tints["sigsoftmax x1"].lower() in figure.read_text()
    for run in study.runs:
        assert again.client.get_run(run.id).data.tags["mlflow.runColor"] == tints[run.arm]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--study", "dmo"], "no study 'dmo'.* there are: .*'demo'"),
        (["--study", "it's"], "no study"),
        (["--study", "demo", "--baseline", "relu x1"], "baseline 'relu x1'.* sigsoftmax x1, softmax x1"),
        (["--study", "demo", "--tokens", "softmax x1", "tanh x1"], "no arm or run 'tanh x1'"),
        (["--study", "demo", "--tokens", "softmax x1", "relu x1 seed 1"], "'relu x1 seed 1' stored no token losses"),
        (["--study", "demo", "--tracking_uri", "sqlite:///nowhere/mlflow.db"], "no tracking store at nowhere"),
        ([], "--study"),
    ],
)
def test_mistakes(again, capsys, arguments, named):
    assert re.search(named, error_of(capsys, *arguments))
    assert not (again.folder / "nowhere").exists()


def test_an_arm_that_diverged_is_named_where_it_cannot_be_drawn(store, capsys, tmp_path):
    for layer, test in (("softmax x1", 100.0), ("sigsoftmax x1", 95.0), ("relu x1", 20_000.0)):
        write_run(store, layer, 0, test)
    run_report(capsys, "--study", "demo", "--out", str(tmp_path))
    for name in ("perplexities", "speed", "curves"):
        words = [word.strip() for word in ET.parse(tmp_path / "figures" / f"{name}.svg").getroot().itertext()]
        assert "not drawn: relu x1 at 20,000" in words
        assert {"softmax x1", "sigsoftmax x1"} <= set(words)
        assert "relu x1" not in words


def test_arms_that_are_near_each_other_can_be_told_apart_where_speed_is_drawn(store, capsys, tmp_path):
    layers = [f"{activation} x{k}" for activation in ("softmax", "sigsoftmax", "relu", "sigmoid") for k in (1, 4)]
    for i, layer in enumerate(layers):
        write_run(store, layer, 0, 130.0 if i == 7 else 100.0 + 0.1 * i, metrics={"train/tokens_per_second": 900.0 + i})
    run_report(capsys, "--study", "demo", "--out", str(tmp_path))
    svg = (tmp_path / "figures" / "speed.svg").read_text()
    texts = re.findall(r'<text [^>]* x="(\S+)" y="(\S+)"[^>]*>([^<]+)', svg)
    places = {name: (float(x), float(y)) for x, y, name in texts}
    for one, other in itertools.combinations(layers, 2):
        (x, y), (other_x, other_y) = places[one], places[other]
        assert abs(y - other_y) > 9 or abs(x - other_x) > 90, (one, other)
    legend = svg[svg.index('id="legend_1"') :]
    assert len(set(re.findall(r'<use xlink:href="(#\w+)"[^>]*style="fill: (#\w+)', legend))) == len(layers)


def test_the_threshold_of_the_rank_is_drawn(store, capsys, tmp_path):
    threshold = 0.5 * (len(IDS) + len(TYPES) + 1) ** 0.5 * 2**-52
    for layer, last in (("softmax x1", threshold), ("sigsoftmax x1", 0.1)):
        write_run(store, layer, 0, 100.0, spectrum=[4.0, 2.0, 4.0 * last])
    run_report(capsys, "--study", "demo", "--out", str(tmp_path))
    svg = (tmp_path / "figures" / "spectra.svg").read_text()
    assert svg.count("threshold of Press et al.") == 1
    lines = re.findall(r'<path d="([^"]+)" clip-path="[^"]*" style="fill: none; ([^"]*)"', svg)
    (dotted,) = [path for path, style in lines if "stroke-dasharray" in style]
    (softmax,) = [path for path, style in lines if "stroke: #808080" in style and path.count("L") == 2]
    assert float(dotted.split()[-1]) == pytest.approx(float(softmax.split()[-1]))


def test_another_baseline(again, capsys, tmp_path):
    run_report(capsys, "--study", "demo", "--baseline", "sigsoftmax x1", "--out", str(tmp_path))
    assert "compared with <b>sigsoftmax x1</b>" in (tmp_path / "report.html").read_text()


def test_the_study_names_its_baseline(store):
    for layer in ("softmax x1", "sigsoftmax x1"):
        write_run(store, layer, 0, 100.0, baseline="sigsoftmax x1")
    assert read_study(store.client, ["demo"]).baseline == "sigsoftmax x1"


def test_the_newest_run_of_a_seed_counts(store):
    write_run(store, "softmax x1", 0, 100.0)
    newest = write_run(store, "softmax x1", 0, 101.0)
    study = read_study(store.client, ["demo"])
    assert [run.id for run in study.arm("softmax x1").runs] == [newest]
    assert sorted(run.state for run in study.runs) == ["finished", "repeated"]


def test_unfair_runs_are_named_and_refused_unless_asked_for(store, capsys, tmp_path):
    write_run(store, "softmax x1", 0, 100.0, params={"trainer": {"max_epochs": 6}})
    write_run(store, "sigsoftmax x1", 0, 90.0, params={"trainer": {"max_epochs": 60}})
    error = error_of(capsys, "--study", "demo")
    assert re.search(r"trainer\.max_epochs differs: .*60 in sigsoftmax x1 seed 0.*--allow_unfair", error)
    assert store.runs("tags.kind = 'summary'") == []
    out = run_report(capsys, "--study", "demo", "--allow_unfair", "--out", str(tmp_path))
    assert "UNFAIR: trainer.max_epochs differs" in out
    assert "trainer.max_epochs differs" in (tmp_path / "report.html").read_text()


def test_a_run_of_another_configuration_is_not_just_replaced_by_a_newer_one(store, capsys):
    for study, epochs in (("short", 1), ("long", 12)):
        for layer in ("softmax x1", "sigsoftmax x1"):
            write_run(store, layer, 0, 100.0, study=study, params={"trainer": {"max_epochs": epochs}})
    assert "trainer.max_epochs differs" in error_of(capsys, "--study", "short", "long")
    run_report(capsys, "--study", "short")


def tune(*values):
    return json.dumps({"optimizer.init_args.lr": list(values)})


def lr(value):
    return {"optimizer": {"lr": value}}


def test_a_tuned_arm_is_compared_with_one_that_had_the_same_grid_alone(store, capsys):
    write_run(store, "softmax x1", 0, 100.0, study="plain", params=lr(0.1))
    write_run(store, "softmax x1", 0, 100.0, study="coarse", params=lr(0.1), tune=tune("0.1"))
    write_run(store, "softmax x1", 0, 100.0, study="equal by chance", params=lr(0.2))
    for study in ("softmax too", "sigsoftmax"):
        layer = "softmax x1" if study == "softmax too" else "sigsoftmax x1"
        write_run(store, layer, 0, 90.0, study=study, params=lr(0.2), tune=tune("0.1", "0.2"))
    for other in ("plain", "coarse"):
        error = error_of(capsys, "--study", other, "sigsoftmax")
        assert re.search(r"optimizer\.lr differs: .*0\.1 in softmax x1 seed 0", error)
    error = error_of(capsys, "--study", "equal by chance", "sigsoftmax")
    assert "--tune differs: {" in error
    assert "nothing in softmax x1 seed 0" in error
    run_report(capsys, "--study", "softmax too", "sigsoftmax")


def test_what_each_arm_chose_is_said_and_where_it_ends_the_grid(store, capsys, tmp_path):
    for layer, chosen in (("softmax x1", 0.1), ("sigsoftmax x1", 0.3)):
        for value in (0.1, 0.2, 0.3):
            given = {"params": lr(value), "metrics": {"val/best_perplexity": 90 + 100 * abs(value - chosen)}}
            given |= {"tune": tune("0.1", "0.2", "0.3")} | ({} if value == chosen else {"role": "tuning"})
            write_run(store, layer, 0, 100.0, **given)
        given = {"params": lr(0.2), "metrics": {"val/best_perplexity": 5}, "role": "tuning"}  # chosen before, by fewer
        write_run(store, layer, 1, 99.0, tune=tune("0.1", "0.2", "0.3"), **given)
        write_run(store, layer, 1, 101.0, params=lr(chosen), tune=tune("0.1", "0.2", "0.3"))
    words = " ".join(run_report(capsys, "--study", "demo", "--out", str(tmp_path)).split())
    said = "softmax x1 chose optimizer.lr=0.1 by validation perplexity, 90.00 (0.2: 100.00, 0.3: 110.00)."
    assert f"{said} That is the smallest optimizer.lr tried: a wider grid may find a better one." in words
    assert "sigsoftmax x1 chose optimizer.lr=0.3" in words
    assert "That is the largest optimizer.lr tried" in words
    assert "Runs with values that were not chosen, in no mean: 6." in words
    assert "chose optimizer.lr=0.1" in (tmp_path / "report.html").read_text()


def test_a_value_without_a_result_is_not_hidden(store, capsys):
    write_run(store, "softmax x1", 0, 100.0, params=lr(0.1), tune=tune("0.1", "0.2"))
    write_run(store, "softmax x1", 0, params=lr(0.2), tune=tune("0.1", "0.2"), status="failed", role="tuning")
    assert "Of 2 values 1 without a result." in " ".join(run_report(capsys, "--study", "demo").split())


def test_one_seed_says_what_the_test_set_says_and_no_more(store, capsys):
    write_run(store, "softmax x1", 0, 100.0, nll=BASE)
    write_run(store, "sigsoftmax x1", 0, 97.0, nll=BETTER)
    words = " ".join(run_report(capsys, "--study", "demo").split())
    assert "no test" in words
    assert f"seed 0: {np.mean(BETTER - BASE):+.4f} nats per token against softmax x1" in words


def test_several_seeds_say_how_many_of_them_the_test_set_shows_a_difference_with(store, capsys, tmp_path):
    noise = np.where(np.arange(len(IDS)) % 2, 1.0, -1.0)
    shifts = {0: -0.3, 1: -0.1, 2: 0.2, 3: 0.003}
    for seed, shift in shifts.items():
        write_run(store, "softmax x1", seed, 100.0 + seed, nll=BASE)
        write_run(store, "sigsoftmax x1", seed, 97.0 + 2 * seed, nll=BASE + shift + (noise if seed == 3 else 0.0))
    words = " ".join(run_report(capsys, "--study", "demo", "--out", str(tmp_path)).split())
    sentence = (
        "sigsoftmax x1, on this test set, seed by seed: -0.3000 to +0.2000 nats per token against softmax x1; by the "
        "95 % interval (bootstrap over blocks of text) better in 2 of 4 seeds, worse in 1."
    )
    assert words.count("on this test set") == words.count(sentence) == 1
    assert sentence in (tmp_path / "report.html").read_text()


def test_nothing_finished(store, capsys):
    write_run(store, "softmax x1", 0, status="failed")
    main(["report", "--study", "demo"])
    assert "nothing to compare: softmax x1 seed 0 (failed)" in capsys.readouterr().err


# Word by word


def test_where_one_layer_gains_most(again):
    study = read_study(again.client, ["demo"])
    losses, text = read_losses(again.client, study), read_text(again.client, study)
    pair = token_pair(study, losses, text, "softmax x1", "sigsoftmax x1")
    first, second = largest_gains(pair, 2)
    assert (first.position, first.token, first.count) == (120, "rare", 0)
    assert first.context == "the cat sat <eos> the cat sat <eos>"
    assert first.gain == pytest.approx(2.0 + 1e-4 * 120, abs=1e-5)
    assert first.baseline_log_prob == pytest.approx(-(BASE[120] + 0.05), abs=1e-5)  # the mean over seeds 0 and 1
    assert second.position == 119  # the later, the larger the gain
    found = {bucket.name: bucket for bucket in buckets(pair)}
    assert {name: bucket.tokens for name, bucket in found.items()} == {
        **{"never seen": 1, "1-9": 30, "10-99": 30, "100-999": 30, "1,000-9,999": 30}
    }
    ones = np.exp([np.mean(nll[IDS == 3]) + 0.05 for nll in (BASE, BETTER)])
    assert found["1-9"].perplexities == pytest.approx(tuple(ones), rel=1e-5)


def test_tokens_of_two_runs(again, capsys, tmp_path):
    names = ["sigsoftmax x1 seed 0", "sigsoftmax x1 seed 1"]
    out = run_report(capsys, "--study", "demo", "--tokens", *names, "--out", str(tmp_path))
    assert "where sigsoftmax x1 seed 1 gains most over sigsoftmax x1 seed 0" in " ".join(out.split())
    head, *lines = (tmp_path / "tokens.tsv").read_text().splitlines()
    assert head.split("\t")[-3:] == ["baseline_log_prob", "log_prob", "gain"]
    assert len(lines) == len(IDS)
    assert [float(line.split("\t")[-1]) for line in lines] == pytest.approx([-0.1] * len(IDS), abs=1e-5)


# A number that is varied


def test_the_distance_from_the_entropy_is_drawn_where_the_corpus_knows_it(store, capsys, tmp_path):
    for layer, worst in (("softmax x1", 60.0), ("sigsoftmax x1", 50.0)):
        for size in (8, 16, 64):
            backbone = {"backbone": {"hidden_size": size}}
            params = {"model": backbone, "data": {"rank": 33}, "corpus": {"entropy": np.log(40.0)}}
            tags = {"arm": f"{layer} hidden_size={size}", "axes": "model.backbone.hidden_size"}
            write_run(store, layer, 0, worst - size / 8, params=params, **tags)
    run_report(capsys, "--study", "demo", "--out", str(tmp_path))
    drawn = " ".join(ET.parse(tmp_path / "figures" / "bottleneck.svg").getroot().itertext())
    assert "test loss above the entropy, nats per token" in drawn
    assert "hidden_size" in drawn
    assert "softmax can be exact from here on" in drawn
