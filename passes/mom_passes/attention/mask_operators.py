"""Transfer functions of operators on the abstract values of `affine`: arithmetic, comparisons, logic.

A rule is `(node, given) -> Value`, where `given(argument)` is the value of an argument: a node's, or a number as a
constant. None means that nothing is known. A rule may know less than is true, never more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import fx

from mom_passes.attention.affine import FALSE, TRUE, UNKNOWN, Additive, Affine, Lookup, Order, Truth, Value, lowest_of
from mom_passes.graph.arguments import argument, has_argument
from mom_passes.graph.meta import meta_value
from mom_passes.graph.sizes import expr
from mom_passes.graph.values import value_of

aten, prims = torch.ops.aten, torch.ops.prims

Given = Callable[[Any], Value]
Rule = Callable[[fx.Node, Given], Value]
RULES: dict[Any, Rule] = {}

#: Integer dtypes in which positions do not wrap around.
WIDE = (torch.int64, torch.int32)
#: Numbers that stand for -inf in masks, whatever the mask's dtype was when it was filled.
SMALLEST = {torch.finfo(d).min for d in (torch.float64, torch.float32, torch.bfloat16)}
#: SDPA fills a boolean mask with -65504 in the mask's dtype for cuDNN (`convert_boolean_attn_mask_cudnn`), since some
#: versions of cuDNN do not accept -inf.
FOR_CUDNN = {torch.float16: -65504.0, torch.bfloat16: -65536.0}


def rule(names: str) -> Callable[[Rule], Rule]:
    """Register a rule for operators of aten or prims, `"add.Tensor clone"`, where this PyTorch has them."""

    def decorate(function: Rule) -> Rule:
        for name in names.split():
            packet, _, overload = name.partition(".")
            for namespace in (aten, prims):
                target = getattr(getattr(namespace, packet, None), overload or "default", None)
                if target is not None:
                    RULES[target] = function
        return function

    return decorate


def constant(value: Any, dtype: torch.dtype) -> Value:
    """The value of a number in a tensor of this dtype."""
    if dtype == torch.bool:
        return Truth.constant(bool(value)) if isinstance(value, (bool, int, float)) else None
    if dtype in WIDE:
        return Affine.number(value) if isinstance(value, (int, torch.SymInt)) else None
    if not dtype.is_floating_point or not isinstance(value, (int, float)):
        return None
    if value == 0:
        return Additive(TRUE)
    if value == -math.inf or value == torch.finfo(dtype).min or value in SMALLEST:
        return Additive(FALSE, float(value))
    if dtype in FOR_CUDNN and value in FOR_CUDNN.values():  # before or after rounding to bfloat16
        return Additive(FALSE, FOR_CUDNN[dtype])
    return None


def dtype_of(node: fx.Node) -> torch.dtype:
    return value_of(node).dtype


def shape_of(node: Any) -> Sequence[Any]:
    return value_of(node).shape


def size_of(value: Any) -> Any:
    """A size argument as a number."""
    return meta_value(value) if isinstance(value, fx.Node) else value


def count(value: Value) -> Affine | None:
    """The value as an integer."""
    return value.number if isinstance(value, Truth) else value if isinstance(value, Affine) else None


def holds(value: Value) -> Truth:
    """The value as a boolean: nonzero."""
    if isinstance(value, Affine) and value.is_constant and value.constant.is_number:
        return Truth.constant(value.constant != 0)
    return value if isinstance(value, Truth) else UNKNOWN


def both(node: fx.Node, given: Given) -> tuple[Value, Value]:
    """The values of both operands."""
    return given(argument(node, "self")), given(argument(node, "other"))


# Sources


@rule("iota")
def iota(node: fx.Node, given: Given) -> Value:
    start, step = (expr(size_of(argument(node, name))) for name in ("start", "step"))
    return Affine((step,), start)


@rule("arange.default arange.start arange.start_step")
def arange(node: fx.Node, given: Given) -> Value:
    start, step = (
        size_of(argument(node, name)) if has_argument(node, name) else default
        for name, default in (("start", 0), ("step", 1))
    )
    if isinstance(start, float) or isinstance(step, float):
        return None
    return Affine((expr(step),), expr(start))


@rule("full full_like new_full scalar_tensor zeros ones zeros_like ones_like new_zeros new_ones")
def full(node: fx.Node, given: Given) -> Value:
    name = str(node.target)
    if "zeros" in name or "ones" in name:
        return constant(0 if "zeros" in name else 1, dtype_of(node))
    return constant(size_of(argument(node, "s" if "scalar_tensor" in name else "fill_value")), dtype_of(node))


# Arithmetic and comparisons


@rule("add.Tensor add.Scalar sub.Tensor sub.Scalar rsub.Scalar rsub.Tensor")
def add(node: fx.Node, given: Given) -> Value:
    a, b = both(node, given)
    if "rsub" in str(node.target):
        a, b = b, a
    sign = 1 if "add" in str(node.target) else -1
    alpha = argument(node, "alpha")
    if isinstance(a, Additive) and isinstance(b, Additive) and sign == 1 and alpha == 1:
        return Additive(a.visible.both(b.visible), lowest_of((a, b)))
    if not isinstance(alpha, int):
        return None
    if isinstance(a, Lookup) or isinstance(b, Lookup):
        return _shifted(a, b, sign * alpha)
    left, right = count(a), count(b)
    # 1 - X for a flag X kept as a number.
    if sign == -1 and alpha == 1 and left == Affine.number(1) and isinstance(b, Truth):
        return b.inverted()
    return None if left is None or right is None else left.plus(right, sign * alpha)


def _shifted(a: Value, b: Value, factor: int) -> Value:
    """`a + factor * b` for an element of a tensor and a number."""
    if isinstance(b, Lookup):
        a, b, factor = b, a, 1 if factor == 1 else 0
    number = count(b)
    if not isinstance(a, Lookup) or number is None or not number.is_constant or factor == 0:
        return None
    return a.plus(factor * number.constant)


@rule("mul.Tensor mul.Scalar")
def mul(node: fx.Node, given: Given) -> Value:
    a, b = both(node, given)
    if isinstance(a, Truth) and isinstance(b, Truth):
        return a.both(b)
    for flag, fill in ((a, b), (b, a)):
        # Not with -inf: 0 * -inf is NaN.
        if isinstance(flag, Truth) and isinstance(fill, Additive) and fill.visible == FALSE and fill.lowest > -math.inf:
            return Additive(flag.inverted(), fill.lowest)
    left, right = count(a), count(b)
    if left is None or right is None:
        return None
    if right.is_constant:
        return left.scaled(right.constant)
    return right.scaled(left.constant) if left.is_constant else None


@rule("neg")
def neg(node: fx.Node, given: Given) -> Value:
    value = count(given(argument(node, "self")))
    return None if value is None else value.scaled(-1)


@rule("cumsum")
def cumsum(node: fx.Node, given: Given) -> Value:
    value, rank = count(given(argument(node, "self"))), len(shape_of(node))
    if value is None or not value.is_constant or not rank:
        return None
    dim = argument(node, "dim") % rank
    return Affine(tuple(value.constant if d == dim else expr(0) for d in range(rank)), value.constant)


#: Comparison -> constraints `factor * (a - b) + offset >= 0`, and whether it is the negation of their conjunction.
_COMPARISONS = {
    "ge": (((1, 0),), False),
    "gt": (((1, -1),), False),
    "le": (((-1, 0),), False),
    "lt": (((-1, -1),), False),
    "eq": (((1, 0), (-1, 0)), False),
    "ne": (((1, 0), (-1, 0)), True),
}


@rule(" ".join(f"{name}.{kind}" for name in _COMPARISONS for kind in ("Tensor", "Scalar")))
def compare(node: fx.Node, given: Given) -> Value:
    a, b = both(node, given)
    constraints, opposite = _COMPARISONS[str(node.target).split(".")[1]]
    number = count(b)
    if isinstance(a, Truth) and len(constraints) == 2 and number in (Affine.number(0), Affine.number(1)):
        return a.inverted() if (number == Affine.number(0)) != opposite else a
    left, right = count(a), count(b)
    if isinstance(a, Lookup) and isinstance(b, Lookup) and a.node is b.node:
        orders = (_order(a, b, factor, offset) for factor, offset in constraints)
        truth = Truth(frozenset(orders)).on(shape_of(node))
    elif left is None or right is None:
        return None
    else:
        difference = left.plus(right, -1)
        statements = (difference.scaled(factor).plus(Affine.number(offset)) for factor, offset in constraints)
        truth = Truth(frozenset(statements)).on(shape_of(node))
    return truth.inverted() if opposite else truth


def _order(a: Lookup, b: Lookup, factor: int, offset: int) -> Order:
    """`factor * (a - b) + offset >= 0` for elements of one tensor."""
    high, low = (a, b) if factor == 1 else (b, a)
    return Order(a.node, high.position, low.position, sympy.expand(high.offset - low.offset + offset))


@rule("bitwise_and.Tensor bitwise_and.Scalar logical_and")
def conjunction(node: fx.Node, given: Given) -> Value:
    a, b = both(node, given)
    return holds(a).both(holds(b)) if dtype_of(node) == torch.bool else None


@rule("bitwise_or.Tensor bitwise_or.Scalar logical_or")
def disjunction(node: fx.Node, given: Given) -> Value:
    a, b = both(node, given)
    return holds(a).either(holds(b)) if dtype_of(node) == torch.bool else None


@rule("bitwise_not logical_not")
def negation(node: fx.Node, given: Given) -> Value:
    return holds(given(argument(node, "self"))).inverted() if dtype_of(node) == torch.bool else None


@rule("where.self where.ScalarOther where.ScalarSelf where.Scalar")
def where(node: fx.Node, given: Given) -> Value:
    condition, yes, no = (argument(node, name) for name in ("condition", "self", "other"))
    return _choose(node, holds(given(condition)), given(yes), given(no))


@rule("masked_fill.Scalar masked_fill.Tensor")
def masked_fill(node: fx.Node, given: Given) -> Value:
    source, condition, fill = (argument(node, name) for name in ("self", "mask", "value"))
    filled = given(fill) if isinstance(fill, fx.Node) else constant(fill, dtype_of(node))
    return _choose(node, holds(given(condition)), filled, given(source))


def _choose(node: fx.Node, condition: Truth, yes: Value, no: Value) -> Value:
    if dtype_of(node) == torch.bool:
        return condition.chosen(holds(yes), holds(no))
    if not dtype_of(node).is_floating_point:
        return None
    visible = (v.visible if isinstance(v, Additive) else UNKNOWN for v in (yes, no))
    return Additive(condition.chosen(*visible), lowest_of((yes, no)))
