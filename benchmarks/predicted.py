"""What a GPU is predicted to take for the prefills that `benchmarks.gpu` measures, until one has: NOTHING IS MEASURED.

    python -m benchmarks.predicted     benchmarks/results/predicted-gpu.json, and docs/benchmarks.md with it

Peaks are the memory model's, times those of `mom_compile.planning.estimate`. Neither a GPU nor weights are needed.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import Any

import mom_compile
from benchmarks import measure, physical, suite, suite_page
from benchmarks.methods import Setup

Row = dict[str, Any]
RESULTS = suite.RESULTS.with_name(suite_page.PREDICTED)
SHAPE, DEVICE = "Llama-3-8B", "H200"
#: The same shape, as `benchmarks.models` calls it.
BENCHED = "llama-3-8b"
#: The paper's lengths, and what is asked for beyond them.
LENGTHS = (16_384, 65_536, 147_456, 465_920, 1_048_576)
#: The plan's names of ways, and what the page calls them.
WAYS = {"eager": "eager", "inductor": "inductor", "mlp": "mlp", "mom": "mom", "mom-cache": "mom-host"}
TIMED = ("mom", "mom-cache")


def predicted() -> Row:
    """Bytes above the weights of each way at each length; of ours what each thing takes by itself, in seconds."""
    found = mom_compile.plan(SHAPE, seq_len=LENGTHS[2], dtype="bfloat16", device=DEVICE, progress=_tell)
    cells = {}
    for tokens in LENGTHS:
        at = {way: replace(found, seq_len=tokens, way=way) for way in WAYS}
        peaks = {WAYS[way]: plan.peak_bytes() - found.subject.weight_bytes for way, plan in at.items()}
        times = {WAYS[way]: at[way].estimate() for way in TIMED}
        setup = Setup(BENCHED, found.subject.layers, tokens, dtype="bfloat16", device="cuda")
        cells[str(tokens)] = {
            "peaks": peaks,
            "least": [physical.live_bytes(setup, cache_on_host=host) for host in (False, True)],
            "seconds": {name: {"parts": time.parts, "bound": time.bound} for name, time in times.items()},
        }
    weights = found.subject.weight_bytes
    return {"machine": measure.machine(), "shape": SHAPE, "device": DEVICE, "weights": weights, "cells": cells}


def _tell(text: str) -> None:
    print(f"  {text}", file=sys.stderr)


def main() -> int:
    RESULTS.write_text(json.dumps(predicted(), indent=1) + "\n")
    print(suite_page.write(suite.RESULTS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
