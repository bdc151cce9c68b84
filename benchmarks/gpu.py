"""The GPU figures: `python -m benchmarks.gpu`. NOT YET RUN ON A GPU (its code has been run on the CPU).

1. `gpu_questions.QUESTIONS`, each a process: rates of the device; whether decode is fixed; prefill compared with eager
   mode and stock; whether device or host limits; which kernels ran; rows of `auto` compared with fixed ones; cache and
   weights on the host. 8 of 32 layers suffice for these (`--question-layers`);
2. `PARTS`, each a process: Llama-3-8B's shape in bf16 by one method (`benchmarks/methods.py`) at increasing lengths,
   the most important first: what the MOM paper measured (144k, then 155k to 455k), under 80 GiB, then under 24 GiB,
   then without a limit. Peak above the weights (`torch.cuda.max_memory_allocated`), reserved memory
   (`max_memory_reserved`), time to first token, decode steps and the bytes that they move;
3. the tests marked `gpu`, eight in parallel, for which `TESTS` seconds are reserved.

All of it has one time budget (`--budget`). Every figure is a line of `gpu-NAME.jsonl` as soon as it is known, so an
interrupted run loses none. What is not expected to fit into the remaining time waits for the next run, which continues:
results are read from benchmarks/results/ and written, whole, to `$OUT` or there, after every figure. Running out of
memory is a result, also while compiling. The page is written by `python -m benchmarks.suite --page`. To try it without
a GPU:

    OUT=/tmp/out python -m benchmarks.gpu --device cpu --shape narrow --question-layers 1 --tokens 64 128 \\
        --only questions
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure, physical
from benchmarks.gpu_questions import QUESTIONS, Question
from benchmarks.measure import MIB
from benchmarks.methods import METHODS, Setup
from benchmarks.results_file import OtherMachine, Results
from benchmarks.workers import Worker, WorkerFailed

Row = dict[str, Any]
NO_DEVICE = 2
K, GIB = 1024, 1 << 30
FOLDER = Path(__file__).with_name("results")

#: Files with tests marked `gpu`: collecting all files takes longer than running these.
GPU_TESTS = (
    "tests/test_attention_gpu.py", "tests/test_cache_in_place.py", "tests/test_kv_gpu.py", "tests/test_measure.py",
    "tests/test_models_gpu.py",
)  # fmt: skip
#: Number of workers, and reserved seconds: an earlier run took 100 s on an H200.
TEST_WORKERS, TESTS = 8, 110.0
#: Tests between two progress lines.
TESTS_TOLD = 20
#: The line of `pytest -v` for a test, with or without pytest-xdist.
OUTCOME = re.compile(r"(?:^\[gw\d+\].*?|::.*)\b(PASSED|FAILED|ERROR|SKIPPED)\b")

#: The share of a large product's FLOPS that a prefill is expected to reach at least.
EXPECTED_SHARE = 0.5
#: The remaining seconds that a question needs to start.
LEAST_SECONDS = 20.0
#: Expected seconds of a process in addition to its prefills: building the model, compiling, decoding.
EXPECTED_REST = 75.0
#: Prefills of a length: the first one, the one whose peak is measured, and `REPEATS` timed ones; from `ONCE` tokens on
#: one is all, after two short ones for which the graphs are compiled.
REPEATS, ONCE = 2, 300 * K
SHORT = (8 * K, 12 * K)
STEPS = 8


@dataclass(frozen=True)
class Part:
    """A process: one method at increasing lengths, with a limit on device memory, weights included."""

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


def expected_seconds(setup: Setup, flops: float) -> float:
    """Return the expected seconds of one length without compilation, on a device whose large products reach `flops`."""
    calls = 1 if setup.tokens >= ONCE else 2 + REPEATS
    return calls * physical.prefill_flops(setup) / (EXPECTED_SHARE * flops)


def due(part: Part, setup: Setup, results: Results, left: float) -> tuple[int, ...]:
    """Return the lengths of a part that are not measured and are expected to end within `left` seconds."""
    flops = results.data["rates"]["flops"]
    lengths: list[int] = []
    left -= EXPECTED_REST
    for tokens in part.lengths:
        left -= expected_seconds(replace(setup, tokens=tokens), flops)
        if part.key(tokens) not in results.cells and left >= 0:
            lengths.append(tokens)
    return tuple(lengths)


def run_part(part: Part, setup: Setup, lengths: Sequence[int], left: float) -> Iterator[Row]:
    """Yield a row for each length; the last one may say why there are no more."""
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


class Lines:
    """A file of JSON lines, each written to disk at once."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path

    def write(self, row: Mapping[str, Any]) -> None:
        text = json.dumps(row)
        with self.path.open("a") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        print(text, flush=True)  # after the file has it: a line that a reader has seen is not lost


def run_question(question: Question, setup: Setup, lengths: Sequence[int], left: float, lines: Lines) -> list[Row]:
    """Return the rows of a question; after an error the last row has it."""
    spec = {"question": asdict(question), "setup": asdict(setup), "lengths": list(lengths)}
    rows: list[Row] = []
    began = time.monotonic()

    def keep(row: Row) -> None:
        rows.append(row)
        lines.write({"question": question.name, **row})

    try:
        with Worker("benchmarks.gpu_questions", spec, timeout=min(question.seconds, left)) as worker:
            for row in worker.rows():
                keep(row)
    except WorkerFailed as failed:
        keep({"error": str(failed)})
    lines.write({"question": question.name, "done": time.monotonic() - began})
    return rows


def answered(rows: Sequence[Row]) -> bool:
    """Return whether a question's process ended by itself. Running out of memory is an answer."""
    return bool(rows) and str(rows[-1].get("error", "out of memory")).startswith("out of memory")


def run_questions(options: argparse.Namespace, results: Results, lines: Lines, end: float) -> None:
    """Run the questions that no earlier run has answered."""
    setup = Setup(options.shape, options.question_layers, 0, dtype="bfloat16", device=options.device)
    known = results.data.setdefault("questions", {})
    for question in QUESTIONS:
        if answered(known.get(question.name, [])) or question.name not in (options.ask or [question.name]):
            continue
        left = end - time.monotonic()
        if left < LEAST_SECONDS:
            lines.write({"question": question.name, "waits": True})
            continue
        rows = run_question(question, setup, options.tokens, left, lines)
        known[question.name] = rows
        results.data["rates"] = next((row["rates"] for row in rows if "rates" in row), results.data["rates"])
        results.write()


def run_gpu_tests(limit: float, lines: Lines) -> Row:
    """Run the GPU tests and report failures as soon as they are known."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "--tb=short", "-p", "no:cacheprovider", *GPU_TESTS]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(TEST_WORKERS)]
    start, found, tail = time.monotonic(), Counter[str](), deque[str](maxlen=15)
    late = threading.Event()

    def stop() -> None:
        late.set()
        process.kill()

    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        timer = threading.Timer(max(limit, 1.0), stop)
        timer.start()
        assert process.stdout is not None
        for line in process.stdout:
            tail.append(line.rstrip())
            outcome = OUTCOME.search(line)
            if outcome is None:
                continue
            found[outcome[1].lower()] += 1
            if outcome[1] in ("FAILED", "ERROR") or found.total() % TESTS_TOLD == 0:
                lines.write({"tests": dict(found), "line": line.strip()})
        timer.cancel()
    status = "ran out of time" if late.is_set() else str(process.returncode)
    row = {"status": status, "seconds": time.monotonic() - start, **found, "tail": list(tail)}
    lines.write({"tests": row})
    return row


def show(row: Row) -> str:
    memory = f" in {row['memory'] >> 30} GiB" if row["memory"] else ""
    head = f"{row['method']:>15} {row['setup']['tokens']:>8} tokens{memory}: "
    if "error" in row:
        return head + str(row["error"]).splitlines()[0]
    reserved = f", {row['reserved'] / MIB:.0f} MiB reserved" if row["reserved"] is not None else ""
    first = "" if row["first"] is None else f" (first call {row['first']:.0f} s)"
    step = f", {min(row['step']) * 1e3:.1f} ms a token" if row.get("step") else ""
    step = f", decode {row['step_error']}" if "step_error" in row else step
    return head + f"peak {row['peak'] / MIB:9.0f} MiB{reserved}, {min(row['seconds']):7.2f} s{first}{step}"


def run_lengths(options: argparse.Namespace, results: Results, lines: Lines, end: float) -> None:
    base = Setup(options.shape, options.layers, 0, dtype="bfloat16", device=options.device)
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
            lines.write({"length": part.key(row["tokens"]), **row})
            print(show(whole), flush=True)
    waiting = [key for part in PARTS for key in map(part.key, part.lengths) if key not in results.cells]
    print(f"{len(waiting)} lengths remain for the next run" + (f", {waiting[0]} first" if waiting else ""))


def run(options: argparse.Namespace, results: Results, lines: Lines) -> None:
    end = time.monotonic() + options.budget
    print(measure.describe_machine(results.data["machine"]), flush=True)
    lines.write({"machine": results.data["machine"]})
    before_tests = end - (TESTS if "tests" in options.only else 0)
    if "questions" in options.only:
        run_questions(options, results, lines, before_tests)
    if "lengths" in options.only:
        if results.data["rates"] is None:
            results.data["rates"] = asdict(physical.measure_rates(options.device, "bfloat16"))
            results.write()
        run_lengths(options, results, lines, before_tests)
    if "tests" in options.only:
        results.data["tests"] = run_gpu_tests(end - time.monotonic(), lines)
        results.write()


STAGES = ("questions", "lengths", "tests")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="Prefill figures on a GPU.")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD")
    parser.add_argument("--shape", default="llama-3-8b")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--question-layers", type=int, default=8, help="layers of the model for questions")
    parser.add_argument("--tokens", type=int, nargs="+", default=[16 * K, 64 * K], help="lengths of questions")
    parser.add_argument("--budget", type=float, default=570, help="seconds for everything (default 570)")
    parser.add_argument("--only", nargs="+", choices=STAGES, default=STAGES, metavar="STAGE", help=", ".join(STAGES))
    parser.add_argument("--ask", nargs="+", choices=[one.name for one in QUESTIONS], metavar="QUESTION")
    parser.add_argument("--device", default="cuda", help="cpu tests the code without a GPU")
    return parser.parse_args(arguments)


#: Fields of the host that may differ between runs: they hardly affect GPU figures.
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
    run(options, results, Lines(results.path.with_suffix(".jsonl")))
    print(f"written to {results.path}")
    tests = results.data.get("tests")
    asked = [row for rows in results.data.get("questions", {}).values() for row in rows]
    errors = [str(row["error"]) for row in (*results.cells.values(), *asked) if "error" in row]
    failed = [error for error in errors if not error.startswith("out of memory")]
    return 0 if (tests is None or tests["status"] == "0") and not failed else 1


if __name__ == "__main__":
    sys.exit(main())
