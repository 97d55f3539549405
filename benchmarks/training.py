"""Tokens per second of a recipe's training and evaluation, and where the time goes.

    python benchmarks/training.py
    python benchmarks/training.py --recipes penn_treebank/lstm.yaml penn_treebank/transformer.yaml --root FOLDER
    python benchmarks/training.py --repeats 0 --blocks 40

Each round runs so many steps of the recipe, from the same weights, in each of these ways, in changing order:

- plain: a bare loop with ``F.linear`` and ``F.cross_entropy``;
- loop: the same loop with the model's own head;
- trainer: Lightning's Trainer, without logger and progress bar;
- logger: the same with MLflow;
- fit: what ``lit-sigsoftmax fit`` does, with a progress bar too (which draws in a terminal only).

Evaluation has the first two and ``validate``. The time of the loops is also given by part; what logging and progress
bar cost is "logger" and "fit" against "trainer". Where the machine's speed changes by more than that from one way to
the next, ``--blocks`` tells: a single ``fit`` whose logger and bar are switched off for every other block of steps. A
block with them ends when the store has everything.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning_utilities.core.apply_func import apply_to_collection
from measure import in_order, machine, quartiles, ratios, table
from torch import Tensor
from torch.nn import functional as F

from lit_sigsoftmax import LanguageModel
from lit_sigsoftmax.data.streams import IGNORE_INDEX, Segments
from lit_sigsoftmax.tracking import tracker_of
from lit_sigsoftmax.training import LanguageModelCLI, recipe_path, silence_noise

_WARM_UP = 5  # steps that do not count
_NO_LOGGER, _NO_BAR = "--trainer.logger=false", "--trainer.enable_progress_bar=false"
_PARTS = ("data", "backbone", "loss", "optimizer")
_Head = Callable[[Tensor, Tensor], Tensor]
_Seconds = dict[str, float]


class Clock(Callback):
    """Takes the time at the end of each batch, after what the callbacks before it do there."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_end(self, *args: Any) -> None:
        """Take the time."""
        self.times.append(time.perf_counter())

    def on_validation_batch_end(self, *args: Any) -> None:
        """Take the time."""
        self.times.append(time.perf_counter())


class Switch(Callback):
    """Takes the time of blocks of steps with the trainer's logger and progress bar, and of blocks without.

    Args:
        steps: Steps of a block.

    Attributes:
        seconds: Of each block with (``True``) and without: the one is the neighbour of the other.
    """

    def __init__(self, steps: int) -> None:
        self.seconds: dict[bool, list[float]] = {True: [], False: []}
        self._steps, self._left, self._on, self._start = steps, _WARM_UP, True, 0.0
        self._loggers: list[Any] | None = None

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """End a block, and begin the next."""
        self._left -= 1
        if self._left:
            return
        if self._on and (tracker := tracker_of(trainer)):
            tracker.flush()
        if self._loggers is None:  # the end of warming up
            self._loggers = trainer.loggers
        else:
            self.seconds[self._on].append(time.perf_counter() - self._start)
        blocks = sum(map(len, self.seconds.values()))
        self._on, self._left = blocks % 4 in (0, 3), self._steps  # with, without, without, with
        trainer.loggers = self._loggers if self._on else []
        if bar := trainer.progress_bar_callback:
            (bar.enable if self._on else bar.disable)()
        self._start = time.perf_counter()


class Parts:
    """Seconds of each part of a loop, in the order in which they end."""

    def __init__(self) -> None:
        self.seconds: _Seconds = defaultdict(float)
        self.counts = False
        self._last = time.perf_counter()

    def end(self, part: str) -> None:
        """Count the time since the last part ended, if it is to count."""
        now = time.perf_counter()
        if self.counts:
            self.seconds[part] += now - self._last
        self._last = now


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    silence_noise()
    for library in ("pytorch", "fabric"):
        logging.getLogger(f"lightning.{library}").setLevel(logging.WARNING)
    facts = machine(torch.device("cpu"))
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    results = []
    for recipe in options.recipes:
        words = [f"--config={recipe_path(recipe)}", f"--model.activation={options.activation}"]
        words += ["--trainer.accelerator=cpu", *([f"--data.root={options.root}"] if options.root else [])]
        with _store():
            words += [f"--{key}" for key in options.set]
            result = _measure(words, options.steps, options.repeats)
            result["blocks"] = _blocks(words, options.steps, options.blocks)
        results.append({"recipe": recipe, "activation": options.activation, **result})
        print(f"\n### {recipe}, {options.activation}", flush=True)
        print(*(f"\n{text}" for text in (_table(result), _blocks_said(result)) if text), sep="\n", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"machine": facts, "results": results}, indent=1))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=["python_docs/lstm.yaml"], metavar="YAML")
    parser.add_argument("--root", help="data.root of the recipes")
    parser.add_argument("--activation", default="sigsoftmax")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="more of the recipe's keys")
    parser.add_argument("--steps", type=int, default=100, help="steps of each way in each round")
    parser.add_argument("--repeats", type=int, default=7, help="rounds; 0 for none")
    parser.add_argument("--blocks", type=int, default=0, help="pairs of blocks, with logger and bar and without")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, metavar="FILE", help="where every measurement is written")
    return parser.parse_args()


@contextmanager
def _store() -> Iterator[None]:
    """A tracking store, and a place for checkpoints, of no consequence."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
        yield


def _blocks(words: list[str], steps: int, pairs: int) -> dict[str, list[float]]:
    switch = Switch(steps)
    if pairs:
        limits = [f"--trainer.max_steps={_WARM_UP + 2 * pairs * steps}", "--trainer.limit_val_batches=0"]
        cli = _build(words, *limits, "--trainer.max_epochs=-1", "--trainer.enable_model_summary=false", callback=switch)
        with redirect_stdout(sys.stderr):
            cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    return {"with": switch.seconds[True], "without": switch.seconds[False]}


def _blocks_said(result: dict[str, Any]) -> str:
    on, off = (torch.tensor(result["blocks"][name], dtype=torch.float64) for name in ("with", "without"))
    if not len(on):
        return ""
    logs = (on / off).log()
    error = logs.std() / len(logs) ** 0.5 if len(logs) > 1 else torch.inf
    mean, low, high = (float((logs.mean() + k * error).exp()) for k in (0, -2, 2))
    found = f"{ratios(result['blocks']['with'], result['blocks']['without']):.3f}"
    return (
        f"Logger and bar, {len(logs)} pairs of blocks of {result['steps']} steps: {found} of the time without;"
        f" geometric mean {mean:.3f}, {low:.3f} to {high:.3f} (two standard errors)."
    )


def _measure(words: list[str], steps: int, repeats: int) -> dict[str, Any]:
    ways: dict[str, Callable[[], _Seconds]] = {
        "train: plain": partial(_loop, words, steps, training=True, plain=True),
        "train: loop": partial(_loop, words, steps, training=True, plain=False),
        "train: trainer": partial(_trainer, [*words, _NO_LOGGER, _NO_BAR], steps, training=True),
        "train: logger": partial(_trainer, [*words, _NO_BAR], steps, training=True),
        "train: fit": partial(_trainer, words, steps, training=True),
        "evaluate: plain": partial(_loop, words, steps, training=False, plain=True),
        "evaluate: loop": partial(_loop, words, steps, training=False, plain=False),
        "evaluate: validate": partial(_trainer, words, steps, training=False),
    }
    seconds: dict[str, list[_Seconds]] = {name: [] for name in ways}
    for _, name in in_order(ways, repeats):
        seconds[name].append(ways[name]())
    data = _build(words).datamodule
    tokens = {"train": _tokens(data.train_dataloader(), steps), "evaluate": _tokens(data.val_dataloader(), steps)}
    return {"steps": steps, "tokens": tokens, "seconds": seconds}


def _build(words: Sequence[str], *more: str, callback: Callback | None = None) -> LanguageModelCLI:
    """The recipe's objects, anew: the same weights each time, and a trainer that has not run."""
    return LanguageModelCLI([*words, *more], [callback] if callback else [], run=False)


def _counted(loader: Segments, steps: int) -> int:
    if len(loader) <= _WARM_UP:
        raise SystemExit(f"the corpus has {len(loader)} segments, but {_WARM_UP} are for warming up: take a larger one")
    return min(steps, len(loader) - _WARM_UP)


def _tokens(loader: Segments, steps: int) -> int:
    batches = islice(loader, _WARM_UP, _WARM_UP + _counted(loader, steps))
    return sum(int((target != IGNORE_INDEX).sum()) for _, target in batches)


def _trainer(words: list[str], steps: int, training: bool) -> _Seconds:
    split, other = ("train", "val") if training else ("val", "train")
    limits = [f"--trainer.limit_{split}_batches={_WARM_UP + steps}", f"--trainer.limit_{other}_batches=0"]
    clock = Clock()
    cli = _build(words, *limits, "--trainer.max_epochs=1", "--trainer.enable_model_summary=false", callback=clock)
    with redirect_stdout(sys.stderr):  # the table is alone on stdout
        (cli.trainer.fit if training else cli.trainer.validate)(cli.model, datamodule=cli.datamodule)
    return {"all": clock.times[-1] - clock.times[_WARM_UP - 1]}


def _loop(words: list[str], steps: int, training: bool, plain: bool) -> _Seconds:
    cli = _build(words)
    model, parts, state = cli.model.train(training), Parts(), None
    head = partial(_plain, model) if plain else model.head.nll
    (optimizer,), _ = model.configure_optimizers()
    loader = cli.datamodule.train_dataloader() if training else cli.datamodule.val_dataloader()
    batches = iter(loader)
    with torch.inference_mode(not training):
        for step in range(_WARM_UP + _counted(loader, steps)):
            parts.counts = step >= _WARM_UP
            tokens, target = next(batches)
            parts.end("data")
            hidden, state = model(tokens, state)
            state = apply_to_collection(state, Tensor, Tensor.detach)
            parts.end("backbone")
            if training:
                _learn(model, hidden, target, head, optimizer, cli.trainer.gradient_clip_val, parts)
            else:
                head(hidden, target).sum().item()
                parts.end("loss")
    return dict(parts.seconds)


def _learn(
    model: LanguageModel,
    hidden: Tensor,
    target: Tensor,
    head: _Head,
    optimizer: torch.optim.Optimizer,
    clip: float | None,
    parts: Parts,
) -> None:
    """One step of the weights; the graph is cut at the hidden vectors, so that its halves are timed apart."""
    cut = hidden.detach().requires_grad_()
    (head(cut, target).sum() / target.numel()).backward()
    parts.end("loss")
    hidden.backward(cut.grad)
    parts.end("backbone")
    if clip:
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    optimizer.zero_grad()
    parts.end("optimizer")


def _plain(model: LanguageModel, hidden: Tensor, target: Tensor) -> Tensor:
    logits = F.linear(hidden, model.head.weight, model.head.bias)
    return F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum")


def _table(result: dict[str, Any]) -> str:
    if not any(result["seconds"].values()):
        return ""
    totals = {name: [sum(parts.values()) for parts in rounds] for name, rounds in result["seconds"].items()}
    rows = []
    for name, rounds in result["seconds"].items():
        kind, way = name.split(": ")
        against = [f"{kind}: plain", f"{kind}: loop", f"{kind}: trainer" if way in ("logger", "fit") else ""]
        relative = [f"{ratios(totals[name], totals[other]):.3f}" if other in totals else "" for other in against]
        parts = [
            f"{quartiles([100 * of[part] / sum(of.values()) for of in rounds]).median:.1f}" if part in rounds[0] else ""
            for part in _PARTS
        ]
        rate = result["tokens"][kind] / quartiles(totals[name]).median
        rows.append([name, f"{rate:,.0f}", *relative, *parts])
    return table(["", "tokens/s", "time of plain", "of loop", "of trainer", *(f"{part}, %" for part in _PARTS)], rows)


if __name__ == "__main__":
    main()
