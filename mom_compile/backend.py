"""The `torch.compile` entry: `model.compile(backend="mom")`.

    Dynamo graph -> Inductor's front half -> our passes -> loops and straight pieces through Inductor -> a program

Whatever we cannot or need not improve goes to stock Inductor, with the reason in the report: as it is, or with copies
of the rows that leave it where they would hold a larger value.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import fx

import mom_compile.runtime.attention.register
import mom_compile.runtime.scored  # noqa: F401  registers its kernel
from mom_compile.cache_key import cache_tag, devices_of
from mom_compile.capture import capture
from mom_compile.compiled import NEEDS_GRADIENTS, NOTICES, PIECES, CompiledGraph, Notice, forget_compiled, keep
from mom_compile.config import Options, parse_options
from mom_compile.lowering.build import Lowering
from mom_compile.lowering.eager import NotCompiled, first_line, run_eagerly
from mom_compile.memory.decide import Decision, check_weights, decide, fits_for_long, offloads
from mom_compile.memory.refuse import MemoryBudgetError
from mom_compile.notices import forget, warn_of_eager, warn_of_freezing, warn_of_hooks, warn_of_versions
from mom_compile.pipeline import NotWorthwhile, for_stock, run_pipeline
from mom_compile.progress import compiling
from mom_compile.report import Report
from mom_compile.runtime.extend import expect_garbage
from mom_compile.runtime.program import Program
from mom_compile.torch_compat import (
    InnerCompile,
    asks_for_freezing,
    is_cut_apart,
    mark_boxed,
    start_the_compiler,
    stock_inner_compile,
)
from mom_passes.attention.flex import is_read_by_flex_alone
from mom_passes.graph.alike import calls_nested_regions, inline_nested_regions
from mom_passes.graph.data_dependent import unknown_number_behind
from mom_passes.graph.edit import attribute, compute_device, copy_graph
from mom_passes.graph.values import tensors_of
from mom_passes.loops.loop import RowLimit
from mom_passes.program.rewritten import Rewritten
from mom_passes.rules.work import products
from mom_passes.torch_compat import FLEX_ATTENTION

log = logging.getLogger(__name__)


def mom(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile a Dynamo graph. Raises `ValueError` for a wrong option, listing the valid ones."""
    parsed = parse_options(options, mode)
    warn_of_versions()
    if asks_for_freezing(parsed.inductor):
        warn_of_freezing()
    if is_cut_apart("accelerate.hooks"):
        warn_of_hooks()
    if all(value.device.type == "cpu" for value in example_inputs if isinstance(value, torch.Tensor)):
        start_the_compiler()
    inner = functools.partial(compile_graph, options=parsed)
    tag = cache_tag(parsed, devices_of(example_inputs))
    before = NOTICES[-1:]
    with compiling(f"a graph of {_operators(gm)} operators, once for each kind of call", parsed.progress) as shown:
        compiled = capture(gm, example_inputs, inner, dict(parsed.inductor), cache_tag=tag, strict=parsed.strict)
        if shown is not None and NOTICES[-1:] != before:
            shown.result = NOTICES[-1].report.headline
    expect_garbage()
    return compiled


def _operators(gm: fx.GraphModule) -> int:
    return len([node for node in gm.graph.nodes if node.op.startswith("call")])


def _reset() -> None:
    """Forget compiled pieces, reports and what was warned of; `torch._dynamo.reset()` calls it."""
    forget()
    forget_compiled()


mom.reset = _reset  # type: ignore[attr-defined]


def reports() -> list[Report]:
    """What was done to each graph compiled so far in this process, oldest first."""
    return [notice.report for notice in list(NOTICES)]  # a copy: another thread may be compiling


def compile_graph(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Options,
    stock: InnerCompile = stock_inner_compile,
    **kwargs: Any,
) -> CompiledGraph:
    """Inductor's `inner_compile` hook: an ATen graph to a boxed callable, ours or stock Inductor's."""
    if options.scope != "none" and kwargs.get("is_inference") and calls_nested_regions(gm):
        gm = copy_graph(gm)
        inline_nested_regions(gm)
    report = Report(nodes=len(gm.graph.nodes))
    report.fallback = not_ours = why_stock(gm, options, kwargs)
    notice = Notice(report, options, not_ours, any(map(_attends, gm.graph.nodes)), compute_device(gm))
    keep(notice)
    program = None
    if not_ours is None:
        try:
            try:
                program = build_program(gm, example_inputs, options, report, kwargs)
            except NotWorthwhile as decision:
                program = build_layers(decision.rewritten, options, report, static_input_names(gm, kwargs), kwargs)
                if program is None:
                    report.fallback = str(decision)
                    gm = for_stock(gm, report=report)
        except MemoryBudgetError:
            raise  # the user's own: stock Inductor would keep the budget no better
        except Exception as error:
            if options.strict:
                raise
            report.failed = True
            report.fallback = f"{type(error).__name__}: {error}"
            log.debug("our passes failed", exc_info=True)
    notice.warn()
    if program is not None:
        return CompiledGraph(program, notice)
    if options.scope == "none" or not kwargs.get("is_inference"):
        return CompiledGraph(stock(gm, example_inputs, **kwargs), notice)
    return CompiledGraph(stock_or_eager(gm, example_inputs, report, functools.partial(stock, **kwargs)), notice)


def _attends(node: fx.Node) -> bool:
    return node.target is FLEX_ATTENTION or "scaled_dot_product" in str(node.target)


def stock_or_eager(
    gm: fx.GraphModule, example_inputs: Sequence[Any], report: Report, stock: Callable[..., Any]
) -> Callable[[list[Any]], Any]:
    """Stock Inductor. What it cannot compile runs as it was captured, like a piece of ours, with the reason.

    On a CPU, Inductor 2.11 writes C++ that does not compile for the decode steps of Llama, Gemma 3 and GPT-2.
    """
    original = copy_graph(gm)  # Inductor rewrites what it compiles
    try:
        return stock(gm, example_inputs)  # type: ignore[no-any-return]
    except Exception as error:
        log.debug("stock Inductor could not compile a graph", exc_info=True)
        reason = first_line(error)
    report.eager_pieces["the graph"] = reason
    warn_of_eager("a graph", reason)

    def run(inputs: list[Any]) -> Any:
        return run_eagerly(original, inputs)

    return mark_boxed(run)


def why_stock(gm: fx.GraphModule, options: Options, kwargs: Mapping[str, Any]) -> str | None:
    """Why a graph is not for us, or None."""
    if options.scope == "none":
        return "scope='none' asks for stock Inductor"
    if not kwargs.get("is_inference"):
        return NEEDS_GRADIENTS
    if kwargs.get("cpp_wrapper") or kwargs.get("aot_mode"):
        return "ahead-of-time and C++-wrapper compilation are stock Inductor's"
    return _unsupported(gm)


def _unsupported(gm: fx.GraphModule) -> str | None:
    """What in a graph is not for us, by name, or None."""
    devices: dict[torch.device, None] = {}
    for node in gm.graph.nodes:
        if node.op == "call_module" or (
            node.op == "get_attr"
            and isinstance(attribute(gm, str(node.target)), torch.nn.Module)
            and not is_read_by_flex_alone(gm, node)
        ):
            users = ", ".join(f"{user.name} ({user.target})" for user in node.users) or node.name
            return f"{users} calls a graph of its own, {node.target}"
        devices.update(dict.fromkeys(value.device for value in tensors_of(node)))
    unknown = unknown_number_behind(gm.graph, products(gm.graph))
    if unknown is not None:
        return _depends_on_data(unknown)
    if torch.device("meta") in devices:
        return "tensors on the meta device have no data: nothing to run (`explain(model, ...)` plans such a model)"
    accelerators = sorted(str(device) for device in devices if device.type != "cpu")
    if len(accelerators) > 1:
        return f"the graph computes on several accelerators: {', '.join(accelerators)}"
    return None


def _depends_on_data(node: fx.Node) -> str:
    """Name a number that matrix products depend on and that is unknown at capture, and say what to do."""
    if node.op == "placeholder":
        return f"a size of {node.name} is marked as unbacked; mark it with torch._dynamo.mark_dynamic in place of that"
    if node.target is torch.ops.aten._local_scalar_dense.default:
        return (
            f"{node.name} reads a number off a tensor (.item()), and matrix products depend on it; read it outside of "
            "the compiled function and pass it, compute with the tensor in place of the number, or set "
            "torch._dynamo.config.capture_scalar_outputs = False, which breaks the graph there"
        )
    return (
        f"{node.name} ({node.target}) makes sizes depend on data, and matrix products depend on these; call it outside "
        "of the compiled function"
    )


def build_program(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options, report: Report, kwargs: Mapping[str, Any]
) -> Program:
    """Passes and lowering. Raises `NotWorthwhile` where the graph is as good as it gets, `MemoryBudgetError`."""
    static = static_input_names(gm, kwargs)
    check_weights(gm, options, static)
    return _lowered(rewrite(gm, options, report, static), options, report, static)


def build_layers(
    rewritten: Rewritten | None, options: Options, report: Report, static: Collection[str], kwargs: Mapping[str, Any]
) -> Program | None:
    """A graph without loops whose layers share their pieces; None where stock Inductor compiles it as a whole.

    CUDA graphs record a graph as a whole.
    """
    if rewritten is None or kwargs.get("cudagraphs"):
        report.own_rows = []  # `for_stock` makes its own
        return None
    decision = decide(rewritten, options, static, compute_device(rewritten.gm))
    program = _lowered(decision, options, report, static)
    report.describe_layers(rewritten)
    return program


def _lowered(decision: Decision, options: Options, report: Report, static: Collection[str]) -> Program:
    if decision.refusal:
        raise MemoryBudgetError(decision.refusal)
    program = Lowering(
        decision.program,
        static_inputs=static,
        patches=options.inductor,
        cache=PIECES,
        report=report,
        kv=decision,
        strict=options.strict,
    ).program()
    if options.strict and report.eager_pieces:
        raise NotCompiled(report.eager_pieces)
    return program


def rewrite(gm: fx.GraphModule, options: Options, report: Report, static: Collection[str]) -> Decision:
    """The passes as the options want them; `static` names the parameters and buffers. Raises `NotWorthwhile`."""
    device = compute_device(gm)
    passes = functools.partial(
        run_pipeline,
        gm,
        static_inputs=static,
        report=report,
        scope=options.scope,
        kv_on_host=offloads(options, device),
    )
    rewritten = passes(limit=options.limit(device.type))
    decision = decide(rewritten, options, static, device)
    report.rows = decision.why
    if decision.whole is not None:
        report.passes.clear()
        rewritten = passes(limit=RowLimit(decision.whole))
        decision = decide(rewritten, options, static, device)
    report.for_long = fits_for_long(rewritten, options, static)
    if report.for_long is not None and report.for_long.fits:
        try:
            rewritten = passes(limit=options.limit(device.type), kv_on_host=False)
            decision = decide(rewritten, options, static, device)
        finally:  # it raises `NotWorthwhile`
            report.describe_staying(str(report.for_long))
    report.describe(decision.program)
    return decision


def static_input_names(gm: fx.GraphModule, kwargs: Mapping[str, Any]) -> set[str]:
    """Placeholders that hold parameters and buffers."""
    indices: Collection[int] = kwargs.get("static_input_idxs", ())
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    return {placeholders[i].name for i in indices if i < len(placeholders)}
