"""The complete report: every stage, every value at full length, every operator that was left out."""

from __future__ import annotations

import sympy

from mom_compile.report.record import Record, host_share, moved_rows, own_share
from mom_compile.report.stages import StageReport
from mom_compile.report.units import in_units
from mom_passes.ops.convolution import LAST_ROWS
from mom_passes.program.program import LoopStep


def details(record: Record) -> list[str]:
    """Return the lines of the complete report."""
    if record.fallback is not None:
        verdict = "failed, so it went" if record.failed else "went"
        lines = [f"{record.kind}, graph of {record.nodes} nodes: {verdict} to stock Inductor: {record.fallback}"]
        return lines + _kv_lines(record) + _own_lines(record) + eager_lines(record)
    lines = [*_head(record), *([record.refused] if record.refused else [])]
    if record.rows:
        lines.append(f"mini-sequences: {record.rows}")
    for stage in record.stages:
        lines += _stage_lines(stage)
    if record.left_out:
        lines.append("on the full sequence, between loops:")
        lines += [f"  {name}: {reason}{_at(record, name)}" for name, reason in record.left_out.items()]
    lines += _kv_lines(record) + _weight_lines(record) + communication_lines(record)
    lines += _own_lines(record) + eager_lines(record)
    if record.compiled_pieces or record.bodies_shared:
        compiled = f"{len(record.compiled_pieces)} pieces compiled in {record.compile_seconds:.1f} s"
        kept = "; the graph is from the compile cache" if record.from_cache else ""
        lines.append(f"{compiled}, {record.bodies_shared} shared{kept}")
    return lines


def _head(record: Record) -> list[str]:
    what = f"{record.kind}, graph of {record.nodes} nodes"
    if record.no_loops is not None:
        return [f"{what}; no loops: {record.no_loops}"]
    lines = [f"{what}; tokens: {record.token_dimension}; {len(record.stages)} loops"]
    lines.append(f"full-length values take at most {record.floor_bytes_per_token} B/token at a time")
    return lines + _peak_lines(record)


def _peak_lines(record: Record) -> list[str]:
    """Return the peak at the captured sizes and, if some are symbols, as an expression in them."""
    if record.memory is None:
        return []
    moment = record.memory.highest
    where = f"in {moment.step.name}" if isinstance(moment.step, LoopStep) else f"between loops, in {moment.step.name}"
    lines = [f"expected peak of {record.tokens} tokens: {in_units(record.expected_peak_bytes)}, {where}"]
    formula = sympy.expand(moment.bytes)
    return [*lines, f"  in bytes: {formula}"] if formula.free_symbols else lines


def _stage_lines(stage: StageReport) -> list[str]:
    most = sorted(stage.operators.items(), key=lambda item: -item[1])
    shown = ", ".join(f"{name} x{count}" for name, count in most[:6])
    lines = [f"  {stage.name}: {stage.length} tokens in mini-sequences of {stage.mini_seq_len}; {shown}"]
    if stage.spread > 1:
        rows = stage.mini_seq_len / stage.spread
        lines.append(f"    experts: {rows:.0f} rows to a product, a row for every {stage.spread:g} tokens")
    for output, size in zip(stage.crossing, stage.bytes_per_token, strict=True):
        shape = ", ".join(str(s) for s in output.type.shape)
        place = "" if output.over is None else ", written over an operand"
        lines.append(
            f"    at full length: {output.name} [{shape}] {output.type.dtype}, "
            f"tokens in {output.dim}: {size} B/token{place}"
        )
    for fold in stage.folds:
        how = "last rows" if fold.operator is LAST_ROWS else "reduced in the loop"
        lines.append(f"    {how}: {fold.name} ({fold.operator})")
    alive = ", ".join(f"{value.name} {value.bytes_per_token}" for value in stage.live if value.bytes_per_token)
    lines.append(f"    alive meanwhile, in B/token: {alive}")
    if stage.made_once:
        lines.append(f"    made once before it, without tokens (dequantised weights, say): {in_units(stage.made_once)}")
    own = sum(value.bytes for value in stage.live if not value.bytes_per_token)
    if own:
        lines.append(f"    rows of their own meanwhile: {in_units(own)}")
    return lines


def _kv_lines(record: Record) -> list[str]:
    lines = [
        f"keys or values left on the device: {name}: {reason}{_at(record, name)}"
        for name, reason in record.on_device.items()
    ]
    share = host_share(record)
    if share is not None:
        layers, size = share
        lines.append(f"to the host: {moved_rows(record)} of {layers} layers, {size} B/token")
    return lines


def _weight_lines(record: Record) -> list[str]:
    if record.weights is None:
        return []
    return [
        f"arrives from the host: {in_units(arrival.bytes)}, hidden behind {2 * arrival.work_before / 1e9:.3g} GFLOP: "
        f"{', '.join(arrival.names)}"
        for arrival in record.weights.arrivals
    ]


def _own_lines(record: Record) -> list[str]:
    if not record.own_rows:
        return []
    own, of = own_share(record)
    names = [f"{rows.name} of {rows.base}" for rows in record.own_rows[:4]]
    names += ["..."] if len(record.own_rows) > len(names) else []
    return [f"rows of their own: {len(record.own_rows)} parts ({', '.join(names)}), {in_units(own)} of {in_units(of)}"]


def communication_lines(record: Record) -> list[str]:
    """Return the line on collectives, if the graph has any."""
    return [] if record.communication is None else [str(record.communication)]


def eager_lines(record: Record) -> list[str]:
    pieces = record.eager_pieces.items()
    return [f"{record.located(name)} runs eagerly, Inductor could not compile it: {why}" for name, why in pieces]


def _at(record: Record, name: str) -> str:
    line = record.source_lines.get(name)
    return "" if line is None else f", at {line}"
