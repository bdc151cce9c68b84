"""Outline the reductions of logits as one operator, which computes the logits in blocks of columns.

Terms
-----
head, chain, wide, row value, form    See `tokens.logits`.
answer      The replacement of a reduction: arithmetic with the operator's results, a few numbers per row. `exp` of
            shifts is computed in float64.

    sum(f * exp(x - b))              f * exp(shift - b) * total
    sum(f * exp(x - b) * (x - a))    f * exp(shift - b) * (weighted + (shift - a) * total)
    amax(x - a)                      top - a
    argmax(x - a)                    greedy
    gather(f(x), targets)            f(chosen)

    for each head (`tokens.logits`) with supported readers (`tokens.logit_reductions`):
        call = scored(rows, matrix, bias, targets, steps)
        replace each reduction by its answer; erase the wide values

Before:  x = slice(view(mm(h, w)), 1, 0, -1); m = amax(x); s = sum(exp(x - m)); t = gather(x - m, labels) - log(s)
After:   top, shift, total, _, chosen, _ = scored(slice(view(h), 1, 0, -1), w, None, labels, [], [], ["total"])
         s = exp(shift - top) * total; t = chosen - top - log(s)

Logits with another reader, such as the caller, must exist, so their head is left. A head is left, too, if its logits
have a static size of at most one block. A log-softmax may round two logits to one number, of which `argmax` takes the
first; the answer is the larger logit.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from mom_passes.graph.arguments import argument, argument_node, aten, prims
from mom_passes.graph.edit import emit, size_node
from mom_passes.graph.meta import meta_value
from mom_passes.graph.sizes import count_hint, hint, product, same
from mom_passes.graph.values import bytes_of, operands, value_of
from mom_passes.ops.scored import BEST, CHOSEN, SCORED, SHIFT, TOP, TOTALS, WEIGHTS, block_bytes
from mom_passes.tokens.heads import Head, head_of, keeps_columns, with_columns
from mom_passes.tokens.logit_reductions import Reductions
from mom_passes.tokens.logits import Factor, Form, NoReductions, NotScored
from mom_passes.tokens.sharded_scores import score_in_ranks


def outline_scores(gm: fx.GraphModule, least: int | None = None) -> dict[str, str]:
    """Replace every head whose readers are all supported, in place. Return the reasons for the others, by name.

    Logits of a static size of at most `least` bytes are left; None: the size of a block.
    """
    refused: dict[str, str] = {}
    for node in list(gm.graph.nodes):
        head = head_of(node)
        if head is None or _is_small(head, least):
            continue
        try:
            found = Reductions(head)
        except NoReductions:
            continue
        except NotScored as reason:
            refused[node.name] = str(reason)
        else:
            _Outline(gm.graph, found).run()
    return refused


def _is_small(head: Head, least: int | None) -> bool:
    value = value_of(head.logits)
    least = block_bytes(value.device.type) if least is None else least
    return isinstance(product(value.shape), int) and bytes_of(head.logits) <= least


class _Outline:
    """Replaces a head by a call, and its reductions by answers."""

    def __init__(self, graph: fx.Graph, found: Reductions) -> None:
        self.graph, self.found, self.head = graph, found, found.head
        self.answers: dict[fx.Node, fx.Node] = {}
        self.results: dict[int, fx.Node] = {}
        #: How many of the chosen columns the gathers answered so far have taken.
        self.taken = 0

    def run(self) -> None:
        found = self.found
        for value in (self.head.product, *self.head.chain, *found.forms):
            self._replace_sizes(value)
        for node in found.late:
            found.first.prepend(node)
        with self.graph.inserting_before(found.first):
            targets = [self._shape_like_logits(node) for node, kind in found.kinds.items() if kind == "gather"]
            self._call(targets)
        for node, kind in found.kinds.items():
            with self.graph.inserting_before(node):
                answer = self._answer(node, kind)
                self.answers[node] = self._converted(answer, value_of(node).dtype)
            node.replace_all_uses_with(self.answers[node])
            self.graph.erase_node(node)
        for node in sorted(found.forms, reverse=True):
            self.graph.erase_node(node)
        for node in (*reversed(self.head.chain[:-1]), *([self.head.product] if self.head.chain else [])):
            self.graph.erase_node(node)
        for result in self.results.values():
            if not result.users:
                self.graph.erase_node(result)

    def _replace_sizes(self, value: fx.Node) -> None:
        """Read sizes of a value from the hidden states or the matrix instead."""
        last = value_of(value).dim() - 1
        for node in [user for user in value.users if user.target is aten.sym_size.int]:
            with self.graph.inserting_before(node):
                if node.args[1] in (-1, last):
                    other = size_node(self.graph, self.head.columns_of(value), node)
                else:
                    other = emit(self.graph, aten.sym_size.int, (self._rows_of(value, node), node.args[1]))
            node.replace_all_uses_with(other)
            self.graph.erase_node(node)

    # --- the call ---

    def _call(self, targets: Sequence[fx.Node]) -> None:
        head = self.head
        joined = targets[0] if targets else None
        if len(targets) > 1:
            joined = emit(self.graph, aten.cat.default, (list(targets), -1))
        rows = self._rows_of(head.logits, self.found.first)
        steps, numbers = [step for step, _ in head.steps], [number for _, number in head.steps]
        given = (rows, head.matrix, head.bias, joined, steps, numbers, self.found.wants)
        if head.gather is not None:
            self.results = score_in_ranks(self.graph, given, head.gather)
            return
        call = emit(self.graph, SCORED, given)
        self.results = {item: emit(self.graph, operator.getitem, (call, item)) for item in range(BEST + 1)}

    def _rows_of(self, value: fx.Node, before: fx.Node) -> fx.Node:
        """Emit the rows of the hidden states that a value of the chain or a wide value has logits of, in its shape."""
        if value is self.head.product:
            return self.head.hidden
        source = self._wide_operand(value) if value in self.found.forms and value is not self.head.logits else None
        rows = self._rows_of(source or operands(value)[0], before)
        if not keeps_columns(value, self.head.columns_of(value)):
            return rows
        width = size_node(self.graph, value_of(self.head.hidden).shape[-1], before)
        return self._apply_view(value, rows, width)

    def _shape_like_logits(self, node: fx.Node) -> fx.Node:
        """Return the columns that a `gather` chooses, with the row dimensions of the logits."""
        index, shape = argument_node(node, "index"), value_of(self.head.logits).shape
        if _same_sizes(value_of(index).shape[:-1], shape[:-1]):
            return index
        rows = [size_node(self.graph, size, self.found.first) for size in shape[:-1]]
        return emit(self.graph, aten.reshape.default, (index, [*rows, value_of(index).shape[-1]]))

    # --- answers ---

    def _answer(self, node: fx.Node, kind: str) -> fx.Node:
        wide = operands(node)[0]
        if kind == "gather":
            return self._apply_form(wide, self._chosen_columns(argument(node, "index")))
        if kind == "amax":
            answer = self._apply_form(wide, self.results[TOP])
        elif kind == "argmax":
            answer = self._apply_views(wide, self.results[BEST])
        else:
            answer = self._sum(wide, self.found.forms[wide])
        return answer if argument(node, "keepdim") else emit(self.graph, aten.squeeze.dim, (answer, -1))

    def _chosen_columns(self, index: fx.Node) -> fx.Node:
        """Return the next gather's part of the logits that all gathers choose."""
        chosen, count = self.results[CHOSEN], value_of(index).shape[-1]
        if same(count, value_of(chosen).shape[-1]):
            return chosen
        first, self.taken = self.taken, self.taken + int(count)
        return emit(self.graph, aten.slice.Tensor, (chosen, -1, first, self.taken))

    def _sum(self, wide: fx.Node, form: Form) -> fx.Node:
        shift = self._apply_views(wide, self.results[SHIFT])
        result = self._apply_views(wide, self.results[TOTALS])
        assert form.exponent is not None
        if form.linear is not None:
            lower = self._subtract(shift, form.linear)
            weighted = self._apply_views(wide, self.results[WEIGHTS])
            result = self._binary(aten.add.Tensor, weighted, self._binary(aten.mul.Tensor, lower, result))
        likelihood = emit(self.graph, aten.exp.default, (self._subtract(shift, form.exponent),))
        result = self._binary(aten.mul.Tensor, likelihood, result)
        for factor in form.factors:
            target = aten.div.Tensor if factor.divides else aten.mul.Tensor
            result = self._binary(target, result, self._row_value(factor))
        if not form.likely:
            return result
        known = self._binary(aten.eq.Tensor, result, result)
        zero = emit(self.graph, aten.full.default, ([], 0.0), _like(result))
        return emit(self.graph, aten.where.self, (known, result, zero))

    def _subtract(self, shift: fx.Node, subtracted: Sequence[Any]) -> fx.Node:
        for value in subtracted:
            shift = self._binary(aten.sub.Tensor, shift, self._row_value(Factor(value)))
        return shift

    def _row_value(self, factor: Factor) -> Any:
        """Return a row value in float64, or its answer if it is a reduction."""
        value = factor.value
        if not isinstance(value, fx.Node) or not isinstance(meta_value(value), torch.Tensor):
            return value
        return self._converted(self.answers.get(value, value), torch.float64)

    # --- results in the shape of a wide value ---

    def _apply_views(self, wide: fx.Node, result: fx.Node) -> fx.Node:
        """Apply the views between the logits and a wide value to a result with one number per row."""
        return self._replay(wide, result, lambda node, given: given[self._wide_operand(node)])

    def _apply_form(self, wide: fx.Node, columns: fx.Node) -> fx.Node:
        """Apply the operators between the logits and a wide value to some columns of the logits."""

        def apply(node: fx.Node, given: dict[fx.Node, fx.Node]) -> fx.Node:
            if node.target is prims.convert_element_type.default:
                (one,) = given.values()
                return self._converted(one, torch.promote_types(value_of(one).dtype, value_of(node).dtype))
            args = fx.map_arg(node.args, lambda arg: given.get(arg, self.answers.get(arg, arg)))
            return emit(self.graph, node.target, args, dict(node.kwargs))

        return self._replay(wide, columns, apply)

    def _replay(
        self, wide: fx.Node, result: fx.Node, apply: Callable[[fx.Node, dict[fx.Node, fx.Node]], fx.Node]
    ) -> fx.Node:
        """Replay the operators between the logits and a wide value: views on the result, others by `apply`."""
        if wide is self.head.logits:
            return result
        inner = {n: self._replay(n, result, apply) for n in dict.fromkeys(operands(wide)) if n in self.found.forms}
        if keeps_columns(wide, self.head.columns):
            (given,) = inner.values()
            return self._apply_view(wide, given, int(value_of(given).shape[-1]))
        return apply(wide, inner)

    def _wide_operand(self, node: fx.Node) -> fx.Node:
        return next(operand for operand in operands(node) if operand in self.found.forms)

    def _apply_view(self, node: fx.Node, rows: fx.Node, columns: Any) -> fx.Node:
        """Apply the view `node` of a wide value to rows with `columns` columns. Two inverse reshapes cancel."""
        call = with_columns(node, rows, columns)
        if call is None:
            return rows
        viewed = emit(self.graph, *call)
        twice = rows.target in (aten.view.default, aten.reshape.default) and call[0] is aten.reshape.default
        before = operands(rows)[0] if twice else viewed
        if before is not viewed and _same_sizes(value_of(before).shape, value_of(viewed).shape):
            self.graph.erase_node(viewed)
            return before
        return viewed

    # --- nodes ---

    def _binary(self, target: Any, left: Any, right: Any) -> fx.Node:
        return emit(self.graph, target, (left, right))

    def _converted(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        if value_of(node).dtype == dtype:
            return node
        return emit(self.graph, prims.convert_element_type.default, (node, dtype))


def _like(node: fx.Node) -> dict[str, Any]:
    value = value_of(node)
    return {"dtype": value.dtype, "layout": torch.strided, "device": value.device, "pin_memory": False}


def _same_sizes(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return len(a) == len(b) and all(map(same, a, b))


def scores_in_blocks(graph: fx.Graph) -> bool:
    """Whether a graph computes logits in blocks, and all of its logits would exceed one block."""
    for node in graph.find_nodes(op="call_function", target=SCORED):
        hidden, matrix = value_of(argument(node, "hidden")), value_of(argument(node, "matrix"))
        size = count_hint(hidden.shape[:-1]) * hint(matrix.shape[1]) * hidden.element_size()
        if size > block_bytes(hidden.device.type):
            return True
    return False
