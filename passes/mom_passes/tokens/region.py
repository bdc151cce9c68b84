"""A region: a part of a graph outlined as one operator with a chunk rule of its own.

Terms
-----
row        The unit that a region computes independently, usually a token, along dimension 0 of operands and result.
per row    How many entries of an operand's dimension 0 belong to one row: 1 for hidden states, k for slots of k
           experts; None if the operand is needed whole.
template   The region's graph, `(rows, *operands) -> result`, for any number of rows.

    hidden [T, H], keys [T * k], weights [E, H, I]    per row 1, k, None      result [T * k, H], k per row

Rows may be independent for a group of operators, but not for each of them: tokens sorted by expert, multiplied in
groups and put back. A region has one claim for the group, and no other pass reads its template. A loop body inlines it
for its own rows.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx, nn

from mom_passes.errors import CannotChunk
from mom_passes.graph.edit import fake_value
from mom_passes.graph.meta import meta_value
from mom_passes.graph.sizes import count_hint, hint, product, quotient
from mom_passes.graph.values import operands, value_of
from mom_passes.rules import All, Claim, Described, Dim, OperatorFacts, Rows
from mom_passes.rules.factories import checked
from mom_passes.rules.work import matmul_work

aten = torch.ops.aten


class Region(Described):
    """`template` as a callable operator with one result.

    template   its nodes have `meta["val"]`, the captured value, and `meta["per_row"]`, entries per row or None
    per_row    entries per row of each operand, or None
    out        entries per row of the result
    spread     how many rows the region needs, on average, for each of its products to get one
    """

    def __init__(
        self, name: str, template: fx.Graph, per_row: tuple[int | None, ...], out: int, spread: float = 1
    ) -> None:
        assert any(per_row), "a region needs rows of an operand"
        self.__name__ = self.__qualname__ = self.name = name  # FX prints these
        self.template = template
        self.per_row = per_row
        self.out = out
        self.spread = spread
        self.facts = OperatorFacts(self._claim, recompute=False, work=self._work)
        self._run = fx.GraphModule(nn.Module(), template, name)
        #: Rows when the graph was captured.
        self.rows = max(1, self._captured_rows([node for node in template.nodes if node.op == "placeholder"][1:]))
        self.work = sum(map(matmul_work, template.nodes))

    def __str__(self) -> str:
        return self.name

    def __call__(self, *given: torch.Tensor) -> Any:
        return self._run(next(v.shape[0] // n for v, n in zip(given, self.per_row, strict=True) if n), *given)

    def _captured_rows(self, given: Sequence[fx.Node]) -> int:
        """Return the number of rows at capture. Take the hint first: a symbolic quotient has no hint."""
        value, per_row = next((value_of(node), n) for node, n in zip(given, self.per_row, strict=True) if n)
        return hint(value.shape[0]) // per_row

    @property
    def widest(self) -> int:
        """Bytes per row of the widest value in the template."""
        inner = (meta_value(node) for node in self.template.nodes if node.meta.get("per_row"))
        tensors = (value for value in inner if isinstance(value, torch.Tensor))
        return max(count_hint(value.shape) * value.element_size() for value in tensors) // self.rows

    def _claim(self, node: fx.Node, dim: Dim) -> Claim:
        if checked(node, dim).index != 0:
            raise CannotChunk(node, dim, f"{self.name} is independent along its rows only")
        if quotient(dim.inner, self.out) is None:
            raise CannotChunk(node, dim, f"{self.name} has {self.out} results per row, which cannot be separated")
        own = self.dim_of_rows(dim)
        needs = (All() if n is None else Rows(Dim(0, own.outer, product([own.inner, n]))) for n in self.per_row)
        return Claim(tuple(needs))

    def dim_of_rows(self, dim: Dim) -> Dim:
        """Return the dim of the tokens in the region's rows for a dim of its result."""
        inner = quotient(dim.inner, self.out)
        assert inner is not None, f"{dim} does not hold {self.out} results per row"
        return Dim(0, dim.outer, inner)

    def _work(self, node: fx.Node) -> int:
        return self.work * self._captured_rows(operands(node)) // self.rows

    def inline(
        self, graph: fx.Graph, given: Sequence[fx.Node], describe: Callable[[fx.Node, fx.Node], None]
    ) -> fx.Node:
        """Append the operators to `graph` for the rows of the operands. Return the result's node.

        `describe(new, node)` sets the metadata of each new tensor.
        """
        rows, *placeholders = (node for node in self.template.nodes if node.op == "placeholder")
        env: dict[fx.Node, Any] = dict(zip(placeholders, given, strict=True))
        env[rows] = self._rows_read(graph, given) if rows.users else None
        for node in self.template.nodes:
            if node.op == "output":
                result: fx.Node = env[node.args[0]]
            elif node.op == "call_function":
                args, kwargs = fx.map_arg((node.args, node.kwargs), env.__getitem__)
                env[node] = new = graph.create_node("call_function", node.target, args, kwargs, name=node.name)
                new.meta = {k: v for k, v in node.meta.items() if k not in ("val", "per_row")}
                if "per_row" in node.meta:
                    describe(new, node)
        return result

    def _rows_read(self, graph: fx.Graph, given: Sequence[fx.Node]) -> fx.Node:
        """Emit the number of rows from the size of an operand."""
        of_rows = [(operand, n) for operand, n in zip(given, self.per_row, strict=True) if n]
        operand, per_row = min(of_rows, key=lambda pair: pair[1])
        rows = graph.call_function(aten.sym_size.int, (operand, 0))
        return rows if per_row == 1 else graph.call_function(operator.floordiv, (rows, per_row))


def regions(graph: fx.Graph) -> Iterator[tuple[fx.Node, Region]]:
    """Yield the calls of regions in a graph."""
    for node in graph.nodes:
        if node.op == "call_function" and isinstance(node.target, Region):
            yield node, node.target


def inline_regions(gm: fx.GraphModule) -> int:
    """Inline the regions that are outside of loops, in place. Return their number."""
    found = list(regions(gm.graph))
    for node, region in found:
        new = node.prev
        with gm.graph.inserting_before(node):
            result = region.inline(gm.graph, operands(node), lambda new, _: None)
        while (new := new.next) is not node:
            new.meta["val"] = fake_value(new)
            if isinstance(meta_value(new), int):  # a computed number would split a compiled piece
                known, new = new, new.prev
                known.replace_all_uses_with(meta_value(known))
                gm.graph.erase_node(known)
        node.replace_all_uses_with(result)
        gm.graph.erase_node(node)
    return len(found)
