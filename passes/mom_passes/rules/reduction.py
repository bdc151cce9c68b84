"""Chunk rules of operators that combine elements along some dimensions: reductions, softmax, norms, scans, sorts.

Rows along any other dimension are independent. Most rules are a list of origins (see `mom_passes.rules.factories`).

Terms
-----
over     The dimensions along which an operator combines elements. A reduction removes them or keeps them with size 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from mom_passes.errors import CannotChunk
from mom_passes.graph.arguments import argument, aten, axes, axis, has_argument, overloads
from mom_passes.graph.meta import meta_value
from mom_passes.graph.values import operands, value_of
from mom_passes.rules.calls import claim
from mom_passes.rules.claim import Claim
from mom_passes.rules.factories import Origin, all_but, checked, follows, shape_of
from mom_passes.rules.needs import All, Carry, Dim, Last, Rows
from mom_passes.rules.registry import register

REDUCTIONS = """
    all.dim all.dims amax amin any.dim any.dims argmax argmin count_nonzero.dim_IntList linalg_vector_norm
    logsumexp max.dim mean.dim min.dim nansum norm.ScalarOpt_dim prod.dim_int std.correction std.dim
    std_mean.correction sum.dim_IntList var.correction var.dim var_mean.correction var_mean.dim
"""

HALF = (torch.float16, torch.bfloat16)

SOFTMAXES = "_log_softmax _softmax log_softmax.int softmax.int"
#: Scan -> its carry: the value before the first row, and the operator that joins the carry with a row.
SCANS: dict[Any, Carry] = {
    aten.cumsum.default: Carry(0, Last(), join=aten.add.Tensor),
    aten.cumprod.default: Carry(1, Last(), join=aten.mul.Tensor),
}


@follows(*overloads(aten, REDUCTIONS))
def reduction(node: fx.Node) -> list[Origin]:
    rank = len(shape_of(operands(node)[0]))
    over = reduced(node, rank)
    if has_argument(node, "keepdim") and argument(node, "keepdim"):
        return all_but(rank, over, "reduces over it")
    return [index for index in range(rank) if index not in over]


def reduced(node: fx.Node, rank: int) -> list[int]:
    """Return the dimensions that a reduction reduces over: all of them if its `dim` is None or empty."""
    dims = argument(node, "dim")
    return axes(dims, rank) if dims is not None and dims != [] else list(range(rank))


@follows(*overloads(aten, SOFTMAXES))
def softmax(node: fx.Node) -> list[Origin]:
    return _along(node, "normalises over it")


@register(*SCANS, recompute=False)
def scan(node: fx.Node, dim: Dim) -> Claim:
    along = axis(argument(node, "dim"), len(shape_of(operands(node)[0])))
    if checked(node, dim).index != along:
        return Claim((Rows(dim),))
    if value_of(node).dtype in HALF:
        raise CannotChunk(node, dim, "the accumulated value would be rounded to half precision in every mini-sequence")
    return Claim((Rows(dim),), carries=(SCANS[node.target],))


@follows(*overloads(aten, "cummax cummin logcumsumexp"), recompute=False)
def running(node: fx.Node) -> list[Origin]:
    return _along(node, "accumulates along it")


@follows(aten.sort.default, aten.sort.stable, aten.topk.default, recompute=False)
def sort(node: fx.Node) -> list[Origin]:
    return _along(node, "sorts along it")


@follows(aten.glu.default)
def gated(node: fx.Node) -> list[Origin]:
    return _along(node, "multiplies its two halves")


def _along(node: fx.Node, reason: str) -> list[Origin]:
    rank = len(shape_of(operands(node)[0]))
    return all_but(rank, axes(argument(node, "dim"), rank), reason)


@register(aten.native_layer_norm.default, aten._fused_rms_norm.default)
def norm(node: fx.Node, dim: Dim) -> Claim:
    """Rows of the input, all of the weights. The statistics keep the rank of the input, so they have the same rows."""
    operand = argument(node, "input")
    count = len(shape_of(operand)) - len(argument(node, "normalized_shape"))
    if checked(node, dim).index >= count:
        raise CannotChunk(node, dim, "normalises over it")
    outputs = (Rows(dim),) * len(meta_value(node))
    return claim(node, {"input": Rows(dim), "weight": All(), "bias": All()}, outputs)
