"""A rewritten graph as the steps that run it: what is computed at once, what is moved, and where each value lies.

Terms
-----
step      What runs at once: a piece that is compiled, a loop, a copy between device and host, or one operator as it is.
storage   The bytes behind one or more values. A view shares that of its base, and so does what a loop writes over an
          operand.
place     Whose storage it is: the caller's (inputs, parameters), the device's, or the host's.

FX stays the form in which is computed: values are the graph's nodes, and a piece is a run of them. The program says in
which order, from which storage and where. It is pure data, made before anything is compiled.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

import sympy
from torch import fx

from mom_passes.loops.loop import Loop


class Place(enum.Enum):
    CALLER = "caller"
    DEVICE = "device"
    HOST = "host"


@dataclass(frozen=True, eq=False)
class Storage:
    """Bytes behind values, of which `node` was written there first. `bytes` is in the graph's sizes."""

    node: fx.Node
    bytes: sympy.Expr
    place: Place

    @property
    def name(self) -> str:
        return self.node.name


@dataclass(frozen=True, eq=False)
class Compute:
    """A run of operators, compiled as one piece."""

    name: str
    nodes: tuple[fx.Node, ...]
    ins: tuple[fx.Node, ...]
    outs: tuple[fx.Node, ...]


class Why(enum.Enum):
    """Why an operator is called as it is, and not compiled."""

    VIEW = "it only relabels storage"
    NUMBER = "it computes a number"
    CONSTANT = "it is part of the module, or what a carry begins with"
    EFFECT = "it returns nothing, and its operands are made elsewhere"
    DATA = "a size, or a number that it takes, depends on data"
    COPY = "a piece for a copy alone would be one for each shape"


class _OfANode:
    """A step that stands for one node of the graph."""

    node: fx.Node

    @property
    def name(self) -> str:
        return self.node.name if self.node.op == "call_function" else str(self.node.target)

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        return (self.node,)

    @property
    def ins(self) -> tuple[fx.Node, ...]:
        return tuple(self.node.all_input_nodes)


class _OfAValue(_OfANode):
    """A step that makes the value of one node."""

    @property
    def outs(self) -> tuple[fx.Node, ...]:
        return (self.node,)


@dataclass(frozen=True, eq=False)
class Call(_OfAValue):
    """One operator, called as it is."""

    node: fx.Node
    why: Why


@dataclass(frozen=True, eq=False)
class Transfer(_OfAValue):
    """A copy between device and host, or the beginning or end of one (see `mom_passes.ops.transfers`)."""

    node: fx.Node


@dataclass(frozen=True, eq=False)
class LoopStep(_OfANode):
    """A loop over mini-sequences. `outs` has None for what nobody reads."""

    node: fx.Node
    loop: Loop
    outs: tuple[fx.Node | None, ...]


Step = Compute | Call | LoopStep | Transfer


@dataclass(frozen=True, eq=False)
class Program:
    """`outputs` are nodes, or constants. `storages` has each tensor's storage."""

    inputs: tuple[fx.Node, ...]
    steps: tuple[Step, ...]
    outputs: tuple[Any, ...]
    storages: dict[fx.Node, Storage]

    def __str__(self) -> str:
        return "\n".join(_line(step) for step in self.steps)


def _line(step: Step) -> str:
    outs = ", ".join("_" if out is None else out.name for out in step.outs)
    ins = ", ".join(node.name for node in step.ins)
    return f"{outs or '_'} = {type(step).__name__.lower()} {step.name}({ins})"
