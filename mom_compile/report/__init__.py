"""Reports on graphs: what was done, what was not, and why."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from mom_compile.report.communication import Communication
from mom_compile.report.details import details
from mom_compile.report.facts import (
    DECODE_STEP,
    ENCODER,
    GRAPH,
    PREFILL,
    SCORING,
    Facts,
    KVReport,
    PassReport,
    PieceLog,
)
from mom_compile.report.notebook import html_of_table
from mom_compile.report.record import Record, moved_rows
from mom_compile.report.shares import Share, shares
from mom_compile.report.stages import LiveValue, StageReport, stage_report
from mom_compile.report.summary import summary
from mom_compile.report.table import ReportTable, report_table
from mom_compile.report.units import in_units
from mom_compile.timeline import Measured, draw_timeline
from mom_passes.loops.loop import loops
from mom_passes.program.program import Compute, LoopStep
from mom_passes.program.rewritten import Rewritten

__all__ = [
    "DECODE_STEP", "ENCODER", "GRAPH", "PREFILL", "SCORING", "KVReport", "LiveValue", "PassReport", "Record", "Report",
    "Share", "StageReport",
]  # fmt: skip


class Report(Record):
    """What the backend did to one captured graph, and why.

    `str(report)` is a short text, `report.details()` the full one. The attributes are those of `Record`, its base
    class.
    """

    @staticmethod
    def of(facts: Facts, program: Rewritten | None = None, *, by_layers: bool = False, **known: Any) -> Report:
        """Return the report on a graph.

        `program` is what the passes made of it, if it is not stock Inductor's; `by_layers`, if it is no more than the
        graph cut between its layers. `known` are further attributes, see `Record`.
        """
        of_program = {} if program is None else _of_program(program, facts, by_layers)
        return Report(**vars(facts), **of_program, **known)

    def with_pieces(self, pieces: PieceLog) -> Report:
        """Return the report with what became of the graph's pieces."""
        return replace(self, **{**vars(pieces), "source_lines": {**self.source_lines, **pieces.source_lines}})

    def to_store(self) -> Report:
        """Return what another process that reads the compiled graph can say of it: without what this process did."""
        own: dict[str, Any] = {"passes": (), "graph": None, "graphs": None, "exceeded": []}
        pieces = vars(PieceLog(eager_pieces=dict(self.eager_pieces), source_lines=dict(self.source_lines)))
        return replace(self, **own, **pieces, from_cache=True)

    @property
    def headline(self) -> str:
        """One line, as in the log: the loops and the expected peak, or why the graph went to stock Inductor."""
        if self.fallback is not None:
            return f"stock Inductor: {self.fallback}"
        what = f"{self.kind}, {len(self.stages)} loops, " if self.no_loops is None else f"{self.no_loops}; "
        what += f"in {self.layer_pieces} pieces by layers, " if self.layer_pieces else ""
        moved = f"{moved_rows(self)} to the host, " if self.on_host else ""
        return f"{what}{moved}expected peak {in_units(self.expected_peak_bytes)}"

    def plot(self, path: str | Path, measured: Measured | None = None) -> None:
        """Draw the expected memory of each step, and measured memory if it is given. Needs matplotlib.

        Parameters
        ----------
        path : str or Path
            The image file.
        measured : sequence, optional
            What `mom_compile.measured_steps` recorded, or a number of bytes for each step.

        Raises
        ------
        ValueError
            If the graph went to stock Inductor, or `measured` is of another program.
        """
        if self.memory is None or not self.memory.moments:
            raise ValueError(f"nothing to draw: {self.fallback or 'the graph has no program'}")
        draw_timeline(self.memory, Path(path), measured)

    def table(self) -> ReportTable:
        """Return the content of `str(report)` as data.

        Returns
        -------
        ReportTable
            Rows of the table that rich and notebooks show.
        """
        return report_table(self)

    def __rich__(self) -> Any:
        from mom_compile.report.rendered import rendered  # rich is only needed where it prints

        return rendered(self.table())

    def __repr__(self) -> str:
        return f"<Report: {self.headline}>"

    def _repr_html_(self) -> str:
        return html_of_table(self)

    def code(self) -> str:
        """Return the rewritten graph as readable Python, loop bodies included.

        Returns
        -------
        str
            Python source. Empty for a graph of stock Inductor, a comment for one from the compile cache.
        """
        if self.graph is None:
            return "# compiled by an earlier process: explain() shows the code" if self.from_cache else ""
        parts = [self.graph.print_readable(print_output=False)]
        for name, loop in loops(self.graph):
            parts.append(f"# the body of {name}\n{loop.body.code.strip()}")
        return "\n\n".join(parts)

    def details(self) -> str:
        """Return the full text: every stage, every value at full length, every operator outside loops with the reason.

        Returns
        -------
        str
            Many lines.
        """
        return "\n".join(details(self))

    def __str__(self) -> str:
        return "\n".join(summary(self))


def _of_program(program: Rewritten, facts: Facts, by_layers: bool) -> dict[str, Any]:
    """Return the attributes of a report that a program says."""
    found = program.memory
    moments = [moment for moment in found.moments if isinstance(moment.step, LoopStep)]
    return {
        "graph": program.gm,
        "memory": found,
        "no_loops": program.no_loops,
        "weights": program.weights,
        "communication": Communication.of(program.plan, found),
        "stages": tuple(stage_report(moment, found) for moment in moments),
        "tokens": found.tokens,
        "peak": shares(program, facts.keys_and_values),
        "layer_pieces": sum(isinstance(step, Compute) for step in program.plan.steps) if by_layers else 0,
    }
