"""A loop over mini-sequences as a value, and a module that runs it as it stands.

Terms
-----
mini-sequence   A run of consecutive tokens that one iteration works on. All have the same length but the last, which
                may be shorter; none is a single row (compiled code specialises on size one).
body            One iteration as a graph: `(start, count, *inputs) -> (*rows, *carries)` (see `ports`).

    stored, total = loop(length, *operands)         one operand for each input
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

#: Fewer rows than this, of all sequences together, starve the products of any device: no loop is given fewer.
FEWEST_ROWS = 128

#: Fewer rows of one sequence than this are mostly copies: of several sequences they are no matrix with one stride.
FEWEST_OF_A_SEQUENCE = 8


@dataclass(frozen=True)
class RowLimit:
    """How long a mini-sequence may be: `rows` of each sequence at most.

    Where they are only the `fewest`, counted over all sequences of a batch, loops are made of whatever has more, and
    their rows are for who knows what they hold: the memory model, once the graph is rewritten.
    """

    rows: int
    fewest: bool = False

    def fits(self, length: int, sequences: int = 1) -> bool:
        """Whether so many tokens of each sequence are one mini-sequence: there is nothing to cut."""
        if not self.fewest:
            return length <= self.rows
        return length < 2 * max(FEWEST_OF_A_SEQUENCE, self.rows / max(1, sequences))


def split_rows(length: int, mini_seq_len: int) -> list[tuple[int, int]]:
    """Cut `length` tokens into mini-sequences `(start, count)` at multiples of `mini_seq_len`, none of a single row.

    Their shapes do not depend on the length, but for the last: libraries that plan for a shape plan once. A row that
    would be alone at the end gets another one from before it or, where that had but two, joins them.

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


@dataclass(frozen=True, eq=False)
class Loop:
    """One loop: `length` tokens in mini-sequences of at most `rows`.

    `inputs` follow the body's placeholders behind `start` and `count`, `outputs` are what the loop returns.
    `widest` is the most bytes per token that one value of the body takes, `spread` how many tokens give each of its
    experts a row (1: it has none), `work` the multiply-adds of all of it at the captured sizes.
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

    @property
    def carries(self) -> dict[int, CarryIn]:
        """The carries among the inputs, by number."""
        return {i: port for i, port in enumerate(self.inputs) if isinstance(port, CarryIn)}

    @property
    def stored(self) -> tuple[Stored, ...]:
        return tuple(output for output in self.outputs if isinstance(output, Stored))

    @property
    def finals(self) -> tuple[CarryOut, ...]:
        return tuple(output for output in self.outputs if isinstance(output, CarryOut))

    def bind(self, node: fx.Node) -> tuple[Any, ...]:
        """What the loop's node gives each input: a node, or a number for a size. A carry is given its first value."""
        return tuple(node.args[1:])

    def rows_of(self, node: fx.Node) -> dict[int, fx.Node]:
        """The operands of which each mini-sequence is given its own rows, by the input's number."""
        operands = enumerate(self.bind(node))
        return {i: operand for i, operand in operands if isinstance(self.inputs[i], RowsIn)}

    def results(self, node: fx.Node) -> dict[int, fx.Node]:
        """The nodes that stand for what the loop returns, by the output's number. What nobody reads has none."""
        items: list[Any] = [(user.args[1], user) for user in node.users if user.target is operator.getitem]
        return dict(items)

    def overwritten_by(self, result: fx.Node) -> fx.Node | None:
        """The operand in whose storage a result stands, or None if it has its own."""
        node, index = result.args
        assert isinstance(node, fx.Node) and isinstance(index, int)
        output = self.outputs[index]
        over = output.over if isinstance(output, Stored) else None
        return None if over is None else self.bind(node)[over]


class MiniSequence(nn.Module):
    """A loop that runs as it stands; a runtime replaces it by a faster one.

    `forward(length, *operands)` returns one tensor for each of the loop's outputs.
    """

    def __init__(self, loop: Loop) -> None:
        super().__init__()
        self.loop = loop
        self.body = loop.body

    def forward(self, length: int, *operands: Any) -> tuple[torch.Tensor, ...]:
        loop = self.loop
        values = list(operands)
        full: list[torch.Tensor] = []
        for start, count in split_rows(length, loop.rows):
            given = [_given(port, value, length, start, count) for port, value in zip(loop.inputs, values, strict=True)]
            made = self.body(start, count, *given)
            for i, carry in loop.carries.items():
                values[i] = made[carry.out]
            pieces = self._detached(made[: len(loop.stored)], operands)
            full = full or [
                _allocate(piece, output, length, count) if output.over is None else operands[output.over]
                for piece, output in zip(pieces, loop.stored, strict=True)
            ]
            for tensor, output, piece in zip(full, loop.stored, pieces, strict=True):
                put(tensor, _numeric(output.dim, tensor, length), start, piece)
        stored = iter(full)
        return tuple(next(stored) if isinstance(output, Stored) else values[output.carry] for output in loop.outputs)

    def _detached(self, pieces: Sequence[torch.Tensor], operands: Sequence[Any]) -> list[torch.Tensor]:
        """Copies of pieces that are views of an operand which is about to be overwritten."""
        over = {operands[o.over].untyped_storage().data_ptr() for o in self.loop.stored if o.over is not None}
        return [p.clone() if p.untyped_storage().data_ptr() in over else p for p in pieces]


def _given(port: In, value: Any, length: int, start: int, count: int) -> Any:
    """What one mini-sequence is given of an operand."""
    return take(value, _numeric(port.dim, value, length), start, count) if isinstance(port, RowsIn) else value


def _allocate(piece: torch.Tensor, output: Stored, length: int, count: int) -> torch.Tensor:
    shape = list(piece.shape)
    shape[output.dim.index] = shape[output.dim.index] // count * length
    return torch.empty_permuted(shape, output.type.dense, dtype=piece.dtype, device=piece.device)


def _numeric(dim: Dim, tensor: torch.Tensor, length: int) -> Dim:
    """A dim whose symbolic layout is read off a real tensor."""
    if dim.plain or (isinstance(dim.outer, int) and isinstance(dim.inner, int)):
        return dim
    around = tensor.shape[dim.index] // length
    inner = dim.inner if isinstance(dim.inner, int) else around // dim.outer
    return Dim(dim.index, around // inner, inner)


def loop_nodes(gm: fx.GraphModule) -> list[tuple[fx.Node, MiniSequence]]:
    """The loops of a rewritten graph in the order they run, each with its node."""
    found = []
    for node in gm.graph.nodes:
        if node.op == "call_module":
            module = gm.get_submodule(str(node.target))
            if isinstance(module, MiniSequence):
                found.append((node, module))
    return found


def loops(gm: fx.GraphModule) -> list[tuple[str, Loop]]:
    """The loops of a rewritten graph in the order they run, by name."""
    return [(str(node.target), module.loop) for node, module in loop_nodes(gm)]
