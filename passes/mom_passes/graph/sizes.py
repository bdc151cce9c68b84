"""Sizes that may be symbolic: comparison and division without adding guards.

A size is an `int`, a `torch.SymInt` or a sympy expression. `a == b` of two SymInts would specialise the user's graph;
these functions answer from what is statically known.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import sympy
import torch
from torch import fx

from mom_passes.graph.meta import meta_value
from mom_passes.torch_compat import SYMBOLIC, expression_of, hint_of

Size = int | torch.SymInt | sympy.Expr


def expr(size: Any) -> sympy.Expr:
    """The sympy expression of a size."""
    if isinstance(size, SYMBOLIC):
        return expression_of(size)
    return sympy.sympify(size)


def same(a: Any, b: Any) -> bool:
    """Whether two sizes are known to be equal, for every value of their symbols."""
    if a is b:
        return True
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return _same(expr(a), expr(b))


@lru_cache(maxsize=65536)
def _same(a: sympy.Expr, b: sympy.Expr) -> bool:
    if a == b:
        return True
    difference = sympy.expand(a - b)
    # An expanded polynomial is zero only if it is literally zero. Functions count as unknowns here: PyTorch has
    # simplified them, and `simplify` is slow and does not know them.
    if difference.is_number or difference.is_polynomial() or not difference.has(sympy.Pow):
        return bool(difference == 0)
    try:
        return bool(sympy.cancel(difference) == 0)
    except sympy.PolynomialError:
        return False


def all_same(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two shapes, or two lists of strides, are known to be equal."""
    return len(a) == len(b) and all(map(same, a, b))


def is_one(size: Any) -> bool:
    return same(size, 1)


def product(sizes: Iterable[Any]) -> sympy.Expr | int:
    sizes = list(sizes)
    if all(isinstance(size, int) for size in sizes):
        return math.prod(sizes)
    return _product(tuple(expr(size) for size in sizes))


@lru_cache(maxsize=65536)
def _product(sizes: tuple[sympy.Expr, ...]) -> sympy.Expr:
    return sympy.expand(sympy.prod(sizes))


def quotient(a: Any, b: Any) -> sympy.Expr | int | None:
    """`a / b` where it is known to be a whole number (a polynomial), else `None`."""
    if isinstance(b, int):
        if b == 1:
            return a
        if isinstance(a, int):
            return a // b if b and a % b == 0 else None
    return _quotient(expr(a), expr(b))


@lru_cache(maxsize=65536)
def _quotient(a: sympy.Expr, b: sympy.Expr) -> sympy.Expr | int | None:
    if b == 0:
        return None
    result = sympy.cancel(a / b)
    if fraction(result)[1] != 1:
        return None
    return int(result) if result.is_Integer else result


def fraction(size: sympy.Basic) -> tuple[sympy.Basic, sympy.Basic]:
    """Numerator and denominator. Few sizes have a denominator, and `sympy.together` takes milliseconds."""
    return sympy.fraction(sympy.together(size)) if _divides(size) else (size, sympy.S.One)


def _divides(size: sympy.Basic) -> bool:
    """Whether a sum or a product may have a denominator, those inside other functions excepted."""
    if size.is_Rational:
        return not size.is_Integer
    if size.is_Pow:
        base, exponent = size.args
        return not exponent.is_nonnegative or _divides(base)
    return bool(size.is_Add or size.is_Mul) and any(map(_divides, size.args))


def hint(size: Any) -> int:
    """The value a size had when the graph was captured (2 for a symbol without one)."""
    if isinstance(size, int):
        return size
    if isinstance(size, torch.SymInt):
        value = hint_of(size)
        return int(value) if value is not None else 2
    return int(size) if size.is_Integer else 2


def fixed_sizes(values: Iterable[Any]) -> frozenset[int]:
    """The constant sizes of the dimensions of the tensors among `values`.

    Symbolic sizes, which a tensor attribute of a module may have, cannot be hashed and equal no constant.
    """
    tensors = (value for value in values if isinstance(value, torch.Tensor))
    return frozenset(size for tensor in tensors for size in tensor.shape if isinstance(size, int))


def count_hint(shape: Iterable[Any]) -> int:
    """Elements of a shape at the captured sizes."""
    return math.prod(hint(size) for size in shape)


def symbol_hints(inputs: Iterable[fx.Node]) -> dict[sympy.Symbol, sympy.Integer]:
    """The symbols of a graph's inputs, with their values at capture."""
    found: dict[sympy.Symbol, sympy.Integer] = {}
    for node in inputs:
        value = meta_value(node)
        for size in (value,) if isinstance(value, SYMBOLIC) else getattr(value, "shape", ()):
            if isinstance(size, torch.SymInt) and expr(size).is_Symbol:
                found[expr(size)] = sympy.Integer(hint(size))
    return found
