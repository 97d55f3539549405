"""What may differ between two runs that are compared, and what makes a run the same as another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence

from lit_sigsoftmax.store import below

__all__ = ["config_hash", "in_words", "same_key", "tuned_keys", "unfair_differences", "with_grid"]

# Keys that say where a run is kept, how it is shown or what follows from other keys.
_IMMATERIAL = (
    "config",
    "ckpt_path",
    "weights_only",
    "verbose",
    "print_config",
    "parameters",  # of the model: counted, not set
    "data.root",  # the corpus is known by its fingerprint
    "checkpoint.dirpath",
    "last_checkpoint",
    "lr_scheduler.T_max",  # follows trainer.max_epochs
    "trainer.default_root_dir",
    "trainer.enable_model_summary",
    "trainer.enable_progress_bar",
    "trainer.log_every_n_steps",
    "trainer.logger",
)
# What the fingerprint stands for.
_CORPUS = ("corpus.train", "corpus.valid", "corpus.test", "corpus.entropy", "corpus.perplexity_floor")
_SEED = "seed_everything"


def unfair_differences(
    runs: Mapping[str, Mapping[str, str]], axes: Collection[str] = ("model.activation", "model.n_experts")
) -> dict[str, dict[str, list[str]]]:
    """Find the keys in which runs differ although the comparison is not about them.

    Args:
        runs: Name of a run to its flattened parameters, as in MLflow: the resolved configuration and ``corpus.*``.
        axes: The keys that are compared, with everything below them.

    Returns:
        Key to value to the runs that have it, for each key with more than one value. A key that a run lacks is None.
    """
    ignored = [*_IMMATERIAL, *_CORPUS, _SEED, *map(same_key, axes)]
    keys = dict.fromkeys(key for params in runs.values() for key in params if not below(key, ignored))
    found: dict[str, dict[str, list[str]]] = {}
    for key in keys:
        values: dict[str, list[str]] = {}
        for name, params in runs.items():
            values.setdefault(str(params.get(key)), []).append(name)
        if len(values) > 1:
            found[key] = values
    return found


def in_words(differences: Mapping[str, Mapping[str, Sequence[str]]]) -> list[str]:
    """Return what :func:`unfair_differences` found, a sentence for each key."""
    return [
        f"{key} differs: "
        + ", ".join(f"{v} in {n[0]}" + (f" and {len(n) - 1} more" if n[1:] else "") for v, n in values.items())
        for key, values in differences.items()
    ]


def tuned_keys(tags: Iterable[Mapping[str, str]]) -> set[str]:
    """Return the keys in which runs may differ because each arm chose its value: all of them from the same grid.

    Args:
        tags: The tags of each run; ``tune`` is the grid of a run whose arm chose.
    """
    grids = {of_run.get("tune", "{}") for of_run in tags}
    return set(json.loads(grids.pop())) if len(grids) == 1 else set()


def with_grid(params: Mapping[str, str], tags: Mapping[str, str]) -> dict[str, str]:
    """Return a run's parameters with the grid that its arm chose from: to have had a choice is a difference too."""
    return {**params, "--tune": tags.get("tune", "nothing")}


def config_hash(params: Mapping[str, str]) -> str:
    """Return 16 hexadecimal digits that differ where two runs can give different results.

    Args:
        params: The flattened configuration with ``corpus.fingerprint``.
    """
    material = {key: value for key, value in params.items() if not below(key, _IMMATERIAL)}
    return hashlib.blake2b(json.dumps(material, sort_keys=True).encode(), digest_size=8).hexdigest()


def same_key(key: str) -> str:
    """Return a key of the command line as it stands in the parameters: without ``init_args``.

    Example:
        >>> same_key("model.init_args.backbone.init_args.hidden_size")
        'model.backbone.hidden_size'
    """
    return ".".join(part for part in key.split(".") if part not in ("init_args", "class_path"))
