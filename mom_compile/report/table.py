"""The short report as data, which `rendered.py` draws."""

from __future__ import annotations

from dataclasses import dataclass

from mom_compile.report.groups import LoopGroup, by_reason, loop_groups
from mom_compile.report.record import Record
from mom_compile.report.shares import Share
from mom_compile.report.summary import MOST, headline, largest, no_loops, rest


@dataclass(frozen=True)
class ReportTable:
    """A graph as rows.

    headline, why  what was saved or why the graph was left alone, and why it has no loops if it has none
    peak, largest  the expected peak in bytes, and what it is made of
    loops          alike ones in one; `more_loops` are not shown
    outside        how many operators run on the full sequence, which and why; `more_outside` are not shown
    notes          all the rest, in words
    """

    headline: str
    why: tuple[str, ...]
    peak: int
    largest: tuple[Share, ...]
    loops: tuple[LoopGroup, ...]
    outside: tuple[tuple[int, str, str], ...]
    notes: tuple[str, ...]
    more_loops: int = 0
    more_outside: int = 0


def report_table(record: Record) -> ReportTable:
    ours = record.fallback is None
    loops = loop_groups(record.stages) if ours else []
    outside = by_reason(record.left_out, record.source_lines) if ours else []
    rows = [record.rows] if ours and record.rows else []
    return ReportTable(
        headline(record),
        tuple(no_loops(record)),
        record.expected_peak_bytes,
        tuple(largest(record)),
        tuple(loops[:MOST]),
        tuple(outside[:MOST]),
        (*rows, *rest(record)),
        sum(group.count for group in loops[MOST:]),
        sum(count for count, _, _ in outside[MOST:]),
    )
