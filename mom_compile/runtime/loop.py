"""A loop over mini-sequences around a compiled body that writes its rows where they belong."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch

from mom_compile.torch_compat import view_of
from mom_passes.graph.sizes import Size
from mom_passes.loops.loop import split_rows
from mom_passes.loops.ports import CarryIn, CarryOut, In, Out, RowsIn, Stored, TensorType
from mom_passes.rules import Dim


@dataclass(frozen=True)
class Sizes:
    """What sizes are in a run: numbers, or functions of the values of the loop's symbols in order."""

    functions: Mapping[sympy.Expr, Callable[[tuple[int, ...]], int]]

    def value(self, size: Size, symbols: tuple[int, ...]) -> int:
        return size if isinstance(size, int) else int(self.functions[size](symbols))

    def shape(self, type: TensorType, symbols: tuple[int, ...]) -> list[int]:
        return [self.value(size, symbols) for size in type.shape]


@dataclass(frozen=True)
class CompiledLoop:
    """`loop([*symbols, *asked, length, *operands])` returns one tensor for each output.

    `body` takes `[*symbols, start, count, *inputs, *rows of what is stored, *next of each carry]` and fills these rows
    and carries, except for what is written over an operand: this it writes to the operand's rows. A carry has two
    places, of which one is read and one filled in turn. If it has a `check`, this is shown what the first mini-sequence
    is given: what the others are given is laid out alike.
    Of the loop's symbols it is passed the first `body_symbols` (the others only give shapes), and the inputs that are
    `turned` transposed. Its mini-sequences have as many `rows` as are given, or as are said for the run's sizes that it
    is `asked` with, so many.
    """

    body: Callable[[list[Any]], Any]
    rows: int | Callable[[tuple[int, ...]], int]
    symbols: int
    body_symbols: int
    inputs: tuple[In, ...]
    outputs: tuple[Out, ...]
    sizes: Sizes
    turned: tuple[int, ...] = ()
    asked: int = 0

    def __call__(self, arguments: list[Any]) -> tuple[torch.Tensor, ...]:
        symbols = tuple(arguments[: self.symbols])
        asked = tuple(arguments[self.symbols : self.symbols + self.asked])
        length, *operands = arguments[self.symbols + self.asked :]
        arguments.clear()
        for i in self.turned:
            operands[i] = view_of(operands[i], operands[i].shape[::-1], operands[i].stride()[::-1], 0)
        carried = {i: port for i, port in enumerate(self.inputs) if isinstance(port, CarryIn)}
        for i, port in carried.items():
            operands[i] = _own(operands[i], port.type)
        results: list[Any] = [
            self._place(output, operands, symbols) if isinstance(output, Stored) else None for output in self.outputs
        ]
        template = [*symbols[: self.body_symbols], 0, 0, *operands]
        first = len(template) - len(operands)
        read = [(i, port.dim) for i, port in enumerate(self.inputs) if isinstance(port, RowsIn)]
        folded = {first + i: self._along(dim, operands[i], symbols) for i, dim in read if not dim.plain}
        rows = [(first + i, _Cut(operands[i], dim.index, length)) for i, dim in read if dim.plain]
        # What is filled next, by where the body is given the carry.
        ahead = {first + i: torch.empty_like(operands[i]) for i in carried}
        del operands
        new = [(output, result) for output, result in zip(self.outputs, results, strict=True) if _is_new(output)]
        places = [_Cut(*self._along(output.dim, result, symbols), length) for output, result in new]  # type: ignore[union-attr]
        check = getattr(self.body, "check", None)
        for start, count in split_rows(length, self.rows(asked) if callable(self.rows) else self.rows):
            given = list(template)
            given[first - 2], given[first - 1] = start, count
            for at, cut in rows:
                given[at] = cut.rows(start, count)
            for at, (tensor, index) in folded.items():
                given[at] = _folded(tensor, index, start, count)
            given += [cut.rows(start, count) for cut in places]
            given += ahead.values()
            if check is not None:
                check(given)
                check = None
            self.body(given)
            for at in ahead:
                template[at], ahead[at] = ahead[at], template[at]
        return tuple(
            template[first + output.carry] if isinstance(output, CarryOut) else result
            for output, result in zip(self.outputs, results, strict=True)
        )

    def _place(self, output: Stored, operands: Sequence[Any], symbols: tuple[int, ...]) -> torch.Tensor:
        if output.over is not None:
            return operands[output.over]  # type: ignore[no-any-return]
        type = output.type
        return torch.empty_permuted(self.sizes.shape(type, symbols), type.dense, dtype=type.dtype, device=type.device)

    def _along(self, dim: Dim, tensor: torch.Tensor, symbols: tuple[int, ...]) -> tuple[torch.Tensor, int]:
        """A tensor with its tokens in a dimension of their own, and which dimension."""
        if dim.plain:
            return tensor, dim.index
        outer, inner = (self.sizes.value(size, symbols) for size in (dim.outer, dim.inner))
        return tensor.unflatten(dim.index, (outer, -1, inner)), dim.index + 1


class _Cut:
    """Views of a tensor's rows, as `narrow` makes them, in half its time: what does not change is kept.

    Raises `IndexError` for a tensor with fewer rows than `length`: nobody asks for more of them.
    """

    __slots__ = ("count", "index", "shape", "step", "strides", "tensor")

    def __init__(self, tensor: torch.Tensor, index: int, length: int) -> None:
        self.tensor, self.index, self.count = tensor, index, -1
        self.shape, self.strides = tuple(tensor.shape), tensor.stride()
        self.step = self.strides[index]
        if self.shape[index] < length:
            raise IndexError(f"dimension {index} of {list(self.shape)} has fewer rows than the {length} of its loop")

    def rows(self, start: int, count: int) -> torch.Tensor:
        if count != self.count:
            self.count, self.shape = count, (*self.shape[: self.index], count, *self.shape[self.index + 1 :])
        return view_of(self.tensor, self.shape, self.strides, start * self.step)


def _is_new(output: Out) -> bool:
    return isinstance(output, Stored) and output.over is None


def _own(first: torch.Tensor, type: TensorType) -> torch.Tensor:
    """A carry's storage, which begins as the operand: this stays as it is."""
    return torch.empty_permuted(first.shape, type.dense, dtype=first.dtype, device=first.device).copy_(first)


def _folded(unfolded: torch.Tensor, index: int, start: int, count: int) -> torch.Tensor:
    """Rows of an `outer x tokens x inner` layout, folded back into one contiguous dimension."""
    return unfolded.narrow(index, start, count).contiguous().flatten(index - 1, index + 1)
