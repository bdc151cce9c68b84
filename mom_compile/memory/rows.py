"""How many rows a mini-sequence should have on a GPU: a rule of what is known of devices and models. NEVER MEASURED.

What a graph's layers are, and which of its loops get these rows, says `layer_rows`.

Terms
-----
intensity   A product with a matrix reads each of its values once for all rows, and computes two operations with it for
            each row: in 16 bits one operation for each byte and row. FLOPS / bandwidth rows take as long to compute as
            the matrix takes to read, four times as many hide that.
launches    Python passes a body's arguments and launches its kernels; the device must have as long to compute.
wave        As many blocks of a kernel as run at once. Attention has one block for 128 rows of a head, two of which fit
            into a multiprocessor; a product has one for a tile of its result. The last wave of each is not full.

    need = the most of intensity, launches
    rows = the first whole number of attention's waves from `need` on in which products fill theirs well enough
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mom_compile.memory.devices import Device

#: Rows of a block of attention or of a product's tile.
BLOCK_ROWS = 128
#: Times over that computing with a matrix takes as long as reading it.
OVER_READING = 4
#: Seconds of the host for one body. 107 microseconds of Python were measured with the launches stubbed, of a whole call
#: on a slow core (torch 2.13.0). A body's time in its loop alone has gone from 41 to 29 microseconds since, on
#: a faster one (`tests/no_gpu/overhead.py`); launches come on top, which nobody has measured: it stays until then.
HOST_SECONDS = 107e-6
#: Of the peak, what large products reach.
REACHED = 0.65
#: Tiles that cuBLAS has for products of 16 bits, rows and columns, and how fast each is beside the largest.
TILES = ((128, 256, 1.0), (128, 128, 0.88), (64, 256, 0.85), (64, 128, 0.7))
#: How full the waves of products should be, beside the fullest that some number of attention's waves up to twice the
#: need gives.
FULL_ENOUGH = 0.95


@dataclass(frozen=True)
class Layer:
    """What a body of one layer computes: query heads (0: it attends to nothing), its products as `(inputs, outputs)`,
    and how many sequences it has rows of at once."""

    heads: int
    products: tuple[tuple[int, int], ...]
    sequences: int = 1

    @property
    def parameters(self) -> int:
        return sum(n * m for n, m in self.products)


def rows_for(device: Device, layer: Layer) -> int:
    """Rows of a mini-sequence, of each sequence, where memory is no limit (see `choose_rows`)."""
    wave = BLOCK_ROWS * (max(1, 2 * device.multiprocessors // (layer.heads * layer.sequences)) if layer.heads else 1)
    need = max(for_intensity(device), for_launches(device, layer)) / layer.sequences
    first = math.ceil(need / wave)
    waves = range(first, 2 * first + 1)
    filled = [filled_by_products(device, layer.products, n * wave * layer.sequences) for n in waves]
    return next(n * wave for n, part in zip(waves, filled, strict=True) if part >= FULL_ENOUGH * max(filled))


def for_intensity(device: Device) -> float:
    return OVER_READING * device.flops / device.bandwidth


def for_launches(device: Device, layer: Layer) -> float:
    """Rows whose products alone take as long as the host does for a body."""
    return HOST_SECONDS * REACHED * device.flops / (2 * layer.parameters)


def filled_by_products(device: Device, products: Sequence[tuple[int, int]], rows: int) -> float:
    """Time of all products if no wave had a gap, beside what they take; each has the tiles that are quickest for it."""
    taken = sum(inputs * _computed(device, rows, outputs) for inputs, outputs in products)
    return rows * sum(n * m for n, m in products) / taken


def _computed(device: Device, rows: int, columns: int) -> float:
    """Values of a result that whole waves compute, in the time that the largest tile takes for one."""
    counts = [(math.ceil(rows / r) * math.ceil(columns / c), r * c / speed) for r, c, speed in TILES]
    waves = device.multiprocessors
    return min(math.ceil(tiles / waves) * waves * size for tiles, size in counts)
