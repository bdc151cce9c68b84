"""Logits and the values computed from them, as formulas.

Terms
-----
head, chain   See `tokens.heads`.
wide      A value with one element per column of the head in its last dimension.
row value A value with size 1 in its last dimension, or a number.
form      The formula of a wide value in the logits x, with row values a, b and f:

              f * (x - a)        linear      logits, log-softmax
              f * exp(x - b)     exponent    softmax
              f * (x - a) * exp(x - b)       the terms of an entropy

    softmax(x)  =  exp(x - amax(x)) / sum(exp(x - amax(x)))        exponent (amax,), factors 1 / sum
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from mom_passes.graph.arguments import argument, aten, axes, axis, prims
from mom_passes.graph.meta import meta_value
from mom_passes.graph.sizes import Size, is_one, same
from mom_passes.graph.values import is_tensor, operands, value_of
from mom_passes.tokens.heads import keeps_columns

_CONVERT = prims.convert_element_type.default


class NotScored(Exception):
    """Why the logits of a head must be computed in full."""


class NoReductions(NotScored):
    """No known reduction reads the columns of a product, so its columns are no logits."""


@dataclass(frozen=True)
class Factor:
    """A row value that a wide value is multiplied or divided by."""

    value: Any
    divides: bool = False


@dataclass(frozen=True)
class Form:
    """The form of a wide value.

    linear     the row values `a` that are subtracted, None without the part `x - a`
    exponent   the row values `b` that are subtracted, None without the part `exp(x - b)`
    factors    `f`
    likely     columns with likelihood 0 have value 0, even for infinite logits
    is_mask    a boolean value: whether the likelihood is above 0
    """

    linear: tuple[Any, ...] | None = ()
    exponent: tuple[Any, ...] | None = None
    factors: tuple[Factor, ...] = ()
    likely: bool = False
    is_mask: bool = False

    @property
    def is_linear(self) -> bool:
        return self.exponent is None

    @property
    def is_shifted(self) -> bool:
        """Whether it is the logits minus a row value, so that the maximum is at the same column."""
        return self.is_linear and not self.factors

    @property
    def is_likelihood(self) -> bool:
        return self.linear is None and not self.is_mask


def form_of(node: fx.Node, forms: Mapping[fx.Node, Form], columns: Size) -> Form:
    """Return the form of a wide value. Raise `NotScored` if it has none."""
    if not isinstance(meta_value(node), torch.Tensor):
        raise _unknown_reader(node)
    if keeps_columns(node, columns):
        return forms[operands(node)[0]]
    if node.target is _CONVERT:
        before, after = value_of(operands(node)[0]).dtype, value_of(node).dtype
        if torch.promote_types(before, after) == after and after.is_floating_point:
            return forms[operands(node)[0]]
    form = _elementwise(node, forms)
    if form is None:
        raise _unknown_reader(node)
    return form


def _unknown_reader(node: fx.Node) -> NotScored:
    return NotScored(f"{node.target} ({node.name}) reads logits or values computed from them")


def _elementwise(node: fx.Node, forms: Mapping[fx.Node, Form]) -> Form | None:
    wide = [operand for operand in operands(node) if operand in forms]
    if not all(_same_shape(node, one) for one in wide) or not _in_float32(node):
        return None
    if node.target is aten.where.self:
        return _where(node, forms)
    if node.kwargs or any(isinstance(arg, (list, tuple)) for arg in node.args):
        return None
    given = [forms.get(arg, arg) if isinstance(arg, fx.Node) else arg for arg in node.args]
    if not all(not arg.is_mask if isinstance(arg, Form) else is_row(arg) for arg in given):
        return None
    rule: Any = _RULES.get(node.target)
    return None if rule is None else rule(*given)


def _same_shape(a: fx.Node, b: fx.Node) -> bool:
    one, other = value_of(a).shape, value_of(b).shape
    return len(one) == len(other) and all(map(same, one, other))


def _in_float32(node: fx.Node) -> bool:
    """Whether a value has at least float32. Half-precision values are rounded element by element, which no form has."""
    dtype = value_of(node).dtype
    return dtype in (torch.float32, torch.float64, torch.bool)


def is_row(arg: Any) -> bool:
    """Whether an argument is a row value."""
    if not isinstance(arg, fx.Node):
        return isinstance(arg, (int, float))
    if not isinstance(meta_value(arg), torch.Tensor):
        return not is_tensor(arg)
    shape = value_of(arg).shape
    return len(shape) == 0 or is_one(shape[-1])


def _sub(left: Any, right: Any) -> Form | None:
    if isinstance(left, Form) and isinstance(right, Form):
        return None
    form, other = (left, right) if isinstance(left, Form) else (right, left)
    if not form.is_shifted:
        return None
    less = replace(form, linear=(*(form.linear or ()), other))
    return less if form is left else replace(less, factors=(Factor(-1),))


def _exp(form: Form) -> Form | None:
    return Form(None, form.linear) if form.is_shifted else None


def _mul(left: Any, right: Any) -> Form | None:
    if not (isinstance(left, Form) and isinstance(right, Form)):
        form, other = (left, right) if isinstance(left, Form) else (right, left)
        return _scaled(form, Factor(other))
    likelihood, linear = (left, right) if left.is_likelihood else (right, left)
    if not likelihood.is_likelihood or not linear.is_linear:
        return None
    return Form(linear.linear, likelihood.exponent, (*likelihood.factors, *linear.factors))


def _div(left: Any, right: Any) -> Form | None:
    return _scaled(left, Factor(right, divides=True)) if not isinstance(right, Form) else None


def _scaled(form: Form, factor: Factor) -> Form:
    return replace(form, factors=(*form.factors, factor))


def _gt(form: Form, number: Any) -> Form | None:
    plain = isinstance(form, Form) and form.is_likelihood and not form.factors and number == 0
    return replace(form, is_mask=True) if plain else None


_RULES: dict[Any, Any] = {
    aten.sub.Tensor: _sub,
    aten.exp.default: _exp,
    aten.mul.Tensor: _mul,
    aten.div.Tensor: _div,
    aten.neg.default: lambda form: _scaled(form, Factor(-1)),
    aten.gt.Scalar: _gt,
}


def _where(node: fx.Node, forms: Mapping[fx.Node, Form]) -> Form | None:
    """Return the form of `where(likelihood > 0, value, 0)`."""
    condition, value, otherwise = (argument(node, name) for name in ("condition", "self", "other"))
    mask, form = forms.get(condition), forms.get(value)
    if mask is None or form is None or not mask.is_mask or form.is_linear or form.linear is None:
        return None
    same_likelihood = mask.exponent == form.exponent
    return replace(form, likely=True) if same_likelihood and _is_zero(otherwise) else None


def _is_zero(value: Any) -> bool:
    if not isinstance(value, fx.Node):
        return bool(value == 0)
    filled = value.target in (aten.full.default, aten.scalar_tensor.default)
    return filled and argument(value, "fill_value" if value.target is aten.full.default else "s") == 0


#: Supported reductions over columns.
REDUCTIONS: dict[Any, str] = {aten.amax.default: "amax", aten.argmax.default: "argmax", aten.sum.dim_IntList: "sum"}


def reduction_by(node: fx.Node, forms: Mapping[fx.Node, Form]) -> str | None:
    """Return the reduction of a wide value's columns that a node computes: "amax", "argmax", "sum", "gather" or None.

    Raises `NotScored` if it cannot be computed from blocks of columns.
    """
    if node.op != "call_function" or not is_tensor(node) or operands(node)[0] not in forms:
        return None
    wide = operands(node)[0]
    rank = value_of(wide).dim()
    if node.target is aten.gather.default and axis(argument(node, "dim"), rank) == rank - 1:
        known = argument(node, "index") not in forms and not forms[wide].is_mask and not forms[wide].likely
        return _checked("gather", node, forms[wide], known)
    name = REDUCTIONS.get(node.target)
    if name is None:
        return None
    dims = argument(node, "dim")
    last = dims is not None and dims != [] and axes(dims, rank) == [rank - 1]
    form = forms[wide]
    fits = (form.exponent is not None and not form.is_mask) if name == "sum" else form.is_shifted
    return _checked(name, node, form, last and fits)


def _checked(name: str, node: fx.Node, form: Form, fits: bool) -> str:
    if not fits:
        raise NotScored(f"{node.target} ({node.name}) is no supported reduction of {form}")
    return name
