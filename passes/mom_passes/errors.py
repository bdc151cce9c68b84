"""Exceptions: an operator that cannot be cut into mini-sequences, and passes or rules with a bug."""

from __future__ import annotations

from torch import fx


class CannotChunk(Exception):
    """Rows of `node` along `dim` cannot be computed from rows of its operands.

    Analyses catch it and keep the operator whole. Reports print the reason.
    """

    def __init__(self, node: fx.Node, dim: object, reason: str) -> None:
        self.node = node
        self.dim = dim
        self.reason = reason
        super().__init__(f"{node.target} ({node.name}) along {dim}: {reason}")


class PassError(Exception):
    """A pass broke an invariant. The caller falls back to the graph before it."""


class RuleError(PassError):
    """A chunk rule neither returned a claim that fits its operator nor raised `CannotChunk`."""

    def __init__(self, node: fx.Node, dim: object, fault: str) -> None:
        super().__init__(f"the chunk rule of {node.target} {fault} (asked for {node.name} along {dim})")
