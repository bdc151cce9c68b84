"""All methods of prefill: `make bench`, `python -m benchmarks.suite`.

    for each setup (tokens, batch):
        each method in a process of its own, with an empty compile cache: first call, peak, decode
        then all of them, one call each in turn: time to first token
    for each method: the longest prompt within a memory limit, by bisection, every length run

Results are written to benchmarks/results/suite-cpu.json as they arrive. Existing results are not measured again without
`--fresh`; `--page` only writes docs/benchmarks.md. Running out of memory, or of time, is a result, too. The methods are
in `benchmarks/methods.py`, the lower bounds in `benchmarks/physical.py`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import measure, physical, suite_page
from benchmarks.measure import MIB
from benchmarks.methods import METHODS, Cell, Setup
from benchmarks.results_file import Results, taken_up
from benchmarks.workers import Worker, WorkerFailed

Row = dict[str, Any]
RESULTS = Path(__file__).with_name("results") / "suite-cpu.json"
SETUPS = (
    Setup("half", 4, 2048),
    Setup("half", 4, 8192),
    Setup("half", 4, 16384),
    Setup("half", 4, 1024, batch=8),
    Setup("half", 4, 256, batch=32),
)
#: The setup of the search; its tokens are the longest length.
SEARCH = Setup("half", 4, 1 << 17)
LIMIT = 128 * MIB
#: Lengths of the search are multiples of the second, from the first on.
FIRST, GRAIN = 1024, 128


# -------------------------------------------------------------------------------------------------- cells


@contextmanager
def _started(spec: Row, options: argparse.Namespace, on_step: Callable[[str], None]) -> Iterator[Worker]:
    """Start a worker with an empty compile cache."""
    with tempfile.TemporaryDirectory() as cache:
        env = {"TORCHINDUCTOR_CACHE_DIR": cache, "HF_HUB_OFFLINE": "1"}
        with Worker("benchmarks.cells", spec, timeout=options.seconds, env=env, on_step=on_step) as worker:
            yield worker


def run_setup(setup: Setup, results: Results, options: argparse.Namespace, show: Callable[[str, str], None]) -> None:
    """Measure the missing methods at a setup: each alone, then all in turn."""
    with ExitStack() as running:
        waiting: dict[Cell, Worker] = {}
        for cell in missing(cells_of(setup, options.methods), results):
            spec: Row = {"method": cell.method, "setup": asdict(setup), "lengths": [setup.tokens], "limit": None}
            spec |= {"steps": options.steps, "repeats": 0}
            try:
                on_step = _showing(show, cell)
                worker = running.enter_context(_started(spec, options, on_step))
                keep(cell, worker.row(), results)
                waiting[cell] = worker
            except WorkerFailed as failed:
                keep(cell, {"error": str(failed)}, results)
            show(cell.key, "done")
        for turn in range(options.repeats):
            for cell, worker in list(waiting.items())[:: 1 if turn % 2 == 0 else -1]:
                if "error" not in results.cells[cell.key]:
                    results.cells[cell.key]["seconds"].append(worker.ask("time")["seconds"])
        results.write()


def run_longest(results: Results, options: argparse.Namespace, show: Callable[[str, str], None]) -> None:
    """Search the longest prompt of each method that has none yet."""
    for cell in searches(options.methods):
        if cell.key not in results.cells:
            spec: Row = {"method": cell.method, "setup": asdict(SEARCH), "limit": LIMIT, "steps": 0}
            spec["longest"] = {"first": FIRST, "grain": GRAIN, "most": SEARCH.tokens}
            try:
                with _started(spec, options, _showing(show, cell)) as worker:
                    keep(cell, worker.row(), results)
            except WorkerFailed as failed:
                keep(cell, {"error": str(failed)}, results)
        show(cell.key, "done")


def keep(cell: Cell, row: Row, results: Results) -> None:
    """Store a row with all that identifies it."""
    results.keep(cell.key, {"method": cell.method, "setup": asdict(cell.setup), "limit": cell.limit, **row})


def cells_of(setup: Setup, methods: Sequence[str]) -> list[Cell]:
    return [Cell(name, setup) for name in methods if METHODS[name].runs_on(setup.device)]


def searches(methods: Sequence[str]) -> list[Cell]:
    return [Cell(name, SEARCH, LIMIT) for name in methods if METHODS[name].runs_on(SEARCH.device)]


def missing(cells: Sequence[Cell], results: Results) -> list[Cell]:
    """Return the cells without figures. Cells without times count: times are measured in turn with the others."""
    done = (cell for cell in cells if cell.key in results.cells)
    whole = {cell for cell in done if "error" in results.cells[cell.key] or results.cells[cell.key]["seconds"]}
    return [cell for cell in cells if cell not in whole]


def _showing(show: Callable[[str, str], None], cell: Cell) -> Callable[[str], None]:
    return lambda text: show(cell.key, text)


# -------------------------------------------------------------------------------------------------- parent


def run(options: argparse.Namespace, results: Results) -> None:
    """Measure all that is missing, with a progress bar on standard error."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    setups = [setup for setup in SETUPS if options.only in (None, "prefill")]
    total = sum(len(cells_of(setup, options.methods)) for setup in setups)
    total += len(searches(options.methods)) if options.only in (None, "longest") else 0
    columns = (BarColumn(), TextColumn("{task.completed:.0f} of {task.total:.0f}"), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.description}"), console=_console()) as progress:
        bar = progress.add_task("", total=total)

        def show(key: str, text: str) -> None:
            progress.update(bar, description=f"{key}: {text}", advance=1 if text == "done" else 0)

        if results.data["rates"] is None:
            progress.update(bar, description="what this machine reaches")
            results.data["rates"] = asdict(physical.measure_rates("cpu", "float32"))
            results.write()
        for setup in setups:
            known = len(cells_of(setup, options.methods)) - len(missing(cells_of(setup, options.methods), results))
            progress.advance(bar, known)
            run_setup(setup, results, options, show)
        if options.only in (None, "longest"):
            run_longest(results, options, show)


def _console() -> Any:
    from rich.console import Console

    return Console(stderr=True)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.suite", description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD")
    parser.add_argument("--only", choices=("prefill", "longest"))
    parser.add_argument("--repeats", type=int, default=3, help="timed prefills of each method, in turn (default 3)")
    parser.add_argument("--steps", type=int, default=8, help="timed decode steps (default 8)")
    parser.add_argument("--seconds", type=float, default=1800, help="limit of a process (default 1800)")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--fresh", action="store_true", help="measure everything again")
    parser.add_argument("--page", action="store_true", help="only write docs/benchmarks.md")
    options = parser.parse_args(arguments)
    if options.repeats < 1 or options.steps < 1:
        parser.error("--repeats and --steps are at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if not options.page:
        results = taken_up(options.results, measure.machine(), fresh=options.fresh)
        if results is None:
            return 2
        run(options, results)
    text = suite_page.write(options.results)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
