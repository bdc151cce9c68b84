"""Multimodal and encoder models, small and compiled: is mom correct, what runs in loops, and what is the peak?

`python -m benchmarks.multimodal` (`make multimodal`) runs every type of `multimodal_calls` with an image of 1,024
patches, as many positions of audio, or as many tokens, writes benchmarks/results/multimodal.json as results arrive, and
docs/multimodal.md. `--only TYPE ... --redo` measures these types again; `--page` only writes the page; `--patches 8192`
takes another image.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers

from benchmarks import measure, results_file
from benchmarks.multimodal_calls import TYPES
from benchmarks.multimodal_page import PAGE, page
from benchmarks.workers import run_worker

RESULTS = Path(__file__).parent / "results" / "multimodal.json"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.multimodal", description="Multimodal models, small.")
    parser.add_argument("--only", nargs="+", metavar="TYPE", choices=TYPES, default=list(TYPES), help="run only these")
    parser.add_argument("--redo", action="store_true", help="also types that have a result")
    parser.add_argument("--patches", type=int, default=1024, help="patches of the image")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds for a type")
    parser.add_argument("--page", action="store_true", help="only write the page")
    options = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    if not options.page and not sweep(options):
        return 1
    PAGE.write_text(page(json.loads(RESULTS.read_text())))
    return 0


def sweep(options: argparse.Namespace) -> bool:
    """Measure types that have no result. Return whether the file has results of this machine."""
    stamp = {**measure.machine(), "threads": 1}
    results = results_file.taken_up(RESULTS, stamp, fresh=False)
    if results is None:
        return False
    side = 4 * round(math.sqrt(options.patches) / 4)
    wanted = [name for name in options.only if options.redo or f"{name}, {side * side}" not in results.cells]
    fresh: dict[str, dict[str, Any]] = {}

    def take(found: dict[str, Any]) -> None:
        name = found.pop("type")
        fresh.setdefault(name, {}).update(found)
        if "seconds" in found:  # it has ended
            results.keep(f"{name}, {side * side}", fresh[name])
            print(f"{name}: {fresh[name]}", flush=True)

    if wanted:
        results.data["machine"] = stamp
        spec = {"types": [(name, side) for name in wanted], "timeout": options.timeout}
        run_worker("benchmarks.multimodal_worker", spec, on_row=take)
    return True


if __name__ == "__main__":
    sys.exit(main())
