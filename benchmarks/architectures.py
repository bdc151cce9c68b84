"""Every decoder that transformers can build, small (`python -m benchmarks.architectures`): is mom right, and what of it
is in loops?

    for every causal language model, in a process of its own:
        a small one with a layer of each kind (`small_configs`), in float64
        prefill        one sequence
        batch          three, padded on the left, of another length: sizes are symbols
        decode         a token after that
        scoring        logits of every token, without a cache
        each by mom and in eager mode; where mom fails or differs, by `backend="aot_eager"` too

Results are kept in benchmarks/results/architectures.json as they come, and what is there is not run again; `--redo` does.
docs/architectures.md is made from it (`--page` makes nothing else).

Pieces run eagerly (`without_codegen`), which is everything but Inductor's code generation. `--compile` measures instead
what memory stock Inductor and mom take for 2048 tokens.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks import measure
from benchmarks.architectures_page import PAGE, page
from benchmarks.small_configs import exceptions
from benchmarks.workers import WorkerFailed, run_worker

RESULTS = Path(__file__).parent / "results" / "architectures.json"
#: Telling kinds first: a sweep that is cut short has seen something of everything.
FIRST = ("llama", "mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "gemma3_text", "mistral", "falcon", "bloom", "gpt2",
         "mamba", "mamba2", "bamba", "qwen3_next", "jamba", "gemma3n_text", "opt", "gpt_neox", "phi3")  # fmt: skip


def model_types() -> list[str]:
    """All that transformers maps to a causal language model, `FIRST` before the others."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    return [*FIRST, *(name for name in NAMES if name not in FIRST)]


class Results:
    """What was measured, by type, in a file that is whole after every type."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock = threading.Lock()
        found = json.loads(path.read_text()) if path.exists() else {}
        self.stamp: dict[str, Any] = found.get("stamp", {})
        self.types: dict[str, dict[str, Any]] = found.get("types", {})

    def add(self, name: str, entry: dict[str, Any]) -> None:
        with self.lock:
            self.types[name] = {**self.types.get(name, {}), **entry}
            self.save()

    def save(self) -> None:
        self.path.parent.mkdir(exist_ok=True)
        ordered = {"stamp": self.stamp, "types": dict(sorted(self.types.items()))}
        unfinished = self.path.with_suffix(".tmp")
        unfinished.write_text(json.dumps(ordered, indent=1, ensure_ascii=False) + "\n")
        unfinished.replace(self.path)


def run_type(name: str, compiled: bool, timeout: float) -> dict[str, Any]:
    """What a fresh process finds of one type. A process that fails says why itself, unless time or memory ran out."""
    entry: dict[str, Any] = {}
    began = time.monotonic()
    try:
        run_worker("benchmarks.architectures_worker", {"type": name, "compile": compiled}, timeout=timeout,
                   on_row=entry.update)  # fmt: skip
    except WorkerFailed as failed:
        lines = str(failed).splitlines()
        entry["ended"] = lines[0].partition(": ")[2]
    key = "compile_seconds" if compiled else "seconds"
    return {**entry, key: round(time.monotonic() - began, 1)}


def write_page(results: Results) -> None:
    PAGE.write_text(page({"stamp": results.stamp, "types": results.types}))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.architectures", description="Every decoder, small.")
    parser.add_argument("--only", nargs="+", metavar="TYPE", help="these types alone")
    parser.add_argument("--redo", action="store_true", help="also those that are there already")
    parser.add_argument("--compile", action="store_true", help="peak memory, with Inductor's code")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time (1 or 2)", choices=(1, 2))
    parser.add_argument("--timeout", type=float, default=240, help="seconds for a type")
    parser.add_argument("--page", action="store_true", help="only make the page from the results")
    options = parser.parse_args(arguments)
    results = Results(RESULTS)
    if not options.page:
        sweep(results, options)
    write_page(results)
    return 0


def sweep(results: Results, options: argparse.Namespace) -> None:
    known = model_types()
    unknown = sorted(set(options.only or ()) - set(known))
    if unknown:
        raise SystemExit(f"transformers has no causal language model called {', '.join(unknown)}")
    key = "compile_seconds" if options.compile else "seconds"
    wanted = [name for name in known if not options.only or name in options.only]
    wanted = [name for name in wanted if options.redo or key not in results.types.get(name, {})]
    results.stamp = {**measure.machine(), "threads": 1}

    def one(name: str) -> None:
        own = exceptions(name)
        if own.get("skip"):
            found: dict[str, Any] = {"not_built": own["why"], key: 0}
        else:
            found = run_type(name, options.compile, options.timeout)
        if not options.compile:
            results.types.pop(name, None) if options.redo else None
        results.add(name, found)
        print(f"{name}: {summary(found)}", flush=True)

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(one, wanted))


def summary(found: dict[str, Any]) -> str:
    """A line for who watches."""
    if "peaks" in found:
        peaks = found["peaks"]
        return ", ".join(f"{k} {v['peak'] / measure.MIB:.1f} MiB" if "peak" in v else f"{k} fails" for k, v in peaks.items())
    parts = [found.get("not_built") or found.get("ended") or ""]
    for use, got in found.get("uses", {}).items():
        said = got.get("eager_error") and "eager raises" or got.get("error") or f"{got.get('difference'):.1e}"
        parts.append(f"{use} {said[:160]}")
    return "; ".join(filter(None, parts)) + f" ({found.get('seconds', found.get('compile_seconds'))} s)"


if __name__ == "__main__":
    sys.exit(main())
