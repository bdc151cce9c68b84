"""`mom::scored` in blocks of the vocabulary, so that at most one block of logits exists at a time.

Terms
-----
block       Some rows by some columns of the logits, in a buffer shared by all blocks. On a CPU it fits into a cache, so
            reading it several times costs little compared to the matrix product that computes it.
running     State of each row over the blocks so far: the largest logit, and sums of exp(x - shift), which are rescaled
            when the largest logit grows. Sums of a block have the logits' dtype, sums over blocks are float64.

    for block of columns:
        x        = steps(product of the rows with these columns)
        chosen   = x at the targets that are in the block
        top      = the larger of top and x's
        total    = total * exp(old shift - shift) + sum(exp(x - shift))
        weighted = (weighted + (old shift - shift) * total) * exp(old shift - shift) + sum(exp(x - shift) * (x - shift))

This has never run on a CUDA device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from mom_compile.torch_compat.tensors import assert_later
from mom_passes.ops.scored import (
    DTYPES,
    GREEDY,
    TOTAL,
    WITH_NUMBER,
    Results,
    ScoredCall,
    as_operator,
    below,
    block_bytes,
    element_bytes,
    shift_of,
)

#: The fewest columns of a block, if the vocabulary has as many: products with fewer columns are slower.
FEWEST_COLUMNS = 256

#: Rows are searched one by one if they are at most 1 / FEW_ROWS of a block's rows.
FEW_ROWS = 16


def scored_in_blocks(call: ScoredCall) -> Results:
    """See `mom_passes.ops.scored` for shapes and meaning. Raises `IndexError` for a target outside the columns."""
    hidden = call.hidden.reshape(-1, call.hidden.shape[-1])
    targets = None if call.targets is None else call.targets.reshape(-1, call.targets.shape[-1])
    if targets is not None:
        _check(targets, call.columns)
    results = call.results()
    flat = [result.view(len(hidden), -1) if result.numel() else result.new_empty(len(hidden), 0) for result in results]
    size = _Size.of(call, len(hidden))
    buffers = _Buffers(call, size)
    for first in range(0, len(hidden), size.rows):
        rows = slice(first, first + size.rows)
        state = _Running(call, hidden[rows], None if targets is None else targets[rows], buffers)
        for start in range(0, call.columns, size.columns):
            state.add(start, min(size.columns, call.columns - start))
        for result, found in zip(flat, state.results(), strict=True):
            if found is not None:
                result[rows] = found
    return results


def _check(targets: torch.Tensor, columns: int) -> None:
    wrong = ((targets < 0) | (targets >= columns)).any()
    if targets.device.type == "cpu":
        if wrong:
            low, high = (int(bound) for bound in torch.aminmax(targets))
            raise IndexError(f"targets from {low} to {high} are out of range for logits with {columns} columns")
    else:
        assert_later(~wrong, f"a target is out of range for {columns} columns")


@dataclass(frozen=True)
class _Size:
    """The largest size of a block."""

    rows: int
    columns: int

    @staticmethod
    def of(call: ScoredCall, rows: int) -> _Size:
        elements = block_bytes(call.hidden.device.type) // element_bytes(call.dtypes, call.weighs)
        most = max(1, min(rows, elements // min(FEWEST_COLUMNS, call.columns)))
        return _Size(most, max(1, min(call.columns, elements // most)))


class _Buffers:
    """A block in each of its dtypes, and its exponentials."""

    def __init__(self, call: ScoredCall, size: _Size) -> None:
        def new(dtype: torch.dtype) -> torch.Tensor:
            return call.hidden.new_empty(size.rows * size.columns, dtype=dtype)

        self.of = {dtype: new(dtype) for dtype in call.dtypes}
        self.likelihood = new(call.wide) if call.weighs else self.of[call.wide]


def _shaped(buffer: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    return buffer[: rows * columns].view(rows, columns)


class _Running:
    """State of some rows over the blocks so far."""

    def __init__(
        self, call: ScoredCall, hidden: torch.Tensor, targets: torch.Tensor | None, buffers: _Buffers
    ) -> None:
        self.call, self.hidden, self.targets, self.buffers = call, hidden, targets, buffers
        rows = (len(hidden), 1)
        self.top = hidden.new_full(rows, -torch.inf, dtype=call.wide)
        self.shift = hidden.new_zeros(rows, dtype=torch.float64)
        self.total = self.shift.clone()
        self.weighted = self.shift.clone()
        self.best = hidden.new_zeros(rows, dtype=torch.int64)
        self.chosen = None if targets is None else self.top.new_zeros(targets.shape)

    def add(self, start: int, count: int) -> None:
        """Add columns `[start, start + count)`."""
        x = self._logits(start, count)
        if self.targets is not None and self.chosen is not None:
            inside = (self.targets >= start) & (self.targets < start + count)
            found = x.gather(1, (self.targets - start).clamp_(0, count - 1))
            self.chosen = torch.where(inside, found, self.chosen)
        top = x.amax(1, keepdim=True)
        if GREEDY in self.call.wants:
            self._update_best(x, top, start)
        self.top = torch.maximum(self.top, top)
        if TOTAL in self.call.wants or self.call.weighs:
            self._sum(x)

    def results(self) -> Iterator[torch.Tensor | None]:
        wants = self.call.wants
        yield self.top
        yield self.shift if TOTAL in wants or self.call.weighs else shift_of(self.top).double()
        yield self.total if TOTAL in wants else None
        yield self.weighted if self.call.weighs else None
        yield self.chosen
        yield self.best if GREEDY in wants else None

    def _logits(self, start: int, count: int) -> torch.Tensor:
        call, rows = self.call, len(self.hidden)
        x = _shaped(self.buffers.of[self.hidden.dtype], rows, count)
        matrix = call.matrix[:, start : start + count]
        if call.bias is None:
            torch.mm(self.hidden, matrix, out=x)
        else:
            torch.addmm(call.bias[start : start + count], self.hidden, matrix, out=x)
        for step, number in zip(call.steps, call.numbers, strict=True):
            if step not in DTYPES:
                getattr(x, f"{step}_")(*([number] if step in WITH_NUMBER else []))
            elif DTYPES[step] != x.dtype:
                x = _shaped(self.buffers.of[DTYPES[step]], rows, count).copy_(x)
        return x if x.dtype == call.wide else _shaped(self.buffers.of[call.wide], rows, count).copy_(x)

    def _update_best(self, x: torch.Tensor, top: torch.Tensor, start: int) -> None:
        """Update the first column of the largest logit, or of the first NaN, in rows where the block has a larger one.

        After a few blocks there are few such rows.
        """
        larger = ~(top <= self.top) & ~self.top.isnan()
        if start == 0:
            larger = torch.ones_like(larger)
        if x.device.type != "cpu":
            self.best = torch.where(larger, x.argmax(1, keepdim=True) + start, self.best)
            return
        rows = larger.squeeze(1).nonzero().squeeze(1).tolist()
        if len(rows) * FEW_ROWS > len(x):
            self.best = torch.where(larger, x.argmax(1, keepdim=True) + start, self.best)
            return
        for row in rows:
            self.best[row] = x[row].argmax() + start

    def _sum(self, x: torch.Tensor) -> None:
        """Add the block's exponentials to the sums. Overwrites the block."""
        shift = shift_of(self.top).double()
        # Without a finite logit so far, the sums are 0 or NaN, and the shift may grow or shrink.
        change = (self.shift - shift).clamp_(max=0.0)
        scale, self.shift = change.exp(), shift
        lower = below(x, shift.to(x.dtype), self.call.wants)
        likelihood = torch.exp(lower, out=_shaped(self.buffers.likelihood, *x.shape))
        more = likelihood.sum(1, keepdim=True)
        if self.call.weighs:
            moved = torch.where(change < 0, change * self.total, 0.0)  # 0 * inf would be NaN
            self.weighted = (self.weighted + moved) * scale + likelihood.mul_(lower).sum(1, keepdim=True)
        self.total = self.total * scale + more


LIBRARY = torch.library.Library("mom", "IMPL")
for _device in ("CPU", "CUDA"):
    LIBRARY.impl("scored", as_operator(scored_in_blocks), _device)
