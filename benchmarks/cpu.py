"""The CPU figures of docs/figures.md (`python -m benchmarks.cpu`): peak and time of a prefill, and compile time.

Prefill: one process holds the model and every backend. Calls are timed in turn (A B B A ...), and medians are compared.
It is measured without and with a KV cache. Without one, Hugging Face's check for packed sequences builds an S x S mask
when it is traced, which no eager run does; with the cache kept no backend builds one.

`mom-mlp` is mom with scope="mlp", the method of the MOM paper: loops over MLPs and the LM head, attention whole.
`mom-512` is mom with that mini_seq_len. `chunked` is Hugging Face's chunked prefill (1024 tokens at a time over a
growing cache, eager). The floor is what must exist at full length, from mom's report: the residual stream, keys and
values of two layers, and the cache where it is kept.

Rows, only on request: mini-sequences of several fixed lengths and of `auto`, each relative to the fastest fixed one;
without a cache.

Growth: the same with 2 layers at two lengths. What mom needs above the floor must not depend on the length.

Windows: a small Gemma 3, five of six layers with a window of 128 tokens, cache kept: its peak, the rows that its cache
shows, and the storage that they keep allocated.

Overhead: the time of a loop's iterations minus that of the same compiled bodies called in sequence.

Compile time: each figure comes from a new process with an empty cache folder. A trivial function is compiled first,
which excludes costs of each process (imports, instruction-set checks, precompiled headers). `frontend` is a backend
that stops before Inductor's own work: Dynamo and AOTAutograd, whose time no backend can change.
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

#: Tokens of a chunk in Hugging Face's chunked prefill; as long as mom's mini-sequences.
CHUNK = 1024

#: Rows of a mini-sequence when the loop's own time is measured: few, so that it dominates.
OVERHEAD_ROWS = 16

RESULTS = Path(__file__).with_name("results")
Row = dict[str, Any]


# ------------------------------------------------------------------------------------------------ workers


def _compiled(model: Any, backend: str) -> Any:
    if backend in ("eager", "chunked"):
        return model
    if backend.startswith("mom-"):
        variant = backend.removeprefix("mom-")
        options: dict[str, Any] = {"mini_seq_len": int(variant)} if variant.isdigit() else {"scope": variant}
        return torch.compile(model, backend="mom", options=options)
    return torch.compile(model, backend=frontend if backend == "frontend" else backend)


def frontend(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
    """Backend that runs Inductor's front half alone (AOTAutograd, decompositions), then the graph as it is."""
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
    calls: dict[str, Callable[[], Any]] = {
        name: partial(models.prefill, _compiled(model, name), ids, cache=spec["cache"])
        for name in spec["backends"]
        if name != "chunked"
    }
    if "chunked" in spec["backends"] and spec["cache"]:
        calls["chunked"] = partial(models.chunked_prefill, model, ids, chunk=CHUNK)
    rows: dict[str, Row] = {}
    reference = models.prefill(model, ids, cache=spec["cache"])[0]
    for name, call in calls.items():
        workers.step(f"compile {name}")
        difference = (call()[0] - reference).abs().max().item()
        workers.step(f"peak {name}")
        report = measure.peak_bytes(call)
        rows[name] = {"backend": name, "peak": report.peak, "kept": report.kept, "difference": difference}
        if name.startswith("mom") and name != "mom-mlp":
            rows[name]["floor"] = _floor()
    workers.step("time")
    for name, times in measure.alternate(calls, spec["repeats"]).items():
        workers.row(rows[name] | {"seconds": times, "cache": spec["cache"]})


def _floor() -> int:
    """Return the full-length bytes of the graph that was compiled last."""
    import mom_compile

    return mom_compile.reports()[-1].floor_bytes


def rows_worker(spec: Row) -> None:
    """Measure fixed mini-sequences of several lengths, and the chosen one."""
    from benchmarks import models

    measure.watch_cpu()
    workers.step("model")
    model = models.llama(spec["shape"], spec["layers"], seq=spec["seq"])
    ids = models.tokens(model, spec["seq"], spec["batch"])
    torch._dynamo.config.recompile_limit = 2 * len(spec["backends"])  # type: ignore[attr-defined]  # one code object
    calls = {name: partial(models.prefill, _compiled(model, name), ids, cache=False) for name in spec["backends"]}
    rows: dict[str, Row] = {}
    for name, call in calls.items():
        workers.step(f"compile {name}")
        call()
        workers.step(f"peak {name}")
        rows[name] = {"backend": name, "peak": measure.peak_bytes(call).peak}
    workers.step("time")
    for name, times in measure.alternate(calls, spec["repeats"]).items():
        workers.row(rows[name] | {"seconds": times})


def growth_worker(spec: Row) -> None:
    from benchmarks import models

    measure.watch_cpu()
    workers.step("model")
    model = models.llama(spec["shape"], spec["layers"], seq=spec["seq"])
    ids = models.tokens(model, spec["seq"])
    call = partial(models.prefill, _compiled(model, "mom"), ids, cache=False)
    workers.step("compile")
    call()
    workers.step("peak")
    workers.row({"tokens": spec["seq"], "peak": measure.peak_bytes(call).peak, "floor": _floor()})


def windows_worker(spec: Row) -> None:
    from benchmarks import models

    measure.watch_cpu()
    workers.step("model")
    model = models.windows(spec["seq"])
    ids = models.tokens(model, spec["seq"])
    for name in spec["backends"]:
        call = partial(models.prefill, _compiled(model, name), ids, cache=True)
        workers.step(f"compile {name}")
        shown, held = measure.shown_and_held(models.cached(call()[1]))
        workers.step(f"peak {name}")
        workers.row({"backend": name, "peak": measure.peak_bytes(call).peak, "shown": shown, "held": held})


def overhead_worker(spec: Row) -> None:
    """Measure the cost of an iteration without the compiled body: the loop's own Python."""
    from benchmarks import models
    from mom_compile.runtime.loop import CompiledLoop

    calls: list[tuple[Any, list[Any]]] = []
    bodies: list[list[Any]] = []
    run_loop = CompiledLoop.__call__

    def remember(self: Any, arguments: list[Any]) -> Any:
        calls.append((self, list(arguments)))
        return run_loop(self, arguments)

    model = models.llama("narrow", 3, seq=spec["seq"])
    ids = models.tokens(model, spec["seq"])
    compiled = torch.compile(model, backend="mom", options={"mini_seq_len": OVERHEAD_ROWS})
    workers.step("compile")
    models.prefill(compiled, ids, cache=False)
    CompiledLoop.__call__ = remember  # type: ignore[method-assign]
    models.prefill(compiled, ids, cache=False)
    loop, arguments = calls[1]
    iterations = len(range(0, spec["seq"], OVERHEAD_ROWS))
    piece = loop.body

    def record(inputs: list[Any]) -> Any:
        bodies.append(list(inputs))
        return piece(inputs)

    object.__setattr__(loop, "body", record)
    run_loop(loop, list(arguments))
    object.__setattr__(loop, "body", piece)
    workers.step("time")
    inputs = bodies[iterations // 2]
    run = piece.chosen[tuple(inputs[: len(piece.symbols)])]
    times = measure.alternate(
        {
            "loop": lambda: run_loop(loop, list(arguments)),
            "body": lambda: [run(list(bodies[i])) for i in range(iterations)],
        },
        spec["repeats"],
    )
    each = {name: statistics.median(found) / iterations * 1e6 for name, found in times.items()}
    workers.row({"rows": OVERHEAD_ROWS, "iterations": iterations, "us": each})


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
        rows += workers.run_worker("benchmarks.cpu", spec, on_step=partial(_announce, progress, label), on_row=_keep)
    return rows


def _keep(row: Row) -> None:
    """Print each row as it arrives, so an interrupted run shows its results."""
    print(json.dumps(row), file=sys.stderr, flush=True)


def measure_rows(options: argparse.Namespace, progress: Callable[[str], None]) -> list[Row]:
    spec = {
        "kind": "rows",
        "shape": options.shape,
        "layers": options.layers,
        "seq": options.seq,
        "batch": options.batch,
        "repeats": options.repeats,
        "backends": [*(f"mom-{rows}" for rows in options.rows), "mom"],
    }
    return workers.run_worker("benchmarks.cpu", spec, on_step=partial(_announce, progress, "rows: "), on_row=_keep)


def measure_growth(options: argparse.Namespace, progress: Callable[[str], None]) -> list[Row]:
    rows: list[Row] = []
    for seq in options.growth:
        spec = {"kind": "growth", "shape": options.shape, "layers": 2, "seq": seq}
        rows += workers.run_worker("benchmarks.cpu", spec, on_step=partial(_announce, progress, f"growth, S = {seq}: "))
    return rows


def measure_windows(options: argparse.Namespace, backends: Sequence[str], progress: Callable[[str], None]) -> list[Row]:
    wanted = [name for name in backends if name in ("eager", "inductor", "mom")]
    spec = {"kind": "windows", "seq": min(options.seq, 4096), "backends": wanted}
    return workers.run_worker("benchmarks.cpu", spec, on_step=partial(_announce, progress, "windows: "))


def measure_overhead(options: argparse.Namespace, progress: Callable[[str], None]) -> list[Row]:
    spec = {"kind": "overhead", "seq": 4096, "repeats": 15}
    return workers.run_worker("benchmarks.cpu", spec, on_step=partial(_announce, progress, "overhead: "))


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
    for heading in ("backend", "KV cache", "peak MiB", "/inductor", "/floor", "seconds", "/inductor", "difference"):
        table.add_column(heading, justify="left" if heading in ("backend", "KV cache") else "right")
    for row in rows:
        base = next((r for r in rows if r["backend"] == "inductor" and r["cache"] == row["cache"]), None)
        median = statistics.median(row["seconds"])
        table.add_row(
            row["backend"],
            "kept" if row["cache"] else "none",
            f"{row['peak'] / MIB:.0f}",
            _ratio(row["peak"], base["peak"] if base else None),
            _ratio(row["peak"], row.get("floor")),
            f"{median:.2f}",
            _ratio(median, statistics.median(base["seconds"]) if base else None),
            f"{row['difference']:.1e}",
        )
    Console().print(table)


def print_rows(rows: Sequence[Row], options: argparse.Namespace) -> None:
    """Print rows relative to the fixed length with the least time, and to the least of the others."""
    from rich.console import Console
    from rich.table import Table

    prompts = f"{options.batch} x S = {options.seq}"
    table = Table(title=f"Rows, {options.layers} layers ({options.shape}), float32, {prompts}, no cache")
    for heading in ("rows", "seconds", "/best", "least", "/best", "peak MiB", "/best"):
        table.add_column(heading, justify="right")
    fixed = [row for row in rows if row["backend"] != "mom"]
    median, least = ({row["backend"]: f(row["seconds"]) for row in rows} for f in (statistics.median, min))
    quickest = min(fixed, key=lambda row: median[row["backend"]])
    for row in rows:
        name = row["backend"]
        table.add_row(
            "auto" if name == "mom" else name.removeprefix("mom-"),
            f"{median[name]:.2f}",
            _ratio(median[name], median[quickest["backend"]]),
            f"{least[name]:.2f}",
            _ratio(least[name], min(least[one["backend"]] for one in fixed)),
            f"{row['peak'] / MIB:.1f}",
            _ratio(row["peak"], quickest["peak"]),
        )
    Console().print(table)


def print_growth(rows: Sequence[Row]) -> None:
    for row in rows:
        above = row["peak"] - row["floor"]
        print(
            f"S = {row['tokens']}: peak {row['peak'] / MIB:.1f} MiB, floor {row['floor'] / MIB:.1f} MiB, "
            f"above it {above / MIB:.1f} MiB"
        )
    first, *_, last = [row["peak"] - row["floor"] for row in rows]
    print(f"above the floor, {rows[-1]['tokens']} tokens take {last / first:.3f}x what {rows[0]['tokens']} take")


def print_windows(rows: Sequence[Row]) -> None:
    for row in rows:
        cache = f"a cache of {row['shown'] / MIB:.1f} MiB in {row['held'] / MIB:.1f} MiB of storage"
        print(f"windows, {row['backend']}: peak {row['peak'] / MIB:.1f} MiB, {cache}")


def print_overhead(rows: Sequence[Row]) -> None:
    (row,) = rows
    loop, body = row["us"]["loop"], row["us"]["body"]
    print(
        f"an iteration of {row['rows']} rows takes {loop:.0f} us, its compiled body alone {body:.0f} us: "
        f"the loop adds {loop - body:.0f} us (median over {row['iterations']} iterations)"
    )


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
    """Return the requested backends that this PyTorch has registered."""
    known = {"eager", "chunked", *torch.compiler.list_backends(exclude_tags=())}
    for name in backends:
        if _family(name) not in known:
            print(f"skipping {name}: no such torch.compile backend (is mom_compile installed?)", file=sys.stderr)
    return [name for name in backends if _family(name) in known]


def _family(name: str) -> str:
    return name.partition("-")[0]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description="Prefill and compile-time figures.")
    parser.add_argument("--seq", type=int, default=8192, help="tokens in the prompt (default 8192)")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--shape", choices=("small", "narrow"), default="small")
    parser.add_argument("--backends", nargs="+", default=["eager", "inductor", "chunked", "mom-mlp", "mom"])
    parser.add_argument("--repeats", type=int, default=3, help="timed calls of each backend")
    parser.add_argument("--compile-layers", type=int, nargs=2, default=[4, 24], metavar=("FEW", "MANY"))
    parser.add_argument("--compile-seq", type=int, default=4096)
    parser.add_argument("--growth", type=int, nargs=2, default=[4096, 32768], metavar=("SHORT", "LONG"))
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 128, 256, 512, 1024, 2048], help="of --only rows")
    parser.add_argument("--batch", type=int, default=1, help="sequences of --only rows (default 1)")
    parser.add_argument("--only", choices=("prefill", "rows", "growth", "windows", "overhead", "compile"))
    parser.add_argument("--quick", action="store_true", help="quick run: S = 2048, one repeat, 2 and 6 layers")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/cpu-<date>.json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.quick:
        options.seq, options.repeats, options.compile_layers, options.compile_seq = 2048, 1, [2, 6], 2048
        options.growth = [2048, 4096]
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.worker is not None:
        spec = json.loads(options.worker)
        kinds = {
            "prefill": prefill_worker,
            "rows": rows_worker,
            "growth": growth_worker,
            "windows": windows_worker,
            "overhead": overhead_worker,
            "compile": compile_worker,
        }
        kinds[spec["kind"]](spec)
        return 0
    from rich.console import Console

    backends = available(options.backends)
    results: Row = {"machine": measure.machine(), "options": {k: v for k, v in vars(options).items() if k != "worker"}}
    with Console(stderr=True).status("") as status:

        def progress(text: str) -> None:
            status.update(text)

        if options.only in (None, "prefill"):
            results["prefill"] = measure_prefill(options, backends, progress)
        if options.only == "rows":
            results["rows"] = measure_rows(options, progress)
        if options.only in (None, "growth"):
            results["growth"] = measure_growth(options, progress)
        if options.only in (None, "windows"):
            results["windows"] = measure_windows(options, backends, progress)
        if options.only in (None, "overhead"):
            results["overhead"] = measure_overhead(options, progress)
        if options.only in (None, "compile"):
            compiling = [name for name in backends if name in ("inductor", "mom")]
            results["compile"] = measure_compile(options, compiling, progress)
    if "prefill" in results:
        print_prefill(results["prefill"], options)
    if "rows" in results:
        print_rows(results["rows"], options)
    if "growth" in results:
        print_growth(results["growth"])
    if "windows" in results:
        print_windows(results["windows"])
    if "overhead" in results:
        print_overhead(results["overhead"])
    if "compile" in results:
        print_compile(results["compile"], options)
    print(measure.describe_machine(results["machine"]))
    if options.save:
        print(f"saved {save(options, results)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
