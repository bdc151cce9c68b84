"""Turn every stage into loops over mini-sequences.

Terms
-----
mini-sequence   A run of consecutive tokens that one iteration works on. The last ones may be one row shorter,
                and none is a single row (compiled code specialises on size one).
body            One iteration as a graph: `(start, count, *sizes, *sliced, *whole) -> rows of each stored value`.
sliced, whole   Operands a body sees its own rows of, and operands it sees all of (weights, keys, values).

    for stage in stages:
        emit its whole operators into the new graph
        for length in lengths of its stored values:            # nearly always one
            body   = the stored rows, computed from what is at hand, by the claims of the rules
            loop   = MiniSequence(body)
            stored = loop(length, *sizes, *sliced, *whole)

Before:  k = mm(norm(x), wk); ...; y = add(x, mm(silu(mm(n, wg)), wd))
After:   k, v, x1 = stage_1(length, x0, k0, v0, wq, wo, wg, wd, wk, wv)
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from passes.bodies import Body
from passes.demands import DemandGraph, Instance, Kind, instance_length
from passes.errors import PassError
from passes.graphs import attribute
from passes.rules import Dim
from passes.sizes import Size, count_hint, expr, hint, same
from passes.slicing import put, take
from passes.stages import StagePlan, Stages

aten = torch.ops.aten


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
    """A value a loop stores: full shape, storage order of its dimensions (outermost first), where its tokens are."""

    name: str
    dim: Dim
    shape: tuple[Size, ...]
    order: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class LoopSpec:
    """How a loop calls its body. Counts and dims follow the order of the body's placeholders."""

    stage: int
    length: Size
    mini_seq_len: int
    sizes: tuple[Size, ...]
    sliced: tuple[Dim, ...]
    whole: int
    outputs: tuple[LoopOutput, ...]


class MiniSequence(nn.Module):
    """A loop over mini-sequences that runs as it stands; a runtime replaces it by a faster one.

    `forward(length, *sizes, *sliced, *whole)` returns one full tensor per stored value.
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
        for start, count in split_rows(length, spec.mini_seq_len):
            rows = [take(t, _numeric(dim, t, length), start, count) for t, dim in zip(sliced, spec.sliced, strict=True)]
            pieces = self.body(start, count, *sizes, *rows, *whole)
            if not full:
                full = [self._allocate(p, o, length, count) for p, o in zip(pieces, spec.outputs, strict=True)]
            for tensor, output, piece in zip(full, spec.outputs, pieces, strict=True):
                put(tensor, _numeric(output.dim, tensor, length), start, piece)
        return tuple(full)

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


def insert_loops(gm: fx.GraphModule, stages: Stages, *, mini_seq_len: int) -> fx.GraphModule:
    """A new graph module with the same placeholders and outputs, in which every stage's rows are computed by loops."""
    return _Rewriter(gm, stages, mini_seq_len).run()


class _Rewriter:
    def __init__(self, gm: fx.GraphModule, stages: Stages, mini_seq_len: int) -> None:
        self.gm = gm
        self.stages = stages
        self.demands: DemandGraph = stages.demands
        self.mini_seq_len = mini_seq_len
        self.graph = fx.Graph()
        self.whole: dict[fx.Node, fx.Node] = {}
        self.stored: dict[Instance, fx.Node] = {}
        self.root = nn.Module()

    def run(self) -> fx.GraphModule:
        for node in self.gm.graph.nodes:
            if node.op == "placeholder":
                self.whole[node] = self.graph.node_copy(node)
        for plan in self.stages.plans:
            for instance in plan.whole:
                self._emit_whole(instance.node)
            for length, stored in self._by_length(plan):
                self._emit_loop(plan, length, stored)
        output = next(n for n in self.gm.graph.nodes if n.op == "output")
        new = self.graph.output(fx.map_arg(output.args[0], self._whole_value))
        new.meta = dict(output.meta)
        rewritten = fx.GraphModule(self.root, self.graph, "MiniSequences")
        rewritten.meta = dict(self.gm.meta)
        return rewritten

    # --- whole values in the outer graph ---

    def _whole_value(self, node: fx.Node) -> fx.Node:
        """The outer graph's node for all of a value; views and sizes are emitted when first asked for."""
        if node not in self.whole:
            if node.op == "get_attr":
                self._copy_attribute(node)
            else:
                kind = self.demands.kinds.get(Instance(node, None))
                if kind is Kind.SIZE and not self.demands.inputs[Instance(node, None)]:
                    self.whole[node] = self._size(node.meta["val"])
                    return self.whole[node]
                if kind not in (Kind.INLINE, Kind.SIZE):
                    raise PassError(f"{node.name} is read before the stage that computes it ({kind})")
            self._emit_whole(node)
        return self.whole[node]

    def _emit_whole(self, node: fx.Node) -> None:
        if node not in self.whole:
            self.whole[node] = self.graph.node_copy(node, self._whole_value)

    def _copy_attribute(self, node: fx.Node) -> None:
        assert isinstance(node.target, str)
        owner = attribute(self.gm, node.target)
        name = node.target.replace(".", "_")
        if not hasattr(self.root, name):
            setattr(self.root, name, owner)
        self.whole[node] = self.graph.get_attr(name)
        self.whole[node].meta = dict(node.meta)

    def _by_length(self, plan: StagePlan) -> Iterator[tuple[Size, list[Instance]]]:
        groups: list[tuple[Size, list[Instance]]] = []
        for instance in plan.stored:
            length = instance_length(instance)
            for known, members in groups:
                if same(known, length):
                    members.append(instance)
                    break
            else:
                groups.append((length, [instance]))
        yield from groups

    # --- loops ---

    def _emit_loop(self, plan: StagePlan, length: Size, stored: list[Instance]) -> None:
        body = Body(self.demands, plan, length, stored)
        outputs = tuple(self._output(instance) for instance in stored)
        spec = LoopSpec(
            plan.index,
            length,
            self.mini_seq_len,
            body.size_values(),
            tuple(i.dim for i in body.sliced if i.dim is not None),
            len(body.whole),
            outputs,
        )
        name = (
            f"stage_{plan.index}" if not hasattr(self.root, f"stage_{plan.index}") else f"stage_{plan.index}_{length}"
        )
        self.root.add_module(name, MiniSequence(body.module, spec))
        arguments = (
            self._size(length),
            *(self._size(length) if size is None else self._whole_value(size) for size in body.sizes),
            *(self._rows_source(instance) for instance in body.sliced),
            *(self._whole_value(node) for node in body.whole),
        )
        loop = self.graph.call_module(name, arguments)
        loop.meta["val"] = tuple(i.node.meta["val"] for i in stored)
        for index, instance in enumerate(stored):
            item = self.graph.call_function(operator.getitem, (loop, index))
            item.meta = dict(instance.node.meta)
            self.stored[instance] = item
            if self.demands.kinds.get(Instance(instance.node, None)) is Kind.BARRIER:
                self.whole[instance.node] = item

    def _rows_source(self, instance: Instance) -> fx.Node:
        return self.stored[instance] if instance in self.stored else self._whole_value(instance.node)

    def _size(self, size: Size) -> Any:
        """An int, or a node of the outer graph whose value is that size."""
        if isinstance(size, int):
            return size
        wanted = expr(size)
        if wanted.is_Integer:
            return int(wanted)
        for node in self.graph.nodes:
            value = node.meta.get("val")
            if isinstance(value, torch.SymInt) and same(value, wanted):
                return node
        for node in self.graph.nodes:
            value = node.meta.get("val")
            for index, entry in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
                if same(entry, wanted):
                    found = self.graph.call_function(aten.sym_size.int, (node, index))
                    found.meta["val"] = entry
                    return found
        return self._size_arithmetic(wanted)

    def _size_arithmetic(self, wanted: Any) -> fx.Node:
        """A size that no value of the graph has, computed from sizes that some have."""
        target = {"Add": operator.add, "Mul": operator.mul, "FloorDiv": operator.floordiv}.get(wanted.func.__name__)
        if target is None:
            raise PassError(f"no value of the graph has the size {wanted}")
        parts = [self._size(part) for part in wanted.args]
        total = parts[0]
        for part in parts[1:]:
            value = target(*(p.meta["val"] if isinstance(p, fx.Node) else p for p in (total, part)))
            total = self.graph.call_function(target, (total, part))
            total.meta["val"] = value
        return total

    @staticmethod
    def _output(instance: Instance) -> LoopOutput:
        value = instance.node.meta["val"]
        strides = [hint(s) if hint(n) > 1 else 0 for s, n in zip(value.stride(), value.shape, strict=True)]
        # Dimensions of size one have no order of their own: they stay where they are written.
        order = _storage_order(strides, value.dim())
        assert instance.dim is not None
        return LoopOutput(instance.node.name, instance.dim, tuple(value.shape), order, value.dtype, value.device)


def _storage_order(strides: list[int], ndim: int) -> tuple[int, ...]:
    """Dimensions from the outermost in storage to the innermost."""
    moving = sorted((i for i in range(ndim) if strides[i] > 0), key=lambda i: -strides[i])
    fixed = [i for i in range(ndim) if strides[i] == 0]
    return tuple(fixed + moving)


def loops(gm: fx.GraphModule) -> list[tuple[str, MiniSequence]]:
    """The loops of a rewritten graph in the order they run."""
    found = []
    for node in gm.graph.nodes:
        if node.op == "call_module":
            module = gm.get_submodule(str(node.target))
            if isinstance(module, MiniSequence):
                found.append((str(node.target), module))
    return found


def full_bytes(output: LoopOutput) -> int:
    """Bytes of a stored value at the captured sizes."""
    return count_hint(output.shape) * output.dtype.itemsize
