"""From the rewritten graph to a program: loop bodies and straight runs of operators go through Inductor once each.

Terms
-----
straight piece   A run of operators between two loops, compiled as one graph.
own symbols      A piece's sizes, numbered in order of appearance (`n0`, `n1`, ...), so that layers and graphs share it.
place            A view of a stored value's rows, which the body fills: nothing is copied there afterwards.

    for step in schedule(graph):
        loop           -> a body that writes its rows in place, compiled
        piece          -> compiled
        transfer       -> what the copy engine does for it
        call           -> the operator itself
    every step names the slots that die with it
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import sympy
import torch
from torch import fx

from mom_compile.lowering.canonical import NO_LITERALS, Literals, in_canonical_form
from mom_compile.lowering.layouts import LENGTH, LoopLayout, Symbols, dense_strides, of_any_length, order_if_dense
from mom_compile.lowering.pieces import Piece, PieceCache, SizeTemplate, SymbolFacts, Template, TensorTemplate
from mom_compile.lowering.transfers import copy_step
from mom_compile.lowering.turned import turn_once
from mom_compile.lowering.writing import writing_body
from mom_compile.memory.choice import KeepsBudget
from mom_compile.memory.decide import Decision
from mom_compile.progress import expect
from mom_compile.report.facts import PieceLog
from mom_compile.runtime.calls import Constant, OperatorCall
from mom_compile.runtime.cuda_graphs import Replayed, may_be_recorded
from mom_compile.runtime.host.steps import KeepWeights, Settle
from mom_compile.runtime.loop import CompiledLoop, Sizes
from mom_compile.runtime.program import Program, Slot, Step
from mom_compile.torch_compat import UNCHECKED, codegen_settings, keep_output_strides
from mom_passes.attention.flex import FlexAttention
from mom_passes.errors import PassError
from mom_passes.graph.aliasing import base_of, is_mutation
from mom_passes.graph.edit import add_input, attribute
from mom_passes.graph.meta import meta_value
from mom_passes.graph.size_values import function_of
from mom_passes.graph.sizes import Size, expr, hint
from mom_passes.graph.values import tensors_of
from mom_passes.loops.loop import Loop
from mom_passes.loops.ports import COUNT, START, Final, In, Out, RowsIn, SizeIn, Stored, WholeIn
from mom_passes.ops.rows import LAID_OUT
from mom_passes.ops.transfers import ARRIVING, EXTEND
from mom_passes.program import program as plans
from mom_passes.program.lives import lives
from mom_passes.program.memory import leaving
from mom_passes.program.program import Compute, LoopStep, Transfer
from mom_passes.program.rewritten import Rewritten
from mom_passes.rules import Dim

aten = torch.ops.aten


class Lowering:
    """Lowers one rewritten graph. `static_inputs` names the placeholders that hold parameters."""

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
        self.slots: dict[fx.Node, int] = {}
        self.steps: list[tuple[Callable[[list[Any]], Any], list[Any]]] = []
        #: By the names of their steps.
        self.pieces: dict[str, Piece] = {}
        #: By its number, a step whose piece has literals of the graph as symbols.
        self._with_literals: dict[int, Compute] = {}
        self.layouts: dict[fx.Node, Stored] = {}
        self._leaving = leaving(self.plan)
        sizes = kv.choice.model.symbols if kv.choice is not None and self._chooses() else ()
        self._deciding = [self.symbols.sources[self.symbols.check(symbol)] for symbol in sizes]

    def _chooses(self) -> bool:
        """Whether anything is decided anew in each run."""
        return bool(self.kv.rows or self._leaving or self.kv.is_for_each_run)

    def program(self) -> Program:
        expect(sum(isinstance(step, LoopStep | Compute) for step in self.plan.steps))
        for node in self.plan.inputs:
            self._slot(node)
        for step in self.plan.steps:
            if isinstance(step, LoopStep):
                self._lower_loop(step)
            elif isinstance(step, Compute):
                self._lower_piece(step)
            elif isinstance(step, Transfer):
                run, arguments = copy_step(step.node, self.kv, self._leaving, self._deciding)
                self._call(step, run, arguments)
            else:
                node = step.node
                constant = node.op == "get_attr"
                call = Constant(attribute(self.gm, str(node.target))) if constant else OperatorCall.of(node)
                self._call(step, call, list(step.ins))
        self._finish()
        return self._assemble()

    # --- operators between loops ---

    def _lower_piece(self, step: Compute) -> None:
        # A block mask has numbers of blocks: FlexAttention of one length is no other's, and Inductor writes C++ for it
        # as captured that does not compile where a size that a score reads is a symbol and the blocks are numbers.
        flex = any(isinstance(node.target, FlexAttention) for node in step.nodes)
        literals = NO_LITERALS if flex else self.literals
        if literals.length:
            self._with_literals[len(self.steps)] = step
        self._call(step, *self._compile_piece(step, literals))

    def _compile_piece(self, step: Compute, literals: Literals) -> tuple[Piece, list[Any]]:
        """The piece of a run of operators, with its arguments."""
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

    def _lower_loop(self, step: LoopStep) -> None:
        node, loop = step.node, step.loop
        layout = LoopLayout(self, loop.length, loop.rows)
        templates: list[Template] = [SizeTemplate(START), SizeTemplate(COUNT)]
        templates += [layout.input(port, operand) for port, operand in zip(loop.inputs, loop.bind(node), strict=True)]
        templates += [layout.place(output) for output in loop.stored if output.over is None]
        templates += [layout.carry(loop.inputs[i]) for i in loop.carries]  # type: ignore[arg-type]
        graph, of_inputs = writing_body(loop), slice(2, 2 + len(loop.inputs))
        templates, turned = turn_once(graph, templates, _are_whole(loop, len(templates)))
        values_of_symbols = {LENGTH: layout.literal}
        run, extra, left = self._compile(
            graph, templates, step.name, values_of_symbols, layout.facts(), NO_LITERALS, UNCHECKED
        )
        left, turned = left[of_inputs], turned[of_inputs]
        sizes = _sizes_in_a_run(loop)
        values = extra + [n for n in self._symbols_of(sizes) if n not in extra]
        functions = {size: self._function(size, values) for size in sizes if not size.is_Integer}
        inputs, outputs = (tuple(map(_in_expressions, ports)) for ports in _of_inputs(loop, left))
        turns = tuple(i for i, turns in enumerate(itertools.compress(turned, left)) if turns)
        rows = self.kv.rows.get(node, loop.rows)
        asked = self._deciding if callable(rows) else []
        compiled = CompiledLoop(
            run, rows, len(values), len(extra), inputs, outputs, Sizes(functions), turns, asked=len(asked)
        )
        for item, output in zip(step.outs, loop.outputs, strict=True):
            if item is not None and isinstance(output, Stored):
                self.layouts[item] = output
        length, *operands = node.args
        self._call(step, compiled, [*values, *asked, length, *itertools.compress(operands, left)])

    def _symbols_of(self, sizes: Collection[sympy.Expr]) -> list[fx.Node]:
        """Sources of the symbols of some sizes."""
        symbols = {symbol for size in sizes for symbol in self.symbols.check(size).free_symbols}
        return [self.symbols.sources[symbol] for symbol in sorted(symbols, key=str)]

    def _function(self, size: sympy.Expr, extra: Sequence[Any]) -> Callable[[Sequence[int]], int]:
        """A size as a function of the values of the loop's symbol arguments.

        It is computed once here, at the captured sizes: what cannot be computed must not fail in the running program.
        """
        nodes = [n if isinstance(n, fx.Node) else None for n in extra]
        symbols = [expr(meta_value(n)) if n is not None else LENGTH for n in nodes]
        compute = function_of(size, symbols)
        found = compute([hint(meta_value(n)) if n is not None else extra[i] for i, n in enumerate(nodes)])
        if found != int(found):
            raise PassError(f"the size {size} is {found} where the captured sizes are")
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
        """The piece, to be finished, the arguments that give its symbols their values, to be passed first, and which
        of its inputs it is passed: not the sizes that it computes from these.

        `facts` and `values` are of the symbols that the graph has not. `start` and `count` change with every iteration:
        a loop passes them itself, after the others. The user's own `patches` of Inductor's options win.
        """
        if graph.find_nodes(op="call_function", target=LAID_OUT):
            patches = {**patches, **UNCHECKED}  # Inductor would check the result before it is laid out
        form = in_canonical_form(graph, templates, {**self.symbols.facts, **facts}, literals)
        keep_output_strides(graph)
        gm = fx.GraphModule(torch.nn.Module(), graph)
        patches = {**patches, **self.patches}
        new = Piece(gm, tuple(form.templates), form.symbols, patches, strict=self.strict, orders=orders)
        piece = self.cache.begin(new, self.settings, self.report, name)
        self.pieces[name] = piece
        extra = [values[s] if s in values else self.symbols.sources[s] for s in form.given]
        return piece, extra, form.left

    def _finish(self) -> None:
        """Wait for all pieces. One that does not compile with its literals as symbols is made with them as they are."""
        for name, piece in self.pieces.items():
            self.cache.finish(piece, self.report, name)
        for number, step in self._with_literals.items():
            if self.report.eager_pieces.pop(step.name, None) is not None:
                self.steps[number] = self._compile_piece(step, NO_LITERALS)
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

    # --- steps ---

    def _slot(self, node: fx.Node) -> int:
        return self.slots.setdefault(node, len(self.slots))

    def _call(self, step: plans.Step, run: Callable[[list[Any]], Any], arguments: list[Any]) -> None:
        for result in step.outs:
            if result is not None:
                self._slot(result)
        self.steps.append((run, arguments))

    def _replayed(self, step: plans.Step, run: Callable[[list[Any]], Any], arguments: Sequence[Any]) -> Any:
        """A piece as a CUDA graph, where all that it reads has the same shape in every run; anything else as it is."""
        if not isinstance(run, Piece) or run.symbols or any(map(is_mutation, run.gm.graph.nodes)):
            return run
        own = [base_of(node).name in self.static_inputs for node in arguments]
        fixed = tuple(itertools.compress(itertools.count(), own))
        if not may_be_recorded([_fixed_shape(template) for template in run.templates], fixed, self.kv.device):
            return run
        return Replayed(run, self.kv.device, fixed, tuple(i for i, n in enumerate(step.outs) if self._outlives(n)))

    def _outlives(self, result: fx.Node | None) -> bool:
        """Whether somebody reads a result when its step runs again: who has called, or a copy engine."""
        moved = (node for step in self.plan.steps if isinstance(step, Transfer) for node in step.ins)
        read = {base_of(node) for node in (*self.plan.outputs, *moved) if isinstance(node, fx.Node)}
        return result is not None and base_of(result) in read

    def _assemble(self) -> Program:
        """The steps with slots in place of values. A tensor's is emptied when the last step that reads it begins."""
        plan, last = self.plan, lives(self.plan).last
        steps = []
        if self.kv.is_for_each_run:
            assert self.kv.choice is not None
            sizes = tuple(Slot(self.slots[node]) for node in self._deciding)
            steps.append(Step("memory_budget", KeepsBudget(self.kv.choice), sizes, (), ()))
        for i, (step, (run, arguments)) in enumerate(zip(plan.steps, self.steps, strict=True)):
            run = self._replayed(step, run, arguments) if self.kv.cuda_graphs else run
            dying = {self.slots[n] for n in step.ins if last[n] == i and tensors_of(n)}
            steps.append(
                Step(
                    step.name,
                    run,
                    tuple(Slot(self.slots[a]) if isinstance(a, fx.Node) else a for a in arguments),
                    tuple(self.slots[r] if r is not None and last[r] > i else None for r in step.outs),
                    tuple(sorted(dying)),
                )
            )
        unread = [self.slots[n] for n in plan.inputs if n not in last and tensors_of(n)]
        outputs = tuple(Slot(self.slots[n]) if isinstance(n, fx.Node) else n for n in plan.outputs)
        transfers = [s.node for s in plan.steps if isinstance(s, Transfer) and s.node.target is not EXTEND]
        read = {base_of(node.args[0]) for node in transfers if node.target in ARRIVING}  # type: ignore[arg-type]
        from_host = tuple(number for number, node in enumerate(plan.inputs) if node in read)
        return Program(
            tuple(steps),
            len(self.slots),
            tuple(unread),
            outputs,
            Settle(self.kv.device) if transfers else None,
            KeepWeights(from_host) if from_host else None,
        )


def _are_whole(loop: Loop, count: int) -> list[bool]:
    """Which of a body's arguments are whole values."""
    of_inputs = [isinstance(port, WholeIn) for port in loop.inputs]
    return [False, False, *of_inputs, *[False] * (count - 2 - len(of_inputs))]


def _fixed_shape(template: Template) -> tuple[list[int], torch.dtype, torch.device] | None:
    if isinstance(template, SizeTemplate) or any(not size.is_Integer for size in (*template.shape, *template.stride)):
        return None
    return [int(size) for size in template.shape], template.dtype, template.device


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


def _subgraph(nodes: Sequence[fx.Node], inputs: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> fx.Graph:
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        values[node] = add_input(graph, node.name)
    for node in nodes:
        values[node] = graph.node_copy(node, values.__getitem__)
    graph.output(tuple(values[node] for node in outputs))
    return graph


def _of_inputs(loop: Loop, left: Sequence[bool]) -> tuple[list[In], list[Out]]:
    """A loop's ports where some of its inputs are left out."""
    now = list(itertools.accumulate(left, initial=0))

    def renumbered(port: Out) -> Out:
        if isinstance(port, Final):
            return replace(port, carry=now[port.carry])
        return port if port.over is None else replace(port, over=now[port.over])

    return list(itertools.compress(loop.inputs, left)), [renumbered(port) for port in loop.outputs]
