"""Where on the test set one output layer gains over another: token by token, and by how often a type was trained on."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lit_sigsoftmax.compare.results import Results, Run, artifact

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = [
    "Bucket",
    "Gain",
    "Text",
    "TokenPair",
    "buckets",
    "gains_table",
    "largest_gains",
    "read_losses",
    "read_text",
    "token_pair",
]

_CONTEXT = 8
_EDGES = (0, 1, 10, 100, 1_000, 10_000)


@dataclass(frozen=True)
class Text:
    """The tokens of the test split.

    Attributes:
        types: The vocabulary.
        ids: (N,) the tokens.
        counts: (V,) how often each type occurs in the training split.
    """

    types: Sequence[str]
    ids: NDArray[np.int32]
    counts: NDArray[np.int64]

    def token(self, position: int) -> str:
        """Return the token at a position."""
        return self.types[self.ids[position]]

    def context(self, position: int) -> str:
        """Return the tokens right before a position."""
        return " ".join(self.types[i] for i in self.ids[max(0, position - _CONTEXT) : position])


@dataclass(frozen=True)
class TokenPair:
    """Two output layers on one test set.

    Attributes:
        names: Which they are: the baseline and the other.
        nll: The loss of each token, nats, (N,) each; the mean over seeds where a name is an arm.
        text: The tokens.
    """

    names: tuple[str, str]
    nll: tuple[NDArray[np.float64], NDArray[np.float64]]
    text: Text


@dataclass(frozen=True)
class Gain:
    """One test token.

    Attributes:
        position: Its place in the test split, from 0.
        context: The tokens before it.
        token: The token.
        count: How often its type occurs in the training split.
        baseline_log_prob: Nats, by the baseline.
        log_prob: Nats, by the other layer.
    """

    position: int
    context: str
    token: str
    count: int
    baseline_log_prob: float
    log_prob: float

    @property
    def gain(self) -> float:
        """How much more the other layer gives to the token, in nats."""
        return self.log_prob - self.baseline_log_prob


@dataclass(frozen=True)
class Bucket:
    """The test tokens whose types occur about equally often in the training split.

    Attributes:
        name: As in ``10-99``.
        tokens: How many there are.
        perplexities: Of the baseline and the other layer, on these tokens alone.
    """

    name: str
    tokens: int
    perplexities: tuple[float, float]


def read_losses(client: MlflowClient, study: Results) -> dict[str, NDArray[np.float64]]:
    """Return the loss of each test token, nats, (N,), by the id of the run, for all runs that stored it."""
    contents = {run.id: artifact(client, run, "test_token_nll.npy") for run in study.runs}
    return {
        run_id: np.load(io.BytesIO(content), allow_pickle=False).astype(np.float64)
        for run_id, content in contents.items()
        if content is not None
    }


def read_text(client: MlflowClient, study: Results) -> Text | None:
    """Return the test split that the first run with a result stored, None where it stored none."""
    content = artifact(client, study.finished[0].runs[0], "test_tokens.npz")
    if content is None:
        return None
    with np.load(io.BytesIO(content), allow_pickle=False) as stored:
        return Text(bytes(stored["types"]).decode().split("\n"), stored["ids"], stored["counts"])


def token_pair(
    study: Results, losses: Mapping[str, NDArray[np.float64]], text: Text, baseline: str, other: str
) -> TokenPair:
    """Put two layers beside each other.

    Args:
        study: The study that they belong to.
        losses: What :func:`read_losses` found.
        text: The tokens.
        baseline: An arm, then the mean over the seeds that both have; or a run, by its name or id.
        other: The same.

    Raises:
        ValueError: There is no such arm or run, it stored no losses, or it was tested on another text.
    """
    pair = _chosen(study, baseline), _chosen(study, other)
    seeds = {run.seed for run in pair[0]} & {run.seed for run in pair[1]}
    nll = []
    for runs in pair:
        kept = [run for run in runs if run.seed in seeds] if min(map(len, pair)) > 1 else runs
        for run in kept:
            if run.id not in losses:
                raise ValueError(
                    f"run {run.name!r} stored no token losses, artifact test_token_nll.npy: train it again"
                )
            if len(losses[run.id]) != len(text.ids):
                raise ValueError(f"run {run.name!r} was tested on another text than the first of the study")
        if not kept:
            raise ValueError(f"{baseline!r} and {other!r} have no seed in common")
        nll.append(np.mean([losses[run.id] for run in kept], axis=0))
    return TokenPair((baseline, other), (nll[0], nll[1]), text)


def largest_gains(pair: TokenPair, n: int) -> list[Gain]:
    """Return the ``n`` tokens on which the other layer gains most over the baseline."""
    base, other = pair.nll
    order = np.argsort(other - base, kind="stable")[:n]
    text = pair.text
    return [
        Gain(i, text.context(i), text.token(i), int(text.counts[text.ids[i]]), -float(base[i]), -float(other[i]))
        for i in map(int, order)
    ]


def buckets(pair: TokenPair) -> list[Bucket]:
    """Return perplexity by how often a token's type occurs in the training split, in powers of ten."""
    counts = pair.text.counts[pair.text.ids]
    found = []
    for name, low, high in _ranges():
        chosen = (counts >= low) & (counts < high)
        if chosen.any():
            base, other = (float(np.exp(nll[chosen].mean())) for nll in pair.nll)
            found.append(Bucket(name, int(chosen.sum()), (base, other)))
    return found


def gains_table(gains: Sequence[Gain]) -> str:
    """Return tab-separated lines with a head. A token holds no white space, so no tab either."""
    head = "position\tcontext\ttoken\ttraining_count\tbaseline_log_prob\tlog_prob\tgain\n"
    return head + "".join(
        f"{g.position}\t{g.context}\t{g.token}\t{g.count}\t{g.baseline_log_prob:.6f}\t{g.log_prob:.6f}\t{g.gain:.6f}\n"
        for g in gains
    )


def _ranges() -> Iterator[tuple[str, int, float]]:
    for low, high in zip(_EDGES, (*_EDGES[1:], np.inf), strict=True):
        yield (
            "never seen" if high == 1 else f"{low:,} or more" if high == np.inf else f"{low:,}-{high - 1:,}",
            low,
            high,
        )


def _chosen(study: Results, name: str) -> list[Run]:
    for arm in study.finished:
        if arm.name == name:
            return list(arm.runs)
    found = [run for run in study.runs if name in (run.id, run.name)]
    if not found:
        arms = ", ".join(arm.name for arm in study.finished)
        raise ValueError(f"no arm or run {name!r} in study {study.title!r}; its arms are: {arms}")
    return found[-1:]
