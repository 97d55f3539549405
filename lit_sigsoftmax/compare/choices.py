"""What each arm of a tuned study chose, in words, from the tracking store alone."""

from __future__ import annotations

import json
import math

from lit_sigsoftmax.compare.fairness import same_key
from lit_sigsoftmax.compare.results import Arm, Results, Run

__all__ = ["choices"]

_PERPLEXITY = "val/best_perplexity"


def choices(study: Results) -> list[str]:
    """Return a sentence for each arm that chose: its values, how good all were, and whether they end the grid."""
    found = []
    for arm in study.finished:
        grid = json.loads(arm.runs[0].tags.get("tune", "{}"))
        keys, size = [same_key(key) for key in grid], math.prod(map(len, grid.values()))
        tried = _tried(study, arm, keys)
        if size < 2 or not tried:
            continue
        chosen = _values(arm.runs[0], keys)
        others = ", ".join(f"{' '.join(values)}: {ppl:,.2f}" for values, ppl in tried.items() if values != chosen)
        words = " ".join(f"{key}={value}" for key, value in zip(keys, chosen, strict=True))
        best = f", {tried[chosen]:,.2f}" if chosen in tried else ""
        missing = f" Of {size} values {size - len(tried)} without a result." if len(tried) < size else ""
        said = f"{arm.name} chose {words} by validation perplexity{best} ({others or 'no other'})."
        found.append(said + missing + _ends(keys, chosen, tried))
    return found


def _tried(study: Results, arm: Arm, keys: list[str]) -> dict[tuple[str, ...], float]:
    # The seed with the most values is the one they were chosen with: others have had what was chosen, now or before.
    by_seed: dict[int | None, dict[tuple[str, ...], float]] = {}
    for run in study.runs:
        if run.arm == arm.name and run.state in ("finished", "tuning") and _PERPLEXITY in run.metrics:
            by_seed.setdefault(run.seed, {})[_values(run, keys)] = run.metrics[_PERPLEXITY]
    return max(by_seed.values(), key=len, default={})


def _values(run: Run, keys: list[str]) -> tuple[str, ...]:
    return tuple(run.params.get(key, "null") for key in keys)


def _ends(keys: list[str], chosen: tuple[str, ...], tried: dict[tuple[str, ...], float]) -> str:
    """A best value at the end of its grid may not be the best there is."""
    said = ""
    for i, key in enumerate(keys):
        try:
            grid, value = {float(values[i]) for values in tried}, float(chosen[i])
        except ValueError:  # a word has no order
            continue
        if len(grid) > 1 and value in (min(grid), max(grid)):
            which = "largest" if value == max(grid) else "smallest"
            said += f" That is the {which} {key} tried: a wider grid may find a better one."
    return said
