"""Turn every stage into loops over mini-sequences.

    for stage in stages:
        emit its whole operators into the new graph
        for length in lengths of its stored values:            # nearly always one
            body   = the stored rows, computed from available values by their claims
            loop   = body and ports
            stored = loop(length, *operands)

Before:  k = mm(norm(x), wk); ...; y = add(x, mm(silu(mm(n, wg)), wd))
After:   k, v, x1 = stage_1(length, x0, k0, v0, wq, wo, wg, wd, wk, wv)
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx, nn

from mom_passes.errors import PassError
from mom_passes.graph.aliasing import is_mutation
from mom_passes.graph.edit import attribute, copy_call, emit, fake_mode, size_node, strides_differ
from mom_passes.graph.meta import meta_value
from mom_passes.graph.sizes import Size, same
from mom_passes.graph.strides import storage_order
from mom_passes.graph.values import returns_nothing, value_of
from mom_passes.loops.bodies import Body, First, Operand, TheLength
from mom_passes.loops.instances import Carried, DemandGraph, Instance, Kind
from mom_passes.loops.loop import Loop, MiniSequence, RowLimit
from mom_passes.loops.ports import CarryIn, CarryOut, Out, Stored, TensorType
from mom_passes.loops.stages import StagePlan, Stages
from mom_passes.ops.convolution import LAST_ROWS
from mom_passes.ops.rows import COPY_ROWS, LEAST_WITH_ROOM
from mom_passes.rules import All, Rows
from mom_passes.rules.view import TO_THE_END
from mom_passes.torch_compat import graph_module


def insert_loops(
    gm: fx.GraphModule,
    stages: Stages,
    *,
    limit: RowLimit,
    unbroken: int = 0,
    group_of: Callable[[Size], int] = lambda length: 1,
) -> fx.GraphModule:
    """Return a graph module with the same placeholders and outputs in which loops compute the rows of every stage.

    `unbroken` are the rows of the longest range that loops must not cut. `limit` and `unbroken` are rows of attentions:
    `group_of` has how many of these are one token of a loop of some length.
    """
    return _Rewriter(gm, stages, limit, unbroken, group_of).run()


class _Rewriter:
    def __init__(
        self, gm: fx.GraphModule, stages: Stages, limit: RowLimit, unbroken: int, group_of: Callable[[Size], int]
    ) -> None:
        self.gm = gm
        self.stages = stages
        self.demands: DemandGraph = stages.demands
        self.limit = limit
        self.unbroken = unbroken
        self.group_of = group_of
        self.graph = fx.Graph()
        self.whole: dict[fx.Node, fx.Node] = {}
        self.stored: dict[Instance, fx.Node] = {}
        self.root = nn.Module()
        self.last = _effects_from_the_first_write(gm.graph)

    def run(self) -> fx.GraphModule:
        for node in self.gm.graph.nodes:
            if node.op == "placeholder":
                self.whole[node] = self.graph.node_copy(node)
        for plan in self.stages.plans:
            for instance in plan.whole:
                if instance.node not in self.last:
                    self._emit_whole(instance.node)
            for length, stored in self._by_length(plan):
                self._emit_loop(plan, length, stored)
        output = next(n for n in self.gm.graph.nodes if n.op == "output")
        self._emit_writes(output)
        new = self.graph.output(fx.map_arg(output.args[0], self._whole_value))
        new.meta = dict(output.meta)
        rewritten = graph_module(self.root, self.graph, "MiniSequences")
        rewritten.meta = dict(self.gm.meta)
        return rewritten

    def _emit_writes(self, output: fx.Node) -> None:
        """Emit writes to inputs, and the assertions after them, in order and after all readers of the old contents.

        Views and sizes are emitted at their first use. Those that the writes and the output read are emitted here.
        """
        after_writes = set(self.last)
        for node in self.gm.graph.nodes:
            if not after_writes.isdisjoint(node.all_input_nodes):
                after_writes.add(node)
        for reader in (*self.last, output):
            for node in reader.all_input_nodes:
                if node not in after_writes:
                    self._whole_value(node)
        for effect in self.last:
            self._emit_whole(effect)

    # --- whole values in the outer graph ---

    def _whole_value(self, node: fx.Node) -> fx.Node:
        """Return the outer graph's node for all of a value. Views and sizes are emitted at their first use."""
        if node not in self.whole:
            if node.op == "get_attr":
                self._copy_attribute(node)
            else:
                kind = self.demands.kinds.get(Instance(node, All()))
                if kind is Kind.SIZE and not self.demands.inputs[Instance(node, All())]:
                    self.whole[node] = size_node(self.graph, meta_value(node))
                    return self.whole[node]
                if kind not in (Kind.INLINE, Kind.SIZE):
                    raise PassError(f"{node.name} is read before the stage that computes it ({kind})", node)
            self._emit_whole(node)
        return self.whole[node]

    def _emit_whole(self, node: fx.Node) -> None:
        if node in self.whole:
            return
        self.whole[node] = copy_call(self.graph, node, self._whole_value)

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
            length = self.demands.length(instance)
            for known, members in groups:
                if same(known, length):
                    members.append(instance)
                    break
            else:
                groups.append((length, [instance]))
        yield from groups

    # --- loops ---

    def _emit_loop(self, plan: StagePlan, length: Size, members: list[Instance]) -> None:
        stored = [i for i in members if not isinstance(i.need, Carried)]
        finals = [i for i in members if isinstance(i.need, Carried)]
        length_node = size_node(self.graph, length)
        if isinstance(length_node, fx.Node):
            length = meta_value(length_node)  # the same size as a SymInt, which knows the captured value
        body = Body(self.demands, plan, length, stored, finals)
        outputs: tuple[Out, ...] = (*map(_stored, stored), *(self._final(body, i) for i in finals))
        group = self.group_of(length)
        unbroken = -(-self.unbroken // group) if body.within else 0
        rows, cost = max(self.limit.of_groups(group).rows, unbroken), (body.widest, body.spread, body.work)
        within: dict[str, Any] = {"within": body.within, "unbroken": unbroken}
        loop = Loop(plan.index, length, rows, body.inputs, outputs, body.module, *cost, **within)
        name = f"stage_{plan.index}"
        if hasattr(self.root, name):
            name = f"{name}_{len(self.graph.nodes)}"
        self.root.add_module(name, MiniSequence(loop))
        operands = [self._operand(operand, length_node) for operand in body.operands]
        node = self.graph.call_module(name, (length_node, *operands))
        items = [self._item(node, index, i.node) for index, i in enumerate(stored)]
        for instance, item in zip(stored, items, strict=False):
            self._lay_out(item, _stored(instance).type)
            self.stored[instance] = item
            if self.demands.kinds.get(Instance(instance.node, All())) is Kind.BARRIER:
                self.whole[instance.node] = item
        for index, instance in enumerate(finals, start=len(stored)):
            items.append(self._finished(node, index, instance, outputs[index]))
        node.meta["val"] = tuple(meta_value(item) for item in items)

    def _final(self, body: Body, instance: Instance) -> CarryOut:
        """Return the loop's output for the final value of a carry."""
        at = body.port_of(instance)
        port = body.inputs[at]
        assert isinstance(port, CarryIn)
        assert isinstance(instance.need, Carried)
        target = instance.node.target if instance.need.of is None else LAST_ROWS
        return CarryOut(instance.node.name, port.type, at, target)

    def _operand(self, operand: Operand, length: Any) -> Any:
        if isinstance(operand, TheLength):
            return length
        if isinstance(operand, First):
            shape = [size_node(self.graph, size) for size in operand.type.shape]
            options = {"dtype": operand.type.dtype, "device": operand.type.device, "pin_memory": False}
            return emit(self.graph, torch.ops.aten.full.default, (shape, operand.fill), options)
        return self.stored[operand] if operand in self.stored else self._whole_value(operand.node)

    def _item(self, loop: fx.Node, index: int, of: fx.Node) -> fx.Node:
        item = self.graph.call_function(operator.getitem, (loop, index))
        item.meta = dict(of.meta)
        return item

    def _lay_out(self, item: fx.Node, type: TensorType) -> None:
        """Set the strides of a result of a loop to those of its dense storage."""
        value = meta_value(item)
        with fake_mode(self.graph):
            dense = torch.empty_permuted(value.shape, type.dense, dtype=value.dtype, device=value.device)
        if strides_differ(dense, value):
            item.meta["val"] = dense

    def _finished(self, loop: fx.Node, index: int, instance: Instance, output: Out) -> fx.Node:
        """Emit the final value of a carry and the result: `finish` divides a mean, a float32 total is rounded."""
        readers = [one.node for one in self.demands.readers[instance] if isinstance(one.need, All)]
        value = value_of(readers[0])
        final = self.graph.call_function(operator.getitem, (loop, index))
        final.meta = {**readers[0].meta, "val": value.to(output.type.dtype)}
        self._lay_out(final, output.type)
        result, fold = final, self.demands.fold(instance)
        if fold is not None and fold.finish is not None:
            result = fold.finish(result)
        if output.type.dtype != value.dtype:
            result = emit(self.graph, torch.ops.prims.convert_element_type.default, (result, value.dtype))
        assert isinstance(instance.need, Carried)
        if instance.need.of is not None and any(user.op == "output" for reader in readers for user in reader.users):
            result = self._with_room(result, instance.need.of)
        self.whole.update(dict.fromkeys(readers, result))
        return final

    def _with_room(self, rows: fx.Node, need: Rows) -> fx.Node:
        """Emit a copy of returned last rows with room for a row before them, as `program.own_rows` does for a window.

        The copy has the strides of `cat([past, new])[-w:]`, for which a decode step is compiled.
        """
        if need.before < LEAST_WITH_ROOM:
            return rows
        own = emit(self.graph, COPY_ROWS, (rows, list(storage_order(value_of(rows))), need.dim.index))
        return emit(self.graph, torch.ops.aten.slice.Tensor, (own, need.dim.index, 1, TO_THE_END))


def _effects_from_the_first_write(graph: fx.Graph) -> dict[fx.Node, None]:
    """Return writes to inputs, and the assertions after the first write, in order."""
    found: dict[fx.Node, None] = {}
    for node in graph.nodes:
        if node.op == "call_function" and (is_mutation(node) or (found and returns_nothing(node))):
            found[node] = None
    return found


def _stored(instance: Instance) -> Stored:
    value = value_of(instance.node)
    return Stored(instance.node.name, TensorType.of(value, storage_order(value)), instance.dim)
