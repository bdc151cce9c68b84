"""The result of `explain`: the reports on all graphs of a call."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from mom_compile.report import Report
from mom_compile.report.notebook import html_of_table
from mom_compile.report.units import counted

#: Graphs that a `repr` names.
_MOST_SHOWN = 3


@dataclass
class Explanation:
    """The result of `explain`: one `Report` for each captured graph.

    `str()` gives a short text, `print` with rich a table, `details()` the full text. `explanation[i]` is the report of
    graph `i`, `len(explanation)` the number of graphs.

    Attributes
    ----------
    reports : list of Report
        Reports in the order of capture. Most models have one graph.
    notes : list of str
        Why there are several graphs, and whether the call was really executed.
    title : str
        The name of the config where a config was explained; else empty.
    """

    reports: list[Report] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    title: str = ""

    def __getitem__(self, index: int) -> Report:
        return self.reports[index]

    def __len__(self) -> int:
        return len(self.reports)

    def code(self) -> str:
        """Return the rewritten graphs as readable Python.

        Returns
        -------
        str
            Python source, one graph after the other, loop bodies included.
        """
        return "\n".join(report.code() for report in self.reports)

    def details(self) -> str:
        """Return the full text: every stage, value at full length and operator outside loops, with the reason.

        Returns
        -------
        str
            Lines for all graphs.
        """
        return "\n".join([*self._title, *self.notes, *(report.details() for report in self.reports)])

    def __str__(self) -> str:
        if not self.reports:
            return "no graph was captured: did the call compute nothing?"
        counts = Counter(str(report) for report in self.reports)
        graphs = [text if count == 1 else f"{count} identical graphs: {text}" for text, count in counts.items()]
        return "\n".join([*self._title, *self.notes, *graphs])

    def __repr__(self) -> str:
        """Return one line, with the headlines of the first graphs."""
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

        same: dict[str, list[Report]] = {}
        for report in self.reports:
            same.setdefault(str(report), []).append(report)
        graphs = [(len(reports), reports[0].table()) for reports in same.values()]
        return rendered_graphs(self._title, self.notes, graphs)
