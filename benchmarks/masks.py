"""The cost of an attention mask (`python -m benchmarks.masks`).

Prefill without a mask, with one that is all ones, as `generate()` passes it, and with padding on the left of one
sequence of two. One process holds the model and both backends; calls are timed in turn, and medians are compared. The
KV cache is kept and logits are computed for the last token only.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks import measure
from benchmarks.measure import MIB


def calls(model: Any, seq: int, padding: int) -> dict[str, Callable[[], Any]]:
    """Return prefills by name, for both backends: "two" has two sequences, "padded" pads the first of them."""
    from benchmarks import models

    found: dict[str, Callable[[], Any]] = {}
    one, two = models.tokens(model, seq), models.tokens(model, seq, batch=2)
    padded = torch.ones_like(two)
    padded[0, :padding] = 0
    for backend in ("inductor", "mom"):
        compiled = torch.compile(model, backend=backend)
        for name, ids, mask in (
            ("no mask", one, None),
            ("all ones", one, torch.ones_like(one)),
            ("two, no mask", two, None),
            ("two, padded", two, padded),
        ):
            found[f"{backend}: {name}"] = partial(models.prefill, compiled, ids, cache=True, mask=mask)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    from benchmarks import models

    parser = argparse.ArgumentParser(prog="python -m benchmarks.masks", description="What an attention mask costs.")
    parser.add_argument("--seq", type=int, default=6000)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--padding", type=int, default=1000, help="tokens of padding on the left")
    options = parser.parse_args(arguments)
    measure.watch_cpu()
    model = models.llama("small", options.layers, seq=options.seq)
    found = calls(model, options.seq, options.padding)
    peaks = {}
    for name, call in found.items():
        call()
        peaks[name] = measure.peak_bytes(call).peak
        print(json.dumps({"call": name, "peak": peaks[name]}), file=sys.stderr, flush=True)
    medians = {name: statistics.median(s) for name, s in measure.alternate(found, options.repeats).items()}
    for name, seconds in medians.items():
        print(f"{name}: {seconds:.2f} s, peak {peaks[name] / MIB:.1f} MiB")
    for name, base in (
        ("mom: all ones", "mom: no mask"),
        ("mom: all ones", "inductor: all ones"),
        ("mom: two, padded", "mom: two, no mask"),
        ("mom: two, padded", "inductor: two, padded"),
    ):
        print(
            f"{name} / {base}: time {medians[name] / medians[base]:.3f}, "
            f"peak {peaks[name] / peaks[base]:.3f}"
        )  # fmt: skip
    print(measure.describe_machine(measure.machine()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
