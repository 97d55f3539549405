"""``lit-sigsoftmax compare``."""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lit_sigsoftmax.compare.plan import PlannedRun, parse_seeds, plan
from lit_sigsoftmax.compare.run import check, train
from lit_sigsoftmax.compare.table import collect, log_summary, rich_table, study_runs
from lit_sigsoftmax.tracking import default_tracking_uri, open_client, store_root
from lit_sigsoftmax.training import resolve_recipes
from lit_sigsoftmax.views import comparison_url

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["compare"]


def compare(args: Sequence[str]) -> None:
    """Train every combination of output layer and seed of one recipe, and print and log the table.

    Args:
        args: The command line after ``compare``; what it does not know itself goes to every ``fit``.

    Raises:
        SystemExit: 2 for a mistake in the command line or the recipe, 1 where a run failed.
    """
    parser = _parser()
    options, recipe = parser.parse_known_args(args)
    if options.workers < 1 or min(options.n_experts) < 1:
        parser.error(f"--workers and --n_experts are at least 1, not {min(options.workers, *options.n_experts)}")
    study = options.study or datetime.now().strftime("%Y-%m-%d %H:%M:%S")
    # Runs get the name as a YAML value and are found by it in a quoted query: it must be a plain word to both.
    if not re.fullmatch(r"(?!null$|true$|false$)\w(?!.*: )[\w .:+-]*", study, re.IGNORECASE):
        parser.error(f"--study is a name of letters, digits, spaces and . : + - _, not {study!r}")
    try:
        runs = plan(options.activations, options.n_experts, parse_seeds(options.seeds))
    except ValueError as error:
        parser.error(str(error))
    uri = options.tracking_uri or default_tracking_uri()
    logger = "--trainer.logger.init_args."
    recipe = [*resolve_recipes(recipe), f"{logger}study={study}", f"{logger}tracking_uri={uri}"]
    if code := check([[*recipe, *run.arguments] for run in runs if run.seed == runs[0].seed]):
        raise SystemExit(code)
    client = open_client(uri)
    if study_runs(client, study):
        parser.error(f"there is a study {study!r} in {uri} already: choose another name with --study")
    failed = _train_all(runs, recipe, store_root(uri) / "logs" / re.sub(r"\W", "-", study), options.workers)
    _conclude(client, uri, study)
    if failed:
        raise SystemExit(1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "lit-sigsoftmax compare",
        description="Train every combination of output layer and seed of one recipe; print and log the table.",
        epilog="Further arguments are those of lit-sigsoftmax fit, such as --config, --data.root or "
        "--trainer.max_epochs, and hold for every run.",
        allow_abbrev=False,
    )
    parser.add_argument("--activations", nargs="+", default=["softmax", "sigsoftmax"], metavar="NAME")
    parser.add_argument("--n_experts", nargs="+", type=int, default=[1], metavar="K")
    parser.add_argument("--seeds", nargs="+", default=["0"], metavar="SEED", help="such as 0 1 2 or 0..4")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time; they share the processor's cores")
    parser.add_argument("--study", help="name that ties the runs together (default: date and time)")
    parser.add_argument("--tracking_uri", help=f"the MLflow store (default: {default_tracking_uri()})")
    return parser


def _train_all(runs: Sequence[PlannedRun], recipe: Sequence[str], logs: Path, workers: int) -> int:
    logs.mkdir(parents=True, exist_ok=True)
    threads = max(1, (os.cpu_count() or 1) // workers)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bars, ThreadPoolExecutor(workers) as pool:
        total = bars.add_task("runs", total=len(runs))

        def one(run: PlannedRun) -> bool:
            log, start = logs / f"{run.name}.log", time.perf_counter()
            bar = bars.add_task(run.name, total=None)
            done = train(
                [*recipe, *run.arguments],
                log,
                lambda step, steps: bars.update(bar, completed=step, total=steps),
                threads,
            )
            bars.remove_task(bar)
            bars.advance(total)
            outcome = "done" if done else f"FAILED, see {log}\n{_last_lines(log)}\n{run.name} failed"
            bars.print(f"{run.name}: {outcome} after {time.perf_counter() - start:.0f} s", markup=False)
            return done

        return len(runs) - sum(pool.map(one, runs))


def _conclude(client: MlflowClient, uri: str, study: str) -> None:
    runs = study_runs(client, study)
    arms = collect(runs)
    if not arms:
        print("no run has finished: there is nothing to compare", file=sys.stderr)
        return
    experiment_id = runs[0].info.experiment_id
    log_summary(client, experiment_id, study, arms)
    Console().print(rich_table(arms, f"study {study}"))
    print(f"Compare: {comparison_url(uri, experiment_id, study)}")
    if not uri.startswith("http"):
        print("Serve it with: lit-sigsoftmax ui")


def _last_lines(log: Path, n: int = 5) -> str:
    lines = log.read_text(errors="replace").rstrip().splitlines() if log.exists() else []
    return "\n".join(lines[-n:])
