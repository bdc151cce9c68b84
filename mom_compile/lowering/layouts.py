"""What a loop's body assumes of its inputs: sizes and strides as symbols.

Terms
-----
start, count   The row a mini-sequence begins at and how many it has: they change with every iteration.
length         The number of tokens, where the graph has it as a literal. As a symbol it keeps a body good for all.
place          A view of a stored value's rows, which the body fills.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

import sympy
import torch
from torch import fx

from mom_compile.lowering.pieces import SizeTemplate, SymbolFacts, Template, TensorTemplate
from mom_compile.torch_compat.symbolic_sizes import least_value
from mom_passes.errors import PassError
from mom_passes.graph.meta import meta_value
from mom_passes.graph.sizes import Size, expr, hint, product
from mom_passes.loops.ports import COUNT, START, CarryIn, In, RowsIn, SizeIn, Stored
from mom_passes.rules import Dim

LENGTH = sympy.Symbol("length", integer=True, nonnegative=True)


class Symbols:
    """The graph's symbols, each with the placeholder that has its value, and facts about them."""

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
            raise PassError(f"size {expression} depends on {unknown}, which no input of the graph gives")
        return expression


class TemplateSource(Protocol):
    """What a layout asks of the lowering it belongs to."""

    symbols: Symbols
    static_inputs: Collection[str]
    layouts: dict[fx.Node, Stored]

    def template(self, node: fx.Node) -> Template: ...


class LoopLayout:
    """Templates of a body's inputs. Where the graph's length is a number, it becomes the symbol `length` here."""

    def __init__(self, lowering: TemplateSource, length: Size, mini_seq_len: int) -> None:
        self.lowering = lowering
        self.length = length
        self.mini_seq_len = mini_seq_len
        self.literal = length if isinstance(length, int) else None

    def facts(self) -> dict[sympy.Symbol, SymbolFacts]:
        """Hints for the symbols of a loop: a first and a full mini-sequence. Inductor tunes for them, and takes 64 bits
        for an index where 32 would not do for the hint. `count` is never all of the length: they are two sizes."""
        length = hint(self.length)
        count = max(2, min(self.mini_seq_len, length - 1))
        return {LENGTH: SymbolFacts(length, 2), START: SymbolFacts(0, 0), COUNT: SymbolFacts(count, 2)}

    def size(self, size: Size) -> sympy.Expr:
        if self.literal is not None and isinstance(size, int) and size == self.literal:
            return LENGTH
        return self.lowering.symbols.check(expr(size))

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
        """What the body assumes of an input, given the operand that the loop binds to it."""
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
        """Rows of a stored value as the body sees them: a composite dimension is unfolded."""
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
    """The template of a value, with what `size_of(number, dimension)` says in place of sizes that are numbers, and the
    strides with them where it is dense. Parameters and what is not dense stay as they are."""
    template, value = source.template(node), meta_value(node)
    if isinstance(template, SizeTemplate) or node.name in source.static_inputs:
        return template
    shape = tuple(expr(size_of(n, i) if isinstance(n, int) else n) for i, n in enumerate(value.shape))
    order = source.layouts[node].type.dense if node in source.layouts else order_if_dense(value)
    if shape == template.shape or order is None:
        return template
    return TensorTemplate(shape, dense_strides(shape, order), template.dtype, template.device)


def dense_strides(shape: Sequence[Any], order: Sequence[int]) -> tuple[sympy.Expr, ...]:
    """Strides of a dense tensor whose dimensions lie in `order` from the outermost in storage to the innermost."""
    strides: list[sympy.Expr] = [sympy.Integer(1)] * len(shape)
    step: sympy.Expr = sympy.Integer(1)
    for index in reversed(order):
        strides[index] = step
        step = sympy.expand(step * expr(shape[index]))
    return tuple(strides)


def order_if_dense(value: torch.Tensor) -> tuple[int, ...] | None:
    """The order of a dense tensor's dimensions, from the outermost in storage to the innermost; None for another."""
    order = tuple(sorted(range(value.dim()), key=lambda i: (-hint(value.stride(i)), i)))
    expected = dense_strides([hint(size) for size in value.shape], order)
    dense = all(
        hint(n) == 1 or int(e) == hint(s) for n, s, e in zip(value.shape, value.stride(), expected, strict=True)
    )
    return order if dense else None


def expressions(template: Template) -> Sequence[sympy.Expr]:
    if isinstance(template, SizeTemplate):
        return [template.value]
    return [*template.shape, *template.stride]


def substitute(template: Template, names: Mapping[sympy.Symbol, sympy.Symbol]) -> Template:
    if isinstance(template, SizeTemplate):
        return SizeTemplate(template.value.xreplace(names))
    shape = tuple(s.xreplace(names) for s in template.shape)
    stride = tuple(s.xreplace(names) for s in template.stride)
    return TensorTemplate(shape, stride, template.dtype, template.device)
