"""Read what follows from a sort: which values are rows at their sorted places, and which are back.

Each token's result in a mixture of experts follows from that token alone: sorting rows by expert, multiplying them in
groups and putting them back is how one call computes it. None of the operators between is row-wise by itself; what they
are together is proved here, from what each value is:

Terms
-----
slot     One of the k experts of a token: slot `t * k + j` of N = T * k.
key      The number of a slot's expert. What is sorted by.
place    Where a slot stands once they are sorted by key.

    SLOTS    the slot at each place, which is what `sort` returns as indices: a permutation of all slots
    TOKENS   the token at each place, slot // k
    KEYS     the key at each place, cast or not
    PLACED   rows at their places; each follows from its own slot alone
    COUNTS   how many slots have each of the keys 0 .. G - 1
    ENDS     behind which place each group ends: the running sum of counts
    PLACES   the place of each slot: the inverse permutation, which sorting the SLOTS returns too
    HOME     rows that are back where their slots or tokens are: the result

A grouped product of PLACED rows by the ENDS of the same keys multiplies each with the matrix of its own key, if every
key is in 0 .. G - 1; that is proved of what an index operator returns (topk, argmax, sort). Everything else that takes
PLACED rows has a chunk rule along them that does not ask where they stand. What cannot be shown is unknown, with the
reason.
"""

from __future__ import annotations

import enum
import heapq
import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from mom_passes.errors import CannotChunk
from mom_passes.graph.arguments import argument, aten, axis, prims
from mom_passes.graph.edit import add_input
from mom_passes.graph.sizes import expr, product, quotient, same
from mom_passes.graph.values import input_node, operands, value_of
from mom_passes.rules import Dim, Rows, Window, claim_for, facts
from mom_passes.rules.matmul import is_grouped_product
from mom_passes.rules.registry import Edit
from mom_passes.rules.source import sized


class Role(enum.Enum):
    SORTED = enum.auto()
    UNSORTED = enum.auto()
    SLOTS = enum.auto()
    TOKENS = enum.auto()
    KEYS = enum.auto()
    PLACED = enum.auto()
    COUNTS = enum.auto()
    ENDS = enum.auto()
    PLACES = enum.auto()
    HOME = enum.auto()


class Use(enum.Enum):
    """What a member needs of a value from outside."""

    ALL = enum.auto()
    OF_SLOTS = enum.auto()
    OF_TOKENS = enum.auto()
    #: A constant of one element for each slot, made anew for the slots that there are.
    CONSTANT = enum.auto()


#: Where rows at their places are. Each stands for itself: those of one token are far apart.
PLACE = Dim(0)

SORTS = (aten.sort.default, aten.sort.stable)


class NotSeparable(Exception):
    """Why rows that were sorted cannot be shown to be independent."""


@dataclass(frozen=True)
class Member:
    """A node of the region: what it is, and what it needs of each operand that is none (None: it is)."""

    role: Role
    uses: tuple[Use | None, ...]


def sorts_keys(node: fx.Node) -> bool:
    keys = value_of(operands(node)[0])
    return keys.dim() == 1 and not keys.is_floating_point() and not argument(node, "descending")


@dataclass
class Sorting:
    """What follows from one sort: its members, read in graph order."""

    sort: fx.Node
    members: dict[fx.Node, Member] = field(default_factory=dict)
    #: What follows from the sort and is nothing that is known, with the reason.
    unknown: dict[fx.Node, str] = field(default_factory=dict)
    #: Slots for each token.
    k: int | None = None

    def __post_init__(self) -> None:
        self.keys = operands(self.sort)[0]
        self.slots = value_of(self.keys).shape[0]
        self.members[self.sort] = Member(Role.SORTED, (Use.OF_SLOTS,))

    @property
    def multiplies(self) -> bool:
        """Whether what is sorted is multiplied in groups, known or not."""
        return any(map(is_grouped_product, (*self.members, *self.unknown)))

    # --- reading ---

    def read(self) -> None:
        """What follows from the sort, in graph order. A result that is back in order ends it."""
        pending = [*self.sort.users, *self._counts()]
        heapq.heapify(pending)
        while pending:
            node = heapq.heappop(pending)
            if node in self.members or node in self.unknown or node.op != "call_function":
                continue
            self._visit(node)
            if self.role(node) not in (None, Role.HOME):
                for user in node.users:
                    heapq.heappush(pending, user)

    def _counts(self) -> list[fx.Node]:
        """What counts the keys as they are before they are sorted."""
        found, same_keys = [], [_uncast(self.keys)]
        while same_keys:
            for user in same_keys.pop().users:
                if user.target in _CASTS:
                    same_keys.append(user)
                elif self._counts_keys(user):
                    found.append(user)
        return found

    def _visit(self, node: fx.Node) -> None:
        try:
            self.members[node] = self._member(node)
        except NotSeparable as reason:
            self.unknown[node] = str(reason)

    def role(self, node: Any) -> Role | None:
        member = self.members.get(node) if isinstance(node, fx.Node) else None
        return None if member is None else member.role

    def _member(self, node: fx.Node) -> Member:
        for read in (self._item, self._cast, self._token, self._group, self._product, self._inverse, self._lookup):
            member = read(node)
            if member is not None:
                return member
        return self._rowwise(node)

    def _item(self, node: fx.Node) -> Member | None:
        role = self.role(node.args[0]) if node.target is operator.getitem else None
        if role is Role.SORTED:
            return Member(Role.SLOTS if node.args[1] else Role.KEYS, (None,))
        return Member(Role.PLACES, (None,)) if role is Role.UNSORTED and node.args[1] else None

    def _cast(self, node: fx.Node) -> Member | None:
        """Numbers that stay the same: of slots in integers, of keys in any type that has them."""
        role = self.role(node.args[0]) if node.args else None
        if node.target not in _CASTS or len(operands(node)) != 1:
            return None
        if role in (Role.SLOTS, Role.TOKENS, Role.PLACES) and not value_of(node).is_floating_point():
            return Member(role, (None,)) if value_of(node).dtype in _WIDE else None
        if role in (Role.COUNTS, Role.ENDS):
            return Member(role, (None,))
        return Member(Role.KEYS, (None,)) if role is Role.KEYS and value_of(node).dtype in _KEYS else None

    def _token(self, node: fx.Node) -> Member | None:
        """The token of a slot."""
        divides = node.target is aten.floor_divide.default or (
            node.target is aten.div.Tensor_mode and argument(node, "rounding_mode") == "floor"
        )
        if not divides or self.role(node.args[0]) is not Role.SLOTS or not isinstance(node.args[1], int):
            return None
        k = node.args[1]
        if self.k not in (None, k) or k < 1 or quotient(self.slots, k) is None:
            raise NotSeparable(f"its slots are divided by {k}, which does not tell their tokens")
        self.k = k
        return Member(Role.TOKENS, (None,))

    def _counts_keys(self, node: fx.Node) -> bool:
        return node.target is aten.histc.default and _uncast(operands(node)[0]) is _uncast(self.keys)

    def _group(self, node: fx.Node) -> Member | None:
        if node.target is aten.histc.default and (self.role(node.args[0]) is Role.KEYS or self._counts_keys(node)):
            groups = argument(node, "bins")
            if (argument(node, "min"), argument(node, "max")) != (0, groups - 1) or groups < 2:
                raise NotSeparable("its keys are counted in intervals that hold more than one")
            self._check_keys(groups)
            return Member(Role.COUNTS, (None if self.role(node.args[0]) else Use.OF_SLOTS,))
        if node.target is aten.cumsum.default and self.role(node.args[0]) is Role.COUNTS:
            return Member(Role.ENDS, (None,))
        return None

    def _check_keys(self, groups: int) -> None:
        known = _indices_below(self.keys)
        if known is None:
            raise NotSeparable("its keys may be outside of the groups, as far as the graph tells")
        if known > groups:
            raise NotSeparable(f"its keys are below {known}, but there are {groups} groups")

    def _product(self, node: fx.Node) -> Member | None:
        if not is_grouped_product(node):
            return None
        rows, matrices, *others = operands(node)
        roles = (self.role(rows), self.role(matrices), *map(self.role, others))
        if roles != (Role.PLACED, None, Role.ENDS):
            raise NotSeparable("a grouped product is not of sorted rows by the groups of what they are sorted by")
        if not same(value_of(matrices).shape[0], value_of(others[0]).shape[0]):
            raise NotSeparable("a grouped product has other groups than were counted")
        return Member(Role.PLACED, (None, Use.ALL, None))

    def _inverse(self, node: fx.Node) -> Member | None:
        """The place of each slot. The permutation is of all slots, so nothing is left of what is written over."""
        if node.target in SORTS and self.role(operands(node)[0]) is Role.SLOTS and not argument(node, "descending"):
            return Member(Role.UNSORTED, (None,))
        if node.target is aten.index_put.default and len(argument(node, "indices")) == 1:
            base, (slots,), values = argument(node, "self"), argument(node, "indices"), argument(node, "values")
        elif node.target is aten.scatter.src:
            base, slots, values = (argument(node, name) for name in ("self", "index", "src"))
        else:
            return None
        if node.target is aten.index_put.default and argument(node, "accumulate"):
            return self._sum(base, slots, values)
        if self.role(slots) is not Role.SLOTS or self.role(base) is not None:
            return None
        if not self._is_constant(base) or not same(value_of(base).shape[0], self.slots):
            raise NotSeparable("rows are put back into a value of another length, or one that is no constant")
        if self._is_range(values):
            return Member(Role.PLACES, (Use.CONSTANT, None, Use.CONSTANT))
        if self.role(values) is Role.PLACED and node.target is aten.index_put.default:
            return Member(Role.HOME, (Use.CONSTANT, None, None))
        return None

    def _sum(self, base: fx.Node, index: fx.Node, values: fx.Node) -> Member | None:
        """What is added to each token's row, or each slot's."""
        role = self.role(index)
        if role not in (Role.SLOTS, Role.TOKENS) or (self.role(base), self.role(values)) != (None, Role.PLACED):
            return None
        per_row = self.per_token if role is Role.TOKENS else 1
        if not same(product([value_of(base).shape[0], per_row]), self.slots):
            raise NotSeparable("rows are added to a value of another length")
        return Member(Role.HOME, (Use.OF_TOKENS if role is Role.TOKENS else Use.OF_SLOTS, None, None))

    def _is_constant(self, node: Any) -> bool:
        return isinstance(node, fx.Node) and not operands(node) and facts(node).rule is sized

    def _is_range(self, node: Any) -> bool:
        value = value_of(node)
        if value.dim() != 1 or not same(value.shape[0], self.slots):
            return False
        if node.target is prims.iota.default:
            return (argument(node, "start"), argument(node, "step")) == (0, 1)
        return node.target is aten.arange.default or (
            node.target in (aten.arange.start, aten.arange.start_step)
            and argument(node, "start") == 0
            and (node.target is aten.arange.start or argument(node, "step") == 1)
        )

    def _lookup(self, node: fx.Node) -> Member | None:
        """Rows of slots or tokens at their places, and rows at their places back at their slots."""
        if node.target is aten.index.Tensor:
            source, indices = input_node(node), argument(node, "indices")
            if len(indices) != 1:
                return None
            index = indices[0]
        elif node.target is aten.index_select.default and axis(argument(node, "dim"), value_of(node).dim()) == 0:
            source, index = argument(node, "self"), argument(node, "index")
        else:
            return None
        role, length = self.role(index), value_of(source).shape[0]
        if role is Role.PLACES and self.role(source) in (Role.PLACED, Role.KEYS):
            return Member(Role.HOME, (None, None))
        if self.role(source) is not None:
            return None
        if role is Role.SLOTS and same(length, self.slots):
            return Member(Role.PLACED, (Use.OF_SLOTS, None))
        if role is Role.TOKENS and same(product([length, self.k]), self.slots):
            return Member(Role.PLACED, (Use.OF_TOKENS, None))
        return None

    def _rowwise(self, node: fx.Node) -> Member:
        """By the operator's chunk rule along the places, of which it may not ask which they are."""
        try:
            claim = claim_for(node, PLACE)
        except CannotChunk as refusal:
            raise NotSeparable(f"{node.target} ({node.name}): {refusal.reason}") from refusal
        if claim.edit is not None:
            _check_rows_are_position_free(node, claim.edit)
        uses: list[Use | None] = []
        for operand, need in zip(operands(node), claim.needs, strict=True):
            inside = self.role(operand) in (Role.PLACED, Role.KEYS)
            if self.role(operand) not in (Role.PLACED, Role.KEYS, None) or inside != (need == Rows(PLACE)):
                raise NotSeparable(f"{node.target} ({node.name}) reads {operand.name} otherwise than place by place")
            uses.append(None if inside else Use.ALL)
        return Member(Role.PLACED, tuple(uses))

    @property
    def per_token(self) -> int:
        return self.k or 1

    # --- what it comes to ---

    def outside(self, node: fx.Node) -> list[tuple[fx.Node, Use]]:
        """The operands of a member that are none, and what it needs of them."""
        uses = zip(operands(node), self.members[node].uses, strict=True)
        return [(operand, use) for operand, use in uses if use is not None]

    def result(self) -> fx.Node:
        homes = [node for node, member in self.members.items() if member.role is Role.HOME]
        if not homes:
            why = next(iter(self.unknown.values()), "sorted rows are not put back")
            raise NotSeparable(why)
        if len(homes) > 1:
            raise NotSeparable("more than one result is put back")
        return homes[0]

    def behind(self, result: fx.Node) -> list[fx.Node]:
        """The members a result is made of, in graph order."""
        found: set[fx.Node] = set()
        pending = [result]
        while pending:
            node = pending.pop()
            if node not in found:
                found.add(node)
                uses = zip(operands(node), self.members[node].uses, strict=True)
                pending.extend(operand for operand, use in uses if use is None)
        return [node for node in self.members if node in found]


def _check_rows_are_position_free(node: fx.Node, edit: Edit) -> None:
    """Places are no positions: a rule that asks where rows begin is refused."""
    graph = fx.Graph()
    start, count = add_input(graph, "start"), add_input(graph, "count")
    edit(node.args, node.kwargs, Window(start, count, (start,) * len(operands(node))))
    if start.users:
        raise NotSeparable(f"{node.target} ({node.name}) depends on where rows stand")


_CASTS = (aten._to_copy.default, prims.convert_element_type.default, aten.clone.default)
_WIDE = (torch.int32, torch.int64)
#: Types that hold the number of any expert.
_KEYS = (torch.int16, torch.int32, torch.int64, torch.float32, torch.float64)


def _uncast(node: fx.Node) -> fx.Node:
    while node.target in _CASTS and (node.target is aten.clone.default or value_of(node).dtype in _KEYS):
        node = operands(node)[0]
    return node


#: They return numbers below the size of a dimension: of the operand's, along `dim`.
_INDICES = {aten.topk.default: 1, aten.sort.default: 1, aten.sort.stable: 1, aten.max.dim: 1, aten.min.dim: 1}
_RELABELLED = (aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.unsqueeze.default,
               aten.squeeze.dim, aten.slice.Tensor, aten.select.int, aten.permute.default, aten.transpose.int,
               aten.expand.default)  # fmt: skip


def _indices_below(node: fx.Node) -> int | None:
    """A number that all elements are below, none of them negative, if they are indices along a dimension."""
    while node.target in _RELABELLED or (node.target in _CASTS and value_of(node).dtype in _KEYS):
        node = operands(node)[0]
    if node.target is aten.cat.default:
        below = [_indices_below(part) for part in operands(node)]
        return None if None in below else max(filter(None, below))
    source, item = node.args if node.target is operator.getitem else (node, 0)
    if not isinstance(source, fx.Node) or (source.target in _INDICES and item != _INDICES[source.target]):
        return None
    if source.target not in _INDICES and source.target is not aten.argmax.default:
        return None
    (operand,) = operands(source)
    dim, rank = argument(source, "dim"), value_of(operand).dim()
    if dim is None:
        return None
    size = value_of(operand).shape[axis(dim, rank)]
    return int(expr(size)) if expr(size).is_Integer else None
