"""What a run needs of the device, as functions of its sizes and of the rows of its mini-sequences.

Terms
-----
sizes     The values that a run gives the symbols of its graph: how many sequences, how many tokens. A graph whose sizes
          were all captured as numbers has none; guards keep such a graph to those sizes.
kept      Of a step: bytes of the storages that are alive while it runs, without its scratch.
scratch   Of a step: bytes that it holds itself. Of a loop: those of one mini-sequence, in `count`, its rows.

    peak(sizes, rows) = max over the steps of kept(sizes) + scratch(sizes, min(rows, length))

A program that was captured for a number of tokens says what fewer tokens need, as far as its values show it:

    a value with exactly one dimension of that size     -> bytes in proportion to `tokens`
    any other value, and the scratch of a step          -> as captured: never less than fewer tokens need
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import sympy
import torch
from torch import fx

from mom_passes.graph.aliasing import views_of
from mom_passes.graph.meta import meta_value
from mom_passes.graph.size_values import SizeFunction, function_of
from mom_passes.graph.sizes import count_hint, expr, fixed_sizes, product, same
from mom_passes.graph.values import tensors_of
from mom_passes.loops.ports import COUNT
from mom_passes.ops.transfers import ARRIVING
from mom_passes.program.memory import Memory, Moment
from mom_passes.program.program import LoopStep, Storage

#: Rows between which a mini-sequence's bytes are compared: what does not grow with the rows is not counted per row.
FEW, MANY = 1024, 2048

#: The number of tokens that a graph was captured with, as a symbol.
TOKENS = sympy.Symbol("tokens", integer=True, positive=True)


@dataclass(frozen=True)
class LoopSizes:
    """A loop as functions of a run's sizes.

    `widest` are the bytes of its widest value for a token, `spread` how many tokens give each of its experts a row,
    `rows` the rows that it has where no device decides them, `unbroken` the fewest rows, a packed sequence that it must
    not cut.
    """

    length: SizeFunction
    sequences: SizeFunction
    widest: int
    spread: float
    rows: int
    unbroken: int = 0


@dataclass(frozen=True)
class StepSizes:
    """What a step needs as functions of a run's sizes: `kept`, and `scratch` in these and a count of rows.
    `captured` are the sizes of the first run."""

    kept: SizeFunction
    scratch: SizeFunction
    loop: LoopSizes | None
    captured: tuple[int, ...] = ()

    def bytes(self, sizes: tuple[int, ...], rows: int) -> int:
        """Return its bytes; those of a loop with mini-sequences of so many rows."""
        count = min(rows, self.loop.length(sizes)) if self.loop is not None else 0
        return int(self.kept(sizes) + self.scratch((*sizes, count)))

    def row_bytes(self, sizes: tuple[int, ...]) -> int:
        """Return the bytes that a mini-sequence holds for each of its rows."""
        few, many = (self.scratch((*sizes, count)) for count in (FEW, MANY))
        return max(1, int(many - few) // (MANY - FEW))

    def widest(self, loop: LoopSizes, sizes: tuple[int, ...]) -> int:
        """Return the bytes of the loop's widest value for a token. It is known at the captured sizes, and grows as all
        values of a row together: a row of scores has a value for each key."""
        row_bytes = self.row_bytes(sizes)
        return max(1, loop.widest, min(row_bytes, loop.widest * row_bytes // self.row_bytes(self.captured)))


@dataclass(frozen=True)
class Model:
    """The distinct steps of a program, as functions of the values of `symbols` in a run.

    `order` has all steps of the program, by their number among `steps`; `captured` are the sizes of the first run.
    """

    symbols: tuple[sympy.Symbol, ...]
    steps: tuple[StepSizes, ...]
    order: tuple[int, ...] = ()
    captured: tuple[int, ...] = ()

    @staticmethod
    def of(
        memory: Memory,
        sequences: Mapping[fx.Node, sympy.Expr] | None = None,
        kernels: sympy.Expr = sympy.S.Zero,
        more: Collection[sympy.Expr] = (),
    ) -> tuple[Model, dict[fx.Node, int]]:
        """Return the model of a program, and the number of each loop's step by the loop's node.

        `sequences` says how many sequences each loop has rows of (1 by default), `kernels` how many bytes kernels take
        in addition. The model has the symbols of `more` sizes too.
        """
        keys = [_key(moment, sequences or {}, kernels) for moment in memory.moments]
        found = {key: number for number, key in enumerate(dict.fromkeys(keys))}
        sizes = [*more, *(size for key in found for size in key if isinstance(size, sympy.Basic))]
        symbols = tuple(sorted({symbol for size in sizes for symbol in size.free_symbols} - {COUNT}, key=str))
        captured = tuple(int(memory.hints.get(symbol, 2)) for symbol in symbols)
        steps = tuple(_functions(key, symbols, captured) for key in found)
        order = tuple(found[key] for key in keys)
        of_steps = zip(memory.moments, order, strict=True)
        numbers = {m.step.node: number for m, number in of_steps if isinstance(m.step, LoopStep)}
        return Model(symbols, steps, order, captured), numbers

    def full(self, sizes: tuple[int, ...]) -> int:
        """Return the bytes of what lives at full length at the peak."""
        return max((int(step.kept(sizes)) for step in self.steps), default=0)

    def bytes(self, sizes: tuple[int, ...], rows: Sequence[int]) -> int:
        """Return the peak, with these rows of each step."""
        steps = zip(self.steps, rows, strict=True)
        return max((step.bytes(sizes, count) for step, count in steps), default=0)


# --- inputs ---


def static_bytes(gm: fx.GraphModule, static: Collection[str], device: torch.device) -> int:
    """Return the bytes of parameters and buffers on the device; `static` names them."""
    values = [meta_value(node) for node in _inputs_on(device, gm) if node.name in static]
    return sum(count_hint(value.shape) * value.element_size() for value in values)


def input_bytes(gm: fx.GraphModule, static: Collection[str], device: torch.device) -> dict[fx.Node, sympy.Expr]:
    """Return the bytes of each other input on the device, in the sizes of the graph."""
    values = {node: meta_value(node) for node in _inputs_on(device, gm) if node.name not in static}
    return {node: expr(product(value.shape)) * value.element_size() for node, value in values.items()}


def _inputs_on(device: torch.device, gm: fx.GraphModule) -> Iterator[fx.Node]:
    """Iterate over the inputs on the device. An input that only transfers read, through any view, is on the host, also
    where the device is a CPU."""
    for node in gm.graph.nodes:
        value = meta_value(node)
        is_there = node.op == "placeholder" and isinstance(value, torch.Tensor) and value.device == device
        if is_there and not _is_on_host(node):
            yield node


def _is_on_host(node: fx.Node) -> bool:
    views = views_of(node)
    readers = {user for view in views for user in view.users} - views
    return bool(readers) and all(reader.target in ARRIVING for reader in readers)


# --- fewer tokens than captured ---


def captured_tokens(memory: Memory, gm: fx.GraphModule, static: Collection[str]) -> int | None:
    """Return the number of tokens if it was captured as a number and no parameter has a dimension of that size, which
    would not tell tokens from features; else None."""
    lengths = [moment.step.loop.length for moment in memory.moments if isinstance(moment.step, LoopStep)]
    if not lengths or memory.hints or not all(isinstance(length, int) for length in lengths):
        return None
    tokens = max(memory.number(length) for length in lengths)
    parameters = (meta_value(n) for n in gm.graph.nodes if n.op == "placeholder" and n.name in static)
    return None if tokens in fixed_sizes(parameters) else tokens


def in_tokens(memory: Memory, captured: int) -> Memory:
    """Return a program's memory as a function of `TOKENS`."""
    moments = tuple(_moment_in_tokens(moment, captured) for moment in memory.moments)
    return Memory(moments, {TOKENS: sympy.Integer(captured)})


def bytes_in_tokens(node: fx.Node, size: sympy.Expr, captured: int) -> sympy.Expr:
    """Return the bytes of a value as a function of `TOKENS`."""
    values = tensors_of(node)
    grows = bool(values) and all(sum(same(size, captured) for size in value.shape) == 1 for value in values)
    return size / captured * TOKENS if grows else size


def _moment_in_tokens(moment: Moment, captured: int) -> Moment:
    alive = tuple(Storage(s.node, bytes_in_tokens(s.node, s.bytes, captured), s.place) for s in moment.alive)
    step = moment.step
    if isinstance(step, LoopStep) and step.loop.length == captured:
        step = replace(step, loop=replace(step.loop, length=TOKENS))
    return replace(moment, step=step, alive=alive)


# --- steps ---

_Key = tuple[sympy.Expr, sympy.Expr, sympy.Expr | None, sympy.Expr, int, float, int, int]


def _key(moment: Moment, sequences: Mapping[fx.Node, sympy.Expr], kernels: sympy.Expr) -> _Key:
    """Return what a step is made of. Identical layers have identical keys."""
    kept = sum((storage.bytes for storage in moment.alive), kernels)
    if not isinstance(moment.step, LoopStep):
        return kept, moment.scratch, None, sympy.S.One, 0, 1, 0, 0
    loop = moment.step.loop
    several = sequences.get(moment.step.node, sympy.S.One)
    return kept, moment.scratch, expr(loop.length), several, loop.widest, loop.spread, loop.rows, loop.unbroken


def _functions(key: _Key, symbols: tuple[sympy.Symbol, ...], captured: tuple[int, ...]) -> StepSizes:
    kept, scratch, length, sequences, widest, spread, rows, unbroken = key
    loop = None
    if length is not None:
        loop = LoopSizes(function_of(length, symbols), function_of(sequences, symbols), widest, spread, rows, unbroken)
    return StepSizes(function_of(kept, symbols), function_of(scratch, (*symbols, COUNT)), loop, captured)
