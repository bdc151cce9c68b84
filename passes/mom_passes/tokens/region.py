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
from mom_passes.graph.edit import fake_value, size_node
from mom_passes.graph.sizes import Size, count_hint, hint, product, quotient
from mom_passes.graph.values import operands, value_of
from mom_passes.rules import All, Claim, Described, Dim, OperatorFacts, Rows
from mom_passes.rules.arithmetic import mul
from mom_passes.rules.factories import checked
from mom_passes.rules.work import matmul_work


class Region(Described):
    """`template` as an operator with one result, `out` rows of it for each of the region's.

    The template's nodes have their captured values as `meta["val"]`, and those that hold rows how many for each of the
    region's as `meta["per_row"]`. Called, it runs on the rows that its operands have.
    """

    def __init__(self, name: str, template: fx.Graph, per_row: tuple[int | None, ...], out: int) -> None:
        assert any(per_row), "a region has rows of some operand"
        self.__name__ = self.__qualname__ = self.name = name  # FX names a call by these
        self.template = template
        self.per_row = per_row
        self.out = out
        self.facts = OperatorFacts(self._claim, recompute=False, work=self._work)
        self._run = fx.GraphModule(nn.Module(), template, name)
        #: Rows when the graph was captured.
        self.rows = max(1, hint(self.rows_of([node for node in template.nodes if node.op == "placeholder"][1:])))
        self.work = sum(map(matmul_work, template.nodes))

    def __str__(self) -> str:
        return self.name

    def __call__(self, *given: torch.Tensor) -> Any:
        return self._run(next(v.shape[0] // n for v, n in zip(given, self.per_row, strict=True) if n), *given)

    def rows_of(self, given: Sequence[fx.Node]) -> Size:
        """How many rows the region has with these operands."""
        value, per_row = next((value_of(node), n) for node, n in zip(given, self.per_row, strict=True) if n)
        rows = quotient(value.shape[0], per_row)
        assert rows is not None, f"{per_row} rows each do not divide {value.shape[0]}"
        return rows

    @property
    def widest(self) -> int:
        """The most bytes that one row of a value inside takes."""
        inner = (node.meta["val"] for node in self.template.nodes if node.meta.get("per_row"))
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
        return self.work * hint(self.rows_of(operands(node))) // self.rows

    def inline(
        self, graph: fx.Graph, rows: Any, given: Sequence[fx.Node], describe: Callable[[fx.Node, fx.Node], None]
    ) -> fx.Node:
        """Its operators at the end of `graph`, for so many rows; returns the result's node.

        `describe(new, node)` is called for each, to give a new node its metadata.
        """
        placeholders = [node for node in self.template.nodes if node.op == "placeholder"]
        env: dict[fx.Node, Any] = dict(zip(placeholders, (rows, *given), strict=True))
        for node in self.template.nodes:
            if node.op == "output":
                result: fx.Node = env[node.args[0]]
            elif node.op == "call_function":
                env[node] = _copied(graph, node, env, describe)
        return result


def _copied(
    graph: fx.Graph, node: fx.Node, env: dict[fx.Node, Any], describe: Callable[[fx.Node, fx.Node], None]
) -> Any:
    args, kwargs = fx.map_arg((node.args, node.kwargs), env.__getitem__)
    if node.target is operator.mul:
        return mul(*args)  # a number of rows
    new = graph.create_node("call_function", node.target, args, kwargs, name=node.name)
    new.meta = {k: v for k, v in node.meta.items() if k not in ("val", "per_row")}
    describe(new, node)
    return new


def regions(graph: fx.Graph) -> Iterator[tuple[fx.Node, Region]]:
    """The calls of regions in a graph."""
    for node in graph.nodes:
        if node.op == "call_function" and isinstance(node.target, Region):
            yield node, node.target


def inline_regions(gm: fx.GraphModule) -> None:
    """Put what was outlined back where no loop took it, in place."""
    for node, region in list(regions(gm.graph)):
        with gm.graph.inserting_before(node):
            rows = size_node(gm.graph, region.rows_of(operands(node)), before=node)
            result = region.inline(gm.graph, rows, operands(node), _with_fake_value)
        node.replace_all_uses_with(result)
        gm.graph.erase_node(node)


def _with_fake_value(new: fx.Node, node: fx.Node) -> None:
    new.meta["val"] = fake_value(new)
