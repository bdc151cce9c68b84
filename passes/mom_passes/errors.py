"""Exceptions: an operator that cannot be cut into mini-sequences, and passes or rules with a bug."""

from __future__ import annotations

from torch import fx

from mom_passes.source_lines import with_source_line


class CannotChunk(Exception):
    """Rows of `node` along `dim` cannot be computed from rows of its operands.

    A chunk rule raises it. The operator then runs once on the full sequence, and reports show the reason.
    """

    def __init__(self, node: fx.Node, dim: object, reason: str) -> None:
        self.node = node
        self.dim = dim
        self.reason = reason
        super().__init__(f"{node.target} ({node.name}) along {dim}: {reason}")

    def __str__(self) -> str:
        # Not in `__init__`: analyses make many of these, and show few.
        return with_source_line(str(self.args[0]), self.node)


class NoRule(CannotChunk):
    """No chunk rule is registered for the operator of `node`."""

    def __init__(self, node: fx.Node, dim: object) -> None:
        super().__init__(node, dim, "no chunk rule is registered for this operator")


class PassError(Exception):
    """A pass broke an invariant. The caller falls back to the graph before it.

    The message names the user's line of `node`, if a node is given.
    """

    def __init__(self, message: str, node: fx.Node | None = None) -> None:
        super().__init__(message if node is None else with_source_line(message, node))


class RuleError(PassError):
    """A chunk rule neither returned a claim that fits its operator nor raised `CannotChunk`."""

    def __init__(self, node: fx.Node, dim: object, fault: str) -> None:
        super().__init__(f"the chunk rule of {node.target} {fault} (asked for {node.name} along {dim})", node)
