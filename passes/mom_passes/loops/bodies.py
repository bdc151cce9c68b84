"""The body of a loop: one iteration as a graph of its own, with ports.

Terms
-----
members   The instances that a loop computes or reads, from the stored ones back to the available ones.
sizes     SymInt arguments. In a graph with static sizes, the literal length becomes an argument of the body, too.
operand   What the loop's node passes to a port: an instance of the outer graph, the length, or a new tensor with the
          first value of a carry.

    def body(start, count, *sizes, *rows, *whole, *carries):
        for instance in members:                       # in graph order
            result = its operator on what its claim needs, with arguments from the claim's edit
            for carry in its claim's carries:          # rows before the mini-sequence, total of a fold, state of a scan
                join the result with the carry, and compute the carry's next value
        return (*stored rows, *next value of each carry)
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from mom_passes.graph.arguments import argument, arguments_of, replace
from mom_passes.graph.edit import add_input
from mom_passes.graph.meta import meta_value
from mom_passes.graph.sizes import Size, product
from mom_passes.graph.strides import storage_order
from mom_passes.graph.values import is_tensor, value_of
from mom_passes.loops.instances import Carried, DemandGraph, Instance, Kind, widest_per_token
from mom_passes.loops.ports import CarryIn, In, RowsIn, SizeIn, TensorType, WholeIn, rows_type
from mom_passes.loops.stages import StagePlan, body_instances
from mom_passes.ops.rows import JOIN_ROWS
from mom_passes.rules import All, Carry, Dim, Last, Output, Rows, Window, facts_of
from mom_passes.rules.arithmetic import add
from mom_passes.rules.calls import call_on_rows
from mom_passes.rules.view import TO_THE_END
from mom_passes.rules.work import matmul_work
from mom_passes.tokens.region import Region
from mom_passes.torch_compat import graph_module

aten = torch.ops.aten


@dataclass(frozen=True)
class TheLength:
    """The number of tokens."""


@dataclass(frozen=True)
class First:
    """The first value of a carry: a tensor filled with a number."""

    type: TensorType
    fill: int | float | bool


Operand = Instance | TheLength | First

#: The fewest rows of a mini-sequence, unless it has the only row of the sequence (see `split_rows`).
LEAST_ROWS = 2
#: An instance and an index into its claim's `all_carries`.
CarryKey = tuple[Instance, int]


class Body:
    """Builds the body of a loop: `module`, its ports `inputs`, and `operands`, what the loop's node passes to each.

    `widest`, `spread`, `work` and `within`: see `Loop`.
    """

    def __init__(
        self, demands: DemandGraph, plan: StagePlan, length: Size, stored: list[Instance], finals: list[Instance]
    ) -> None:
        self.demands = demands
        self.length = length
        self.graph = fx.Graph()
        self.env: dict[Instance, Any] = {}
        self.literal: fx.Node | None = None
        members = body_instances(demands, [*stored, *finals], plan.available)
        computed = {i for i in members if demands.kinds[i] in (Kind.ROWS, Kind.AHEAD) and i not in plan.available}
        self.rows = [i for i in members if isinstance(i.need, Rows) and i not in computed]
        kinds = (Kind.SOURCE, Kind.BARRIER, Kind.WHOLE)
        self.whole = [i for i in members if isinstance(i.need, All) and demands.kinds[i] in kinds and is_tensor(i.node)]
        self._order_by_use(members)
        self.sizes = [i for i in members if demands.kinds[i] is Kind.SIZE]
        self.sizes += [i for i in members if isinstance(i.need, All) and not is_tensor(i.node) and i not in self.sizes]
        carrying = [i for i in members if i in computed and i in demands.claims]
        self.carries = [(i, k) for i in carrying for k, _ in enumerate(demands.claims[i].all_carries)]
        made = [i for i in computed if isinstance(i.need, Rows) and isinstance(meta_value(i.node), torch.Tensor)]
        self.widest = max(map(widest_per_token, made), default=1)
        self.spread = max((i.node.target.spread for i in made if isinstance(i.node.target, Region)), default=1)
        self.work = sum(matmul_work(i.node) for i in made)
        self._placeholders()
        for instance in members:
            if instance not in self.env:
                self.env[instance] = self._emit(instance)
        self.graph.output((*(self.env[i] for i in stored), *(self.next_values[i] for i in self.carries)))
        self._drop_unused()
        self.stored = len(stored)
        self.inputs, self.operands = self._ports()
        self.within = self._ranges(computed)
        self.module = graph_module(nn.Module(), self.graph, "MiniSequenceBody")

    def _order_by_use(self, members: list[Instance]) -> None:
        """Sort operands by their first reader, so that identical layers have identical bodies.

        The order in which operands are computed differs between layers: the embedding, the first layer's hidden states,
        is computed before the rotary angles that all layers read, the hidden states of other layers after them.
        """
        operands = {*self.rows, *self.whole}
        reads = (operand for i in members if i not in operands for operand in self.demands.inputs.get(i, ()))
        first = {operand: number for number, operand in enumerate(dict.fromkeys(reads))}
        for instances in (self.rows, self.whole):
            instances.sort(key=lambda i: first.get(i, len(first)))

    # --- ports ---

    def _placeholders(self) -> None:
        self.start = add_input(self.graph, "start")
        self.count = add_input(self.graph, "count")
        self._length_point = self.count
        #: The row of the sequence at which rows with `before` begin, by `before`.
        self._first_rows: dict[int, Any] = {}
        for instance in self.sizes:
            self._length_point = self.env[instance] = add_input(self.graph, instance.node.name)
        for instance in (*self.rows, *self.whole):
            own = isinstance(instance.need, Rows)
            placeholder = add_input(self.graph, f"{instance.node.name}_rows" if own else instance.node.name)
            self.env[instance] = self._typed(placeholder, instance)
        #: The value of each carry that the mini-sequence receives, and the next value that it returns.
        self.received = {carry: self._add_carry_input(*carry) for carry in self.carries}
        self.next_values: dict[CarryKey, fx.Node] = {}

    def _add_carry_input(self, instance: Instance, number: int) -> fx.Node:
        placeholder = add_input(self.graph, f"{instance.node.name}_{'ahead' if _is_ahead(instance) else 'carry'}")
        placeholder.meta["type"] = self._carry_type(instance, self._carry(instance, number))
        return placeholder

    def _carry(self, instance: Instance, number: int) -> Carry:
        return self.demands.claims[instance].all_carries[number]

    def _ports(self) -> tuple[tuple[In, ...], tuple[Operand, ...]]:
        """Return ports and operands in the order of the placeholders after `start` and `count`."""
        ports: list[tuple[In, Operand]] = [(SizeIn(meta_value(i.node)), i) for i in self.sizes]
        if self.literal is not None:
            ports.append((SizeIn(self.length), TheLength()))
        ports += [(RowsIn(TensorType.of(value_of(i.node)), i.dim), i) for i in self.rows]
        ports += [(WholeIn(TensorType.of(value_of(i.node))), i) for i in self.whole]
        for out, (instance, number) in enumerate(self.carries, start=self.stored):
            carry = self._carry(instance, number)
            type = self._carry_type(instance, carry)
            initial = argument(instance.node, carry.operand) if carry.operand is not None else None
            first = First(type, carry.init) if initial is None else Instance(initial, All())
            ports.append((CarryIn(type, out), first))
        return tuple(port for port, _ in ports), tuple(operand for _, operand in ports)

    def _ranges(self, computed: set[Instance]) -> tuple[int, ...]:
        """Return the numbers of the inputs whose ranges no mini-sequence may cut."""
        claims = ((i.node, self.demands.claims[i].within) for i in computed if i in self.demands.claims)
        ranges = {argument(node, name) for node, name in claims if name is not None}
        return tuple(n for n, one in enumerate(self.operands) if isinstance(one, Instance) and one.node in ranges)

    def _carry_type(self, instance: Instance, carry: Carry) -> TensorType:
        """Return the type of a carry: that of the last rows of result 0, or of a result without rows."""
        results = meta_value(instance.node)
        several = isinstance(results, (tuple, list))
        value = results[0 if isinstance(carry.next, Last) else carry.next] if several else results
        shape, order = tuple(value.shape), tuple(range(value.dim()))
        if isinstance(carry.next, Last):
            rows, order = carry.next.count, storage_order(value)
            shape = tuple(rows if d == instance.dim.index else size for d, size in enumerate(shape))
        return TensorType(shape, carry.dtype or value.dtype, value.device, order)

    def port_of(self, instance: Instance) -> int:
        """Return the number of the input that receives the carry of an instance."""
        assert isinstance(instance.need, Carried)
        carrying = instance if instance in self.demands.claims else self.demands.inputs[instance][0]
        out = self.stored + self.carries.index((carrying, instance.need.carry))
        return next(i for i, port in enumerate(self.inputs) if isinstance(port, CarryIn) and port.out == out)

    # --- nodes ---

    def _emit(self, instance: Instance) -> fx.Node:
        target: Any
        args: tuple[Any, ...]
        kwargs: dict[str, Any]
        node, claim = instance.node, self.demands.claims.get(instance)
        if isinstance(instance.need, Carried) and claim is None:
            return self.next_values[self.demands.inputs[instance][0], instance.need.carry]
        if _is_ahead(instance):
            rows: fx.Node = self.env[self.demands.inputs[instance][0]]
            if self._is_last_rows(instance):
                self.next_values[instance, 0] = self._last(instance, 0, rows)
                return rows
            order = list(storage_order(value_of(node)))
            target, args, kwargs = JOIN_ROWS, (self.received[instance, 0], rows, instance.dim.index, order), {}
        elif claim is None:
            target = node.target
            args, kwargs = fx.map_arg((node.args, node.kwargs), self._whole_value)
        else:
            given = [i for i in self.demands.inputs[instance] if is_tensor(i.node)]
            window = Window(self.start, self.count, tuple(self._first_row(i) for i in given))
            target, args, kwargs = call_on_rows(node, claim, window, [self.env[i] for i in given], self._whole_value)
            received = {c.operand: self.received[instance, k] for k, c in enumerate(claim.carries) if c.operand}
            args, kwargs = replace(target, args, kwargs, **received)
        if isinstance(target, Region):
            return self._inline(instance, target, args)
        if isinstance(self.length, int):
            args, kwargs = self._without_literals(target, args, kwargs)
        emitted = self.graph.create_node("call_function", target, args, kwargs, name=node.name)
        emitted.meta = {k: v for k, v in node.meta.items() if k != "val"}
        self._typed(emitted, instance)
        for number, carry in enumerate(claim.all_carries if claim is not None else ()):
            emitted = self._update_carry(instance, number, carry, emitted)
        return self.next_values[instance, 0] if isinstance(instance.need, Carried) else emitted

    def _inline(self, instance: Instance, region: Region, operands: tuple[Any, ...]) -> fx.Node:
        """Emit the operators of a region for the rows of the mini-sequence. Return its result."""
        dim = region.dim_of_rows(instance.dim)

        def set_type(new: fx.Node, inner: fx.Node) -> None:
            per_row = inner.meta["per_row"]
            values = meta_value(inner)
            types = [TensorType.of(value) for value in (values if isinstance(values, (tuple, list)) else [values])]
            if per_row is not None:
                need = Rows(Dim(0, dim.outer, product([dim.inner, per_row])))
                types = [rows_type(type, need) for type in types]
            new.meta["type"] = tuple(types) if isinstance(values, (tuple, list)) else types[0]

        return region.inline(self.graph, operands, set_type)

    def _first_row(self, instance: Instance) -> Any:
        """Return the row of the sequence at which an operand begins. Rows before the sequence are negative."""
        if not isinstance(instance.need, Rows):
            return 0
        before = instance.need.before
        if before not in self._first_rows:
            self._first_rows[before] = add(self.start, -before)
        return self._first_rows[before]

    def _update_carry(self, instance: Instance, number: int, carry: Carry, result: fx.Node) -> fx.Node:
        """Emit the next value of a carry, joined with the result if the carry has no operand. Return the result."""
        received = self.received[instance, number]
        if isinstance(carry.next, Last):
            if carry.join is not None:
                result = self._emit_like(result, carry.join, received, result)
            dim, rows = instance.dim.index, result
            # A mini-sequence may have fewer rows than it passes on. Rows ahead are joined with the received ones.
            if carry.next.count > 1 and not _is_ahead(instance):
                rows = self.graph.call_function(aten.cat.default, ([received, result], dim))
                rows.meta["type"] = rows_type(result.meta["type"], Rows(instance.dim, carry.next.count))
            self.next_values[instance, number] = self._last(instance, number, rows)
            return result
        several = isinstance(meta_value(instance.node), (tuple, list))
        part = self._emit_like(received, operator.getitem, result, carry.next) if several else result
        part.meta["type"] = received.meta["type"]
        joined = part if carry.join is None else self._emit_like(received, carry.join, received, part)
        self.next_values[instance, number] = joined
        return result

    def _is_last_rows(self, instance: Instance) -> bool:
        """Whether rows ahead are not read in the body, and each mini-sequence has as many rows itself."""
        read = any(isinstance(reader.need, Rows) for reader in self.demands.readers[instance])
        return not read and isinstance(instance.need, Rows) and instance.need.before <= LEAST_ROWS

    def _last(self, instance: Instance, number: int, rows: fx.Node) -> fx.Node:
        """Emit the last of some rows: the next value of a carry."""
        count = self._carry(instance, number).next
        assert isinstance(count, Last)
        received, dim = self.received[instance, number], instance.dim.index
        return self._emit_like(received, aten.slice.Tensor, rows, dim, -count.count, TO_THE_END)

    def _emit_like(self, typed: fx.Node, target: Any, *args: Any) -> fx.Node:
        """Emit a call whose value has the type of `typed`."""
        node = self.graph.call_function(target, args)
        node.meta["type"] = typed.meta["type"]
        return node

    def _whole_value(self, node: fx.Node) -> fx.Node:
        """Return the body's node for all of a value of the outer graph."""
        found: fx.Node = self.env[Instance(node, All())]
        return found

    def _typed(self, node: fx.Node, instance: Instance) -> fx.Node:
        """Set the type of a node of the body and return the node.

        Rows have the type of the full value with the number of tokens replaced. In a tuple, results without rows (a
        random seed) have no type.
        """
        value, need, claim = meta_value(instance.node), instance.need, self.demands.claims.get(instance)
        if isinstance(value, torch.Tensor):
            full = TensorType.of(value)
            node.meta["type"] = rows_type(full, need) if isinstance(need, Rows) else full
        elif isinstance(value, (tuple, list)):
            outputs = claim.outputs if claim is not None and claim.outputs is not None else (None,) * len(value)
            node.meta["type"] = tuple(map(_output_type, value, outputs))
        return node

    # --- sizes ---

    def _without_literals(
        self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Replace size arguments equal to the static length by an argument of the body.

        The body then works for every length. The replacement is safe: the argument has this value in the graph.
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

    def _drop_unused(self) -> None:
        """Remove unused inputs of the body.

        Without sizes that only the edits have replaced, the body is the same for static and dynamic lengths. The first
        value of a carry is an operand of the loop; the body does not read it.
        """
        if any(self._carry(*carry).operand is not None for carry in self.carries):
            self.graph.eliminate_dead_code()
        for inputs in (self.sizes, self.whole):
            for instance in [i for i in inputs if not self.env[i].users]:
                self.graph.erase_node(self.env[instance])
                inputs.remove(instance)


def _is_ahead(instance: Instance) -> bool:
    return isinstance(instance.need, Rows) and instance.need.before > 0


def _output_type(value: Any, output: Output) -> TensorType | None:
    """Return the type of one result of a call in a body, None if it must not be read."""
    if not isinstance(value, torch.Tensor) or output is None:
        return None
    full = TensorType.of(value)
    return rows_type(full, output) if isinstance(output, Rows) else full
