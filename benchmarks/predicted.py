"""Predict a GPU's figures for the prefills of `benchmarks.gpu`. NOTHING IS MEASURED.

    python -m benchmarks.predicted     write benchmarks/results/predicted-gpu.json and docs/benchmarks.md

Peaks come from the memory model, times from `mom_compile.planning.estimate`. Neither a GPU nor weights are needed.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import Any

import mom_compile
from benchmarks import measure, physical, suite, suite_page
from benchmarks.methods import Setup
from benchmarks.models import SHAPES
from mom_compile.memory.device import REACHED, Layer, rows_for
from mom_compile.memory.devices import DEVICES
from mom_compile.runtime.attention.cudnn import BLOCK

Row = dict[str, Any]
RESULTS = suite.RESULTS.with_name(suite_page.PREDICTED)
SHAPE, DEVICE = "Llama-3-8B", "H200"
#: The name of the same shape in `benchmarks.models`.
BENCHED = "llama-3-8b"
_WIDTHS = SHAPES[BENCHED]
HIDDEN, HEADS, _INNER = _WIDTHS["hidden_size"], _WIDTHS["num_attention_heads"], _WIDTHS["intermediate_size"]
_KEYS = HIDDEN // HEADS * _WIDTHS["num_key_value_heads"]
#: Products of one layer.
LAYER_PRODUCTS = ((HIDDEN, HIDDEN), (HIDDEN, _KEYS), (HIDDEN, _KEYS), (HIDDEN, HIDDEN), *[(HIDDEN, _INNER)] * 2,
                  (_INNER, HIDDEN))  # fmt: skip
#: The lengths of the paper, and longer ones.
LENGTHS = (16_384, 65_536, 147_456, 465_920, 1_048_576)
#: Names of ways in a plan and on the page.
WAYS = {"eager": "eager", "inductor": "inductor", "mlp": "mlp", "mom": "mom", "mom-cache": "mom-host"}
TIMED = ("mom", "mom-cache")
#: FLOPS of attention in bf16 on an H100, heads of 128, 16,384 tokens (the FlashAttention-3 paper, figures 5 and 6):
#: causal and full, by FlashAttention 2, which computes a mini-sequence's own rows, and by cuDNN, which computes all
#: rows of eager mode and, of a mini-sequence, what is before it from `BLOCK` keys on.
FLASH_CAUSAL, FLASH_FULL, CUDNN_CAUSAL, CUDNN_FULL = 335e12, 370e12, 539e12, 595e12


def predicted() -> Row:
    """Return bytes above the weights of each way at each length, and for mom the seconds of each resource for a prefill
    and
    for a decode step after it."""
    found = mom_compile.plan(SHAPE, seq_len=LENGTHS[2], dtype="bfloat16", device=DEVICE, progress=_tell)
    cells = {}
    for tokens in LENGTHS:
        at = {way: replace(found, seq_len=tokens, way=way) for way in WAYS}
        peaks = {WAYS[way]: plan.peak_bytes() - found.subject.weight_bytes for way, plan in at.items()}
        times = {WAYS[way]: at[way].estimate() for way in TIMED}
        steps = {WAYS[way]: at[way].estimate_decode() for way in TIMED}
        setup = Setup(BENCHED, found.subject.layers, tokens, dtype="bfloat16", device="cuda")
        cells[str(tokens)] = {
            "peaks": peaks,
            "least": [physical.live_bytes(setup, cache_on_host=host) for host in (False, True)],
            "seconds": {name: {"parts": time.parts, "bound": time.bound} for name, time in times.items()},
            "attention": beside_eager(setup),
            "decode": {name: {"parts": step.parts, "bound": step.bound} for name, step in steps.items()},
        }
    weights = found.subject.weight_bytes
    return {"machine": measure.machine(), "shape": SHAPE, "device": DEVICE, "weights": weights, "cells": cells}


def beside_eager(setup: Setup) -> Row:
    """Return the seconds of products, and of eager mode's and mom's attention by published rates of their kernels.
    Merging
    the parts of mom's attention is not counted."""
    rows = rows_for(DEVICES[DEVICE], Layer(HEADS, LAYER_PRODUCTS))
    whole = 2.0 * setup.tokens**2 * HIDDEN * setup.layers
    before = [(min(rows, setup.tokens - start), start) for start in range(0, setup.tokens, rows)]
    mom = sum(
        2.0 * n**2 * HIDDEN / FLASH_CAUSAL + 4.0 * n * start * HIDDEN / (CUDNN_FULL if start >= BLOCK else FLASH_FULL)
        for n, start in before
    )
    products = (physical.prefill_flops(setup) - whole * (setup.layers - 1) / setup.layers) / (
        DEVICES[DEVICE].flops * REACHED
    )
    return {"rows": rows, "products": products, "eager": whole / CUDNN_CAUSAL, "mom": mom * setup.layers}


def _tell(text: str) -> None:
    print(f"  {text}", file=sys.stderr)


def main() -> int:
    RESULTS.write_text(json.dumps(predicted(), indent=1) + "\n")
    print(suite_page.write(suite.RESULTS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
