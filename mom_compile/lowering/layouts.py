"""Templates of the inputs of a loop body: sizes and strides as expressions in symbols.

Terms
-----
start, count   The first row of a mini-sequence and its number of rows. They change with every iteration.
length         The number of tokens, if the graph has it as a number. With a symbol, the body holds for all lengths.
place          A view of a stored value's rows, which the body writes to.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

import sympy
import torch
from torch import fx

from mom_compile.lowering.templates import SizeTemplate, SymbolFacts, Template, TensorTemplate
from mom_compile.torch_compat.symbolic_sizes import least_value
from mom_passes.errors import PassError
from mom_passes.graph.meta import meta_value
from mom_passes.graph.sizes import Size, expr, hint, product
from mom_passes.graph.strides import is_dense_in
from mom_passes.loops.ports import COUNT, START, CarryIn, In, RowsIn, SizeIn, Stored
from mom_passes.rules import Dim

LENGTH = sympy.Symbol("length", integer=True, nonnegative=True)


class Symbols:
    """The graph's symbols, with the placeholder that has the value of each, and their facts."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.sources: dict[sympy.Symbol, fx.Node] = {}
        self.facts: dict[sympy.Symbol, SymbolFacts] = {}
        for node in gm.graph.nodes:
            value = meta_value(node)
            if node.op == "placeholder" and isinstance(value, torch.SymInt) and expr(value).is_Symbol:
                self.sources[expr(value)] = node
                self.facts[expr(value)] = SymbolFacts(hint(value), least_value(value))

    def check(self, expression: sympy.Expr) -> sympy.Expr:
        unknown = expression.free_symbols - set(self.sources)
        if unknown:
            raise PassError(f"size {expression} depends on {unknown}, and no input of the graph has their values")
        return expression


class TemplateSource(Protocol):
    """The part of `Lowering` that layouts use."""

    symbols: Symbols
    static_inputs: Collection[str]
    layouts: dict[fx.Node, Stored]

    def template(self, node: fx.Node) -> Template: ...


class LoopLayout:
    """Templates of the inputs of one loop body. If the graph's length is a number, it becomes the symbol `length`."""

    def __init__(self, lowering: TemplateSource, length: Size, mini_seq_len: int) -> None:
        self.lowering = lowering
        self.length = length
        self.mini_seq_len = mini_seq_len
        self.literal = length if isinstance(length, int) else None

    def facts(self) -> dict[sympy.Symbol, SymbolFacts]:
        """Return the facts of the symbols of a loop, with the first, full mini-sequence as the example.

        Inductor tunes for the example values, and uses 64-bit indices if 32 bits do not suffice for them. The example
        of `count` is smaller than that of `length`, so that no two sizes are equal by chance.
        """
        length = hint(self.length)
        count = max(2, min(self.mini_seq_len, length - 1))
        return {LENGTH: SymbolFacts(length, 2), START: SymbolFacts(0, 0), COUNT: SymbolFacts(count, 2)}

    def size(self, size: Size) -> sympy.Expr:
        if self.literal is not None and isinstance(size, int) and size == self.literal:
            return LENGTH
        return self.lowering.symbols.check(expr(size))

    def size_in_body(self, size: Size) -> sympy.Expr:
        """Return a size of a value that the body computes, in `start` and `count` too."""
        known = expr(size)
        if known.free_symbols.isdisjoint((START, COUNT)):
            return self.size(size)
        self.lowering.symbols.check(known.xreplace({START: sympy.S.One, COUNT: sympy.S.One}))
        return known

    def whole(self, node: fx.Node) -> Template:
        if self.literal is None:
            return self.lowering.template(node)
        return of_any_length(self.lowering, node, lambda size, _: LENGTH if size == self.literal else size)

    def rows(self, node: fx.Node, dim: Dim) -> Template:
        full = self.whole(node)
        assert isinstance(full, TensorTemplate)
        count = expr(product([dim.outer, COUNT, dim.inner]))
        shape = tuple(count if i == dim.index else size for i, size in enumerate(full.shape))
        stride = full.stride if dim.plain else dense_strides(shape, tuple(range(len(shape))))
        return TensorTemplate(shape, stride, full.dtype, full.device)

    def input(self, port: In, operand: Any) -> Template:
        """Return the template of an input, given the operand that the loop binds to it."""
        if isinstance(port, SizeIn):
            return SizeTemplate(self.size(port.value))
        if isinstance(port, RowsIn):
            return self.rows(operand, port.dim)
        return self.carry(port) if isinstance(port, CarryIn) else self.whole(operand)

    def carry(self, port: CarryIn) -> TensorTemplate:
        type = port.type
        shape = tuple(self.lowering.symbols.check(expr(s)) for s in type.shape)
        return TensorTemplate(shape, dense_strides(shape, type.dense), type.dtype, type.device)

    def place(self, output: Stored) -> TensorTemplate:
        """Return the template of a stored value's rows. A composite token dimension is unfolded to three."""
        dim, type = output.dim, output.type
        shape = [self.lowering.symbols.check(expr(s)) for s in type.shape]
        if self.literal is not None and dim.plain:
            shape[dim.index] = LENGTH
        strides = list(dense_strides(shape, type.dense))
        shape[dim.index] = COUNT
        if not dim.plain:
            inner, step = expr(dim.inner), strides[dim.index]
            shape[dim.index : dim.index + 1] = [expr(dim.outer), COUNT, inner]
            per_outer = sympy.expand(step * inner * (LENGTH if self.literal is not None else expr(self.length)))
            strides[dim.index : dim.index + 1] = [per_outer, sympy.expand(step * inner), step]
        return TensorTemplate(tuple(shape), tuple(strides), type.dtype, type.device)


def of_any_length(source: TemplateSource, node: fx.Node, size_of: Callable[[int, int], Any]) -> Template:
    """Return the template of a value with `size_of(number, dimension)` in place of sizes that are numbers.

    The strides follow from the new sizes. Parameters and values that are not dense keep their sizes.
    """
    template, value = source.template(node), meta_value(node)
    if isinstance(template, SizeTemplate) or node.name in source.static_inputs:
        return template
    shape = tuple(expr(size_of(n, i) if isinstance(n, int) else n) for i, n in enumerate(value.shape))
    order = source.layouts[node].type.dense if node in source.layouts else order_if_dense(value)
    if shape == template.shape or order is None:
        return template
    return TensorTemplate(shape, dense_strides(shape, order), template.dtype, template.device)


def dense_strides(shape: Sequence[Any], order: Sequence[int]) -> tuple[sympy.Expr, ...]:
    """Return the strides of a dense tensor. `order` has its dimensions, from outermost in storage to innermost."""
    strides: list[sympy.Expr] = [sympy.Integer(1)] * len(shape)
    step: sympy.Expr = sympy.Integer(1)
    for index in reversed(order):
        strides[index] = step
        step = sympy.expand(step * expr(shape[index]))
    return tuple(strides)


def order_if_dense(value: torch.Tensor) -> tuple[int, ...] | None:
    """Return the dimensions of a tensor that is dense for all sizes, from outermost in storage to innermost, or None.

    `x[:, -3:]` has dense strides if three tokens are captured, but not for other numbers of tokens.
    """
    order = tuple(sorted(range(value.dim()), key=lambda i: (-hint(value.stride(i)), i)))
    return order if is_dense_in(value, order) else None
