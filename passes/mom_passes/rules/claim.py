"""The answer of a chunk rule, and the checks of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx

from mom_passes.graph.arguments import arguments_of
from mom_passes.graph.values import operands
from mom_passes.rules.needs import Carry, Final, Fold, Need, Output, Window, find_fault

Edit = Callable[[tuple[Any, ...], dict[str, Any], Window], tuple[tuple[Any, ...], dict[str, Any]]]


@dataclass(frozen=True)
class Claim:
    """The answer of a chunk rule: what rows of a call need, what they return, and what they hand to the next rows.

    Attributes
    ----------
    needs : tuple of All or Rows
        One need for each tensor operand of the node, in order, duplicates included.
    outputs : tuple of Rows, Fold, Final or None, optional
        One output for each result of the call. `None` for a result that must not be read. Without it every result has
        rows along the dimension that the rule was asked about.
    edit : callable, optional
        `(args, kwargs, window) -> (args, kwargs)`: the arguments of the call in a loop body.
    target : callable, optional
        Another operator to call in the body, for instance one that takes a row offset.
    carries : tuple of Carry, optional
        The values that a mini-sequence passes to the next, so that they run in order.
    within : str, optional
        Name of an argument with the ranges of `mom.spans`, `[1, T, 2]`. Rows whose ranges overlap must be in the same
        mini-sequence: a loop with this call is cut between ranges only.
    """

    needs: tuple[Need, ...]
    outputs: tuple[Output, ...] | None = None
    edit: Edit | None = None
    target: Any = None
    carries: tuple[Carry, ...] = ()
    within: str | None = None

    @property
    def all_carries(self) -> tuple[Carry, ...]:
        """The carries, followed by one for the total of each fold."""
        folds = [(i, one) for i, one in enumerate(self.outputs or ()) if isinstance(one, Fold)]
        return self.carries + tuple(Carry(f.identity, i, join=f.combine, dtype=f.dtype) for i, f in folds)

    def carry_of(self, output: int) -> int | None:
        """Return the index in `all_carries` of the carry whose final value is this output, None for other outputs."""
        found = (self.outputs or ())[output : output + 1]
        if found and isinstance(found[0], Final):
            return found[0].carry
        if found and isinstance(found[0], Fold):
            return len(self.carries) + sum(isinstance(one, Fold) for one in (self.outputs or ())[:output])
        return None


def find_fault_of(claim: Any, node: fx.Node) -> str | None:
    """Return what is wrong with the result of a rule, or None."""
    if not isinstance(claim, Claim):
        return f"returned {claim!r}; return a Claim, or raise CannotChunk"
    needs, count = claim.needs, len(operands(node))
    if not isinstance(needs, tuple) or not all(isinstance(need, Need) for need in needs):
        return f"needs {needs!r}; expected a tuple of Rows(dim, before) and All(), one per tensor operand"
    if len(needs) != count:
        return f"has {len(needs)} needs for {count} tensor operands"
    wrong = next(filter(None, map(find_fault, needs)), None)
    if wrong is not None:
        return f"needs {needs!r}; {wrong}"
    return _fault_of_outputs(claim) or next(filter(None, (_fault_of_carry(one, node) for one in claim.carries)), None)


def _fault_of_outputs(claim: Claim) -> str | None:
    outputs = claim.outputs if claim.outputs is not None else ()
    if not isinstance(outputs, tuple) or not all(one is None or isinstance(one, Output) for one in outputs):
        return f"returns {outputs!r}; expected a tuple of Rows(dim), Fold, Final(carry) and None, one per output"
    finals = [one.carry for one in outputs if isinstance(one, Final)]
    if any(not 0 <= number < len(claim.carries) for number in finals):
        return f"returns {outputs!r}, but has {len(claim.carries)} carries"
    return None


def _fault_of_carry(carry: Any, node: fx.Node) -> str | None:
    if not isinstance(carry, Carry):
        return f"carries {carry!r}; expected Carry(init, next, ...)"
    if (carry.operand is None) == (carry.join is None):
        return f"carries {carry!r}; name either the operand that receives it or the operator that joins it"
    if carry.operand is not None and carry.operand not in arguments_of(node.target):
        return f"carries {carry!r}; {node.target} has no argument {carry.operand}"
    return None
