"""Tables of reports, drawn with rich: in colour on a terminal, plain elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mom_compile.report.table import ReportTable
from mom_compile.report.units import in_units


def plain_table(*columns: str, title: str = "", left: int = 1) -> Table:
    """Return a table without lines between columns. The first `left` columns are words, the others numbers."""
    table = Table(box=SIMPLE_HEAD, title=title or None, title_justify="left", title_style="bold", pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(Text(column), justify="left" if i < left else "right", overflow="fold")
    return table


def lines_of(texts: Iterable[str], style: str = "") -> list[RenderableType]:
    """Return texts without markup."""
    return [Text(text, style=style) for text in texts]


def rendered(report: ReportTable) -> Group:
    """Return one graph: the headline, what its peak is made of, its loops, what is outside of them, and notes."""
    parts: list[RenderableType] = [Text(report.headline, style="bold"), *lines_of(report.why, "yellow")]
    if report.largest:
        parts.append(_largest(report))
    if report.loops:
        parts.append(_loops(report))
    if report.outside:
        parts.append(_outside(report))
    return Group(*parts, *lines_of(report.notes))


def rendered_graphs(title: Sequence[str], notes: Sequence[str], graphs: Sequence[tuple[int, ReportTable]]) -> Group:
    """Return all graphs of a call, identical ones once with their number."""
    parts = [*lines_of(title), *lines_of(notes, "yellow")]
    for count, report in graphs:
        parts += [Text(f"{count} identical graphs:")] if count > 1 else []
        parts.append(rendered(report))
    return Group(*parts) if graphs else Group(*parts, Text("no graph was captured: did the call compute nothing?"))


def _largest(report: ReportTable) -> Table:
    table = plain_table("largest at the peak", "bytes", "share")
    for share in report.largest:
        table.add_row(Text(share.what), in_units(share.bytes), f"{share.bytes / max(1, report.peak):.0%}")
    return table


def _loops(report: ReportTable) -> Table:
    numbers = ("count", "tokens at a time", "take", "a token leaves")
    table = plain_table("loops", "which", *numbers, left=2)
    for group in report.loops:
        sizes = [in_units(group.takes), in_units(group.leaves) if group.leaves else ""]
        table.add_row(Text(group.sees), Text(group.ranges), str(group.count), f"{group.rows:,}", *sizes)
    if report.more_loops:
        table.add_row("others", "", str(report.more_loops))
    return table


def _outside(report: ReportTable) -> Table:
    table = plain_table("between loops, on all tokens", "why", "count", left=2)
    for count, name, reason in report.outside:
        table.add_row(Text(name, style="yellow"), Text(reason), str(count))
    if report.more_outside:
        table.add_row("others", "", str(report.more_outside))
    return table
