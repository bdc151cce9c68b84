"""A loop over mini-sequences around a compiled body that writes its rows where they belong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from mom_passes.loops.loop import split_rows
from mom_passes.rules.folds import combine

#: A size that may depend on the graph's symbols: a constant, or a function of their values in order.
SizeOf = int | Callable[[tuple[int, ...]], int]


def evaluate(size: SizeOf, symbols: tuple[int, ...]) -> int:
    return size if isinstance(size, int) else int(size(symbols))


@dataclass(frozen=True)
class RowsOf:
    """Rows of a tensor whose dimension `index` is `outer x tokens x inner`."""

    index: int
    outer: SizeOf = 1
    inner: SizeOf = 1
    plain: bool = True

    def unfolded(self, tensor: torch.Tensor, symbols: tuple[int, ...]) -> torch.Tensor:
        return tensor.unflatten(self.index, (evaluate(self.outer, symbols), -1, evaluate(self.inner, symbols)))


@dataclass(frozen=True)
class StoredRows:
    """A value the loop stores: its full shape, and its dimensions from the outermost in storage to the innermost.

    With `takes_over`, it is written to the storage of that sliced operand instead of to its own.
    """

    rows: RowsOf
    shape: tuple[SizeOf, ...]
    order: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    takes_over: int | None = None

    def allocate(self, symbols: tuple[int, ...]) -> torch.Tensor:
        shape = [evaluate(size, symbols) for size in self.shape]
        return torch.empty_permuted(shape, self.order, dtype=self.dtype, device=self.device)


@dataclass(frozen=True)
class FoldedParts:
    """A reduction over the tokens: the shape of one mini-sequence's part, and the reduction that combines them."""

    operator: Any
    shape: tuple[SizeOf, ...]
    dtype: torch.dtype
    device: torch.device

    def allocate(self, pieces: int, symbols: tuple[int, ...]) -> torch.Tensor:
        shape = [evaluate(size, symbols) for size in self.shape]
        return torch.empty([pieces, *shape], dtype=self.dtype, device=self.device)


@dataclass(frozen=True)
class CompiledLoop:
    """`loop([*symbols, length, *sizes, *sliced, *whole])` returns the stored values at full length, then the folded.

    `body` takes `[*symbols, start, count, *sizes, *rows of sliced, *whole, *rows of stored, *parts]` and fills the
    last two, except for what takes over an operand: this it writes to the operand's rows;
    of the loop's symbols it is passed the first `body_symbols` (the others only give shapes).
    """

    body: Callable[[list[Any]], Any]
    mini_seq_len: int
    symbols: int
    body_symbols: int
    sizes: int
    sliced: tuple[RowsOf, ...]
    stored: tuple[StoredRows, ...]
    folded: tuple[FoldedParts, ...]

    def __call__(self, arguments: list[Any]) -> tuple[torch.Tensor, ...]:
        symbols = tuple(arguments[: self.symbols])
        length = arguments[self.symbols]
        sizes_end = self.symbols + 1 + self.sizes
        sizes = arguments[self.symbols + 1 : sizes_end]
        sliced = arguments[sizes_end : sizes_end + len(self.sliced)]
        whole = arguments[sizes_end + len(self.sliced) :]
        arguments.clear()
        known = symbols[: self.body_symbols]
        stored = [
            value.allocate(symbols) if value.takes_over is None else sliced[value.takes_over] for value in self.stored
        ]
        sources = [self._source(rows, tensor, symbols) for rows, tensor in zip(self.sliced, sliced, strict=True)]
        del sliced
        targets = [
            (tensor, value.rows.index) if value.rows.plain
            else (value.rows.unfolded(tensor, symbols), value.rows.index + 1)
            for tensor, value in zip(stored, self.stored, strict=True)
            if value.takes_over is None
        ]  # fmt: skip
        pieces = split_rows(length, self.mini_seq_len)
        parts = [fold.allocate(len(pieces), symbols) for fold in self.folded]
        for i, (start, count) in enumerate(pieces):
            rows = [
                tensor.narrow(index, start, count) if plain else _folded(tensor, index, start, count)
                for tensor, index, plain in sources
            ]
            places = [tensor.narrow(index, start, count) for tensor, index in targets]
            self.body([*known, start, count, *sizes, *rows, *whole, *places, *(part[i] for part in parts)])
        return (*stored, *(combine(f.operator, part) for f, part in zip(self.folded, parts, strict=True)))

    @staticmethod
    def _source(rows: RowsOf, tensor: torch.Tensor, symbols: tuple[int, ...]) -> tuple[torch.Tensor, int, bool]:
        if rows.plain:
            return tensor, rows.index, True
        return rows.unfolded(tensor, symbols), rows.index + 1, False


def _folded(unfolded: torch.Tensor, index: int, start: int, count: int) -> torch.Tensor:
    """Rows of an `outer x tokens x inner` layout, folded back into one contiguous dimension."""
    return unfolded.narrow(index, start, count).contiguous().flatten(index - 1, index + 1)
