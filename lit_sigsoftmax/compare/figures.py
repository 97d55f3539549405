"""The figures of a study, as SVG that takes the colour of the text around it: for light pages and dark ones."""

from __future__ import annotations

import io
import itertools
from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

import numpy as np

from lit_sigsoftmax.compare.results import Arm, Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from lit_sigsoftmax.analysis import Spectrum

__all__ = ["bottleneck", "colours", "frequencies", "learning_curves", "perplexities", "spectra", "speed"]

# Okabe and Ito's colours, which colour-blind readers can tell apart, without black and yellow; grey is the baseline's.
_PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_BASELINE = "#808080"
_STYLES = ("-", "--", ":", "-.")
_MARKERS = "osD^vPX"  # in turn: also where colours come again, or cannot be seen, each arm has its own
_INK = "#010203"  # becomes currentColor
_FAR = 5  # times the best perplexity: an arm beyond it would press all the others into a line

Curve = tuple[Sequence[int], Sequence[float]]


def colours(study: Results) -> dict[str, str]:
    """Return a colour for each arm, the same in all figures: by the order in which the arms were first trained."""
    names = [name for name in dict.fromkeys(run.arm for run in study.runs) if name != study.baseline]
    return {study.baseline: _BASELINE} | {name: _PALETTE[i % len(_PALETTE)] for i, name in enumerate(names)}


def learning_curves(study: Results, histories: Mapping[str, Curve]) -> str:
    """Draw validation perplexity against the training step: the mean over seeds, and one standard deviation around it.

    Args:
        study: The study.
        histories: Steps and values of each run, by its id.
    """
    shown, title = _shown(study, "Validation perplexity")
    figure, axes = _figure(title, "training step", "perplexity (log scale)")
    axes.set_yscale("log")
    for arm, style in shown:
        by_step: dict[int, list[float]] = {}
        for run in arm.runs:
            for step, value in zip(*histories.get(run.id, ((), ())), strict=True):
                by_step.setdefault(step, []).append(value)
        # Where a seed stopped early, the mean over the others would jump.
        steps = [step for step in sorted(by_step) if len(by_step[step]) == len(arm.runs)]
        means = np.array([mean(by_step[step]) for step in steps])
        axes.plot(steps, means, label=arm.name, **style)
        if len(arm.runs) > 1 and steps:
            sd = np.array([stdev(by_step[step]) for step in steps])
            axes.fill_between(steps, means - sd, means + sd, color=style["color"], alpha=0.2, linewidth=0)
    _plain_log_axis(axes)
    return _svg(figure, "curves", legend=axes)


def perplexities(study: Results) -> str:
    """Draw test perplexity: the mean over seeds with its 95 % interval, each seed a faint dot.

    Not bars: they would have to start at zero, where differences cannot be seen.
    """
    from scipy import stats

    shown, title = _shown(study, "Test perplexity, 95 % intervals")
    figure, axes = _figure(title, "perplexity", "", rows=len(shown))
    base = mean(study.arm(study.baseline).values("test/perplexity").values())
    axes.axvline(base, color=_BASELINE, linewidth=1, linestyle="--")
    for row, (arm, style) in enumerate(shown):
        values = list(arm.values("test/perplexity").values())
        half = stats.t.isf(0.025, len(values) - 1) * stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
        axes.plot(values, [row] * len(values), "o", color=style["color"], alpha=0.35, markersize=5)
        axes.errorbar(mean(values), row, xerr=half, fmt="D", color=style["color"], markersize=6, capsize=4)
    axes.set_yticks(range(len(shown)), [arm.name for arm, _ in shown])
    axes.invert_yaxis()
    axes.margins(y=0.5 / len(shown))
    return _svg(figure, "perplexities")


def speed(study: Results) -> str:
    """Draw training speed against test perplexity, means over seeds."""
    shown, title = _shown(study, "Speed against perplexity")
    figure, axes = _figure(title, "training tokens per second", "test perplexity")
    # In the legend and not beside the points, where the names of arms that are near each other would overlap.
    for (arm, style), marker in zip(shown, itertools.cycle(_MARKERS)):
        rate = arm.values("train/tokens_per_second").values()
        if rate:
            result = mean(arm.values("test/perplexity").values())
            axes.plot(mean(rate), result, marker, label=arm.name, color=style["color"], markersize=9, alpha=0.8)
    axes.margins(0.1)
    axes.set_xlim(0, 1.1 * axes.get_xlim()[1])
    return _svg(figure, "speed", legend=axes)


def spectra(study: Results, found: Mapping[str, Spectrum]) -> str:
    """Draw the singular values of the matrix of log-probabilities, the largest as 1, of each run, and the threshold.

    Args:
        study: The study.
        found: The spectrum of a run, by its id.
    """
    figure, axes = _figure("Spectrum of the log-probabilities", "index", "singular value, largest = 1")
    axes.set_xscale("log")
    axes.set_yscale("log")
    for arm, style in _styled(study):
        for run in arm.runs:
            if run.id in found:
                values = found[run.id].singular_values.numpy()
                index = np.unique(np.geomspace(1, len(values), 300).astype(int))  # ten thousand points look the same
                axes.plot(index, values[index - 1] / values[0], **style)
        axes.plot([], [], label=arm.name + (f", rank {arm.rank}" if arm.rank else ""), **style)
    levels = {one.press_threshold() / float(one.singular_values[0]) for one in found.values()}
    for i, level in enumerate(sorted(levels)):  # one, where all matrices have the same size
        axes.axhline(level, color=_INK, linestyle=":", linewidth=1.2, label="" if i else "threshold of Press et al.")
    return _svg(figure, "spectra", legend=axes)


def frequencies(study: Results, names: Sequence[str], differences: Mapping[str, Sequence[float]]) -> str:
    """Draw the difference in loss from the baseline by how often a token was seen in training.

    Args:
        study: The study.
        names: The buckets of training counts.
        differences: Of each arm but the baseline and each bucket, nats per token.
    """
    shown, title = _shown(study, f"Loss against {study.arm(study.baseline).layer}, by training frequency")
    figure, axes = _figure(title, "occurrences of the token in training", "nats per token")
    axes.axhline(0, color=_BASELINE, linewidth=1, linestyle="--")
    for arm, style in shown:
        if arm.name in differences:
            axes.plot(range(len(names)), differences[arm.name], marker="o", label=arm.name, **style)
    axes.set_xticks(range(len(names)), names)
    return _svg(figure, "frequencies", legend=axes)


def bottleneck(study: Results) -> str | None:
    """Draw the result against the number that a study varies, a line for each output layer; None where it varies none.

    Where the corpus knows its entropy, as a generated language does, the result is the distance of the loss from it:
    what the model has not learned, or cannot express.
    """
    lines = _lines(study)
    if not lines:
        return None
    key = next(iter(study.finished[0].varied))
    entropy = _number(study.finished[0].runs[0].params.get("corpus.entropy"))
    label = "test perplexity" if entropy is None else "test loss above the entropy, nats per token"
    title = f"Test perplexity against {key}" if entropy is None else f"Distance from the entropy against {key}"
    figure, axes = _figure(title, key, label)
    tints = colours(study)
    for layer, arms in lines.items():
        x = [float(arm.varied[key]) for arm in arms]
        metric = "test/perplexity" if entropy is None else "test/loss"
        results = [np.array(list(arm.values(metric).values())) - (entropy or 0.0) for arm in arms]
        spread = [float(np.std(result, ddof=1)) if len(result) > 1 else 0.0 for result in results]
        means = [float(result.mean()) for result in results]
        axes.errorbar(x, means, yerr=spread, marker="o", capsize=3, label=layer, color=tints[arms[0].name])
    rank = _number(study.finished[0].runs[0].params.get("data.rank"))
    if entropy is not None:
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        if key == "hidden_size" and rank:
            axes.axvline(rank - 1, color=_BASELINE, linewidth=1, linestyle="--")
            axes.annotate(
                "softmax can be exact from here on", (rank - 1, 0.97), (-4, 0), xycoords=("data", "axes fraction"),
                textcoords="offset points", rotation=90, va="top", ha="right", fontsize=9,
            )  # fmt: skip
    return _svg(figure, "bottleneck", legend=axes)


def _lines(study: Results) -> dict[str, list[Arm]]:
    keys = {tuple(arm.varied) for arm in study.finished}
    if len(keys) != 1 or len(key := keys.pop()) != 1:
        return {}
    if any(_number(arm.varied[key[0]]) is None for arm in study.finished):
        return {}
    lines: dict[str, list[Arm]] = {}
    for arm in sorted(study.finished, key=lambda arm: float(arm.varied[key[0]])):
        lines.setdefault(arm.layer, []).append(arm)
    return lines if max(map(len, lines.values())) > 1 else {}


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None


def _shown(study: Results, title: str) -> tuple[list[tuple[Arm, dict[str, Any]]], str]:
    """Return the arms to draw on one scale, and a title that names those that are too far away for it."""
    means = {arm.name: mean(arm.values("test/perplexity").values()) for arm in study.finished}
    far = {
        name: value
        for name, value in means.items()
        if not value <= _FAR * min(means.values()) and name != study.baseline
    }
    if far:
        title += "\nnot drawn: " + ", ".join(f"{name} at {value:,.0f}" for name, value in far.items())
    return [(arm, style) for arm, style in _styled(study) if arm.name not in far], title


def _styled(study: Results) -> list[tuple[Arm, dict[str, Any]]]:
    tints = colours(study)
    place = {name: max(0, i - 1) // len(_PALETTE) for i, name in enumerate(tints)}
    return [
        (arm, {"color": tints[arm.name], "linestyle": _STYLES[place[arm.name] % len(_STYLES)], "linewidth": 1.6})
        for arm in study.finished
    ]


def _figure(title: str, x: str, y: str, rows: int = 0) -> tuple[Any, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, max(3.8, 0.5 * rows + 1)), layout="constrained")
    axes = figure.add_subplot(title=title, xlabel=x, ylabel=y)
    axes.grid(color=_BASELINE, alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _plain_log_axis(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator, NullLocator, ScalarFormatter

    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_locator(NullLocator())


def _svg(figure: Any, name: str, legend: Axes | None = None) -> str:
    from matplotlib import rc_context

    if legend is not None and (named := legend.get_legend_handles_labels())[0]:
        style: dict[str, Any] = {"frameon": False, "fontsize": 9, "labelcolor": _INK}
        if len(named[0]) > 4:  # would hide the curves
            figure.legend(*named, loc="outside lower center", ncols=2, **style)
        else:
            legend.legend(**style)
    for axes in figure.axes:
        axes.title.set(color=_INK, fontsize=11, fontweight="bold")
        for part in (axes.xaxis.label, axes.yaxis.label, *axes.texts):
            part.set_color(_INK)
        axes.tick_params(which="both", colors=_INK)
        for spine in axes.spines.values():
            spine.set_color(_INK)
    text = io.StringIO()
    # One salt for each figure: what they refer to by name must not clash in one page, and is the same every time.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif"}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :].replace(_INK, "currentColor")
