"""What is known of each operator, in one record: its chunk rule, and what planning asks beside it.

Terms
-----
claim       A rule's answer for (node, dim): one need per tensor operand, which dim of every output carries the
            rows, and how the operator's own arguments change in a body.
edit        `(args, kwargs, window) -> (args, kwargs)`: arguments inside a loop body. Arguments that
            mention the sequence length must not survive into a body.
facts       An operator's rule, whether its work may be repeated, whether it only relabels storage, how much it
            computes and takes for itself, and which of its arguments are sizes.

The law every rule must keep, for any cut of the rows [0, S) into pieces:

    cat([op(edit(slice(operands)))  for piece], dim)  ==  op(operands)

    claim = claim_for(node, Dim(1))      # or raises CannotChunk
"""

from __future__ import annotations

import enum
import inspect
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from mom_passes.errors import CannotChunk, RuleError
from mom_passes.graph.data_dependent import touches_unknown_numbers
from mom_passes.graph.values import operands
from mom_passes.rules.needs import Dim, Need, State, Window, fault_of

Edit = Callable[[tuple[Any, ...], dict[str, Any], Window], tuple[tuple[Any, ...], dict[str, Any]]]


@dataclass(frozen=True)
class Claim:
    """The answer of a chunk rule: what some rows of the result need of each operand.

    Attributes
    ----------
    needs : tuple of All, Rows or Past
        One need for each tensor operand of the node, in order, duplicates included.
    outputs : tuple of Dim or None, optional
        For an operator with several outputs: the token dimension of each. `None` for an output that carries no rows and
        must not be used.
    edit : callable, optional
        `(args, kwargs, window) -> (args, kwargs)`: the arguments of the call in a loop body.
    target : callable, optional
        Another operator to call in the body, for instance one that takes a row offset.
    state : State, optional
        For a scan: what each mini-sequence passes to the next, so that they run in order.
    """

    needs: tuple[Need, ...]
    outputs: tuple[Dim | None, ...] | None = None
    edit: Edit | None = None
    target: Any = None
    state: State | None = None


Rule = Callable[[fx.Node, Dim], Claim]
#: Guesses for the token dim of the output, given those of the operands (None: it carries none). Only `view` needs its
#: own.
Candidates = Callable[[fx.Node, tuple[Dim | None, ...]], list[Dim]]
#: Multiply-adds of a call at the captured sizes.
Work = Callable[[fx.Node], int]
#: Bytes that a call's kernel takes on a type of device beside operands and results, in the graph's sizes.
Scratch = Callable[[fx.Node, str], sympy.Expr]


class Alias(enum.Enum):
    """How an operator's result lies to its first operand's storage.

    NONE   it has its own
    VIEW   all of it, relabelled: repeating one costs nothing
    CUT    a range of rows of it
    COPY   the same elements, mostly in a storage of their own
    CAST   likewise, in another dtype
    """

    NONE = enum.auto()
    VIEW = enum.auto()
    CUT = enum.auto()
    COPY = enum.auto()
    CAST = enum.auto()


@dataclass(frozen=True)
class OperatorFacts:
    """What is known of one operator.

    rule             what rows of its result need, or None
    recompute        cheap enough to run again in another loop instead of keeping its result at full length (pointwise
                     work, norms, rope, masks; never a matmul, an attention, a sort)
    candidates       where its result may carry tokens, if not where the sizes say so
    alias            how its result lies to its operand's storage
    work             multiply-adds, for what is not `recompute`; None: those of a matrix product
    size_arguments   names of arguments that are sizes: there, and only there, a literal equal to a length means it
    apart            dims along which its rows have nothing to do with each other, although they cannot be cut
    scratch          what its kernel takes for itself, where that is worth counting
    """

    rule: Rule | None = None
    recompute: bool = True
    candidates: Candidates | None = None
    alias: Alias = Alias.NONE
    work: Work | None = None
    size_arguments: tuple[str, ...] = ()
    apart: tuple[int, ...] = ()
    scratch: Scratch | None = None

    def claim(self, node: fx.Node, dim: Dim, *, in_order: bool = False) -> Claim:
        """The rule's claim, checked; `in_order` takes one that has a state.

        Raises `CannotChunk`, and `RuleError` for a rule that answers otherwise.
        """
        if self.rule is None:
            raise CannotChunk(node, dim, NO_RULE)
        try:
            claim = self.rule(node, dim)
        except (CannotChunk, RuleError):
            raise
        except Exception as error:
            raise RuleError(node, dim, f"raised {type(error).__name__}: {error}") from error
        fault = _fault(claim, len(operands(node)))
        if fault is not None:
            raise RuleError(node, dim, fault)
        if claim.state is not None and not in_order:
            raise CannotChunk(node, dim, "accumulates along it")
        return claim


class Described:
    """A call's target that says itself what is known of it: part of a graph that was outlined (`tokens.region`)."""

    facts: OperatorFacts


NO_RULE = "no chunk rule is registered for this operator"


def _fault(claim: Any, operand_count: int) -> str | None:
    """What is wrong with a rule's answer, or None."""
    if not isinstance(claim, Claim):
        return f"returned {claim!r}; return a Claim, or raise CannotChunk"
    needs = claim.needs
    if not isinstance(needs, tuple) or not all(isinstance(need, Need) for need in needs):
        return f"needs {needs!r}; a tuple of Rows(dim), Past(dim, rows) and All() is wanted, one per tensor operand"
    if len(needs) != operand_count:
        return f"has {len(needs)} needs for {operand_count} tensor operands"
    wrong = next(filter(None, map(fault_of, needs)), None)
    return None if wrong is None else f"needs {needs!r}; {wrong}"


_FACTS: dict[Any, OperatorFacts] = {}
_UNKNOWN = OperatorFacts(recompute=False, work=lambda node: 0)

_OVERLOAD = type(torch.ops.aten.add.Tensor)
_PACKET = type(torch.ops.aten.add)
_EXAMPLE = "pass torch.ops.mylib.scale_rows.default, say, for an operator mylib::scale_rows"


def register(
    *targets: Any,
    recompute: bool = True,
    candidates: Candidates | None = None,
    alias: Alias = Alias.NONE,
    work: Work | None = None,
    size_arguments: tuple[str, ...] = (),
    scratch: Scratch | None = None,
) -> Callable[[Rule], Rule]:
    """Decorator that registers the chunk rule of one or more operator overloads.

    A chunk rule is a function `(node, dim) -> Claim`. It raises `CannotChunk(node, dim, reason)` for a dimension along
    which the operator cannot be cut.

    Parameters
    ----------
    *targets : OpOverload or str
        Overloads, `torch.ops.mylib.scale_rows.default`. An operator of a package that may not be installed is given as
        text, `"mylib::scale_rows"` or `"mylib::scale_rows.out"`.
    recompute : bool
        Whether the operator is cheap enough to run again in another loop instead of storing its result at full length.
    candidates : callable, optional
        Returns the dimensions of the result that may carry tokens, where sizes do not show it.
    alias : Alias
        How the result shares the storage of the first operand.
    work : callable, optional
        Returns the multiply-adds of a call. The default is a matrix product's, and only where `recompute=False`.
    size_arguments : tuple of str
        Names of arguments that are sizes: a literal there that equals a length stands for the length.
    scratch : callable, optional
        Returns the bytes of workspace that the kernel of a call allocates on a type of device.

    Returns
    -------
    callable
        The decorator, which returns the rule unchanged.

    Raises
    ------
    TypeError
        If a target is not an operator overload, or the rule does not take a node and a dimension.

    Examples
    --------
    >>> @chunk_rule(torch.ops.mylib.scale_rows.default)  # doctest: +SKIP
    ... def scale_rows(node, dim):
    ...     if dim.index != 0:
    ...         raise CannotChunk(node, dim, "only rows are independent")
    ...     return Claim((Rows(dim), All()))
    """

    if not targets:
        raise TypeError(f"a chunk rule is for at least one operator overload; {_EXAMPLE}")
    for target in targets:
        _check_target(target)

    def decorate(rule: Rule) -> Rule:
        _check_rule(rule)
        for target in targets:
            _FACTS[_key(target)] = OperatorFacts(
                rule, recompute, candidates, alias, work, size_arguments, scratch=scratch
            )
        return rule

    return decorate


def register_work(*targets: Any, work: Work) -> None:
    """How much operators compute that have no chunk rule. Named as in `register`; raises `TypeError` likewise."""
    for target in targets:
        _check_target(target)
        _FACTS[_key(target)] = OperatorFacts(recompute=False, work=work)


def _key(target: Any) -> Any:
    """What an operator's facts stand under: itself, or for one that may be defined later the name it will print."""
    if not isinstance(target, str):
        return target
    name = target.replace("::", ".")
    return name if name.count(".") == 2 else f"{name}.default"


def _check_target(target: Any) -> None:
    named = isinstance(target, str) and re.fullmatch(r"\w+::\w+(\.\w+)?", target)
    if isinstance(target, _OVERLOAD) or target is operator.getitem or named:
        return
    if isinstance(target, _PACKET):
        names = ", ".join(f"torch.ops.{target}.{name}" for name in target.overloads())
        raise TypeError(f"torch.ops.{target} is a packet of overloads; a chunk rule is for one or more of {names}")
    raise TypeError(f"a chunk rule is for operator overloads, and {target!r} is none; {_EXAMPLE}")


def _check_rule(rule: Any) -> None:
    """A rule is called with a node and a dim; what it returns can only be seen when it is asked."""
    if not callable(rule):
        raise TypeError(f"a chunk rule is a function of a node and a dim, and {rule!r} cannot be called")
    try:
        signature = inspect.signature(rule)
    except ValueError:  # some built-in functions have none
        return
    try:
        signature.bind(None, None)
    except TypeError as error:
        raise TypeError(f"a chunk rule is called with a node and a dim; {rule!r} takes {signature}") from error


def registered() -> dict[Any, OperatorFacts]:
    """A copy of the table: operator overload -> facts. What is registered by name counts once it is defined."""
    known = ((_defined(target) if isinstance(target, str) else target, facts) for target, facts in _FACTS.items())
    return {target: facts for target, facts in known if target is not None}


def foreign_rules() -> list[Any]:
    """Operators of which something is known from elsewhere than this package."""
    return [
        target
        for target, facts in _FACTS.items()
        if any(not _is_own(given) for given in (facts.rule, facts.candidates, facts.work) if given is not None)
    ]


def has_own_rule(target: Any) -> bool:
    """Whether an operator has a chunk rule from this package, whose tests also hold it to the strides it claims."""
    rule = facts_of(target).rule
    return rule is not None and _is_own(rule)


def _is_own(function: Any) -> bool:
    function = getattr(function, "func", function)  # of a `functools.partial`
    return str(getattr(function, "__module__", "")).partition(".")[0] == __name__.partition(".")[0]


def _defined(name: str) -> Any:
    """The operator overload that prints as `name`, or None."""
    namespace, operator_name, overload = name.split(".")
    packet = getattr(getattr(torch.ops, namespace), operator_name, None)
    return getattr(packet, overload, None)


def facts_of(target: Any) -> OperatorFacts:
    """What is known of an operator; of one that nobody registered, nothing."""
    if isinstance(target, Described):
        return target.facts
    found = _FACTS.get(target)
    if found is None and isinstance(target, _OVERLOAD):
        found = _FACTS.get(str(target))
    return found or _UNKNOWN


def facts(node: fx.Node) -> OperatorFacts:
    """What is known of the operator that a node calls."""
    return facts_of(node.target) if node.op == "call_function" else _UNKNOWN


def claim_for(node: fx.Node, dim: Dim, *, in_order: bool = False) -> Claim:
    """The claim of the node's rule. Raises `CannotChunk`, also for an operator without one, and for a scan along its
    rows unless they are computed `in_order`: who asks of some rows alone has nothing to hand to them. Nor is there one
    where a number or a size depends on data (see `graph.data_dependent`)."""
    if touches_unknown_numbers(node):
        raise CannotChunk(node, dim, "a size, or a number that it takes, depends on data")
    return facts(node).claim(node, dim, in_order=in_order)
