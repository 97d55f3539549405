"""Time and memory of the fused loss against PyTorch's, forward and backward, all candidates alternating in one process.

    python benchmarks/loss.py --json loss.json
    python benchmarks/loss.py --sizes 1400,400,10000 840,280,10000,15 --only "sigsoftmax"

A size is N,d,V or, for a mixture, N,d,V,K. Times are medians over rounds with the quartiles of the ratios; the floor is
the time of the three matrix products alone, each by the faster library. Extra memory is the peak beyond inputs and
gradients, of a fresh process each time, also as a share of the float32 logits (N x K x V). README.md says more.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import torch
from candidates import Candidate, Inputs, Size, Step, candidates, inputs_of, products
from measure import (
    Quartiles,
    alternate,
    extra_memory,
    in_child,
    keep_freed_memory,
    machine,
    quartiles,
    ratios,
    table,
)
from torch import Tensor

from lit_sigsoftmax.activations import register_activation
from lit_sigsoftmax.losses import compiled

SIZES = [
    Size(700, 200, 10_000),
    Size(1400, 400, 10_000),
    Size(1400, 400, 33_278),
    Size(2048, 768, 50_257),
    Size(840, 280, 10_000, 15),
]
_FLOORS = {"floor": torch.float32, "bfloat16: floor": torch.bfloat16}
_HEADER = ["", "ms", "of its baseline", "of sigsoftmax", "of the floor", "extra MB", "of the logits"]


def main() -> None:
    options = _options()
    register_activation("softcap", derivative=lambda z: 1 - torch.tanh(z / 30) ** 2)(_softcap)
    device, threads = torch.device(options.device), options.threads
    chosen = {size: _choose(candidates(size, device), options.only) for size in options.sizes}
    # Memory first: its processes are forks of this one, which must not have started threads.
    memory = {
        size: {c.name: [_memory(c, size, device, threads) for _ in range(options.memory_repeats)] for c in chosen[size]}
        for size in options.sizes
    }
    torch.set_num_threads(threads)
    keep_freed_memory()
    facts = {**machine(device), "compiled_pass": compiled.available()}
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    results = []
    for size in options.sizes:
        results.append(_result(size, chosen[size], memory[size], options.repeats, device))
        print(f"\n### {size}\n\n{_table(results[-1])}", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"machine": facts, "results": results}, indent=1))


def _softcap(logits: Tensor) -> Tensor:
    """What a user may register: neither among the closed forms nor in activations.h."""
    return 30 * torch.tanh(logits / 30)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=_size, nargs="+", default=SIZES, metavar="N,d,V[,K]")
    parser.add_argument("--repeats", type=_count, default=7, help="rounds of timing; 0 for none")
    parser.add_argument("--memory-repeats", type=_count, default=3, help="processes for each candidate; 0 for none")
    parser.add_argument("--only", type=re.compile, default="", metavar="REGEX", help="candidates beside the baselines")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where every measurement is written")
    return parser.parse_args()


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"a number of repetitions is 0 or more, not {text!r}")
    return int(text)


def _size(text: str) -> Size:
    numbers = [int(number) for number in text.split(",")] if re.fullmatch(r"[\d,]+", text) else []
    if len(numbers) not in (3, 4) or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"a size is N,d,V or N,d,V,K, all positive, not {text!r}")
    return Size(*numbers)


def _choose(known: list[Candidate], only: re.Pattern[str] | str) -> list[Candidate]:
    wanted = [c for c in known if re.search(only, c.name)]
    if not wanted:
        raise SystemExit(f"--only matches none of {', '.join(c.name for c in known)}")
    needed = {name for c in wanted for name in (c.name, c.baseline, c.peer)}
    return [c for c in known if c.name in needed]


def _memory(candidate: Candidate, size: Size, device: torch.device, threads: int) -> int | None:
    def measured() -> int | None:
        torch.set_num_threads(threads)
        return extra_memory(candidate.make(inputs_of(size, device)), device)

    return measured() if device.type == "cuda" else in_child(measured)


def _result(
    size: Size, chosen: list[Candidate], memory: dict[str, list[int | None]], repeats: int, device: torch.device
) -> dict[str, Any]:
    inputs = inputs_of(size, device)
    seconds = _times(inputs, chosen, repeats, device) if repeats else {}
    return {
        "size": size._asdict(),
        "floor_seconds": {kind: seconds[kind] for kind in _FLOORS if kind in seconds},
        "candidates": [
            {
                "name": c.name,
                "baseline": c.baseline,
                "peer": c.peer,
                "seconds": seconds.get(c.name),
                "extra_bytes": memory[c.name],
                "ratios": {
                    other: ratios(seconds[c.name], seconds[other])._asdict()
                    for other in filter(None, (c.baseline, c.peer, _floor_of(c.name)))
                    if repeats
                },
            }
            for c in chosen
        ],
    }


def _times(inputs: Inputs, chosen: list[Candidate], repeats: int, device: torch.device) -> dict[str, list[float]]:
    steps: dict[str, Step] = {c.name: c.make(inputs) for c in chosen}
    floors = {kind: products(inputs, dtype) for kind, dtype in _FLOORS.items()}
    libraries = [(f, p, by, step) for f, of in floors.items() for p, found in of.items() for by, step in found.items()]
    steps |= {f"{kind} {product} {library}": step for kind, product, library, step in libraries}
    seconds = alternate(steps, repeats, device)
    for kind, of in floors.items():
        fastest = [
            min((seconds.pop(f"{kind} {product} {library}") for library in found), key=lambda s: quartiles(s).median)
            for product, found in of.items()
        ]
        seconds[kind] = [sum(of_round) for of_round in zip(*fastest, strict=True)]
    return seconds


def _floor_of(name: str) -> str | None:
    """Whose three products are the floor of a candidate; an evaluation has another one."""
    if name.startswith("evaluation"):
        return None
    return "bfloat16: floor" if name.startswith("bfloat16") else "floor"


def _table(result: dict[str, Any]) -> str:
    logit_bytes = 4 * Size(**result["size"]).logits
    rows = []
    for c in result["candidates"]:
        times = ["", "", "", ""]
        if c["seconds"]:
            relative = [c["ratios"].get(other) for other in (c["baseline"], c["peer"], _floor_of(c["name"]))]
            times = [f"{1000 * quartiles(c['seconds']).median:.2f}"]
            times += [f"{Quartiles(**ratio):.2f}" if ratio else "" for ratio in relative]
        rows.append([c["name"], *times, *_memory_cells(c["extra_bytes"], logit_bytes)])
    for kind, seconds in result["floor_seconds"].items():
        rows.append([f"{kind}, three products", f"{1000 * quartiles(seconds).median:.2f}", *[""] * 5])
    return table(_HEADER, rows)


def _memory_cells(measured: list[int | None], logit_bytes: int) -> list[str]:
    known = [size for size in measured if size is not None]
    if not known:
        return ["", ""]
    found = quartiles(known)
    spread = (max(known) - min(known)) / 2e6
    return [f"{found.median / 1e6:.1f} ± {spread:.1f}", f"1/{logit_bytes / max(1.0, found.median):.1f}"]


if __name__ == "__main__":
    main()
