"""Generate from a long prompt with the KV cache in host memory, and print the device memory it saves.

    python -m examples.generate_long                                  Gemma 3 270M from a Python package, CPU or GPU
    python -m examples.generate_long --model meta-llama/Llama-3.1-8B --tokens 100000 --device cuda

It needs one line: `model.compile(backend="mom", options={"kv_offload": True})`. `generate()` and its cache are Hugging
Face's own. It runs three times, each in a new process: eager, compiled with the cache on the device, and compiled with
the cache on the host.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

import mom_compile
from benchmarks import measure, workers
from benchmarks.measure import MIB
from examples.demo import OUTPUT, long_prompt, prepare

RUNS = ("eager", "mom, cache on the device", "mom, cache on the host")
Row = dict[str, Any]


def generate(spec: Row) -> None:
    """Run one of the three: cold to compile, then warm to measure."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if spec["device"] == "cpu":
        measure.watch_cpu()
    workers.step("loading")
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype="auto").eval().to(spec["device"])
    ids = long_prompt(tokenizer, spec["tokens"]).to(spec["device"])
    if spec["run"] != "eager":
        model.compile(backend="mom", options={"kv_offload": spec["run"] == "mom, cache on the host"})

    def run() -> Any:
        return model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=spec["new_tokens"],
            do_sample=False,
            return_dict_in_generate=True,
        )

    workers.step("compiling, generating")
    start = time.perf_counter()
    cold = run()
    first = time.perf_counter() - start
    text = tokenizer.decode(cold.sequences[0, ids.shape[1] :])
    del cold
    workers.step("generating")
    kept: list[Any] = []
    start = time.perf_counter()
    report = measure.peak_bytes(lambda: kept.append(run()), spec["device"])
    row = {"run": spec["run"], "tokens": ids.shape[1], "peak": report.peak, "text": text}
    row |= {"seconds": time.perf_counter() - start, "first": first, "cache": cache_bytes(kept[0].past_key_values)}
    workers.row(row | {"host": mom_compile.host_memory().rows})


def cache_bytes(cache: Any) -> int:
    """Return the bytes of a cache on the device."""
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return sum(t.numel() * t.element_size() for t in tensors if not isinstance(t, mom_compile.HostTensor))


def print_rows(rows: Sequence[Row], options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{rows[0]['tokens']} tokens of prompt, {options.new_tokens} generated")
    table.add_column("")
    for heading in ("on the device", "on the host", "peak above weights", "seconds"):
        table.add_column(heading, justify="right")
    for row in rows:
        sizes = (f"{row[name] / MIB:.1f} MiB" for name in ("cache", "host", "peak"))
        table.add_row(row["run"], *sizes, f"{row['seconds']:.1f}")
    console = Console()
    console.print(table)
    console.print(f"the same text: {'yes' if len({row['text'] for row in rows}) == 1 else 'NO'}")
    console.print(f"generated: {rows[-1]['text']!r}", markup=False)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.generate_long", description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a name on the hub or a folder (default: Gemma 3 270M from a package)")
    parser.add_argument("--tokens", type=int, default=4096, help="length of the prompt (default 4096)")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.worker is not None:
        spec = json.loads(options.worker)
        generate(spec) if spec["kind"] == "generate" else prepare(spec["tokens"])
        return 0
    from rich.console import Console

    with Console(stderr=True).status("preparing the model") as status:
        if options.model is None:
            workers.run_worker("examples.generate_long", {"kind": "prepare", "tokens": options.tokens})
        spec = {name: getattr(options, name) for name in ("tokens", "new_tokens", "device")}
        spec |= {"kind": "generate", "model": options.model or str(OUTPUT / "model")}
        rows: list[Row] = []
        for run in RUNS:

            def on_step(text: str, run: str = run) -> None:
                status.update(f"{run}: {text}")

            rows += workers.run_worker("examples.generate_long", spec | {"run": run}, on_step=on_step)
    print_rows(rows, options)
    print(measure.describe_machine(measure.machine()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
