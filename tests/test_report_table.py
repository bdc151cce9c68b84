"""A report as a table says what its text says: in colour on a terminal, plain elsewhere."""

from __future__ import annotations

import functools
import io
import re
from dataclasses import replace

import torch
from rich.console import Console

import mom_compile
from mom_compile.report.groups import by_reason
from mom_compile.report.units import in_units
from tests.models import TinyDecoder, ids, tiny


@functools.cache
def explained(layers=6, **options):
    options = {"mini_seq_len": 8, **options}
    return mom_compile.explain(TinyDecoder(layers=layers).eval(), ids(1, 600), 1, options=options)


def printed(renderable, *, terminal=False, width=400):
    out = io.StringIO()
    colours = "standard" if terminal else None
    Console(file=out, force_terminal=terminal, width=width, color_system=colours, highlight=False).print(renderable)
    return out.getvalue()


def test_loops_that_are_alike_are_one_row_with_how_many_there_are():
    report = explained()[0]
    table = report.table()
    assert len(report.stages) >= 6 and len(table.loops) < len(report.stages)
    assert sum(group.count for group in table.loops) == len(report.stages)
    assert {name for group in table.loops for name in group.names} == {stage.name for stage in report.stages}
    middle = max(table.loops, key=lambda group: group.count)
    row = next(line for line in printed(report).splitlines() if middle.ranges in line)
    assert re.search(rf"{middle.ranges} +{middle.count} +8 +{in_units(middle.takes)}", row)


def test_the_table_has_the_first_line_and_the_largest_parts_of_the_text():
    report = explained()[0]
    text = printed(report)
    assert text.splitlines()[0].strip() == str(report).splitlines()[0]
    assert "expected peak" in text and "without loops" in text
    table = report.table()
    assert table.peak == report.expected_peak_bytes and table.largest[0].bytes == max(s.bytes for s in report.peak)
    for share in table.largest:
        assert re.search(rf"{share.what} +{in_units(share.bytes)} +{share.bytes / table.peak:.0%}", text)


def test_there_are_colours_on_a_terminal_and_nowhere_else():
    explanation = explained()
    assert "\x1b[" in printed(explanation, terminal=True)
    assert "\x1b" not in printed(explanation) and "\x1b" not in str(explanation)


def test_what_runs_on_the_full_sequence_is_a_row_with_its_reason():
    model = TinyDecoder(layers=1).eval()
    found = mom_compile.explain(lambda x: model(x).logcumsumexp(1), ids(1, 37), options={"mini_seq_len": 8})
    line = found[0].source_lines["aten.logcumsumexp.default (logcumsumexp)"]
    assert "test_report_table.py" in line and "model(x).logcumsumexp(1)" in line
    assert found[0].table().outside == ((1, "aten.logcumsumexp", f"accumulates along it, at {line}"),)
    assert re.search(r"aten\.logcumsumexp +accumulates along it, at .* 1 *\n", printed(found))


def test_operators_with_one_reason_are_one_row_with_the_first_line():
    left_out = {"a.default (a)": "x", "a.default (a_1)": "x", "b (b)": "x"}
    assert by_reason(left_out, {}) == [(2, "a", "x"), (1, "b", "x")]
    lines = {"a.default (a)": "m.py:1: f()", "a.default (a_1)": "m.py:2: g()", "b (b)": "m.py:3: h()"}
    assert by_reason(left_out, lines) == [(2, "a", "x, first at m.py:1: f()"), (1, "b", "x, at m.py:3: h()")]


def test_a_graph_that_was_left_alone_says_why_and_has_no_rows():
    found = mom_compile.explain(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.SiLU()), torch.randn(1, 5, 8))
    assert printed(found).strip() == str(found)
    assert not found[0].table().loops and not found[0].table().largest


def test_notes_of_the_text_are_below_the_table():
    found = mom_compile.explain(
        tiny("Llama"), input_ids=ids(1, 600), logits_to_keep=1, options={"mini_seq_len": 16, "kv_offload": True}
    )
    line = next(line for line in str(found).splitlines() if line.startswith("to the host: "))
    assert line in printed(found)


def test_names_in_brackets_are_no_markup():
    report = replace(explained()[0], left_out={"[red]op[/red] (x)": "a [bold]reason[/bold]"})
    assert "[red]op[/red]" in printed(report) and "a [bold]reason[/bold]" in printed(report)


def test_an_explanation_of_nothing_says_so():
    assert printed(mom_compile.explain(lambda: None)).strip().startswith("no graph was captured")
