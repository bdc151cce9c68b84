"""Rows of a tensor along a `Dim`: taking them and putting them back.

Terms
-----
plain dim       Tokens alone: rows are a `narrow`, a view.
composite dim   `outer x tokens x inner` folded into one dimension (see `mom_passes.rules.registry.Dim`).
                Its rows are not contiguous: unfold, narrow, fold again.

    [B*S, H] along Dim(0, outer=B), rows [2, 5):   view [B, S, H] -> narrow(1, 2, 3) -> [B*3, H]
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from mom_passes.rules.needs import Dim


def take(tensor: torch.Tensor, dim: Dim, start: int, count: int) -> torch.Tensor:
    """Rows `[start, start + count)` of a tensor, those of a composite dim without gaps, as a loop gives them to its
    body. A view wherever the layout allows one."""
    if dim.plain:
        return tensor.narrow(dim.index, start, count)
    rows = _unfold(tensor, dim).narrow(dim.index + 1, start, count)
    # Not -1: where another size is zero, any number would fit.
    size = int(dim.outer) * count * int(dim.inner)
    return rows.contiguous().reshape(*tensor.shape[: dim.index], size, *tensor.shape[dim.index + 1 :])


def put(full: torch.Tensor, dim: Dim, start: int, piece: torch.Tensor) -> None:
    """Copies a piece, as `take` returns it, over rows `[start, ...)` of `full`, in place."""
    count = length(piece, dim)
    if dim.plain:
        full.narrow(dim.index, start, count).copy_(piece)
        return
    _unfold(full, dim).narrow(dim.index + 1, start, count).copy_(_unfold(piece, dim))


def length(tensor: torch.Tensor, dim: Dim) -> int:
    """The number of rows a tensor holds along a dim."""
    if dim.plain:
        return tensor.shape[dim.index]
    return tensor.shape[dim.index] // (int(dim.outer) * int(dim.inner))


def _unfold(tensor: torch.Tensor, dim: Dim) -> torch.Tensor:
    """`[..., outer * tokens * inner, ...]` as `[..., outer, tokens, inner, ...]`. Always a view."""
    outer, inner = int(dim.outer), int(dim.inner)
    unflatten: Callable[..., torch.Tensor] = tensor.unflatten
    return unflatten(dim.index, (outer, length(tensor, dim), inner))
