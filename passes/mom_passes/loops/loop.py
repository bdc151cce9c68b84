"""A loop over mini-sequences, and a module that runs it eagerly.

Terms
-----
mini-sequence   The consecutive tokens of one iteration. All have the same length except the last ones, which may be
                shorter, unless the loop is cut between packed sequences. None is a single row, because compiled code
                specialises on size one.
body            One iteration as a graph: `(start, count, *inputs) -> (*rows, *carries)` (see `ports`).

    stored, total = loop(length, *operands)         one operand per input
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from mom_passes.graph.sizes import Size
from mom_passes.loops.ports import CarryIn, CarryOut, In, Out, RowsIn, Stored
from mom_passes.rules import Dim
from mom_passes.rules.slicing import put, take

#: The fewest rows per mini-sequence, over all sequences of a batch: smaller matrix products are slow on any device.
FEWEST_ROWS = 128

#: The fewest rows per sequence of a batch. Rows of several sequences are no matrix with one row stride, so they are
#: copied; with fewer rows per sequence the copies dominate.
FEWEST_OF_A_SEQUENCE = 8


@dataclass(frozen=True)
class RowLimit:
    """The number of rows per mini-sequence.

    rows      at most this many rows of each sequence
    fewest    `rows` is instead the minimum, counted over all sequences of a batch. Graphs with at least twice as many
              rows get loops, and the memory model chooses their rows once the graph is rewritten
    """

    rows: int
    fewest: bool = False

    def of_groups(self, size: int) -> RowLimit:
        """Return the same limit counted in groups of so many rows. A minimum is counted in rows of products anyway."""
        return self if self.fewest or size == 1 else RowLimit(max(2, self.rows // size))

    def fits(self, length: int, sequences: int = 1) -> bool:
        """Whether `length` tokens of each sequence fit into one mini-sequence, so that no loop is needed."""
        if not self.fewest:
            return length <= self.rows
        return length < 2 * max(FEWEST_OF_A_SEQUENCE, self.rows / max(1, sequences))


def split_rows(length: int, mini_seq_len: int) -> list[tuple[int, int]]:
    """Return mini-sequences `(start, count)` of `length` tokens, cut at multiples of `mini_seq_len`.

    Only the last shapes depend on the length, so libraries that cache a plan per shape reuse it. A single row at the
    end takes a row from the mini-sequence before it, or joins it if that one has two rows.

    >>> split_rows(11, 4)
    [(0, 4), (4, 4), (8, 3)]
    >>> split_rows(9, 4)
    [(0, 4), (4, 3), (7, 2)]
    """
    cuts = [*range(0, max(1, length), mini_seq_len), length]
    if length > 1 and cuts[-1] - cuts[-2] == 1:
        if mini_seq_len > 2:
            cuts[-2] -= 1
        else:
            del cuts[-2]
    return [(first, last - first) for first, last in itertools.pairwise(cuts)]


def split_between(ranges: Sequence[torch.Tensor], length: int, mini_seq_len: int) -> list[tuple[int, int]]:
    """Return mini-sequences `(start, count)` that cut no range.

    Parameters
    ----------
    ranges : sequence of int64 Tensor `[1, N, 2]`
        Results of `mom.spans`: the keys `[first, end)` of each row (N = 1: of all). -1: any key. A token of the loop
        may be a group of rows: N is a multiple of `length`.
    length : int
        Tokens of the loop.
    mini_seq_len : int
        The most rows of a mini-sequence. A longer range is a mini-sequence by itself. A single row joins the rows
        before or after it.

    >>> split_between([torch.tensor([[[0, 3]] * 3 + [[3, 5]] * 2 + [[5, 9]] * 4])], 9, 5)
    [(0, 5), (5, 4)]
    """
    allowed = torch.ones(max(0, length - 1), dtype=torch.bool)
    for found in ranges:
        if found.shape[1] < length:
            allowed[:] = False
            continue
        group = found.shape[1] // length
        first, end = found[0].cpu().unbind(-1)
        first, end = torch.where(first < 0, 0, first), torch.where(end < 0, length * group, end)
        at = torch.arange(1, length) * group
        allowed &= (end.cummax(0).values[at - 1] <= at) & (first.flip(0).cummin(0).values.flip(0)[at] >= at)
    cuts, last = [0], 0
    for cut in (*(allowed.nonzero().flatten() + 1).tolist(), length):
        if cut - cuts[-1] > mini_seq_len and last > cuts[-1]:
            cuts.append(last)
        last = cut
    cuts.append(length)
    pieces = [(first, end - first) for first, end in itertools.pairwise(cuts)]
    return _without_single_rows(pieces)


def _without_single_rows(pieces: list[tuple[int, int]]) -> list[tuple[int, int]]:
    joined: list[tuple[int, int]] = []
    for start, count in pieces:
        if joined and 1 in (count, joined[-1][1]):
            start, count = joined[-1][0], joined.pop()[1] + count
        joined.append((start, count))
    return joined


@dataclass(frozen=True, eq=False)
class Loop:
    """A loop over `length` tokens in mini-sequences of at most `rows`.

    inputs    ports of the body's placeholders after `start` and `count`
    outputs   results of the loop
    widest    bytes per token of the widest value that the body computes
    spread    how many tokens give each expert one row on average; 1 without experts
    work      multiply-adds of all iterations at the captured sizes
    in_flight how many mini-sequences compute in turns (see `body_parts`)
    within    numbers of the inputs whose ranges no mini-sequence may cut (see `Claim.within`)
    unbroken  the length of the longest of these ranges in the captured call, 0 if there are none
    """

    stage: int
    length: Size
    rows: int
    inputs: tuple[In, ...]
    outputs: tuple[Out, ...]
    body: fx.GraphModule
    widest: int
    spread: float = 1
    work: int = 0
    in_flight: int = 1
    within: tuple[int, ...] = ()
    unbroken: int = 0

    @property
    def carries(self) -> dict[int, CarryIn]:
        """The carries by input number."""
        return {i: port for i, port in enumerate(self.inputs) if isinstance(port, CarryIn)}

    @property
    def stored(self) -> tuple[Stored, ...]:
        return tuple(output for output in self.outputs if isinstance(output, Stored))

    @property
    def finals(self) -> tuple[CarryOut, ...]:
        return tuple(output for output in self.outputs if isinstance(output, CarryOut))

    def bind(self, node: fx.Node) -> tuple[Any, ...]:
        """Return the operand of each input: a node or, for a size, a number. A carry's operand is its first value."""
        return tuple(node.args[1:])

    def rows_of(self, node: fx.Node) -> dict[int, fx.Node]:
        """Return the operands that are sliced per mini-sequence, by input number."""
        operands = enumerate(self.bind(node))
        return {i: operand for i, operand in operands if isinstance(self.inputs[i], RowsIn)}

    def results(self, node: fx.Node) -> dict[int, fx.Node]:
        """Return the `getitem` nodes of the loop's results, by output number. An unused result has none."""
        found: dict[int, fx.Node] = {}
        for user in node.users:
            if user.target is operator.getitem:
                index = user.args[1]
                assert isinstance(index, int)
                found[index] = user
        return found

    def overwritten_by(self, result: fx.Node) -> fx.Node | None:
        """Return the operand whose storage a result overwrites, None if it has storage of its own."""
        node, index = result.args
        assert isinstance(node, fx.Node) and isinstance(index, int)
        output = self.outputs[index]
        over = output.over if isinstance(output, Stored) else None
        return None if over is None else self.bind(node)[over]


class MiniSequence(nn.Module):
    """Runs a loop eagerly. The runtime replaces it by compiled code.

    `forward(length, *operands)` returns one tensor per output of the loop.
    """

    def __init__(self, loop: Loop) -> None:
        super().__init__()
        self.loop = loop
        self.body = loop.body

    def forward(self, length: int, *operands: Any) -> tuple[torch.Tensor, ...]:
        loop = self.loop
        values = list(operands)
        full: list[torch.Tensor] = []
        ranges = [operands[i] for i in loop.within]
        for start, count in split_between(ranges, length, loop.rows) if ranges else split_rows(length, loop.rows):
            bound = zip(loop.inputs, values, strict=True)
            returned = self.body(start, count, *(_slice(port, value, length, start, count) for port, value in bound))
            returned = self._detach(returned, operands)
            for i, carry in loop.carries.items():
                values[i] = returned[carry.out]
            pieces = returned[: len(loop.stored)]
            full = full or [
                _allocate(piece, output, length, count) if output.over is None else operands[output.over]
                for piece, output in zip(pieces, loop.stored, strict=True)
            ]
            for tensor, output, piece in zip(full, loop.stored, pieces, strict=True):
                put(tensor, _numeric(output.dim, tensor, length), start, piece)
        stored = iter(full)
        return tuple(next(stored) if isinstance(output, Stored) else values[output.carry] for output in loop.outputs)

    def _detach(self, results: Sequence[torch.Tensor], operands: Sequence[Any]) -> list[torch.Tensor]:
        """Copy results, rows and carries, that are views of an operand that will be overwritten."""
        over = {operands[o.over].untyped_storage().data_ptr() for o in self.loop.stored if o.over is not None}
        return [r.clone() if r.untyped_storage().data_ptr() in over else r for r in results]


def _slice(port: In, value: Any, length: int, start: int, count: int) -> Any:
    """Return the input of one mini-sequence for an operand."""
    return take(value, _numeric(port.dim, value, length), start, count) if isinstance(port, RowsIn) else value


def _allocate(piece: torch.Tensor, output: Stored, length: int, count: int) -> torch.Tensor:
    shape = list(piece.shape)
    shape[output.dim.index] = shape[output.dim.index] // count * length
    return torch.empty_permuted(shape, output.type.dense, dtype=piece.dtype, device=piece.device)


def _numeric(dim: Dim, tensor: torch.Tensor, length: int) -> Dim:
    """Return a dim with symbolic layout factors replaced by those of a tensor."""
    outer, inner = dim.outer, dim.inner
    if dim.plain or (isinstance(outer, int) and isinstance(inner, int)):
        return dim
    factor = tensor.shape[dim.index] // length
    known = inner if isinstance(inner, int) else factor // outer
    return Dim(dim.index, factor // known, known)


def loop_nodes(gm: fx.GraphModule) -> list[tuple[fx.Node, MiniSequence]]:
    """Return the loops of a rewritten graph with their nodes, in the order they run."""
    found = []
    for node in gm.graph.nodes:
        if node.op == "call_module":
            module = gm.get_submodule(str(node.target))
            if isinstance(module, MiniSequence):
                found.append((node, module))
    return found


def loops(gm: fx.GraphModule) -> list[tuple[str, Loop]]:
    """Return the loops of a rewritten graph with their names, in the order they run."""
    return [(str(node.target), module.loop) for node, module in loop_nodes(gm)]
