"""The table of a comparison, from the tracking store alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from rich.table import Table

from lit_sigsoftmax.views import study_tags

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["Arm", "collect", "log_summary", "markdown", "rich_table", "rows", "study_runs"]

_COLUMNS = ("output layer", "seeds", "params", "val ppl", "test ppl", "tokens/s")
_METRICS = ("val/best_perplexity", "test/perplexity", "train/tokens_per_second")


@dataclass
class Arm:
    """One output layer of a comparison.

    Attributes:
        layer: Activation and mixture size, as in ``sigsoftmax x4``.
        parameters: Number of trainable parameters.
        val: Best validation perplexity of each seed.
        test: Test perplexity of each seed, of the checkpoint that was best in validation.
        tokens_per_second: Training speed of each seed's last epoch.
        diverged: Number of seeds without a finite result, which are in none of the lists.
    """

    layer: str
    parameters: int
    val: list[float] = field(default_factory=list)
    test: list[float] = field(default_factory=list)
    tokens_per_second: list[float] = field(default_factory=list)
    diverged: int = 0


def study_runs(client: MlflowClient, study: str) -> list[Any]:
    """Return the training runs of a study, in whatever state, of all experiments."""
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    query, token, found = f"tags.study = '{study}' and tags.kind = 'fit'", None, []
    while True:
        page = client.search_runs(experiments, query, page_token=token)
        found += list(page)
        if not (token := page.token):
            return found


def collect(runs: Sequence[Any]) -> list[Arm]:
    """Gather finished runs by output layer.

    Returns:
        The output layers, lowest mean test perplexity first, those without a finite result last.
    """
    arms: dict[str, Arm] = {}
    for run in runs:
        if run.info.status != "FINISHED":
            continue
        layer = f"{run.data.tags['activation']} x{run.data.tags['n_experts']}"
        arm = arms.setdefault(layer, Arm(layer, int(run.data.params["parameters"])))
        values = [run.data.metrics.get(name) for name in _METRICS]
        if None in values:
            arm.diverged += 1
            continue
        for sample, value in zip((arm.val, arm.test, arm.tokens_per_second), values, strict=True):
            sample.append(value)
    return sorted(arms.values(), key=lambda arm: mean(arm.test) if arm.test else float("inf"))


def rows(arms: Sequence[Arm]) -> list[tuple[str, ...]]:
    """Return the table's cells: mean ± standard deviation over seeds."""
    return [
        (
            arm.layer,
            str(len(arm.test)) + (f" ({arm.diverged} diverged)" if arm.diverged else ""),
            f"{arm.parameters:,}",
            _mean_sd(arm.val),
            _mean_sd(arm.test),
            f"{mean(arm.tokens_per_second):,.0f}" if arm.tokens_per_second else "-",
        )
        for arm in arms
    ]


def rich_table(arms: Sequence[Arm], title: str) -> Table:
    """Return the table for a terminal."""
    table = Table(title=title)
    for column in _COLUMNS:
        table.add_column(column, justify="left" if column == _COLUMNS[0] else "right", no_wrap=True)
    for row in rows(arms):
        table.add_row(*row)
    return table


def markdown(arms: Sequence[Arm]) -> str:
    """Return the table in Markdown."""
    lines = [_COLUMNS, ("---", *("---:" for _ in _COLUMNS[1:])), *rows(arms)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def log_summary(client: MlflowClient, experiment_id: str, study: str, arms: Sequence[Arm]) -> str:
    """Write the table to a run of its own, the study's summary, and give the experiment a view of the study.

    Returns:
        The run's id.
    """
    text = markdown(arms)
    tags = {"study": study, "kind": "summary", "mlflow.note.content": text}
    run_id = str(client.create_run(experiment_id, tags=tags, run_name=f"study {study}").info.run_id)
    cells: Any = dict(zip(_COLUMNS, map(list, zip(*rows(arms), strict=True)), strict=True))
    client.log_table(run_id, cells, "comparison.json")
    client.log_text(run_id, text, "comparison.md")
    client.set_terminated(run_id)
    for key, value in study_tags(study).items():
        client.set_experiment_tag(experiment_id, key, value)
    return run_id


def _mean_sd(values: Sequence[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.2f}" if values else "-"
    return f"{mean(values):.2f} ± {stdev(values):.2f}"
