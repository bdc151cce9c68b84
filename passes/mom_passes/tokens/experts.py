"""Outline mixtures of experts as regions.

    for every sort of keys whose order is used by a grouped product:
        members  = the nodes that compute the result, if they are proved to be row-wise together (`tokens.sorted_rows`)
        template = the members, with the number of rows as an argument
        result   = region(template)(rows of tokens and slots, matrices)

Before:  keys, slots = sort(expert of each slot); rows = x[slots // k]; ...; y = grouped(...)[places]
After:   y = experts(expert of each slot, x, matrices)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx

from mom_passes.graph.arguments import argument, prims, replace
from mom_passes.graph.edit import add_input
from mom_passes.graph.meta import meta_value
from mom_passes.graph.sizes import hint, quotient
from mom_passes.graph.values import is_tensor, operands, value_of
from mom_passes.rules import Window, claim_for, facts
from mom_passes.rules.arithmetic import mul
from mom_passes.rules.calls import call_on_rows
from mom_passes.rules.matmul import is_grouped_product
from mom_passes.rules.source import sized
from mom_passes.tokens.region import Region
from mom_passes.tokens.roles import NotSeparable, Role, Use
from mom_passes.tokens.sorted_rows import PLACE, SORTS, Sorting, sorts_keys


def outline_experts(gm: fx.GraphModule) -> dict[str, str]:
    """Replace every proved region by one call, in place. Return the reasons for the others, by the name of the sort."""
    refused: dict[str, str] = {}
    outlined: set[fx.Node] = set()
    for node in list(gm.graph.nodes):
        if node in outlined or node.target not in SORTS or not sorts_keys(node):
            continue
        found = Sorting(node)
        found.read()
        try:
            outlined |= _outline(gm, found) if found.multiplies else set()
        except NotSeparable as reason:
            refused[node.name] = str(reason)
    return refused


def _outline(gm: fx.GraphModule, found: Sorting) -> set[fx.Node]:
    """Replace the result of a region by one call and erase unused members. Return all members."""
    result = found.result()
    members = found.members_of(result)
    if not any(map(is_grouped_product, members)):
        raise NotSeparable("the rows that are put back are not a grouped product")
    region, given = _Template(found, members, result).build()
    with gm.graph.inserting_before(result):
        call = gm.graph.create_node("call_function", region, tuple(given), name=region.name)
        call.meta = dict(result.meta)
    result.replace_all_uses_with(call)
    constants = [n for node in members for n, use in found.inputs_of(node) if use is Use.CONSTANT]
    for node in (*reversed(members), *dict.fromkeys(constants)):
        if not node.users:
            gm.graph.erase_node(node)
    return set(members)


class _Template:
    """Builds a region's graph."""

    def __init__(self, found: Sorting, members: list[fx.Node], result: fx.Node) -> None:
        self.found, self.members, self.result = found, members, result
        self.graph = fx.Graph()
        self.per_token = found.per_token
        self.rows = add_input(self.graph, "rows")
        self.rows.meta["val"] = quotient(found.slots, self.per_token)

    def build(self) -> tuple[Region, list[fx.Node]]:
        inputs = dict.fromkeys(
            (operand, use) for node in self.members for operand, use in self.found.inputs_of(node)
            if use is not Use.CONSTANT
        )  # fmt: skip
        env: dict[tuple[fx.Node, Use | None], fx.Node] = {}
        per_row = {Use.ALL: None, Use.OF_SLOTS: self.per_token, Use.OF_TOKENS: 1}
        for operand, use in inputs:
            env[operand, use] = add_input(self.graph, operand.name)
            env[operand, use].meta["val"] = meta_value(operand)
        for node in self.members:
            env[node, None] = self._emit(node, env)
        self.graph.output(env[self.result, None])
        # A sum over the slots of a token has one row per token.
        out = 1 if Use.OF_TOKENS in self.found.members[self.result].uses else self.per_token
        groups = [hint(value_of(operands(n)[1]).shape[0]) for n in self.members if is_grouped_product(n)]
        spread = max(groups) / self.per_token
        region = Region("experts", self.graph, tuple(per_row[use] for _, use in inputs), out, spread)
        return region, [operand for operand, _ in inputs]

    def _emit(self, node: fx.Node, env: dict[tuple[fx.Node, Use | None], fx.Node]) -> fx.Node:
        member = self.found.members[node]
        pairs = zip(operands(node), member.uses, strict=True)
        given = [self._constant(n) if use is Use.CONSTANT else env[n, use] for n, use in pairs]
        if member.role is Role.PLACED and self._has_claim(node):
            window = Window(0, mul(self.rows, self.per_token), (0,) * len(given))
            claim = claim_for(node, PLACE)
            target, args, kwargs = call_on_rows(node, claim, window, given, _refuse_size)
        else:
            values: Iterator[fx.Node] = iter(given)
            target = node.target
            args, kwargs = fx.map_arg(
                (node.args, node.kwargs), lambda arg: next(values) if is_tensor(arg) else _refuse_size(arg)
            )
        new = self.graph.create_node("call_function", target, args, kwargs, name=node.name)
        new.meta = dict(node.meta)
        summed = node is self.result and Use.OF_TOKENS in member.uses
        new.meta["per_row"] = 1 if summed else None if member.role in (Role.COUNTS, Role.ENDS) else self.per_token
        return new

    def _has_claim(self, node: fx.Node) -> bool:
        """Whether PLACED rows are computed by a chunk rule, not by a grouped product or a look-up."""
        uses = self.found.members[node].uses
        return not (is_grouped_product(node) or Use.OF_SLOTS in uses or Use.OF_TOKENS in uses)

    def _constant(self, node: fx.Node) -> fx.Node:
        """Emit a constant or range with one element per slot."""
        slots = mul(self.rows, self.per_token)
        if facts(node).rule is sized:
            size = [slots, *argument(node, "size")[1:]]
            args, kwargs = replace(node.target, node.args, node.kwargs, size=size)
            target: Any = node.target
        else:
            options = {"start": 0, "step": 1, "dtype": value_of(node).dtype, "device": value_of(node).device}
            target, args, kwargs = prims.iota.default, (slots,), {**options, "requires_grad": False}
        new = self.graph.create_node("call_function", target, args, kwargs, name=node.name)
        new.meta = {**node.meta, "per_row": self.per_token}
        return new


def _refuse_size(node: fx.Node) -> Any:
    raise NotSeparable(f"an argument of the region depends on the size {node.name}")
