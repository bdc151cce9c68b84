"""docs/plans.md: the longest context of shipped shapes on common cards, planned for each way to run it.

    python -m benchmarks.plans            plan what benchmarks/results/plans.json lacks, and write the page
    python -m benchmarks.plans NAME ...   plan only these shapes, and write the page of all that is planned
    python -m benchmarks.plans --page     write the page alone
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mom_compile
from benchmarks import measure
from benchmarks.results_file import OF_A_RUN, taken_up
from mom_compile.cli.plan import CARDS
from mom_compile.planning.shapes import shapes
from mom_compile.report.units import in_units

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).with_name("results") / "plans.json"
PAGE = ROOT / "docs" / "plans.md"
#: The length that is traced; others follow from it.
TOKENS = 1_000_000
DTYPE = "bfloat16"
#: The device whose rule determines the rows of a mini-sequence.
DEVICE = "H100"
#: Longer contexts are shown as "over": no model has so many positions.
MOST = 10_000_000

INTRODUCTION = """# The longest context, planned

How many tokens of one sequence fit into a prefill, for shipped shapes and common cards: with weights in bfloat16,
or quantised as the checkpoint's config says, the cache, and the logits of the last token. `python -m
benchmarks.plans` computes this from the memory model, without a GPU and without weights. A 32nd of what is above the
weights is left free. Nothing else is assumed on the card: a desktop, CUDA's own context (about half a GiB) and
fragmentation need more.

How accurate this is: with 8 layers of Llama-3-8B's shape at 16,384 tokens, an H200 took what is planned for eager
mode to 0.1 MiB, for mom to 0.4 %, and 11 % more than planned for stock Inductor, so the lengths of stock Inductor are
too long ([figures](figures.md#predicted-peaks)). *Cache and weights on the host* has never run on a GPU. Lengths
beyond the positions of a model are in brackets: the model runs but was not trained for them. `-`: the weights do not
fit. `mom-compile plan SHAPE` also estimates times, and plans the shipped shapes that are not listed here."""

#: Fields of the machine that do not affect plans.
ANY_MACHINE = (*OF_A_RUN, "python", "system", "cpu", "cores", "threads", "gpu", "cuda")

#: Shapes that are also planned for several ranks, and their numbers.
RANKS = {"Llama-3-70B": (2, 4, 8)}

#: Cells that the page has. The others have not been planned since decode steps are counted.
PAGED = (
    "Qwen3.5-35B-A3B", "Llama-3-8B", "Llama-3-70B", "Qwen3-30B-A3B", "Llama-3-70B on 2 ranks", "Mixtral-8x7B",
    "Qwen2.5-7B", "Mistral-Nemo-12B", "GPT-OSS-20B",
)  # fmt: skip

RANKED = """## Several GPUs

Tensor parallelism as `from_pretrained(..., tp_plan="auto")` of transformers does it, planned for one rank
(`--tensor-parallel` on the command line, `tensor_parallel=` of `mom_compile.plan`): projections are sharded by
columns or rows, the embedding and the head by the vocabulary, experts within each expert; norms and the residual
stream are whole on each rank. The longest context is for cards of 80 GiB. Buffers of NCCL are not included."""

Row = dict[str, Any]


def cells() -> dict[str, tuple[str, int]]:
    """Return the shape and the number of ranks of each cell, by its name."""
    alone = {name: (name, 1) for name in shapes()}
    return alone | {f"{name} on {count} ranks": (name, count) for name, counts in RANKS.items() for count in counts}


def planned(name: str, ranks: int) -> Row:
    """Plan one shape, or one rank of several."""
    began = time.process_time()
    found = mom_compile.plan(
        name, seq_len=TOKENS, dtype=DTYPE, device=DEVICE, tensor_parallel=ranks, progress=_tell
    )
    rows = {
        key: {"what": way.what, "longest": {str(size): way.max_seq_len(size) for size in CARDS}}
        for key, way in found.ways.items()
    }
    return {
        "model_type": found.subject.model_type,
        "layers": found.subject.layers,
        "parameters": found.subject.parameters,
        "ranks": ranks,
        "weight_bytes": found.subject.weight_bytes,
        "kv_bytes_per_token": found.kv_bytes_per_token,
        "positions": found.subject.longest,
        "notes": [note for note in found.notes if "positions of the model" not in note],
        "ways": rows,
        "seconds": time.process_time() - began,
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def _tell(text: str) -> None:
    print(f"  {text}", file=sys.stderr)


def page(data: Row) -> str:
    """Return the page as text."""
    stamp = measure.describe_machine(data["machine"])
    lines = [INTRODUCTION]
    alone = [name for name, (_, ranks) in cells().items() if ranks == 1 and name in data["cells"]]
    for name in alone:
        row = data["cells"][name]
        lines += ["", f"## {name}", "", _facts(row), ""]
        lines += [f"| | {' | '.join(in_units(size) for size in CARDS)} |", "|---|" + "---:|" * len(CARDS)]
        for way in row["ways"].values():
            lengths = [_tokens(way["longest"][str(size)], row["positions"]) for size in CARDS]
            lines.append(f"| {way['what']} | {' | '.join(lengths)} |")
        notes = [note for note in row["notes"] if "positions of the model" not in note]
        lines += [line for note in notes for line in ("", f"{note[0].upper()}{note[1:]}.")]
    return "\n".join([*lines, "", *_of_ranks(data["cells"]), f"{stamp}.", ""])


def _of_ranks(rows: Row) -> list[str]:
    """Return the section on several ranks."""
    size, ways = str(CARDS[-1]), ("eager", "inductor", "mom", "mom-cache")
    names = [next(iter(rows.values()))["ways"][way]["what"] for way in ways]
    lines = [RANKED, "", f"| | weights | cache per token | {' | '.join(names)} |", "|---|" + "---:|" * (2 + len(ways))]
    for name, (shape, _) in cells().items():
        if shape in RANKS and name in rows:
            row = rows[name]
            longest = [_tokens(row["ways"][way]["longest"][size], row["positions"]) for way in ways]
            sizes = [in_units(row["weight_bytes"]), in_units(row["kv_bytes_per_token"])]
            lines.append(f"| {name} | {' | '.join([*sizes, *longest])} |")
    return [*lines, ""]


def _facts(row: Row) -> str:
    positions = "" if row["positions"] is None else f", made for {row['positions']:,} positions"
    return (
        f"{row['model_type']}, {row['layers']} layers, {row['parameters'] / 1e9:.3g}e9 parameters, "
        f"{in_units(row['weight_bytes'])} of weights, {in_units(row['kv_bytes_per_token'])} of cache per "
        f"token{positions}."
    )


def _tokens(count: int, positions: int | None) -> str:
    if not count:
        return "-"
    text = f"over {MOST // 10**6}M" if count >= MOST else f"{count // 1000:,}k" if count >= 10_000 else f"{count:,}"
    return text if positions is None or count <= positions else f"({text})"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plans", description=__doc__.splitlines()[0])
    parser.add_argument("--page", action="store_true", help="only write docs/plans.md")
    parser.add_argument("--fresh", action="store_true", help="plan every shape again")
    parser.add_argument("names", nargs="*", help="cells to plan; default: all")
    options = parser.parse_args(arguments)
    results = taken_up(RESULTS, measure.machine(), fresh=options.fresh, may_differ=ANY_MACHINE)
    if results is None:
        return 2
    for name, (shape, ranks) in [] if options.page else cells().items():
        if name not in results.cells and name in (options.names or cells()):
            print(name, file=sys.stderr)
            results.keep(name, planned(shape, ranks))
    PAGE.write_text(page(json.loads(RESULTS.read_text("utf-8"))), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
