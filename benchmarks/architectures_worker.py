"""Run model types, each in a process of its own, for `benchmarks.architectures`.

A row has `parameters`, whether the type is `recurrent`, and then the `uses` one after another: the largest difference
relative to the largest logit, graphs and breaks, multiply-adds and those outside loops; or the error, and whether it is
mom's.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import transformers
import transformers.integrations.moe as moe
from torch import fx
from torch._dynamo.utils import counters

from benchmarks import measure
from benchmarks.architectures_calls import TOKENS, Caller, Inputs, Subject, accepted, build, is_recurrent, words
from benchmarks.small_configs import REALISTIC, SMALL
from benchmarks.without_codegen import pieces_run_eagerly, stock_runs_eagerly
from benchmarks.workers import row, step
from mom_compile import reports
from mom_passes.rules.work import products

#: A use counts as right up to this, of eager's largest logit. Some types compute norms or softmax in float32 always.
BOUND = 1e-6
BOUND_FLOAT32 = 1e-4
LONG = 2048


def describe_error(error: BaseException) -> str:
    """Return the kind and first line of the innermost error, and where in this package it was raised."""
    while error.__cause__ is not None and type(error).__module__.startswith("torch._dynamo"):
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    frames = [(frame, re.search(r"/(mom_(?:passes|compile)/.*)", frame.filename))
              for frame in traceback.extract_tb(error.__traceback__)]  # fmt: skip
    own = [f" [{found[1]}: {frame.name}]" for frame, found in frames if found]
    place = own[-1] if own else ""
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300] + place


def difference(actual: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return the largest difference relative to the largest logit; infinite if one has NaN where the other has not."""
    if actual.shape != wanted.shape or not torch.equal(actual.isfinite(), wanted.isfinite()):
        return float("inf")
    actual, wanted = actual.double().nan_to_num(0, 0, 0), wanted.double().nan_to_num(0, 0, 0)
    return float((actual - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30))


class Found:
    """What mom did with the graphs of one use."""

    def __init__(self) -> None:
        self.before = len(reports())
        self.breaks = dict(counters["graph_break"])
        self.stock: list[int] = []

    def watch(self, gm: fx.GraphModule) -> None:
        self.stock.append(sum(products(gm.graph).values()))

    def entry(self) -> dict[str, Any]:
        """Return the entry; `outside` has the work outside loops and its reason, by operator."""
        made = reports()[self.before :]
        breaks = {why: n - self.breaks.get(why, 0) for why, n in counters["graph_break"].items()}
        breaks = {why: n for why, n in breaks.items() if n}
        outside: dict[str, list[Any]] = {}
        looped = [report for report in made if report.stages]
        for report in looped:
            for name, work in report.work_outside.items():
                why = report.left_out.get(name, "")
                known = outside.setdefault(f"{name.partition(' (')[0]}", [0, why])
                known[0] += work
                known[1] = known[1] or why
        return {
            "graphs": len(made),
            "breaks": sum(breaks.values()),
            "break_reasons": [reason.splitlines()[0] for reason in breaks],
            "work": sum(report.work for report in looped) + sum(self.stock),
            "work_outside": sum(sum(report.work_outside.values()) for report in looped) + sum(self.stock),
            "outside": outside,
            "left_out": {name: why for report in looped for name, why in report.left_out.items()},
            "whole_graphs": sorted({report.fallback or report.no_loops or "" for report in made if not report.stages}),
        }


@contextlib.contextmanager
def everything_in_float64() -> Iterator[None]:
    """Let grouped products of experts run in float64: eager mode has no such kernel, the traced operator has."""
    original = moe._can_use_grouped_mm
    moe._can_use_grouped_mm = lambda *_: False
    try:
        yield
    finally:
        moe._can_use_grouped_mm = original


def run_uses(subject: Subject) -> None:
    """Run the uses of a small model of this type, and emit rows."""
    name = subject.name
    dtype = getattr(torch, subject.exceptions.get("dtype", "float64"))
    bound = BOUND if dtype is torch.float64 else BOUND_FLOAT32
    try:
        model = build(subject, SMALL, dtype)
    except Exception as error:
        row({"type": name, "not_built": describe_error(error)})
        return
    parameters = sum(p.numel() for p in model.parameters())
    row({"type": name, "parameters": parameters, "dtype": str(dtype).removeprefix("torch."), "bound": bound})
    eager, mom = Caller(model, None), Caller(model, "mom")
    uses: dict[str, dict[str, Any]] = {}
    expected: dict[str, Any] = {}
    wanted: dict[str, torch.Tensor] = {}
    for use in TOKENS:
        try:
            wanted[use] = eager.use(use, expected).clone()
            uses[use] = {}
        except Exception as error:
            uses[use] = {"eager_error": describe_error(error)}
    if "prefill" in expected:
        row({"type": name, "recurrent": is_recurrent(expected["prefill"])})
    got: dict[str, Any] = {}
    mom.compile()
    for use in wanted:
        step(use)
        if use == "scoring":  # compiled again: scoring has no earlier call that would make sizes symbolic
            mom.compile()
        found = Found()
        try:
            with pieces_run_eagerly(), stock_runs_eagerly(found.watch):
                actual = mom.use(use, got)
            uses[use] = {"difference": difference(actual, wanted[use]), **found.entry()}
        except Exception as error:
            uses[use] = {"error": describe_error(error)}
        row({"type": name, "uses": uses})
    wrong = [use for use in wanted if "error" in uses[use] or not uses[use]["difference"] <= bound]
    if wrong:
        stock_results(Caller(model, "aot_eager"), wanted, uses, wrong)
    row({"type": name, "uses": uses})


def stock_results(stock: Caller, wanted: dict[str, torch.Tensor], uses: dict[str, Any], wrong: list[str]) -> None:
    """Run stock `torch.compile` where mom failed. A step needs the prefill before it."""
    stock.compile()
    got: dict[str, Any] = {}
    for use in wanted:
        if use not in wrong and not (use == "batch" and "decode" in wrong):
            continue
        step(f"stock {use}")
        try:
            actual = stock.use(use, got)
            uses[use]["stock_difference"] = difference(actual, wanted[use])
        except Exception as error:
            uses[use]["stock_error"] = describe_error(error)


def run_peaks(name: str, backends: Sequence[str]) -> None:
    """Measure the peak of a prefill with some backends, cache kept, logits of the last token, and emit rows."""
    measure.watch_cpu()
    model = build(Subject(name), REALISTIC, torch.float32)
    inputs = accepted(model, **words(model, 1, LONG, REALISTIC), use_cache=True, logits_to_keep=1)
    peaks: dict[str, dict[str, Any]] = {}
    wanted = Caller(model, None)(inputs).logits
    for backend in backends:
        step(backend)
        peaks[backend] = _peak(model, backend, inputs, wanted)
        row({"type": name, "peaks": peaks})


def _peak(model: Any, backend: str, inputs: Inputs, wanted: torch.Tensor) -> dict[str, Any]:
    caller = Caller(model, backend)
    torch._dynamo.reset()
    model._compiled_call_impl = None
    model.compile(backend=backend)
    try:
        apart = difference(caller(inputs).logits, wanted)
        call: Callable[[], Any] = lambda: caller(inputs)  # noqa: E731
        return {"peak": measure.peak_bytes(call).peak, "difference": apart, "seconds": round(measure.seconds(call), 2)}
    except Exception as error:
        return {"error": describe_error(error)}


def run_one(subject: Subject, backends: Sequence[str]) -> None:
    """Measure peaks with `backends`, or run all uses if there are none."""
    torch._dynamo.reset()
    with torch.no_grad():
        if backends:
            run_peaks(subject.name, backends)
        else:
            with everything_in_float64():
                run_uses(subject)


def in_a_child(name: str, work: Callable[[], None], timeout: float) -> str | None:
    """Run `work` in a fork of this process, in which everything is imported and nothing has run.

    Returns how it failed if the process did not end by itself. An error that `work` raises becomes a row.
    """
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException as error:
            row({"type": name, "ended": describe_error(error)})
        sys.stdout.flush()
        os._exit(status)
    end = time.monotonic() + timeout
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return None if os.WIFEXITED(status) else f"ended by signal {os.WTERMSIG(status)}"
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return f"ran longer than {timeout:.0f} s"
        time.sleep(0.05)


def main() -> int:
    spec = json.loads(sys.argv[sys.argv.index("--worker") + 1])
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    for name, composite, backends in spec["types"]:
        began = time.monotonic()
        work = functools.partial(run_one, Subject(name, composite), backends)
        failed = in_a_child(name, work, spec["timeout"])
        ended = {} if failed is None else {"ended": failed}
        key = "compile_seconds" if backends else "seconds"
        row({"type": name, **ended, key: round(time.monotonic() - began, 1)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
