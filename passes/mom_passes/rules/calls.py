"""Build a claim from needs by argument name, and a call on rows from a claim.

claim(node, {"self": Rows(dim)})                 a claim with one need for each of `operands(node)`
call_on_rows(node, claim, window, operands, ..)  target and arguments of a call that computes the rows of a window
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import fx

from mom_passes.graph.arguments import arguments_of
from mom_passes.graph.values import is_tensor, operands
from mom_passes.rules.claim import Claim, Edit
from mom_passes.rules.needs import All, Carry, Need, Output, Window


def call_on_rows(
    node: fx.Node, claim: Claim, window: Window, operands: Iterable[fx.Node], other: Callable[[fx.Node], Any]
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Return target, args and kwargs of a call that computes the rows of a window.

    `operands` are the new graph's tensor operands, in the order of the claim's needs. `other` maps a node that is no
    tensor (a size) to the new graph; an edit may refer to such nodes of the old graph.
    """
    values = iter(operands)
    # Needs are ordered like the tensor operands in args and kwargs, and map_arg visits them in the same order.
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda arg: next(values) if is_tensor(arg) else other(arg))
    if claim.edit is not None:
        args, kwargs = claim.edit(args, kwargs, window)
        args, kwargs = fx.map_arg((args, kwargs), lambda arg: other(arg) if arg.graph is node.graph else arg)
    return claim.target or node.target, args, kwargs


def claim(
    node: fx.Node,
    needs: Mapping[str, Need],
    outputs: tuple[Output, ...] | None = None,
    edit: Edit | None = None,
    target: Any = None,
    carries: tuple[Carry, ...] = (),
) -> Claim:
    """Return a claim from needs by argument name. Operands without a name in `needs` get `All()`."""
    names = {position: name for name, (position, _) in arguments_of(node.target).items()}
    ordered: list[Need] = []
    for position, value in enumerate(node.args):
        ordered += [needs.get(names[position], All())] * len(_tensors(node, value))
    for name, value in node.kwargs.items():
        ordered += [needs.get(name, All())] * len(_tensors(node, value))
    return Claim(tuple(ordered), outputs, edit, target, carries)


def _tensors(node: fx.Node, value: Any) -> list[fx.Node]:
    known = set(operands(node))
    found: list[fx.Node] = []

    def visit(leaf: fx.Node) -> fx.Node:
        if leaf in known:
            found.append(leaf)
        return leaf

    fx.map_arg(value, visit)
    return found
