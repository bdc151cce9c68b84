"""From the rewritten graph to a program: Inductor compiles loop bodies, and the operators between two loops.

Terms
-----
straight piece   The operators between two loops, compiled as one graph.
own symbols      The sizes of a piece, numbered in order of appearance (`n0`, `n1`, ...): layers and graphs share it.
place            A view of a stored value's rows. The loop body writes to it, so that nothing is copied afterwards.

    for step in plan:
        loop           -> a compiled body that writes its rows in place
        piece          -> a compiled piece
        transfer       -> a step of the copy engine
        call           -> the operator itself
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import sympy
import torch
from torch import fx

from mom_compile.lowering.assemble import Called, assemble
from mom_compile.lowering.canonical import NO_LITERALS, Literals, in_canonical_form
from mom_compile.lowering.layouts import LENGTH, LoopLayout, Symbols, dense_strides, of_any_length, order_if_dense
from mom_compile.lowering.loop_ports import ports_with_inputs, same_in_every_iteration, sizes_at_run_time
from mom_compile.lowering.parted import compile_parts
from mom_compile.lowering.piece_cache import PieceCache
from mom_compile.lowering.pieces import Piece
from mom_compile.lowering.templates import SizeTemplate, SymbolFacts, Template, TensorTemplate
from mom_compile.lowering.transfers import copy_step
from mom_compile.lowering.transposed import transpose_once
from mom_compile.lowering.writing import writing_body
from mom_compile.memory.decide import Decision
from mom_compile.progress import expect
from mom_compile.report.facts import PieceLog
from mom_compile.runtime.calls import Constant, OperatorCall
from mom_compile.runtime.loop import CompiledLoop, Sizes
from mom_compile.runtime.parted import PartedBody
from mom_compile.runtime.program import Program
from mom_compile.torch_compat.inductor import NO_SIZE_ASSERTS, codegen_settings, keep_output_strides
from mom_passes.attention.flex import FlexAttention
from mom_passes.errors import PassError
from mom_passes.graph.edit import add_input, attribute
from mom_passes.graph.meta import meta_value
from mom_passes.graph.size_values import function_of
from mom_passes.graph.sizes import expr, hint
from mom_passes.loops.ports import COUNT, START, Stored
from mom_passes.ops.collectives import has_collectives
from mom_passes.ops.rows import LAID_OUT
from mom_passes.program.memory import leaving
from mom_passes.program.program import Compute, LoopStep, Transfer
from mom_passes.program.rewritten import Rewritten
from mom_passes.torch_compat import graph_module


class Lowering:
    """Lowers one rewritten graph. `static_inputs` has the names of the placeholders that hold parameters."""

    def __init__(
        self,
        rewritten: Rewritten,
        *,
        static_inputs: Collection[str],
        patches: Mapping[str, Any],
        cache: PieceCache,
        report: PieceLog,
        kv: Decision,
        strict: bool = False,
    ) -> None:
        self.gm = rewritten.gm
        self.plan = rewritten.plan
        self.kv = kv
        self.static_inputs = static_inputs
        self.patches = patches
        self.strict = strict
        self.settings = codegen_settings()
        self.cache = cache
        self.report = report
        self.symbols = Symbols(self.gm)
        self.literals = Literals.of(self.gm, static_inputs)
        #: For each step of the plan.
        self.calls: list[Called] = []
        #: By the names of their steps.
        self.pieces: dict[str, Piece] = {}
        #: By the number of the step: pieces that have a length of the graph as a symbol.
        self._with_literals: dict[int, Compute] = {}
        self.layouts: dict[fx.Node, Stored] = {}
        self._leaving = leaving(self.plan)
        #: The sizes by which a run chooses rows and layers.
        decides = self.kv.rows or self._leaving or self.kv.is_for_each_run
        sizes = kv.choice.model.symbols if kv.choice is not None and decides else ()
        self._deciding = [self.symbols.sources[self.symbols.check(symbol)] for symbol in sizes]

    def program(self) -> Program:
        expect(sum(isinstance(step, LoopStep | Compute) for step in self.plan.steps))
        for step in self.plan.steps:
            if isinstance(step, LoopStep):
                self.calls.append(self._loop(step))
            elif isinstance(step, Compute):
                self.calls.append(self._piece(step))
            elif isinstance(step, Transfer):
                self.calls.append(copy_step(step.node, self.kv, self._leaving, self._deciding))
            elif step.node.op == "get_attr":
                self.calls.append((Constant(attribute(self.gm, str(step.node.target))), list(step.ins)))
            else:
                self.calls.append((OperatorCall.of(step.node), list(step.ins)))
        self._finish()
        return assemble(self.plan, self.calls, self.kv, self._deciding, self.static_inputs)

    # --- operators between loops ---

    def _piece(self, step: Compute) -> Called:
        # FlexAttention keeps its length: its block mask has a number of blocks, so that no other length shares the
        # piece, and Inductor's C++ does not compile if a score reads a symbolic size while the blocks are numbers.
        flex = any(isinstance(node.target, FlexAttention) for node in step.nodes)
        literals = NO_LITERALS if flex else self.literals
        if literals.length:
            self._with_literals[len(self.calls)] = step
        return self._compile_piece(step, literals)

    def _compile_piece(self, step: Compute, literals: Literals) -> Called:
        """Return the piece for the operators of a step, with its arguments."""
        graph = _subgraph(step.nodes, step.ins, step.outs)
        templates = [
            of_any_length(self, node, partial(literals.size, node)) if literals.length else self.template(node)
            for node in step.ins
        ]
        values = dict.fromkeys(literals.facts, literals.length)
        orders = tuple(order_if_dense(meta_value(node)) for node in step.outs)
        piece, extra, left = self._compile(graph, templates, step.name, values, literals.facts, literals, orders=orders)
        return piece, [*extra, *itertools.compress(step.ins, left)]

    # --- loops ---

    def _loop(self, step: LoopStep) -> Called:
        node, loop = step.node, step.loop
        layout = LoopLayout(self, loop.length, loop.rows)
        templates: list[Template] = [SizeTemplate(START), SizeTemplate(COUNT)]
        templates += [layout.input(port, operand) for port, operand in zip(loop.inputs, loop.bind(node), strict=True)]
        templates += [layout.place(output) for output in loop.stored if output.over is None]
        templates += [layout.carry(loop.inputs[i]) for i in loop.carries]  # type: ignore[arg-type]
        graph, of_inputs = writing_body(loop), slice(2, 2 + len(loop.inputs))
        templates, transposed = transpose_once(graph, templates, same_in_every_iteration(loop, len(templates)))

        def compiled(
            graph: fx.Graph, templates: Sequence[Template], name: str, orders: Sequence[tuple[int, ...]] = ()
        ) -> tuple[Piece, list[Any], list[bool]]:
            lengths = {LENGTH: layout.literal}
            given = (lengths, layout.facts(), NO_LITERALS, NO_SIZE_ASSERTS, tuple(orders))
            return self._compile(graph, templates, name, *given)

        body: Piece | PartedBody
        if has_collectives(graph.nodes):
            body, extra, left = compile_parts(graph, templates, layout, loop.in_flight, step.name, compiled)
        else:
            body, extra, left = compiled(graph, templates, step.name)
        left, transposed = left[of_inputs], transposed[of_inputs]
        sizes = sizes_at_run_time(loop)
        values = extra + [n for n in self._symbols_of(sizes) if n not in extra]
        functions = {size: self._function(size, values) for size in sizes if not size.is_Integer}
        turns = tuple(i for i, turns in enumerate(itertools.compress(transposed, left)) if turns)
        rows = self.kv.rows.get(node, loop.rows)
        asked = self._deciding if callable(rows) else []
        ports = ports_with_inputs(loop, left)
        within = tuple(sum(left[:i]) for i in loop.within)
        counts = len(values), len(extra)
        runtime = CompiledLoop(body, rows, *counts, *ports, Sizes(functions), turns, len(asked), within)
        for item, output in zip(step.outs, loop.outputs, strict=True):
            if item is not None and isinstance(output, Stored):
                self.layouts[item] = output
        length, *operands = node.args
        return runtime, [*values, *asked, length, *itertools.compress(operands, left)]

    def _symbols_of(self, sizes: Collection[sympy.Expr]) -> list[fx.Node]:
        """Return the placeholders of the symbols of some sizes."""
        symbols = {symbol for size in sizes for symbol in self.symbols.check(size).free_symbols}
        return [self.symbols.sources[symbol] for symbol in sorted(symbols, key=str)]

    def _function(self, size: sympy.Expr, extra: Sequence[Any]) -> Callable[[Sequence[int]], int]:
        """Return a size as a function of the values of the loop's symbol arguments.

        It is evaluated here at the captured sizes, so that an expression that cannot be evaluated fails now and not in
        the running program.
        """
        nodes = [n if isinstance(n, fx.Node) else None for n in extra]
        symbols = [expr(meta_value(n)) if n is not None else LENGTH for n in nodes]
        compute = function_of(size, symbols)
        found = compute([hint(meta_value(n)) if n is not None else extra[i] for i, n in enumerate(nodes)])
        if found != int(found):
            raise PassError(f"the size {size} is {found} at the captured sizes, which is not an integer")
        return compute

    # --- pieces ---

    def _compile(
        self,
        graph: fx.Graph,
        templates: Sequence[Template],
        name: str,
        values: Mapping[sympy.Symbol, int | None],
        facts: Mapping[sympy.Symbol, SymbolFacts],
        literals: Literals,
        patches: Mapping[str, Any] = {},
        orders: tuple[tuple[int, ...] | None, ...] = (),
    ) -> tuple[Piece, list[Any], list[bool]]:
        """Begin to compile a piece.

        Parameters
        ----------
        values, facts
            Of the symbols that the graph does not have. A loop passes `start` and `count` itself, after the others:
            they change with every iteration.
        patches
            Inductor options. The user's own options override them.

        Returns
        -------
        The piece; the arguments with the values of its symbols, which are passed first; and for each input whether the
        piece still takes it. The piece computes other sizes from its symbols.
        """
        if graph.find_nodes(op="call_function", target=LAID_OUT):
            patches = {**patches, **NO_SIZE_ASSERTS}  # Inductor would check the strides before the layout is changed
        form = in_canonical_form(graph, templates, {**self.symbols.facts, **facts}, literals)
        keep_output_strides(graph)
        gm = graph_module(torch.nn.Module(), graph)
        patches = {**patches, **self.patches}
        new = Piece(gm, tuple(form.templates), form.symbols, patches, strict=self.strict, orders=orders)
        piece = self.cache.begin(new, self.settings, self.report, name)
        self.pieces[name] = piece
        extra = [values[s] if s in values else self.symbols.sources[s] for s in form.given]
        return piece, extra, form.left

    def _finish(self) -> None:
        """Wait for all pieces. A piece that does not compile with its length as a symbol is compiled for the length."""
        for name, piece in self.pieces.items():
            self.cache.finish(piece, self.report, name)
        for number, step in self._with_literals.items():
            if self.report.eager_pieces.pop(step.name, None) is not None:
                self.calls[number] = self._compile_piece(step, NO_LITERALS)
                self.cache.finish(self.pieces[step.name], self.report, step.name)

    def template(self, node: fx.Node) -> Template:
        value = meta_value(node)
        if isinstance(value, torch.Tensor):
            shape = tuple(self.symbols.check(expr(s)) for s in value.shape)
            stride = self.strides(node)
            return TensorTemplate(shape, stride, value.dtype, value.device)
        return SizeTemplate(self.symbols.check(expr(value)))

    def strides(self, node: fx.Node) -> tuple[sympy.Expr, ...]:
        value = meta_value(node)
        if node in self.layouts:
            return dense_strides(value.shape, self.layouts[node].type.dense)
        return tuple(self.symbols.check(expr(s)) for s in value.stride())


def _subgraph(nodes: Sequence[fx.Node], inputs: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> fx.Graph:
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        values[node] = add_input(graph, node.name)
    for node in nodes:
        values[node] = graph.node_copy(node, values.__getitem__)
    graph.output(tuple(values[node] for node in outputs))
    return graph
