"""The table of a study: for a terminal, for a paper, and for a program."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Sequence
from statistics import mean, stdev

from rich.table import Table

from lit_sigsoftmax.compare.results import Arm, Results

__all__ = ["as_csv", "as_latex", "as_markdown", "columns", "rich_table", "rows"]

_COLUMNS = ("output layer", "seeds", "params", "val ppl", "test ppl", "Δ ppl", "95 % interval", "p", "tokens/s")
_TERMINAL = ("output layer", "seeds", "test ppl", "Δ ppl", "p", "tokens/s")  # what 80 columns hold
_RANKS = ("rank", "eff. rank")
_TEX = {"\\": r"\textbackslash{}", "±": r"$\pm$", "Δ": r"$\Delta$", "≥": r"$\geq$"} | {c: f"\\{c}" for c in "&%$#_{}"}


def columns(study: Results) -> tuple[str, ...]:
    """Return the table's head.

    Perplexities are mean ± sample standard deviation over seeds; Δ ppl is the mean difference from the baseline in
    pairs of the same seed, with its confidence interval and the p-value of a paired t-test after Holm's correction;
    rank and effective rank, where they were measured, are the means of ``test/log_prob_rank``, with ≥ where a run is
    at ``test/log_prob_rank_limit``, and of ``test/effective_rank_1e-4``.
    """
    return (*_COLUMNS, *_RANKS) if any(arm.rank for arm in study.arms) else _COLUMNS


def rows(study: Results) -> list[tuple[str, ...]]:
    """Return the table's cells, by :func:`columns`."""
    return [_cells(study, arm)[: len(columns(study))] for arm in study.arms]


def rich_table(study: Results) -> Table:
    """Return the table for a terminal, the baseline in bold. What does not count has no room in it."""
    table = Table(title=f"study {study.title}")
    for column in _TERMINAL:
        left = column == _TERMINAL[0]
        table.add_column(column, justify="left" if left else "right", no_wrap=not left, overflow="fold")
    for arm, row in zip(study.arms, rows(study), strict=True):
        cells = dict(zip(columns(study), row, strict=True)) | {"seeds": str(len(arm.runs))}
        table.add_row(*(cells[name] for name in _TERMINAL), style="bold" if _is_baseline(study, arm) else None)
    return table


def as_markdown(study: Results) -> str:
    """Return the table in Markdown."""
    head = columns(study)
    lines: list[Sequence[str]] = [head, ("---", *("---:" for _ in head[1:])), *rows(study)]
    return "".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |\n" for line in lines)


def as_latex(study: Results) -> str:
    """Return the table in LaTeX, with the rules of booktabs."""
    lines = [
        " & ".join("".join(_TEX.get(c, c) for c in cell) for cell in row) for row in (columns(study), *rows(study))
    ]
    head, body = lines[0], " \\\\\n".join(lines[1:])
    begin, end = f"\\begin{{tabular}}{{l{'r' * (len(columns(study)) - 1)}}}", r"\end{tabular}"
    return f"{begin}\n\\toprule\n{head} \\\\\n\\midrule\n{body} \\\\\n\\bottomrule\n{end}\n"


def as_csv(study: Results) -> str:
    """Return all that is known of each arm, one a line, in full precision; an empty cell is what cannot be said."""
    records = [_record(study, arm) for arm in study.arms]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def _record(study: Results, arm: Arm) -> dict[str, object]:
    val, test = (list(arm.values(name).values()) for name in ("val/best_perplexity", "test/perplexity"))
    speed = arm.values("train/tokens_per_second").values()
    rank, limit, effective = (
        list(arm.values(f"test/{name}").values())
        for name in ("log_prob_rank", "log_prob_rank_limit", "effective_rank_1e-4")
    )
    one = study.comparisons.get(arm.name)
    low, high = one.interval if one and one.interval else (None, None)
    return {
        "arm": arm.name,
        "baseline": study.baseline_of(arm),
        "seeds": " ".join(str(run.seed) for run in arm.runs),
        "not_counted": _not_counted(arm),
        "parameters": arm.parameters,
        "val_perplexity": mean(val) if val else None,
        "val_perplexity_sd": stdev(val) if len(val) > 1 else None,
        "test_perplexity": mean(test) if test else None,
        "test_perplexity_sd": stdev(test) if len(test) > 1 else None,
        "tokens_per_second": mean(speed) if speed else None,
        "log_prob_rank": mean(rank) if rank else None,
        "log_prob_rank_limit": mean(limit) if limit else None,
        "effective_rank_1e-4": mean(effective) if effective else None,
        "pairs": len(one.seeds) if one else None,
        "difference": one.difference if one else None,
        "interval_low": low,
        "interval_high": high,
        "t_p": one.t_p if one else None,
        "holm_p": one.adjusted_p if one else None,
        "permutation_p": one.permutation_p if one else None,
        "detectable": one.detectable if one else None,
    }


def _cells(study: Results, arm: Arm) -> tuple[str, ...]:
    one = study.comparisons.get(arm.name)
    speed = arm.values("train/tokens_per_second").values()
    effective = arm.values("test/effective_rank_1e-4").values()
    others = _not_counted(arm)
    return (
        arm.name,
        f"{len(arm.runs)}" + (f" ({others})" if others else ""),
        "-" if arm.parameters is None else f"{arm.parameters:,}",
        _mean_sd(list(arm.values("val/best_perplexity").values())),
        _mean_sd(list(arm.values("test/perplexity").values())),
        "baseline" if _is_baseline(study, arm) else f"{one.difference:+.2f}" if one and one.seeds else "-",
        f"{one.interval[0]:+.2f} to {one.interval[1]:+.2f}" if one and one.interval else "-",
        _p(one.adjusted_p) if one and one.adjusted_p is not None else "-",
        f"{mean(speed):,.0f}" if speed else "-",
        arm.rank or "-",
        f"{mean(effective):,.0f}" if effective else "-",
    )


def _is_baseline(study: Results, arm: Arm) -> bool:
    return bool(arm.runs) and study.baseline_of(arm) == arm.name


def _not_counted(arm: Arm) -> str:
    return ", ".join(f"{n} {state}" for state, n in Counter(run.state for run in arm.others).items())


def _mean_sd(values: Sequence[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.2f}" if values else "-"
    return f"{mean(values):.2f} ± {stdev(values):.2f}"


def _p(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"
