"""The short report: the expected peak, what it is made of, the loops, and what was left out and why.

    prefill of 2733 tokens: expected peak 51 MiB, 173 MiB without loops (beside weights and inputs)
    largest then: keys and values that a cache keeps 30 MiB, one mini-sequence's own values 9.4 MiB, ...
    18 loops over mini-sequences, alike ones in one line:
       1 x  no attention: 512 tokens at a time take 2.0 MiB; a token leaves 4.5 KiB (stage_0)
      15 x  attention to a window of 512 tokens: 512 tokens at a time take 9.4 MiB; ... (stage_1-5, 7-11, 13-17)
       2 x  attention to all tokens: ...
"""

from __future__ import annotations

from collections.abc import Sequence

from mom_compile.report.details import communication_lines, eager_lines
from mom_compile.report.facts import DECODE_STEP
from mom_compile.report.groups import LoopGroup, by_reason, first_line, loop_groups
from mom_compile.report.reasons import Reason
from mom_compile.report.record import Record, host_share, limit_in_words, moved_rows, own_share
from mom_compile.report.shares import Share
from mom_compile.report.stages import StageReport
from mom_compile.report.units import counted, in_units

#: The most lines for loops, operators or reasons of one kind.
MOST = 8
#: Shares of the peak below this part of the largest are not shown.
_SMALL = 0.02


def summary(record: Record) -> list[str]:
    """Return the lines of the short report."""
    lines = [headline(record), *no_loops(record), *([record.refused] if record.refused else [])]
    parts = [f"{share.what} {in_units(share.bytes)}" for share in largest(record)]
    if parts:
        lines.append(f"largest then: {', '.join(parts)}")
    if record.fallback is None and record.stages:
        lines += _loop_lines(record.stages, record.rows)
    if record.fallback is None and record.left_out:
        lines += _left_out(record)
    return lines + rest(record)


def headline(record: Record) -> str:
    """Return the expected peak, or why the graph went to stock Inductor."""
    if record.fallback is not None:
        return _left_alone(record)
    tokens = f" of {record.tokens} tokens" if record.stages else ""
    without = record.peak_without_loops
    saved = "" if without is None else f", {in_units(without)} without loops"
    peak = in_units(record.expected_peak_bytes)
    return f"{record.kind}{tokens}: expected peak {peak}{saved} (beside weights and inputs)"


def no_loops(record: Record) -> list[str]:
    """Return why a rewritten graph has no loops, if it has none."""
    if record.fallback is not None or record.no_loops is None:
        return []
    return [f"no loops: {_in_words(record.no_loops)}"]


def largest(record: Record) -> list[Share]:
    """Return what the expected peak is made of, without small shares."""
    if record.fallback is not None or not record.peak:
        return []
    return [share for share in record.peak if share.bytes >= _SMALL * record.peak[0].bytes]


def rest(record: Record) -> list[str]:
    """Return the lines on keys, values, weights and failures."""
    weights = _weight_lines(record) if record.fallback is None else []
    limit = limit_in_words(record)
    lines = _kv_lines(record) + weights + communication_lines(record) + _own_lines(record) + eager_lines(record)
    return lines + ([limit] if limit else [])


def _left_alone(record: Record) -> str:
    if record.failed:
        return f"{record.kind}: failed here, so stock Inductor compiles it as it is: {record.fallback}"
    return f"{record.kind}, left to stock Inductor: {_in_words(record.fallback)}"


def _in_words(reason: str | None) -> str:
    if reason is Reason.ONE_TOKEN:
        return "it computes one token for each sequence, and one token cannot be cut into shorter runs"
    return str(reason)


def _loop_lines(stages: Sequence[StageReport], rows: str) -> list[str]:
    alike = loop_groups(stages)
    merged = ", alike ones in one line" if len(alike) < len(stages) else ""
    lines = [f"  {group.count:2} x  {_in_a_line(group)} ({group.ranges})" for group in alike]
    why = [f"  {rows}"] if rows else []
    return [f"{counted(len(stages), 'loop')} over mini-sequences{merged}:", *_at_most(lines), *why]


def _in_a_line(group: LoopGroup) -> str:
    leaves = f"; a token leaves {in_units(group.leaves)}" if group.leaves else ""
    return f"{group.sees}: {group.rows} tokens at a time take {in_units(group.takes)}{leaves}"


def _left_out(record: Record) -> list[str]:
    """Operators with one reason once, with how many there are."""
    found = by_reason(record.left_out, record.source_lines)
    lines = [f"  {count:2} x  {name}: {reason}" for count, name, reason in found]
    return ["on the full sequence, between loops:", *_at_most(lines)]


def _kv_lines(record: Record) -> list[str]:
    names: dict[str, list[str]] = {}
    for name, reason in record.on_device.items():
        names.setdefault(reason, []).append(name)
    lines = [
        f"{len(found)} keys or values stay on the device: {reason}{first_line(record.source_lines, found)}"
        for reason, found in names.items()
    ]
    lines = _at_most(lines)
    share = host_share(record)
    if share is not None:
        layers, size = share
        lines.append(f"to the host: {moved_rows(record)} of {counted(layers, 'layer')}, {in_units(size)} a token")
    return lines


#: The link and the device of the estimate: a PCIe 4.0 x16 reaches 25 GB/s of its 32; 100 TFLOP/s in 16 bits is a
#: medium GPU.
LINK, RATE = 25e9, 100e12


def _weight_lines(record: Record) -> list[str]:
    """Return the lines on weights that arrive, and the part of their copies that a run waits for."""
    found = record.weights
    if found is None:
        return []
    whole = sum(arrival.bytes for arrival in found.arrivals)
    parts = [f"{in_units(whole)} in {counted(len(found.arrivals), 'group')}"] if whole else []
    parts += [f"{in_units(found.rows)} of rows that are looked up"] if found.rows else []
    parts += [f"{in_units(found.chosen)} of experts that are chosen, at most"] if found.chosen else []
    each = "token" if record.kind == DECODE_STEP else record.kind
    lines = [f"weights on the host: each {each} brings {' and '.join(parts)}"]
    if whole:
        takes, waits = whole / LINK, record.exposed_seconds(LINK, RATE)
        exposed = [a for a in found.arrivals if a.exposed(LINK, RATE) > 0]
        lines.append(
            f"  a link of {LINK / 1e9:.0f} GB/s takes {takes:.2g} s for that; at {RATE / 1e12:.0f} TFLOP/s {waits:.2g} "
            f"s of it are not hidden behind compute, of {counted(len(exposed), 'group')}"
        )
    return lines


def _own_lines(record: Record) -> list[str]:
    if not record.own_rows:
        return []
    own, of = own_share(record)
    parts = f"{counted(len(record.own_rows), 'part')} of larger values, windows of a cache say"
    return [f"{parts}, kept without the rest: {in_units(own)} of {in_units(of)}"]


def _at_most(lines: list[str]) -> list[str]:
    return lines if len(lines) <= MOST else [*lines[: MOST - 1], f"  and {len(lines) - MOST + 1} more"]
