"""Write docs/benchmarks.md from the results of `benchmarks.suite`, `benchmarks.gpu` and `benchmarks.predicted`."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import physical
from benchmarks.measure import MIB, describe_machine
from benchmarks.methods import CHUNK, METHODS, Setup
from benchmarks.physical import Rates

PAGE = Path(__file__).resolve().parent.parent / "docs" / "benchmarks.md"
Row = Mapping[str, Any]
#: The methods that mom is compared with.
BASE, PAPER = "inductor", "mlp"
#: The results of `benchmarks.predicted`, in the same folder.
PREDICTED = "predicted-gpu.json"
GIB = 1 << 30

_HEAD = """# Benchmarks

All methods of prefill for long prompts, each with the logits of the last token only and the cache kept.

{stamp}.

`make bench` (`python -m benchmarks.suite`) measures and writes this page. Results in
`benchmarks/results/suite-cpu.json` are not measured again without `--fresh`; `--page` only writes the page. Each
figure comes from a process of its own with an empty compile cache. When all methods of a table have run, their
processes are timed in turn, one prefill each (A B C, C B A, ...); times are medians of {repeats}. Peaks are bytes of
PyTorch's allocator above the weights, exact. Running out of memory, or of time, is a result. Decode steps are not
timed in turn but after each process's prefill, so other work of the machine may show in them (`python -m
benchmarks.starts --only-steps` times them in turn).

| method | what it is |
|---|---|
{methods}

On a CPU, device and host are the same memory. What is on the host is in pages that the allocator does not count, as
on a GPU: *mom, the cache on the host* shows what a device would have to hold, not what this machine saves. An
offloaded cache of Hugging Face moves to the CPU, which is no move here: those two methods need a GPU. A chunk has
{chunk} tokens.

*The least* is the lower bound of every method (`benchmarks/physical.py`): bytes that are live at once, the residual
stream and the cache (with the cache on the host, keys and values of one layer); operations, over the {gflops:.0f}
GFLOPS that a square product reaches here; for decode, weights and cache once, over the {bandwidth:.1f} GB/s that a
copy reads and writes.
"""

_NO_GPU = """# GPUs

`python -m benchmarks.gpu` measures the same methods with Llama-3-8B's shape in bf16. It has not run yet.
[Figures](figures.md#gpu-a-first-run) has a first run on an H200. Until then:
"""

_PREDICTED_HEAD = """## Predicted, not measured: {shape} on one {device}

One sequence in bfloat16; {weights:.1f} GiB of weights in addition to these figures. Peaks come from the memory model
(`python -m benchmarks.predicted`; [longest contexts](plans.md) says how accurate it is); *the least* is as above.
"""

_ARITHMETIC = """
Time to first token is estimated as the maximum of what runs at the same time: operations of products and attentions
over the rate that products reach of the device's; mini-sequences times the weights that each reads, over the memory's
bandwidth; mini-sequences times loops times the host's time for a body; keys and values over the link. For *mom*
nothing leaves the device; everything else is the same.
"""

_BESIDE_EAGER = """
Eager mode has the same arithmetic, which that table counts by one rate, and other attention kernels: cuDNN computes
all its rows; mom uses FlashAttention for a mini-sequence's own rows and cuDNN for the keys before them. The rates are
those that the FlashAttention-3 paper measured for each on an H100 (`benchmarks/predicted.py`), without launches and
without merging the two parts, so *mom of eager* is the best possible:
"""

_DECODE = """
A decode step after such a prefill reads all weights and all keys and values once, in the time *memory*; the host
launches 32 layers in *launches* (`STEP_SECONDS` of `mom_compile/memory/device.py`, an estimate, too); keys and values
on the host are copied over the link. At best these overlap; *in sequence* is their sum, the time of a step if nothing
overlaps. The target at 16,384 tokens is 10 ms. *All bytes* is the device memory at the prefill's peak, weights
included: the paper's 465,920 tokens and a million have to stay below 80 GiB. On the command line: `mom-compile plan
{shape} --seq-len 16384 --device {device}`, with `-o kv_offload=True` for *mom-host*.
"""

_PREFILL_HEADINGS = (
    "method", "first call", "time to first token", "of the least", "of Inductor's", "peak above the weights",
    "of the least", "of Inductor's", "decode", "logits off eager's",
)  # fmt: skip


def write(source: Path, page: Path = PAGE) -> str:
    """Write the page from `source` and the GPU results in the same folder. Return a line for the console."""
    page.write_text(text_of(source))
    return f"{page.name}: {len(json.loads(source.read_text())['cells'])} figures of the CPU"


def text_of(source: Path) -> str:
    results = json.loads(source.read_text())
    rates = Rates(**results["rates"])
    cells: Sequence[Row] = list(results["cells"].values())
    repeats = max((len(cell.get("seconds", ())) for cell in cells), default=0)
    methods = "\n".join(f"| {method.name} | {method.what} |" for method in METHODS.values())
    head = _HEAD.format(
        stamp=describe_machine(results["machine"]), repeats=repeats, methods=methods, chunk=CHUNK,
        gflops=rates.flops / 1e9, bandwidth=rates.bandwidth / 1e9,
    )  # fmt: skip
    parts = [head, *prefill_tables(cells, rates), longest_table(cells)]
    gpus = [json.loads(file.read_text()) for file in sorted(source.parent.glob("gpu-*.json"))]
    parts += [part for gpu in gpus for part in gpu_tables(gpu)] or [_NO_GPU, *predictions(source.parent)]
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def predictions(folder: Path) -> list[str]:
    """Return the predicted tables of a GPU, or nothing where there is no prediction."""
    if not (folder / PREDICTED).exists():
        return []
    results = json.loads((folder / PREDICTED).read_text())
    head = {"shape": results["shape"], "device": results["device"], "weights": results["weights"] / GIB}
    lines = [_PREDICTED_HEAD.format(**head), *_predicted_peaks(results["cells"])]
    lines += [_ARITHMETIC, *_predicted_times(results["cells"])]
    lines += [_BESIDE_EAGER, *_predicted_attention(results["cells"]), _DECODE.format(**head)]
    return ["\n".join([*lines, *_predicted_steps(results["cells"], results["weights"])])]


def _predicted_peaks(cells: Mapping[str, Row]) -> list[str]:
    names = next(iter(cells.values()))["peaks"]
    lines = _table_head(("tokens", *names, "the least", "the least, cache on the host"))
    for tokens, cell in cells.items():
        sizes = (f"{size / GIB:.2f} GiB" for size in (*cell["peaks"].values(), *cell["least"]))
        lines.append(_line(f"{int(tokens):,}", *sizes))
    return lines


def _predicted_times(cells: Mapping[str, Row]) -> list[str]:
    parts = next(iter(cells.values()))["seconds"]["mom-host"]["parts"]
    lines = _table_head(("tokens", *(f"{part}, s" for part in parts), "mom bound by", "mom-host bound by"))
    for tokens, cell in cells.items():
        kept, away = cell["seconds"]["mom"], cell["seconds"]["mom-host"]
        seconds = (f"{time:.3g}" for time in away["parts"].values())
        lines.append(_line(f"{int(tokens):,}", *seconds, kept["bound"], away["bound"]))
    return lines


def _predicted_attention(cells: Mapping[str, Row]) -> list[str]:
    lines = _table_head(("tokens", "products, s", "eager's attention, s", "mom's attention, s", "mom of eager"))
    for tokens, cell in cells.items():
        products, eager, mom = (cell["attention"][name] for name in ("products", "eager", "mom"))
        times = (f"{time:.3g}" for time in (products, eager, mom))
        lines.append(_line(f"{int(tokens):,}", *times, _times(products + mom, products + eager)))
    return lines


def _predicted_steps(cells: Mapping[str, Row], weights: int) -> list[str]:
    lines = _table_head((
        "tokens", "mom, all bytes", "mom-host, all bytes", "memory, ms", "launches, ms", "mom in sequence, ms",
        "link, ms", "mom-host in sequence, ms",
    ))  # fmt: skip
    for tokens, cell in cells.items():
        sizes = (f"{(cell['peaks'][name] + weights) / GIB:.1f} GiB" for name in ("mom", "mom-host"))
        kept, away = (cell["decode"][name]["parts"] for name in ("mom", "mom-host"))
        times = (
            kept["memory bandwidth"], kept["launching kernels"], sum(kept.values()), away["the link to the host"],
            sum(away.values()),
        )  # fmt: skip
        lines.append(_line(f"{int(tokens):,}", *sizes, *(f"{1e3 * time:.1f}" for time in times)))
    return lines


def gpu_tables(results: Row) -> list[str]:
    """Return the tables of one GPU."""
    rates = Rates(**results["rates"])
    said = f"# {results['machine']['gpu']}\n\n`python -m benchmarks.gpu`: {describe_machine(results['machine'])}.\n"
    said += f"A product reaches {rates.flops / 1e12:.0f} TFLOPS, a copy {rates.bandwidth / 1e12:.2f} TB/s."
    return [said, *prefill_tables(list(results["cells"].values()), rates)]


# ------------------------------------------------------------------------------------------------- prefill


def prefill_tables(cells: Sequence[Row], rates: Rates) -> list[str]:
    """Return a table for each setup and each limit of device memory."""
    tables: dict[tuple[Setup, int | None], dict[str, Row]] = {}
    for cell in cells:
        if cell["limit"] is None:
            tables.setdefault((Setup(**cell["setup"]), cell.get("memory")), {})[cell["method"]] = cell
    return [prefill_table(setup, memory, rows, rates) for (setup, memory), rows in tables.items()]


def prefill_table(setup: Setup, memory: int | None, rows: Mapping[str, Row], rates: Rates) -> str:
    """Return the table of one setup, a row for each method."""
    what = f"{setup.batch} sequences of {setup.tokens:,} tokens" if setup.batch > 1 else f"{setup.tokens:,} tokens"
    lines = [f"## {what}" + (f", in {memory >> 30} GiB" if memory else ""), ""]
    lines.append(f"Llama of {setup.layers} layers, {_shape(setup)}, {setup.dtype}.")
    lines += ["", *_table_head(_PREFILL_HEADINGS)]
    lines += [_prefill_row(setup, name, rows, rates) for name in METHODS if name in rows]
    lines.append(_least_row(setup, rates))
    return "\n".join(lines)


def _shape(setup: Setup) -> str:
    from benchmarks.models import SHAPES

    shape = SHAPES[setup.shape]
    return (
        f"hidden {shape['hidden_size']}, intermediate {shape['intermediate_size']}, "
        f"{shape['num_attention_heads']} heads, {shape['num_key_value_heads']} of them with keys and values, "
        f"vocabulary {shape['vocab_size']:,}"
    )


def _table_head(headings: Sequence[str]) -> list[str]:
    return [_line(*headings), "|---" * len(headings) + "|"]


def _line(*columns: str) -> str:
    return f"| {' | '.join(columns)} |"


def _prefill_row(setup: Setup, name: str, rows: Mapping[str, Row], rates: Rates) -> str:
    """Return one row, with ratios to the lower bound and to Inductor."""
    row, base, eager = rows[name], rows.get(BASE, {}), rows.get("eager", {})
    if "error" in row:
        return f"| {name} | {reason(row)} " + "| " * (len(_PREFILL_HEADINGS) - 2) + "|"
    seconds = _median(row)
    least = physical.prefill_flops(setup) / rates.flops
    live = physical.live_bytes(setup, cache_on_host=METHODS[name].keeps_cache_on_host)
    columns = [
        name,
        "" if row["first"] is None else f"{row['first']:.1f} s",
        "" if seconds is None else f"{seconds:.2f} s",
        _times(seconds, least),
        _times(seconds, _median(base)),
        f"{row['peak'] / MIB:,.1f} MiB",
        _times(row["peak"], live),
        _times(row["peak"], base.get("peak")),
        f"{setup.batch / statistics.median(row['step']):,.1f} tokens/s" if row.get("step") else "",
        _apart(row, eager),
    ]
    return _line(*columns)


def _least_row(setup: Setup, rates: Rates) -> str:
    live = [physical.live_bytes(setup, cache_on_host=host) / MIB for host in (False, True)]
    seconds = physical.prefill_flops(setup) / rates.flops
    decode = setup.batch * rates.bandwidth / physical.decode_bytes(setup)
    peaks = f"{live[0]:,.1f} MiB; cache on the host {live[1]:,.1f}"
    return f"| *the least* | | {seconds:.2f} s | | | {peaks} | | | {decode:,.1f} tokens/s | |"


def reason(row: Row) -> str:
    """Return in a few words why there is no figure."""
    said = str(row["error"]).splitlines()[0]
    return "out of memory" if said.startswith("out of memory") else said


def _median(row: Row) -> float | None:
    return statistics.median(row["seconds"]) if row.get("seconds") else None


def _times(value: float | None, base: float | None) -> str:
    return f"{value / base:.2f}x" if value and base else ""


def _apart(row: Row, eager: Row) -> str:
    """Return the difference of the largest logits from eager mode's, or that other tokens have the largest."""
    if row is eager or "logits" not in eager:
        return ""
    if row["ids"] != eager["ids"]:
        return "others are largest"
    return f"{max(abs(a - b) for a, b in zip(row['logits'], eager['logits'], strict=True)):.0e}"


# ------------------------------------------------------------------------------------------------- longest


def longest_table(cells: Sequence[Row]) -> str:
    """Return the table of the longest prompts within the limit."""
    found = {cell["method"]: cell for cell in cells if cell.get("limit") is not None}
    if not found:
        return ""
    setup, limit = Setup(**next(iter(found.values()))["setup"]), next(iter(found.values()))["limit"]
    lines = [f"## The longest prompt in {limit // MIB} MiB above the weights", ""]
    lines.append(f"Llama of {setup.layers} layers, {_shape(setup)}, {setup.dtype}. Allocating beyond the limit")
    lines.append("raises. Every length was run: *fits* ran, *fails* is the shortest that did not.")
    lines += ["", *_table_head(("method", "fits", "fails", "of Inductor's", "of the paper's"))]
    lines += [_longest_row(name, found) for name in METHODS if name in found]
    return "\n".join(lines)


def _longest_row(name: str, found: Mapping[str, Row]) -> str:
    row = found[name]
    if "error" in row:
        return f"| {name} | {reason(row)} | | | |"
    fails = f"{row['fails']:,}" if row["fails"] is not None else "nothing tried did"
    ratios = (_times(row["fits"], found.get(other, {}).get("fits")) for other in (BASE, PAPER))
    return f"| {name} | {row['fits']:,} tokens | {fails} | {' | '.join(ratios)} |"

