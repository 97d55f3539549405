"""How each arm chooses the values of the keys that are tuned.

Every arm gets the same grid, with the first seed, and chooses by validation perplexity; the test set has no say. The
other seeds are then trained with the chosen values alone: a whole grid for every seed would cost seeds times as much
and answer another question, how good an arm is when it is tuned again for each seed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lit_sigsoftmax.compare.job import find
from lit_sigsoftmax.compare.plan import PlannedRun

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from lit_sigsoftmax.compare.study import Study

__all__ = ["choose"]


def choose(client: MlflowClient, study: Study, tried: Sequence[PlannedRun]) -> tuple[PlannedRun, ...]:
    """Choose each arm's values, and tag the runs that lost with the role ``tuning``.

    The run that won is the arm's run with the first seed.

    Args:
        client: The store.
        study: The study.
        tried: The runs of all arms over the grid.

    Returns:
        The study's runs with the values chosen, without the arms of which no run has finished.
    """
    chosen: dict[str, PlannedRun] = {}
    for arm in dict.fromkeys(run.arm for run in tried):
        candidates = [run for run in tried if run.arm == arm]
        stored = {run: _finished(client, study, run) for run in candidates}
        best = min(candidates, key=lambda run: _perplexity(stored[run]))
        if math.isinf(_perplexity(stored[best])):
            print(f"{arm}: no run has a validation perplexity to choose by")
            continue
        chosen[arm] = best
        print(f"{arm}: {' '.join(f'{key}={value}' for key, value in best.tuned)} chosen by validation")
        for run, found in stored.items():
            if found is not None and run != best:
                client.set_tag(found.info.run_id, "role", "tuning")
            elif found is not None and "role" in found.data.tags:
                client.delete_tag(found.info.run_id, "role")
    return tuple(replace(run, tuned=chosen[run.arm].tuned) for run in study.options.runs if run.arm in chosen)


def _finished(client: MlflowClient, study: Study, run: PlannedRun) -> Any:
    return next((found for found in find(client, study.job(run)) if found.info.status == "FINISHED"), None)


def _perplexity(run: Any) -> float:
    return math.inf if run is None else float(run.data.metrics.get("val/best_perplexity", math.inf))
