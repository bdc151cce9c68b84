"""Accuracy of plans: `python -m benchmarks.predictions`.

    for each family, and each way to run it, in a process of its own:
        the model is compiled once, at the first length, with symbolic sizes; it is planned at that length, too
        at each length: the measured peak of a prefill, and the planned one

Small models with random weights, the logits of the last token and the cache kept. Peaks are bytes above weights and
inputs, exact; weights in transfer count. Results in benchmarks/results/predictions.json are not measured again without
`--fresh`.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import mom_compile
from benchmarks import measure
from benchmarks.families import FAMILIES, VOCABULARY, family_model
from benchmarks.measure import MIB
from benchmarks.results_file import Results, taken_up
from benchmarks.workers import Worker, WorkerFailed, row, step
from mom_compile.weights.offload import least_budget

Row = dict[str, Any]
RESULTS = Path(__file__).with_name("results") / "predictions.json"
LENGTHS = (700, 1400, 2800)

#: Places of cache and weights, or backends, with the largest accepted error of a prediction.
EAGER, STOCK = "eager mode", "stock Inductor"
KEPT, CACHE, WEIGHTS = "cache kept", "cache on host", "cache and weights on host"
BOUNDS = {KEPT: 0.05, CACHE: 0.05, WEIGHTS: 0.05, STOCK: 0.10, EAGER: 0.05}
#: Their names in a plan.
WAYS = {KEPT: "mom", CACHE: "mom-cache", WEIGHTS: "mom-weights", STOCK: "inductor", EAGER: "eager"}


@dataclass(frozen=True)
class Cell:
    """A figure: a family, a place, the length of a prompt in tokens."""

    family: str
    place: str
    tokens: int

    @property
    def key(self) -> str:
        return f"{self.family}, {self.place}, {self.tokens}"


# -------------------------------------------------------------------------------------------------- worker


def worker(spec: Row) -> None:
    """Emit a row for each of `lengths`, of a `family` in a `place`."""
    measure.watch_cpu()
    step("model")
    for found in predictions(family_model(spec["family"]), spec["lengths"], spec["place"]):
        row(found)


def predictions(model: Any, lengths: Sequence[int], place: str) -> list[Row]:
    """Return measured and predicted bytes at each length; the graph is captured and planned at the first."""
    plan = mom_compile.plan(
        model, seq_len=lengths[0], device="cpu", kv_offload=place in (CACHE, WEIGHTS), weights_on_host=place == WEIGHTS
    )
    way, compiled = plan.ways[WAYS[place]], prepared(model, place)
    rows = []
    for tokens in lengths:
        ids = torch.randint(3, VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(tokens))
        call = functools.partial(compiled, input_ids=ids, use_cache=True, logits_to_keep=1)
        with torch.no_grad():
            call()
            measured = measure.peak_bytes(call).peak
        predicted = way.peak_bytes(tokens) - way.weights - ids.nbytes
        rows.append({"tokens": tokens, "measured": measured, "predicted": predicted})
    if place in (KEPT, CACHE, WEIGHTS):
        (report,) = mom_compile.reports()
        if report.memory is None:
            raise RuntimeError(f"stock Inductor: {report.fallback}")
    return rows


def prepared(model: Any, place: str) -> Callable[..., Any]:
    """Return the model as it runs in that place."""
    if place == EAGER:
        return model.forward  # type: ignore[no-any-return]
    if place == STOCK:
        return torch.compile(model, dynamic=True)  # type: ignore[no-any-return]
    if place == WEIGHTS:
        mom_compile.offload_weights(model, "cpu", memory_budget=least_budget(model))
    options: Any = {"kv_offload": place != KEPT, "strict": True}
    return torch.compile(model, backend="mom", dynamic=True, options=options)  # type: ignore[no-any-return]


# -------------------------------------------------------------------------------------------------- parent


def run(options: argparse.Namespace, results: Results) -> None:
    """Measure all that is missing, one process for each family and place."""
    for family in options.families:
        for place in options.places:
            cells = [Cell(family, place, tokens) for tokens in options.lengths]
            if all(cell.key in results.cells for cell in cells):
                continue
            print(f"{family}, {place}", file=sys.stderr, flush=True)
            _measure(cells, results)


def _measure(cells: Sequence[Cell], results: Results) -> None:
    """Measure the cells of one family and place; those that a failing worker leaves out record its error."""
    waiting = list(cells)
    spec = {"family": cells[0].family, "place": cells[0].place, "lengths": [cell.tokens for cell in cells]}
    try:
        with Worker("benchmarks.predictions", spec, env={"HF_HUB_OFFLINE": "1"}) as running:
            for found in running.rows():
                _keep(waiting.pop(0), found, results)
    except WorkerFailed as failed:
        for cell in waiting:
            _keep(cell, {"error": str(failed)}, results)


def _keep(cell: Cell, found: Row, results: Results) -> None:
    results.keep(cell.key, asdict(cell) | found)


def show(results: Results, options: argparse.Namespace) -> None:
    """Print a line for each family and place, the largest errors last."""
    from rich.console import Console
    from rich.table import Table

    cells = [cell for cell in results.cells.values() if cell["place"] in options.places]
    lines: dict[tuple[str, str], list[Row]] = {}
    for cell in cells:
        lines.setdefault((cell["family"], cell["place"]), []).append(cell)
    table = Table(title="predicted peak beside the measured one, MiB above weights and inputs")
    for heading in ("family", "place", "tokens: predicted / measured (ratio)", "furthest off"):
        table.add_column(heading, justify="right" if heading == "furthest off" else "left")
    for (family, place), found in sorted(lines.items(), key=lambda item: (_off(item[1]), item[0])):
        style = "" if _off(found) <= BOUNDS[place] else "bold red"
        table.add_row(family, place, "   ".join(map(_figure, found)), f"{100 * _off(found):.1f} %", style=style)
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    for place in options.places:
        rows = [cell for cell in cells if cell["place"] == place]
        within = [cell for cell in rows if _off([cell]) <= BOUNDS[place]]
        if rows:
            console.print(
                f"{place}: {len(within)} of {len(rows)} within {100 * BOUNDS[place]:.0f} %, "
                f"the furthest off by {100 * _off(rows):.1f} %"
            )
    console.print(measure.describe_machine(results.data["machine"]))


def _off(cells: Sequence[Row]) -> float:
    """Return the largest relative error of the predictions."""
    return max(1.0 if "error" in cell else abs(cell["predicted"] / cell["measured"] - 1) for cell in cells)


def _figure(cell: Row) -> str:
    if "error" in cell:
        return f"{cell['tokens']}: failed"
    predicted, measured = cell["predicted"] / MIB, cell["measured"] / MIB
    return f"{cell['tokens']}: {predicted:.2f} / {measured:.2f} ({predicted / measured:.3f})"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.predictions", description="Predicted peaks beside measured ones."
    )
    parser.add_argument("--families", nargs="+", choices=tuple(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--places", nargs="+", choices=tuple(BOUNDS), default=list(BOUNDS))
    parser.add_argument(
        "--lengths", nargs="+", type=int, default=list(LENGTHS), help="tokens; the graph is captured at the first"
    )
    parser.add_argument("--fresh", action="store_true", help="measure everything again")
    parser.add_argument("--table", action="store_true", help="only print the table of existing results")
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    results = taken_up(options.results, measure.machine(), fresh=options.fresh)
    if results is None:
        return 2
    if not options.table:
        run(options, results)
    show(results, options)
    return 0


if __name__ == "__main__":
    if "--worker" in sys.argv:
        worker(json.loads(sys.argv[sys.argv.index("--worker") + 1]))
    else:
        sys.exit(main())
