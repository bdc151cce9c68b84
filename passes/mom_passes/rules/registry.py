"""The table of operator facts: chunk rules, and what planning needs to know of an operator.

Terms
-----
claim       The result of a rule for (node, dim): one need per tensor operand, one output per result, and how the
            arguments of the operator change in a body.
edit        `(args, kwargs, window) -> (args, kwargs)`: the arguments inside a loop body, free of the sequence length.
facts       Chunk rule, fold rule, aliasing, cost and size arguments of one operator.

The law of every rule, for any split of the rows [0, S) into pieces:

    cat([op(edit(slice(operands)))  for piece], dim)  ==  op(operands)

    claim = claim_for(node, Dim(1))      # or raises CannotChunk
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import sympy
from torch import fx

from mom_passes.errors import CannotChunk, NoRule, RuleError
from mom_passes.graph.data_dependent import touches_unknown_numbers
from mom_passes.rules.claim import Claim, find_fault_of
from mom_passes.rules.needs import Dim, Rows
from mom_passes.rules.targets import OVERLOAD, check_rule, check_targets, key_of, overload_of

Rule = Callable[[fx.Node, Dim], Claim]
#: A rule for results without rows. Takes the token dim of each operand, None for an operand without tokens.
FoldRule = Callable[[fx.Node, tuple[Dim | None, ...]], Claim]
#: Candidates for the token dim of the output, from the token dims of the operands (None: no tokens).
Candidates = Callable[[fx.Node, tuple[Dim | None, ...]], list[Dim]]
#: Multiply-adds of a call at the captured sizes.
Work = Callable[[fx.Node], int]
#: Workspace of a call's kernel on a device type, in bytes, as an expression in the graph's sizes.
Scratch = Callable[[fx.Node, str], sympy.Expr]


class Alias(enum.Enum):
    """How an operator's result relates to its first operand.

    NONE   new values in new storage
    VIEW   a view of all elements
    CUT    a view of a part along one dimension
    COPY   the same elements, mostly in new storage
    CAST   the same elements in another dtype, mostly in new storage
    """

    NONE = enum.auto()
    VIEW = enum.auto()
    CUT = enum.auto()
    COPY = enum.auto()
    CAST = enum.auto()


@dataclass(frozen=True)
class OperatorFacts:
    """Facts of one operator.

    rule             chunk rule, or None
    fold             fold rule: a result without rows, computed from rows of the operands; or None
    recompute        cheap enough to run again in a later loop instead of keeping its result at full length: pointwise
                     operators, norms, rope, masks; never a matrix product, an attention or a sort
    candidates       candidates for the token dim of the result; None: dimensions of the same size
    alias            whether the result is a view or a copy of operand 0
    work             multiply-adds if not `recompute`; None: those of a matrix product
    size_arguments   names of arguments that are sizes. Only there, a literal equal to the length is the length
    apart            dims along which rows are independent, although no rule can split them
    scratch          workspace of its kernel; None: negligible
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
        """Return the checked claim of the chunk rule. A claim with carries requires `in_order`.

        Raises `CannotChunk` if rows cannot be computed, and `RuleError` if the rule fails or returns no valid claim.
        """
        if self.rule is None:
            raise NoRule(node, dim)
        claim = _call_rule(self.rule, node, dim, dim)
        folded_ahead = any(isinstance(n, Rows) and n.before and not n.dim.plain for n in claim.needs)
        if folded_ahead or (claim.carries and not dim.plain):
            raise CannotChunk(node, dim, "hands rows on along a dimension that holds more than tokens")
        if claim.carries and not in_order:
            raise CannotChunk(node, dim, "accumulates along it")
        return claim

    def fold_claim(self, node: fx.Node, dims: tuple[Dim | None, ...]) -> Claim:
        """Return the checked claim of the fold rule for operands with these token dims. Raises like `claim`."""
        first = next((dim for dim in dims if dim is not None), Dim(0))
        if self.fold is None:
            raise CannotChunk(node, first, "no rule computes its result from parts of its operands")
        claim = _call_rule(self.fold, node, dims, first)
        if any(isinstance(output, Rows) for output in claim.outputs or (Rows(first),)):
            raise RuleError(node, first, "returns rows for a fold; return Fold or Final for each output")
        return claim


def _call_rule(rule: Callable[[fx.Node, Any], Claim], node: fx.Node, argument: Any, dim: Dim) -> Claim:
    try:
        claim = rule(node, argument)
    except (CannotChunk, RuleError):
        raise
    except Exception as error:
        raise RuleError(node, dim, f"raised {type(error).__name__}: {error}") from error
    fault = find_fault_of(claim, node)
    if fault is not None:
        raise RuleError(node, dim, fault)
    return claim


class Described:
    """A call target with facts of its own, which are not in the table: an outlined region (`tokens.region`)."""

    facts: OperatorFacts


DATA_DEPENDENT = "a size, or a number that it takes, depends on data"


_FACTS: dict[Any, OperatorFacts] = {}
_UNKNOWN = OperatorFacts(recompute=False, work=lambda node: 0)


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

    check_targets(targets)

    def decorate(rule: Rule) -> Rule:
        check_rule(rule)
        for key in map(key_of, targets):
            fold = _FACTS.get(key, _UNKNOWN).fold
            _FACTS[key] = OperatorFacts(
                rule, fold, recompute, candidates, alias, work, size_arguments, scratch=scratch
            )
        return rule

    return decorate


def register_fold(*targets: Any) -> Callable[[FoldRule], FoldRule]:
    """Decorator that registers the fold rule of one or more operator overloads, for results without rows.

    Folds are reductions over tokens, products that contract tokens, and final states. A fold rule is a function
    `(node, dims) -> Claim`, where `dims` has the token dimension of each tensor operand, or None. Other facts of the
    operators do not change.

    Parameters
    ----------
    *targets : OpOverload or str
        As in `chunk_rule`.

    Returns
    -------
    callable
        The decorator, which returns the rule unchanged.

    Raises
    ------
    TypeError
        If a target is not an operator overload.

    Examples
    --------
    >>> @fold_rule(torch.ops.mylib.total.default)  # doctest: +SKIP
    ... def total(node, dims):
    ...     if dims[0] is None or dims[0].index != 0:
    ...         raise CannotChunk(node, Dim(0), "only a total over rows can be folded")
    ...     return Claim((Rows(dims[0]),), outputs=(Fold(torch.ops.aten.add.Tensor, 0),))
    """
    check_targets(targets)

    def decorate(rule: FoldRule) -> FoldRule:
        check_rule(rule)
        for target in targets:
            _FACTS[key_of(target)] = replace(_FACTS.get(key_of(target), _UNKNOWN), fold=rule)
        return rule

    return decorate


def register_work(*targets: Any, work: Work) -> None:
    """Register the multiply-adds of operators without a chunk rule. Targets and errors as in `register`."""
    check_targets(targets)
    for target in targets:
        _FACTS[key_of(target)] = OperatorFacts(recompute=False, work=work)


def registered() -> dict[Any, OperatorFacts]:
    """Return a copy of the table: operator overload -> facts. Operators given by name are included if defined."""
    known = ((overload_of(target) if isinstance(target, str) else target, facts) for target, facts in _FACTS.items())
    return {target: facts for target, facts in known if target is not None}


def foreign_rules() -> list[Any]:
    """Return the operators with a function that was registered outside this package."""
    functions = {target: (known.rule, known.fold, known.candidates, known.work) for target, known in _FACTS.items()}
    return [target for target, given in functions.items() if not all(one is None or _is_own(one) for one in given)]


def has_own_rule(target: Any) -> bool:
    """Whether an operator's chunk rule is from this package, whose tests also check the strides of the results."""
    rule = facts_of(target).rule
    return rule is not None and _is_own(rule)


def _is_own(function: Any) -> bool:
    function = getattr(function, "func", function)  # of a `functools.partial`
    return str(getattr(function, "__module__", "")).partition(".")[0] == __name__.partition(".")[0]


def facts_of(target: Any) -> OperatorFacts:
    """Return the facts of an operator. An unregistered one has no rule and is not recomputed."""
    if isinstance(target, Described):
        return target.facts
    found = _FACTS.get(target)
    if found is None and isinstance(target, OVERLOAD):
        found = _FACTS.get(str(target))
    return found or _UNKNOWN


def facts(node: fx.Node) -> OperatorFacts:
    """Return the facts of the operator that a node calls."""
    return facts_of(node.target) if node.op == "call_function" else _UNKNOWN


def claim_for(node: fx.Node, dim: Dim, *, in_order: bool = False) -> Claim:
    """Return the checked claim of the node's chunk rule for rows along `dim`.

    `in_order`: all rows are computed in order, so the claim may have carries. Raises `CannotChunk` if there is no rule,
    the rule refuses, or a size or number that the node takes depends on data (see `graph.data_dependent`).
    """
    if touches_unknown_numbers(node):
        raise CannotChunk(node, dim, DATA_DEPENDENT)
    return facts(node).claim(node, dim, in_order=in_order)


def fold_for(node: fx.Node, dims: tuple[Dim | None, ...]) -> Claim:
    """Return the checked claim of the node's fold rule for operands with these token dims. Raises `CannotChunk`."""
    if touches_unknown_numbers(node):
        raise CannotChunk(node, Dim(0), DATA_DEPENDENT)
    return facts(node).fold_claim(node, dims)
