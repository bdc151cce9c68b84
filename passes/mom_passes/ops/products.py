"""`mom::product_into`: a matrix product written into a given tensor."""

from __future__ import annotations

import torch

from mom_passes.ops.library import define, implement

PRODUCT_INTO = define("product_into(Tensor? bias, Tensor left, Tensor right, Tensor(a!) place) -> ()")
"""Write `left @ right` plus `bias` into `place`.

left `[M, K]`, right `[K, N]`, bias anything that `addmm` accepts, place `[M, N]` of the product's dtype with contiguous
rows. The matrix library writes the result itself.
"""


def _product_into(bias: torch.Tensor | None, left: torch.Tensor, right: torch.Tensor, place: torch.Tensor) -> None:
    if bias is None:
        torch.mm(left, right, out=place)
    else:
        torch.addmm(bias, left, right, out=place)


def _fake(bias: torch.Tensor | None, left: torch.Tensor, right: torch.Tensor, place: torch.Tensor) -> None:
    """The operator allocates nothing."""


implement(PRODUCT_INTO, _product_into, _fake)
