"""Evaluate size expressions: to numbers, to functions of symbols and to graph nodes.

    Max(0, s - 11)   -> 29                                   evaluate(size, {s: 40})
                     -> lambda values: ...                   function_of(size, [s])
                     -> sym_max(0, add(s, -11))              mom_passes.graph.edit.size_node

Functions that the table below does not contain, those of a later PyTorch release say, are computed by sympy.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import sympy
import torch

from mom_passes.errors import PassError
from mom_passes.graph.sizes import Size, expr, fraction

Value = TypeVar("Value")


def modular_index(base: Any, divisor: Any, modulus: Any) -> Any:
    """The index along one dimension, from a flat index."""
    return base // divisor % modulus


def ceiling_division(value: Any, divisor: Any) -> Any:
    """The quotient, rounded up."""
    return -(-value // divisor)


#: Sympy's and PyTorch's functions as calls on numbers and SymInts.
CALLS: dict[str, Callable[..., Any]] = {
    "Add": operator.add,
    "Mul": operator.mul,
    "Pow": operator.pow,
    "PowByNatural": operator.pow,
    "FloatPow": operator.pow,
    "FloorDiv": operator.floordiv,
    "CleanDiv": operator.floordiv,
    "IntTrueDiv": operator.truediv,
    "FloatTrueDiv": operator.truediv,
    "ModularIndexing": modular_index,
    "Mod": operator.mod,
    "PythonMod": operator.mod,
    "Max": torch.sym_max,
    "Min": torch.sym_min,
    "floor": math.floor,
    "FloorToInt": math.floor,
    "ceiling": math.ceil,
    "CeilToInt": math.ceil,
    "TruncToInt": math.trunc,
    "RoundToInt": round,
    "ToFloat": torch.sym_float,
    "Abs": abs,
    "OpaqueUnaryFn_sqrt": torch.sym_sqrt,
    "Where": torch.sym_ite,
    "Equality": operator.eq,
    "Unequality": operator.ne,
    "StrictLessThan": operator.lt,
    "StrictGreaterThan": operator.gt,
    "LessThan": operator.le,
    "GreaterThan": operator.ge,
    "Not": torch.sym_not,
    "And": operator.and_,
    "Or": operator.or_,
}

#: Functions of any number of arguments, applied to two at a time.
JOINING = ("Add", "Mul", "Max", "Min", "And", "Or")


class SympyCall:
    """A function known only to sympy, as a call on numbers."""

    def __init__(self, function: Any) -> None:
        self.function = function
        self.__name__ = str(function.__name__)
        self.__module__ = __name__

    def __call__(self, *args: Any) -> Any:
        return number(self.function(*(sympy.sympify(arg) for arg in args)))

    def __reduce__(self) -> Any:
        return _sympy_call, (self.function,)


@functools.cache
def _sympy_call(function: Any) -> SympyCall:
    return SympyCall(function)


def number(value: Any) -> int | float | bool:
    """The Python number of a constant expression. Raises `PassError` for any other expression."""
    if isinstance(value, (int, float)):
        return value
    if value in (sympy.true, sympy.false):
        return bool(value)
    if not value.is_number or not value.is_extended_real:
        raise PassError(f"the size {value} is not a number")
    return int(value) if value.is_Integer else float(value)


def interpret(
    size: sympy.Basic,
    known: Callable[[sympy.Basic], Value | None],
    constant: Callable[[Any], Value],
    apply: Callable[[sympy.Basic, Any, list[Value]], Value],
) -> Value:
    """A size in terms of `known` parts, constants and calls.

    `known(part)` may answer for any part of the expression and must for symbols; `apply(part, target, arguments)` makes
    the call that computes a part. Raises `PassError` for an unknown symbol.
    """
    found = known(size)
    if found is not None:
        return found
    if size.is_Symbol:
        raise PassError(f"no value of the graph has the size {size}")
    if not size.args:
        return constant(number(size))
    target, parts = _call(size)
    if target is None:
        return interpret(parts[0], known, constant, apply)
    return apply(size, target, [interpret(part, known, constant, apply) for part in parts])


def _call(size: sympy.Basic) -> tuple[Any, Sequence[sympy.Basic]]:
    """The call that an expression stands for, and its arguments. None for a wrapper of the first."""
    name, args = type(size).__name__, size.args
    if name == "Identity":
        return None, args
    if name == "Piecewise":
        return _choice(args)
    if name in ("Add", "Mul", "Pow"):
        numerator, denominator = fraction(size)
        if denominator != 1:
            # A size is an integer: a fraction of integers has no remainder.
            whole = numerator.is_integer and denominator.is_integer
            return (operator.floordiv if whole else operator.truediv), (numerator, denominator)
        if name == "Pow" and args[1] == sympy.S.Half:
            return torch.sym_sqrt, args[:1]
    if name == "ceiling":
        numerator, denominator = fraction(args[0])
        if denominator != 1 and numerator.is_integer and denominator.is_integer:
            return ceiling_division, (numerator, denominator)  # this fraction may have a remainder
    if name in JOINING and len(args) > 2:
        return CALLS[name], (size.func(*args[:-1]), args[-1])
    return CALLS.get(name) or _sympy_call(size.func), args


def _choice(pairs: Sequence[Any]) -> tuple[Any, Sequence[sympy.Basic]]:
    """`Piecewise((a, p), (b, q), ...)`: a if p, else the choice among the others."""
    value, condition = pairs[0].args
    if condition == sympy.true or len(pairs) == 1:
        return None, (value,)
    return torch.sym_ite, (condition, value, sympy.Piecewise(*pairs[1:]))


def evaluate(size: Size | sympy.Basic, values: Mapping[sympy.Symbol, Any]) -> int | float | bool:
    """The value of a size at these values of its symbols. Raises `PassError` for a symbol without a value."""
    def apply(_: sympy.Basic, target: Any, args: list[Any]) -> Any:
        return target(*args)

    found: int | float | bool = interpret(_expression(size), values.get, lambda value: value, apply)
    return found


class SizeFunction:
    """A size as a function of the values of `symbols`, in order. Pickled as its expression."""

    def __init__(self, size: sympy.Basic, symbols: tuple[sympy.Symbol, ...]) -> None:
        self.size = size
        self.symbols = symbols
        self._compute = _function(size, symbols)

    def __call__(self, values: Sequence[Any]) -> Any:
        return self._compute(values)

    def __reduce__(self) -> Any:
        return SizeFunction, (self.size, self.symbols)


def function_of(size: Size | sympy.Basic, symbols: Sequence[sympy.Symbol]) -> SizeFunction:
    """A size as a function of the values of `symbols`, in order. Raises `PassError` for any other symbol."""
    return SizeFunction(_expression(size), tuple(symbols))


def _function(size: sympy.Basic, symbols: Sequence[sympy.Symbol]) -> Callable[[Sequence[Any]], Any]:
    position = {symbol: i for i, symbol in enumerate(symbols)}

    def known(part: sympy.Basic) -> Callable[[Sequence[Any]], Any] | None:
        return operator.itemgetter(position[part]) if part in position else None

    def constant(value: Any) -> Callable[[Sequence[Any]], Any]:
        return lambda _: value

    def apply(_: sympy.Basic, target: Any, args: list[Any]) -> Callable[[Sequence[Any]], Any]:
        if len(args) == 2:
            left, right = args
            return lambda values: target(left(values), right(values))
        return lambda values: target(*(arg(values) for arg in args))

    function: Callable[[Sequence[Any]], Any] = interpret(size, known, constant, apply)
    return function


def _expression(size: Any) -> sympy.Basic:
    return size if isinstance(size, sympy.Basic) else expr(size)
