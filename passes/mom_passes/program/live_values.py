"""Which full-length values are alive while each loop of a rewritten graph runs. An analysis; the program must agree.

Terms
-----
storage    What a value occupies. A view shares that of its base; an output that takes over an operand shares that of
           the operand. Each storage is counted once, under the name of the value written there first.
alive      Made before the loop or by it, and read by it, by something later or by the graph's output.

Inputs and parameters are the caller's and are not listed. Neither is what is on the host, nor what lives for one
iteration. Rows that were copied to a storage of their own are listed, though they are no longer one per token.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx

from mom_passes.graph.sizes import count_hint, hint
from mom_passes.loops.loop import Loop, loop_nodes
from mom_passes.loops.ports import Stored
from mom_passes.ops.rows import COPY_ROWS
from mom_passes.ops.transfers import APPEND, OFFLOAD
from mom_passes.rules.views import relabels


@dataclass(frozen=True)
class LiveValue:
    """A value at full length, with the bytes it takes at the captured sizes. Rows of their own have none per token."""

    name: str
    bytes: int
    bytes_per_token: int


def live_values(gm: fx.GraphModule) -> dict[str, tuple[LiveValue, ...]]:
    """For each loop, by name, the values of its length that are alive while it runs."""
    loops = {node: module.loop for node, module in loop_nodes(gm)}
    storages = _storages(gm, loops)
    position = {node: i for i, node in enumerate(gm.graph.nodes)}
    first, last = _lives(storages, position)
    found = {}
    for node, loop in loops.items():
        tokens = max(1, hint(loop.length))
        items = {user for user in node.users if user.target is operator.getitem}
        after = position[node] + len(items)
        alive = [s for s in first if first[s] <= after and last[s] >= position[node]]
        values = [_value(s, loops, tokens) for s in alive]
        own = {s.name for s in alive if s.target is COPY_ROWS}
        found[str(node.target)] = tuple(v for v in values if v.bytes_per_token > 0 or v.name in own)
    return found


def _value(storage: fx.Node, loops: dict[fx.Node, Loop], tokens: int) -> LiveValue:
    """With bytes per token of its own: `hidden[:, :-1]` has one fewer than a loop over all; 0 if it has no tokens."""
    value = storage.meta["val"]
    size = count_hint(value.shape) * value.element_size()
    source = storage.args[0] if storage.target is operator.getitem else None
    if isinstance(source, fx.Node) and source in loops:
        loop, index = loops[source], storage.args[1]
        own = hint(loop.length) if isinstance(loop.outputs[index], Stored) else 0  # type: ignore[index]
    else:
        own = tokens if tokens in [hint(n) for n in value.shape] else 0
    return LiveValue(storage.name, size, size // own if own else 0)


def _storages(gm: fx.GraphModule, loops: dict[fx.Node, Loop]) -> dict[fx.Node, fx.Node]:
    """Tensor -> the value whose storage it shares (itself, mostly)."""
    base: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        if node.op != "call_function" or not isinstance(node.meta.get("val"), torch.Tensor):
            continue
        if node.target in (OFFLOAD, APPEND):
            continue
        source = node.args[0] if node.args else None
        if node.target is operator.getitem and source in loops:
            over = loops[source].overwritten_by(node)
            base[node] = node if over is None else base[over]
        elif relabels(node) and isinstance(source, fx.Node):
            if source in base:
                base[node] = base[source]
        else:
            base[node] = node
    return base


def _lives(
    storages: dict[fx.Node, fx.Node], position: dict[fx.Node, int]
) -> tuple[dict[fx.Node, int], dict[fx.Node, int]]:
    """Of each storage: where it is made, and where it is read last."""
    first: dict[fx.Node, int] = {}
    last: dict[fx.Node, int] = {}
    for value, storage in storages.items():
        first.setdefault(storage, position[value])
        reads = [position[user] for user in value.users]
        last[storage] = max([last.get(storage, 0), position[value], *reads])
    return first, last
