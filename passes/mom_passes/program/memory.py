"""What a program needs of the device's memory, step by step, as expressions in the sizes of its graph.

Terms
-----
moment    One step, with the storages that exist while it runs and what it needs beside them, its scratch.
scratch   Of a piece: what its operators hold between each other (see `held`). Of a loop: what one mini-sequence holds,
          in `count`, its rows. What kernels need for themselves is counted where their operators say so.

    peak = most, over the steps, of bytes of all storages of the device that are alive + scratch

Inputs and parameters are the caller's and do not count; neither does what is on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import sympy
from torch import fx

from mom_passes.graph.meta import meta_value
from mom_passes.graph.sizes import expr, hint, product, symbol_hints
from mom_passes.graph.values import bytes_of, returned_values, value_of
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
    """`alive` are the device's storages that exist throughout the step, `scratch` is in `count` for a loop, whose
    mini-sequences have at most `rows` tokens of `length`."""

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
        """The scratch, with the rows that a mini-sequence has."""
        return self.scratch.xreplace({COUNT: self.count}) if self.scratch != 0 else self.scratch

    @property
    def count(self) -> sympy.Expr:
        """The rows of the longest mini-sequence (see `split_rows`)."""
        return sympy.Min(self.length, self.rows) if self.rows else sympy.S.Zero


@dataclass(frozen=True, eq=False)
class Memory:
    """The moments of a program, in order. `hints` are the sizes it was captured with."""

    moments: tuple[Moment, ...]
    hints: Mapping[sympy.Symbol, int]

    @property
    def peak(self) -> sympy.Expr:
        """Bytes above the inputs, for any sizes."""
        return sympy.Max(*dict.fromkeys(moment.bytes for moment in self.moments), evaluate=False)

    @property
    def tokens(self) -> int:
        """How many tokens the longest loop had when it was captured; 0 without loops."""
        return max((self.number(moment.length) for moment in self.moments), default=0)

    def number(self, size: Any, sizes: Mapping[sympy.Symbol, int] | None = None) -> int:
        """An expression at other sizes than the captured ones, or at those."""
        return int(expr(size).xreplace({**self.hints, **(sizes or {})}).doit())

    @property
    def highest(self) -> Moment:
        """The moment of the peak, at the captured sizes."""
        return max(self.moments, key=lambda moment: self.number(moment.bytes))

    def most(self, *kinds: type, sizes: Mapping[sympy.Symbol, int] | None = None) -> int:
        """The peak of the steps of some kinds, in bytes; 0 where there are none."""
        chosen = (moment for moment in self.moments if isinstance(moment.step, kinds))
        return max((self.number(moment.bytes, sizes) for moment in chosen), default=0)


def memory(program: Program, *, fused: bool = True, device: str | None = None, everywhere: bool = False) -> Memory:
    """What a program needs, step by step. Without `fused`, what its pieces would hold if each operator ran by itself,
    as in eager mode; with a type of `device`, what it would need there, wherever it was captured. With `everywhere`,
    what a piece holds is its most at any sizes, where it is else what is the most at the captured ones."""
    found, hints = lives(program), symbol_hints(program.inputs)
    # The captured sizes stand for themselves where they are numbers; a mini-sequence is compared at a usual length.
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
    """What a captured graph needs as stock Inductor compiles it: uncut, as one piece; see `memory` for `device`."""
    return memory(schedule(gm), device=device, everywhere=True)


def _moment(program: Program, found: Lives, i: int, costs: Callable[..., Costs]) -> Moment:
    step = program.steps[i]
    alive = tuple(storage for storage in found.alive(i) if storage.place is Place.DEVICE)
    if isinstance(step, LoopStep):
        loop = step.loop
        return Moment(step, alive, _iteration(loop, costs(_typed_bytes)), loop.rows, expr(loop.length))
    if not isinstance(step, Compute):
        return Moment(step, alive, sympy.Integer(0))
    # What the piece makes, and what dies in it, is counted operator by operator.
    made = {storage for storage in alive if found.first_of[storage] == i}
    dying = {storage: node for node in step.ins if (storage := program.storages.get(node)) in alive}
    dying = {storage: node for storage, node in dying.items() if found.last_of[storage] == i}
    kept = set(step.outs)
    held = most_held(step.nodes, dying.values(), kept.__contains__, costs(bytes_of_value))
    return Moment(step, tuple(storage for storage in alive if storage not in made and storage not in dying), held)


def _iteration(loop: Loop, costs: Costs) -> sympy.Expr:
    """What one mini-sequence holds, in `count`. Rows that are stored are written where they belong as they are made."""
    nodes = [node for node in loop.body.graph.nodes if node.op == "call_function"]
    stored = [value for value in returned_values(loop.body.graph) if isinstance(value, fx.Node)]
    return most_held(nodes, (), lambda node: False, costs, stored)


def _device_of(node: fx.Node) -> str:
    """The type of device that an operator's first operand is on, in a body or in a graph."""
    first = node.all_input_nodes[0]
    value = first.meta["type"] if "type" in first.meta else meta_value(first)
    return str(value.device.type)


def _typed_bytes(node: fx.Node) -> sympy.Expr:
    type = node.meta.get("type")
    types = type if isinstance(type, tuple) else (type,)
    sizes = (expr(product(t.shape)) * t.dtype.itemsize for t in types if isinstance(t, TensorType))
    return sum(sizes, sympy.Integer(0))


@dataclass(frozen=True)
class Leaving:
    """A value that leaves whole, for which it may be decided anew in each run whether it does.

    `layer` is the one whose attention reads it, `bytes_per_token` what each of its tokens takes, as captured.
    """

    layer: int
    bytes_per_token: int


def leaving(program: Program) -> dict[fx.Node, Leaving]:
    """The values that leave whole, by the node that stands for them on the host."""
    found = {}
    for step in program.steps:
        if isinstance(step, Transfer) and step.node.target is OFFLOAD:
            _, dim, _, layer = step.node.args
            assert isinstance(dim, int) and isinstance(layer, int)
            tokens = hint(value_of(step.node).shape[dim])
            found[step.node] = Leaving(layer, bytes_of(step.node) // max(1, tokens))
    return found
