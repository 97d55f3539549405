"""The command line of ``compare``."""

from __future__ import annotations

import argparse
import functools
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NoReturn

import yaml

from lit_sigsoftmax.compare.plan import PlannedRun, default_baseline, parse_seeds, plan
from lit_sigsoftmax.compare.run import Share, shares
from lit_sigsoftmax.store import default_tracking_uri
from lit_sigsoftmax.training import resolve_recipes

__all__ = ["Options", "read_options"]


@dataclass(frozen=True)
class Options:
    """What the command line asks for.

    Attributes:
        study: The study's name.
        runs: Every arm with every seed.
        axes: The keys of the recipe that are compared.
        tune: The keys that each arm chooses for itself, with the values to try.
        baseline: The arm that the others are compared with.
        recipe: The arguments that hold for every run.
        tracking_uri: The store.
        workers: What each run at a time may use of this machine.
        executor: submitit's executor that trains; None for processes of this machine.
        executor_args: Its parameters.
        dry_run: Whether the plan is only printed.
        allow_unfair: Whether runs may differ in more than the axes.
        fail: Prints an error of the command line and exits with code 2.
    """

    study: str
    runs: tuple[PlannedRun, ...]
    axes: tuple[str, ...]
    tune: dict[str, list[str]]
    baseline: str
    recipe: tuple[str, ...]
    tracking_uri: str
    workers: tuple[Share, ...]
    executor: str | None
    executor_args: dict[str, Any]
    dry_run: bool
    allow_unfair: bool
    fail: Callable[[str], NoReturn]


def read_options(args: Sequence[str]) -> Options:
    """Read the command line.

    Raises:
        SystemExit: 2 for a mistake in it.
    """
    parser = _parser()
    words, recipe = parser.parse_known_args(args)
    for option, least in (("--workers", words.workers), ("--n_experts", min(words.n_experts))):
        if least < 1:
            parser.error(f"{option} is at least 1, not {least}")
    study = words.study or datetime.now().strftime("%Y-%m-%d %H:%M:%S")
    # Runs get the name as a YAML value and are found by it in a quoted query: it must be a plain word to both.
    if not re.fullmatch(r"(?!null$|true$|false$)\w(?!.*: )[\w .:+-]*", study, re.IGNORECASE):
        parser.error(f"--study is a name of letters, digits, spaces and . : + - _, not {study!r}")
    uri = words.tracking_uri or default_tracking_uri()
    try:
        vary, tune = _keys("--vary", words.vary), _keys("--tune", words.tune)
        if both := vary.keys() & tune.keys():
            raise ValueError(f"{min(both)} is either compared (--vary) or chosen by each arm (--tune)")
        runs = plan(words.activations, words.n_experts, parse_seeds(words.seeds), vary)
        parameters = dict(_setting(word) for word in words.executor_args)
    except ValueError as error:
        parser.error(str(error))
    baseline = words.baseline or default_baseline(runs)
    if baseline not in (arms := list(dict.fromkeys(run.arm for run in runs))):
        parser.error(f"--baseline {baseline!r} is no arm of this comparison, which has {', '.join(map(repr, arms))}")
    return Options(
        study=study,
        runs=tuple(runs),
        axes=("model.activation", "model.n_experts", *vary),
        tune=tune,
        baseline=baseline,
        recipe=tuple(resolve_recipes(recipe)),
        tracking_uri=uri,
        workers=tuple(shares(words.workers, _cores(), _gpus())),
        executor=words.executor,
        executor_args=parameters,
        dry_run=words.dry_run,
        allow_unfair=words.allow_unfair,
        fail=parser.error,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "lit-sigsoftmax compare",
        description="Train every combination of output layer and seed of one recipe; print and log the table. Stopped "
        "at any point, the same command with the same --study continues.",
        epilog="Further arguments are those of lit-sigsoftmax fit, such as --config, --data.root or "
        "--trainer.max_epochs, and hold for every run.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--activations",
        nargs="+",
        default=["softmax", "sigsoftmax"],
        metavar="NAME",
        help="a name, or one with its own number of experts such as 'softmax x4'",
    )
    add("--n_experts", nargs="+", type=int, default=[1], metavar="K")
    add("--seeds", nargs="+", default=["0"], metavar="SEED", help="such as 0 1 2 or 0..4")
    keys = functools.partial(add, nargs="+", action="append", default=[], metavar=("KEY", "VALUE"))
    keys("--vary", help="compare another key of the recipe too, at these values; may be repeated")
    keys("--tune", help="let each arm choose a key among these values, by validation with the first seed")
    add("--baseline", metavar="ARM", help="what the others are compared with, such as 'softmax x1' (default: softmax)")
    add("--study", help="name that ties the runs together (default: date and time)")
    add("--tracking_uri", help=f"the MLflow store (default: {default_tracking_uri()})")
    add("--workers", type=int, default=1, help="runs at a time; they share the processor's cores and the GPUs")
    add("--executor", metavar="NAME", help="train as jobs of submitit instead: slurm, or local")
    add(
        "--executor_args", nargs="+", default=[], metavar="KEY=VALUE", help="such as slurm_partition=gpu timeout_min=60"
    )
    add("--dry_run", action="store_true", help="print the plan, and an estimate of its time once a run has finished")
    add("--allow_unfair", action="store_true", help="compare runs that differ in more than the keys that are compared")
    return parser


def _keys(option: str, given: Sequence[Sequence[str]]) -> dict[str, list[str]]:
    keys: dict[str, list[str]] = {}
    for key, *values in given:
        if not values or "=" in key or key.startswith("-"):
            raise ValueError(f"{option} takes a key and its values, such as {option} optimizer.lr 0.001 0.01")
        if key in keys:
            raise ValueError(f"{option} {key} is given twice: give all its values at once")
        keys[key] = list(dict.fromkeys(values))
    return keys


def _setting(word: str) -> tuple[str, Any]:
    key, equals, value = word.partition("=")
    if not equals:
        raise ValueError(f"--executor_args are KEY=VALUE, not {word!r}")
    return key, yaml.safe_load(value)


def _cores() -> int:
    # What this process may use, which on a shared machine is less than it has.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _gpus() -> list[str]:
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return [name for name in visible.split(",") if name] or [str(i) for i in range(torch.cuda.device_count())]
