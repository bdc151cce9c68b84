"""Find the reductions of a head's logits (see `tokens.scored`), and prove that nothing else reads them. An analysis."""

from __future__ import annotations

from torch import fx

from mom_passes.graph.arguments import argument, aten
from mom_passes.graph.sizes import product, same
from mom_passes.graph.values import operands, value_of
from mom_passes.ops.scored import GREEDY, LIKELY, TOTAL, WEIGHTED
from mom_passes.tokens.heads import Head
from mom_passes.tokens.logits import Form, NoReductions, NotScored, form_of, reduction_by

#: The most columns per row that a gather may choose, since each block is searched for all of them.
MOST_TARGETS = 64


class Reductions:
    """The reductions of a head's logits.

    forms   the wide values, with their forms
    kinds   the reductions in graph order: "amax", "argmax", "sum" or "gather"
    first   the first reduction
    late    the nodes after `first` that compute targets, in order
    wants   the results that `mom.scored` must compute in addition to the maxima

    Raises `NotScored` if logits have another reader, `NoReductions` if they have one before any reduction.
    """

    def __init__(self, head: Head) -> None:
        self.head = head
        self.forms: dict[fx.Node, Form] = {head.logits: Form()}
        self.kinds: dict[fx.Node, str] = {}
        try:
            self._read()
        except NotScored as reason:
            raise reason if self.kinds else NoReductions(str(reason)) from None
        self.first = min(self.kinds)
        self.late = self._late()
        self.wants = self._wants()

    def _read(self) -> None:
        node = self.head.logits
        while (node := node.next).op != "root":
            if node.target is aten.sym_size.int or self.forms.keys().isdisjoint(node.all_input_nodes):
                continue
            if node.op == "output":
                raise NotScored("logits are returned")
            kind = reduction_by(node, self.forms)
            if kind is None:
                self.forms[node] = form_of(node, self.forms, self.head.columns)
            else:
                self.kinds[node] = kind
            if kind == "gather":
                self._check_targets(node)
        if not self.kinds:
            raise NotScored("no reduction reads its logits")

    def _check_targets(self, node: fx.Node) -> None:
        """Raise `NotScored` unless a gather chooses a few columns of every row.

        Views and slices keep rows in order, so a wide value with as many rows as the logits has the same rows.
        """
        rows, index = value_of(operands(node)[0]).shape[:-1], value_of(argument(node, "index")).shape
        all_rows = same(product(rows), product(value_of(self.head.logits).shape[:-1]))
        if not all_rows or len(index) != len(rows) + 1 or not all(map(same, index, rows)):
            raise NotScored(f"{node.name} chooses columns of some rows only")
        if not isinstance(index[-1], int) or index[-1] > MOST_TARGETS:
            raise NotScored(f"{node.name} chooses {index[-1]} columns per row, at most {MOST_TARGETS} are supported")

    def _wants(self) -> list[str]:
        summed = [self.forms[operands(node)[0]] for node, kind in self.kinds.items() if kind == "sum"]
        weighted = [form for form in summed if form.linear is not None]
        wants = [TOTAL] if summed else []
        if weighted:
            wants.append(LIKELY if weighted[0].likely else WEIGHTED)
            if any(form.likely != weighted[0].likely for form in weighted):
                raise NotScored("one sum leaves out columns of likelihood 0, and another does not")
        return wants + ([GREEDY] if "argmax" in self.kinds.values() else [])

    def _late(self) -> list[fx.Node]:
        found: set[fx.Node] = set()
        pending = [argument(node, "index") for node, kind in self.kinds.items() if kind == "gather"]
        while pending:
            node = pending.pop()
            if node in found or node < self.first:
                continue
            if node in self.kinds or node in self.forms:
                raise NotScored("a chosen column depends on the logits")
            found.add(node)
            pending += node.all_input_nodes
        return sorted(found)
