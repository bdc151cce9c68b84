"""Hybrids with linear attention or state-space layers: stock Inductor and mom, compiled, one prefill.

    python -m benchmarks.hybrids qwen3_5_text mamba2 --tokens 4096

Each type is small (`small_configs.REALISTIC`: a layer of each kind), in float32, with the cache kept and the logits of
the last token. Times are medians of calls in turn, peaks bytes allocated above weights and inputs. One line of JSON for
each type. Stock Inductor unrolls recurrences: it takes minutes to compile some types.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from typing import Any

import torch

from benchmarks import measure
from benchmarks.architectures_worker import Subject, accepted, build, words
from benchmarks.small_configs import REALISTIC

BACKENDS = ("inductor", "mom")


def compiled(name: str, backend: str, tokens: int) -> tuple[Any, dict[str, Any], float]:
    """Return a compiled model, its inputs, and the seconds of the first call."""
    torch.manual_seed(0)
    model = build(Subject(name), REALISTIC, torch.float32)
    inputs = accepted(model, **words(model, 1, tokens, REALISTIC), use_cache=True, logits_to_keep=1)
    model.compile(backend=backend)
    start = time.perf_counter()
    model(**inputs)
    return model, inputs, time.perf_counter() - start


def compare(name: str, tokens: int, calls: int) -> dict[str, Any]:
    """Return times and peaks of both backends, and their ratios."""
    made = {backend: compiled(name, backend, tokens) for backend in BACKENDS}
    runs = {backend: partial(model, **inputs) for backend, (model, inputs, _) in made.items()}
    logits = {backend: run().logits for backend, run in runs.items()}
    seconds = measure.alternate(runs, calls)
    peaks = {backend: measure.peak_bytes(run).peak for backend, run in runs.items()}
    stock, mom = BACKENDS
    return {
        "type": name,
        "tokens": tokens,
        "peak": peaks,
        "peak_ratio": round(peaks[mom] / peaks[stock], 3),
        "seconds": {backend: round(sorted(times)[calls // 2], 3) for backend, times in seconds.items()},
        "time_ratio": round(measure.median_ratio(seconds, mom, stock), 3),
        "first_call": {backend: round(made[backend][2], 1) for backend in BACKENDS},
        "difference": float((logits[mom] - logits[stock]).abs().max() / logits[stock].abs().max()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="+", metavar="TYPE")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--calls", type=int, default=5)
    given = parser.parse_args()
    measure.watch_cpu()
    with torch.no_grad():
        for name in given.types:
            torch._dynamo.reset()
            print(json.dumps(compare(name, given.tokens, given.calls)), flush=True)


if __name__ == "__main__":
    main()
