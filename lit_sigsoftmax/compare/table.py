"""The table of a comparison, from the tracking store alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from rich.table import Table

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["Arm", "collect", "log_summary", "rich_table", "rows"]

_COLUMNS = ("output layer", "seeds", "parameters", "val perplexity", "test perplexity", "tokens/s")


@dataclass
class Arm:
    """One output layer of a comparison.

    Attributes:
        layer: Activation and mixture size, as in ``sigsoftmax x4``.
        parameters: Number of trainable parameters.
        val: Best validation perplexity of each seed.
        test: Test perplexity of each seed, of the checkpoint that was best in validation.
        tokens_per_second: Training speed of each seed's last epoch.
    """

    layer: str
    parameters: int
    val: list[float] = field(default_factory=list)
    test: list[float] = field(default_factory=list)
    tokens_per_second: list[float] = field(default_factory=list)


def collect(client: MlflowClient, experiment_ids: Sequence[str], study: str) -> list[Arm]:
    """Read the finished runs of a study.

    Returns:
        The output layers, lowest mean test perplexity first.
    """
    arms: dict[str, Arm] = {}
    by_layer: dict[str, list[Any]] = defaultdict(list)
    for run in _runs(client, experiment_ids, study):
        by_layer[f"{run.data.tags['activation']} x{run.data.tags['n_experts']}"].append(run)
    for layer, runs in by_layer.items():
        arm = arms[layer] = Arm(layer, int(runs[0].data.params["parameters"]))
        for run in runs:
            arm.val.append(run.data.metrics["val/best_perplexity"])
            arm.test.append(run.data.metrics["test/perplexity"])
            arm.tokens_per_second.append(run.data.metrics["train/tokens_per_second"])
    return sorted(arms.values(), key=lambda arm: mean(arm.test))


def rows(arms: Sequence[Arm]) -> list[tuple[str, ...]]:
    """Return the table's cells: mean ± standard deviation over seeds."""
    return [
        (
            arm.layer,
            str(len(arm.test)),
            f"{arm.parameters:,}",
            _mean_sd(arm.val),
            _mean_sd(arm.test),
            f"{mean(arm.tokens_per_second):,.0f}",
        )
        for arm in arms
    ]


def rich_table(arms: Sequence[Arm], title: str) -> Table:
    """Return the table for a terminal."""
    table = Table(title=title)
    for column in _COLUMNS:
        table.add_column(column, justify="left" if column == _COLUMNS[0] else "right")
    for row in rows(arms):
        table.add_row(*row)
    return table


def markdown(arms: Sequence[Arm]) -> str:
    """Return the table in Markdown."""
    lines = [_COLUMNS, ("---", *("---:" for _ in _COLUMNS[1:])), *rows(arms)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def log_summary(client: MlflowClient, experiment_id: str, study: str, arms: Sequence[Arm]) -> str:
    """Write the table to a run of its own, the study's summary.

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
    return run_id


def _runs(client: MlflowClient, experiment_ids: Sequence[str], study: str) -> list[Any]:
    query, token, found = f"tags.study = '{study}' and attributes.status = 'FINISHED'", None, []
    while True:
        page = client.search_runs(list(experiment_ids), query, page_token=token)
        found += [run for run in page if run.data.tags.get("kind") != "summary"]
        if not (token := page.token):
            return found


def _mean_sd(values: Sequence[float]) -> str:
    return f"{mean(values):.2f} ± {stdev(values):.2f}" if len(values) > 1 else f"{values[0]:.2f}"
