"""The program of a rewritten graph: its steps, and the storage and place of each value.

Terms
-----
step      A compiled piece, a loop, a copy between device and host, or one operator that runs eagerly.
storage   The bytes of one or more values. A view shares its base's storage, and so does a loop's result that is written
          over an operand.
place     The owner of a storage: the caller (inputs, parameters), the device, or the host.

Values are FX nodes, and a piece is a run of nodes. The program adds order, storage and place. It is pure data, made
before anything is compiled.
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
    """The bytes of one or more values, of which `node` is the first. `bytes` is in the graph's sizes."""

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
    """Why an operator runs eagerly."""

    VIEW = "it is a view"
    NUMBER = "it computes a number"
    CONSTANT = "it is part of the module, or the first value of a carry"
    EFFECT = "it returns nothing, and its operands are computed elsewhere"
    DATA = "a size, or a number that it takes, depends on data"
    COPY = "a piece for one copy would be compiled for each shape"


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
    """One operator, run eagerly."""

    node: fx.Node
    why: Why


@dataclass(frozen=True, eq=False)
class Transfer(_OfAValue):
    """A copy between device and host, or its beginning or end (see `mom_passes.ops.transfers`)."""

    node: fx.Node


@dataclass(frozen=True, eq=False)
class LoopStep(_OfANode):
    """A loop over mini-sequences. `outs` has None for results without readers."""

    node: fx.Node
    loop: Loop
    outs: tuple[fx.Node | None, ...]


Step = Compute | Call | LoopStep | Transfer


@dataclass(frozen=True, eq=False)
class Program:
    """`outputs` are nodes or constants. `storages` has the storage of every tensor."""

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
