"""The one refusal of this package, an operator that cannot be cut, by name; and what went wrong."""

from __future__ import annotations

from torch import fx


class CannotChunk(Exception):
    """A chunk rule cannot compute some rows of `node` along a dimension.

    A chunk rule raises it. The operator then runs once on the full sequence, and reports show the reason.
    """

    def __init__(self, node: fx.Node, dim: object, reason: str) -> None:
        self.node = node
        self.dim = dim
        self.reason = reason
        super().__init__(f"{node.target} ({node.name}) along {dim}: {reason}")


class PassError(Exception):
    """A pass broke one of its own invariants; the caller falls back to the graph it had."""


class RuleError(PassError):
    """A chunk rule answered neither with a claim that fits its operator nor with `CannotChunk`."""

    def __init__(self, node: fx.Node, dim: object, fault: str) -> None:
        super().__init__(f"the chunk rule of {node.target} {fault} (asked for {node.name} along {dim})")
