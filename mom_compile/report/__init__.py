"""What was done to a graph and what was not, and why."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from mom_compile.report.details import details
from mom_compile.report.notebook import html_of_table
from mom_compile.report.record import DECODE_STEP, GRAPH, PREFILL, SCORING, KVReport, PassReport, Record, moved_rows
from mom_compile.report.shares import Share, shares
from mom_compile.report.stages import LiveValue, StageReport, stage_report
from mom_compile.report.summary import summary
from mom_compile.report.table import ReportTable, report_table
from mom_compile.report.units import in_units
from mom_compile.timeline import Measured, draw_timeline
from mom_passes.host.kv_offload import KVOffload
from mom_passes.loops.loop import loops
from mom_passes.program.program import Compute, LoopStep
from mom_passes.program.rewritten import Rewritten

__all__ = [
    "DECODE_STEP", "GRAPH", "PREFILL", "SCORING", "KVReport", "LiveValue", "PassReport", "Record", "Report", "Share",
    "StageReport",
]  # fmt: skip


class Report(Record):
    """What the backend did to one captured graph, and why.

    `str(report)` is a short text, `report.details()` the full one. The attributes are those of `Record`, its base
    class.
    """

    def describe(self, rewritten: Rewritten) -> None:
        self.graph, self.memory, self.no_loops = rewritten.gm, rewritten.memory, rewritten.no_loops
        self.weights = rewritten.weights
        moments = [moment for moment in self.memory.moments if isinstance(moment.step, LoopStep)]
        self.stages = [stage_report(moment, self.memory) for moment in moments]
        self.tokens = self.memory.tokens
        self.peak = shares(rewritten, self.keys_and_values)

    def describe_layers(self, rewritten: Rewritten) -> None:
        """A graph without loops, cut by layers."""
        self.describe(rewritten)
        self.layer_pieces = sum(isinstance(step, Compute) for step in rewritten.plan.steps)

    def to_store(self) -> Report:
        """What of this another process can say that reads the compiled graph: not what was done for it in this one."""
        own: dict[str, Any] = {"passes": [], "compiled_pieces": [], "bodies_shared": 0, "compile_seconds": 0.0}
        own |= {"graph": None, "graphs": None, "limit_hit": False}
        return replace(self, **own, from_cache=True)

    def describe_kv(self, offload: KVOffload) -> None:
        self.on_device = dict(offload.left_out)
        self.on_host = [
            KVReport(value.kept.name, value.layer, value.bytes_per_token, value.past is not None)
            for value in offload.leaving
        ]

    def describe_staying(self, reason: str) -> None:
        """All keys and values stay on the device after all."""
        self.on_host, self.on_device = [], {"all": reason}

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
