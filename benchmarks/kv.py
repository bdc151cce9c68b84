"""The KV cache on the device and on the host: `python -m benchmarks.kv`. It has not run on a GPU.

A prompt is prefilled and tokens are decoded one by one, as in `generate()`, with a `DynamicCache`. Each backend has a
process of its own: `eager`, `inductor`, `mom` with kv_offload=False, `mom-host` with kv_offload=True, `mom-disk` with
files.

prefill   seconds of a warm prefill, its peak above the weights, and the expected peak of the report
cache     bytes of the cache on the device and on the host
step      milliseconds of a decode step (median), and its peak above weights and cache
rows      bytes per step that leave for the host, compared with those of one token's keys and values

On the CPU, device and host are the same memory; what is on the host is in separate pages, which the counting allocator
does not see. On a GPU the bandwidth from pinned host memory is measured, too, and a step compared with it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure, workers
from benchmarks.decoding import WARM_UP, decode
from benchmarks.measure import MIB

BACKENDS = ("eager", "inductor", "mom", "mom-host", "mom-disk")
RESULTS = Path(__file__).with_name("results")
Row = dict[str, Any]


def worker(spec: Row) -> None:
    from benchmarks import models

    device = spec["device"]
    if device == "cpu":
        measure.watch_cpu()
    workers.step("model")
    seq = spec["seq"] + spec["new"] + 2 * WARM_UP
    dtype = getattr(torch, spec["dtype"])
    model = models.llama(spec["shape"], spec["layers"], dtype=dtype, device=device, seq=seq)
    ids = models.tokens(model, spec["seq"])
    with tempfile.TemporaryDirectory() as folder:
        if spec["backend"] != "eager":
            model.compile(**_backend(spec["backend"], folder))
        prefill = partial(models.prefill, model, ids, cache=True)
        workers.step("compile prefill")
        prefill()
        workers.step("prefill")
        row = {"backend": spec["backend"], "prefill": min(measure.seconds(prefill, device) for _ in range(2))}
        report = measure.peak_bytes(prefill, device)
        row |= {"prefill_peak": report.peak, "cache": report.kept, "expected_peak": expected_peak()}
        steps = decode(model, prefill()[1], spec["new"], device=device)
        workers.row(row | steps | _bandwidth(device))


def _backend(name: str, folder: str) -> Row:
    offload: Row = {"mom": {"kv_offload": False}, "mom-host": {"kv_offload": True}}.get(
        name, {"kv_offload": "disk", "kv_dir": folder}
    )
    return {"backend": "inductor"} if name == "inductor" else {"backend": "mom", "options": offload}


def expected_peak() -> int | None:
    """Return the expected peak of the prefill's report, if the backend has one."""
    from mom_compile import reports

    return next((report.expected_peak_bytes for report in reports() if report.stages), None)


def _bandwidth(device: str) -> Row:
    """Return the bytes per second from pinned host memory to the device."""
    if device == "cpu":
        return {}
    source = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device=device)
    copy_once = partial(target.copy_, source, non_blocking=True)
    best = min(measure.seconds(copy_once, device) for _ in range(5))
    return {"bandwidth": source.numel() / best}


# ------------------------------------------------------------------------------------------------- output


def print_rows(rows: Sequence[Row], options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"KV cache, {options.layers} layers ({options.shape}), {options.dtype}, S = {options.seq}")
    table.add_column("backend")
    for heading in (
        "prefill s", "peak MiB", "expected", "cache on device MiB", "on host MiB", "step ms", "step's peak MiB",
        "KiB to host",
    ):  # fmt: skip
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row["backend"],
            f"{row['prefill']:.2f}",
            f"{row['prefill_peak'] / MIB:.0f}",
            f"{row['expected_peak'] / MIB:.0f}" if row["expected_peak"] else "",
            f"{row['cache'] / MIB:.1f}",
            f"{row['host'] / MIB:.1f}",
            f"{statistics.median(row['step']) * 1e3:.1f}",
            f"{row['step_peak'] / MIB:.1f}",
            f"{row['to_host'] / 1024:.1f}",
        )
    Console().print(table)
    for row in rows:
        if "bandwidth" in row and row["to_device"]:
            reached = row["to_device"] / statistics.median(row["step"]) / row["bandwidth"]
            print(f"{row['backend']}: {reached:.0%} of {row['bandwidth'] / 1e9:.1f} GB/s from pinned memory")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kv", description="The KV cache on the host.")
    parser.add_argument("--seq", type=int, default=4096)
    parser.add_argument("--new", type=int, default=16, help="timed decode steps")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--shape", default="small")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS), choices=BACKENDS)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/kv-<device>-<date>.json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def run(options: argparse.Namespace, timeout: float | None = None) -> list[Row]:
    """Return one row for each backend."""
    names = ("seq", "new", "layers", "shape", "dtype", "device")
    rows: list[Row] = []
    for backend in options.backends:
        spec = {name: getattr(options, name) for name in names} | {"backend": backend}
        rows += workers.run_worker("benchmarks.kv", spec, timeout=timeout)
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.worker is not None:
        worker(json.loads(options.worker))
        return 0
    rows, machine = run(options), measure.machine()
    print_rows(rows, options)
    print(measure.describe_machine(machine))
    if options.save:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"kv-{options.device}-{machine['date']}.json"
        given = {name: value for name, value in vars(options).items() if name != "worker"}
        path.write_text(json.dumps({"machine": machine, "options": given, "rows": rows}, indent=2) + "\n")
        print(f"saved {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
