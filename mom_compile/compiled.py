"""A graph compiled by us: what runs, the report on it, and how both are stored for another process.

compiled here          passes and lowering made the program, or stock Inductor the code
read from the cache    the program is linked with this process's pieces, which Inductor's cache has, and with what
                       the device has free now; its report says what the process said that compiled it
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from mom_compile.config import Options
from mom_compile.lowering.pieces import Piece, PieceCache
from mom_compile.lowering.storing import dumps, loads
from mom_compile.memory.choice import Choice, RowsOf, Stays
from mom_compile.memory.decide import placement_of
from mom_compile.memory.device import budget_of
from mom_compile.notices import (
    warn_of_device_kv,
    warn_of_eager,
    warn_of_eager_calls,
    warn_of_gradients,
    warn_of_ignored_kv,
    warn_of_last_graph,
    warn_once,
)
from mom_compile.report import Report
from mom_compile.report.record import ForLong
from mom_compile.runtime.host.steps import Append, Offload
from mom_compile.runtime.loop import CompiledLoop
from mom_compile.runtime.program import Program, Step
from mom_compile.torch_compat import (
    GraphCount,
    NotStorable,
    Storable,
    codegen_settings,
    expect_other_sizes,
    graph_count,
    loaded_stock,
    sizes_become_dynamic,
    stored_stock,
    when_limit_exceeded,
)

log = logging.getLogger(__name__)

NEEDS_GRADIENTS = "the graph needs gradients (call it under torch.no_grad() or torch.inference_mode())"

#: Compiled pieces of this process, shared by all models and sequence lengths.
PIECES = PieceCache()


@dataclass(frozen=True)
class Notice:
    """What there is to say of a graph: `not_ours` is why it was none for us, `attends` whether it has attentions,
    `device` where it computes."""

    report: Report
    options: Options
    not_ours: str | None
    attends: bool
    device: torch.device

    def warn(self) -> None:
        """Of failures of ours, and of requests that are not honoured. That a graph is as good as it gets is no such
        thing."""
        report, asked = self.report, self.options.kv_offload
        log.info("%s", report.headline)
        if report.failed:
            warn_once(f"failed: {report.fallback}", f"mom_compile falls back to stock Inductor: {report.fallback}")
        for name, reason in report.eager_pieces.items():
            warn_of_eager(name, reason)
        if self.not_ours == NEEDS_GRADIENTS:
            warn_of_gradients()
        elif asked not in (False, "auto"):
            warn_of_device_kv(asked, report.on_device)
            if self.not_ours is not None and self.attends:
                warn_of_ignored_kv(asked, self.not_ours)


#: Of the graphs compiled in this process, oldest first; at most `MOST_TOLD` are kept.
NOTICES: list[Notice] = []
MOST_TOLD = 256


def keep(notice: Notice) -> None:
    """Add a graph's report to `NOTICES` while Dynamo compiles the graph."""
    notice.report.graphs = graphs = graph_count()
    if graphs is not None and graphs.number == graphs.most > 1:
        warn_of_last_graph(graphs.code, graphs.limit, graphs.most)
    NOTICES.append(notice)
    del NOTICES[:-MOST_TOLD]


def _note_limit(count: GraphCount) -> None:
    """Record that Dynamo makes no more graphs of a code object. Reports of its graphs say so, and a warning."""
    reports = [notice.report for notice in list(NOTICES)]
    ours = [report for report in reports if report.graphs and report.graphs.code == count.code]
    for report in ours:
        report.limit_hit = True
    if ours:
        warn_of_eager_calls(count.code, count.limit, count.most)


when_limit_exceeded(_note_limit)


@dataclass(frozen=True)
class _Stored:
    """`code` is a program, or what stands for stock Inductor's code."""

    code: Any
    notice: Notice


class CompiledGraph(Storable):
    """`run` takes one list and may empty it: a program of ours, or what stock Inductor made.

    It is stored at once, if at all, and holds no report: this has the whole graph, with all values and symbols.
    """

    def __init__(self, run: Callable[[list[Any]], Any], notice: Notice) -> None:
        super().__init__()
        self._begin(run, notice)

    def _begin(self, run: Callable[[list[Any]], Any], notice: Notice) -> None:
        self.run = run
        self.notice = weakref.ref(notice)
        #: Without it, Dynamo captures a graph for the first step behind a prompt, and another for all others.
        self.growing = notice.report.growing if sizes_become_dynamic() else ()

    def __call__(self, inputs: Any) -> Any:
        outputs = self.run(inputs)
        for position, dim in self.growing:
            expect_other_sizes(outputs[position], dim)
        return outputs

    def stored(self) -> bytes:
        """What failed is not kept: it may have been this process's own trouble."""
        notice = self.notice()
        if notice is None:
            raise NotStorable("its report is gone")
        if notice.report.failed or notice.report.eager_pieces:
            raise NotStorable("something of ours failed")
        # A copy, without what a program keeps once it has run.
        code = replace(self.run) if isinstance(self.run, Program) else stored_stock(self.run)
        return dumps(_Stored(code, replace(notice, report=notice.report.to_store())))

    def load(self, data: bytes, example_inputs: Sequence[Any], settings: Mapping[str, Any]) -> None:
        found: _Stored = loads(data)
        notice, report = found.notice, found.notice.report
        asked = report.for_long
        if asked is not None and asked.fits != _with_current_budget(asked, notice).fits:
            raise NotStorable("the device has other room for keys and values than when this was compiled")
        if isinstance(found.code, Program):
            run = _linked(found.code, notice.options, report, notice.device)
            if report.eager_pieces and notice.options.strict:
                raise NotStorable("Inductor cannot compile a piece of it any more")
        else:
            run = loaded_stock(found.code, example_inputs, settings)
        self._begin(run, notice)
        keep(notice)
        notice.warn()


def _with_current_budget(asked: ForLong, notice: Notice) -> ForLong:
    """The same of this process's device."""
    return replace(asked, budget=budget_of(notice.options, notice.device, asked.weights))


def _linked(program: Program, options: Options, report: Report, device: torch.device) -> Program:
    """A program that was read, with compiled pieces and this process's budget."""
    settings = codegen_settings()
    # Within a program one piece is one object, and one choice.
    found: dict[int, Piece] = {}
    choices: dict[int, Choice] = {}

    def piece(read: Any, name: str) -> Any:
        if not isinstance(read, Piece):
            return read
        if id(read) not in found:
            found[id(read)] = PIECES.get(read, settings, report, name)
        return found[id(read)]

    def choice(read: Choice, device: torch.device) -> Choice:
        if id(read) not in choices:
            choices[id(read)] = read.with_budget(budget_of(options, device, read.weights)) if read.budget else read
        return choices[id(read)]

    def linked(step: Step) -> Step:
        run: Any = step.run
        if isinstance(run, CompiledLoop):
            rows = run.rows
            if isinstance(rows, RowsOf):
                rows = replace(rows, choice=choice(rows.choice, device))
            return replace(step, run=replace(run, body=piece(run.body, step.name), rows=rows))
        if isinstance(run, Offload | Append):
            run = replace(run, placement=placement_of(options, run.device))
        if isinstance(run, Offload) and isinstance(run.stays, Stays):
            run = replace(run, stays=replace(run.stays, choice=choice(run.stays.choice, device)))
        return replace(step, run=piece(run, step.name))

    return replace(program, steps=tuple(map(linked, program.steps)))


def forget_compiled() -> None:
    """Forget pieces and reports."""
    PIECES.clear()
    NOTICES.clear()
