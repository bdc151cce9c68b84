"""How many rows a mini-sequence should have on a GPU: a rule of what is known of devices and models. NEVER MEASURED.

What a graph's layers are, and which of its loops get these rows, says `layer_rows`.

Terms
-----
intensity   A product with a matrix reads each of its values once for all rows, and computes two operations with it for
            each row: in 16 bits one operation for each byte and row. FLOPS / bandwidth rows take as long to compute as
            the matrix takes to read, four times as many hide that.
launches    Python passes a body's arguments and launches its kernels. A device with less than that to compute waits
            for its host. With ten times as much, launches take a tenth of the time of a prefill: worth as many values
            of a body as its layer has weights, which is a tenth of them all where there are ten layers.
wave        As many blocks of a kernel as run at once. Attention has one block for 128 rows of a head, two of which fit
            into a multiprocessor; a product has one for a tile of its result. The last wave of each is not full.

    launches = rows whose products take as long as the host; ten times as many, up to those that hold a layer's weights
    need     = the most of intensity, launches
    rows     = the first whole number of attention's waves from `need` on in which products fill theirs well enough
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
#: Seconds of the host for one body: AN ESTIMATE, no GPU has confirmed it. Of Llama-3-8B a body launches 7 kernels of
#: Triton (6.5 us each through `CachingAutotuner.run`, meta-pytorch/tritonbench#1016), 7 products (7 us) and one
#: attention of 1 to 30 kernels (10 to 60 us, and 13 to 119 us of Python); its loop takes 28 us
#: (`tests/no_gpu/overhead.py`), its wrapper 10: 155 to 310 us.
HOST_SECONDS = 250e-6
#: The same for one layer of a decode step: 6 kernels of Triton, 7 products and an attention (20 us), 15 us of Python.
STEP_SECONDS = 120e-6
#: Times over that a body should compute as long as its host takes for it.
OVER_LAUNCHING = 10
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
    how many sequences it has rows of at once, and how many weights there are beside those of the products: of experts
    that a row does not choose."""

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
        """What the products make of a row: about as many values as a body holds for it."""
        return sum(m for _, m in self.products)


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
    """Rows whose products alone take as long as the host does for a body, so that the device never waits; and more, up
    to those that hold as much as the layer's weights, until launches take a tenth of the time."""
    as_long = HOST_SECONDS * REACHED * device.flops / (2 * layer.parameters)
    as_much = (layer.parameters + layer.others) / layer.values
    return max(as_long, min(OVER_LAUNCHING * as_long, as_much))


def filled_by_products(device: Device, products: Sequence[tuple[int, int]], rows: int) -> float:
    """Time of all products if no wave had a gap, beside what they take; each has the tiles that are quickest for it."""
    taken = sum(inputs * _computed(device, rows, outputs) for inputs, outputs in products)
    return rows * sum(n * m for n, m in products) / taken


def _computed(device: Device, rows: int, columns: int) -> float:
    """Values of a result that whole waves compute, in the time that the largest tile takes for one."""
    counts = [(math.ceil(rows / r) * math.ceil(columns / c), r * c / speed) for r, c, speed in TILES]
    waves = device.multiprocessors
    return min(math.ceil(tiles / waves) * waves * size for tiles, size in counts)
