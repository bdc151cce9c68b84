"""What a loop over mini-sequences is: how it calls its body, what it stores, and a way to run it as it stands.

Terms
-----
mini-sequence   A run of consecutive tokens that one iteration works on. The last ones may be one row shorter,
                and none is a single row (compiled code specialises on size one).
body            One iteration as a graph: `(start, count, *sizes, *sliced, *whole) -> rows of each stored value`
                and parts of each reduction over the tokens.
sliced, whole   Operands a body sees its own rows of, and operands it sees all of (weights, keys, values).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from mom_passes.graph.sizes import Size, count_hint
from mom_passes.rules import Dim
from mom_passes.rules.folds import combine
from mom_passes.rules.slicing import put, take

aten = torch.ops.aten


#: Fewer rows than this starve the matrix products; a loop never has fewer because its values are wide.
FEWEST_ROWS = 128


@dataclass(frozen=True)
class RowLimit:
    """How long a mini-sequence may be: `rows` at most, and fewer where one of its values would take more than `bytes`.

    A loop that ends in the logits of a large vocabulary so gets shorter mini-sequences than one that ends in keys.
    """

    rows: int
    bytes: int | None = None

    def rows_of(self, widest: int) -> int:
        """Rows for a loop whose widest value takes `widest` bytes per token."""
        if self.bytes is None:
            return self.rows
        return max(min(self.rows, FEWEST_ROWS), min(self.rows, self.bytes // max(1, widest)))


def split_rows(length: int, mini_seq_len: int) -> list[tuple[int, int]]:
    """Cut `length` tokens into mini-sequences `(start, count)` of nearly equal size, none of a single row.

    >>> split_rows(10, 4)
    [(0, 4), (4, 3), (7, 3)]
    """
    pieces = max(1, min(-(-length // mini_seq_len), length // 2))
    small, longer = divmod(length, pieces)
    cuts = [0]
    for i in range(pieces):
        cuts.append(cuts[-1] + small + (i < longer))
    return [(a, b - a) for a, b in itertools.pairwise(cuts)]


@dataclass(frozen=True)
class LoopOutput:
    """A value a loop stores: full shape, storage order of its dimensions (outermost first), where its tokens are.

    `takes_over` is the number of the sliced operand whose storage it is written to (see `mom_passes.program.in_place`).
    """

    name: str
    dim: Dim
    shape: tuple[Size, ...]
    order: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    takes_over: int | None = None


@dataclass(frozen=True)
class LoopFold:
    """A reduction over the tokens that leaves the loop as the combination of its parts (see `mom_passes.rules.folds`).

    `operator` is the reduction, `shape` and `dtype` those of a part.
    """

    name: str
    operator: Any
    shape: tuple[Size, ...]
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class LoopSpec:
    """How a loop calls its body. Counts and dims follow the order of the body's placeholders.

    The body returns rows of `outputs`, then parts of `folds`, and so does the loop with the values they make.
    `widest` is the most bytes per token that one value of the body takes.
    """

    stage: int
    length: Size
    mini_seq_len: int
    sizes: tuple[Size, ...]
    sliced: tuple[Dim, ...]
    whole: int
    outputs: tuple[LoopOutput, ...]
    folds: tuple[LoopFold, ...]
    widest: int

    def sliced_of(self, node: fx.Node) -> tuple[fx.Node, ...]:
        """The sliced operands of the loop's node."""
        first = 1 + len(self.sizes)
        return node.args[first : first + len(self.sliced)]  # type: ignore[return-value]


class MiniSequence(nn.Module):
    """A loop over mini-sequences that runs as it stands; a runtime replaces it by a faster one.

    `forward(length, *sizes, *sliced, *whole)` returns one full tensor per stored value, then the folded ones.
    """

    def __init__(self, body: fx.GraphModule, spec: LoopSpec) -> None:
        super().__init__()
        self.body = body
        self.spec = spec

    def forward(self, length: int, *operands: Any) -> tuple[torch.Tensor, ...]:
        spec = self.spec
        sizes, tensors = operands[: len(spec.sizes)], operands[len(spec.sizes) :]
        sliced, whole = tensors[: len(spec.sliced)], tensors[len(spec.sliced) :]
        full: list[torch.Tensor] = []
        parts: list[Sequence[torch.Tensor]] = []
        for start, count in split_rows(length, spec.mini_seq_len):
            rows = [take(t, _numeric(dim, t, length), start, count) for t, dim in zip(sliced, spec.sliced, strict=True)]
            made = self.body(start, count, *sizes, *rows, *whole)
            pieces = made[: len(spec.outputs)]
            parts.append(made[len(spec.outputs) :])
            if not full:
                full = [
                    self._allocate(p, o, length, count) if o.takes_over is None else sliced[o.takes_over]
                    for p, o in zip(pieces, spec.outputs, strict=True)
                ]
            pieces = self._detached(pieces, sliced)
            for tensor, output, piece in zip(full, spec.outputs, pieces, strict=True):
                put(tensor, _numeric(output.dim, tensor, length), start, piece)
        stacked = [torch.stack(one) for one in zip(*parts, strict=True)]
        return (*full, *(combine(f.operator, p) for f, p in zip(spec.folds, stacked, strict=True)))

    def _detached(self, pieces: Sequence[torch.Tensor], sliced: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Copies of pieces that are views of an operand which is about to be overwritten."""
        taken = [sliced[o.takes_over].untyped_storage() for o in self.spec.outputs if o.takes_over is not None]
        own = {storage.data_ptr() for storage in taken}
        return [p.clone() if p.untyped_storage().data_ptr() in own else p for p in pieces]

    @staticmethod
    def _allocate(piece: torch.Tensor, output: LoopOutput, length: int, count: int) -> torch.Tensor:
        shape = list(piece.shape)
        shape[output.dim.index] = shape[output.dim.index] // count * length
        return torch.empty_permuted(shape, output.order, dtype=piece.dtype, device=piece.device)


def _numeric(dim: Dim, tensor: torch.Tensor, length: int) -> Dim:
    """A dim whose symbolic layout is read off a real tensor."""
    if dim.plain or (isinstance(dim.outer, int) and isinstance(dim.inner, int)):
        return dim
    around = tensor.shape[dim.index] // length
    inner = dim.inner if isinstance(dim.inner, int) else around // dim.outer  # type: ignore[operator]
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


def loops(gm: fx.GraphModule) -> list[tuple[str, MiniSequence]]:
    """The loops of a rewritten graph in the order they run, by name."""
    return [(str(node.target), module) for node, module in loop_nodes(gm)]


def full_bytes(output: LoopOutput) -> int:
    """Bytes of a stored value at the captured sizes."""
    return count_hint(output.shape) * output.dtype.itemsize
