"""What the expected peak is made of: the storages that are alive at that moment, by purpose."""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import fx

from mom_compile.report.stages import live_value
from mom_passes.loops.loop import Loop
from mom_passes.ops.rows import COPY_ROWS
from mom_passes.ops.transfers import FETCH_CHOSEN
from mom_passes.program.memory import Memory, Moment
from mom_passes.program.program import LoopStep, Storage
from mom_passes.program.rewritten import Rewritten

CACHE = "keys and values that a cache keeps"
IN_USE = "keys and values in use"
RETURNED = "results that are returned"
HIDDEN = "hidden states"
OTHER = "values without tokens, made once"
WEIGHTS = "weights on the way"
BETWEEN = "what is computed between loops"


@dataclass(frozen=True)
class Share:
    what: str
    bytes: int


def shares(rewritten: Rewritten, keys_and_values: Collection[str]) -> tuple[Share, ...]:
    """Return the bytes at the peak by purpose, the largest first. `keys_and_values` names what attentions read."""
    found = rewritten.memory
    if not found.moments:
        return ()
    moment, outputs = found.highest, set(rewritten.plan.outputs)
    returned = {storage for node, storage in rewritten.plan.storages.items() if node in outputs}
    made_by = {m.step.node: m.step.loop for m in found.moments if isinstance(m.step, LoopStep)}
    total = {_own(moment): found.number(moment.own)}
    for storage in moment.alive:
        is_kv = _stored_as(storage.node, made_by) in keys_and_values
        is_weight = storage.node in rewritten.arriving or storage.node.target is FETCH_CHOSEN
        what = WEIGHTS if is_weight else _purpose(storage, moment, found, is_kv=is_kv, is_returned=storage in returned)
        total[what] = total.get(what, 0) + found.number(storage.bytes)
    made = [Share(what, size) for what, size in total.items() if size]
    return tuple(sorted(made, key=lambda share: -share.bytes))


def _own(moment: Moment) -> str:
    return "one mini-sequence's own values" if isinstance(moment.step, LoopStep) else BETWEEN


def _purpose(storage: Storage, moment: Moment, found: Memory, *, is_kv: bool, is_returned: bool) -> str:
    if is_kv:
        return CACHE if is_returned else IN_USE
    if is_returned:
        return RETURNED
    if isinstance(moment.step, LoopStep) and live_value(storage, moment.step.loop, found) is None:
        return OTHER
    return HIDDEN


def _stored_as(node: fx.Node, made_by: Mapping[fx.Node, Loop]) -> str:
    """Return the name that a value had before loops; copies and cuts of a value have its name."""
    while node.target is COPY_ROWS or getattr(node.target, "is_view", False):
        node = node.args[0]  # type: ignore[assignment]
    loop = made_by.get(node.args[0]) if node.target is operator.getitem else None  # type: ignore[arg-type]
    return node.name if loop is None else loop.outputs[node.args[1]].name  # type: ignore[index]
