"""The report as one HTML page that needs nothing but itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone

from lit_sigsoftmax.compare.figures import colours
from lit_sigsoftmax.compare.results import Results, Run
from lit_sigsoftmax.compare.table import columns, rows
from lit_sigsoftmax.compare.tokens import Bucket, Gain

__all__ = ["TokenSection", "page"]


@dataclass(frozen=True)
class TokenSection:
    """Two output layers on the same text.

    Attributes:
        baseline: The one.
        other: The other.
        gains: The tokens on which the other gains most.
        buckets: Perplexity by training frequency.
    """

    baseline: str
    other: str
    gains: Sequence[Gain]
    buckets: Sequence[Bucket]


def page(
    study: Results,
    sentences: Sequence[str],
    warnings: Sequence[str],
    figures: Mapping[str, str],
    tokens: TokenSection | None,
) -> str:
    """Return the page.

    Args:
        study: The study.
        sentences: What came out, in words.
        warnings: What makes the comparison unfair.
        figures: SVG by name.
        tokens: The section on single tokens.
    """
    from jinja2 import Environment, PackageLoader
    from markupsafe import Markup

    # What comes from the store is text: with autoescape on, a run's name can be nothing else on the page.
    environment = Environment(loader=PackageLoader("lit_sigsoftmax.compare", "."), autoescape=True)
    environment.filters |= {"when": _when, "duration": _duration}
    first = study.runs[0]
    return environment.get_template("page.html.jinja").render(
        study=study,
        columns=columns(study),
        rows=list(zip(study.arms, rows(study), strict=True)),
        colours=colours(study),
        sentences=sentences,
        warnings=warnings,
        figures={name: Markup(svg) for name, svg in figures.items()},  # made here, from text that matplotlib escapes
        tokens=tokens,
        facts=_facts(first),
        made=datetime.now().strftime("%Y-%m-%d %H:%M"),
    )


def _facts(run: Run) -> dict[str, str]:
    found = {
        "data": run.tags.get("dataset"),
        "vocabulary": _count(run, "corpus.types", "types"),
        "training": _count(run, "corpus.train", "tokens"),
        "test": _count(run, "corpus.test", "tokens"),
        "epochs": run.params.get("trainer.max_epochs"),
        "perplexity floor": run.params.get("corpus.perplexity_floor", "")[:7],
        "fingerprint": run.params.get("corpus.fingerprint", "")[:8],
    }
    return {key: value for key, value in found.items() if value}


def _count(run: Run, key: str, unit: str) -> str | None:
    return f"{int(run.params[key]):,} {unit}" if key in run.params else None


def _when(milliseconds: int) -> str:
    return datetime.fromtimestamp(milliseconds / 1000, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{minutes // 60} h {minutes % 60} min"
        if minutes >= 60
        else f"{minutes} min {rest} s"
        if minutes
        else f"{rest} s"
    )
