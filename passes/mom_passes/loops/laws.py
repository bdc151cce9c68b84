"""Invariants of a loop over mini-sequences and of the node that calls it. Each law returns an error message or None."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch import fx

from mom_passes.graph.aliasing import base_of, views_of
from mom_passes.graph.arguments import arguments_of
from mom_passes.graph.meta import meta_value
from mom_passes.graph.sizes import expr, hint, product, quotient, same, symbol_hints
from mom_passes.graph.values import returned_values, returns_a_tensor
from mom_passes.loops.loop import Loop
from mom_passes.loops.ports import COUNT, START, In, RowsIn, SizeIn, Stored, TensorType, rows_type
from mom_passes.rules import Dim, Rows, facts_of
from mom_passes.rules.slicing import take
from mom_passes.torch_compat import new_fake_mode


def body_takes_its_inputs(node: fx.Node, loop: Loop) -> str | None:
    """The body has one placeholder per input and returns one value per stored output and per carry."""
    loop.body.graph.lint()
    placeholders = [inner for inner in loop.body.graph.nodes if inner.op == "placeholder"]
    if len(placeholders) != 2 + len(loop.inputs):
        return f"the body takes {len(placeholders)} values, the loop passes {2 + len(loop.inputs)}"
    returned = _returned(loop)
    wanted = len(loop.stored) + len(loop.carries)
    if len(returned) != wanted:
        expected = f"{len(loop.stored)} stored and {len(loop.carries)} carried"
        return f"the body returns {len(returned)} values, the loop has {expected}"
    if sorted(carry.out for carry in loop.carries.values()) != list(range(len(loop.stored), wanted)):
        return "a carry takes the same value of the body as another carry or a stored output"
    for final in loop.finals:
        if final.carry not in loop.carries:
            return f"{final.name} is the final value of input {final.carry}, which is no carry"
    return None


def operands_fit_their_ports(node: fx.Node, loop: Loop) -> str | None:
    """Operands have the types of their ports."""
    length, *operands = node.args
    if not same(_value(length), loop.length):
        return f"its length is {_value(length)}, expected {loop.length}"
    if len(operands) != len(loop.inputs):
        return f"it has {len(operands)} operands for {len(loop.inputs)} inputs"
    for i, (port, operand) in enumerate(zip(loop.inputs, operands, strict=True)):
        if isinstance(port, SizeIn):
            wrong = None if same(_value(operand), port.value) else f"is {_value(operand)}, expected {port.value}"
        else:
            wrong = port.type.difference(_value(operand))
        if wrong is None and isinstance(port, RowsIn):
            wrong = _length_error(port.type, port.dim, loop)
        if wrong is not None:
            return f"operand {i} ({operand}) {wrong}"
    return None


def results_fit_their_ports(node: fx.Node, loop: Loop) -> str | None:
    """Results have the types of their ports, and stored outputs have one row per token of the loop."""
    for output in loop.outputs:
        wrong = _length_error(output.type, output.dim, loop) if isinstance(output, Stored) else None
        if wrong is not None:
            return f"{output.name} {wrong}"
    for index, item in loop.results(node).items():
        if not 0 <= index < len(loop.outputs):
            return f"{item.name} is output {index} of {len(loop.outputs)}"
        wrong = loop.outputs[index].type.difference(_value(item))
        if wrong is not None:
            return f"{item.name} {wrong}"
    return None


def body_is_typed(node: fx.Node, loop: Loop) -> str | None:
    """Every tensor of a body has a type, and returned values have the type of the stored rows or of their carry."""
    for inner in loop.body.graph.nodes:
        if inner.op == "call_function" and "type" not in inner.meta and returns_a_tensor(inner):
            return f"{inner.name} ({inner.target}) in its body has no type"
    returned = _returned(loop)
    wanted = [(o.name, rows_type(o.type, Rows(o.dim))) for o in loop.stored]
    wanted += [(f"carry {i}", carry.type) for i, carry in sorted(loop.carries.items(), key=lambda item: item[1].out)]
    for value, (name, type) in zip(returned, wanted, strict=True):
        wrong = type.other_than(value.meta["type"])
        if wrong is not None:
            return f"{name}: {value.name} in its body {wrong}"
    return None


def body_is_good_for_all_lengths(node: fx.Node, loop: Loop) -> str | None:
    """No size argument in the body is the literal length."""
    if not isinstance(loop.length, int) or loop.length < 2:
        return None
    for inner in loop.body.graph.nodes:
        if inner.op != "call_function":
            continue
        for name in facts_of(inner.target).size_arguments:
            place = arguments_of(inner.target)[name][0]
            given = inner.args[place] if place is not None and place < len(inner.args) else inner.kwargs.get(name)
            sizes = given if isinstance(given, (list, tuple)) else [given]
            if any(type(size) is int and size == loop.length for size in sizes):
                return f"{inner.name} ({inner.target}) in its body has the length {loop.length} as a literal"
    return None


def overwrites_what_is_dead(node: fx.Node, loop: Loop) -> str | None:
    """A result overwrites only storage that the graph allocates and that no node reads later, directly or by a view.

    Derived from operator schemas, independently of the program, which decides what is overwritten.
    """
    for output in loop.stored:
        if output.over is None:
            continue
        operand, port = loop.bind(node)[output.over], loop.inputs[output.over]
        base = base_of(operand)
        if not isinstance(port, RowsIn) or port.dim != output.dim or output.type.other_than(port.type) is not None:
            return f"{output.name} does not fit into the storage of {operand.name}"
        if base.op != "call_function":
            return f"it would overwrite {operand.name}, which is or aliases an input"
        views = views_of(base)
        if sum(argument in views for argument in node.args) != 1:
            return f"it would overwrite {operand.name}, which it also reads through another operand"
        for view in views:
            late = next((user for user in view.users if user is not node and not user < node), None)
            if late is not None:
                return f"it would overwrite {operand.name}, which is read later by {late.name}"
    return None


def body_computes_its_types(node: fx.Node, loop: Loop) -> str | None:
    """The body, run on fake tensors at the captured sizes, computes values of the declared types. Slow: for tests."""
    known: dict[Any, Any] = {**symbol_hints(n for n in node.graph.nodes if n.op == "placeholder")}
    count = min(3, hint(loop.length))
    known |= {START: sympy.Integer(0), COUNT: sympy.Integer(count)}
    with new_fake_mode(), torch.no_grad():
        operands = zip(loop.inputs, loop.bind(node), strict=True)
        values = [0, count, *(_example(port, _value(operand), count, known) for port, operand in operands)]
        try:
            _TypeChecker(loop.body, known).run(*values)
        except Exception as error:
            return f"its body cannot be run: {type(error).__name__}: {error}"
    return None


def _example(port: In, value: Any, count: int, known: Mapping[Any, Any]) -> Any:
    """Return the input of a mini-sequence of `count` tokens for an operand with this fake value, with its strides."""
    if isinstance(port, SizeIn):
        return _number(value, known)
    shape, stride = ([_number(size, known) for size in sizes] for sizes in (value.shape, value.stride()))
    full = torch.empty_strided(shape, stride, dtype=value.dtype, device=value.device)
    if not isinstance(port, RowsIn):
        return full
    return take(full, Dim(port.dim.index, *(_number(s, known) for s in (port.dim.outer, port.dim.inner))), 0, count)


class _TypeChecker(fx.Interpreter):
    def __init__(self, body: fx.GraphModule, known: Mapping[Any, Any]) -> None:
        super().__init__(body, garbage_collect_values=True)
        self.known = known

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        type = n.meta.get("type")
        pairs = zip(type, value, strict=True) if isinstance(type, tuple) else [(type, value)]
        for one, made in pairs:
            if not isinstance(one, TensorType):
                continue
            wanted = [_number(size, self.known) for size in one.shape]
            if list(made.shape) != wanted or made.dtype != one.dtype:
                raise TypeError(f"{n.name} is {made.dtype}{list(made.shape)}, expected {one.dtype}{wanted}")
        return value


def _number(size: Any, known: Mapping[Any, Any]) -> int:
    return int(expr(size).xreplace(known))


def _returned(loop: Loop) -> tuple[fx.Node, ...]:
    return returned_values(loop.body.graph)


def _value(operand: Any) -> Any:
    return meta_value(operand) if isinstance(operand, fx.Node) else operand


def _length_error(type: TensorType, dim: Dim, loop: Loop) -> str | None:
    length = quotient(type.shape[dim.index], product([dim.outer, dim.inner]))
    return None if length is not None and same(length, loop.length) else f"has {length} rows, expected {loop.length}"
