"""Groups of identical loops, and of operators with the same reason, as data for the text and the table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from mom_compile.report.stages import StageReport
from mom_compile.report.units import counted, in_units
from mom_passes.ops.convolution import LAST_ROWS


@dataclass(frozen=True)
class LoopGroup:
    """Loops that read the same in a report, with their `names`. `sees` says what their attentions see and what else
    they do; `rows` tokens at a time take `takes` bytes, and each token leaves `leaves` bytes at full length."""

    sees: str
    rows: int
    takes: int
    leaves: int
    names: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        return len(self.names)

    @property
    def ranges(self) -> str:
        return ", ".join(_ranges(self.names))


def loop_groups(stages: Sequence[StageReport]) -> list[LoopGroup]:
    """Return the groups, in the order of their first loops. Bytes are compared as printed; a group has its first
    loop's."""
    alike: dict[tuple[str, int, str, str], LoopGroup] = {}
    for stage in stages:
        own = LoopGroup(_what(stage), stage.mini_seq_len, stage.iteration_bytes, stage.stored_per_token)
        key = (own.sees, own.rows, in_units(own.takes), in_units(own.leaves))
        group = alike.get(key, own)
        alike[key] = replace(group, names=(*group.names, stage.name))
    return list(alike.values())


def _what(stage: StageReport) -> str:
    experts = f", experts with {stage.mini_seq_len / stage.spread:.0f} rows each" if stage.spread > 1 else ""
    kept = sum(fold.operator is LAST_ROWS for fold in stage.folds)
    counts = ((len(stage.folds) - kept, "reduction"), (kept, "final value"))
    returned = "".join(f", {counted(count, what)}" for count, what in counts if count)
    return f"{stage.attention or 'no attention'}{experts}{returned}"


def _ranges(names: Sequence[str]) -> list[str]:
    """Return `stage_1, stage_2, stage_3, stage_5` as `stage_1-3, 5`; names that do not end in numbers unchanged."""
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


def by_reason(left_out: Mapping[str, str], source_lines: Mapping[str, str]) -> list[tuple[int, str, str]]:
    """How many, which operator, and why, for operators that were left out. The reason names the first one's line."""
    names: dict[tuple[str, str], list[str]] = {}
    for name, reason in left_out.items():
        names.setdefault((name.partition(" ")[0].removesuffix(".default"), reason), []).append(name)
    return [
        (len(found), operator, f"{reason}{first_line(source_lines, found)}")
        for (operator, reason), found in names.items()
    ]


def first_line(source_lines: Mapping[str, str], names: Sequence[str]) -> str:
    """Return `, at` and the user's line, the first one of several; nothing if none is known."""
    lines = dict.fromkeys(source_lines[name] for name in names if name in source_lines)
    at = "at" if len(lines) == 1 else "first at"
    return f", {at} {next(iter(lines))}" if lines else ""
