"""How many rows the mini-sequences of each loop have, from the program's memory model: one rule for every device.

Terms
-----
full      Bytes of what lives at full length at the peak: the most, over the steps, of `kept` (see `model`).
room      Bytes that a mini-sequence may hold: a tenth of `full`. More rows than fit cost memory, fewer cost time.
bounds    Between how many rows the device is efficient (see `device`).

    room = SHARE * full
    rows = as many as there is room for, between the fewest that are efficient and the most that help
           fewer, down to the fewest of all, if a value that is wider than the device's layer (logits) would take more
           than `VALUE_BYTES`
           fewer, down to the fewest of all, if even the efficient rows of such a loop would hold more than `full`, and
           the loop is long
           for experts, as many as give each expert's product the rows that it should have
           at least the longest packed sequence, in a loop that must not cut one

Sizes are those of a run: a graph that was captured for all lengths has other rows for each. Rows are counted over all
sequences of a batch. They are evened out over the mini-sequences where the device does not want a multiple.
"""

from __future__ import annotations

import math

from mom_compile.memory.device import EXPERT_BYTES, Bounds, DeviceRows
from mom_compile.memory.model import LoopSizes, Model, StepSizes

#: The share of what lives at full length that a mini-sequence may hold.
SHARE = 0.1

#: Bytes that one value of a mini-sequence may take: 128 rows of logits over a vocabulary of 262,144 in float32. A
#: product as wide as that is bound by arithmetic with 128 rows, not by reading the weights.
VALUE_BYTES = 128 << 20

#: The fewest mini-sequences of a loop whose experts ask for longer ones.
FEWEST_ITERATIONS = 4

#: A loop of so many mini-sequences of efficient rows is long. A mini-sequence of a shorter one holds little.
LONG = 8


def rows_of_steps(
    model: Model, device: DeviceRows | None, sizes: tuple[int, ...], full: int | None = None
) -> tuple[int, ...]:
    """Return the rows of each step without a budget; 0 for a step that is no loop.

    Without a device, loops keep their rows. `full` are the bytes at full length, if not those of this program.
    """
    full = model.full(sizes) if full is None else full
    return tuple(0 if s.loop is None else _rows(s, s.loop, device, sizes, full) for s in model.steps)


def fewest_rows(model: Model, device: DeviceRows | None, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Return the lower bound of each step's rows under any budget."""
    return tuple(
        0 if step.loop is None
        else step.loop.rows if device is None
        else max(step.loop.unbroken, device.bounds(step.loop.sequences(sizes)).fewest)
        for step in model.steps
    )  # fmt: skip


def multiple_of(loop: LoopSizes, device: DeviceRows | None, sizes: tuple[int, ...]) -> int:
    """Return the number that the rows of a loop are a multiple of."""
    return 1 if device is None else device.bounds(loop.sequences(sizes)).step


def _rows(step: StepSizes, loop: LoopSizes, device: DeviceRows | None, sizes: tuple[int, ...], full: int) -> int:
    if device is None:
        return loop.rows
    sequences, length = loop.sequences(sizes), loop.length(sizes)
    bounds, row_bytes = device.bounds(sequences), step.row_bytes(sizes)
    widest = step.widest(loop, sizes)
    wide = widest > bounds.width
    rows = _within(bounds, row_bytes, full, wide and length >= LONG * bounds.efficient)
    if loop.spread > 1:
        wanted = math.ceil(device.expert_rows * loop.spread / sequences)
        rows = min(max(rows, min(wanted, length // FEWEST_ITERATIONS)), EXPERT_BYTES // widest)
        return max(bounds.fewest, loop.unbroken, rows // bounds.step * bounds.step)
    if wide:
        rows = min(rows, max(bounds.fewest, VALUE_BYTES // widest // bounds.step * bounds.step))
    return max(loop.unbroken, evened(length, rows, bounds))


def _within(bounds: Bounds, row_bytes: int, full: int, long: bool) -> int:
    room = int(SHARE * full) // row_bytes // bounds.step * bounds.step
    if room < bounds.efficient and bounds.efficient * row_bytes > full and long:
        return max(bounds.fewest, full // row_bytes // bounds.step * bounds.step)
    return min(bounds.most, max(bounds.efficient, room))


def evened(length: int, rows: int, bounds: Bounds) -> int:
    """Return as many rows, or a few more, that divide a length into mini-sequences of nearly one length: a short last
    one is not efficient. Return all rows if there are no two such mini-sequences; with a step, if the second of two
    would have less than half of the rows."""
    if bounds.step > 1:
        return rows if 2 * length >= 3 * rows else max(rows, math.ceil(length / bounds.step) * bounds.step)
    return max(rows, math.ceil(length / max(1, length // rows)))
