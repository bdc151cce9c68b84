"""The body of a loop: one iteration as a graph of its own, with ports.

Terms
-----
members   The instances a loop computes or reads, from what it stores back to what is at hand.
sizes     SymInt arguments. In a graph of fixed sizes the length is a literal; it becomes an argument here too.
operand   What the loop's node has to give to a port: an instance of the graph around it, the length, or the first
          value of a carry.

    def body(start, count, *sizes, *rows, *whole, *carries):
        for instance in members:                       # in graph order
            rows       its operator on what its claim needs, with the arguments its rule's edit gives
            scan       likewise, joined with its last row so far
            past       rows behind those that were handed over; the last of them are handed on
            total      a part of the reduction, added to the total that was handed over
        return (*stored rows, *what each carry hands on)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from mom_passes.graph.arguments import arguments_of
from mom_passes.graph.edit import add_input
from mom_passes.graph.meta import meta_value
from mom_passes.graph.sizes import Size, product
from mom_passes.graph.strides import storage_order
from mom_passes.graph.values import is_tensor, value_of
from mom_passes.loops.demands import DemandGraph, Instance, Kind, Total
from mom_passes.loops.ports import CarryIn, In, RowsIn, SizeIn, TensorType, WholeIn, rows_type
from mom_passes.loops.stages import StagePlan, body_instances, widest_per_token
from mom_passes.rules import All, Dim, Past, Rows, Window, facts_of
from mom_passes.rules.arithmetic import add
from mom_passes.rules.calls import call_on_rows
from mom_passes.rules.folds import FOLDS, identity, total_dtype
from mom_passes.rules.view import TO_THE_END
from mom_passes.rules.work import matmul_work
from mom_passes.tokens.region import Region

aten = torch.ops.aten


@dataclass(frozen=True)
class TheLength:
    """The number of tokens."""


@dataclass(frozen=True)
class First:
    """What a carry begins with: a tensor of a type, filled with a number."""

    type: TensorType
    fill: int | float | bool


Operand = Instance | TheLength | First


class Body:
    """Builds one iteration: `module`, the ports `inputs` and the operand that each wants.

    `widest` is the most bytes that one token of a value made here takes, `spread` how many tokens give each of its
    experts a row, `work` the multiply-adds of all its iterations.
    """

    def __init__(
        self, demands: DemandGraph, plan: StagePlan, length: Size, stored: list[Instance], totals: list[Instance]
    ) -> None:
        self.demands = demands
        self.length = length
        self.graph = fx.Graph()
        self.env: dict[Instance, Any] = {}
        self.literal: fx.Node | None = None
        members = body_instances(demands, [*stored, *totals], plan.available)
        computed = {i for i in members if demands.kinds[i] is Kind.ROWS and i not in plan.available}
        self.rows = [i for i in members if isinstance(i.need, Rows) and i not in computed]
        kinds = (Kind.SOURCE, Kind.BARRIER, Kind.WHOLE)
        self.whole = [i for i in members if isinstance(i.need, All) and demands.kinds[i] in kinds and is_tensor(i.node)]
        self._order_by_use(members)
        self.sizes = [i for i in members if demands.kinds[i] is Kind.SIZE]
        numbers = [i for i in members if isinstance(i.need, All) and not is_tensor(i.node)]
        self.sizes += [i for i in numbers if i not in self.sizes]
        pasts = (i for i in members if isinstance(i.need, Past))
        scans = (i for i in members if i in computed and demands.claims[i].state is not None)
        self.carries = [*totals, *pasts, *scans]
        made = [i for i in computed if isinstance(i.need, Rows) and isinstance(meta_value(i.node), torch.Tensor)]
        self.widest = max(map(widest_per_token, made), default=1)
        self.spread = max((i.node.target.spread for i in made if isinstance(i.node.target, Region)), default=1)
        self.work = sum(matmul_work(i.node) for i in made)
        self._placeholders()
        for instance in members:
            if instance not in self.env:
                self.env[instance] = self._emit(instance)
        self.graph.output((*(self.env[i] for i in stored), *(self.handed_on[i] for i in self.carries)))
        self._drop_unused_sizes()
        self.inputs, self.operands = self._ports(len(stored))
        self.module = fx.GraphModule(nn.Module(), self.graph, "MiniSequenceBody")

    def _order_by_use(self, members: list[Instance]) -> None:
        """What is read first comes first: alike layers have alike bodies, in whatever order their operands are made.

        One layer's hidden states are an embedding, which is there before the angles of positions that all layers read;
        another's are made behind those.
        """
        given = {*self.rows, *self.whole}
        reads = (operand for i in members if i not in given for operand in self.demands.inputs.get(i, ()))
        first = {operand: number for number, operand in enumerate(dict.fromkeys(reads))}
        for instances in (self.rows, self.whole):
            instances.sort(key=lambda i: first.get(i, len(first)))

    # --- ports ---

    def _placeholders(self) -> None:
        self.start = add_input(self.graph, "start")
        self.count = add_input(self.graph, "count")
        self._length_point = self.count
        for instance in self.sizes:
            self._length_point = self.env[instance] = add_input(self.graph, instance.node.name)
        for instance in (*self.rows, *self.whole):
            own = isinstance(instance.need, Rows)
            placeholder = add_input(self.graph, f"{instance.node.name}_rows" if own else instance.node.name)
            self.env[instance] = self._typed(placeholder, instance)
        #: What the mini-sequence before has handed over, and what this one hands on.
        self.handed_over = {i: self._carried(i) for i in self.carries}
        self.handed_on: dict[Instance, fx.Node] = {}

    def _carried(self, instance: Instance) -> fx.Node:
        name = {Past: "past", Total: "total"}.get(type(instance.need), "state")
        placeholder = add_input(self.graph, f"{instance.node.name}_{name}")
        placeholder.meta["type"] = self._first(instance).type
        return placeholder

    def _ports(self, stored: int) -> tuple[tuple[In, ...], tuple[Operand, ...]]:
        """In the order of the placeholders behind `start` and `count`."""
        ports: list[tuple[In, Operand]] = [(SizeIn(meta_value(i.node)), i) for i in self.sizes]
        if self.literal is not None:
            ports.append((SizeIn(self.length), TheLength()))
        ports += [(RowsIn(TensorType.of(value_of(i.node)), i.dim), i) for i in self.rows]
        ports += [(WholeIn(TensorType.of(value_of(i.node))), i) for i in self.whole]
        for out, instance in enumerate(self.carries, start=stored):
            first = self._first(instance)
            ports.append((CarryIn(first.type, out), first))
        return tuple(port for port, _ in ports), tuple(operand for _, operand in ports)

    def _first(self, instance: Instance) -> First:
        """What a carry begins with: zeros before the first row, or what a scan gives for no rows, or their total."""
        node, need, value = instance.node, instance.need, value_of(instance.node)
        if isinstance(need, Rows | Past):
            state = self.demands.claims[instance].state if isinstance(need, Rows) else None
            count, fill = (1, state.fill) if state is not None else (need.rows, 0)  # type: ignore[union-attr]
            shape = tuple(count if d == need.dim.index else size for d, size in enumerate(value.shape))
            return First(TensorType(shape, value.dtype, value.device, storage_order(value)), fill)
        total = TensorType(tuple(value.shape), total_dtype(node), value.device, tuple(range(value.dim())))
        return First(total, identity(node))

    # --- nodes ---

    def _emit(self, instance: Instance) -> fx.Node:
        if isinstance(instance.need, Past):
            return self._with_past(instance)
        node, claim = instance.node, self.demands.claims.get(instance)
        if claim is None:
            target: Any = node.target
            args, kwargs = fx.map_arg((node.args, node.kwargs), self._own)
        else:
            given = [i for i in self.demands.inputs[instance] if is_tensor(i.node)]
            window = Window(self.start, self.count, tuple(self._first_row(i) for i in given))
            target, args, kwargs = call_on_rows(node, claim, window, [self.env[i] for i in given], self._own)
        if isinstance(target, Region):
            return self._inlined(instance, target, args)
        if isinstance(self.length, int):
            args, kwargs = self._without_literals(target, args, kwargs)
        emitted = self.graph.create_node("call_function", target, args, kwargs, name=node.name)
        emitted.meta = {k: v for k, v in node.meta.items() if k != "val"}
        if isinstance(instance.need, Total):
            return self._add_to_total(instance, emitted)
        self._typed(emitted, instance)
        return self._scanned(instance, emitted) if claim is not None and claim.state is not None else emitted

    def _inlined(self, instance: Instance, region: Region, operands: tuple[Any, ...]) -> fx.Node:
        """A region's operators, for the rows that the mini-sequence has."""
        dim = region.dim_of_rows(instance.dim)

        def describe(new: fx.Node, inner: fx.Node) -> None:
            of_rows = inner.meta["per_row"]
            values = meta_value(inner)
            types = [TensorType.of(value) for value in (values if isinstance(values, (tuple, list)) else [values])]
            if of_rows is not None:
                need = Rows(Dim(0, dim.outer, product([dim.inner, of_rows])))
                types = [rows_type(type, need) for type in types]
            new.meta["type"] = tuple(types) if isinstance(values, (tuple, list)) else types[0]

        return region.inline(self.graph, operands, describe)

    def _first_row(self, instance: Instance) -> Any:
        """At which row of the sequence an operand begins; a past, in the first mini-sequences, before there are any."""
        if isinstance(instance.need, Past):
            return add(self.start, -instance.need.rows)
        return self.start if isinstance(instance.need, Rows) else 0

    def _with_past(self, instance: Instance) -> fx.Node:
        """Rows behind those that were handed over. The last of them are handed on."""
        assert isinstance(instance.need, Past)
        dim, rows = instance.dim.index, self.env[self.demands.inputs[instance][0]]
        joined = self.graph.call_function(aten.cat.default, ([self.handed_over[instance], rows], dim))
        last = self.graph.call_function(aten.slice.Tensor, (joined, dim, -instance.need.rows, TO_THE_END))
        last.meta["type"] = self.handed_over[instance].meta["type"]
        self.handed_on[instance] = last
        return self._typed(joined, instance)

    def _add_to_total(self, instance: Instance, part: fx.Node) -> fx.Node:
        before = self.handed_over[instance]
        total = self.graph.call_function(FOLDS[instance.node.target].combine, (before, part))
        part.meta["type"] = total.meta["type"] = before.meta["type"]
        self.handed_on[instance] = total
        return total

    def _scanned(self, instance: Instance, own: fx.Node) -> fx.Node:
        """The scan of all rows so far, for the rows here; the last of them is handed on."""
        state = self.demands.claims[instance].state
        assert state is not None
        before = self.handed_over[instance]
        rows = self.graph.call_function(state.combine, (own, before))
        last = self.graph.call_function(aten.slice.Tensor, (rows, instance.dim.index, -1, TO_THE_END))
        rows.meta["type"], last.meta["type"] = own.meta["type"], before.meta["type"]
        self.handed_on[instance] = last
        return rows

    def _own(self, arg: fx.Node) -> fx.Node:
        """The body's value for all of an outer one."""
        return self.env[Instance(arg, All())]

    def _typed(self, node: fx.Node, instance: Instance) -> fx.Node:
        """Rows are as the value at full length, with as many tokens as the mini-sequence has. Of several values that
        an operator returns at once, one without rows (a seed, say) has no type."""
        value, need, claim = meta_value(instance.node), instance.need, self.demands.claims.get(instance)
        if isinstance(value, torch.Tensor):
            full = TensorType.of(value)
            node.meta["type"] = rows_type(full, need) if isinstance(need, Rows | Past) else full
        elif isinstance(value, (tuple, list)):
            dims = claim.outputs if claim is not None else None
            node.meta["type"] = tuple(
                rows_type(TensorType.of(one), Rows(dim)) if isinstance(one, torch.Tensor) and dim is not None else None
                for one, dim in zip(value, dims or [None] * len(value), strict=True)
            )
        return node

    # --- sizes ---

    def _without_literals(
        self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """In a graph of fixed sizes, a size equal to the length becomes an argument of the body.

        That keeps the body good for every length. It cannot make this graph wrong: the argument has that value.
        """

        def lift(arg: Any) -> Any:
            return self._literal_length() if type(arg) is int and arg == self.length and arg > 1 else arg

        sizes = facts_of(target).size_arguments
        places = {arguments_of(target)[name][0] for name in sizes}
        lifted = tuple(fx.node.map_aggregate(arg, lift) if i in places else arg for i, arg in enumerate(args))
        return lifted, {k: fx.node.map_aggregate(arg, lift) if k in sizes else arg for k, arg in kwargs.items()}

    def _literal_length(self) -> fx.Node:
        if self.literal is None:
            with self.graph.inserting_after(self._length_point):
                self.literal = add_input(self.graph, "length")
        return self.literal

    def _drop_unused_sizes(self) -> None:
        """Sizes that only stood for the rows: without them the body is the same for fixed and for dynamic lengths."""
        for instance in [i for i in self.sizes if not self.env[i].users]:
            self.graph.erase_node(self.env[instance])
            self.sizes.remove(instance)
