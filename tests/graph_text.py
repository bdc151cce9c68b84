"""A graph as compact text that does not depend on PyTorch's names: a line for each node, loops with ports and bodies.

    mm = mm(reshape, permute) -> [S, 16]
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Sequence
from typing import Any

import sympy
import torch
from torch import fx

from mom_passes.graph.sizes import expr
from mom_passes.loops.loop import Loop, MiniSequence
from mom_passes.loops.ports import COUNT, START, TensorType
from mom_passes.rules import Dim

_FLOAT = torch.float32


class Printer:
    """Prints versions of one graph. A node that two versions have in common keeps its name.

    Nodes are numbered by operator, and symbols of sizes are called S, T, ..., both in order of appearance.
    """

    def __init__(self, inputs: Sequence[str]) -> None:
        self._inputs = inputs
        self._names: dict[str, str] = {}
        self._counts: dict[str, int] = {}
        self._symbols: dict[sympy.Symbol, sympy.Symbol] = {s: s for s in (START, COUNT)}

    def lines(self, gm: fx.GraphModule) -> list[str]:
        inputs = [node.name for node in gm.graph.nodes if node.op == "placeholder"]
        self._names.update(zip(inputs, self._inputs, strict=True))
        return [line for node in gm.graph.nodes for line in self._lines(gm, node)]

    def _lines(self, gm: fx.GraphModule, node: fx.Node) -> Iterable[str]:
        module = gm.get_submodule(str(node.target)) if node.op == "call_module" else None
        made = _meta(node)
        shown = "" if made is None else f" -> {self._value(made)}"
        if node.op == "placeholder":
            yield f"{self._name(node)}{shown}"
        elif node.op == "output":
            yield f"return {self._arg(node.args[0])}"
        elif node.op == "get_attr":
            yield f"{self._name(node)} = constant{shown}"
        elif isinstance(module, MiniSequence):
            yield f"{self._name(node)} = loop over {self._arg(node.args[0])}:"
            yield from (f"    {line}" for line in self._loop(node, module.loop))
        else:
            args = [self._arg(arg) for arg in node.args] + [f"{k}={self._arg(v)}" for k, v in node.kwargs.items()]
            yield f"{self._name(node)} = {_operator(node)}({', '.join(args)}){shown}"

    def _loop(self, node: fx.Node, loop: Loop) -> Iterable[str]:
        names = ["start", "count", *(f"{self._arg(given)}'" for given in loop.bind(node))]
        body = Printer(names)
        body._symbols = self._symbols
        lines = [line for line in body.lines(loop.body) if line.partition(" ")[0] not in names]
        for name, port in zip(names[2:], loop.inputs, strict=True):
            yield f"{name} = {self._port(port)}"
        yield from lines
        for number, port in enumerate(loop.outputs):
            yield f"[{number}] {self._port(port)}"

    def _port(self, port: Any) -> str:
        """The kind of a port and its fields, whatever they are."""
        fields = [(f.name, getattr(port, f.name)) for f in dataclasses.fields(port) if f.name != "name"]
        texts = [self._value(v) if isinstance(v, TensorType) else f"{name} {self._arg(v)}" for name, v in fields]
        return f"{type(port).__name__}({', '.join(texts)})"

    def _name(self, node: fx.Node) -> str:
        if node.name not in self._names:
            kind = "loop" if node.op == "call_module" else _operator(node).rpartition(".")[2]
            number = self._counts[kind] = self._counts.get(kind, -1) + 1
            self._names[node.name] = f"{kind}_{number}" if number else kind
        return self._names[node.name]

    def _arg(self, arg: Any) -> str:
        if isinstance(arg, fx.Node):
            return self._name(arg)
        if isinstance(arg, (list, tuple)):
            return f"[{', '.join(map(self._arg, arg))}]"
        if isinstance(arg, (torch.SymInt, sympy.Basic)):
            return self._size(arg)
        if isinstance(arg, Dim):
            around = [] if arg.plain else [f"outer {self._size(arg.outer)}", f"inner {self._size(arg.inner)}"]
            return " ".join([str(arg.index), *around])
        return str(arg).removeprefix("torch.")

    def _size(self, size: Any) -> str:
        known = expr(size)
        for symbol in sorted(known.free_symbols - self._symbols.keys(), key=str):
            number = len(self._symbols) - 2
            self._symbols[symbol] = sympy.Symbol("STUVW"[number], integer=True, nonnegative=True)
        return str(known.xreplace(self._symbols))

    def _value(self, value: Any) -> str:
        if isinstance(value, (torch.Tensor, TensorType)):
            kind = "" if value.dtype is _FLOAT else str(value.dtype).removeprefix("torch.")
            return f"{kind}[{', '.join(map(self._size, value.shape))}]"
        if isinstance(value, (list, tuple)):
            return ", ".join(map(self._value, value))
        return self._arg(value)


def _meta(node: fx.Node) -> Any:
    return node.meta.get("val", node.meta.get("type"))


def _operator(node: fx.Node) -> str:
    if node.op == "get_attr":
        return "constant"
    if not isinstance(node.target, torch._ops.OpOverload):
        return str(getattr(node.target, "__name__", node.target))
    library, name = node.target.name().split("::")
    return name.partition(".")[0] if library == "aten" else f"{library}.{name.partition('.')[0]}"


def changed(before: Sequence[str], after: Sequence[str]) -> list[str]:
    """The lines that a pass removes (-) and adds (+), in order."""
    lines: list[str] = []
    matcher = difflib.SequenceMatcher(None, before, after, autojunk=False)
    for kind, first, last, first_after, last_after in matcher.get_opcodes():
        if kind != "equal":
            lines += [f"- {line}" for line in before[first:last]]
            lines += [f"+ {line}" for line in after[first_after:last_after]]
    return lines
