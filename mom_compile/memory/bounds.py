"""Between how many rows a mini-sequence is efficient on a device: all that is known of devices for it, in one place.

Terms
-----
rows        Of one sequence of a batch. Products have the rows of all sequences: bounds are counted over these.
fewest      What a budget may ask for. Products are slower by then, which is better than no run, or than keys and values
            that every token has to fetch.
efficient   What a small share of memory may ask for: fewer cost time. On a GPU they cost so much, in launches that the
            device waits for, that it has as many as help; they hold a few hundred MiB at the most.
most        More gain nothing.
width       Bytes of a row that a value may have whatever its rows are: those of the layer that the bounds are for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from mom_compile.memory.devices import Device, Properties, device_of
from mom_compile.memory.rows import BLOCK_ROWS, Layer, rows_for
from mom_passes.loops.loop import FEWEST_OF_A_SEQUENCE, FEWEST_ROWS


@dataclass(frozen=True)
class ExpertRows:
    """What a product with one expert's matrix should have: `rows` of its own, for which a value may take `bytes`."""

    rows: int
    bytes: int


@dataclass(frozen=True)
class Bounds:
    """Of the rows of each sequence, in multiples of `step`."""

    fewest: int
    efficient: int
    most: int
    step: int = 1
    width: int = 0


class DeviceRows(Protocol):
    """The bounds of a device, by how many sequences are computed at once; and what its experts want."""

    @property
    def experts(self) -> ExpertRows: ...

    def bounds(self, sequences: int) -> Bounds: ...


@dataclass(frozen=True)
class CountedRows:
    """Of a device of which only the rows of products are known, over all sequences; and how many of each of several
    sequences are efficient at least: attention has no more than those, and what is cut of each is copied."""

    fewest: int
    efficient: int
    most: int
    each: int
    experts: ExpertRows

    def bounds(self, sequences: int) -> Bounds:
        fewest = max(FEWEST_OF_A_SEQUENCE, math.ceil(self.fewest / sequences))
        efficient = max(fewest, self.each, math.ceil(self.efficient / sequences))
        return Bounds(fewest, efficient, max(efficient, math.ceil(self.most / sequences)))


@dataclass(frozen=True)
class GpuRows:
    """Of a GPU and a layer, by the rule of `rows`: NEVER MEASURED. Attention has blocks of `BLOCK_ROWS` rows, and only
    a budget asks for fewer than that rule says."""

    device: Device
    layer: Layer
    experts: ExpertRows

    def bounds(self, sequences: int) -> Bounds:
        most = rows_for(self.device, replace(self.layer, sequences=sequences))
        width = torch.float32.itemsize * max(outputs for _, outputs in self.layer.products) * sequences
        return Bounds(BLOCK_ROWS, most, most, BLOCK_ROWS, width)


#: Measured at the width of `benchmarks.cpu`. One thread, as CPU time beside the quickest number of rows (torch 2.13.0,
#: a shared machine, 4 calls of each in turn, the least of each), 2 layers and 4096 tokens: 64 rows 1.47, 128 rows 1.24,
#: 192 rows 1.11, 256 rows 1.04, 512 rows 1.02, 1024 and 2048 rows 1.00. 16 sequences of 256 tokens, rows of each:
#: 8 rows 1.35, 16 rows 1.13, 32 rows 1.07, 64 rows 1.00, 128 rows 1.01; stock Inductor 1.95. Two threads share the rows
#: of a product, and want twice as many (`python -m benchmarks.cpu --only rows`, docs/figures.md). More than two were
#: never measured.
ROWS_OF_A_THREAD = 256
MOST_ON_CPU = 1024


def cpu_rows(threads: int) -> CountedRows:
    """Of a CPU, where a product has so many threads."""
    efficient = min(MOST_ON_CPU, ROWS_OF_A_THREAD * threads)
    return CountedRows(FEWEST_ROWS, efficient, MOST_ON_CPU, 32, ExpertRows(64, 512 << 20))


#: By the rule of arithmetic intensity, never measured: a product of r rows with a matrix computes r FLOPs for each byte
#: of it in 16 bits, and an H100 computes 990e12 / 3.35e12 = 295 in the time in which it reads one.
EXPERTS_ELSEWHERE = ExpertRows(300, 512 << 20)

#: Never measured.
ELSEWHERE = CountedRows(FEWEST_ROWS, 256, 1024, 32, EXPERTS_ELSEWHERE)


def rows_on(type: str, gpu: Properties | None, layer: Layer | None) -> DeviceRows:
    """Of a type of device; of a GPU by what it says of itself and what most loops compute, if that is a layer."""
    if type == "cpu":
        return cpu_rows(torch.get_num_threads())
    if gpu is None or layer is None:
        return ELSEWHERE
    return GpuRows(device_of(gpu)[0], layer, EXPERTS_ELSEWHERE)
