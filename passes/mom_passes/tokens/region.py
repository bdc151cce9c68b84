"""A region: part of a graph outlined as one operator that answers for itself.

Terms
-----
row        What a region works on independently, along dimension 0 of its operands and of its result. A token, mostly.
per row    How many rows of an operand along its dimension 0 belong to one row of the region: 1 for the hidden states,
           k where each token has k of them; None: the operand is needed whole.
template   The region's graph, `(rows, *operands) -> result`, good for any number of rows.

    hidden [T, H], keys [T * k], weights [E, H, I]    per row 1, k, None      result [T * k, H], k per row

Operators whose rows depend on each other one by one may be independent together: tokens sorted by their experts,
multiplied in groups and put back. A region says what holds of them together, and nothing outside looks in. A body
inlines it with the rows it has.
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
    """`template` as an operator with one result, `out` rows of it for each of the region's. It takes `spread` rows, on
    average, for each of its products to have one.

    The template's nodes have their captured values as `meta["val"]`, and those that hold rows how many for each of the
    region's as `meta["per_row"]`. Called, it runs on the rows that its operands have.
    """

    def __init__(
        self, name: str, template: fx.Graph, per_row: tuple[int | None, ...], out: int, spread: float = 1
    ) -> None:
        assert any(per_row), "a region has rows of some operand"
        self.__name__ = self.__qualname__ = self.name = name  # FX names a call by these
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
        """How many rows the region had with these operands when the graph was captured. Of their quotient, an
        expression, nobody knows the values of its symbols."""
        value, per_row = next((value_of(node), n) for node, n in zip(given, self.per_row, strict=True) if n)
        return hint(value.shape[0]) // per_row

    @property
    def widest(self) -> int:
        """The most bytes that one row of a value inside takes."""
        inner = (meta_value(node) for node in self.template.nodes if node.meta.get("per_row"))
        tensors = (value for value in inner if isinstance(value, torch.Tensor))
        return max(count_hint(value.shape) * value.element_size() for value in tensors) // self.rows

    def _claim(self, node: fx.Node, dim: Dim) -> Claim:
        if checked(node, dim).index != 0:
            raise CannotChunk(node, dim, f"{self.name} is independent along its rows alone")
        if quotient(dim.inner, self.out) is None:
            raise CannotChunk(node, dim, f"{self.name} has {self.out} results for each row, which stay together")
        own = self.dim_of_rows(dim)
        needs = (All() if n is None else Rows(Dim(0, own.outer, product([own.inner, n]))) for n in self.per_row)
        return Claim(tuple(needs))

    def dim_of_rows(self, dim: Dim) -> Dim:
        """Where the tokens are among the region's rows, if they are along `dim` in its result."""
        inner = quotient(dim.inner, self.out)
        assert inner is not None, f"{dim} does not hold {self.out} results for each row"
        return Dim(0, dim.outer, inner)

    def _work(self, node: fx.Node) -> int:
        return self.work * self._captured_rows(operands(node)) // self.rows

    def inline(
        self, graph: fx.Graph, given: Sequence[fx.Node], describe: Callable[[fx.Node, fx.Node], None]
    ) -> fx.Node:
        """Its operators at the end of `graph`, for the rows that the operands have; returns the result's node.

        `describe(new, node)` gives each new tensor its metadata.
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
        """Read off an operand, so that nobody need say how many there are."""
        of_rows = [(operand, n) for operand, n in zip(given, self.per_row, strict=True) if n]
        operand, per_row = min(of_rows, key=lambda pair: pair[1])
        rows = graph.call_function(aten.sym_size.int, (operand, 0))
        return rows if per_row == 1 else graph.call_function(operator.floordiv, (rows, per_row))


def regions(graph: fx.Graph) -> Iterator[tuple[fx.Node, Region]]:
    """The calls of regions in a graph."""
    for node in graph.nodes:
        if node.op == "call_function" and isinstance(node.target, Region):
            yield node, node.target


def inline_regions(gm: fx.GraphModule) -> int:
    """Put what was outlined back where no loop took it, in place; how many regions that were."""
    found = list(regions(gm.graph))
    for node, region in found:
        new = node.prev
        with gm.graph.inserting_before(node):
            result = region.inline(gm.graph, operands(node), lambda new, _: None)
        while (new := new.next) is not node:
            new.meta["val"] = fake_value(new)
            if isinstance(meta_value(new), int):  # a number to be computed would end a compiled piece
                known, new = new, new.prev
                known.replace_all_uses_with(meta_value(known))
                gm.graph.erase_node(known)
        node.replace_all_uses_with(result)
        gm.graph.erase_node(node)
    return len(found)
