"""Outline what is asked of logits as one operator, which never has the logits of all columns at once.

Terms
-----
head, chain, wide, row value, form    See `tokens.logits`.
answer      What takes the place of a reduction of a wide value: arithmetic with the operator's results, a few numbers
            for each row. `exp` of shifts is taken in float64.

    sum(f * exp(x - b))              f * exp(shift - b) * total
    sum(f * exp(x - b) * (x - a))    f * exp(shift - b) * (weighted + (shift - a) * total)
    amax(x - a)                      top - a
    argmax(x - a)                    greedy
    gather(f(x), targets)            f(chosen)

    for each head whose columns are more than a row has numbers:
        every value behind its logits is wide and of a known form, or asks one of these of such a value
        call    = scored(rows, matrix, bias, targets, steps)
        each that asks = its answer; the wide values are gone

Before:  x = slice(view(mm(h, w)), 1, 0, -1); m = amax(x); s = sum(exp(x - m)); t = gather(x - m, labels) - log(s)
After:   top, shift, total, _, chosen, _ = scored(slice(view(h), 1, 0, -1), w, None, labels, [], [], ["total"])
         s = exp(shift - top) * total; t = chosen - top - log(s)

Logits that somebody reads otherwise, a caller above all, exist anyway: the graph stays as it is there. So do those of a
number of rows that is known and makes them no larger than a block. A log-softmax may round two logits to one number,
of which `argmax` takes the first; the answer is the larger logit.
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
from mom_passes.ops.scored import GREEDY, LIKELY, SCORED, TOTAL, WEIGHTED, block_bytes
from mom_passes.tokens.logits import (
    Factor,
    Form,
    Head,
    NoReductions,
    NotScored,
    form_of,
    head_of,
    keeps_columns,
    reduction_by,
    with_columns,
)

#: Columns that may be chosen of a row: each block is looked through for all of them.
MOST_TARGETS = 64

TOP, SHIFT, TOTALS, WEIGHTS, CHOSEN, BEST = range(6)


def outline_scores(gm: fx.GraphModule, least: int | None = None) -> dict[str, str]:
    """Replace every head of which all is known that is asked, in place. Returns why others were left, by their names.

    Logits of a known number of bytes that are no more than `least` stay; None: as many as a block has.
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


class Reductions:
    """What a graph asks of a head's logits: `asking` nodes with what each wants, and the `forms` of wide values.

    Raises `NotScored` where logits are read for something else.
    """

    def __init__(self, head: Head) -> None:
        self.head = head
        self.forms: dict[fx.Node, Form] = {head.logits: Form()}
        self.asking: dict[fx.Node, str] = {}
        try:
            self._read()
        except NotScored as reason:
            raise reason if self.asking else NoReductions(str(reason)) from None
        self.first = min(self.asking)
        self.late = self._late()

    def _read(self) -> None:
        node = self.head.logits
        while (node := node.next).op != "root":
            if node.target is aten.sym_size.int or self.forms.keys().isdisjoint(node.all_input_nodes):
                continue
            if node.op == "output":
                raise NotScored("logits are returned")
            asked = reduction_by(node, self.forms)
            if asked is None:
                self.forms[node] = form_of(node, self.forms, self.head.columns)
            else:
                self.asking[node] = asked
            if asked == "gather":
                self._check_targets(node)
        if not self.asking:
            raise NotScored("nothing is asked of its logits")

    def _check_targets(self, node: fx.Node) -> None:
        """Views and slices keep rows in order: as many rows as the logits have are the same rows."""
        rows, index = value_of(self.wide_of(node)).shape[:-1], value_of(argument(node, "index")).shape
        if not same(product(rows), product(value_of(self.head.logits).shape[:-1])):
            raise NotScored(f"{node.name} chooses columns of some rows alone")
        if len(index) != len(rows) + 1 or not all(map(same, index, rows)):
            raise NotScored(f"{node.name} chooses columns of some rows alone")
        if not isinstance(index[-1], int) or index[-1] > MOST_TARGETS:
            raise NotScored(f"{node.name} chooses {index[-1]} columns of a row")

    def wide_of(self, node: fx.Node) -> fx.Node:
        """What an asking node reads."""
        return operands(node)[0]

    @property
    def targets(self) -> list[fx.Node]:
        return [argument(node, "index") for node, asked in self.asking.items() if asked == "gather"]

    @property
    def wants(self) -> list[str]:
        summed = [self.forms[self.wide_of(node)] for node, asked in self.asking.items() if asked == "sum"]
        weighted = [form for form in summed if form.linear is not None]
        wants = [TOTAL] if summed else []
        if weighted:
            wants.append(LIKELY if weighted[0].likely else WEIGHTED)
            if any(form.likely != weighted[0].likely for form in weighted):
                raise NotScored("one sum has columns of likelihood 0, and another has not")
        return wants + ([GREEDY] if "argmax" in self.asking.values() else [])

    def _late(self) -> list[fx.Node]:
        """What targets are made of and stands behind the first that asks, in order."""
        found: set[fx.Node] = set()
        pending = list(self.targets)
        while pending:
            node = pending.pop()
            if node in found or node < self.first:
                continue
            if node in self.asking or node in self.forms:
                raise NotScored("a column is chosen by what the logits are")
            found.add(node)
            pending += node.all_input_nodes
        return sorted(found)


class _Outline:
    """Puts a call and answers in place of a head and what is asked of it."""

    def __init__(self, graph: fx.Graph, found: Reductions) -> None:
        self.graph, self.found, self.head = graph, found, found.head
        self.answers: dict[fx.Node, fx.Node] = {}
        self.results: dict[int, fx.Node] = {}
        #: Of the columns that are chosen, how many have been handed out.
        self.taken = 0

    def run(self) -> None:
        found = self.found
        for value in (self.head.product, *self.head.chain, *found.forms):
            self._read_sizes_elsewhere(value)
        for node in found.late:
            found.first.prepend(node)
        with self.graph.inserting_before(found.first):
            targets = [self._shape_like_logits(node) for node, asked in found.asking.items() if asked == "gather"]
            self._call(targets)
        for node, asked in found.asking.items():
            with self.graph.inserting_before(node):
                answer = self._answer(node, asked)
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

    def _read_sizes_elsewhere(self, value: fx.Node) -> None:
        """Off the rows that are multiplied, or the matrix."""
        last = value_of(value).dim() - 1
        for node in [user for user in value.users if user.target is aten.sym_size.int]:
            with self.graph.inserting_before(node):
                if node.args[1] in (-1, last):
                    other = emit(self.graph, aten.sym_size.int, (self.head.matrix, 1))
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
        call = emit(self.graph, SCORED, given)
        self.results = {item: emit(self.graph, operator.getitem, (call, item)) for item in range(BEST + 1)}

    def _rows_of(self, value: fx.Node, before: fx.Node) -> fx.Node:
        """The rows of the hidden states that a value of the chain or a wide one has logits of, laid out as these."""
        if value is self.head.product:
            return self.head.hidden
        source = self._wide_operand(value) if value in self.found.forms and value is not self.head.logits else None
        rows = self._rows_of(source or operands(value)[0], before)
        if not keeps_columns(value, self.head.columns):
            return rows
        width = size_node(self.graph, value_of(self.head.hidden).shape[-1], before)
        return self._shown(value, rows, width)

    def _shape_like_logits(self, node: fx.Node) -> fx.Node:
        """The columns that a `gather` chooses, with the rows as the logits have them."""
        index, shape = argument_node(node, "index"), value_of(self.head.logits).shape
        if _same_sizes(value_of(index).shape[:-1], shape[:-1]):
            return index
        rows = [size_node(self.graph, size, self.found.first) for size in shape[:-1]]
        return emit(self.graph, aten.reshape.default, (index, [*rows, value_of(index).shape[-1]]))

    # --- answers ---

    def _answer(self, node: fx.Node, asked: str) -> fx.Node:
        wide = self.found.wide_of(node)
        if asked == "gather":
            return self._made_of(wide, self._own_columns(argument(node, "index")))
        if asked == "amax":
            answer = self._made_of(wide, self.results[TOP])
        elif asked == "argmax":
            answer = self._seen_by(wide, self.results[BEST])
        else:
            answer = self._sum(wide, self.found.forms[wide])
        return answer if argument(node, "keepdim") else emit(self.graph, aten.squeeze.dim, (answer, -1))

    def _own_columns(self, index: fx.Node) -> fx.Node:
        """Of what all gathers choose, this one's."""
        chosen, count = self.results[CHOSEN], value_of(index).shape[-1]
        if same(count, value_of(chosen).shape[-1]):
            return chosen
        first, self.taken = self.taken, self.taken + int(count)
        return emit(self.graph, aten.slice.Tensor, (chosen, -1, first, self.taken))

    def _sum(self, wide: fx.Node, form: Form) -> fx.Node:
        shift = self._seen_by(wide, self.results[SHIFT])
        result = self._seen_by(wide, self.results[TOTALS])
        assert form.exponent is not None
        if form.linear is not None:
            lower = self._less(shift, form.linear)
            weighted = self._seen_by(wide, self.results[WEIGHTS])
            result = self._do(aten.add.Tensor, weighted, self._do(aten.mul.Tensor, lower, result))
        likelihood = emit(self.graph, aten.exp.default, (self._less(shift, form.exponent),))
        result = self._do(aten.mul.Tensor, likelihood, result)
        for factor in form.factors:
            result = self._do(aten.div.Tensor if factor.divides else aten.mul.Tensor, result, self._row(factor))
        if not form.likely:
            return result
        known = self._do(aten.eq.Tensor, result, result)
        zero = emit(self.graph, aten.full.default, ([], 0.0), _like(result))
        return emit(self.graph, aten.where.self, (known, result, zero))

    def _less(self, shift: fx.Node, subtracted: Sequence[Any]) -> fx.Node:
        for value in subtracted:
            shift = self._do(aten.sub.Tensor, shift, self._row(Factor(value)))
        return shift

    def _row(self, factor: Factor) -> Any:
        """A row value in float64; if it was itself an answer, that."""
        value = factor.value
        if not isinstance(value, fx.Node) or not isinstance(meta_value(value), torch.Tensor):
            return value
        return self._converted(self.answers.get(value, value), torch.float64)

    # --- rows of results, as a wide value has them ---

    def _seen_by(self, wide: fx.Node, result: fx.Node) -> fx.Node:
        """A number for each row, laid out as the rows of a wide value."""
        return self._through(wide, result, lambda node, given: given[self._wide_operand(node)])

    def _made_of(self, wide: fx.Node, columns: fx.Node) -> fx.Node:
        """What a wide value is at some columns, given the logits there."""

        def apply(node: fx.Node, given: dict[fx.Node, fx.Node]) -> fx.Node:
            if node.target is prims.convert_element_type.default:
                (one,) = given.values()
                return self._converted(one, torch.promote_types(value_of(one).dtype, value_of(node).dtype))
            args = fx.map_arg(node.args, lambda arg: given.get(arg, self.answers.get(arg, arg)))
            return emit(self.graph, node.target, args, dict(node.kwargs))

        return self._through(wide, columns, apply)

    def _through(
        self, wide: fx.Node, result: fx.Node, apply: Callable[[fx.Node, dict[fx.Node, fx.Node]], fx.Node]
    ) -> fx.Node:
        if wide is self.head.logits:
            return result
        inner = {n: self._through(n, result, apply) for n in dict.fromkeys(operands(wide)) if n in self.found.forms}
        if keeps_columns(wide, self.head.columns):
            (given,) = inner.values()
            return self._shown(wide, given, int(value_of(given).shape[-1]))
        return apply(wide, inner)

    def _wide_operand(self, node: fx.Node) -> fx.Node:
        return next(operand for operand in operands(node) if operand in self.found.forms)

    def _shown(self, node: fx.Node, rows: fx.Node, columns: Any) -> fx.Node:
        """Rows with so many columns, as `node` shows those of a wide value. What was folded and unfolds is itself."""
        call = with_columns(node, rows, columns)
        if call is None:
            return rows
        shown = emit(self.graph, *call)
        folded = rows.target in (aten.view.default, aten.reshape.default) and call[0] is aten.reshape.default
        before = operands(rows)[0] if folded else shown
        if before is not shown and _same_sizes(value_of(before).shape, value_of(shown).shape):
            self.graph.erase_node(shown)
            return before
        return shown

    # --- nodes ---

    def _do(self, target: Any, left: Any, right: Any) -> fx.Node:
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
    """Whether a graph has logits of which only a block is there at a time, and all of them would be more."""
    for node in graph.find_nodes(op="call_function", target=SCORED):
        hidden, matrix = value_of(argument(node, "hidden")), value_of(argument(node, "matrix"))
        size = count_hint(hidden.shape[:-1]) * hint(matrix.shape[1]) * hidden.element_size()
        if size > block_bytes(hidden.device.type):
            return True
    return False
