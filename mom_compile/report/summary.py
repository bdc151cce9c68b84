"""A graph's story for people: what was saved, what is left, which loops there are, and what was left alone and why.

    prefill of 2733 tokens: expected peak 51 MiB, 173 MiB without loops (beside weights and inputs)
    largest then: keys and values that a cache keeps 30 MiB, one mini-sequence's own values 9.4 MiB, ...
    18 loops over mini-sequences, alike ones in one line:
       1 x  no attention: 512 tokens at a time take 2.0 MiB; a token leaves 4.5 KiB (stage_0)
      15 x  attention to a window of 512 tokens: 512 tokens at a time take 9.4 MiB; ... (stage_1-5, 7-11, 13-17)
       2 x  attention to all tokens: ...
"""

from __future__ import annotations

from collections.abc import Sequence

from mom_compile.report.details import eager_lines
from mom_compile.report.record import DECODE_STEP, Record, host_share, moved_rows, own_share
from mom_compile.report.stages import StageReport
from mom_compile.report.units import counted, in_units

#: The most lines that loops, operators or reasons of one kind take.
MOST = 8
#: A share of the peak that is not worth a mention, as a part of the largest.
_SMALL = 0.02


def summary(record: Record) -> list[str]:
    """Lines."""
    if record.fallback is not None:
        return [_left_alone(record), *_kv_lines(record), *_own_lines(record), *eager_lines(record)]
    lines = [*_saved(record), *([record.refused] if record.refused else [])]
    if record.stages:
        lines += _loop_lines(record.stages, record.rows)
    if record.left_out:
        lines += _left_out(record.left_out)
    return lines + _kv_lines(record) + _weight_lines(record) + _own_lines(record) + eager_lines(record)


def _left_alone(record: Record) -> str:
    if record.failed:
        return f"{record.kind}: failed here, so stock Inductor compiles it as it is: {record.fallback}"
    return f"{record.kind}, left to stock Inductor: {_in_words(record, record.fallback)}"


def _in_words(record: Record, reason: str | None) -> str:
    if record.kind == DECODE_STEP and reason is not None and reason.startswith(DECODE_STEP):
        return "it computes one token for each sequence, and one token cannot be cut into shorter runs"
    return str(reason)


def _saved(record: Record) -> list[str]:
    tokens = f" of {record.tokens} tokens" if record.stages else ""
    without = record.peak_without_loops
    saved = "" if without is None else f", {in_units(without)} without loops"
    peak = in_units(record.expected_peak_bytes)
    lines = [f"{record.kind}{tokens}: expected peak {peak}{saved} (beside weights and inputs)"]
    if record.no_loops is not None:
        lines.append(f"no loops: {_in_words(record, record.no_loops)}")
    if record.peak:
        least = _SMALL * record.peak[0].bytes
        parts = [f"{share.what} {in_units(share.bytes)}" for share in record.peak if share.bytes >= least]
        lines.append(f"largest then: {', '.join(parts)}")
    return lines


def _loop_lines(stages: Sequence[StageReport], rows: str) -> list[str]:
    alike: dict[str, list[str]] = {}
    for stage in stages:
        alike.setdefault(_in_a_line(stage), []).append(stage.name)
    merged = ", alike ones in one line" if len(alike) < len(stages) else ""
    lines = [f"  {len(names):2} x  {text} ({', '.join(_ranges(names))})" for text, names in alike.items()]
    why = [f"  {rows}"] if rows else []
    return [f"{counted(len(stages), 'loop')} over mini-sequences{merged}:", *_at_most(lines), *why]


def _in_a_line(stage: StageReport) -> str:
    """What tells loops apart for a user."""
    experts = f", experts with {stage.mini_seq_len / stage.spread:.0f} rows each" if stage.spread > 1 else ""
    reduced = f", {counted(len(stage.folds), 'reduction')}" if stage.folds else ""
    leaves = f"; a token leaves {in_units(stage.stored_per_token)}" if stage.stored_per_token else ""
    own = f"{stage.mini_seq_len} tokens at a time take {in_units(stage.iteration_bytes)}"
    return f"{stage.attention or 'no attention'}{experts}{reduced}: {own}{leaves}"


def _ranges(names: Sequence[str]) -> list[str]:
    """`stage_1, stage_2, stage_3, stage_5` as `stage_1-3, 5`; names that do not end in numbers as they are."""
    numbers = [name.rpartition("_")[2] for name in names]
    if not all(number.isdigit() for number in numbers):
        return list(names)
    runs: list[list[int]] = []
    for number in map(int, numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    texts = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return [f"{names[0].rpartition('_')[0]}_{texts[0]}", *texts[1:]]


def _left_out(left_out: dict[str, str]) -> list[str]:
    """Operators with one reason once, with how many there are."""
    counts: dict[tuple[str, str], int] = {}
    for name, reason in left_out.items():
        key = (name.partition(" ")[0].removesuffix(".default"), reason)
        counts[key] = counts.get(key, 0) + 1
    lines = [f"  {count:2} x  {name}: {reason}" for (name, reason), count in counts.items()]
    return ["on the full sequence, between loops:", *_at_most(lines)]


def _kv_lines(record: Record) -> list[str]:
    names: dict[str, list[str]] = {}
    for name, reason in record.on_device.items():
        names.setdefault(reason, []).append(name)
    lines = [f"{len(found)} keys or values stay on the device: {reason}" for reason, found in names.items()]
    lines = _at_most(lines)
    share = host_share(record)
    if share is not None:
        layers, size = share
        lines.append(f"to the host: {moved_rows(record)} of {counted(layers, 'layer')}, {in_units(size)} a token")
    return lines


#: What a link is compared with: a PCIe 4.0 x16 carries 25 GB/s of its 32, and a device that computes 100 TFLOP/s in 16
#: bits is a middling one.
LINK, RATE = 25e9, 100e12


def _weight_lines(record: Record) -> list[str]:
    """What arrives of weights, and what of that a run would wait for."""
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
