"""Peak bytes of the values that a piece or a loop body holds, given how compilers fuse its operators.

Terms
-----
alive   A value is alive from the kernel that makes it to the last kernel that reads it (`kernels` says which are held).
own     Workspace of a library kernel, where its operator states it (`rules.registry`).

    bytes = maximum over the kernels of (bytes of the held values alive there + own)
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Hashable, Iterable
from dataclasses import dataclass, replace

import sympy
from torch import fx

from mom_passes.graph.meta import meta_value
from mom_passes.program.kernels import Fusion, Kernel
from mom_passes.program.storages import shares_with


@dataclass(frozen=True)
class Costs:
    """Byte counts, in the graph's sizes and as numbers at the captured sizes."""

    bytes: Callable[[fx.Node], sympy.Expr]
    number: Callable[[sympy.Expr], int]
    #: Workspace of an operator's kernel.
    own: Callable[[fx.Node], sympy.Expr]
    #: Whether a compiler fuses. If not, every result but a view is held, and no result is written over an operand.
    fused: bool = True
    #: The type of device that is compiled for, if not that of the capture.
    device: str | None = None
    #: Return the maximum for all sizes, not the expression that is largest at the captured sizes.
    everywhere: bool = False


def most_held(
    nodes: Collection[fx.Node],
    given: Iterable[fx.Node],
    kept: Callable[[fx.Node], bool],
    costs: Costs,
    stored: Iterable[fx.Node] = (),
) -> sympy.Expr:
    """The peak bytes of `nodes`, in the graph's sizes.

    Counts the values that they make, and those of `given` that die among them. A value for which `kept` holds is read
    later and alive to the end; `stored` values are written elsewhere as they are computed.
    """
    given = list(given)
    if costs.fused:
        fusion = Fusion(nodes, given, kept, stored, costs.bytes, costs.device)
        return _Held(fusion.kernels(), given, fusion.kept, replace(costs, bytes=fusion.size)).most()
    kernels, ends = _one_by_one(nodes, given, kept)
    return _Held(kernels, given, ends, costs).most()


def _one_by_one(
    nodes: Iterable[fx.Node], given: Iterable[fx.Node], kept: Callable[[fx.Node], bool]
) -> tuple[list[Kernel], set[fx.Node]]:
    """Each operator as a kernel, and the storages that are read after all of them."""
    storage = {node: node for node in given}
    kernels, ends = [], set()
    for node in nodes:
        source = shares_with(node)
        if source is None:
            storage[node] = node
        elif source in storage:
            storage[node] = storage[source]
        reads = {storage[operand] for operand in node.all_input_nodes if operand in storage}
        kernels.append(Kernel([node] if source is None else [], reads))
        ends |= {storage[node]} if kept(node) and node in storage else set()
    return kernels, ends


class _Held:
    """The held values, and the kernels between which each is alive."""

    def __init__(
        self, kernels: list[Kernel], given: Iterable[fx.Node], kept: Collection[fx.Node], costs: Costs
    ) -> None:
        self.kernels = kernels
        self.costs = costs
        self.first = dict.fromkeys(given, 0)
        self.last = dict.fromkeys(given, 0)
        self.given = set(self.first)
        for at, kernel in enumerate(kernels):
            for storage in kernel.makes:
                self.first[storage] = self.last[storage] = at
            for storage in kernel.reads & self.first.keys():
                self.last[storage] = at
        self.last |= dict.fromkeys(kept & self.first.keys(), len(kernels))
        self.size = {storage: costs.number(costs.bytes(storage)) for storage in self.first}
        self.own = [sum(map(costs.own, kernel.makes), sympy.S.Zero) for kernel in kernels]
        #: Bytes that Inductor's own planning expects, which ignores results written over operands.
        self.expected = self.numbers()
        for kernel in kernels:
            # A value whose storage another result takes over is counted up to the kernel before.
            self.last |= {taken: self.first[new] - 1 for new, taken in kernel.over.items()}

    def most(self) -> sympy.Expr:
        if not self.kernels:
            return sympy.S.Zero
        if self.costs.fused:
            self._use_again()
        # Workspaces do not grow as values do: one may set the peak for few rows and not for many.
        if self.costs.everywhere or any(own != 0 for own in self.own):
            return sympy.Max(*_highest([self._bytes(at) for at in range(len(self.kernels))]), evaluate=False)
        numbers = self.numbers()
        return self._bytes(max(range(len(numbers)), key=numbers.__getitem__))

    def _bytes(self, kernel: int) -> sympy.Expr:
        alive = [storage for storage, first in self.first.items() if first <= kernel <= self.last[storage]]
        return sympy.expand(sum((self.costs.bytes(storage) for storage in alive), self.own[kernel]))

    def numbers(self) -> list[int]:
        """Bytes alive during each kernel, at the captured sizes."""
        change = [0] * (len(self.kernels) + 2)
        for storage, first in self.first.items():
            change[first] += self.size[storage]
            change[self.last[storage] + 1] -= self.size[storage]
        return list(itertools.accumulate(change))[: len(self.kernels)]

    def _use_again(self) -> None:
        """Extend lives where Inductor keeps a buffer for a later value of its size: where that raises no peak."""
        numbers = list(self.expected)
        peak = max(numbers)
        taken = {old for kernel in self.kernels for old in kernel.over.values()}
        dying: dict[int, list[fx.Node]] = {}
        for storage, last in self.last.items():
            if storage not in self.given and storage not in taken:
                dying.setdefault(last, []).append(storage)
        free: dict[Hashable, list[fx.Node]] = {}
        for at, kernel in enumerate(self.kernels):
            for storage in kernel.makes if kernel.into else ():
                waiting = free.get(self._kind(storage)) if storage not in kernel.over else None
                if waiting:
                    before = self.last[waiting[-1]]
                    if before + 1 >= at or self.size[storage] + max(numbers[before + 1 : at]) <= peak:
                        self.last[waiting.pop()] = at - 1
                        numbers[before + 1 : at] = [n + self.size[storage] for n in numbers[before + 1 : at]]
            for storage in dying.get(at, ()):
                free.setdefault(self._kind(storage), []).append(storage)

    def _kind(self, storage: fx.Node) -> Hashable:
        value = storage.meta.get("type", meta_value(storage))
        return sympy.expand(self.costs.bytes(storage)), getattr(value, "dtype", None)


def _highest(sizes: Iterable[sympy.Expr]) -> list[sympy.Expr]:
    """The sizes that are the largest for some values of their symbols: those not dominated term by term."""
    terms = {size: size.as_coefficients_dict() for size in sizes}
    return [
        size
        for size, own in terms.items()
        if not any(
            other is not size and all(more[term] - own[term] >= 0 for term in own.keys() | more.keys())
            for other, more in terms.items()
        )
    ]
