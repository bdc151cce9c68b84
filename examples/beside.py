"""Compare backends in examples: each runs in a process of its own, once to compile and once to measure.

Peaks are exact, and also shown relative to the first row's. Times are of one call, not in turn with the other backends,
so no ratio of times is shown.

A worker returns a row and writes its result to a file. The parent prints the rows and the differences of the results.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure, workers
from benchmarks.measure import MIB
from examples.demo import OUTPUT

Row = dict[str, Any]
BACKENDS = ("eager", "mom")
FULL = ("eager", "inductor", "mom")


def run(backend: str, call: Callable[[], torch.Tensor], result: Path, device: str = "cpu") -> None:
    """In a worker: run the first call of a backend, then a warm one, and return peak, times and result."""
    workers.step("compiling" if backend != "eager" else "a first call")
    with torch.no_grad():
        first = measure.seconds(call, device)
        workers.step("measuring")
        kept: list[torch.Tensor] = []
        began = time.perf_counter()
        peak = measure.peak_bytes(lambda: kept.append(call()), device).peak
        seconds = time.perf_counter() - began
    torch.save(kept[0].detach().cpu(), result)
    workers.row({"backend": backend, "peak": peak, "seconds": seconds, "first": first, "result": str(result)})


def compare(module: str, specs: Sequence[Mapping[str, Any]], say: Callable[[str], None] = print) -> list[Row]:
    """In the parent: run one worker of `module` for each spec, in order."""
    rows: list[Row] = []
    for spec in specs:

        def on_step(text: str, backend: str = spec["backend"]) -> None:
            say(f"{backend}: {text}")

        rows += workers.run_worker(module, spec, on_step=on_step)
    return rows


def tell(name: str, title: str, shared: Mapping[str, Any], *, full: bool) -> None:
    """In the parent: run `examples.<name>` with each backend and print the rows. `full`: with stock Inductor, too."""
    OUTPUT.mkdir(exist_ok=True)
    backends = FULL if full else BACKENDS
    specs = [{**shared, "backend": backend, "result": str(OUTPUT / f"{name}-{backend}.pt")} for backend in backends]
    rows = compare(f"examples.{name}", specs)
    add_differences(rows)
    print_rows(title, rows)


def add_differences(rows: Sequence[Row]) -> None:
    """Add the largest difference from the first row's result to each row."""
    first = torch.load(rows[0]["result"]).double()
    for row in rows:
        row["difference"] = (torch.load(row["result"]).double() - first).abs().max().item()


def print_rows(title: str, rows: Sequence[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    first = rows[0]
    table = Table(title=title)
    table.add_column("")
    for heading in ("peak", f"of {first['backend']}'s", "one call", "first call", "difference"):
        table.add_column(heading, justify="right")
    for row in rows:
        peak = f"{row['peak'] / first['peak']:.3f}x"
        cells = [f"{row['peak'] / MIB:,.1f} MiB", peak, f"{row['seconds']:.2f} s", f"{row['first']:.0f} s"]
        table.add_row(row["backend"], *cells, f"{row['difference']:.1e}")
    console = Console()
    if not console.is_terminal:  # a pipe has no width: do not truncate
        console = Console(width=160)
    console.print(table)
    print(f"peaks are above the weights and exact; times are of this run only: {measure.describe_machine()}")
