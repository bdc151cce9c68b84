"""How a compiler groups the operators of a piece into kernels, and what each kernel reads and makes.

Terms
-----
held      A value with storage of its own. Views have none. Pointwise results, gathers and constants are computed where
          they are read and have none either, unless a library kernel, a sort or a later piece reads them, or computing
          them again for several readers is too expensive.
library   An operator that calls another library's kernel: it reads held values and fuses with nothing.
kernel    One launch. Everything it makes is allocated before it runs; what it reads last is freed after it. On a CPU,
          Inductor writes one function for all operators between two library kernels.
over      A result is written over an operand that dies, if both have the same size and all other readers ran before.

    operators -> held values, each with the held values that it is computed from
              -> order: a held value at its first reader, a stored value at its last operand
              -> CPU: operators between library kernels are one kernel;  else: each is one

A compiler may reorder kernels and need less memory. Compared with measurements on a CPU only, never on a GPU.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field

import sympy
import torch
from torch import fx

from mom_passes.graph.meta import meta_value
from mom_passes.graph.values import input_node, is_pointwise
from mom_passes.program.storages import shares_with
from mom_passes.torch_compat import packet_of

aten, prims = torch.ops.aten, torch.ops.prims

#: Fused into their readers as pointwise operators are: each element is read from anywhere in an operand.
_GATHERS = frozenset(
    {
        aten.arange, aten.constant_pad_nd, aten.copy, aten.embedding, aten.empty, aten.flip, aten.full, aten.gather,
        aten.index, aten.repeat, aten.scalar_tensor, aten.select_scatter, aten.slice_scatter, aten.tril, aten.triu,
        prims.iota,
    }
)  # fmt: skip

#: Held, and fused with the operators that compute their operands.
_COMPUTING = frozenset(
    {
        aten.amax, aten.amin, aten.any, aten.argmax, aten.argmin, aten.cat, aten.max, aten.mean, aten.min, aten.prod,
        aten.sum, aten.var, aten.var_mean,
    }
)  # fmt: skip

#: Inductor unrolls reductions of fewer values than this.
_WRITTEN_OUT, _FEWEST_VALUES = frozenset({aten.amax, aten.amin, aten.prod, aten.sum}), 8

#: Library kernels that write into a given buffer.
_INTO = frozenset({aten.addmm, aten.baddbmm, aten.bmm, aten.mm})

#: Not recomputed for each reader on a CPU, by Inductor's list.
_DEAR = frozenset({aten.exp, aten.log, aten.log10, aten.log1p, aten.log2, aten.sigmoid, aten.tanh, aten.silu})
#: Inductor's settings: reads up to which a value is recomputed for each reader, and most reads of any fused value.
_READS_OF_EACH, _READS_ON_CPU, _READS_ELSEWHERE = 4, 12, 8


@dataclass(eq=False)
class Kernel:
    """The storages that a kernel `makes` and `reads`. `over` maps a made storage to the read one that it overwrites.

    `into`: the kernel writes to allocated buffers; if not, it returns storages of its own.
    """

    makes: list[fx.Node] = field(default_factory=list)
    reads: set[fx.Node] = field(default_factory=set)
    over: dict[fx.Node, fx.Node] = field(default_factory=dict)
    into: bool = True


@dataclass(eq=False)
class _Op:
    """An operator that makes a held value, or stores one elsewhere (`makes` is None). Ordered by `place`."""

    makes: fx.Node | None
    reads: frozenset[fx.Node]
    place: tuple[int, int]
    library: bool = False
    reduces: bool = False
    #: Operators of the same kernel whose results it needs.
    ancestors: set[_Op] = field(default_factory=set)


class Fusion:
    """The kernels that a compiler makes of `nodes`.

    `given` values die among them. A value for which `kept` holds is read later; `stored` values are written elsewhere.
    `device` is the type of device that is compiled for, if not that of the nodes.
    """

    def __init__(
        self,
        nodes: Collection[fx.Node],
        given: Iterable[fx.Node],
        kept: Callable[[fx.Node], bool],
        stored: Iterable[fx.Node],
        size: Callable[[fx.Node], sympy.Expr],
        device: str | None = None,
    ) -> None:
        self.position = {node: at for at, node in enumerate(nodes) if size(node) != 0}
        self.given = set(given)
        #: Results of a library kernel that returns several: each dies separately.
        self.items: dict[fx.Node, list[fx.Node]] = {}
        for node in self.position:
            several = node.all_input_nodes[0] if node.target is operator.getitem else None
            if several in self.position and _is_library(several) and shares_with(several) is None:
                self.items.setdefault(several, []).append(node)
        self.size = functools.cache(lambda node: size(node) - sum(map(size, self.items.get(node, ()))))
        self.on_cpu = any((device or _device(node)) == "cpu" for node in self.position)
        self.storage = self._storages()
        self.seen_as: dict[fx.Node, set[fx.Node]] = {}
        for node, storage in self.storage.items():
            self.seen_as.setdefault(storage, set()).add(node)
        self.kept = {self.storage[node] for node in self.position if kept(node)}
        #: The held values that each held value is computed from, and likewise for fused values.
        self.held: dict[fx.Node, frozenset[fx.Node]] = {}
        self.inlined: dict[fx.Node, frozenset[fx.Node]] = {}
        self.dear: set[fx.Node] = set()
        for node in self.position:
            if self.storage[node] is node and not self._is_item(node):
                self._read(node)
        self.ops = self._ops(stored)
        self.readers = self._readers()

    def kernels(self) -> list[Kernel]:
        """The kernels in the order they run."""
        found: list[Kernel] = []
        run: list[_Op] = []
        for op in self.ops:
            if run and (op.library or not self.on_cpu):
                found.append(self._kernel(run))
                run = []
            if op.library:
                assert op.makes is not None
                makes = [op.makes, *self.items.get(op.makes, ())]
                found.append(Kernel(makes, set(op.reads), into=packet_of(op.makes.target) in _INTO))
            else:
                run.append(op)
        return found + ([self._kernel(run)] if run else [])

    # --- what is held ---

    def _storages(self) -> dict[fx.Node, fx.Node]:
        """Node -> the node whose storage it shares, mostly itself. A value from outside counts as its own."""
        found: dict[fx.Node, fx.Node] = {node: node for node in self.given}
        for node in self.position:
            source = None if self._is_item(node) else shares_with(node)
            found[node] = node if source is None else found.setdefault(source, source)
        return found

    def _is_item(self, node: fx.Node) -> bool:
        return node.target is operator.getitem and node in self.items.get(input_node(node), ())

    def _read(self, node: fx.Node) -> None:
        reads: set[fx.Node] = set()
        dear = packet_of(node.target) in _DEAR
        for operand in node.all_input_nodes:
            source = self.storage.get(operand, operand)
            if source in self.inlined:
                reads |= self.inlined[source]
                dear |= source in self.dear
            elif self.size(source) != 0:
                reads.add(source)
        if self._is_held(node, len(reads), dear):
            self.held[node] = frozenset(reads)
        else:
            self.inlined[node] = frozenset(reads)
            self.dear |= {node} if dear else set()

    def _is_held(self, node: fx.Node, reads: int, dear: bool) -> bool:
        most = _READS_ON_CPU if self.on_cpu else _READS_ELSEWHERE
        if not self._is_pointwise(node) or node in self.kept or reads > most:
            return True
        if any(map(_is_library, self._users(node))):
            return True
        return self._is_reused(node) and (reads > _READS_OF_EACH or (dear and self.on_cpu))

    def _is_pointwise(self, node: fx.Node) -> bool:
        """Whether a value is fused: pointwise, or a reduction so small that it is unrolled."""
        if _is_fused(node) or packet_of(node.target) not in _WRITTEN_OUT:
            return _is_fused(node)
        values = sympy.cancel(self.size(node.all_input_nodes[0]) / self.size(node))
        return bool(values.is_Integer) and values < _FEWEST_VALUES

    def _is_reused(self, node: fx.Node) -> bool:
        return any(len(value.users) > 1 for value in self.seen_as[node])

    def _users(self, node: fx.Node) -> list[fx.Node]:
        """The readers of a value or its views, in this piece."""
        views = self.seen_as[node]
        users = dict.fromkeys(user for value in views for user in value.users)
        return [user for user in users if user in self.position and user not in views]

    # --- in which order ---

    def _ops(self, stored: Iterable[fx.Node]) -> list[_Op]:
        ops = []
        for node, reads in self.held.items():
            library = _is_library(node)
            place = self.position[node]
            pointwise = self._is_pointwise(node)
            if pointwise and node not in self.kept:
                place = min((self.position[user] for user in self._users(node)), default=place)
            ops.append(_Op(node, self._counted(reads), (place, self.position[node]), library, not pointwise))
        for value in stored:
            source = self.storage.get(value, value)
            reads = self._counted(self.inlined.get(source, frozenset([source])))
            last = max((self.position.get(read, 0) for read in reads), default=0)
            ops.append(_Op(None, reads, (last, len(self.position))))
        return sorted(ops, key=lambda op: op.place)

    def _counted(self, reads: Iterable[fx.Node]) -> frozenset[fx.Node]:
        """The storages that count: neither the caller's nor the module's."""
        return frozenset(read for read in reads if self._is_made_here(read) or read in self.given)

    def _is_made_here(self, storage: fx.Node) -> bool:
        return storage in self.held or self._is_item(storage)

    def _readers(self) -> dict[fx.Node, list[_Op]]:
        found: dict[fx.Node, list[_Op]] = {}
        for op in self.ops:
            for read in op.reads:
                found.setdefault(read, []).append(op)
        return found

    # --- what runs at once ---

    def _kernel(self, run: list[_Op]) -> Kernel:
        kernel = Kernel()
        maker = {op.makes: op for op in run}
        for op in run:
            for before in (maker[read] for read in op.reads if read in maker):
                op.ancestors |= {before, *before.ancestors}
        for op in run:
            kernel.reads |= op.reads
            if op.makes is not None and not self._stays_inside(op, run):
                kernel.makes.append(op.makes)
                over = None if op.reduces else self._written_over(op, run, kernel)
                if over is not None:
                    kernel.over[op.makes] = over
        made = {op.makes for op in run} - set(kernel.makes)
        kernel.reads -= made
        return kernel

    def _stays_inside(self, op: _Op, run: list[_Op]) -> bool:
        """Whether each element is read as it is made: no reader in the kernel depends on a reduction of the value."""
        readers = self.readers.get(op.makes, []) if op.makes is not None else []
        if op.reduces or op.makes in self.kept or not all(reader in run for reader in readers):
            return False
        reductions = {reader for reader in readers if reader.reduces}
        return all(reductions.isdisjoint(reader.ancestors) for reader in readers)

    def _written_over(self, op: _Op, run: list[_Op], kernel: Kernel) -> fx.Node | None:
        """The operand that a result overwrites. Inductor never overwrites the result of a `cat`."""
        assert op.makes is not None
        size = self.size(op.makes)
        for read in op.reads:
            free = self._is_made_here(read) and read not in self.kept and read not in kernel.over.values()
            if not free or packet_of(read.target) is aten.cat or sympy.expand(self.size(read) - size) != 0:
                continue
            others = [reader for reader in self.readers[read] if reader is not op]
            if all(other in op.ancestors or (other not in run and other.place < op.place) for other in others):
                return read
        return None


def _device(node: fx.Node) -> str | None:
    value = node.meta.get("type", meta_value(node))
    first = value[0] if isinstance(value, (tuple, list)) and value else value
    device = getattr(first, "device", None)
    return device.type if device is not None else None


def _is_fused(node: fx.Node) -> bool:
    return is_pointwise(node) or packet_of(node.target) in _GATHERS or _is_constant_cumsum(node)


def _is_constant_cumsum(node: fx.Node) -> bool:
    """Positions without padding: the cumulative sum of a constant, which Inductor computes where it is read."""
    return packet_of(node.target) is aten.cumsum and packet_of(node.all_input_nodes[0].target) is aten.full


def _is_library(node: fx.Node) -> bool:
    return not _is_fused(node) and packet_of(node.target) not in _COMPUTING
