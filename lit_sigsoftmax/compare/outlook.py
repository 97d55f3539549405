"""What ``--dry_run`` says: a study's plan in words, what of it is finished, and how long the rest will take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import mean
from typing import TYPE_CHECKING, Any

from lit_sigsoftmax.compare.job import Job, find
from lit_sigsoftmax.compare.plan import PlannedRun, tuning_runs
from lit_sigsoftmax.compare.results import study_runs
from lit_sigsoftmax.compare.study import Study
from lit_sigsoftmax.compare.tuning import best

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["describe"]


def describe(study: Study, client: MlflowClient | None) -> str:
    """Return each run and its state, their number, and how long those that are left will take.

    Args:
        study: The study.
        client: The store, None where there is none yet.
    """
    options = study.options
    first = tuning_runs(options.runs, options.tune)
    states = {run: _state(client, study.job(run)) for run in (first if options.tune else options.runs)}
    later: list[PlannedRun] = []
    if options.tune:
        chosen = best(client, study, first) if client and set(states.values()) == {"finished"} else {}
        others = [run for run in options.runs if run.seed != first[0].seed]
        later = [run for run in others if run.arm not in chosen]
        known = [replace(run, tuned=chosen[run.arm].tuned) for run in others if run.arm in chosen]
        states |= {run: _state(client, study.job(run)) for run in known}
    lines = [f"{run.name}: {state}" for run, state in states.items()]
    if later:
        lines.append(f"{len(later)} more, with the values that each arm chooses: its other seeds")
    left = [*(run for run, state in states.items() if state != "finished"), *later]
    lines.append(f"{len(states) + len(later)} runs, {len(left)} of them to train")
    if left:
        runs = study_runs(client, options.study) if client else []
        lines.append(f"time, {len(options.workers)} at once: {_time(left, runs, len(options.workers))}")
    return "\n".join(lines)


def _state(client: MlflowClient | None, job: Job) -> str:
    runs = find(client, job) if client else []
    if any(run.info.status == "FINISHED" for run in runs):
        return "finished"
    return f"to be continued or started again ({runs[0].info.status})" if runs else "to be trained"


def _time(left: Sequence[PlannedRun], stored: Sequence[Any], workers: int) -> str:
    """Return how long runs take in words, each as long as the finished ones of its arm."""
    found: dict[str, list[float]] = {}
    for run in stored:
        if run.info.status == "FINISHED":
            found.setdefault(run.data.tags.get("arm", ""), []).append((run.info.end_time - run.info.start_time) / 1000)
    if not found:
        return "no estimate yet"
    seconds = {arm: mean(of_arm) for arm, of_arm in found.items()}
    others = mean(seconds.values())
    minutes = sum(seconds.get(run.arm, others) for run in left) / workers / 60
    unknown = ", ".join(dict.fromkeys(run.arm for run in left if run.arm not in seconds))
    return f"about {minutes:.1f} minutes" + (f" (the mean of the others for {unknown})" if unknown else "")
