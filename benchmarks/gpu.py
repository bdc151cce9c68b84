"""The GPU figures: `python -m benchmarks.gpu`. NOT YET RUN ON A GPU (its plumbing has been tried on the CPU).

1. the tests marked `gpu`, in a subprocess with a time limit;
2. `PARTS`, each a process: Llama-3-8B's shape in bf16 by one method (`benchmarks/methods.py`) at lengths upwards, the
   most telling first: what the MOM paper measured (144k, then 155k to 455k), under 80 GiB, then under 24 GiB, uncapped
   at last. Peak above the weights (`torch.cuda.max_memory_allocated`), what the allocator had of the device
   (`max_memory_reserved`), time to first token, decode steps and the bytes that they move.

All of it keeps to one budget of time (`--budget`). A length that is not expected to be done in what is left waits for
the next run, which goes on where this one ended: results are read from benchmarks/results/ and written, whole, to
`$OUT` or there, after every length. So a cut loses at most the length under way. Running out of memory is a result,
while compiling as well. The page is made with them: `python -m benchmarks.suite --page`.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure, physical
from benchmarks.measure import MIB
from benchmarks.methods import METHODS, Setup
from benchmarks.results_file import OtherMachine, Results
from benchmarks.workers import Worker, WorkerFailed

Row = dict[str, Any]
NO_DEVICE = 2
K, GIB = 1024, 1 << 30
FOLDER = Path(__file__).with_name("results")

#: Where the tests marked `gpu` are: to look for them everywhere takes longer than to run them.
GPU_TESTS = ("tests/test_attention_gpu.py", "tests/test_kv_gpu.py", "tests/test_measure.py")

#: FLOPS of bf16 that a prefill is expected to reach at least, of the slowest device meant (an A100, less than half).
EXPECTED_FLOPS = 130e12
#: Seconds that a process is expected to take beside its prefills: making the model, compiling, decoding.
EXPECTED_REST = 75.0
#: Prefills of a length: the first one, the one whose peak is measured, and `REPEATS` timed ones; from `ONCE` tokens on
#: one is all, after two short ones for which the graphs are compiled.
REPEATS, ONCE = 2, 300 * K
SHORT = (8 * K, 12 * K)
STEPS = 8


@dataclass(frozen=True)
class Part:
    """A process: one method, lengths upwards, with at most so many bytes of the device, weights included."""

    method: str
    lengths: tuple[int, ...]
    memory: int | None = None

    def key(self, tokens: int) -> str:
        limit = "" if self.memory is None else f" in {self.memory >> 30} GiB"
        return f"{self.method} {tokens}{limit}"


PARTS = (
    Part("mom", (16 * K, 64 * K, 144 * K)),
    Part("inductor", (16 * K, 64 * K, 144 * K)),
    Part("mom-host", (144 * K, 455 * K), 80 * GIB),
    Part("eager", (16 * K, 144 * K)),
    Part("mlp", (144 * K, 305 * K, 455 * K), 80 * GIB),
    Part("chunked", (144 * K, 350 * K), 80 * GIB),
    Part("mom", (305 * K, 455 * K), 80 * GIB),
    Part("inductor", (155 * K, 165 * K, 200 * K), 80 * GIB),
    Part("chunked-offload", (16 * K, 64 * K, 144 * K), 80 * GIB),
    Part("offload", (144 * K,), 80 * GIB),
    Part("prefill-only", (144 * K, 455 * K), 80 * GIB),
    Part("mom-host", (128 * K, 256 * K), 24 * GIB),
    Part("inductor", (32 * K, 64 * K), 24 * GIB),
    Part("chunked-offload", (32 * K, 64 * K), 24 * GIB),
    Part("mom-host", (1000 * K,), 80 * GIB),
    Part("mom-host", (1500 * K, 2000 * K)),
)


def expected_seconds(setup: Setup) -> float:
    """What one length is expected to take, its compiling apart."""
    calls = 1 if setup.tokens >= ONCE else 2 + REPEATS
    return calls * physical.prefill_flops(setup) / EXPECTED_FLOPS


def due(part: Part, setup: Setup, results: Results, left: float) -> tuple[int, ...]:
    """Lengths of a part that are still to be measured and are expected to be done within `left` seconds."""
    lengths: list[int] = []
    left -= EXPECTED_REST
    for tokens in part.lengths:
        left -= expected_seconds(replace(setup, tokens=tokens))
        if part.key(tokens) not in results.cells and left >= 0:
            lengths.append(tokens)
    return tuple(lengths)


def run_part(part: Part, setup: Setup, lengths: Sequence[int], left: float) -> Iterator[Row]:
    """A row for each length; the last one may say why there are no more."""
    warm_up = SHORT if min(lengths) >= ONCE else ()
    spec: Row = {"method": part.method, "setup": asdict(setup), "lengths": [*warm_up, *lengths], "limit": None}
    spec |= {"repeats": REPEATS, "steps": STEPS, "once": ONCE}
    if part.memory is not None:
        spec["memory"] = part.memory
    # Otherwise fragments of one length's memory are lost to the next.
    env = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    missing = list(lengths)
    try:
        with Worker("benchmarks.cells", spec, timeout=left, env=env) as worker:
            for _ in warm_up:
                worker.row()
            for tokens in lengths:
                row = worker.row()
                missing.remove(tokens)
                yield row
    except WorkerFailed as failed:
        if "ran longer than" not in str(failed):
            yield {"tokens": missing[0], "error": str(failed)}


def run_gpu_tests(limit: float) -> Row:
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", *GPU_TESTS]
    start = time.monotonic()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
        status, output = str(done.returncode), done.stdout
    except subprocess.TimeoutExpired as expired:
        status, output = "ran out of time", (expired.stdout or b"").decode(errors="replace")
    return {"status": status, "seconds": time.monotonic() - start, "tail": output.splitlines()[-15:]}


def show(row: Row) -> str:
    memory = f" in {row['memory'] >> 30} GiB" if row["memory"] else ""
    head = f"{row['method']:>15} {row['setup']['tokens']:>8} tokens{memory}: "
    if "error" in row:
        return head + str(row["error"]).splitlines()[0]
    reserved = f", {row['reserved'] / MIB:.0f} MiB reserved" if row["reserved"] is not None else ""
    first = "" if row["first"] is None else f" (first call {row['first']:.0f} s)"
    step = f", {min(row['step']) * 1e3:.0f} ms a token" if row.get("step") else ""
    return head + f"peak {row['peak'] / MIB:9.0f} MiB{reserved}, {min(row['seconds']):7.2f} s{first}{step}"


def run(options: argparse.Namespace, results: Results) -> None:
    end = time.monotonic() + options.budget
    print(measure.describe_machine(results.data["machine"]), flush=True)
    if not options.skip_tests:
        results.data["tests"] = run_gpu_tests(options.budget / 6)
        results.write()
        print(*results.data["tests"]["tail"], sep="\n", flush=True)
    base = Setup(options.shape, options.layers, 0, dtype="bfloat16", device=options.device)
    if results.data["rates"] is None:
        results.data["rates"] = asdict(physical.measure_rates(base.device, base.dtype))
        results.write()
    for part in PARTS:
        left = end - time.monotonic()
        lengths = due(part, base, results, left)
        if part.method not in options.methods or not lengths:
            continue
        longest = replace(base, tokens=max(lengths))
        for row in run_part(part, longest, lengths, left):
            setup = asdict(replace(base, tokens=row["tokens"]))
            whole = {"method": part.method, "setup": setup, "limit": None, "memory": part.memory, **row}
            results.keep(part.key(row["tokens"]), whole)
            print(show(whole), flush=True)
    waiting = [key for part in PARTS for key in map(part.key, part.lengths) if key not in results.cells]
    print(f"{len(waiting)} lengths wait for the next run" + (f", {waiting[0]} first" if waiting else ""))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="Prefill figures on a GPU.")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD")
    parser.add_argument("--shape", default="llama-3-8b")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--budget", type=float, default=570, help="seconds for everything (default 570)")
    parser.add_argument("--skip-tests", action="store_true")
    parser.add_argument("--device", default="cuda", help="cpu tries the plumbing out")
    return parser.parse_args(arguments)


#: Of a GPU's host little matters, and machines that are lent differ in it.
OF_A_HOST = ("date", "mom_compile", "cpu", "cores", "threads", "system")


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks.gpu needs a CUDA device and a CUDA build of PyTorch; none found", file=sys.stderr)
        return NO_DEVICE
    machine = measure.machine()
    name = f"gpu-{re.sub(r'[^a-z0-9]+', '-', machine.get('gpu', 'none').lower())}.json"
    folder = Path(os.environ.get("OUT") or FOLDER)
    try:
        results = Results(folder / name, machine, (FOLDER / name,), may_differ=OF_A_HOST)
    except OtherMachine as other:
        print(other, file=sys.stderr)
        return NO_DEVICE
    run(options, results)
    print(f"written to {results.path}")
    tests = results.data.get("tests")
    errors = [str(row["error"]) for row in results.cells.values() if "error" in row]
    failed = [error for error in errors if not error.startswith("out of memory")]
    return 0 if (tests is None or tests["status"] == "0") and not failed else 1


if __name__ == "__main__":
    sys.exit(main())
