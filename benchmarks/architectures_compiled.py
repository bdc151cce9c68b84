"""Model types compiled with Inductor's code, compared with eager mode.

`python -m benchmarks.architectures_compiled TYPE ... --tokens 203` compares these types, each in a process of its own.
It stores results in benchmarks/results and writes docs/architectures.md. Existing results are not measured again
without `--redo`. `make sweep` tests every type in the same way.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import resource
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch._inductor.compile_fx  # here, so that no type's seconds have its import
import transformers

from benchmarks import measure, results_file
from benchmarks.architectures import COMPILED, write_page
from benchmarks.architectures_calls import Caller, NoState, Subject, build
from benchmarks.architectures_worker import BOUND_FLOAT32, describe_error, difference, in_a_child
from benchmarks.small_configs import SMALL, Scale
from benchmarks.workers import row, run_worker
from mom_compile import reports

#: Lengths that neither a mini-sequence nor a scan's chunk divides.
TOKENS = (203, 2011)
OPTIONS = {"mini_seq_len": 64, "strict": True}
SCALE = replace(SMALL, positions=4096)
USES = ("prefill", "step")


def compiled_differences(
    subject: Subject, lengths: Sequence[int] = TOKENS, scale: Scale = SCALE, uses: Sequence[str] = USES
) -> dict[str, float]:
    """Return the differences of a compiled float32 model's logits from eager mode's, relative to the largest logit.

    Nothing runs node by node here. Of `uses`, each length has a prefill with a cache, and a decode step if the model
    keeps a state. A difference above `BOUND_FLOAT32` is also computed from stock Inductor's result, and the smaller one
    counts. Raises `NotCompiled` for a piece that would run eagerly.
    """
    model = build(subject, scale, torch.float32)
    wanted, found = (compiled_logits(model, backend, lengths, uses) for backend in (None, "mom"))
    apart = {use: difference(found[use], logits) for use, logits in wanted.items()}
    if max(apart.values()) > BOUND_FLOAT32:
        stock = compiled_logits(model, "inductor", lengths, uses)
        apart = {use: min(apart[use], difference(found[use], stock[use])) for use in apart}
    return apart


def compiled_logits(
    model: Any, backend: str | None, lengths: Sequence[int], uses: Sequence[str] = USES
) -> dict[str, torch.Tensor]:
    """Return the logits of a prefill of each length and of the decode step after it; backend `None` is eager mode."""
    caller = Caller(model, backend, options=OPTIONS)
    caller.compile()
    logits: dict[str, torch.Tensor] = {}
    for tokens in lengths:
        one = replace(caller, tokens={"prefill": tokens})
        outputs: dict[str, Any] = {}
        with contextlib.suppress(NoState):
            for use in uses:
                logits[f"{use} of {tokens}"] = one.use(use, outputs).clone()
    return logits


def run_one(subject: Subject, tokens: int, uses: Sequence[str]) -> None:
    """Run one type and length: a row with the differences, or with the error and what stock Inductor does."""
    try:
        apart = compiled_differences(subject, [tokens], uses=uses)
        found: dict[str, Any] = {use.partition(" ")[0]: by for use, by in apart.items()}
        found |= {"stages": max((len(report.stages) for report in reports()), default=0)}
        found |= {"eager_pieces": sum(len(report.eager_pieces) for report in reports())}
        found |= {"fallbacks": sorted({report.fallback for report in reports() if report.fallback})}
    except Exception as error:
        found = {"error": describe_error(error)}
        row({"type": subject.name, **found})
        try:
            compiled_logits(build(subject, SCALE, torch.float32), "inductor", [tokens], uses)
        except Exception as stock:
            found["stock_error"] = describe_error(stock)
    row({"type": subject.name, **found})


def worker(spec: dict[str, Any]) -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    for name, composite, tokens in spec["types"]:
        before = cpu_seconds()
        work = functools.partial(run_one, Subject(name, composite), tokens, spec["uses"])
        failed = in_a_child(name, work, spec["timeout"])
        ended = {} if failed is None else {"ended": failed}
        row({"type": name, **ended, "cpu_seconds": round(cpu_seconds() - before, 1)})


def cpu_seconds() -> float:
    """Return the CPU seconds of processes that have ended, compilers included."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.architectures_compiled", description="Types, for real.")
    parser.add_argument("types", nargs="*", metavar="TYPE", help="a type, or text decoder:composite")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS[:1], help="lengths of the prefill")
    parser.add_argument("--prefill", action="store_true", help="leave out the decode step")
    parser.add_argument("--redo", action="store_true", help="also types that have a result")
    parser.add_argument("--fresh", action="store_true", help="discard earlier results")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds for a type and length")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        worker(json.loads(options.worker))
        return 0
    torch.set_num_threads(1)
    results = results_file.taken_up(COMPILED, measure.machine(), fresh=options.fresh)
    if results is None:
        return 1
    found: dict[str, Any] = {}
    named = [(name, composite or None) for name, _, composite in (given.partition(":") for given in options.types)]
    wanted = [(*subject, tokens) for tokens in options.tokens for subject in named]
    wanted = [one for one in wanted if options.redo or f"{one[0]} {one[2]}" not in results.cells]

    def take(one: dict[str, Any]) -> None:
        name, _, _ = wanted[0]
        found.update({k: v for k, v in one.items() if k != "type"})
        if "cpu_seconds" in one:  # it has ended
            results.keep(f"{name} {wanted.pop(0)[2]}", found)
            print(name, found, flush=True)
            found.clear()

    if wanted:
        spec = {"types": wanted, "uses": USES[:1] if options.prefill else USES, "timeout": options.timeout}
        run_worker("benchmarks.architectures_compiled", spec, on_row=take)
    write_page()
    return 0


if __name__ == "__main__":
    sys.exit(main())
