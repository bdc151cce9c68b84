"""Time to the first token: `python -m benchmarks.starts`.

    cold     a process with an empty compile cache
    again    a second process with the compile cache of the first
    in each  generate() of a first prompt; of a second, longer prompt; then warm decode steps
    steps    decode steps of all backends in one process, in turn: two processes differ by more than two backends

Every backend has its own processes and cache folder. Seconds are wall time; *processor* is the time of all threads and
compilers, which other work on the machine affects less.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure, workers

BACKENDS = ("inductor", "mom")
RESULTS = Path(__file__).with_name("results")
Row = dict[str, Any]


def worker(spec: Row) -> None:
    if spec["start"] == "steps":
        workers.row({"start": "steps", "step": _steps_in_turn(spec)})
        return
    from benchmarks import models

    model = _model(spec, spec["backend"])
    row: Row = {"backend": spec["backend"], "start": spec["start"]}
    for name, length in (("first", spec["seq"]), ("second", spec["seq"] + spec["seq"] // 4 + 1)):
        workers.step(f"{name} prompt")
        ids = models.tokens(model, length)
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        row[name] = _timed(partial(model.generate, **given, max_new_tokens=5, min_new_tokens=5, do_sample=False))
        row[name] |= _of_it()
    workers.step("decode")
    workers.row(row | {"step": _steps(model, spec)})


def _model(spec: Row, backend: str) -> Any:
    from benchmarks import models

    model = models.llama(spec["shape"], spec["layers"], seq=2 * spec["seq"])
    if backend != "eager":
        model.compile(**_backend(backend))
    return model


def _backend(name: str) -> Row:
    if name == "mom-host":
        return {"backend": "mom", "options": {"kv_offload": True}}
    return {"backend": name}


def _timed(fn: Callable[[], Any]) -> Row:
    before = _processor()
    return {"seconds": measure.seconds(fn), "processor": _processor() - before}


def _processor() -> float:
    """Return the CPU seconds of this process and of its finished children."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def _of_it() -> Row:
    """Return the seconds of passes and of compiled pieces, of all graphs so far."""
    from mom_compile import reports

    found = reports()
    passes = sum(step.seconds for report in found for step in report.passes)
    return {
        "graphs": len(found),
        "passes": passes,
        "compiling": sum(report.compile_seconds for report in found),
        "pieces": sum(len(report.compiled_pieces) for report in found),
    }


def _steps(model: Any, spec: Row) -> list[float]:
    """Measure decode steps over a cache of the prompt's length."""
    step = _step(model, spec)
    return [measure.seconds(step) for _ in range(spec["steps"])]


def _steps_in_turn(spec: Row) -> dict[str, list[float]]:
    """Measure the same for each backend, in alternating order."""
    steps = {name: _step(_model(spec, name), spec) for name in spec["backends"]}
    found: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(spec["steps"]):
        for name in list(steps)[:: 1 - 2 * (number % 2)]:
            found[name].append(measure.seconds(steps[name]))
    return found


def _step(model: Any, spec: Row) -> Callable[[], None]:
    """Return a warm decode step that appends to no cache: each call is the same step."""
    from benchmarks import models

    with torch.no_grad():
        cache = models.prefill(model, models.tokens(model, spec["seq"]), cache=True)[1]
    kept, token = models.keeping(cache, model), torch.tensor([[7]])

    @torch.no_grad()
    def step() -> None:
        model(input_ids=token, **kept, use_cache=True, logits_to_keep=1)

    for _ in range(3):
        step()
    return step


def run_steps(options: argparse.Namespace) -> Row:
    spec = {**vars(options), "start": "steps"}
    (row,) = workers.run_worker("benchmarks.starts", spec, env={"HF_HUB_OFFLINE": "1"}, on_step=print)
    medians = {name: statistics.median(seconds) for name, seconds in row["step"].items()}
    first = next(iter(medians))
    print(", ".join(f"{n} {1e3 * m:.2f} ms ({m / medians[first]:.3f})" for n, m in medians.items()), "a step, in turn")
    return row


def run(options: argparse.Namespace) -> list[Row]:
    rows: list[Row] = []
    for backend in options.backends:
        with tempfile.TemporaryDirectory() as cache:
            for start in ("cold", "again"):
                spec = {**vars(options), "backend": backend, "start": start}
                env = {"TORCHINDUCTOR_CACHE_DIR": cache, "HF_HUB_OFFLINE": "1"}
                rows += workers.run_worker(
                    "benchmarks.starts", spec, env=env, on_step=partial(print, backend, start)
                )
                print(_line(rows[-1]), flush=True)
    return rows


def _line(row: Row) -> str:
    first, second = row["first"], row["second"]
    return (
        f"{row['backend']:9} {row['start']:6} first {first['seconds']:.1f} s ({first['processor']:.1f}), "
        f"second {second['seconds']:.1f} s ({second['processor']:.1f}), passes {second['passes']:.1f}, "
        f"pieces {second['pieces']} in {second['compiling']:.1f} s, step {statistics.median(row['step']) * 1e3:.2f} ms"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS))
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--shape", default="half")
    parser.add_argument("--seq", type=int, default=1400)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--only-steps", action="store_true", help="only decode steps, in turn")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/starts-<date>.json")
    options = parser.parse_args()
    if options.worker:
        worker(json.loads(options.worker))
        return
    rows = [] if options.only_steps else run(options)
    rows.append(run_steps(options))
    machine = measure.machine()
    print(measure.describe_machine(machine))
    if options.save:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"starts-{machine['date']}.json"
        path.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
        print(f"saved {path}")


if __name__ == "__main__":
    main()
