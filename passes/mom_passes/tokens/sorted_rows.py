"""Prove that sorting rows by expert, multiplying them in groups and putting them back is row-wise. An analysis.

In a mixture of experts, the result of a token depends on that token only, although none of these operators is row-wise
by itself. The proof gives each value that depends on the sort a role.

Terms
-----
slot     One of the k experts of a token: slot `t * k + j` of N = T * k.
key      The number of a slot's expert. Slots are sorted by key.
place    The position of a slot in sorted order.

    SLOTS    the slot at each place, the indices that `sort` returns: a permutation of all slots
    TOKENS   the token at each place, slot // k
    KEYS     the key at each place, in any dtype that holds it
    PLACED   rows in sorted order; each depends on its own slot only
    COUNTS   how many slots have each of the keys 0 .. G - 1
    ENDS     the end of each group of places: the cumulative sum of counts
    PLACES   the place of each slot: the inverse permutation, which sorting the SLOTS returns, too
    RESULT   rows in the order of slots or tokens again

A grouped product of PLACED rows with the ENDS of the same keys multiplies each row with the matrix of its key, if every
key is in 0 .. G - 1. This is proved for keys from an index operator (topk, argmax, sort). Any other operator on PLACED
rows needs a chunk rule that does not depend on their position. A value without a role is unknown, with a reason.
"""

from __future__ import annotations

import heapq
import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from mom_passes.errors import CannotChunk
from mom_passes.graph.arguments import argument, aten, axis
from mom_passes.graph.edit import add_input
from mom_passes.graph.sizes import product, quotient, same
from mom_passes.graph.values import input_node, operands, value_of
from mom_passes.rules import Dim, Rows, Window, claim_for
from mom_passes.rules.claim import Edit
from mom_passes.rules.matmul import is_grouped_product
from mom_passes.tokens.key_bounds import CASTS, KEY_DTYPES, VIEWS, is_constant, is_range, uncast, upper_bound
from mom_passes.tokens.roles import Member, NotSeparable, Role, Use

#: The dim of PLACED rows. Each place is a row of its own, since the slots of a token are not adjacent.
PLACE = Dim(0)

SORTS = (aten.sort.default, aten.sort.stable)


def sorts_keys(node: fx.Node) -> bool:
    """Whether a sort orders a vector of integers, ascending."""
    keys = value_of(operands(node)[0])
    return keys.dim() == 1 and not keys.is_floating_point() and not argument(node, "descending")


@dataclass
class Sorting:
    """The values that depend on one sort: members in graph order, and unknown values with the reason."""

    sort: fx.Node
    members: dict[fx.Node, Member] = field(default_factory=dict)
    unknown: dict[fx.Node, str] = field(default_factory=dict)
    #: Slots per token.
    k: int | None = None
    #: Members whose rows of slots in no group are undefined; the number of groups and a bound of keys, if keys may be
    #: that number or more.
    undefined: set[fx.Node] = field(default_factory=set)
    groups: int | None = None
    bound: int | None = None

    def __post_init__(self) -> None:
        self.keys = operands(self.sort)[0]
        self.slots = value_of(self.keys).shape[0]
        self.members[self.sort] = Member(Role.SORTED, (Use.OF_SLOTS,))

    @property
    def multiplies(self) -> bool:
        """Whether a grouped product depends on the sort."""
        return any(map(is_grouped_product, (*self.members, *self.unknown)))

    # --- roles ---

    def read(self) -> None:
        """Find the roles of the values that depend on the sort, in graph order, up to a RESULT."""
        pending = [*self.sort.users, *self._key_counts()]
        heapq.heapify(pending)
        while pending:
            node = heapq.heappop(pending)
            if node in self.members or node in self.unknown or node.op != "call_function":
                continue
            self._visit(node)
            if self.role(node) not in (None, Role.RESULT):
                for user in node.users:
                    heapq.heappush(pending, user)

    def _key_counts(self) -> list[fx.Node]:
        """Return the nodes that count the unsorted keys."""
        found, same_keys = [], [uncast(self.keys)]
        while same_keys:
            for user in same_keys.pop().users:
                if user.target in CASTS:
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
        """A cast that keeps the numbers: slots to wide integers, keys to any dtype that holds them."""
        role = self.role(node.args[0]) if node.args else None
        if node.target not in CASTS or len(operands(node)) != 1:
            return None
        if role in (Role.SLOTS, Role.TOKENS, Role.PLACES) and not value_of(node).is_floating_point():
            return Member(role, (None,)) if value_of(node).dtype in (torch.int32, torch.int64) else None
        if role in (Role.COUNTS, Role.ENDS):
            return Member(role, (None,))
        return Member(Role.KEYS, (None,)) if role is Role.KEYS and value_of(node).dtype in KEY_DTYPES else None

    def _token(self, node: fx.Node) -> Member | None:
        """The token of a slot."""
        divides = node.target is aten.floor_divide.default or (
            node.target is aten.div.Tensor_mode and argument(node, "rounding_mode") == "floor"
        )
        if not divides or self.role(node.args[0]) is not Role.SLOTS or not isinstance(node.args[1], int):
            return None
        k = node.args[1]
        if self.k not in (None, k) or k < 1 or quotient(self.slots, k) is None:
            raise NotSeparable(f"its slots are divided by {k}, which does not give their tokens")
        self.k = k
        return Member(Role.TOKENS, (None,))

    def _counts_keys(self, node: fx.Node) -> bool:
        return node.target is aten.histc.default and uncast(operands(node)[0]) is uncast(self.keys)

    def _group(self, node: fx.Node) -> Member | None:
        if node.target is aten.histc.default and (self.role(node.args[0]) is Role.KEYS or self._counts_keys(node)):
            groups = argument(node, "bins")
            if (argument(node, "min"), argument(node, "max")) != (0, groups - 1) or groups < 2:
                raise NotSeparable("its keys are counted in intervals of more than one key")
            self._check_keys(groups)
            return Member(Role.COUNTS, (None if self.role(node.args[0]) else Use.OF_SLOTS,))
        if node.target is aten.cumsum.default and self.role(node.args[0]) is Role.COUNTS:
            return Member(Role.ENDS, (None,))
        return None

    def _check_keys(self, groups: int) -> None:
        bound = upper_bound(self.keys)
        if bound is None:
            raise NotSeparable("its keys may be outside of the groups, as far as the graph tells")
        if bound > groups:
            if self.groups not in (None, groups):
                raise NotSeparable(f"its keys are counted in {self.groups} and in {groups} groups")
            self.groups, self.bound = groups, bound

    def _product(self, node: fx.Node) -> Member | None:
        if not is_grouped_product(node):
            return None
        rows, matrices, *others = operands(node)
        roles = (self.role(rows), self.role(matrices), *map(self.role, others))
        if roles != (Role.PLACED, None, Role.ENDS):
            raise NotSeparable("a grouped product does not multiply sorted rows by the groups of their keys")
        if not same(value_of(matrices).shape[0], value_of(others[0]).shape[0]):
            raise NotSeparable("a grouped product has another number of groups than the counts")
        if self.groups is not None:
            self.undefined.add(node)
        return Member(Role.PLACED, (None, Use.ALL, None))

    def _inverse(self, node: fx.Node) -> Member | None:
        """The inverse permutation, or rows put back by it. It covers all slots, so every element is overwritten."""
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
        if not is_constant(base) or not same(value_of(base).shape[0], self.slots):
            raise NotSeparable("rows are put back into a value of another length, or into one that is no constant")
        if is_range(values, self.slots):
            return Member(Role.PLACES, (Use.CONSTANT, None, Use.CONSTANT))
        if self.role(values) is Role.PLACED and node.target is aten.index_put.default:
            return self._put_back(values, (Use.CONSTANT, None, None))
        return None

    def _sum(self, base: fx.Node, index: fx.Node, values: fx.Node) -> Member | None:
        """Rows that are added to the rows of their tokens or slots."""
        role = self.role(index)
        if role not in (Role.SLOTS, Role.TOKENS) or (self.role(base), self.role(values)) != (None, Role.PLACED):
            return None
        per_row = self.per_token if role is Role.TOKENS else 1
        if not same(product([value_of(base).shape[0], per_row]), self.slots):
            raise NotSeparable("rows are added to a value of another length")
        return self._put_back(values, (Use.OF_TOKENS if role is Role.TOKENS else Use.OF_SLOTS, None, None))

    def _put_back(self, rows: fx.Node, uses: tuple[Use | None, ...]) -> Member:
        if rows in self.undefined:
            raise NotSeparable(f"its keys are below {self.bound}, but there are {self.groups} groups")
        return Member(Role.RESULT, uses)

    def _lookup(self, node: fx.Node) -> Member | None:
        """Rows of slots or tokens in sorted order, or sorted rows in the order of slots again."""
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
            return self._put_back(source, (None, None))
        if self.role(source) is not None:
            return None
        if role is Role.SLOTS and same(length, self.slots):
            return Member(Role.PLACED, (Use.OF_SLOTS, None))
        if role is Role.TOKENS and same(product([length, self.k]), self.slots):
            return Member(Role.PLACED, (Use.OF_TOKENS, None))
        return None

    def _rowwise(self, node: fx.Node) -> Member:
        """PLACED rows by a chunk rule that does not depend on their position."""
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
                raise NotSeparable(f"{node.target} ({node.name}) does not read {operand.name} place by place")
            uses.append(None if inside else Use.ALL)
        if not self.undefined.isdisjoint(operands(node)) and not self._replaces_undefined(node):
            self.undefined.add(node)
        return Member(Role.PLACED, tuple(uses))

    def _replaces_undefined(self, node: fx.Node) -> bool:
        """Whether a node replaces the rows of slots in no group."""
        if node.target is not aten.where.self:
            return False
        condition, rows, _ = operands(node)
        while condition.target in VIEWS:
            condition = operands(condition)[0]
        if condition.target is not aten.ge.Scalar or self.role(condition.args[0]) is not Role.KEYS:
            return False
        return condition.args[1] == self.groups and rows not in self.undefined

    @property
    def per_token(self) -> int:
        return self.k or 1

    # --- the region ---

    def inputs_of(self, node: fx.Node) -> list[tuple[fx.Node, Use]]:
        """Return the operands of a member from outside of the region, with their uses."""
        uses = zip(operands(node), self.members[node].uses, strict=True)
        return [(operand, use) for operand, use in uses if use is not None]

    def result(self) -> fx.Node:
        """Return the only RESULT. Raise `NotSeparable` if there is none or more than one."""
        results = [node for node, member in self.members.items() if member.role is Role.RESULT]
        if not results:
            raise NotSeparable(next(iter(self.unknown.values()), "sorted rows are not put back"))
        if len(results) > 1:
            raise NotSeparable("more than one result is put back")
        return results[0]

    def members_of(self, result: fx.Node) -> list[fx.Node]:
        """Return the members that compute a result, in graph order."""
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
    """Raise `NotSeparable` if an edit depends on the position of the first row: places are no positions."""
    graph = fx.Graph()
    start, count = add_input(graph, "start"), add_input(graph, "count")
    edit(node.args, node.kwargs, Window(start, count, (start,) * len(operands(node))))
    if start.users:
        raise NotSeparable(f"{node.target} ({node.name}) depends on the position of rows")
