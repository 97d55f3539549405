"""What the runs of a study gave, from the tracking store alone."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from lit_sigsoftmax.compare.statistics import Comparison, compare_with_baseline

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["Arm", "Results", "Run", "artifact", "read_study", "study_names", "study_runs"]


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        id: Its id in the store.
        experiment_id: The experiment that it is in.
        name: Its name, as in ``sigsoftmax x4 seed 2``.
        arm: What it compares: the output layer and whatever else the study varies, as in
            ``sigsoftmax x4 hidden_size=200``.
        layer: The output layer alone.
        seed: The seed; None where the run had none of its own choice.
        state: ``finished``, and all others count in no mean: ``diverged`` (no finite result), ``untested``,
            ``no seed``, ``repeated`` (there is a newer run of that arm and seed), ``tuning``, ``failed``, ``running``,
            ``killed``.
        started: Start, in milliseconds since 1970.
        seconds: From start to end; None while it runs.
        params: The flattened configuration.
        metrics: The last value of each metric.
        tags: Its tags.
    """

    id: str
    experiment_id: str
    name: str
    arm: str
    layer: str
    seed: int | None
    state: str
    started: int
    seconds: float | None
    params: Mapping[str, str]
    metrics: Mapping[str, float]
    tags: Mapping[str, str]


@dataclass(frozen=True)
class Arm:
    """Runs that differ in their seed alone.

    Attributes:
        name: As in ``sigsoftmax x4 hidden_size=200``.
        runs: The finished ones, one of each seed, in the order of the seeds.
        others: Those that count in no mean.
    """

    name: str
    runs: tuple[Run, ...]
    others: tuple[Run, ...]

    @property
    def layer(self) -> str:
        """The output layer alone, as in ``sigsoftmax x4``."""
        return (self.runs or self.others)[0].layer

    @property
    def varied(self) -> dict[str, str]:
        """What the study varies besides the layer: ``{"hidden_size": "200"}``."""
        rest = self.name.removeprefix(self.layer).split()
        return dict(word.split("=", 1) for word in rest if "=" in word)

    @property
    def parameters(self) -> int | None:
        """Number of trainable parameters; None where no run came as far as to say it."""
        known = [run.params["parameters"] for run in (*self.runs, *self.others) if "parameters" in run.params]
        return int(known[0]) if known else None

    @property
    def rank(self) -> str:
        """The mean of ``test/log_prob_rank`` in words, ``≥ 4,096`` where a run has the most it could; empty without."""
        counts, limits = self.values("test/log_prob_rank"), self.values("test/log_prob_rank_limit")
        if not counts:
            return ""
        at_limit = any(count >= limits.get(seed, math.inf) for seed, count in counts.items())
        return f"{'≥ ' if at_limit else ''}{mean(counts.values()):,.0f}"

    def values(self, metric: str) -> dict[int, float]:
        """Return a metric by seed, of the runs that have it."""
        return {run.seed: run.metrics[metric] for run in self.runs if run.seed is not None and metric in run.metrics}


@dataclass(frozen=True)
class Results:
    """What a study, or several combined, gave.

    Attributes:
        names: The studies.
        runs: Every run, in whatever state, by start.
        arms: What is compared, lowest mean test perplexity first, those without a result last.
        baseline: The arm that the others are compared with.
    """

    names: tuple[str, ...]
    runs: tuple[Run, ...]
    arms: tuple[Arm, ...]
    baseline: str

    @property
    def title(self) -> str:
        """The names of the studies."""
        return " + ".join(self.names)

    @property
    def finished(self) -> tuple[Arm, ...]:
        """The arms with a result."""
        return tuple(arm for arm in self.arms if arm.runs)

    def baseline_of(self, arm: Arm) -> str:
        """Return what an arm is compared with: the baseline's layer at the arm's own value of what is varied besides.

        The baseline itself where there is no such arm, or where all arms have one layer.
        """
        layer = self.arm(self.baseline).layer
        if all(other.layer == layer for other in self.finished):
            return self.baseline
        same = (other.name for other in self.finished if other.layer == layer and other.varied == arm.varied)
        return next(same, self.baseline)

    @cached_property
    def comparisons(self) -> dict[str, Comparison]:
        """Each arm with a result against its baseline; Holm's correction is over all of them."""
        results = {arm.name: arm.values("test/perplexity") for arm in self.finished}
        baselines = {arm.name: base for arm in self.finished if (base := self.baseline_of(arm)) != arm.name}
        return {one.layer: one for one in compare_with_baseline(results, baselines)}

    def arm(self, name: str) -> Arm:
        """Return an arm by its name."""
        return next(arm for arm in self.arms if arm.name == name)


def study_runs(client: MlflowClient, study: str | None = None) -> list[Any]:
    """Return the training runs of a study, or of all, in whatever state, of all experiments."""
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    query, token, found = "tags.kind = 'fit'" + (f" and tags.study = '{study}'" if study else ""), None, []
    while experiments:
        page = client.search_runs(experiments, query, page_token=token)
        found += list(page)
        if not (token := page.token):
            break
    return found


def study_names(client: MlflowClient) -> list[str]:
    """Return the studies that the store has runs of, the newest first."""
    runs = sorted(study_runs(client), key=lambda run: -run.info.start_time)
    return list(dict.fromkeys(run.data.tags["study"] for run in runs if "study" in run.data.tags))


def read_study(client: MlflowClient, names: Sequence[str], baseline: str | None = None) -> Results:
    """Read a study, or several as one: more seeds of the same arms, or more arms.

    Args:
        client: The store.
        names: The studies.
        baseline: The arm that the others are compared with; by default the one that the study names, else plain
            softmax, else the first that was trained.

    Raises:
        ValueError: There is no such study, or no such arm with a result.
    """
    names = list(dict.fromkeys(names))
    found = []
    for name in names:
        # A quote in it would end the query's; no study is called so.
        if "'" in name or not (runs := study_runs(client, name)):
            known = ", ".join(map(repr, study_names(client))) or "none"
            raise ValueError(f"there is no study {name!r} in this store; there are: {known}")
        found += runs
    runs = _newest_of_each_seed(sorted(map(_run, found), key=lambda run: run.started))
    arms = _arms(runs)
    return Results(tuple(names), tuple(runs), arms, _baseline(runs, arms, baseline))


def artifact(client: MlflowClient, run: Run, name: str) -> bytes | None:
    """Return the content of a run's artifact, None where it has none of that name."""
    if not any(file.path == name for file in client.list_artifacts(run.id)):
        return None
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # one line for each of many small files
    with TemporaryDirectory() as folder:
        return Path(client.download_artifacts(run.id, name, folder)).read_bytes()


def _run(run: Any) -> Run:
    info, tags = run.info, run.data.tags
    layer = f"{tags['activation']} x{tags['n_experts']}" if "activation" in tags else info.run_name
    seed = int(tags["seed"]) if tags.get("seed", "").lstrip("-").isdigit() else None
    state = info.status.lower()
    if state == "finished":
        if not math.isfinite(run.data.metrics.get("test/perplexity", math.nan)):
            state = "diverged" if "diverged" in tags else "untested"
        elif seed is None:
            state = "no seed"
    if tags.get("role") == "tuning":
        state = "tuning" if state == "finished" else f"tuning, {state}"
    return Run(
        id=info.run_id,
        experiment_id=info.experiment_id,
        name=info.run_name,
        arm=tags.get("arm") or layer,
        layer=layer,
        seed=seed,
        state=state,
        started=info.start_time,
        seconds=(info.end_time - info.start_time) / 1000 if info.end_time else None,
        params=run.data.params,
        metrics=run.data.metrics,
        tags=tags,
    )


def _newest_of_each_seed(runs: Sequence[Run]) -> list[Run]:
    newest = {(run.arm, run.seed): run.id for run in runs if run.state == "finished"}
    kept = set(newest.values())
    return [replace(run, state="repeated") if run.state == "finished" and run.id not in kept else run for run in runs]


def _arms(runs: Sequence[Run]) -> tuple[Arm, ...]:
    by_name: dict[str, list[Run]] = {}
    for run in runs:
        if not run.state.startswith("tuning"):
            by_name.setdefault(run.arm, []).append(run)
    arms = []
    for name, found in by_name.items():
        finished = sorted((run for run in found if run.state == "finished"), key=lambda run: run.seed or 0)
        arms.append(Arm(name, tuple(finished), tuple(run for run in found if run.state != "finished")))
    return tuple(sorted(arms, key=lambda a: mean(a.values("test/perplexity").values()) if a.runs else math.inf))


def _baseline(runs: Sequence[Run], arms: Sequence[Arm], asked: str | None) -> str:
    names = [arm.name for arm in arms if arm.runs]
    if asked is not None and asked not in names:
        raise ValueError(f"no finished run of the baseline {asked!r}; there are: {', '.join(names) or 'none'}")
    first = next((run.arm for run in runs if run.arm in names), "")
    candidates = [asked, *(run.tags.get("baseline") for run in runs), "softmax x1", first]
    return next((name for name in candidates if name and name in names), "")
