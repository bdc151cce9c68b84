"""`explain(model, *args, **kwargs)`: what the backend would do, without compiling or computing anything.

one graph       traced, rewritten, and then the call is given up: nothing of it has run
several         the call goes on from break to break on stand-ins, which have no data
a break asks    for a value (`.item()`, a branch on a tensor): the call is really made, and the explanation says so;
                on the meta device, where that cannot be, it ends there and says so, too
"""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from mom_compile.arguments import name_of, takes, unwrapped
from mom_compile.backend import rewrite, static_input_names, why_stock
from mom_compile.capture import capture
from mom_compile.config import Options, joined_options, meant_as_option, option_names, parse_options
from mom_compile.memory.decide import why_below_weights
from mom_compile.pipeline import NotWorthwhile, for_stock
from mom_compile.planning.prompt import prompt_of
from mom_compile.report import Report
from mom_compile.report.notebook import html_of_table
from mom_compile.report.units import counted
from mom_compile.stand_ins import is_on_meta, on_stand_ins
from mom_compile.torch_compat import NEEDS_DATA, mark_boxed, trace_whole, undisturbed
from mom_passes.attention.form import attention_form
from mom_passes.graph.edit import copy_graph
from mom_passes.program.memory import memory
from mom_passes.program.program import Call, Compute, LoopStep, Transfer
from mom_passes.program.schedule import schedule

log = logging.getLogger(__name__)

#: Graphs that a `repr` names.
_MOST_SHOWN = 3


@dataclass
class Explanation:
    """One report per captured graph; most models have one. `print` it; `details()` has everything.

    `title` names what is explained where a config was given in place of a model. `notes` are what a reader has to know
    besides: why there are several graphs, that the call was really made.
    """

    reports: list[Report] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    title: str = ""

    def __getitem__(self, index: int) -> Report:
        return self.reports[index]

    def __len__(self) -> int:
        return len(self.reports)

    def code(self) -> str:
        """The rewritten graphs as readable Python."""
        return "\n".join(report.code() for report in self.reports)

    def details(self) -> str:
        """Each graph with every stage, its operators and values at full length, and all that was left out and why."""
        return "\n".join([*self._title, *self.notes, *(report.details() for report in self.reports)])

    def __str__(self) -> str:
        if not self.reports:
            return "no graph was captured: did the call compute nothing?"
        counts = Counter(str(report) for report in self.reports)
        graphs = [text if count == 1 else f"{count} graphs alike: {text}" for text, count in counts.items()]
        return "\n".join([*self._title, *self.notes, *graphs])

    def __repr__(self) -> str:
        """One line, with the headlines of the first graphs."""
        shown = "; ".join(report.headline for report in self.reports[:_MOST_SHOWN])
        more = f"; {len(self) - _MOST_SHOWN} more" if len(self) > _MOST_SHOWN else ""
        return f"<Explanation of {counted(len(self), 'graph')}: {shown}{more}>"

    def _repr_html_(self) -> str:
        return html_of_table(self)

    @property
    def _title(self) -> list[str]:
        return [self.title] if self.title else []

    def __rich__(self) -> Any:
        from mom_compile.report.rendered import rendered_graphs  # rich is only needed where it prints

        alike: dict[str, list[Report]] = {}
        for report in self.reports:
            alike.setdefault(str(report), []).append(report)
        graphs = [(len(reports), reports[0].table()) for reports in alike.values()]
        return rendered_graphs(self._title, self.notes, graphs)


@dataclass(frozen=True)
class _Call:
    """What is explained: a function, or the module of it, with arguments."""

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
    """Trace `model(*args, **named)` without gradients, and explain what would be rewritten, what would not, and why.

    model    a module or a function, wrapped or not; or a config: a folder, a config.json, the name of a shipped shape
             or a config of transformers. For a config the prefill of `seq_len=4096` tokens with `batch_size=1` and
             `dtype` is explained
    args     arguments of the call. If the only one is a mapping whose names the model takes (the output of a
             tokenizer), its entries are passed by name
    options  options of the backend, in a mapping
    named    options of the backend by name, and arguments of the call. If a name is an option and also an argument of
             the model, give the option in `options`; the value given by name is then the model's

    Nothing is compiled or computed. The model may be on the meta device, without weights. The model, the arguments and
    graphs that were compiled before are not changed. There is one exception: if a graph ends because the model asks for
    the value of a tensor, the call is really made, without compiled loops, with all its side effects. `notes` says so.

    Raises `ValueError` for a wrong option or config; `TypeError` for a class in place of a model, for an argument or
    option that is given twice, and for a name that could be either; and the errors of the model itself.
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
            return found if broken is None else _as_far_as_it_goes(call, options, broken)


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
    """Arguments as they are, or those of a mapping by name."""
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
    """The only graph of a call, which is not run; or why there are several."""
    found = Explanation()
    backend = _backend(options, found, as_captured=True)
    return found, trace_whole(call.function, call.args, call.kwargs, backend)


def _explain_pieces(call: _Call, options: Options, broken: str) -> Explanation:
    """The graphs of a call from break to break: on stand-ins or, where that does not do, as it is."""
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


def _as_far_as_it_goes(call: _Call, options: Options, broken: str) -> Explanation:
    """The graphs of a call that has no data at all."""
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
        return capture(gm, example_inputs, inner, dict(options.inductor))

    return backend


def _explain_graph(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Options,
    found: Explanation,
    as_captured: bool,
    **kwargs: Any,
) -> Callable[[list[Any]], Any]:
    """The graph as it would run; `as_captured` for stand-ins, in which loops have nothing to write to."""
    report = Report(nodes=len(gm.graph.nodes))
    found.reports.append(report)
    runnable = gm
    report.fallback = why_stock(gm, options, kwargs)
    if report.fallback is None:
        try:
            try:
                static = static_input_names(gm, kwargs)
                decision = rewrite(gm, options, report, static)
                report.refused = why_below_weights(gm, options, static) or decision.refusal
                runnable = decision.program.gm
                report.peak_without_loops = _peak_without_loops(gm, report)
            except NotWorthwhile as decision:
                if decision.rewritten is not None:
                    report.describe_layers(decision.rewritten)
                    runnable = decision.rewritten.gm
                else:
                    report.fallback = str(decision)
                    runnable = for_stock(gm, report=report)
            runnable = gm if as_captured else runnable
        except Exception as error:
            report.failed, report.fallback = True, f"{type(error).__name__}: {error}"

    def run(inputs: list[Any]) -> Any:
        values = list(inputs)
        inputs.clear()
        return runnable(*values)

    return mark_boxed(run)


def _peak_without_loops(gm: fx.GraphModule, report: Report) -> int | None:
    """By the same memory model: the operators as they were captured, one by one, each on all tokens, and no mask where
    attention needs none. Eager mode takes from 0.85 to 1.3 times as much, for dense models of seven families. None
    where that is not known."""
    if not report.stages or any(stage.spread > 1 for stage in report.stages):
        return None  # of experts outside a loop it says less than half of what is measured
    found = memory(schedule(attention_form(copy_graph(gm))), fused=False)
    return found.most(LoopStep, Compute, Call, Transfer)
