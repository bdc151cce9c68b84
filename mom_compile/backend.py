"""The `torch.compile` entry: `model.compile(backend="mom")`.

    Dynamo graph -> capture (Inductor's front half) -> rewrite (passes) -> decide -> lower (Inductor) -> program

A graph that cannot or need not be improved goes to stock Inductor, with the reason in the report. It is unchanged, or
copies the rows that it returns where these would keep a larger value alive.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

import mom_compile.runtime.attention.register
import mom_compile.runtime.scored  # noqa: F401  registers its kernel
from mom_compile.cache_key import cache_tag, devices_of
from mom_compile.capture import capture
from mom_compile.compiled import NOTICES, PIECES, CompiledGraph, Needs, Notice, forget_compiled, keep
from mom_compile.config import Options, parse_options
from mom_compile.lowering.build import Lowering
from mom_compile.lowering.eager import NotCompiled, stock_or_eager
from mom_compile.memory.decide import Decision, ForLong, check_weights, decide, fits_for_long, offloads
from mom_compile.memory.ranks import Agreement, groups_of, sizes_at
from mom_compile.memory.refuse import MemoryBudgetError
from mom_compile.notices import forget, warn_of_freezing, warn_of_hooks, warn_of_versions
from mom_compile.packings import ProgramPerPacking, values_of_call
from mom_compile.pipeline import Pipeline, WithLoops, for_stock
from mom_compile.pipeline.packing import NO_PACKING, Packing
from mom_compile.progress import compiling
from mom_compile.report import Report
from mom_compile.report.facts import DECODE_STEP, NOTHING_FOUND, Facts, PieceLog
from mom_compile.runtime.extend import expect_garbage
from mom_compile.runtime.program import Program
from mom_compile.runtime.ranks import announce_failure
from mom_compile.skip import why_stock
from mom_compile.substitutes import watch_models
from mom_compile.substitution import traces_substitutes
from mom_compile.torch_compat.aot_autograd import InnerCompile
from mom_compile.torch_compat.cpp_kernels import start_the_compiler
from mom_compile.torch_compat.dynamo import is_cut_apart
from mom_compile.torch_compat.inductor import asks_for_freezing, stock_inner_compile
from mom_compile.torch_compat.recompiles import graph_count
from mom_passes.errors import PassError
from mom_passes.graph.edit import compute_device, copy_graph
from mom_passes.graph.repeated_layers import calls_nested_regions, inline_nested_regions
from mom_passes.torch_compat import FLEX_ATTENTION

log = logging.getLogger(__name__)


def mom(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile a Dynamo graph: the function that `torch.compile` calls for backend "mom".

    Parameters
    ----------
    gm : torch.fx.GraphModule
        Dynamo's graph.
    example_inputs : sequence
        Its inputs.
    mode : str, optional
        A mode of Inductor.
    options : mapping, optional
        Options of the backend.

    Returns
    -------
    callable
        The compiled graph.

    Raises
    ------
    ValueError
        If an option is not valid. The message lists the valid ones.
    """
    parsed = parse_options(options, mode)
    warn_of_versions()
    if asks_for_freezing(parsed.inductor):
        warn_of_freezing()
    if is_cut_apart("accelerate.hooks"):
        warn_of_hooks()
    if all(value.device.type == "cpu" for value in example_inputs if isinstance(value, torch.Tensor)):
        start_the_compiler()
    call = list(example_inputs)
    inner = functools.partial(compile_graph, options=parsed, call=call)
    tag = cache_tag(parsed, devices_of(example_inputs))
    before = NOTICES[-1:]
    with compiling(f"a graph of {_operators(gm)} operators, once for each kind of call", parsed.progress) as shown:
        compiled = capture(gm, example_inputs, inner, dict(parsed.inductor), cache_tag=tag, strict=parsed.strict)
        if shown is not None and NOTICES[-1:] != before:
            shown.result = NOTICES[-1].report.headline
    call.clear()  # PyTorch may keep `inner` for a backward graph, and must not keep these tensors alive
    expect_garbage()
    return compiled


def _operators(gm: fx.GraphModule) -> int:
    return len([node for node in gm.graph.nodes if node.op.startswith("call")])


def _reset() -> None:
    """Forget compiled pieces, reports and warnings; `torch._dynamo.reset()` calls it."""
    forget()
    forget_compiled()


mom.reset = _reset  # type: ignore[attr-defined]
traces_substitutes(mom)
watch_models()


def reports() -> list[Report]:
    """Return a report for each graph that this process has compiled.

    Returns
    -------
    list of Report
        Oldest first. `torch._dynamo.reset()` empties it.
    """
    return [notice.report for notice in list(NOTICES)]  # a copy: another thread may be compiling


def compile_graph(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Options,
    stock: InnerCompile = stock_inner_compile,
    call: Sequence[Any] | None = None,
    **kwargs: Any,
) -> CompiledGraph:
    """Compile an ATen graph to a boxed callable, as Inductor's `inner_compile` hook. `call` has the inputs of the call
    for which Dynamo captured the graph.

    If that fails for a graph with collectives, ranks that have compiled it raise as well.
    """
    try:
        return _compile_graph(gm, example_inputs, options, stock, call, kwargs)
    except Exception as error:
        announce_failure(groups_of(gm), error)
        raise


def _compile_graph(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    options: Options,
    stock: InnerCompile,
    call: Sequence[Any] | None,
    kwargs: dict[str, Any],
) -> CompiledGraph:
    if options.scope != "none" and kwargs.get("is_inference") and calls_nested_regions(gm):
        gm = copy_graph(gm)
        inline_nested_regions(gm)
    nodes, attends, device = len(gm.graph.nodes), any(map(_attends, gm.graph.nodes)), compute_device(gm)
    not_ours, pieces = why_stock(gm, options, kwargs), PieceLog()
    found, program = Rewriting(NOTHING_FOUND, no_loops=not_ours), None
    if not_ours is None:
        found, program = make(gm, options, pieces, kwargs, values_of_call(gm, call))
    run: Callable[[list[Any]], Any]
    if program is not None:
        run = program
        if found.packing.ranges:
            run = ProgramPerPacking(program, found.packing, functools.partial(make_other, gm, options, kwargs))
    elif options.scope == "none" or not kwargs.get("is_inference"):
        run = stock(gm, example_inputs, **kwargs)
    else:
        gm = found.for_stock or gm
        run = stock_or_eager(gm, example_inputs, pieces, functools.partial(stock, **kwargs))
    report = found.report(nodes=nodes, graphs=graph_count()).with_pieces(pieces)
    notice = Notice(report, options, not_ours, attends, device)
    keep(notice)
    notice.warn()
    storable = not found.failed and not pieces.eager_pieces
    agreement = None if program is not None or found.facts.kind == DECODE_STEP else Agreement.on_captured(gm)
    needs = Needs(found.facts.growing, found.for_long, storable, agreement, sizes_at(gm, agreement))
    return CompiledGraph(run, notice, needs)


def make_other(gm: fx.GraphModule, options: Options, kwargs: Mapping[str, Any], inputs: Sequence[Any]) -> Program:
    """Compile the program of a graph for the packed sequences of another call."""
    pieces = PieceLog()
    found, program = make(gm, replace(options, strict=True), pieces, kwargs, inputs)
    if program is None:
        raise PassError(f"no program: {found.no_loops}")
    keep(Notice(found.report(nodes=len(gm.graph.nodes)).with_pieces(pieces), options, None, True, compute_device(gm)))
    return program


def make(
    gm: fx.GraphModule,
    options: Options,
    pieces: PieceLog,
    kwargs: Mapping[str, Any],
    inputs: Sequence[Any] | None = None,
) -> tuple[Rewriting, Program | None]:
    """Rewrite a graph, decide and lower. A failure leaves it to stock Inductor, unless `options.strict`. `inputs` are
    those of a call, if they are known.

    Raises
    ------
    MemoryBudgetError
        If the user's budget cannot be kept: stock Inductor would keep it no better.
    """
    found, static = Rewriting(NOTHING_FOUND), static_input_names(gm, kwargs)
    try:
        check_weights(gm, options, static)
        found = rewrite(gm, options, static, inputs)
        # Inductor's CUDA graphs record a graph as a whole.
        if found.decision is None or (found.by_layers and kwargs.get("cudagraphs")):
            return found.left_to_stock(gm), None
        return found, lower(found.decision, options, static, pieces)
    except MemoryBudgetError:
        raise
    except Exception as error:
        if options.strict:
            raise
        log.debug("our passes failed", exc_info=True)
        return replace(found, decision=None, no_loops=f"{type(error).__name__}: {error}", failed=True), None


def _attends(node: fx.Node) -> bool:
    return node.target is FLEX_ATTENTION or "scaled_dot_product" in str(node.target)


@dataclass(frozen=True, eq=False)
class Rewriting:
    """What the passes made of a graph, and what is decided of it.

    Parameters
    ----------
    facts
        What the passes found.
    decision
        The decision on the program; None: stock Inductor compiles the graph.
    no_loops, by_layers, failed
        Why there are no loops, or None; whether the program is only cut between layers; whether the passes failed.
    for_long
        Whether all keys and values of a graph without loops stay on the device, where "auto" had to ask.
    why_rows
        Why mini-sequences have their rows.
    for_stock
        What stock Inductor compiles, if it is not the captured graph.
    packing
        The packed sequences that the program's loops hold.
    """

    facts: Facts
    decision: Decision | None = None
    no_loops: str | None = None
    by_layers: bool = False
    failed: bool = False
    for_long: ForLong | None = None
    why_rows: str = ""
    for_stock: fx.GraphModule | None = None
    packing: Packing = NO_PACKING

    def left_to_stock(self, gm: fx.GraphModule) -> Rewriting:
        """Return the same for a captured graph that stock Inductor compiles, with copies of rows that it returns."""
        whole, own = for_stock(gm)
        return replace(self, decision=None, facts=replace(self.facts, own_rows=own), for_stock=whole)

    def report(self, **known: Any) -> Report:
        """Return the report on the graph; `known` are further attributes, see `Record`."""
        if self.decision is None:
            return Report.of(self.facts, fallback=self.no_loops, failed=self.failed, **known)
        return Report.of(self.facts, self.decision.program, by_layers=self.by_layers, rows=self.why_rows, **known)


def rewrite(
    gm: fx.GraphModule, options: Options, static: Collection[str], inputs: Sequence[Any] | None = None
) -> Rewriting:
    """Run the passes once and decide; `static` names the parameters and buffers, `inputs` are those of a call."""
    device = compute_device(gm)
    passes = Pipeline(
        gm,
        static_inputs=static,
        limit=options.limit(device.type),
        scope=options.scope,
        loop_products=options.loop_products,
        kv_on_host=offloads(options, device),
        overlap_collectives=options.overlap_collectives,
        inputs=inputs,
    )
    found, looped = passes.found, Rewriting(NOTHING_FOUND)
    if isinstance(found, WithLoops):
        program, facts = passes.finish_loops(found)
        decision = decide(program, options, static, device).agreed()
        looped = Rewriting(facts, decision, why_rows=decision.why, packing=found.packing)
        if decision.whole is None:
            return looped
        found = passes.without_loops(found, decision.whole)
    for_long = fits_for_long(found.gm, passes.kv, options, static)
    made = passes.finish(found, str(for_long) if for_long is not None and for_long.fits else "")
    last = None if made.program is None else decide(made.program, options, static, device)
    if last is not None and last.refusal and looped.decision is not None and not looped.decision.refusal:
        return looped
    if last is not None and made.facts.kind != DECODE_STEP:
        last = last.agreed()
    return Rewriting(
        made.facts, last, made.no_loops, made.by_layers, for_long=for_long, why_rows=looped.why_rows
    )


def lower(decision: Decision, options: Options, static: Collection[str], pieces: PieceLog) -> Program:
    """Compile a program. Raises `MemoryBudgetError` if a run of the captured sizes cannot keep the user's budget."""
    if decision.refusal:
        raise MemoryBudgetError(decision.refusal)
    program = Lowering(
        decision.program,
        static_inputs=static,
        patches=options.inductor,
        cache=PIECES,
        report=pieces,
        kv=decision,
        strict=options.strict,
    ).program()
    if options.strict and pieces.eager_pieces:
        raise NotCompiled({pieces.located(name): reason for name, reason in pieces.eager_pieces.items()})
    return program


def static_input_names(gm: fx.GraphModule, kwargs: Mapping[str, Any]) -> set[str]:
    """Return the names of the placeholders that hold parameters and buffers."""
    indices: Collection[int] = kwargs.get("static_input_idxs", ())
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    return {placeholders[i].name for i in indices if i < len(placeholders)}
