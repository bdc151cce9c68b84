"""What only relabels storage, or takes a range of rows of it, by the facts of its operator."""

from __future__ import annotations

from torch import fx

from mom_passes.graph.values import operand_chain
from mom_passes.rules.registry import Alias, facts


def is_view(node: fx.Node) -> bool:
    """All of another value, seen otherwise: repeating it costs nothing."""
    return facts(node).alias is Alias.VIEW


def is_cut(node: fx.Node) -> bool:
    """A range of rows of another value, along the token dimension or another."""
    return facts(node).alias is Alias.CUT


def relabels(node: fx.Node) -> bool:
    """Whether a node may share the storage of what it was given."""
    return is_view(node) or is_cut(node)


def seen_through_views(node: fx.Node) -> fx.Node:
    """What a node is a view of, of a view of, ...; the node itself if it is none."""
    return operand_chain(node, is_view)[-1]
