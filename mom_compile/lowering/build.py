"""From the rewritten graph to a program: loop bodies and straight runs of operators go through Inductor once each.

Terms
-----
straight piece   A run of operators between two loops, compiled as one graph.
own symbols      A piece's sizes, numbered in order of appearance (`n0`, `n1`, ...), so that layers and graphs share it.
place            A view of a stored value's rows, which the body fills: nothing is copied there afterwards.

    for node in graph:
        loop           -> a body that writes its rows in place, compiled; a CompiledLoop step
        operators      -> gathered up to the next loop; one compiled piece, or steps where they are only views
        size           -> a step
    every step names the slots that die with it
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import fx

from mom_compile.lowering.layouts import (
    COUNT,
    LENGTH,
    START,
    LoopLayout,
    Symbols,
    dense_strides,
    expressions,
    substitute,
)
from mom_compile.lowering.pieces import PieceCache, SizeTemplate, SymbolFacts, Template, TensorTemplate
from mom_compile.lowering.transfers import copy_step
from mom_compile.memory.place import KVPlace
from mom_compile.report import Report
from mom_compile.runtime.host.steps import Settle
from mom_compile.runtime.loop import CompiledLoop, Sizes
from mom_compile.runtime.program import Program, Slot, Step
from mom_compile.torch_compat import codegen_settings, keep_output_strides
from mom_passes.errors import PassError
from mom_passes.graph.edit import attribute
from mom_passes.graph.size_values import function_of
from mom_passes.graph.sizes import Size, expr, hint
from mom_passes.loops.loop import Loop, MiniSequence
from mom_passes.loops.ports import RowsIn, SizeIn, Stored
from mom_passes.ops.rows import COPY_ROWS
from mom_passes.ops.transfers import COPIES, OFFLOAD
from mom_passes.rules import Dim
from mom_passes.rules.views import relabels
from mom_passes.torch_compat import SYMBOLIC

aten = torch.ops.aten


class Lowering:
    """Lowers one rewritten graph. `static_inputs` names the placeholders that hold parameters."""

    def __init__(
        self,
        gm: fx.GraphModule,
        *,
        static_inputs: Collection[str],
        patches: Mapping[str, Any],
        cache: PieceCache,
        report: Report,
        kv: KVPlace,
    ) -> None:
        self.gm = gm
        self.kv = kv
        self.static_inputs = static_inputs
        self.patches = patches
        self.settings = codegen_settings()
        self.cache = cache
        self.report = report
        self.symbols = Symbols(gm)
        self.slots: dict[fx.Node, int] = {}
        self.steps: list[tuple[str, Callable[[list[Any]], Any], list[Any], list[fx.Node | None]]] = []
        self.layouts: dict[fx.Node, Stored] = {}
        self.straight: list[fx.Node] = []
        #: What is taken from several returned values, lowered with the operator that returned them.
        self.items: set[fx.Node] = set()
        self._layer_bytes = _layer_bytes(gm)

    def program(self) -> Program:
        for node in self.gm.graph.nodes:
            if node.op == "placeholder":
                self._slot(node)
            elif node.op == "call_module":
                self._flush()
                self._lower_loop(node)
            elif node.op == "get_attr":
                self._lower_attribute(node)
            elif node.op == "call_function" and node.target is operator.getitem and node.args[0].op == "call_module":
                continue
            elif node.op == "call_function":
                self._lower_operator(node)
        self._flush()
        return self._assemble()

    # --- operators between loops ---

    def _lower_operator(self, node: fx.Node) -> None:
        if node in self.items:
            return
        value = node.meta.get("val")
        if node.target in COPIES:
            self._flush()
            step, arguments = copy_step(node, self.kv, self._layer_bytes)
            self._call(node.name, step, arguments, [node])
            return
        if isinstance(value, (int, float, bool, *SYMBOLIC)):
            if any(n in self.straight for n in node.all_input_nodes):
                self._flush()
            self._call(node.name, _caller(node), list(node.all_input_nodes), [node])
            return
        if node.target is aten.full.default and all(user.op == "call_module" for user in node.users):
            # What a carry begins with: nothing to compile.
            self._call(node.name, _caller(node), list(node.all_input_nodes), [node])
            return
        if node.target is COPY_ROWS and all(relabels(n) for n in self.straight):
            # Nothing to compile: a piece for a copy alone would be one for each shape.
            self._flush()
            self._call(node.name, _caller(node), list(node.all_input_nodes), [node])
            return
        # What returns several values stays together with what takes them apart: a piece's inputs are tensors and sizes.
        self.straight += [node, *_items(node)]
        self.items.update(_items(node))

    def _lower_attribute(self, node: fx.Node) -> None:
        self._call(node.name, _constant(attribute(self.gm, str(node.target))), [], [node])

    def _flush(self) -> None:
        """Emit the operators gathered so far: as they are where they only relabel storage, else as one piece."""
        nodes, self.straight = self.straight, []
        if all(relabels(node) for node in nodes):
            for node in nodes:
                self._call(node.name, _caller(node), list(node.all_input_nodes), [node])
            return
        inside = set(nodes)
        read = [n for node in nodes for n in node.all_input_nodes if n not in inside]
        inputs = list(dict.fromkeys(read))
        outputs = [n for n in nodes if any(user not in inside for user in n.users)]
        name = f"piece_{nodes[0].name}"
        graph = _subgraph(nodes, inputs, outputs)
        templates = [self.template(node) for node in inputs]
        run, extra = self._compile(graph, templates, name)
        self._call(name, run, [*extra, *inputs], list(outputs))

    # --- loops ---

    def _lower_loop(self, node: fx.Node) -> None:
        module = self.gm.get_submodule(str(node.target))
        assert isinstance(module, MiniSequence)
        loop = module.loop
        layout = LoopLayout(self, loop.length)
        templates: list[Template] = [SizeTemplate(START), SizeTemplate(COUNT)]
        templates += [layout.input(port, operand) for port, operand in zip(loop.inputs, loop.bind(node), strict=True)]
        templates += [layout.place(output) for output in loop.stored if output.over is None]
        run, extra = self._compile(_writing_body(loop), templates, str(node.target), layout.literal, layout.facts())
        sizes = _sizes_in_a_run(loop)
        values = extra + [n for n in self._symbols_of(sizes) if n not in extra]
        functions = {size: self._function(size, values) for size in sizes if not size.is_Integer}
        inputs, outputs = (tuple(map(_in_expressions, ports)) for ports in (loop.inputs, loop.outputs))
        compiled = CompiledLoop(run, loop.rows, len(values), len(extra), inputs, outputs, Sizes(functions))
        items = loop.results(node)
        results = [items.get(i) for i in range(len(loop.outputs))]
        for item, output in zip(results, loop.outputs, strict=True):
            if item is not None and isinstance(output, Stored):
                self.layouts[item] = output
        self._call(str(node.target), compiled, [*values, *node.args], results)

    def _symbols_of(self, sizes: Collection[sympy.Expr]) -> list[fx.Node]:
        """Sources of the symbols of some sizes."""
        symbols = {symbol for size in sizes for symbol in self.symbols.check(size).free_symbols}
        return [self.symbols.sources[symbol] for symbol in sorted(symbols, key=str)]

    def _function(self, size: sympy.Expr, extra: Sequence[Any]) -> Callable[[Sequence[int]], int]:
        """A size as a function of the values of the loop's symbol arguments.

        It is computed once here, at the captured sizes: what cannot be computed must not fail in the running program.
        """
        nodes = [n if isinstance(n, fx.Node) else None for n in extra]
        symbols = [expr(n.meta["val"]) if n is not None else LENGTH for n in nodes]
        compute = function_of(size, symbols)
        found = compute([hint(n.meta["val"]) if n is not None else extra[i] for i, n in enumerate(nodes)])
        if found != int(found):
            raise PassError(f"the size {size} is {found} where the captured sizes are")
        return compute

    # --- pieces ---

    def _compile(
        self,
        graph: fx.Graph,
        templates: list[Template],
        name: str,
        literal: int | None = None,
        facts: Mapping[sympy.Symbol, SymbolFacts] | None = None,
    ) -> tuple[Callable[[list[Any]], Any], list[Any]]:
        """The compiled piece, and the arguments that give its symbols their values, to be passed first.

        `start` and `count` change with every iteration: a loop passes them itself, after those.
        """
        found = [s for t in templates for e in expressions(t) for s in sorted(e.free_symbols, key=str)]
        facts = {**self.symbols.facts, **(facts or {})}
        outer = [s for s in dict.fromkeys(found) if s not in (START, COUNT)]
        names: dict[sympy.Symbol, sympy.Symbol] = {
            s: sympy.Symbol(f"n{i}", integer=True, nonnegative=True) for i, s in enumerate(outer)
        }
        own = {names[s]: facts[s] for s in outer}
        looping = [s for s in (START, COUNT) if s in found]
        own.update({s: facts[s] for s in looping})
        renamed: list[Template] = [SizeTemplate(names[s]) for s in outer]
        renamed += [substitute(t, names) for t in templates]
        _lead_with_sizes(graph, [names[s].name for s in outer])
        keep_output_strides(graph)
        piece = self.cache.get(graph, renamed, own, self.patches, self.settings, self.report, name)
        extra = [literal if s is LENGTH else self.symbols.sources[s] for s in outer]
        return piece, extra

    def template(self, node: fx.Node) -> Template:
        value = node.meta["val"]
        if isinstance(value, torch.Tensor):
            shape = tuple(self.symbols.check(expr(s)) for s in value.shape)
            stride = self.strides(node)
            return TensorTemplate(shape, stride, value.dtype, value.device)
        return SizeTemplate(self.symbols.check(expr(value)))

    def strides(self, node: fx.Node) -> tuple[sympy.Expr, ...]:
        value = node.meta["val"]
        if node in self.layouts:
            return dense_strides(value.shape, self.layouts[node].type.dense)
        return tuple(self.symbols.check(expr(s)) for s in value.stride())

    # --- steps ---

    def _slot(self, node: fx.Node) -> int:
        return self.slots.setdefault(node, len(self.slots))

    def _call(
        self, name: str, run: Callable[[list[Any]], Any], arguments: list[Any], results: list[fx.Node | None]
    ) -> None:
        for result in results:
            if result is not None:
                self._slot(result)
        self.steps.append((name, run, arguments, results))

    def _assemble(self) -> Program:
        output = next(n for n in self.gm.graph.nodes if n.op == "output")
        returned = list(output.args[0])
        last: dict[fx.Node, int] = {}
        for i, (_, _, arguments, results) in enumerate(self.steps):
            for node in [*arguments, *results]:
                if isinstance(node, fx.Node):
                    last[node] = i
        kept = {n for n in returned if isinstance(n, fx.Node)}
        steps = []
        for i, (name, run, arguments, results) in enumerate(self.steps):
            dying = {self.slots[n] for n in arguments if isinstance(n, fx.Node) and last[n] == i and n not in kept}
            steps.append(
                Step(
                    name,
                    run,
                    tuple(Slot(self.slots[a]) if isinstance(a, fx.Node) else a for a in arguments),
                    tuple(self.slots[r] if r is not None and (r in kept or last[r] > i) else None for r in results),
                    tuple(sorted(dying)),
                )
            )
        unread = [self.slots[n] for n in self.slots if n.op == "placeholder" and n not in last and n not in kept]
        outputs = tuple(Slot(self.slots[n]) if isinstance(n, fx.Node) else n for n in returned)
        copies = any(node.target in COPIES for node in self.gm.graph.nodes)
        return Program(
            tuple(steps), len(self.slots), tuple(unread), outputs, Settle(self.kv.device) if copies else None
        )


def _layer_bytes(gm: fx.GraphModule) -> dict[int, int]:
    """Bytes per token of what each layer's cache keeps."""
    found: dict[int, int] = {}
    for node in gm.graph.nodes:
        kv = node.meta.get("kv") if node.target is OFFLOAD else None
        if kv is not None:
            found[kv.layer] = found.get(kv.layer, 0) + kv.bytes_per_token
    return found


def _sizes_in_a_run(loop: Loop) -> list[sympy.Expr]:
    """Those that a run asks for: the shapes of what is stored, and how tokens are laid out."""
    new = [output for output in loop.stored if output.over is None]
    dims = [port.dim for port in loop.inputs if isinstance(port, RowsIn)] + [output.dim for output in new]
    sizes = [size for output in new for size in output.type.shape]
    return list(dict.fromkeys(expr(size) for size in (*sizes, *(s for dim in dims for s in (dim.outer, dim.inner)))))


def _in_expressions(port: Any) -> Any:
    """A port whose sizes are numbers and expressions: a running program keeps nothing of the graph's symbols alive."""

    def plain(size: Size) -> Size:
        known = expr(size)
        return int(known) if known.is_Integer else known

    changed: dict[str, Any] = {}
    if isinstance(port, SizeIn):
        changed["value"] = plain(port.value)
    else:
        changed["type"] = replace(port.type, shape=tuple(map(plain, port.type.shape)))
    if isinstance(port, RowsIn | Stored):
        changed["dim"] = Dim(port.dim.index, plain(port.dim.outer), plain(port.dim.inner))
    return replace(port, **changed)


def _writing_body(loop: Loop) -> fx.Graph:
    """The loop's body with one more argument per new value, a place that it fills instead of returning rows.

    What is written over an operand goes to that operand's rows, and what a carry hands on to the carry, the same
    arguments, so that Inductor knows to read them first.

    Before:  def body(start, count, x_rows, w): ...; return (k, y)              y goes over x
    After:   def body(start, count, x_rows, w, k_place): ...; k_place.copy_(k); x_rows.copy_(y); return ()
    """
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    for node in loop.body.graph.nodes:
        if node.op == "placeholder":
            values[node] = graph.node_copy(node)
    inputs = list(values.values())[2:]
    places = [graph.placeholder(f"{o.name}_place") if o.over is None else inputs[o.over] for o in loop.stored]
    places += [inputs[i] for i in loop.carries]
    for node in loop.body.graph.nodes:
        if node.op == "output":
            _write(graph, loop, places, [values[rows] for rows in node.args[0]])
            graph.output(())
        elif node.op != "placeholder":
            values[node] = graph.node_copy(node, values.__getitem__)
    return graph


def _write(graph: fx.Graph, loop: Loop, places: Sequence[fx.Node], values: Sequence[fx.Node]) -> None:
    """What is written over an input goes last: another value may be a view of it."""
    stored = loop.stored
    over = [i >= len(stored) or stored[i].over is not None for i in range(len(places))]
    for i in sorted(range(len(places)), key=over.__getitem__):
        value = values[i]
        if i < len(stored) and not stored[i].dim.plain:
            shape = _unfolded_shape(graph, stored[i], places[i])
            value = graph.call_function(aten.reshape.default, (value, shape))
        graph.call_function(aten.copy_.default, (places[i], value))


def _unfolded_shape(graph: fx.Graph, output: Stored, place: fx.Node) -> list[Any]:
    """The place's own sizes."""
    return [graph.call_function(aten.sym_size.int, (place, i)) for i in range(len(output.type.shape) + 2)]


def _subgraph(nodes: Sequence[fx.Node], inputs: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> fx.Graph:
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        values[node] = graph.placeholder(node.name)
    for node in nodes:
        values[node] = graph.node_copy(node, values.__getitem__)
    graph.output(tuple(values[node] for node in outputs))
    return graph


def _items(node: fx.Node) -> list[fx.Node]:
    """What is taken from the values that an operator returns at once, and from lists among those."""
    if not isinstance(node.meta.get("val"), (tuple, list)):
        return []
    items = [user for user in node.users if user.target is operator.getitem]
    return [each for item in items for each in (item, *_items(item))]


def _lead_with_sizes(graph: fx.Graph, names: Sequence[str]) -> None:
    """Put a placeholder for each symbol before all others."""
    with graph.inserting_before(next(iter(graph.nodes))):
        for name in names:
            graph.placeholder(name)


def _constant(value: Any) -> Callable[[list[Any]], tuple[Any]]:
    return lambda _: (value,)


def _caller(node: fx.Node) -> Callable[[list[Any]], tuple[Any]]:
    """A step that calls one node's target on the values of its distinct inputs."""
    inputs = list(node.all_input_nodes)

    def call(arguments: list[Any]) -> tuple[Any]:
        known = dict(zip(inputs, arguments, strict=True))
        args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
        return (node.target(*args, **kwargs),)  # type: ignore[operator]

    return call


def lower(
    gm: fx.GraphModule,
    *,
    static_inputs: Collection[str],
    patches: Mapping[str, Any],
    cache: PieceCache,
    report: Report,
    kv: KVPlace,
) -> Program:
    """The rewritten graph as a program of compiled steps."""
    return Lowering(gm, static_inputs=static_inputs, patches=patches, cache=cache, report=report, kv=kv).program()
