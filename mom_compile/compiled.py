"""A compiled graph: what runs, the report on it, and how both are stored for another process.

compiled here          passes and lowering made the program, or stock Inductor the code
read from the cache    the program is linked with this process's pieces, which Inductor's cache has, and with the memory
                       that the device has free now; its report says what the process that compiled it said
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from mom_compile.config import Options
from mom_compile.lowering.eager import THE_GRAPH
from mom_compile.lowering.piece_cache import PieceCache
from mom_compile.lowering.pieces import Piece
from mom_compile.lowering.storing import dumps, loads
from mom_compile.memory.choice import Choice, RowsOf, Stays
from mom_compile.memory.decide import ForLong, placement_of
from mom_compile.memory.device import budget_of
from mom_compile.memory.ranks import Agreement, RanksAgree
from mom_compile.notices import (
    warn_of_device_kv,
    warn_of_eager,
    warn_of_eager_calls,
    warn_of_gradients,
    warn_of_ignored_kv,
    warn_of_last_graph,
    warn_once,
)
from mom_compile.packings import ProgramPerPacking
from mom_compile.report import Report
from mom_compile.report.facts import PieceLog
from mom_compile.report.reasons import Reason
from mom_compile.runtime.copy_steps import Append, Offload
from mom_compile.runtime.loop import CompiledLoop
from mom_compile.runtime.parted import PartedBody
from mom_compile.runtime.program import Program, Step
from mom_compile.torch_compat.compile_cache import NotStorable, Storable, loaded_stock, stored_stock
from mom_compile.torch_compat.dynamo import expect_other_sizes, sizes_become_dynamic
from mom_compile.torch_compat.inductor import codegen_settings
from mom_compile.torch_compat.recompiles import GraphCount, graph_count, when_limit_exceeded

log = logging.getLogger(__name__)

#: Compiled pieces of this process, shared by all models and sequence lengths.
PIECES = PieceCache()


@dataclass(frozen=True)
class Needs:
    """What a compiled graph needs to run and to be stored, besides its code.

    Parameters
    ----------
    growing
        Positions of the outputs that a cache keeps, with the dimension in which the next call finds them longer.
    for_long
        Whether all keys and values stay on the device, where "auto" had to ask.
    storable
        Whether nothing of it failed: a failure may be this process's own.
    agreement
        What ranks agree on before each run of a graph that stock Inductor compiled. Programs have a step for it.
    agreed_sizes
        Positions of the inputs with the sizes of the agreement.
    """

    growing: tuple[tuple[int, int], ...]
    for_long: ForLong | None
    storable: bool
    agreement: Agreement | None = None
    agreed_sizes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Notice:
    """The report on a graph, and what warnings depend on: `not_ours` is why the passes skipped the graph, `attends`
    whether it has attentions, `device` where it computes."""

    report: Report
    options: Options
    not_ours: str | None
    attends: bool
    device: torch.device

    def warn(self) -> None:
        """Warn of failures and of options that are not honoured; not of a graph that gains nothing."""
        report, asked = self.report, self.options.kv_offload
        log.info("%s", report.headline)
        if report.failed:
            warn_once(f"failed: {report.fallback}", f"mom_compile falls back to stock Inductor: {report.fallback}")
        for name, reason in report.eager_pieces.items():
            warn_of_eager("a graph" if name == THE_GRAPH else report.located(name), reason)
        if self.not_ours is Reason.NEEDS_GRADIENTS:
            warn_of_gradients()
        elif asked not in (False, "auto"):
            warn_of_device_kv(asked, report.on_device)
            if self.not_ours is not None and self.attends:
                warn_of_ignored_kv(asked, self.not_ours)


#: Notices of the graphs compiled in this process, oldest first; at most `MOST_NOTICES` are kept.
NOTICES: list[Notice] = []
MOST_NOTICES = 256


def keep(notice: Notice) -> None:
    """Add the notice on a graph to `NOTICES`."""
    graphs = notice.report.graphs
    if graphs is not None and graphs.number == graphs.most > 1:
        warn_of_last_graph(graphs.code, graphs.limit, graphs.most)
    NOTICES.append(notice)
    del NOTICES[:-MOST_NOTICES]


def _note_limit(count: GraphCount) -> None:
    """Record that Dynamo makes no more graphs of a code object. Reports of its graphs say so, and a warning."""
    reports = [notice.report for notice in list(NOTICES)]
    ours = [report for report in reports if report.graphs and report.graphs.code == count.code]
    for report in ours:
        report.exceeded.append(count)
    if ours:
        warn_of_eager_calls(count.code, count.limit, count.most)


when_limit_exceeded(_note_limit)


@dataclass(frozen=True)
class _Stored:
    """`code` is a program, or what is stored of stock Inductor's code."""

    code: Any
    notice: Notice
    needs: Needs


class CompiledGraph(Storable):
    """`run` takes one list and may empty it: a program, or what stock Inductor made.

    The graph is stored at once, if at all. It does not keep its report alive, which has the whole graph with all values
    and symbols.
    """

    def __init__(self, run: Callable[[list[Any]], Any], notice: Notice, needs: Needs) -> None:
        super().__init__()
        self._begin(run, notice, needs)

    def _begin(self, run: Callable[[list[Any]], Any], notice: Notice, needs: Needs) -> None:
        self.run, self.needs = run, needs
        self.notice = weakref.ref(notice)
        #: Otherwise Dynamo captures one graph for the first step after a prompt, and another for all others.
        self.growing = needs.growing if sizes_become_dynamic() else ()

    def __call__(self, inputs: Any) -> Any:
        if self.needs.agreement is not None:
            self.needs.agreement.hold(tuple(inputs[i] for i in self.needs.agreed_sizes))
        outputs = self.run(inputs)
        for position, dim in self.growing:
            expect_other_sizes(outputs[position], dim)
        return outputs

    def stored(self) -> bytes:
        notice = self.notice()
        if notice is None:
            raise NotStorable("its report is gone")
        if not self.needs.storable:
            raise NotStorable("something of ours failed")
        if isinstance(self.run, ProgramPerPacking):
            raise NotStorable("another call may need another program of this graph")
        # A copy, without what a program keeps once it has run.
        code = replace(self.run) if isinstance(self.run, Program) else stored_stock(self.run)
        return dumps(_Stored(code, replace(notice, report=notice.report.to_store()), self.needs))

    def load(self, data: bytes, example_inputs: Sequence[Any], settings: Mapping[str, Any]) -> None:
        found: _Stored = loads(data)
        notice, pieces, asked = found.notice, PieceLog(), found.needs.for_long
        if asked is not None and asked.fits != _with_current_budget(asked, notice).fits:
            raise NotStorable("the device has other room for keys and values than when this was compiled")
        if isinstance(found.code, Program):
            run = _linked(found.code, notice.options, pieces, notice.device)
            if pieces.eager_pieces and notice.options.strict:
                raise NotStorable("Inductor cannot compile a piece of it any more")
        else:
            run = loaded_stock(found.code, example_inputs, settings)
        report = replace(notice.report.with_pieces(pieces), graphs=graph_count())
        notice = replace(notice, report=report)
        self._begin(run, notice, found.needs)
        keep(notice)
        notice.warn()


def _with_current_budget(asked: ForLong, notice: Notice) -> ForLong:
    """Return the same question with the budget of this process."""
    return replace(asked, budget=budget_of(notice.options, notice.device, asked.weights))


def _linked(program: Program, options: Options, pieces: PieceLog, device: torch.device) -> Program:
    """Return a program that was read, with compiled pieces and this process's budget."""
    settings = codegen_settings()
    # Steps of a program share pieces and a choice.
    found: dict[int, Piece] = {}
    choices: dict[int, Choice] = {}

    def piece(read: Any, name: str) -> Any:
        if isinstance(read, PartedBody):
            return read.with_parts(lambda part, number: piece(part, f"{name}_part_{number}"))
        if not isinstance(read, Piece):
            return read
        if id(read) not in found:
            found[id(read)] = PIECES.get(read, settings, pieces, name)
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
        if isinstance(run, RanksAgree) and run.choice is not None:
            return replace(step, run=replace(run, choice=choice(run.choice, device)))
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
