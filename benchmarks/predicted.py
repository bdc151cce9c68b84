"""What a GPU is predicted to take for the prefills that `benchmarks.gpu` measures, until one has: NOTHING IS MEASURED.

    python -m benchmarks.predicted     benchmarks/results/predicted-gpu.json, and docs/benchmarks.md with it

Peaks are the memory model's, times those of `mom_compile.planning.estimate`. Neither a GPU nor weights are needed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mom_compile
from benchmarks import measure, physical
from benchmarks.methods import Setup

Row = dict[str, Any]
RESULTS = Path(__file__).with_name("results") / "predicted-gpu.json"
SHAPE, DEVICE = "Llama-3-8B", "H200"
#: The same shape, as `benchmarks.models` calls it.
BENCHED = "llama-3-8b"
#: The paper's lengths, and what is asked for beyond them.
LENGTHS = (16_384, 65_536, 147_456, 465_920, 1_048_576)
#: The plan's names of ways, and what the page calls them.
WAYS = {"eager": "eager", "inductor": "inductor", "mlp": "mlp", "mom": "mom", "mom-cache": "mom-host"}
TIMED = ("mom", "mom-cache")
GIB = 1 << 30


_HEAD = """## Predicted, not measured: {shape} on one {device}

One sequence in bfloat16, {weights:.1f} GiB of weights beside what stands here. Peaks are the memory model's
(`python -m benchmarks.predicted`; [plans.md](plans.md) says how far it is to be trusted); *the least* is as above.
"""

_ARITHMETIC = """
Time to first token is estimated as the longest of what goes on at once, each by itself: operations of products and
attentions over the rate that products reach of the device's; mini-sequences times the weights that each reads, over the
memory's bandwidth; mini-sequences times loops times the host's time for a body; keys and values over the link. Of *mom*
nothing leaves; all else is the same.
"""


def predicted() -> Row:
    """Bytes above the weights of each way at each length; of ours what each thing takes by itself, in seconds."""
    found = mom_compile.plan(SHAPE, seq_len=LENGTHS[2], dtype="bfloat16", device=DEVICE, progress=_tell)
    cells = {}
    for tokens in LENGTHS:
        at = {way: replace(found, seq_len=tokens, way=way) for way in WAYS}
        peaks = {WAYS[way]: plan.peak_bytes() - found.subject.weight_bytes for way, plan in at.items()}
        times = {WAYS[way]: at[way].seconds() for way in TIMED}
        cells[str(tokens)] = {
            "peaks": peaks,
            "seconds": {name: {"parts": time.parts, "bound": time.bound} for name, time in times.items()},
        }
    weights = found.subject.weight_bytes
    return {"machine": measure.machine(), "shape": SHAPE, "device": DEVICE, "weights": weights, "cells": cells}


def section(results: Mapping[str, Any]) -> str:
    """Both tables, for the page."""
    names = list(WAYS.values())
    lines = [
        _HEAD.format(**{name: results[name] for name in ("shape", "device")}, weights=results["weights"] / GIB),
        *_head(["tokens", *names, "the least", "the least, cache on the host"]),
    ]
    for tokens, cell in results["cells"].items():
        setup = Setup(BENCHED, 32, int(tokens), dtype="bfloat16", device="cuda")
        least = [physical.live_bytes(setup, cache_on_host=host) for host in (False, True)]
        sizes = [*(cell["peaks"][name] for name in names), *least]
        lines.append(_row([f"{int(tokens):,}", *(f"{size / GIB:.2f} GiB" for size in sizes)]))
    lines.append(_ARITHMETIC)
    parts = list(next(iter(results["cells"].values()))["seconds"]["mom-host"]["parts"])
    lines += _head(["tokens", *(f"{part}, s" for part in parts), "mom bound by", "mom-host bound by"])
    for tokens, cell in results["cells"].items():
        both = cell["seconds"]
        seconds = [f"{both['mom-host']['parts'][part]:.3g}" for part in parts]
        lines.append(_row([f"{int(tokens):,}", *seconds, *(both[name]["bound"] for name in ("mom", "mom-host"))]))
    return "\n".join(lines)


def _head(headings: Sequence[str]) -> list[str]:
    return [_row(headings), "|---" + "|---:" * (len(headings) - 1) + "|"]


def _row(columns: Sequence[str]) -> str:
    return f"| {' | '.join(columns)} |"


def _tell(text: str) -> None:
    print(f"  {text}", file=sys.stderr)


def main() -> int:
    from benchmarks import suite, suite_page

    RESULTS.write_text(json.dumps(predicted(), indent=1) + "\n")
    print(suite_page.write(suite.RESULTS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
