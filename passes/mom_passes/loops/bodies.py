"""The body of a loop: one iteration as a graph of its own.

Terms
-----
members   The instances a loop computes or reads, from what it stores back to what is at hand.
sizes     SymInt arguments. In a graph of fixed sizes the length is a literal; it becomes an argument here too.

    def body(start, count, *sizes, *sliced, *whole):
        for instance in members:                       # in graph order
            run its operator on what its claim demands, with the arguments its rule's edit gives
        return the stored rows
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from mom_passes.graph.arguments import arguments_of
from mom_passes.graph.sizes import Size
from mom_passes.graph.values import is_tensor
from mom_passes.loops.demands import DemandGraph, Instance, Kind
from mom_passes.loops.stages import StagePlan, body_instances, bytes_per_token
from mom_passes.rules import All, Claim, Rows, Window, facts_of
from mom_passes.rules.calls import call_on_rows

aten = torch.ops.aten


class Body:
    """Builds one iteration: `module`, and which outer values it takes.

    `sizes` holds outer SymInt nodes, or None for a length that was a literal; `sliced` row instances;
    `whole` nodes of which it takes all. `widest` is the most bytes that one token of a value made here takes.
    """

    def __init__(self, demands: DemandGraph, plan: StagePlan, length: Size, stored: list[Instance]) -> None:
        self.demands = demands
        self.length = length
        self.graph = fx.Graph()
        self.env: dict[Instance, Any] = {}
        self.literal: fx.Node | None = None
        members = body_instances(demands, stored, plan.available)
        self.sliced = [i for i in members if i.need != All() and not self._computed(i, plan)]
        self.whole = self._whole_nodes(members)
        made = [i for i in members if self._computed(i, plan) and isinstance(i.need, Rows)]
        self.widest = max((bytes_per_token(i) for i in made if isinstance(i.node.meta["val"], torch.Tensor)), default=1)
        self.sizes: list[fx.Node | None] = [i.node for i in members if demands.kinds[i] is Kind.SIZE]
        numbers = [i.node for i in members if i.need == All() and not is_tensor(i.node)]
        self.sizes += [node for node in numbers if node not in self.sizes]
        self._placeholders()
        for instance in members:
            if instance not in self.env:
                self.env[instance] = self._emit(instance)
        self.graph.output(tuple(self.env[i] for i in stored))
        self._drop_unused_sizes()
        self._bind_literal()
        self.module = fx.GraphModule(nn.Module(), self.graph, "MiniSequenceBody")

    def _computed(self, instance: Instance, plan: StagePlan) -> bool:
        return self.demands.kinds[instance] is Kind.ROWS and instance not in plan.available

    def _whole_nodes(self, members: list[Instance]) -> list[fx.Node]:
        kinds = (Kind.SOURCE, Kind.BARRIER, Kind.WHOLE)
        return [i.node for i in members if i.need == All() and self.demands.kinds[i] in kinds and is_tensor(i.node)]

    def _placeholders(self) -> None:
        self.start = self.graph.placeholder("start")
        self.count = self.graph.placeholder("count")
        for node in self.sizes:
            assert node is not None
            self.env[Instance(node, All())] = self.graph.placeholder(node.name)
        self._length_point = self.count if not self.sizes else self.env[Instance(self.sizes[-1], All())]  # type: ignore[arg-type]
        for instance in self.sliced:
            self.env[instance] = self.graph.placeholder(f"{instance.node.name}_rows")
        for node in self.whole:
            self.env[Instance(node, All())] = self.graph.placeholder(node.name)

    def size_values(self) -> tuple[Size, ...]:
        return tuple(self.length if node is None else node.meta["val"] for node in self.sizes)

    def _emit(self, instance: Instance) -> fx.Node:
        node, claim = instance.node, self.demands.claims.get(instance)
        if claim is None:
            target: Any = node.target
            args, kwargs = fx.map_arg((node.args, node.kwargs), self._own)
        else:
            operands = [self.env[i] for i in self.demands.inputs[instance] if is_tensor(i.node)]
            target, args, kwargs = call_on_rows(node, claim, self._window(claim), operands, self._own)
        if isinstance(self.length, int):
            args, kwargs = self._without_literals(target, args, kwargs)
        emitted = self.graph.create_node("call_function", target, args, kwargs, name=node.name)
        emitted.meta = {k: v for k, v in node.meta.items() if k != "val"}
        return emitted

    def _own(self, arg: fx.Node) -> fx.Node:
        """The body's value for all of an outer one."""
        return self.env[Instance(arg, All())]

    def _window(self, claim: Claim) -> Window:
        first = tuple(self.start if isinstance(need, Rows) else 0 for need in claim.needs)
        return Window(self.start, self.count, first)

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
                self.literal = self.graph.placeholder("length")
        return self.literal

    def _drop_unused_sizes(self) -> None:
        """Sizes that only stood for the rows: without them the body is the same for fixed and for dynamic lengths."""
        unused = [n for n in self.sizes if n is not None and not self.env[Instance(n, All())].users]
        for node in unused:
            self.graph.erase_node(self.env[Instance(node, All())])
        self.sizes = [n for n in self.sizes if n not in unused]

    def _bind_literal(self) -> None:
        if self.literal is not None:
            self.sizes.append(None)
