"""Whether an operator is a view, by its facts."""

from __future__ import annotations

from torch import fx

from mom_passes.graph.values import operand_chain
from mom_passes.rules.registry import Alias, facts


def is_view(node: fx.Node) -> bool:
    """Whether a node is a view of all elements of its operand. Repeating such a view costs nothing."""
    return facts(node).alias is Alias.VIEW


def is_cut(node: fx.Node) -> bool:
    """Whether a node is a view of a part of its operand along one dimension, such as a slice."""
    return facts(node).alias is Alias.CUT


def relabels(node: fx.Node) -> bool:
    """Whether a node is a view of its operand."""
    return is_view(node) or is_cut(node)


def seen_through_views(node: fx.Node) -> fx.Node:
    """Return the value under a chain of views, or the node itself if it is no view."""
    return operand_chain(node, is_view)[-1]
