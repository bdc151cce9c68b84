"""`explain(model, *args, **kwargs)`: what the backend would do, without compiling or computing anything.

one graph       is traced and rewritten. Nothing of the call runs.
several graphs  run on stand-ins without data, from graph break to graph break.
a graph break   that needs a value (`.item()`, a branch on a tensor) makes the real call run, and a note says so. On the
                meta device the explanation ends there, and a note says so.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from mom_compile.arguments import name_of, takes, unwrapped
from mom_compile.backend import rewrite, static_input_names
from mom_compile.capture import capture
from mom_compile.config import Options, joined_options, meant_as_option, option_names, parse_options
from mom_compile.memory.decide import why_below_weights
from mom_compile.packings import values_of_call
from mom_compile.planning.prompt import prompt_of
from mom_compile.report import Report
from mom_compile.report.explanation import Explanation
from mom_compile.report.facts import NOTHING_FOUND
from mom_compile.skip import why_stock
from mom_compile.stand_ins import is_on_meta, on_stand_ins
from mom_compile.substitution import traces_substitutes
from mom_compile.torch_compat.dynamo import trace_whole, undisturbed
from mom_compile.torch_compat.errors import NEEDS_DATA
from mom_compile.torch_compat.inductor import mark_boxed
from mom_passes.attention.form import attention_form
from mom_passes.graph.edit import copy_graph
from mom_passes.program.memory import memory
from mom_passes.program.program import Call, Compute, LoopStep, Transfer
from mom_passes.program.schedule import schedule

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Call:
    """A function or module, with the arguments of the call that is explained."""

    model: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def function(self) -> Callable[..., Any]:
        return self.model.forward if isinstance(self.model, nn.Module) else self.model


def explain(
    model: Callable[..., Any] | str | Path | Any,
    *args: Any,
    options: Mapping[str, Any] | None = None,
    **named: Any,
) -> Explanation:
    """Trace `model(*args, **named)` without gradients and explain what the backend would rewrite, and what not and why.

    Nothing is compiled or computed. The model may be on the meta device, without weights. The model, the arguments and
    graphs that were compiled before do not change. There is one exception: if a graph ends because the model reads the
    value of a tensor, the call is executed, without compiled loops and with all its side effects. `notes` says so.

    Parameters
    ----------
    model : module, function, config, str or Path
        A module or a function, wrapped or not. Or a config: a folder, a `config.json`, the name of a shipped shape, or
        a config of transformers. A config is explained for a prefill of `seq_len=4096` tokens, `batch_size=1` and
        `dtype`.
    *args
        Arguments of the call. If the only argument is a mapping whose keys are arguments of the model (the output of a
        tokenizer), its entries are passed by name.
    options : mapping, optional
        Options of the backend.
    **named
        Options of the backend by name, and arguments of the call. If a name is both an option and an argument of the
        model, pass the option in `options`; the value passed by name then goes to the model.

    Returns
    -------
    Explanation
        One report for each captured graph.

    Raises
    ------
    ValueError
        If an option or a config is not valid.
    TypeError
        If `model` is a class, if an argument or an option is given twice, or if a name could be either.
    Exception
        Any error that the model itself raises.
    """
    if isinstance(model, type):
        raise TypeError(f"explain() takes a model or a config, not the class {model.__name__}: make a model first")
    if not callable(model):
        return _explain_config(model, args, options, named)
    model = unwrapped(model)
    chosen, kwargs = _split_options(model, options, named)
    return _explain_call(_Call(model, *_by_name(model, args, kwargs)), parse_options(chosen))


def _explain_config(
    config: Any, args: tuple[Any, ...], options: Mapping[str, Any] | None, named: dict[str, Any]
) -> Explanation:
    """Explain the prefill of a config."""
    if args:
        raise TypeError(
            "explain() of a config takes no arguments of a call: give seq_len=, batch_size= and dtype=, or a model"
        )
    size = {name: named.pop(name) for name in ("seq_len", "batch_size", "dtype") if name in named}
    parsed = parse_options(joined_options(options, named))  # before anything takes time
    prompt = prompt_of(config, **size)
    found = _explain_call(_Call(prompt.model, (), prompt.arguments), parsed)
    return replace(found, title=prompt.title, notes=[*prompt.notes, *found.notes])


def _explain_call(call: _Call, options: Options) -> Explanation:
    meta = is_on_meta(call.model, (call.args, call.kwargs))
    with torch.no_grad(), undisturbed():
        if not meta:
            found, broken = _traced_whole(call, options)
            return found if broken is None else _explain_pieces(call, options, broken)
        with on_stand_ins(call.model, (call.args, call.kwargs)) as (positional, named):
            call = _Call(call.model, positional, named)
            found, broken = _traced_whole(call, options)
            return found if broken is None else _explain_without_data(call, options, broken)


def _split_options(
    model: Callable[..., Any], options: Mapping[str, Any] | None, named: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Separate the options of the backend from the arguments of the model."""
    chosen, kwargs = {}, {}
    for name, value in named.items():
        if takes(model, name):
            if name in option_names() and name not in (options or {}):
                raise TypeError(
                    f"{name} is an option of the backend and an argument of {name_of(model)}: give the option as "
                    f"options={{{name!r}: ...}}; {name}= is then passed to the model"
                )
            kwargs[name] = value
        elif name in option_names():
            chosen[name] = value
        elif meant_as_option(name):
            parse_options({name: value})  # says which option is meant
        else:
            kwargs[name] = value
    return joined_options(options, chosen), kwargs


def _by_name(model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the arguments unchanged, or those of a mapping by name."""
    if len(args) != 1 or not isinstance(args[0], Mapping):
        return args, kwargs
    mapping = dict(args[0])
    answers = {takes(model, name) for name in mapping}
    if True not in answers:
        if None in answers:
            raise TypeError(
                f"{name_of(model)} has **kwargs and names none of {', '.join(map(repr, mapping))}, so it cannot be "
                f"known whether it takes a mapping or what is in it: call explain(model, **mapping)"
            )
        return args, kwargs
    twice = sorted(mapping.keys() & kwargs.keys())
    if twice:
        raise TypeError(f"{', '.join(twice)} given twice: in the mapping, and by name")
    return (), {**mapping, **kwargs}


def _traced_whole(call: _Call, options: Options) -> tuple[Explanation, str | None]:
    """Trace the only graph of a call without running it; or return why there are several."""
    found = Explanation()
    backend = _backend(options, found, as_captured=True)
    return found, trace_whole(call.function, call.args, call.kwargs, backend)


def _explain_pieces(call: _Call, options: Options, broken: str) -> Explanation:
    """Explain the graphs of a call from break to break: on stand-ins or, if that fails, with the real arguments."""
    found = _several(broken)
    try:
        with on_stand_ins(call.model, (call.args, call.kwargs)) as (positional, named):
            _run(_Call(call.model, positional, named), options, found, as_captured=True)
    except Exception:
        log.debug("a call does not go on without data", exc_info=True)
        found = _several(broken)
        _run(call, options, found, as_captured=False)
        found.notes.append("the call was really made: between two graphs it asks for the value of a tensor")
    return found


def _explain_without_data(call: _Call, options: Options, broken: str) -> Explanation:
    """Explain the graphs of a call without data."""
    found = _several(broken)
    try:
        _run(call, options, found, as_captured=True)
    except NEEDS_DATA as asked:
        found.notes.append(f"explained up to where it asks for the value of a tensor, which has no data: {asked}")
    return found


def _several(broken: str) -> Explanation:
    return Explanation(notes=[f"the call is no single graph: {broken}"])


def _run(call: _Call, options: Options, found: Explanation, *, as_captured: bool) -> None:
    torch.compile(call.function, backend=_backend(options, found, as_captured=as_captured))(*call.args, **call.kwargs)


def _backend(options: Options, found: Explanation, *, as_captured: bool) -> Callable[..., Any]:
    inner = functools.partial(_explain_graph, options=options, found=found, as_captured=as_captured)

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        return capture(gm, example_inputs, functools.partial(inner, call=example_inputs), dict(options.inductor))

    return traces_substitutes(backend)


def _explain_graph(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Options,
    found: Explanation,
    as_captured: bool,
    call: Sequence[Any],
    **kwargs: Any,
) -> Callable[[list[Any]], Any]:
    """Explain a graph and run it as it would run; `as_captured` for stand-ins, where loops have nothing to write to."""
    report, runnable = _explained(gm, options, kwargs, values_of_call(gm, call))
    found.reports.append(report)
    runnable = gm if as_captured else runnable

    def run(inputs: list[Any]) -> Any:
        values = list(inputs)
        inputs.clear()
        return runnable(*values)

    return mark_boxed(run)


def _explained(
    gm: fx.GraphModule, options: Options, kwargs: Mapping[str, Any], inputs: Sequence[Any] | None
) -> tuple[Report, fx.GraphModule]:
    """Return the report on a graph, and the graph that would run for a call with these inputs, if they have data."""
    nodes, fallback = len(gm.graph.nodes), why_stock(gm, options, kwargs)
    if fallback is not None:
        return Report.of(NOTHING_FOUND, nodes=nodes, fallback=fallback), gm
    try:
        static = static_input_names(gm, kwargs)
        found = rewrite(gm, options, static, inputs)
        if found.decision is None:
            found = found.left_to_stock(gm)
            return found.report(nodes=nodes), found.for_stock or gm
        refused = why_below_weights(gm, options, static) or found.decision.refusal
        report = found.report(nodes=nodes, refused=refused)
        return replace(report, peak_without_loops=_peak_without_loops(gm, report)), found.decision.program.gm
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        return Report.of(NOTHING_FOUND, nodes=nodes, fallback=reason, failed=True), gm


def _peak_without_loops(gm: fx.GraphModule, report: Report) -> int | None:
    """Return the peak by the same memory model if the captured operators run one by one on all tokens, without masks
    that attention does not need; None if it is not known.

    Eager mode takes from 0.85 to 1.3 times as much, for dense models of seven families."""
    if not report.stages or any(stage.spread > 1 for stage in report.stages):
        return None  # for experts outside a loop, the model says less than half of what is measured
    found = memory(schedule(attention_form(copy_graph(gm))), fused=False)
    return found.most(LoopStep, Compute, Call, Transfer)
