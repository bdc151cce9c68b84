"""Device memory of a program, step by step, as expressions in the sizes of its graph.

Terms
-----
moment    A step, with the storages that exist while it runs, and its scratch.
scratch   Of a piece: the peak bytes of its operators (see `held`). Of a loop: those of one mini-sequence, in `count`,
          its rows. Workspaces of kernels are included where operators state them.

    peak = maximum over the steps of (bytes of the device storages alive + scratch)

Inputs and parameters belong to the caller and do not count; host memory does not either.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import sympy
from torch import fx

from mom_passes.graph.meta import typed_value
from mom_passes.graph.sizes import expr, hint, product, symbol_hints
from mom_passes.graph.values import bytes_of, returned_values, value_of
from mom_passes.loops.body_parts import second_in_flight
from mom_passes.loops.loop import Loop
from mom_passes.loops.ports import COUNT, TensorType
from mom_passes.ops.transfers import OFFLOAD
from mom_passes.program.held import Costs, most_held
from mom_passes.program.lives import Lives, lives
from mom_passes.program.program import Compute, LoopStep, Place, Program, Step, Storage, Transfer
from mom_passes.program.schedule import schedule
from mom_passes.program.storages import bytes_of_value
from mom_passes.rules import facts


@dataclass(frozen=True, eq=False)
class Moment:
    """A step with the device storages that exist throughout it. The scratch of a loop is in `count`; its mini-sequences
    have at most `rows` of the loop's `length` tokens."""

    step: Step
    alive: tuple[Storage, ...]
    scratch: sympy.Expr
    rows: int = 0
    length: sympy.Expr = sympy.S.Zero

    @property
    def bytes(self) -> sympy.Expr:
        return sum((storage.bytes for storage in self.alive), self.own)

    @property
    def own(self) -> sympy.Expr:
        """The scratch at the number of rows of a mini-sequence."""
        return self.scratch.xreplace({COUNT: self.count}) if self.scratch != 0 else self.scratch

    @property
    def count(self) -> sympy.Expr:
        """The rows of the longest mini-sequence (see `split_rows`)."""
        return sympy.Min(self.length, self.rows) if self.rows else sympy.S.Zero


@dataclass(frozen=True, eq=False)
class Memory:
    """The moments of a program, in order, and its captured sizes."""

    moments: tuple[Moment, ...]
    hints: Mapping[sympy.Symbol, int]

    @property
    def peak(self) -> sympy.Expr:
        """Peak bytes above the inputs, for any sizes."""
        return sympy.Max(*dict.fromkeys(moment.bytes for moment in self.moments), evaluate=False)

    @property
    def tokens(self) -> int:
        """Tokens of the longest loop at capture; 0 without loops."""
        return max((self.number(moment.length) for moment in self.moments), default=0)

    def number(self, size: Any, sizes: Mapping[sympy.Symbol, int] | None = None) -> int:
        """The value of an expression at the captured sizes, updated by `sizes`."""
        return int(expr(size).xreplace({**self.hints, **(sizes or {})}).doit())

    @property
    def highest(self) -> Moment:
        """The moment of the peak, at the captured sizes."""
        return max(self.moments, key=lambda moment: self.number(moment.bytes))

    def most(self, *kinds: type, sizes: Mapping[sympy.Symbol, int] | None = None) -> int:
        """Peak bytes of the steps of some kinds; 0 if there are none."""
        chosen = (moment for moment in self.moments if isinstance(moment.step, kinds))
        return max((self.number(moment.bytes, sizes) for moment in chosen), default=0)


def memory(program: Program, *, fused: bool = True, device: str | None = None, everywhere: bool = False) -> Memory:
    """The memory of a program, step by step.

    Parameters
    ----------
    fused
        If False, count each operator of a piece as a kernel, as in eager mode.
    device
        The type of device to compute for, if not that of the capture.
    everywhere
        Take the peak of a piece over all sizes instead of the expression that is largest at the captured sizes.
    """
    found, hints = lives(program), symbol_hints(program.inputs)
    # Symbols have their captured values; a mini-sequence is compared at a usual length.
    known = {**hints, COUNT: sympy.Integer(128)}

    def number(size: sympy.Expr) -> int:
        return int(size.xreplace(known).doit())

    def own(node: fx.Node) -> sympy.Expr:
        scratch = facts(node).scratch
        return sympy.S.Zero if scratch is None else scratch(node, device or _device_of(node))

    costs = partial(Costs, number=number, own=own, fused=fused, device=device, everywhere=everywhere)
    moments = [_moment(program, found, i, costs) for i in range(len(program.steps))]
    return Memory(tuple(moments), hints)


def stock_peak(gm: fx.GraphModule, device: str | None = None) -> Memory:
    """The memory of a captured graph as stock Inductor compiles it: one piece without cuts. `device` as in `memory`."""
    return memory(schedule(gm), device=device, everywhere=True)


def _moment(program: Program, found: Lives, i: int, costs: Callable[..., Costs]) -> Moment:
    step = program.steps[i]
    alive = tuple(storage for storage in found.alive(i) if storage.place is Place.DEVICE)
    if isinstance(step, LoopStep):
        loop = step.loop
        return Moment(step, alive, _iteration(loop, costs(_typed_bytes)), loop.rows, expr(loop.length))
    if not isinstance(step, Compute):
        return Moment(step, alive, sympy.Integer(0))
    # Values that the piece makes, and those that die in it, are counted operator by operator.
    made = {storage for storage in alive if found.first_of[storage] == i}
    dying = {storage: node for node in step.ins if (storage := program.storages.get(node)) in alive}
    dying = {storage: node for storage, node in dying.items() if found.last_of[storage] == i}
    kept = set(step.outs)
    held = most_held(step.nodes, dying.values(), kept.__contains__, costs(bytes_of_value))
    return Moment(step, tuple(storage for storage in alive if storage not in made and storage not in dying), held)


def _iteration(loop: Loop, costs: Costs) -> sympy.Expr:
    """Peak bytes of one mini-sequence, in `count`. Stored rows are written to their storage as they are computed."""
    nodes = [node for node in loop.body.graph.nodes if node.op == "call_function"]
    stored = [value for value in returned_values(loop.body.graph) if isinstance(value, fx.Node)]
    held = most_held(nodes, (), lambda node: False, costs, stored)
    return held + second_in_flight(loop) if loop.in_flight > 1 else held


def _device_of(node: fx.Node) -> str:
    """The type of device of an operator's first operand, in a body or in a graph."""
    return str(typed_value(node.all_input_nodes[0]).device.type)


def _typed_bytes(node: fx.Node) -> sympy.Expr:
    type = node.meta.get("type")
    types = type if isinstance(type, tuple) else (type,)
    sizes = (expr(product(t.shape)) * t.dtype.itemsize for t in types if isinstance(t, TensorType))
    return sum(sizes, sympy.Integer(0))


@dataclass(frozen=True)
class Leaving:
    """A value that may be offloaded whole; each run decides whether it is.

    `layer` numbers the attention that reads it; `bytes_per_token` is at the captured sizes.
    """

    layer: int
    bytes_per_token: int


def leaving(program: Program) -> dict[fx.Node, Leaving]:
    """The values that may be offloaded whole, by their `offload` nodes."""
    found = {}
    for step in program.steps:
        if isinstance(step, Transfer) and step.node.target is OFFLOAD:
            _, dim, _, layer = step.node.args
            assert isinstance(dim, int) and isinstance(layer, int)
            tokens = hint(value_of(step.node).shape[dim])
            found[step.node] = Leaving(layer, bytes_of(step.node) // max(1, tokens))
    return found
