"""The GPU figures: `python -m benchmarks.gpu`. NOT YET RUN ON A GPU (its plumbing has been tried on the CPU).

1. the tests marked `gpu`, in a subprocess with a time limit;
2. the KV cache on the device against the KV cache on the host (`benchmarks.kv`), Llama-3-8B's shape in bf16, the
   longest prompt of up to 128k tokens that is expected to be done in its share of the time: seconds of the prefill,
   milliseconds of a decode step, the share of the link's bandwidth it reaches;
3. the same shape, prefill of 16k, 64k and 144k tokens, last-token logits, under mom, stock Inductor and eager: peak
   above the weights (`torch.cuda.max_memory_allocated`), what the allocator had of the device
   (`torch.cuda.max_memory_reserved`), and time.

Each backend has a process of its own and goes through the lengths upwards; running out of memory is a figure too, while
compiling as well. Every finished cell is written at once, so that being cut off loses nothing, and the order is such
that what is lost first is eager. All of it keeps to one time budget, of which each part has a share (`limits`).

The KV cache is kept (`--no-cache`: it is not). When traced without one, Hugging Face's packed-sequence check builds an
S x S mask, 20 GiB at 144k tokens, which an eager run does not: stock Inductor would be measured with that.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import kv, measure, workers
from benchmarks.measure import MIB

Row = dict[str, Any]
NO_DEVICE = 2

#: Prompts for the KV cache's figures, the longest that fits into its time.
KV_TOKENS = (128 * 1024, 64 * 1024, 32 * 1024, 16 * 1024, 8 * 1024)
#: How often `benchmarks.kv` runs the prefill, and seconds that the rest of one of its two workers may take: making the
#: model, compiling two graphs, decoding. Expected, not measured.
KV_PREFILLS, KV_REST = 5, 75.0
#: FLOPS of bf16 that a prefill is expected to reach at least, of the slowest device meant (an A100, less than half).
EXPECTED_FLOPS = 130e12


def limits(budget: float, *, tests: bool, kv: bool) -> dict[str, float]:
    """Seconds of each part; prefill has what the others leave, if they take all of theirs."""
    parts = {"tests": budget / 6 if tests else 0.0, "kv": budget * 0.4 if kv else 0.0}
    return {**parts, "prefill": budget - sum(parts.values())}


def prefill_seconds(shape: Mapping[str, int], layers: int, tokens: int) -> float:
    """What a prefill is expected to take: its products and causal attention at `EXPECTED_FLOPS`."""
    width, inner = shape["hidden_size"], shape["intermediate_size"]
    grouped = width * shape["num_key_value_heads"] // shape["num_attention_heads"]
    products = 2 * tokens * (2 * width * width + 2 * width * grouped + 3 * width * inner)
    attention = 2 * tokens * tokens * width
    return layers * (products + attention) / EXPECTED_FLOPS


def kv_tokens(shape: Mapping[str, int], layers: int, most: int, limit: float) -> int:
    """The longest of `KV_TOKENS` up to `most` for which both workers should finish within `limit`; 0: none."""
    each = limit / 2 - KV_REST
    fitting = (n for n in KV_TOKENS if n <= most and KV_PREFILLS * prefill_seconds(shape, layers, n) <= each)
    return next(fitting, 0)


def out_of_memory(error: BaseException) -> str | None:
    """What an error says of the device's memory, if that is why it was raised, however often it was wrapped: what a
    compiler raises has the reason behind it, or only in its message."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        lines = [line for line in str(cause).splitlines() if "out of memory" in line.lower()]
        if isinstance(cause, torch.cuda.OutOfMemoryError) or lines:
            return f"out of memory: {(lines or [type(cause).__name__])[0].strip()}"
        cause = cause.__cause__ or cause.__context__
    return None


def worker(spec: Row) -> None:
    from benchmarks import models

    device = spec["device"]
    if device == "cpu":
        measure.watch_cpu()
    workers.step("model")
    dtype = torch.bfloat16
    model = models.llama(spec["shape"], spec["layers"], dtype=dtype, device=device, seq=max(spec["sizes"]))
    # The first length compiles a graph of its own, the second one with a symbolic length that serves the third.
    compiled = model if spec["backend"] == "eager" else torch.compile(model, backend=spec["backend"])
    for size in spec["sizes"]:
        cell: Row = {"backend": spec["backend"], "tokens": size}
        workers.step(f"{size} tokens")
        try:
            cell |= measure_cell(compiled, models.tokens(model, size), spec)
        except Exception as error:
            reason = out_of_memory(error)
            if reason is None:
                raise
            cell["error"] = reason
        if "error" in cell and device == "cuda":
            torch.cuda.empty_cache()
        workers.row(cell)


def measure_cell(compiled: Any, ids: torch.Tensor, spec: Row) -> Row:
    """First call (compiles), one for the peak, then the timed ones."""
    from benchmarks import models

    call = partial(models.prefill, compiled, ids, cache=spec["cache"])
    device = spec["device"]
    first = measure.seconds(call, device)
    report = measure.peak_bytes(call, device)
    times = [measure.seconds(call, device) for _ in range(spec["repeats"])]
    return {
        "first": first, "peak": report.peak, "kept": report.kept, "reserved": report.reserved, "seconds": times
    }  # fmt: skip


def run_gpu_tests(limit: float) -> Row:
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
    start = time.monotonic()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
        status, output = str(done.returncode), done.stdout
    except subprocess.TimeoutExpired as expired:
        status, output = "ran out of time", (expired.stdout or b"").decode(errors="replace")
    return {"status": status, "seconds": time.monotonic() - start, "tail": output.splitlines()[-15:]}


def kv_rows(options: argparse.Namespace, limit: float) -> list[Row]:
    """The KV cache on the device and on the host, in that order."""
    from benchmarks import models

    tokens = kv_tokens(models.SHAPES[options.shape], options.layers, options.kv_seq, limit)
    if not tokens:
        raise workers.WorkerFailed(f"no prompt is expected to be done within {limit:.0f} s")
    arguments = ["--seq", str(tokens), "--layers", str(options.layers), "--shape", options.shape]
    arguments += ["--dtype", "bfloat16", "--device", options.device, "--backends", "mom", "mom-host"]
    parsed = kv.parse(arguments)
    rows = kv.run(parsed, timeout=limit / 2)
    kv.print_rows(rows, parsed)
    return rows


def show(cell: Row) -> str:
    head = f"{cell['backend']:>9} {cell['tokens']:>7} tokens: "
    if "error" in cell:
        return head + cell["error"]
    best = min(cell["seconds"])
    reserved = f", {cell['reserved'] / MIB:.0f} MiB reserved" if cell["reserved"] is not None else ""
    return head + f"peak {cell['peak'] / MIB:9.0f} MiB{reserved}, {best:7.2f} s (first call {cell['first']:.0f} s)"


def run(options: argparse.Namespace, target: Path) -> Row:
    end = time.monotonic() + options.budget
    seconds = limits(options.budget, tests=not options.skip_tests, kv=bool(options.kv_seq))
    machine = measure.machine()
    results: Row = {
        "machine": machine,
        "options": {name: value for name, value in vars(options).items() if name != "worker"},
        "tests": None,
        "cells": [],
    }

    def write() -> None:
        target.write_text(json.dumps(results, indent=2) + "\n")

    def keep(cell: Row) -> None:
        results["cells"].append(cell)
        write()
        print(show(cell), flush=True)

    print(measure.describe_machine(machine), flush=True)
    if not options.skip_tests:
        results["tests"] = run_gpu_tests(seconds["tests"])
        write()
        print(*results["tests"]["tail"], sep="\n", flush=True)
    try:
        results["kv"] = kv_rows(options, seconds["kv"]) if options.kv_seq else []
    except workers.WorkerFailed as failed:
        results.setdefault("failures", []).append({"backend": "kv", "error": str(failed)})
        print(f"kv: {failed}", flush=True)
    write()
    for backend in options.backends:
        left = end - time.monotonic()
        spec = {name: getattr(options, name) for name in ("shape", "layers", "sizes", "repeats", "cache", "device")}
        # Otherwise fragments of one length's memory are lost to the next.
        env = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
        try:
            if left <= 0:
                raise workers.WorkerFailed("no time left")
            workers.run_worker("benchmarks.gpu", spec | {"backend": backend}, timeout=left, env=env, on_row=keep)
        except workers.WorkerFailed as failed:
            results.setdefault("failures", []).append({"backend": backend, "error": str(failed)})
            write()
            print(f"{backend}: {failed}", flush=True)
    return results


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="Prefill figures on a GPU.")
    parser.add_argument("--sizes", type=int, nargs="+", default=[16 * 1024, 64 * 1024, 144 * 1024])
    parser.add_argument("--kv-seq", type=int, default=128 * 1024, help="longest prompt for the KV cache; 0: none")
    parser.add_argument("--backends", nargs="+", default=["mom", "inductor", "eager"])
    parser.add_argument("--shape", default="llama-3-8b")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--cache", action=argparse.BooleanOptionalAction, default=True, help="keep the KV cache")
    parser.add_argument("--budget", type=float, default=570, help="seconds for everything (default 570)")
    parser.add_argument("--skip-tests", action="store_true")
    parser.add_argument("--device", default="cuda", help="cpu tries the plumbing out")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.worker is not None:
        worker(json.loads(options.worker))
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks.gpu needs a CUDA device and a CUDA build of PyTorch; none found", file=sys.stderr)
        return NO_DEVICE
    folder = Path(os.environ.get("OUT") or Path(__file__).with_name("results"))
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"gpu-{measure.machine()['date']}.json"
    results = run(options, target)
    print(f"written to {target}")
    tests = results["tests"]
    passed = tests is None or tests["status"] == "0"
    return 0 if passed and not results.get("failures") else 1


if __name__ == "__main__":
    sys.exit(main())
