"""Chunk rules of matrix products, each from its einsum equation.

Terms
-----
label    A letter of the equation. The output can be split along each of its labels: operands with the label are sliced,
         the others are needed whole. In `"mk,kn->mn"`, m slices the first operand, n the second; k is contracted.
bias     An additional operand that broadcasts to the output.

    baddbmm = contract("bmk,bkn->bmn", bias=True):  args (bias, batch1, batch2)
"""

from __future__ import annotations

from torch import fx

from mom_passes.errors import CannotChunk
from mom_passes.graph.arguments import aten
from mom_passes.graph.sizes import count_hint, hint
from mom_passes.graph.values import operands, value_of
from mom_passes.rules.claim import Claim
from mom_passes.rules.factories import broadcast_need, checked, output_shape
from mom_passes.rules.needs import All, Dim, Fold, Need, Rows
from mom_passes.rules.reduction import HALF
from mom_passes.rules.registry import FoldRule, Rule, facts, register, register_fold, register_work


def contract(equation: str, bias: bool = False) -> Rule:
    """Return the chunk rule of a product. With `bias`, operand 0 is added to the result."""
    inputs, output = equation.split("->")
    terms = inputs.split(",")

    def rule(node: fx.Node, dim: Dim) -> Claim:
        label = output[checked(node, dim).index]
        needs: list[Need] = [Rows(dim.at(term.index(label))) if label in term else All() for term in terms]
        if bias:
            needs.insert(0, broadcast_need(node, operands(node)[0], output_shape(node), dim))
        return Claim(tuple(needs))

    return rule


#: Grouped products `(rows [N, K], matrices [G, K, M], ends [G]) -> [N, M]`. Rows `[ends[g-1], ends[g])` are multiplied
#: with matrix `g`.
GROUPED = ("aten::_grouped_mm", "transformers::grouped_mm_fallback")


def contract_tokens(equation: str) -> FoldRule:
    """Return the fold rule of a product that contracts tokens: partial products are summed."""
    terms = equation.split("->")[0].split(",")
    (label,) = set(terms[0]) & set(terms[1]) - set(equation.split("->")[1])

    def rule(node: fx.Node, dims: tuple[Dim | None, ...]) -> Claim:
        first = next((dim for dim in dims if dim is not None), Dim(0))
        if any(dim is not None and term[dim.index] != label for term, dim in zip(terms, dims, strict=True)):
            raise CannotChunk(node, first, "does not contract it")
        if len({dim.at(0) for dim in dims if dim is not None}) > 1:
            raise CannotChunk(node, first, "its operands have tokens in different layouts")
        if value_of(node).dtype in HALF:
            raise CannotChunk(node, first, "each partial product would be rounded to half precision")
        # An operand without tokens, such as positions, has as many entries in the contracted dimension.
        return Claim(tuple(Rows(first.at(term.index(label))) for term in terms), (Fold(aten.add.Tensor, 0),))

    return rule


def grouped_work(node: fx.Node) -> int:
    return count_hint(value_of(node).shape) * hint(value_of(operands(node)[0]).shape[-1])


# A grouped product cannot be split by itself, but with the sort before and the inverse after it (`tokens.experts`).
register_work(*GROUPED, work=grouped_work)


def is_grouped_product(node: fx.Node) -> bool:
    return facts(node).work is grouped_work


register(aten.mm.default, aten._int_mm.default, recompute=False)(contract("mk,kn->mn"))
register(aten.bmm.default, recompute=False)(contract("bmk,bkn->bmn"))
register(aten.mv.default, recompute=False)(contract("mk,k->m"))
register(aten.addmm.default, recompute=False)(contract("mk,kn->mn", bias=True))
register(aten.baddbmm.default, recompute=False)(contract("bmk,bkn->bmn", bias=True))
register(aten.addmv.default, recompute=False)(contract("mk,k->m", bias=True))

register_fold(aten.mm.default)(contract_tokens("mk,kn->mn"))
register_fold(aten.bmm.default)(contract_tokens("bmk,bkn->bmn"))
register_fold(aten.mv.default)(contract_tokens("mk,k->m"))
