"""A study: its jobs, what is unfair in it, and what its runs say of it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_sigsoftmax.compare.fairness import config_hash, in_words, same_key, tuned_keys, unfair_differences, with_grid
from lit_sigsoftmax.compare.job import Job
from lit_sigsoftmax.compare.options import Options
from lit_sigsoftmax.compare.plan import PlannedRun, tuning_runs
from lit_sigsoftmax.compare.results import study_runs
from lit_sigsoftmax.store import below, store_root

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["Study"]


class Study:
    """Runs that are compared, with what is known of them before they are trained.

    Args:
        options: The command line.
        params: The flattened configuration of each arm with the first seed and each value that is tuned, as from
            :func:`lit_sigsoftmax.compare.run.check`, in the order of
            :func:`lit_sigsoftmax.compare.plan.tuning_runs`.
    """

    def __init__(self, options: Options, params: Sequence[dict[str, str]]) -> None:
        self.options = options
        self.logs: Path = store_root(options.tracking_uri) / "logs" / _file_name(options.study)
        first = tuning_runs(options.runs, options.tune)
        self._params = {(run.arm, run.tuned): found for run, found in zip(first, params, strict=True)}

    def jobs(self, runs: Sequence[PlannedRun], tuning: bool = False) -> list[Job]:
        """Return the jobs that train the runs, under the tags by which they are found again."""
        return [self.job(run, tuning) for run in runs]

    def job(self, run: PlannedRun, tuning: bool = False) -> Job:
        """Return the job that trains a run."""
        options = self.options
        known_as = config_hash(self.params(run))
        tags = {"arm": run.arm, "baseline": options.baseline, "axes": " ".join(options.axes), "config_hash": known_as}
        tags |= self._grid
        logger = {
            "tracking_uri": options.tracking_uri,
            "on_outage": "spool",  # in the moment between the job's question to the store and the run's beginning
            "study": options.study,
            "run_name": run.name,
            "tags": json.dumps(tags | ({"role": "tuning"} if tuning else {})),
        }
        given = [f"--trainer.logger.init_args.{key}={value}" for key, value in logger.items()]
        arguments = (*options.recipe, *run.arguments, *given)
        log = self.logs / f"{_file_name(run.name)}.log"
        return Job(run.name, arguments, options.tracking_uri, options.study, known_as, log)

    def params(self, run: PlannedRun) -> dict[str, str]:
        """Return the flattened configuration of a run."""
        return {**self._params[run.arm, run.tuned], "seed_everything": str(run.seed)}

    def has_values_of(self, run: PlannedRun, params: Mapping[str, str]) -> bool:
        """Whether a stored configuration has the values that are tuned of a planned run."""
        keys = [same_key(key) for key in self.options.tune]
        planned, stored = ({k: v for k, v in of.items() if below(k, keys)} for of in (self.params(run), params))
        return planned == stored

    def unfair(self, stored: Sequence[Any]) -> str:
        """Return in which keys the runs differ though they are not compared, in words; nothing where they do not.

        Args:
            stored: The study's runs in the store.
        """
        tags = {run.info.run_id: {**run.data.tags, **self._changes(run)} for run in stored}
        runs = {
            f"{run.info.run_name} in the store": with_grid(run.data.params, tags[run.info.run_id])
            for run in stored
            if run.data.params
        }
        for planned in tuning_runs(self.options.runs, self.options.tune):
            runs[planned.name] = with_grid(self._params[planned.arm, planned.tuned], self._grid)
        tuned = tuned_keys([self._grid, *tags.values()])
        return "; ".join(in_words(unfair_differences(runs, [*self.options.axes, *tuned])))

    def mark(self, client: MlflowClient) -> None:
        """Let the study's runs say which arm the others are compared with, and what grid theirs has chosen from."""
        for run in study_runs(client, self.options.study):
            for key, value in {"baseline": self.options.baseline, **self._changes(run)}.items():
                if run.data.tags.get(key) != value:
                    client.set_tag(run.info.run_id, key, value)

    @property
    def _grid(self) -> dict[str, str]:
        grid = {key: sorted(values) for key, values in sorted(self.options.tune.items())}
        return {"tune": json.dumps(grid)} if grid else {}

    def _changes(self, run: Any) -> dict[str, str]:
        """The grid for a stored run of an arm that this command tunes, perhaps over more values than before."""
        ours = any(run.data.tags.get("arm") == planned.arm for planned in self.options.runs)
        return self._grid if ours and "tune" in run.data.tags else {}


def _file_name(name: str) -> str:
    return re.sub(r"[^\w .=+-]", "-", name)
