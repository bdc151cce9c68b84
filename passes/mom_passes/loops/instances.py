"""The demand graph: values as their readers need them. `loops.demands` builds it and has the terms."""

from __future__ import annotations

import enum
import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from mom_passes.graph.arguments import argument_node, aten
from mom_passes.graph.meta import meta_value
from mom_passes.graph.sizes import Size, count_hint, hint, product, quotient
from mom_passes.graph.values import is_tensor
from mom_passes.rules import All, Claim, Dim, Fold, Rows, facts
from mom_passes.tokens.region import Region


@dataclass(frozen=True)
class Carried:
    """The value of a carry after the last row: carry number `carry` of a call, or the last rows of `of`."""

    carry: int
    of: Rows | None = None

    def __str__(self) -> str:
        return f"carry {self.carry}" if self.of is None else f"last {self.of.before} rows"


class Kind(enum.Enum):
    SOURCE = "source"
    ROWS = "rows"
    AHEAD = "ahead"
    ENTRY = "entry"
    BARRIER = "barrier"
    WHOLE = "whole"
    INLINE = "inline"
    SIZE = "size"


@dataclass(frozen=True)
class Instance:
    """A node and the need of its readers."""

    node: fx.Node
    need: All | Rows | Carried

    def __hash__(self) -> int:
        # A node has few instances, and hashing a need is slower than comparing it.
        return hash(self.node)

    @property
    def dim(self) -> Dim:
        """The dim of an instance with rows."""
        assert isinstance(self.need, Rows), f"{self} has no rows"
        return self.need.dim

    def __str__(self) -> str:
        return self.node.name if isinstance(self.need, All) else f"{self.node.name}[{self.need}]"


@dataclass
class DemandGraph:
    """Instances in topological order, with their kinds, operands and readers."""

    kinds: dict[Instance, Kind] = field(default_factory=dict)
    inputs: dict[Instance, tuple[Instance, ...]] = field(default_factory=dict)
    claims: dict[Instance, Claim] = field(default_factory=dict)
    readers: dict[Instance, list[Instance]] = field(default_factory=dict)
    outputs: tuple[Instance, ...] = ()
    order: list[Instance] = field(default_factory=list)
    position: dict[Instance, int] = field(default_factory=dict)

    def length(self, instance: Instance) -> Size:
        """Return the number of tokens of an instance with rows, or of the rows that a carry accumulates."""
        while isinstance(instance.need, Carried):
            instance = next(one for one in self.inputs[instance] if not isinstance(one.need, All))
        return instance_length(instance)

    def fold(self, instance: Instance) -> Fold | None:
        """Return the fold whose total is the carry of an instance, None for another carry."""
        assert isinstance(instance.need, Carried)
        claim = self.claims.get(instance if instance in self.claims else self.inputs[instance][0])
        outputs = enumerate(claim.outputs or () if claim is not None else ())
        found = (one for i, one in outputs if claim is not None and claim.carry_of(i) == instance.need.carry)
        return next((one for one in found if isinstance(one, Fold)), None)

    def recomputable(self, instance: Instance) -> bool:
        if instance.node.target is operator.getitem:
            return all(self.recomputable(i) for i in self.inputs.get(instance, ()))
        return self.kinds[instance] is Kind.AHEAD or (
            self.kinds[instance] is Kind.ROWS and (facts(instance.node).recompute or looks_up_positions(instance.node))
        )


def looks_up_positions(node: fx.Node) -> bool:
    """Return whether a node looks up rows of a table by indices that are made of sizes alone, such as the distances of
    queries and keys. Its result may be larger than all that it is made of."""
    if node.target is not aten.embedding.default:
        return False
    pending, seen = [argument_node(node, "indices")], set[fx.Node]()
    while pending:
        found = pending.pop()
        if found.op in ("placeholder", "get_attr") and is_tensor(found):
            return False
        seen.add(found)
        pending += [operand for operand in found.all_input_nodes if operand not in seen]
    return True


def instance_length(instance: Instance) -> Size:
    """Return the number of tokens of an instance with rows."""
    dim = instance.dim
    value = meta_value(instance.node)
    first = value[0] if isinstance(value, (tuple, list)) else value
    length = quotient(first.shape[dim.index], product([dim.outer, dim.inner]))
    assert length is not None, f"{instance}: rows do not divide the dimension"
    return length


def bytes_per_token(instance: Instance) -> int:
    """Return the bytes per token of a row instance at the captured sizes."""
    value = meta_value(instance.node)
    assert isinstance(value, torch.Tensor)
    dim = instance.dim
    length = hint(value.shape[dim.index]) // (hint(dim.outer) * hint(dim.inner))
    return max(1, count_hint(value.shape) * value.element_size() // max(1, length))


def widest_per_token(instance: Instance) -> int:
    """Return the bytes per token of the widest value computed for a row instance, inside its region if it has one."""
    target: Any = instance.node.target
    own = bytes_per_token(instance)
    if not isinstance(target, Region):
        return own
    dim = target.dim_of_rows(instance.dim)
    return max(own, target.widest * hint(dim.outer) * hint(dim.inner))
