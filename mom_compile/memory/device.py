"""What a device wants of a mini-sequence, and how many bytes it has.

Terms
-----
rows        Rows of each sequence of a batch. A product has the rows of all sequences: bounds are counted over these.
fewest      The lower bound under a budget. Products are slower with so few rows, which is better than no run, or than
            keys and values that every token has to fetch.
efficient   The lower bound without a budget: fewer rows cost time. On a GPU it equals `most`, because the device waits
            for launches with fewer, and a mini-sequence holds a few hundred MiB at most.
most        The upper bound: more rows gain nothing.
width       Bytes of a row that a value may have at any number of rows: those of the layer the bounds are for.

The rows on a GPU follow from its data sheet and the layer. NEVER MEASURED.

intensity   A product with a matrix reads each of its values once for all rows and computes two operations with it for
            each row: in 16 bits, one operation for each byte and row. FLOPS / bandwidth rows take as long to compute as
            the matrix takes to read; four times as many hide the read.
launches    Python passes a body's arguments and launches its kernels. A device with less than that to compute waits
            for its host. With ten times as many rows, launches take a tenth of a prefill's time. That is worth as many
            values of a body as its layer has weights: a tenth of all weights where there are ten layers.
wave        As many blocks of a kernel as run at once. Attention has one block for 128 rows of a head, and two blocks
            fit into a multiprocessor; a product has one block for a tile of its result. The last wave is not full.

    launches = rows whose products take as long as the host; ten times as many, up to those that hold a layer's weights
    need     = max(intensity, launches)
    rows     = the first whole number of attention's waves from `need` on in which products fill theirs well enough
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from mom_compile.config import Options
from mom_compile.memory.devices import Device, Properties, device_of
from mom_passes.loops.loop import FEWEST_OF_A_SEQUENCE, FEWEST_ROWS

#: Rows of a block of attention or of a product's tile.
BLOCK_ROWS = 128
#: How many times longer than reading a matrix the computation with it should take.
OVER_READING = 4
#: Seconds of the host for one body: AN ESTIMATE, no GPU has confirmed it. Of Llama-3-8B a body launches 7 kernels of
#: Triton (6.5 us each through `CachingAutotuner.run`, meta-pytorch/tritonbench#1016), 7 products (7 us) and one
#: attention of 1 to 30 kernels (10 to 60 us, and 13 to 119 us of Python); its loop takes 28 us
#: (`tests/no_gpu/overhead.py`), its wrapper 10: 155 to 310 us.
HOST_SECONDS = 250e-6
#: Seconds of the host for one layer of a decode step: 6 kernels of Triton, 7 products and an attention (20 us), 15 us
#: of Python.
STEP_SECONDS = 120e-6
#: How many times longer a body should compute than its host takes for it.
OVER_LAUNCHING = 10
#: The share of the peak that large products reach.
REACHED = 0.65
#: Tiles that cuBLAS has for products of 16 bits, rows and columns, and their speed relative to the largest.
TILES = ((128, 256, 1.0), (128, 128, 0.88), (64, 256, 0.85), (64, 128, 0.7))
#: How full the waves of products should be, relative to the fullest that some number of attention's waves up to twice
#: the need gives.
FULL_ENOUGH = 0.95

#: Bytes that a value of a loop with experts may take.
EXPERT_BYTES = 512 << 20

#: The bytes of a device that are left to what is not counted: one part in so many, and at least so many bytes. The
#: allocator rounds up and its segments have holes, cuBLAS keeps a workspace for each stream, and kernels are loaded.
MARGIN_SHARE, LEAST_MARGIN = 32, 256 << 20


@dataclass(frozen=True)
class Layer:
    """What a body of one layer computes.

    `heads` are the query heads (0: no attention), `products` the `(inputs, outputs)` of each product, `sequences` how
    many sequences have rows in it at once, `others` the weights of experts that a row does not choose.
    """

    heads: int
    products: tuple[tuple[int, int], ...]
    sequences: int = 1
    others: int = 0

    @property
    def parameters(self) -> int:
        """Weights that a row is multiplied with."""
        return sum(n * m for n, m in self.products)

    @property
    def values(self) -> int:
        """Values that the products make of a row: about as many as a body holds for it."""
        return sum(m for _, m in self.products)


@dataclass(frozen=True)
class Bounds:
    """Bounds on the rows of each sequence, in multiples of `step`."""

    fewest: int
    efficient: int
    most: int
    step: int = 1
    width: int = 0


@dataclass(frozen=True)
class CountedRows:
    """A device of which only the rows of products are known, over all sequences.

    `each` is the lower bound for each of several sequences: attention has no more rows than those, and each cut is
    copied. `expert_rows` are the rows that a product with one expert's matrix should have.
    """

    fewest: int
    efficient: int
    most: int
    each: int
    expert_rows: int

    def bounds(self, sequences: int) -> Bounds:
        fewest = max(FEWEST_OF_A_SEQUENCE, math.ceil(self.fewest / sequences))
        efficient = max(fewest, self.each, math.ceil(self.efficient / sequences))
        return Bounds(fewest, efficient, max(efficient, math.ceil(self.most / sequences)))


@dataclass(frozen=True)
class GpuRows:
    """A GPU and a layer. Attention has blocks of `BLOCK_ROWS` rows. Only a budget asks for fewer rows than
    `rows_for`. NEVER MEASURED."""

    device: Device
    layer: Layer
    expert_rows: int

    def bounds(self, sequences: int) -> Bounds:
        most = rows_for(self.device, replace(self.layer, sequences=sequences))
        width = torch.float32.itemsize * max(outputs for _, outputs in self.layer.products) * sequences
        return Bounds(BLOCK_ROWS, most, most, BLOCK_ROWS, width)


DeviceRows = CountedRows | GpuRows

#: Measured at the width of `benchmarks.cpu`. One thread, as CPU time relative to the quickest number of rows (torch
#: 2.13.0, a shared machine, 4 calls of each in turn, the least of each), 2 layers and 4096 tokens: 64 rows 1.47, 128
#: rows 1.24, 192 rows 1.11, 256 rows 1.04, 512 rows 1.02, 1024 and 2048 rows 1.00. 16 sequences of 256 tokens, rows of
#: each: 8 rows 1.35, 16 rows 1.13, 32 rows 1.07, 64 rows 1.00, 128 rows 1.01; stock Inductor 1.95. Two threads share
#: the rows of a product, and want twice as many (`python -m benchmarks.cpu --only rows`, docs/figures.md). More than
#: two were never measured.
ROWS_OF_A_THREAD = 256
MOST_ON_CPU = 1024

#: From the arithmetic intensity, never measured: a product of r rows with a matrix computes r FLOPs for each byte of it
#: in 16 bits, and an H100 computes 990e12 / 3.35e12 = 295 in the time in which it reads one.
EXPERT_ROWS = 300

#: Never measured.
ELSEWHERE = CountedRows(FEWEST_ROWS, 256, 1024, 32, EXPERT_ROWS)


def cpu_rows(threads: int) -> CountedRows:
    """Return the rows of a CPU that gives a product so many threads."""
    efficient = min(MOST_ON_CPU, ROWS_OF_A_THREAD * threads)
    return CountedRows(FEWEST_ROWS, efficient, MOST_ON_CPU, 32, 64)


def rows_on(type: str, gpu: Properties | None, layer: Layer | None) -> DeviceRows:
    """Return the rows of a type of device; those of a GPU follow from its properties and the layer of most loops."""
    if type == "cpu":
        return cpu_rows(torch.get_num_threads())
    if gpu is None or layer is None:
        return ELSEWHERE
    return GpuRows(device_of(gpu)[0], layer, EXPERT_ROWS)


@functools.lru_cache(maxsize=1024)
def rows_for(device: Device, layer: Layer) -> int:
    """Return the rows of a mini-sequence, of each sequence, where memory is no limit.

    Cached: each loop of a graph needs it at each length, and it compares thousands of numbers of rows for a narrow
    layer.
    """
    wave = BLOCK_ROWS * (max(1, 2 * device.multiprocessors // (layer.heads * layer.sequences)) if layer.heads else 1)
    need = max(for_intensity(device), for_launches(device, layer)) / layer.sequences
    first = math.ceil(need / wave)
    waves = range(first, 2 * first + 1)
    filled = [filled_by_products(device, layer.products, n * wave * layer.sequences) for n in waves]
    return next(n * wave for n, part in zip(waves, filled, strict=True) if part >= FULL_ENOUGH * max(filled))


def for_intensity(device: Device) -> float:
    return OVER_READING * device.flops / device.bandwidth


def for_launches(device: Device, layer: Layer) -> float:
    """Return the rows whose products take as long as the host takes for a body, so that the device never waits; and
    more, up to those that hold as much as the layer's weights, until launches take a tenth of the time."""
    as_long = HOST_SECONDS * REACHED * device.flops / (2 * layer.parameters)
    as_much = (layer.parameters + layer.others) / layer.values
    return max(as_long, min(OVER_LAUNCHING * as_long, as_much))


def filled_by_products(device: Device, products: Sequence[tuple[int, int]], rows: int) -> float:
    """Return the time of all products without gaps in their waves, relative to the time they take. Each product has
    the tiles that are quickest for it."""
    taken = sum(inputs * _computed(device, rows, outputs) for inputs, outputs in products)
    return rows * sum(n * m for n, m in products) / taken


def _computed(device: Device, rows: int, columns: int) -> float:
    """Return the values of a result that whole waves compute, in the time that the largest tile takes for one."""
    counts = [(math.ceil(rows / r) * math.ceil(columns / c), r * c / speed) for r, c, speed in TILES]
    waves = device.multiprocessors
    return min(math.ceil(tiles / waves) * waves * size for tiles, size in counts)


def properties_of(device: torch.device) -> Properties | None:
    """Return the properties of a CUDA device; None for any other. Raises what CUDA raises where there is none."""
    if device.type != "cuda":
        return None
    found = torch.cuda.get_device_properties(device)
    return Properties(found.name, found.multi_processor_count, found.major * 10 + found.minor)


def available_bytes(device: torch.device, weights: int) -> int:
    """Return the bytes that a graph may use of a CUDA device, including its `weights`, which are there already.

        free + (reserved - allocated) + weights - margin

    Memory that PyTorch has reserved and not allocated counts as free. Allocated memory does not: besides the weights
    it holds other models, other caches and the caller's tensors.
    """
    free, total = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(free + cached + weights - max(LEAST_MARGIN, total // MARGIN_SHARE))


def budget_of(options: Options, device: torch.device, weights: int) -> int:
    """Return the bytes of the device for everything: `memory_budget`, or those that are available."""
    return available_bytes(device, weights) if options.budget_bytes is None else options.budget_bytes
