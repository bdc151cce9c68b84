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
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import fx

from mom_passes.errors import CannotChunk, NoRule, RuleError
from mom_passes.graph.arguments import arguments_of
from mom_passes.graph.data_dependent import touches_unknown_numbers
from mom_passes.graph.values import operands
from mom_passes.rules.needs import Carry, Dim, Final, Fold, Need, Output, Rows, Window, find_fault

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
    """

    needs: tuple[Need, ...]
    outputs: tuple[Output, ...] | None = None
    edit: Edit | None = None
    target: Any = None
    carries: tuple[Carry, ...] = ()

    @property
    def handed_on(self) -> tuple[Carry, ...]:
        """The carries, and one for the total of each fold."""
        folds = [(i, one) for i, one in enumerate(self.outputs or ()) if isinstance(one, Fold)]
        return self.carries + tuple(Carry(f.identity, i, join=f.combine, dtype=f.dtype) for i, f in folds)

    def carry_of(self, output: int) -> int | None:
        """The number, in `handed_on`, of the carry whose final value is an output; None for rows."""
        found = (self.outputs or ())[output : output + 1]
        if found and isinstance(found[0], Final):
            return found[0].carry
        if found and isinstance(found[0], Fold):
            return len(self.carries) + sum(isinstance(one, Fold) for one in (self.outputs or ())[:output])
        return None


Rule = Callable[[fx.Node, Dim], Claim]
#: The same for results without rows: asked with the token dim of each operand, None for one that carries no tokens.
FoldRule = Callable[[fx.Node, tuple[Dim | None, ...]], Claim]
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
    fold             what a result without rows needs of rows of its operands, or None
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
    fold: FoldRule | None = None
    recompute: bool = True
    candidates: Candidates | None = None
    alias: Alias = Alias.NONE
    work: Work | None = None
    size_arguments: tuple[str, ...] = ()
    apart: tuple[int, ...] = ()
    scratch: Scratch | None = None

    def claim(self, node: fx.Node, dim: Dim, *, in_order: bool = False) -> Claim:
        """The rule's claim, checked; `in_order` takes one that has carries.

        Raises `CannotChunk`, and `RuleError` for a rule that answers otherwise.
        """
        if self.rule is None:
            raise NoRule(node, dim)
        claim = _asked(self.rule, node, dim, dim)
        ahead = [need.dim for need in claim.needs if isinstance(need, Rows) and need.before]
        if not all(one.plain for one in ahead) or (claim.carries and not dim.plain):
            raise CannotChunk(node, dim, "hands rows on along a dimension that holds more than tokens")
        if claim.carries and not in_order:
            raise CannotChunk(node, dim, "accumulates along it")
        return claim

    def fold_claim(self, node: fx.Node, dims: tuple[Dim | None, ...]) -> Claim:
        """The claim of the fold rule for operands with these token dims, checked. Raises as `claim` does."""
        first = next((dim for dim in dims if dim is not None), Dim(0))
        if self.fold is None:
            raise CannotChunk(node, first, "no rule computes its result from parts of its operands")
        claim = _asked(self.fold, node, dims, first)
        if any(isinstance(output, Rows) for output in claim.outputs or (Rows(first),)):
            raise RuleError(node, first, "has rows in a result of a fold; return Fold or Final for each output")
        return claim


def _asked(rule: Callable[[fx.Node, Any], Claim], node: fx.Node, asked: Any, dim: Dim) -> Claim:
    """A rule's answer, checked."""
    try:
        claim = rule(node, asked)
    except (CannotChunk, RuleError):
        raise
    except Exception as error:
        raise RuleError(node, dim, f"raised {type(error).__name__}: {error}") from error
    fault = _fault(claim, node)
    if fault is not None:
        raise RuleError(node, dim, fault)
    return claim


class Described:
    """A call's target that says itself what is known of it: part of a graph that was outlined (`tokens.region`)."""

    facts: OperatorFacts


def _fault(claim: Any, node: fx.Node) -> str | None:
    """What is wrong with a rule's answer, or None."""
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
                rule, None, recompute, candidates, alias, work, size_arguments, scratch=scratch
            )
        return rule

    return decorate


def register_fold(*targets: Any) -> Callable[[FoldRule], FoldRule]:
    """Decorator: the rule of one or more operator overloads for results without rows: reductions over the tokens,
    products that contract them, final states. Other facts of an operator stay. Public, for custom operators::

        @register_fold(torch.ops.mylib.total.default)
        def total(node, dims):                      # the token dim of each operand, or None
            if dims[0] is None or dims[0].index != 0:
                raise CannotChunk(node, Dim(0), "only a total over rows can be folded")
            return Claim((Rows(dims[0]),), outputs=(Fold(torch.ops.aten.add.Tensor, 0),))
    """
    for target in targets:
        _check_target(target)

    def decorate(rule: FoldRule) -> FoldRule:
        _check_rule(rule)
        for target in targets:
            _FACTS[_key(target)] = replace(_FACTS.get(_key(target), _UNKNOWN), fold=rule)
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
        packet: Any = target  # `overloads` is not typed
        names = ", ".join(f"torch.ops.{target}.{name}" for name in packet.overloads())
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
    functions = {target: (known.rule, known.fold, known.candidates, known.work) for target, known in _FACTS.items()}
    return [target for target, given in functions.items() if not all(one is None or _is_own(one) for one in given)]


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


def fold_for(node: fx.Node, dims: tuple[Dim | None, ...]) -> Claim:
    """The claim of the node's fold rule for operands with these token dims. Raises `CannotChunk`."""
    if touches_unknown_numbers(node):
        raise CannotChunk(node, Dim(0), "a size, or a number that it takes, depends on data")
    return facts(node).fold_claim(node, dims)
