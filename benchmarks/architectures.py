"""Every decoder that transformers can build, small: is mom correct, and what share of it runs in loops?

`python -m benchmarks.architectures`:

    for every causal language model, in a process of its own:
        a small one with a layer of each kind (`small_configs`), in float64
        prefill        one sequence
        batch          three, padded on the left, of another length: sizes are symbols
        decode         a token after that
        scoring        logits of every token, without a cache
        each by mom and in eager mode; where mom fails or differs, also by `backend="aot_eager"`

Then the same for every other text decoder of a multimodal model (`text_decoders`), from embeddings.

Results are written to benchmarks/results/architectures.json as they arrive. Existing results are not measured again
without `--redo`. `--page` only writes docs/architectures.md.

Pieces run eagerly (`without_codegen`): everything runs except Inductor's code generation. `--compile` measures instead
the memory of stock Inductor and of mom for 2048 tokens (`--backends mom --redo`: mom again).
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import transformers

from benchmarks import measure
from benchmarks.architectures_page import PAGE, page
from benchmarks.small_configs import exceptions
from benchmarks.text_decoders import composites
from benchmarks.workers import run_worker

BACKENDS = ("inductor", "mom")
RESULTS = Path(__file__).parent / "results" / "architectures.json"
COMPILED = RESULTS.with_name("compiled-2026-11-30.json")
#: Representative types first: an interrupted sweep has covered every kind.
FIRST = ("llama", "mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "gemma3_text", "mistral", "falcon", "bloom", "gpt2",
         "mamba", "mamba2", "bamba", "qwen3_next", "jamba", "gemma3n_text", "opt", "gpt_neox", "phi3")  # fmt: skip


def model_types() -> list[str]:
    """Return all types that transformers maps to a causal language model, those of `FIRST` first."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    return [*FIRST, *(name for name in NAMES if name not in FIRST)]


def find_twin(name: str) -> str | None:
    """Return the type that has the same model and configuration, or whose text model builds this one."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    for other, model in NAMES.items():
        if other == name or model != NAMES[name]:
            continue
        own, others = CONFIG_MAPPING[name], CONFIG_MAPPING[other]
        text = getattr(own, "sub_configs", {}).get("text_config")
        if others is text or (others is own and own.model_type == other):
            return other
    return None


class Results:
    """Results by type, in a file that is complete after every type.

    types       causal language models
    decoders    text decoders of multimodal models, each with its `composites`
    known       composites whose text part is one of `types`, by that type
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock = threading.Lock()
        found = json.loads(path.read_text()) if path.exists() else {}
        self.stamp: dict[str, Any] = found.get("stamp", {})
        self.types: dict[str, dict[str, Any]] = found.get("types", {})
        self.decoders: dict[str, dict[str, Any]] = found.get("decoders", {})
        self.known: dict[str, list[str]] = found.get("known", {})

    def add(self, name: str, entry: dict[str, Any], replace: bool = False, composites: Sequence[str] = ()) -> None:
        """Add a result; with `composites`, that of a text decoder. Peaks are measured separately and are kept."""
        with self.lock:
            those = self.decoders if composites else self.types
            before = those.get(name, {})
            kept = {k: v for k, v in before.items() if not replace or k in ("peaks", "compile_seconds")}
            if "peaks" in entry:
                entry = {**entry, "peaks": {**before.get("peaks", {}), **entry["peaks"]}}
            those[name] = {**kept, **entry, **({"composites": list(composites)} if composites else {})}
            self.save()

    def ordered(self) -> dict[str, Any]:
        """Return the results in the order of the file."""
        kept = {"stamp": self.stamp, "types": dict(sorted(self.types.items()))}
        return {**kept, "decoders": dict(sorted(self.decoders.items())), "known": dict(sorted(self.known.items()))}

    def save(self) -> None:
        self.path.parent.mkdir(exist_ok=True)
        unfinished = self.path.with_suffix(".tmp")
        unfinished.write_text(json.dumps(self.ordered(), indent=1, ensure_ascii=False) + "\n")
        unfinished.replace(self.path)


def write_page() -> None:
    """Write the page from the stored results."""
    kept = [json.loads(path.read_text()) if path.exists() else {} for path in (RESULTS, COMPILED)]
    PAGE.write_text(page(*kept))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.architectures", description="Every decoder, small.")
    parser.add_argument("--only", nargs="+", metavar="TYPE", help="run only these types")
    parser.add_argument("--redo", action="store_true", help="also types that have a result")
    parser.add_argument("--compile", action="store_true", help="peak memory, with Inductor's code")
    parser.add_argument("--backends", nargs="+", default=BACKENDS, choices=BACKENDS, help="backends of --compile")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time (1 or 2)", choices=(1, 2))
    parser.add_argument("--timeout", type=float, default=240, help="seconds for a type")
    parser.add_argument("--page", action="store_true", help="only write the page")
    options = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    results = Results(RESULTS)
    if not options.page:
        sweep(results, options)
    write_page()
    return 0


def sweep(results: Results, options: argparse.Namespace) -> None:
    known, found = model_types(), composites()
    unknown = sorted(set(options.only or ()) - {*known, *found.decoders})
    if unknown:
        raise SystemExit(
            f"{', '.join(unknown)}: neither a causal language model of transformers nor the text decoder of a "
            f"multimodal one; {PAGE.name} lists those that there are"
        )
    key = "compile_seconds" if options.compile else "seconds"
    # Peaks of text decoders are not measured: their exceptions are for small configurations only.
    unmeasured = sorted({*(options.only or ())} & {*found.decoders}) if options.compile else []
    if unmeasured:
        raise SystemExit(f"{', '.join(unmeasured)}: peaks of text decoders are not measured; leave out --compile")
    decoders = {} if options.compile else found.decoders
    done = {**results.types, **results.decoders}
    wanted = [name for name in (*known, *decoders) if not options.only or name in options.only]
    wanted = [name for name in wanted if options.redo or missing(done.get(name, {}), key, options)]
    results.stamp = {**measure.machine(), "threads": 1, "types": len(known), "decoders": len(found.decoders)}
    results.known = dict(found.known)
    wanted = [name for name in wanted if not set_apart(name, decoders.get(name, []), results, key)]
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(lambda part: run_types(part, decoders, results, options), deal(wanted, options.jobs)))


def missing(found: Mapping[str, Any], key: str, options: argparse.Namespace) -> bool:
    """Return whether something of a type is not measured yet. A type that is not run has no peaks."""
    peaks = found.get("peaks", {})
    return key not in found or bool(options.compile and peaks and any(name not in peaks for name in options.backends))


def set_apart(name: str, composites: Sequence[str], results: Results, key: str) -> bool:
    """Record a type that is not run (it equals another, or an exception excludes it). Return whether it is one."""
    same_as = None if composites else find_twin(name)
    own = exceptions(composites[0] if composites else name)
    if same_as is not None:
        results.add(name, {"same_as": same_as, key: 0})
    elif own.get("skip"):
        results.add(name, {"not_built": own["why"], key: 0}, replace=key == "seconds", composites=composites)
    return same_as is not None or bool(own.get("skip"))


def deal(names: Sequence[str], hands: int) -> list[list[str]]:
    return [list(names[i::hands]) for i in range(hands)]


def run_types(
    names: Sequence[str], decoders: Mapping[str, list[str]], results: Results, options: argparse.Namespace
) -> None:
    """Run each type in a process of its own that starts with everything imported and nothing compiled."""
    fresh: dict[str, dict[str, Any]] = {}

    def take(found: dict[str, Any]) -> None:
        name = found.pop("type")
        fresh.setdefault(name, {}).update(found)
        if "seconds" in found or "compile_seconds" in found:  # it has ended
            results.add(name, fresh[name], replace=not options.compile, composites=decoders.get(name, []))
            print(f"{name}: {summary(fresh[name])}", flush=True)

    backends = options.backends if options.compile else []
    types = [(name, next(iter(decoders.get(name, [])), None), backends) for name in names]
    spec = {"types": types, "timeout": options.timeout}
    if names:
        run_worker("benchmarks.architectures_worker", spec, on_row=take)


def summary(found: dict[str, Any]) -> str:
    """Return a line for the console."""
    if "peaks" in found:
        peaks = found["peaks"].items()
        return ", ".join(f"{k} {v['peak'] / measure.MIB:.1f} MiB" if "peak" in v else f"{k} fails" for k, v in peaks)
    parts: list[str] = [found.get("not_built") or found.get("ended") or ""]
    for use, got in found.get("uses", {}).items():
        outcome = (got.get("eager_error") and "eager raises") or got.get("error")
        if outcome is None:
            outcome = f"{got['difference']:.1e}" if "difference" in got else "not run"
        parts.append(f"{use} {outcome[:160]}")
    return "; ".join(filter(None, parts)) + f" ({found.get('seconds', found.get('compile_seconds'))} s)"


if __name__ == "__main__":
    sys.exit(main())
