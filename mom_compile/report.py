"""What was done to a graph and what was not, and why."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from pathlib import Path

import sympy
from torch import fx

from mom_compile.timeline import draw_timeline
from mom_passes.graph.sizes import hint
from mom_passes.graph.values import tensors_of
from mom_passes.host.kv_offload import KVOffload
from mom_passes.loops.loop import Loop, loops
from mom_passes.loops.ports import Final, Stored
from mom_passes.ops.rows import COPY_ROWS
from mom_passes.program.memory import Memory, Moment
from mom_passes.program.own_rows import OwnRows
from mom_passes.program.program import Call, Compute, LoopStep, Storage, Transfer
from mom_passes.program.rewritten import Rewritten


@dataclass(frozen=True)
class LiveValue:
    """A value at full length, with the bytes it takes at the captured sizes. Rows of their own have none per token."""

    name: str
    bytes: int
    bytes_per_token: int


@dataclass(frozen=True)
class StageReport:
    """One loop: where its tokens are, what it stores at full length, and what it runs.

    `spread` is how many of its tokens give each expert a row, 1 without experts.
    `live` is every full-length value that is alive while it runs, `made_once` the bytes of those that have no tokens,
    weights that were dequantised before it, say, `folds` the reductions over tokens that leave it,
    `iteration_bytes` what one mini-sequence holds beside them.
    """

    name: str
    length: str
    mini_seq_len: int
    crossing: tuple[Stored, ...]
    bytes_per_token: tuple[int, ...]
    operators: dict[str, int]
    folds: tuple[Final, ...]
    live: tuple[LiveValue, ...]
    iteration_bytes: int
    spread: float = 1
    made_once: int = 0


@dataclass(frozen=True)
class KVReport:
    """Keys or values of one layer that leave for the host: all rows or, with a past, only the new ones.

    `bytes_per_token` is what each token of it takes on the host instead of on the device.
    """

    name: str
    layer: int
    bytes_per_token: int
    has_past: bool


@dataclass(frozen=True)
class PassReport:
    name: str
    seconds: float
    change: str


@dataclass
class Report:
    """The story of one captured graph. `str(report)` prints it.

    fallback       why the graph went to stock Inductor unchanged, or None
    failed         whether that reason was a failure of ours rather than a decision
    stages         the loops, in the order they run
    left_out       operator -> why it runs on the full sequence
    no_loops       why nothing runs over mini-sequences although the graph is ours, or None
    tokens         how many tokens the longest loop had when it was captured
    memory         what the program needs, step by step, as expressions in the sizes of the graph
    on_host        keys and values that leave for the host
    on_device      keys and values that stay on the device, by name, with the reason
    own_rows       outputs, windows of a cache say, whose rows were copied out of a larger value that then goes
    eager_pieces   pieces that Inductor could not compile and that run eagerly, with its error
    work           multiply-adds of all matrix products and attentions, at the captured sizes
    work_outside   those of them that run on the full sequence, by operator as in `left_out`
    layer_pieces   into how many pieces a graph without loops was cut, so that its layers share them; 0: it stayed whole
    compiled_pieces  the loop bodies and straight pieces that were compiled for this graph; the others were shared
    """

    nodes: int = 0
    fallback: str | None = None
    failed: bool = False
    token_dimension: str = ""
    stages: list[StageReport] = field(default_factory=list)
    passes: list[PassReport] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    no_loops: str | None = None
    tokens: int = 0
    memory: Memory | None = None
    on_host: list[KVReport] = field(default_factory=list)
    on_device: dict[str, str] = field(default_factory=dict)
    own_rows: list[OwnRows] = field(default_factory=list)
    eager_pieces: dict[str, str] = field(default_factory=dict)
    compiled_pieces: list[str] = field(default_factory=list)
    work: int = 0
    work_outside: dict[str, int] = field(default_factory=dict)
    bodies_shared: int = 0
    compile_seconds: float = 0.0
    layer_pieces: int = 0
    graph: fx.GraphModule | None = None

    def describe(self, rewritten: Rewritten) -> None:
        self.graph, self.memory, self.no_loops = rewritten.gm, rewritten.memory, rewritten.no_loops
        moments = [moment for moment in self.memory.moments if isinstance(moment.step, LoopStep)]
        self.stages = [_stage_report(moment, self.memory) for moment in moments]
        self.tokens = self.memory.tokens

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
    def floor_bytes(self) -> int:
        """The least a run needs, at the captured sizes: the full-length values of the stage that has most of them."""
        return max((sum(value.bytes for value in stage.live) for stage in self.stages), default=0)

    @property
    def iteration_bytes(self) -> int:
        """What one mini-sequence is expected to hold beside full-length values, at the captured sizes."""
        return max((stage.iteration_bytes for stage in self.stages), default=0)

    @property
    def straight_bytes(self) -> int:
        """The most that is alive between loops, at the captured sizes."""
        return self.memory.most(Compute, Call, Transfer) if self.memory is not None else 0

    @property
    def expected_peak_bytes(self) -> int:
        """What a run is expected to take above its inputs, at the captured sizes: in a loop or between two.

        An estimate: kernels need memory of their own beside it, and Inductor may get by with less.
        """
        return self.memory.most(LoopStep, Compute, Call, Transfer) if self.memory is not None else 0

    @property
    def floor_bytes_per_token(self) -> int:
        return max((sum(value.bytes_per_token for value in stage.live) for stage in self.stages), default=0)

    @property
    def full_length_values(self) -> list[str]:
        """Names of all values that live at full length, stage by stage."""
        return [output.name for stage in self.stages for output in stage.crossing]

    @property
    def headline(self) -> str:
        """The graph in a line, for the log: what it became and is expected to take, or why it was left alone."""
        if self.fallback is not None:
            cut = f" in {self.layer_pieces} pieces by layers" if self.layer_pieces else ""
            return f"stock Inductor{cut}: {self.fallback}"
        what = f"prefill, {len(self.stages)} loops, " if self.no_loops is None else f"{self.no_loops}; "
        moved = f"{_moved_rows(self)} to the host, " if self.on_host else ""
        return f"{what}{moved}expected peak {_mib(self.expected_peak_bytes)}"

    def plot(self, path: str | Path) -> None:
        """Draw what the program is expected to take, step by step, to an image file. Needs matplotlib.

        Raises `ValueError` for a graph that went to stock Inductor: there is no program of ours.
        """
        if self.memory is None or not self.memory.moments:
            raise ValueError(f"nothing to draw: {self.fallback or 'the graph has no program'}")
        draw_timeline(self.memory, Path(path))

    def code(self) -> str:
        """The rewritten graph as readable Python, bodies included."""
        if self.graph is None:
            return ""
        parts = [self.graph.print_readable(print_output=False)]
        for name, loop in loops(self.graph):
            parts.append(f"# the body of {name}\n{loop.body.code.strip()}")
        return "\n\n".join(parts)

    def __str__(self) -> str:
        if self.fallback is not None:
            verdict = "failed, so it went" if self.failed else "went"
            lines = [f"graph of {self.nodes} nodes: {verdict} to stock Inductor: {self.fallback}"]
            return "\n".join(lines + _kv_lines(self) + _own_lines(self) + _eager_lines(self))
        if self.no_loops is None:
            lines = [f"graph of {self.nodes} nodes; tokens: {self.token_dimension}; {len(self.stages)} loops"]
            lines.append(f"full-length values take at most {self.floor_bytes_per_token} B/token at a time")
            lines += _peak_lines(self)
        else:
            lines = [f"graph of {self.nodes} nodes; no loops: {self.no_loops}"]
        for stage in self.stages:
            lines += _stage_lines(stage)
        if self.left_out:
            lines.append("on the full sequence, between loops:")
            lines += [f"  {name}: {reason}" for name, reason in self.left_out.items()]
        lines += _kv_lines(self)
        lines += _own_lines(self)
        lines += _eager_lines(self)
        if self.compiled_pieces or self.bodies_shared:
            lines.append(
                f"{len(self.compiled_pieces)} pieces compiled in {self.compile_seconds:.1f} s, "
                f"{self.bodies_shared} shared"
            )
        return "\n".join(lines)


def _peak_lines(report: Report) -> list[str]:
    """At the captured sizes and, where some are symbols, as an expression in them."""
    if report.memory is None:
        return []
    moment = report.memory.highest
    where = f"in {moment.step.name}" if isinstance(moment.step, LoopStep) else f"between loops, in {moment.step.name}"
    lines = [f"expected peak of {report.tokens} tokens: {_mib(report.expected_peak_bytes)}, {where}"]
    formula = sympy.expand(moment.bytes)
    return [*lines, f"  in bytes: {formula}"] if formula.free_symbols else lines


def _stage_report(moment: Moment, found: Memory) -> StageReport:
    assert isinstance(moment.step, LoopStep)
    loop = moment.step.loop
    operators: dict[str, int] = {}
    for node in loop.body.graph.nodes:
        if node.op == "call_function":
            operator_name = str(node.target).removesuffix(".default")
            operators[operator_name] = operators.get(operator_name, 0) + 1
    live = [_live_value(storage, loop, found) for storage in moment.alive]
    return StageReport(
        moment.step.name,
        str(loop.length),
        loop.rows,
        loop.stored,
        tuple(o.type.bytes // max(1, hint(loop.length)) for o in loop.stored),
        operators,
        loop.finals,
        tuple(value for value in live if value is not None),
        found.number(moment.own),
        loop.spread,
        sum(found.number(storage.bytes) for storage, value in zip(moment.alive, live, strict=True) if value is None),
    )


def _live_value(storage: Storage, loop: Loop, found: Memory) -> LiveValue | None:
    """What is alive while a loop runs and has tokens, or rows of its own; None for anything else.

    With bytes per token of its own: `hidden[:, :-1]` has one fewer than a loop over all.
    """
    size, tokens, node = found.number(storage.bytes), max(1, hint(loop.length)), storage.node
    source = node.args[0] if node.target is operator.getitem else None
    made_by = next((m.step.loop for m in found.moments if isinstance(m.step, LoopStep) and m.step.node is source), None)
    if made_by is not None:
        output = made_by.outputs[node.args[1]]  # type: ignore[index]
        own = hint(made_by.length) if isinstance(output, Stored) else 0
    else:
        own = tokens if any(tokens in [hint(n) for n in value.shape] for value in tensors_of(node)) else 0
    if not own and node.target is not COPY_ROWS:
        return None
    return LiveValue(node.name, size, size // own if own else 0)


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
    lines += [f"    reduced in the loop: {fold.name} ({fold.operator})" for fold in stage.folds]
    alive = ", ".join(f"{value.name} {value.bytes_per_token}" for value in stage.live if value.bytes_per_token)
    lines.append(f"    alive meanwhile, in B/token: {alive}")
    if stage.made_once:
        lines.append(f"    made once before it, without tokens (dequantised weights, say): {stage.made_once} B")
    own = sum(value.bytes for value in stage.live if not value.bytes_per_token)
    if own:
        lines.append(f"    rows of their own meanwhile: {own} B")
    return lines


def _kv_lines(report: Report) -> list[str]:
    lines = [f"keys or values left on the device: {name}: {reason}" for name, reason in report.on_device.items()]
    if report.on_host and report.fallback is None:
        layers = len({value.layer for value in report.on_host})
        size = sum(value.bytes_per_token for value in report.on_host)
        lines.append(f"to the host: {_moved_rows(report)} of {layers} layers, {size} B/token")
    return lines


def _moved_rows(report: Report) -> str:
    rows = "new rows" if all(value.has_past for value in report.on_host) else "rows"
    return f"{rows} of {len(report.on_host)} keys and values"


def _mib(size: int) -> str:
    mib = size / 2**20
    return f"{mib:.0f} MiB" if mib >= 10 else f"{mib:.1f} MiB"


def _own_lines(report: Report) -> list[str]:
    if not report.own_rows:
        return []
    own, of = sum(rows.bytes for rows in report.own_rows), sum(rows.base_bytes for rows in report.own_rows)
    names = [f"{rows.name} of {rows.base}" for rows in report.own_rows[:4]]
    names += ["..."] if len(report.own_rows) > len(names) else []
    return [f"rows of their own: {len(report.own_rows)} parts ({', '.join(names)}), {own} B of {of} B"]


def _eager_lines(report: Report) -> list[str]:
    return [f"{name} runs eagerly, Inductor could not compile it: {why}" for name, why in report.eager_pieces.items()]
