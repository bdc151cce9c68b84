"""A loop over mini-sequences around a compiled body that writes its rows in place."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch

from mom_compile.runtime.parted import PartedBody, run_in_turns
from mom_compile.torch_compat.tensors import view_of
from mom_passes.graph.sizes import Size
from mom_passes.loops.loop import split_between, split_rows
from mom_passes.loops.ports import CarryIn, CarryOut, In, Out, RowsIn, Stored, TensorType
from mom_passes.rules import Dim


@dataclass(frozen=True)
class Sizes:
    """Values of sizes in a run: numbers, or functions of the values of the loop's symbols, in order."""

    functions: Mapping[sympy.Expr, Callable[[tuple[int, ...]], int]]

    def value(self, size: Size, symbols: tuple[int, ...]) -> int:
        return size if isinstance(size, int) else int(self.functions[size](symbols))

    def shape(self, type: TensorType, symbols: tuple[int, ...]) -> list[int]:
        return [self.value(size, symbols) for size in type.shape]


@dataclass(frozen=True)
class CompiledLoop:
    """`loop([*symbols, *size_arguments, length, *operands])` returns one tensor for each output.

    `body` takes `[*symbols, start, count, *inputs, *rows of stored outputs, *next of each carry]` and fills these rows
    and carries. An output that overwrites an operand is written to the operand's rows instead. A carry has two buffers,
    one read and one written, which are swapped for each mini-sequence. If the body has a `check`, it is called with
    the arguments of the first mini-sequence; those of the others have the same layout. A `PartedBody` may have several
    mini-sequences in flight.

    The body gets the first `body_symbols` of the loop's symbols (the others only occur in shapes), and the inputs
    `turned` are transposed for it. `rows` is the length of a mini-sequence, or a function of the run's `asked` sizes.
    Mini-sequences cut no range of the inputs `within`.
    """

    body: Callable[[list[Any]], Any] | PartedBody
    rows: int | Callable[[tuple[int, ...]], int]
    symbols: int
    body_symbols: int
    inputs: tuple[In, ...]
    outputs: tuple[Out, ...]
    sizes: Sizes
    turned: tuple[int, ...] = ()
    asked: int = 0
    within: tuple[int, ...] = ()

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
        # The next value of each carry, by the argument index of the carry.
        ahead = {first + i: torch.empty_like(operands[i]) for i in carried}
        most = self.rows(asked) if callable(self.rows) else self.rows
        ranges = [operands[i] for i in self.within]
        pieces = split_between(ranges, length, most) if ranges else split_rows(length, most)
        del operands, ranges
        new = [(output, result) for output, result in zip(self.outputs, results, strict=True) if _is_new(output)]
        places = [_Cut(*self._along(output.dim, result, symbols), length) for output, result in new]  # type: ignore[union-attr]

        def mini_sequences() -> Iterator[list[Any]]:
            for start, count in pieces:
                given = list(template)
                given[first - 2], given[first - 1] = start, count
                for at, cut in rows:
                    given[at] = cut.rows(start, count)
                for at, (tensor, index) in folded.items():
                    given[at] = _folded(tensor, index, start, count)
                given += [cut.rows(start, count) for cut in places]
                given += ahead.values()
                for at in ahead:
                    template[at], ahead[at] = ahead[at], template[at]
                yield given

        self._run(mini_sequences())
        return tuple(
            template[first + output.carry] if isinstance(output, CarryOut) else result
            for output, result in zip(self.outputs, results, strict=True)
        )

    def _run(self, mini_sequences: Iterator[list[Any]]) -> None:
        if isinstance(self.body, PartedBody):
            checks = itertools.chain([True], itertools.repeat(False))
            run_in_turns(map(self.body.turns, mini_sequences, checks), self.body.in_flight)
            return
        check = getattr(self.body, "check", None)
        for given in mini_sequences:
            if check is not None:
                check(given)
                check = None
            self.body(given)

    def _place(self, output: Stored, operands: Sequence[Any], symbols: tuple[int, ...]) -> torch.Tensor:
        if output.over is not None:
            return operands[output.over]  # type: ignore[no-any-return]
        type = output.type
        return torch.empty_permuted(self.sizes.shape(type, symbols), type.dense, dtype=type.dtype, device=type.device)

    def _along(self, dim: Dim, tensor: torch.Tensor, symbols: tuple[int, ...]) -> tuple[torch.Tensor, int]:
        """Return the tensor with its tokens in a separate dimension, and the index of that dimension."""
        if dim.plain:
            return tensor, dim.index
        outer, inner = (self.sizes.value(size, symbols) for size in (dim.outer, dim.inner))
        return tensor.unflatten(dim.index, (outer, -1, inner)), dim.index + 1


class _Cut:
    """Views of a tensor's rows, in half the time of `narrow`: values that do not change are cached.

    Raises `IndexError` for a tensor with fewer rows than `length`.
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
    """Return a new storage for a carry, initialized from the operand, which is not changed."""
    return torch.empty_permuted(first.shape, type.dense, dtype=first.dtype, device=first.device).copy_(first)


def _folded(unfolded: torch.Tensor, index: int, start: int, count: int) -> torch.Tensor:
    """Return rows of an `outer x tokens x inner` layout, folded into one contiguous dimension."""
    return unfolded.narrow(index, start, count).contiguous().flatten(index - 1, index + 1)
