"""How each arm chooses the values of the keys that are tuned.

Every arm gets the same grid, with the first seed, and chooses by validation perplexity; the test set has no say. The
other seeds are then trained with the chosen values alone: a whole grid for every seed would cost seeds times as much
and answer another question, how good an arm is when it is tuned again for each seed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from lit_sigsoftmax.compare.job import find
from lit_sigsoftmax.compare.plan import PlannedRun
from lit_sigsoftmax.compare.results import study_runs

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from lit_sigsoftmax.compare.study import Study

__all__ = ["best", "choose"]


def choose(client: MlflowClient, study: Study, tried: Sequence[PlannedRun]) -> tuple[PlannedRun, ...]:
    """Choose each arm's values, and tag the runs with other ones with the role ``tuning``.

    The run that won is the arm's run with the first seed.

    Args:
        client: The store.
        study: The study.
        tried: The runs of all arms over the grid.

    Returns:
        The study's runs with the values chosen, without the arms of which no run has finished.
    """
    chosen = best(client, study, tried)
    for arm in dict.fromkeys(run.arm for run in tried):
        if arm in chosen:
            print(f"{arm}: {' '.join(f'{key}={value}' for key, value in chosen[arm].tuned)} chosen by validation")
        else:
            print(f"{arm}: no run has a validation perplexity to choose by")
    for run in study_runs(client, study.options.study):  # with more values an arm may have chosen another one before
        tags = run.data.tags
        if "tune" not in tags or (won := chosen.get(tags.get("arm", ""))) is None:
            continue
        if study.has_values_of(won, run.data.params):
            if "role" in tags:
                client.delete_tag(run.info.run_id, "role")
        elif tags.get("role") != "tuning":
            client.set_tag(run.info.run_id, "role", "tuning")
    return tuple(replace(run, tuned=chosen[run.arm].tuned) for run in study.options.runs if run.arm in chosen)


def best(client: MlflowClient, study: Study, tried: Sequence[PlannedRun]) -> dict[str, PlannedRun]:
    """Return the run of each arm with the lowest validation perplexity, of the arms that have any."""
    perplexity = {run: _perplexity(client, study, run) for run in tried}
    found = {}
    for arm in dict.fromkeys(run.arm for run in tried):
        lowest = min((run for run in tried if run.arm == arm), key=perplexity.__getitem__)
        if not math.isinf(perplexity[lowest]):
            found[arm] = lowest
    return found


def _perplexity(client: MlflowClient, study: Study, run: PlannedRun) -> float:
    stored = [found for found in find(client, study.job(run)) if found.info.status == "FINISHED"]
    return float(stored[0].data.metrics.get("val/best_perplexity", math.inf)) if stored else math.inf
