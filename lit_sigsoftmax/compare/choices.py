"""What each arm of a tuned study chose, in words, from the tracking store alone."""

from __future__ import annotations

import json

from lit_sigsoftmax.compare.fairness import same_key
from lit_sigsoftmax.compare.results import Arm, Results, Run

__all__ = ["choices"]

_PERPLEXITY = "val/best_perplexity"


def choices(study: Results) -> list[str]:
    """Return a sentence for each arm that chose: its values, how good all were, and whether they end the grid."""
    found = []
    for arm in study.finished:
        keys = [same_key(key) for key in json.loads(arm.runs[0].tags.get("tune", "{}"))]
        tried = _tried(study, arm, keys)
        if len(tried) < 2:
            continue
        chosen = _values(arm.runs[0], keys)
        others = ", ".join(f"{' '.join(values)}: {ppl:,.2f}" for values, ppl in tried.items() if values != chosen)
        words = " ".join(f"{key}={value}" for key, value in zip(keys, chosen, strict=True))
        best = f", {tried[chosen]:,.2f}" if chosen in tried else ""
        found.append(f"{arm.name} chose {words} by validation perplexity{best} ({others}).{_ends(keys, chosen, tried)}")
    return found


def _tried(study: Results, arm: Arm, keys: list[str]) -> dict[tuple[str, ...], float]:
    lost = [run for run in study.runs if run.arm == arm.name and run.state == "tuning"]
    seeds = {run.seed for run in lost}
    runs = [*lost, *(run for run in arm.runs if run.seed in seeds)]
    return {_values(run, keys): run.metrics[_PERPLEXITY] for run in runs if _PERPLEXITY in run.metrics}


def _values(run: Run, keys: list[str]) -> tuple[str, ...]:
    return tuple(run.params.get(key, "") for key in keys)


def _ends(keys: list[str], chosen: tuple[str, ...], tried: dict[tuple[str, ...], float]) -> str:
    """A best value at the end of its grid may not be the best there is."""
    said = ""
    for i, key in enumerate(keys):
        try:
            grid = {float(values[i]) for values in tried}
        except ValueError:  # a word has no order
            continue
        if len(grid) > 1 and float(chosen[i]) in (min(grid), max(grid)):
            which = "largest" if float(chosen[i]) == max(grid) else "smallest"
            said += f" That is the {which} {key} tried: a wider grid may find a better one."
    return said
