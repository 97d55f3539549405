"""What lies behind the table: the curves, spectra and token losses that the runs of a study stored."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lit_sigsoftmax.analysis import Spectrum
from lit_sigsoftmax.compare import figures
from lit_sigsoftmax.compare.results import Arm, Results, Run, artifact
from lit_sigsoftmax.compare.statistics import Bootstrap, block_bootstrap
from lit_sigsoftmax.compare.tokens import Text, buckets, read_losses, read_text, token_pair

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["Evidence", "bootstraps", "draw", "read_evidence"]

_BLOCK = 500


@dataclass(frozen=True)
class Evidence:
    """What the runs of a study stored, each by the run's id.

    Attributes:
        histories: Steps and values of ``val/perplexity``.
        spectra: Spectrum of the matrix of log-probabilities.
        losses: The loss of each test token, nats.
        text: The test tokens; None where they are not stored.
    """

    histories: Mapping[str, figures.Curve]
    spectra: Mapping[str, Spectrum]
    losses: Mapping[str, NDArray[np.float64]]
    text: Text | None


def read_evidence(client: MlflowClient, study: Results) -> Evidence:
    """Read all of it from the store."""
    counted = [run for arm in study.finished for run in arm.runs]
    spectra = {run.id: _spectrum(client, run) for run in counted}
    return Evidence(
        {run.id: _history(client, run) for run in counted},
        {run_id: spectrum for run_id, spectrum in spectra.items() if spectrum is not None},
        read_losses(client, study),
        read_text(client, study),
    )


def draw(study: Results, evidence: Evidence) -> dict[str, str]:
    """Return the figures that the evidence is there for, as SVG, by name."""
    drawn = {
        "curves": figures.learning_curves(study, evidence.histories),
        "perplexities": figures.perplexities(study),
        "bottleneck": figures.bottleneck(study),
        "frequencies": _frequencies(study, evidence),
        "spectra": figures.spectra(study, evidence.spectra) if evidence.spectra else None,
        "speed": figures.speed(study),
    }
    return {name: svg for name, svg in drawn.items() if svg is not None}


def bootstraps(study: Results, evidence: Evidence, arm: Arm) -> dict[int, Bootstrap]:
    """Return how far an arm and the baseline are apart on the test set, for each seed that both stored the losses of.

    The block is 500 tokens, or shorter where the text would make fewer than 20 of them.
    """
    base_arm = study.arm(study.baseline_of(arm))
    losses, base = ({run.seed: evidence.losses.get(run.id) for run in a.runs} for a in (arm, base_arm))
    found = {}
    for seed, nll in losses.items():
        other = base.get(seed)
        if seed is not None and nll is not None and other is not None and len(nll) == len(other) > 1:
            found[seed] = block_bootstrap(nll, other, block=min(_BLOCK, math.ceil(len(nll) / 20)))
    return found


def _frequencies(study: Results, evidence: Evidence) -> str | None:
    if evidence.text is None:
        return None
    names: list[str] = []
    differences = {}
    for arm in study.finished:
        base = study.baseline_of(arm)
        stored = all(run.id in evidence.losses for run in (*arm.runs, *study.arm(base).runs))
        if arm.name != base and stored:
            pair = token_pair(study, evidence.losses, evidence.text, base, arm.name)
            found = buckets(pair)
            names = [bucket.name for bucket in found]
            differences[arm.name] = [math.log(b.perplexities[1] / b.perplexities[0]) for b in found]
    return figures.frequencies(study, names, differences) if differences else None


def _history(client: MlflowClient, run: Run) -> figures.Curve:
    points = {}
    for point in sorted(client.get_metric_history(run.id, "val/perplexity"), key=lambda point: point.timestamp):
        points[point.step] = point.value  # a step that a resumed run did again counts once
    steps = sorted(points)
    return steps, [points[step] for step in steps]


def _spectrum(client: MlflowClient, run: Run) -> Spectrum | None:
    content = artifact(client, run, "spectrum.json")
    return None if content is None else Spectrum.from_json(content.decode())
