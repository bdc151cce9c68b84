"""The CPU figures of the README (`make bench`): peak memory and time of a prefill, and compile time.

Prefill: one process holds the model and every backend; the calls are timed in turn (A B B A ...), and the
medians compared. It is measured twice. Without a KV cache Hugging Face's packed-sequence check, when traced,
builds an S x S mask, which no eager run does; with the cache kept there is none, in any backend.

Compile time: each figure comes from a fresh process with an empty cache folder. A trivial function is
compiled first, so that what a process pays once (imports, instruction-set checks, precompiled headers) is
left out. `frontend` is a backend that stops where Inductor's own work would begin: Dynamo and AOTAutograd,
whose time no backend can change.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure, workers
from benchmarks.measure import MIB

RESULTS = Path(__file__).with_name("results")
Row = dict[str, Any]


# ------------------------------------------------------------------------------------------------ workers


def _compiled(model: Any, backend: str) -> Any:
    if backend == "eager":
        return model
    return torch.compile(model, backend=frontend if backend == "frontend" else backend)


def frontend(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
    """Inductor's front half alone: Dynamo's graph through AOTAutograd and decompositions, then run as it is."""
    from torch._inductor.compile_fx import compile_fx

    def stop_here(graph: torch.fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Any:
        def run(arguments: list[Any]) -> Any:
            return graph(*arguments)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    return compile_fx(graph, inputs, inner_compile=stop_here)


def prefill_worker(spec: Row) -> None:
    from benchmarks import models

    measure.watch_cpu()
    workers.step("model")
    model = models.llama(spec["shape"], spec["layers"], seq=spec["seq"])
    ids = models.tokens(model, spec["seq"])
    calls = {
        name: partial(models.prefill, _compiled(model, name), ids, cache=spec["cache"]) for name in spec["backends"]
    }
    rows: dict[str, Row] = {}
    reference = models.prefill(model, ids, cache=spec["cache"])[0]
    for name, call in calls.items():
        workers.step(f"compile {name}")
        difference = (call()[0] - reference).abs().max().item()
        workers.step(f"peak {name}")
        report = measure.peak_bytes(call)
        rows[name] = {"backend": name, "peak": report.peak, "kept": report.kept, "difference": difference}
    workers.step("time")
    for name, times in measure.alternate(calls, spec["repeats"]).items():
        workers.row(rows[name] | {"seconds": times, "cache": spec["cache"]})


def compile_worker(spec: Row) -> None:
    from benchmarks import models

    model = models.llama("narrow", spec["layers"], seq=spec["seq"])
    ids = models.tokens(model, spec["seq"])
    torch.compile(lambda x: x.sin() + 1, backend="inductor")(torch.ones(64))
    torch.compiler.reset()
    call = partial(models.prefill, _compiled(model, spec["backend"]), ids, cache=False)
    workers.step("compile")
    first = measure.seconds(call)
    again = min(measure.seconds(call) for _ in range(2))
    workers.row({"backend": spec["backend"], "layers": spec["layers"], "compile": first - again, "run": again})


# ------------------------------------------------------------------------------------------------ figures


def _announce(progress: Callable[[str], None], label: str, text: str) -> None:
    progress(label + text)


def measure_prefill(options: argparse.Namespace, backends: Sequence[str], progress: Callable[[str], None]) -> list[Row]:
    rows: list[Row] = []
    for cache in (False, True):
        spec = {
            "kind": "prefill",
            "shape": options.shape,
            "layers": options.layers,
            "seq": options.seq,
            "repeats": options.repeats,
            "backends": list(backends),
            "cache": cache,
        }
        label = "prefill, cache kept: " if cache else "prefill: "
        rows += workers.run_worker("benchmarks.cpu", spec, on_step=partial(_announce, progress, label))
    return rows


def measure_compile(options: argparse.Namespace, backends: Sequence[str], progress: Callable[[str], None]) -> list[Row]:
    rows: list[Row] = []
    for layers in options.compile_layers:
        for backend in ["frontend", *(name for name in backends if name != "eager")]:
            progress(f"compile time: {backend}, {layers} layers")
            spec = {"kind": "compile", "backend": backend, "layers": layers, "seq": options.compile_seq}
            with tempfile.TemporaryDirectory() as folder:
                rows += workers.run_worker("benchmarks.cpu", spec, env={"TORCHINDUCTOR_CACHE_DIR": folder})
    return rows


# ------------------------------------------------------------------------------------------------- output


def _ratio(value: float, base: float | None) -> str:
    return f"{value / base:.2f}" if base else ""


def print_prefill(rows: Sequence[Row], options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Prefill, {options.layers} layers ({options.shape}), float32, S = {options.seq}")
    for heading in ("backend", "KV cache", "peak MiB", "/inductor", "seconds", "/inductor", "difference"):
        table.add_column(heading, justify="left" if heading in ("backend", "KV cache") else "right")
    for row in rows:
        base = next((r for r in rows if r["backend"] == "inductor" and r["cache"] == row["cache"]), None)
        median = statistics.median(row["seconds"])
        table.add_row(
            row["backend"],
            "kept" if row["cache"] else "none",
            f"{row['peak'] / MIB:.0f}",
            _ratio(row["peak"], base["peak"] if base else None),
            f"{median:.2f}",
            _ratio(median, statistics.median(base["seconds"]) if base else None),
            f"{row['difference']:.1e}",
        )
    Console().print(table)


def print_compile(rows: Sequence[Row], options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Cold compile, S = {options.compile_seq}, seconds")
    for heading in ("layers", "backend", "all", "/inductor", "Dynamo, AOTAutograd", "backend's own", "/inductor"):
        table.add_column(heading, justify="left" if heading == "backend" else "right")
    for layers in options.compile_layers:
        of = {row["backend"]: row["compile"] for row in rows if row["layers"] == layers}
        front = of.pop("frontend")
        stock = of.get("inductor")
        for name, total in of.items():
            own = _ratio(total - front, stock - front if stock else None)
            cells = f"{total:.1f}", _ratio(total, stock), f"{front:.1f}", f"{total - front:.1f}", own
            table.add_row(str(layers), name, *cells)
    Console().print(table)
    for name in dict.fromkeys(row["backend"] for row in rows):
        few, *_, many = [row["compile"] for row in rows if row["backend"] == name]
        shallow, *_, deep = options.compile_layers
        print(f"{name}: {deep} layers take {many / few:.2f}x the time of {shallow}")


def save(options: argparse.Namespace, results: Row) -> Path:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"cpu-{results['machine']['date']}.json"
    path.write_text(json.dumps(results, indent=2) + "\n")
    return path


def available(backends: Sequence[str]) -> list[str]:
    """The backends asked for, less those this PyTorch has not got registered."""
    known = {"eager", *torch.compiler.list_backends(exclude_tags=())}
    for name in backends:
        if name not in known:
            print(f"skipping {name}: no such torch.compile backend (is mom_compile installed?)", file=sys.stderr)
    return [name for name in backends if name in known]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description="Prefill and compile-time figures.")
    parser.add_argument("--seq", type=int, default=8192, help="tokens in the prompt (default 8192)")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--shape", choices=("small", "narrow"), default="small")
    parser.add_argument("--backends", nargs="+", default=["eager", "inductor", "mom"])
    parser.add_argument("--repeats", type=int, default=3, help="timed calls of each backend")
    parser.add_argument("--compile-layers", type=int, nargs=2, default=[4, 24], metavar=("FEW", "MANY"))
    parser.add_argument("--compile-seq", type=int, default=4096)
    parser.add_argument("--only", choices=("prefill", "compile"))
    parser.add_argument("--quick", action="store_true", help="a look: S = 2048, one repeat, 2 and 6 layers")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/cpu-<date>.json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.quick:
        options.seq, options.repeats, options.compile_layers, options.compile_seq = 2048, 1, [2, 6], 2048
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.worker is not None:
        spec = json.loads(options.worker)
        {"prefill": prefill_worker, "compile": compile_worker}[spec["kind"]](spec)
        return 0
    from rich.console import Console

    backends = available(options.backends)
    results: Row = {"machine": measure.machine(), "options": {k: v for k, v in vars(options).items() if k != "worker"}}
    with Console(stderr=True).status("") as status:

        def progress(text: str) -> None:
            status.update(text)

        if options.only != "compile":
            results["prefill"] = measure_prefill(options, backends, progress)
        if options.only != "prefill":
            results["compile"] = measure_compile(options, backends, progress)
    if "prefill" in results:
        print_prefill(results["prefill"], options)
    if "compile" in results:
        print_compile(results["compile"], options)
    print(measure.describe_machine(results["machine"]))
    if options.save:
        print(f"saved {save(options, results)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
