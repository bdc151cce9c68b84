"""The one place where a node's example value is read."""

from __future__ import annotations

from typing import Any

from torch import fx


def meta_value(node: fx.Node) -> Any:
    """The example value of a node: a fake tensor, several, a size or a number; None where it was not propagated."""
    return node.meta.get("val")


def typed_value(node: fx.Node) -> Any:
    """Return the `TensorType` of a node in a loop body, else its fake tensor: both have shape, dtype and device."""
    return node.meta["type"] if "type" in node.meta else meta_value(node)
