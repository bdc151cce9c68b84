"""A process that measures one method: cells of a table, or the longest prompt within a limit.

It prints a row for each length, shortest first. Then it answers `time` with the seconds of one more prefill of the last
length, so that several processes can be timed in turn.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks import measure, workers
from benchmarks.decoding import WARM_UP, decode
from benchmarks.longest import longest
from benchmarks.methods import METHODS, Method, Setup

#: Number of largest logits that are recorded, to compare methods.
NOTICES = 8
Row = dict[str, Any]
Call = Callable[[], tuple[torch.Tensor, Any]]


def worker(spec: Row) -> None:
    """Emit the rows of a method.

    `spec` has a `setup` whose tokens are replaced by each of `lengths`; the number of timed calls (`repeats`); the
    length from which on there is one call only (`once`); decode `steps`; bytes above the weights (`limit`) or with them
    (`memory`). With `longest` it runs the search.
    """
    setup, method = Setup(**spec["setup"]), METHODS[spec["method"]]
    if setup.device == "cpu":
        measure.watch_cpu()
    workers.step("model")
    model = setup.model(more=spec["steps"] + 2 * WARM_UP)
    method.prepare(model)
    if "memory" in spec:
        spec["limit"] = spec["memory"] - measure.live_bytes(setup.device)
    if "longest" in spec:
        workers.row(find_longest(method, model, setup, spec))
        return
    for tokens in spec["lengths"]:
        at = replace(setup, tokens=tokens)
        call = partial(method.prefill, model, at.ids(model))
        workers.step(f"{tokens} tokens")
        workers.row({"method": method.name, "tokens": tokens} | _or_why_not(partial(figures, call, model, at, spec)))
    for question in workers.questions():
        if question == "time":
            workers.row({"seconds": measure.seconds(call, setup.device)})


def _or_why_not(measured: Callable[[], Row]) -> Row:
    """Return figures, or that there was not enough memory, which is a result, too."""
    try:
        return measured()
    except Exception as error:
        reason = measure.out_of_memory(error)
        if reason is None:
            raise
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return {"error": reason}


def figures(call: Call, model: Any, setup: Setup, spec: Row) -> Row:
    """Return first call, peak, decode and timed calls; from `once` tokens on one call serves for all.

    Decode steps that run out of memory are a `step_error`; the prefill's figures stay.
    """
    once = setup.tokens >= spec.get("once", setup.tokens + 1)
    results: list[tuple[torch.Tensor, Any]] = []
    with measure.at_most(spec["limit"], setup.device):
        first = None if once else measure.seconds(call, setup.device)
        began = time.perf_counter()
        report = measure.peak_bytes(lambda: results.append(call()), setup.device)
        seconds = [time.perf_counter() - began] if once else []
        logits, cache = results.pop()
        values, found = logits[0, -1].float().topk(NOTICES)
        row: Row = {
            "first": first, "peak": report.peak, "kept": report.kept, "reserved": report.reserved,
            "logits": values.tolist(), "ids": found.tolist(),
        }  # fmt: skip
        del logits
        if spec["steps"]:
            steps = _or_why_not(partial(decode, model, cache, spec["steps"], batch=setup.batch, device=setup.device))
            row |= {"step_error": steps["error"]} if "error" in steps else steps
        del cache
        seconds += [measure.seconds(call, setup.device) for _ in range(0 if once else spec["repeats"])]
    return row | {"seconds": seconds}


def find_longest(method: Method, model: Any, setup: Setup, spec: Row) -> Row:
    """Return the longest prompt whose prefill runs with `limit` bytes above the weights."""
    tried: list[Row] = []

    def peak_at(tokens: int) -> int | None:
        workers.step(f"{tokens} tokens")
        call = partial(method.prefill, model, replace(setup, tokens=tokens).ids(model))

        def peak() -> Row:
            with measure.at_most(spec["limit"], setup.device):
                return {"peak": measure.peak_bytes(call, setup.device).peak}

        tried.append({"tokens": tokens} | _or_why_not(peak))
        return tried[-1].get("peak")

    found = longest(peak_at, spec["limit"], **spec["longest"])
    return {"method": method.name, "fits": found.fits, "fails": found.fails, "tried": tried}


if __name__ == "__main__":
    worker(json.loads(sys.argv[sys.argv.index("--worker") + 1]))
