"""The report on one loop: its tokens, what it stores at full length, what it runs, and what is alive while it runs."""

from __future__ import annotations

import operator
from dataclasses import dataclass

from torch import fx

from mom_passes.graph.arguments import argument
from mom_passes.graph.sizes import hint
from mom_passes.graph.values import tensors_of
from mom_passes.loops.loop import Loop
from mom_passes.loops.ports import CarryOut, Stored
from mom_passes.ops.attention import MOM_ATTENTION
from mom_passes.ops.rows import COPY_ROWS
from mom_passes.program.memory import Memory, Moment
from mom_passes.program.program import LoopStep, Storage


@dataclass(frozen=True)
class LiveValue:
    """A value at full length, with its bytes at the captured sizes. Copied rows have no bytes per token."""

    name: str
    bytes: int
    bytes_per_token: int


@dataclass(frozen=True)
class StageReport:
    """One loop: its tokens, what it stores at full length, and what it runs.

    `spread` is how many of its tokens give each expert a row, 1 without experts. `live` are the full-length values that
    are alive while it runs, `made_once` the bytes of those without tokens, such as dequantised weights, `folds` the
    reductions over tokens and the last rows that it returns, `iteration_bytes` the bytes of one mini-sequence besides
    these. `attention` says what its attentions see.
    """

    name: str
    length: str
    mini_seq_len: int
    crossing: tuple[Stored, ...]
    bytes_per_token: tuple[int, ...]
    operators: dict[str, int]
    folds: tuple[CarryOut, ...]
    live: tuple[LiveValue, ...]
    iteration_bytes: int
    spread: float = 1
    made_once: int = 0
    attention: str = ""

    @property
    def stored_per_token(self) -> int:
        """Bytes per token that it stores at full length."""
        return sum(self.bytes_per_token)


def stage_report(moment: Moment, found: Memory) -> StageReport:
    assert isinstance(moment.step, LoopStep)
    loop = moment.step.loop
    operators: dict[str, int] = {}
    for node in loop.body.graph.nodes:
        if node.op == "call_function":
            operator_name = str(node.target).removesuffix(".default")
            operators[operator_name] = operators.get(operator_name, 0) + 1
    live = [live_value(storage, loop, found) for storage in moment.alive]
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
        _attention(loop.body.graph),
    )


def live_value(storage: Storage, loop: Loop, found: Memory) -> LiveValue | None:
    """Return a storage that is alive while a loop runs, if it has tokens or is a copy of rows; else None.

    Bytes per token count its own tokens: `hidden[:, :-1]` has one fewer than a loop over all.
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


def _attention(body: fx.Graph) -> str:
    """Return what the attentions of a loop see, in words, the shortest window first; empty without attention."""
    attentions = [node for node in body.nodes if node.target is MOM_ATTENTION]
    if not attentions:
        return ""
    packed = {n for n in attentions if argument(n, "first") is not None and argument(n, "window") is None}
    windows = {argument(node, "window") for node in attentions if node not in packed}
    seen = [f"a window of {window} tokens" for window in sorted(w for w in windows if w is not None)]
    seen += ["packed sequences of a mini-sequence"] * bool(packed) + ["all tokens"] * (None in windows)
    return "attention to " + " and ".join(seen)
