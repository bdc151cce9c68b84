"""`mom::copy_rows`: rows in a storage of their own."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mom_passes.ops.library import LIBRARY

LIBRARY.define("copy_rows(Tensor rows, int[] order) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
"""Rows in a storage of their own, dense, with their dimensions in `order` from the outermost in storage.

An operator of its own, since Inductor takes a `clone` whose strides are its source's for nothing and drops it.
"""

COPY_ROWS = torch.ops.mom.copy_rows.default


def copy_rows(rows: torch.Tensor, order: Sequence[int]) -> torch.Tensor:
    own = torch.empty_permuted(rows.shape, list(order), dtype=rows.dtype, device=rows.device)
    return own.copy_(rows)


@torch.library.register_fake("mom::copy_rows", lib=LIBRARY)
def _copy_rows_fake(rows: torch.Tensor, order: Sequence[int]) -> torch.Tensor:
    return torch.empty_permuted(rows.shape, list(order), dtype=rows.dtype, device=rows.device)


LIBRARY.impl("copy_rows", copy_rows, "CompositeExplicitAutograd")
