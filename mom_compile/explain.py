"""`explain(model, *args, **kwargs)`: what the backend would do, without compiling anything."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from mom_compile.backend import rewrite, static_input_names, why_stock
from mom_compile.config import Options, parse_options
from mom_compile.meta_model import is_on_meta, on_a_real_device
from mom_compile.pipeline import NotWorthwhile, for_stock
from mom_compile.report import Report
from mom_compile.torch_compat import capture, mark_boxed


@dataclass
class Explanation:
    """One report per captured graph; most models have one. Prints well."""

    reports: list[Report] = field(default_factory=list)

    def __getitem__(self, index: int) -> Report:
        return self.reports[index]

    def __len__(self) -> int:
        return len(self.reports)

    def code(self) -> str:
        """The rewritten graphs as readable Python."""
        return "\n".join(report.code() for report in self.reports)

    def __str__(self) -> str:
        if not self.reports:
            return "no graph was captured: was the call already compiled, or did it compute nothing?"
        return "\n".join(str(report) for report in self.reports)


def explain(
    model: Callable[..., Any], *args: Any, options: Mapping[str, Any] | None = None, **kwargs: Any
) -> Explanation:
    """Trace `model(*args, **kwargs)` once without gradients, and say what would be rewritten and what not, and why.

    The rewritten graph runs in eager mode, so nothing is compiled and the answer comes fast.
    A model on the meta device needs no memory for this, nor the time to load it. Raises `ValueError` for a wrong
    option, and whatever the model itself raises.
    """
    parsed = parse_options(options)
    found = Explanation()
    meta = is_on_meta(model, (args, kwargs))
    inner = functools.partial(_explain_graph, options=parsed, found=found, as_captured=meta)

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        return capture(gm, example_inputs, inner, dict(parsed.inductor))

    function = model.forward if isinstance(model, torch.nn.Module) else model
    given = contextlib.nullcontext((args, kwargs)) if not meta else on_a_real_device(model, (args, kwargs))
    with torch.no_grad(), given as (positional, named):
        torch.compile(function, backend=backend)(*positional, **named)
    return found


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
                runnable = rewrite(gm, options, report, static_input_names(gm, kwargs)).gm
            except NotWorthwhile as decision:
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
