"""``lit-sigsoftmax report``: everything that is known of a study, from the tracking store alone."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lit_sigsoftmax.compare.choices import choices
from lit_sigsoftmax.compare.evidence import Evidence, bootstraps, draw, read_evidence
from lit_sigsoftmax.compare.fairness import in_words, tuned_keys, unfair_differences, with_grid
from lit_sigsoftmax.compare.figures import colours
from lit_sigsoftmax.compare.page import TokenSection, page
from lit_sigsoftmax.compare.results import Results, read_study
from lit_sigsoftmax.compare.statistics import Bootstrap
from lit_sigsoftmax.compare.table import as_csv, as_latex, as_markdown, columns, rich_table, rows
from lit_sigsoftmax.compare.tokens import TokenPair, buckets, gains_table, largest_gains, token_pair
from lit_sigsoftmax.connect import connect
from lit_sigsoftmax.spool import sync
from lit_sigsoftmax.store import TrackingError, default_tracking_uri, sqlite_path, store_root
from lit_sigsoftmax.views import comparison_url, study_tags

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["conclude", "report"]

_SHOWN, _ON_PAGE, _IN_FILE = 12, 20, 1000  # tokens with the largest gains


def report(args: Sequence[str]) -> None:
    """Run ``lit-sigsoftmax report``.

    Args:
        args: The command line after ``report``.

    Raises:
        SystemExit: 2 for a mistake in the command line, such as a study that is not there, or a store that does not
            answer.
    """
    parser = argparse.ArgumentParser(
        "lit-sigsoftmax report",
        description="Print, write and log the table, tests, figures and page of a study, from the tracking store.",
        allow_abbrev=False,
    )
    parser.add_argument("--study", nargs="+", default=[], metavar="NAME", help="several are combined into one")
    parser.add_argument(
        "--tracking_uri", default=default_tracking_uri(), help="the MLflow store (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, help="folder to write to (default: reports/STUDY beside the store)")
    parser.add_argument("--baseline", metavar="ARM", help="what the others are compared with, such as 'softmax x1'")
    parser.add_argument(
        "--tokens", nargs=2, metavar=("BASE", "OTHER"), help="two arms, or runs by name or id, to compare word by word"
    )
    parser.add_argument("--allow_unfair", action="store_true", help="compare runs that differ in more than the arms do")
    parser.add_argument("--sync", action="store_true", help="first send what runs could not while the store was away")
    options = parser.parse_args(args)
    if not options.study and not options.sync:
        parser.error("name a study with --study, or send what is left with --sync")
    path = sqlite_path(options.tracking_uri)
    if path and not path.exists():  # opening it would make it
        parser.error(f"no tracking store at {path}: name another with --tracking_uri")
    try:
        if options.sync:
            print(f"{sync(options.tracking_uri)} runs sent")
        if not options.study:
            return
        conclude(
            connect(options.tracking_uri),
            options.tracking_uri,
            options.study,
            baseline=options.baseline,
            tokens=options.tokens,
            out=options.out,
            allow_unfair=options.allow_unfair,
        )
    except (TrackingError, ValueError) as error:
        parser.error(str(error))


def conclude(
    client: MlflowClient,
    tracking_uri: str,
    studies: Sequence[str],
    *,
    baseline: str | None = None,
    tokens: Sequence[str] | None = None,
    out: Path | None = None,
    allow_unfair: bool = False,
) -> None:
    """Print the table of a study, what it says and where it is; write everything to a folder and to the summary run.

    Args:
        client: The store.
        tracking_uri: Its address.
        studies: The study, or several to combine.
        baseline: The arm that the others are compared with; the study's own by default.
        tokens: Two arms or runs to compare word by word; the baseline and the best other arm by default.
        out: The folder; ``reports/STUDY`` beside the store by default.
        allow_unfair: Whether to go on where runs differ in more than the arms do, with a warning.

    Raises:
        ValueError: There is no such study, arm or run, or the runs cannot be compared.
    """
    study = read_study(client, studies, baseline)
    if not study.finished:
        states = ", ".join(f"{run.name} ({run.state})" for run in study.runs)
        print(f"no run has finished: there is nothing to compare: {states}", file=sys.stderr)
        return
    warnings = _unfair(study)
    if warnings and not allow_unfair:
        raise ValueError(f"{'; '.join(warnings)}; --allow_unfair compares them all the same")
    evidence = read_evidence(client, study)
    pair = _pair(study, evidence, tokens)
    sentences = _sentences(study, evidence)
    with TemporaryDirectory() as folder:
        _write(Path(folder), study, sentences, warnings, draw(study, evidence), pair)
        _log(client, study, Path(folder))
        out = out or store_root(tracking_uri) / "reports" / re.sub(r"[^\w.+-]+", "-", study.title)
        shutil.copytree(folder, out, dirs_exist_ok=True)
    _print(study, sentences, warnings, pair if tokens else None)
    print(f"Report: {out / 'report.html'}")
    for name in study.names:
        print(f"Compare: {comparison_url(tracking_uri, study.runs[0].experiment_id, name)}")
    if not tracking_uri.startswith("http"):
        print("Serve it with: lit-sigsoftmax ui")


def _unfair(study: Results) -> list[str]:
    # A run that a newer one of its arm and seed has replaced is to be of the same configuration.
    replaced = (run for arm in study.finished for run in arm.others if run.state == "repeated")
    compared = [*(run for arm in study.finished for run in arm.runs), *replaced]
    axes = {"model.activation", "model.n_experts", *tuned_keys(run.tags for run in compared)}
    axes |= {key for run in compared for key in run.tags.get("axes", "").split()}
    runs = {f"{run.name} ({run.id[:6]})": with_grid(run.params, run.tags) for run in compared}
    return in_words(unfair_differences(runs, axes))


def _pair(study: Results, evidence: Evidence, asked: Sequence[str] | None) -> TokenPair | None:
    if asked is None:
        best = next((arm for arm in study.finished if study.baseline_of(arm) != arm.name), None)
        if evidence.text is None or best is None:
            return None
        base = study.arm(study.baseline_of(best))
        if not all(run.id in evidence.losses for run in (*base.runs, *best.runs)):
            return None
        asked = (base.name, best.name)
    if evidence.text is None:
        raise ValueError("the runs have not stored their test tokens, artifact test_tokens.npz: train them again")
    return token_pair(study, evidence.losses, evidence.text, *asked)


def _sentences(study: Results, evidence: Evidence) -> list[str]:
    said = []
    for arm in study.finished:
        base = study.baseline_of(arm)
        if arm.name == base:
            continue
        one = study.comparisons[arm.name]
        said.append(f"{arm.name}: {one.sentence}.")
        if found := bootstraps(study, evidence, arm):
            said.append(f"{arm.name}, {_on_this_test_set(found, base)}")
    if lost := [f"{run.name} ({run.state})" for arm in study.arms for run in arm.others]:
        said.append(f"Not counted: {', '.join(lost)}.")
    if tuned := [run for run in study.runs if run.state.startswith("tuning")]:
        said += choices(study)
        said.append(f"Runs with values that were not chosen, in no mean: {len(tuned)}.")
    return said


def _on_this_test_set(found: Mapping[int, Bootstrap], base: str) -> str:
    if len(found) == 1:
        ((seed, one),) = found.items()
        low, high = one.interval
        return (
            f"on this test set with seed {seed}: {one.difference:+.4f} nats per token against {base} "
            f"(95 % from {low:+.4f} to {high:+.4f}, bootstrap over blocks of text). Another seed may turn it round."
        )
    differences = [one.difference for one in found.values()]
    below = sum(one.interval[1] < 0 for one in found.values())
    above = sum(one.interval[0] > 0 for one in found.values())
    return (
        f"on this test set, seed by seed: {min(differences):+.4f} to {max(differences):+.4f} nats per token against "
        f"{base}; by the 95 % interval (bootstrap over blocks of text) better in {below} of {len(found)} seeds, worse "
        f"in {above}."
    )


def _write(
    folder: Path,
    study: Results,
    sentences: Sequence[str],
    warnings: Sequence[str],
    figures: dict[str, str],
    pair: TokenPair | None,
) -> None:
    def write(name: str, text: str) -> None:
        (folder / name).write_text(text, encoding="utf-8")

    section = TokenSection(*pair.names, largest_gains(pair, _ON_PAGE), buckets(pair)) if pair else None
    write("report.html", page(study, sentences, warnings, figures, section))
    write("table.csv", as_csv(study))
    write("table.md", as_markdown(study))
    write("table.tex", as_latex(study))
    write("table.json", json.dumps({"columns": columns(study), "data": rows(study)}))  # as MLflow writes its own tables
    (folder / "figures").mkdir()
    for name, svg in figures.items():
        write(f"figures/{name}.svg", svg)
    if pair:
        write("tokens.tsv", gains_table(largest_gains(pair, _IN_FILE)))


def _log(client: MlflowClient, study: Results, folder: Path) -> None:
    """Put the files into the summary run, and the colours of the figures and a view of the study into MLflow's UI."""
    experiment_id = study.runs[0].experiment_id
    query = f"tags.kind = 'summary' and tags.study = '{study.title}'"
    text = (folder / "table.md").read_text(encoding="utf-8")
    found = client.search_runs([experiment_id], query, max_results=1)
    if found:
        run_id = str(found[0].info.run_id)
    else:
        tags = {"study": study.title, "kind": "summary"}
        run_id = str(client.create_run(experiment_id, tags=tags, run_name=f"study {study.title}").info.run_id)
    if "mlflow.loggedArtifacts" not in client.get_run(run_id).data.tags:
        cells: Any = dict(zip(columns(study), map(list, zip(*rows(study), strict=True)), strict=True))
        client.log_table(run_id, cells, "table.json")  # a second time it would append
    client.log_artifacts(run_id, str(folder))
    client.set_tag(run_id, "mlflow.note.content", text)
    client.set_terminated(run_id)
    for run in study.runs:
        if colour := colours(study).get(run.arm):
            client.set_tag(run.id, "mlflow.runColor", colour)
    for name in study.names:
        for key, value in study_tags(name).items():
            client.set_experiment_tag(experiment_id, key, value)


def _print(study: Results, sentences: Sequence[str], warnings: Sequence[str], pair: TokenPair | None) -> None:
    console = Console()
    for warning in warnings:
        console.print(f"UNFAIR: {warning}", style="red", markup=False)
    console.print(rich_table(study))
    for sentence in sentences:
        console.print(sentence, markup=False, highlight=False)
    if pair:
        console.print(*_token_tables(pair))


def _token_tables(pair: TokenPair) -> tuple[Table, Table]:
    base, other = pair.names
    words = Table(title=f"where {other} gains most over {base}, in nats")
    for column in ("context and token", "in training", "base", "other", "gain"):
        words.add_column(column, justify="left" if column.startswith("context") else "right")
    for gain in largest_gains(pair, _SHOWN):
        cells = (f"{gain.baseline_log_prob:.2f}", f"{gain.log_prob:.2f}", f"{gain.gain:+.2f}")
        words.add_row(Text.assemble(f"{gain.context} ", (gain.token, "bold")), f"{gain.count:,}", *cells)
    by_count = Table(title="perplexity by occurrences in training")
    for column in ("in training", "test tokens", base, other):
        by_count.add_column(column, justify="right")
    for bucket in buckets(pair):
        by_count.add_row(bucket.name, f"{bucket.tokens:,}", *(f"{value:,.2f}" for value in bucket.perplexities))
    return words, by_count
