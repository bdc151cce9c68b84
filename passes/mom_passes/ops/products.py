"""`mom::product_into`: a product with a matrix, written where it belongs."""

from __future__ import annotations

import torch

from mom_passes.ops.library import LIBRARY

LIBRARY.define(
    "product_into(Tensor? bias, Tensor left, Tensor right, Tensor(a!) place) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)
"""`left @ right`, `[M, K]` and `[K, N]`, plus `bias`, what `addmm` takes for one, into `place` `[M, N]`.

It has the product's shape and dtype, and each of its rows is adjacent in memory. The library that multiplies writes it.
"""

PRODUCT_INTO = torch.ops.mom.product_into.default


def _product_into(bias: torch.Tensor | None, left: torch.Tensor, right: torch.Tensor, place: torch.Tensor) -> None:
    if bias is None:
        torch.mm(left, right, out=place)
    else:
        torch.addmm(bias, left, right, out=place)


def _nothing(bias: torch.Tensor | None, left: torch.Tensor, right: torch.Tensor, place: torch.Tensor) -> None:
    """Shapes are those of operands that are there: nothing is made."""


torch.library.register_fake("mom::product_into", _nothing, lib=LIBRARY)
LIBRARY.impl("product_into", _product_into, "CompositeExplicitAutograd")
