"""Read and write rows of a tensor along a `Dim`.

Terms
-----
plain dim       Tokens only: rows are a `narrow`, a view.
composite dim   `outer x tokens x inner` folded into one dimension (see `mom_passes.rules.needs.Dim`).
                Its rows are not contiguous: unfold, narrow, fold again.

    [B*S, H] along Dim(0, outer=B), rows [2, 5):   view [B, S, H] -> narrow(1, 2, 3) -> [B*3, H]
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from mom_passes.rules.needs import Dim


def take(tensor: torch.Tensor, dim: Dim, start: int, count: int) -> torch.Tensor:
    """Return rows `[start, start + count)` of a tensor as a loop passes them to its body.

    For a plain dim the result is a view. For a composite dim it is contiguous: a copy unless the rows already are.
    """
    if dim.plain:
        return tensor.narrow(dim.index, start, count)
    rows = _unfold(tensor, dim).narrow(dim.index + 1, start, count)
    # Not -1, which is ambiguous if another size is zero.
    size = int(dim.outer) * count * int(dim.inner)
    return rows.contiguous().reshape(*tensor.shape[: dim.index], size, *tensor.shape[dim.index + 1 :])


def put(full: torch.Tensor, dim: Dim, start: int, piece: torch.Tensor) -> None:
    """Copy a piece with the layout of `take` to the rows of `full` from `start` on, in place."""
    count = length(piece, dim)
    if dim.plain:
        full.narrow(dim.index, start, count).copy_(piece)
        return
    _unfold(full, dim).narrow(dim.index + 1, start, count).copy_(_unfold(piece, dim))


def length(tensor: torch.Tensor, dim: Dim) -> int:
    """Return the number of rows of a tensor along a dim."""
    if dim.plain:
        return tensor.shape[dim.index]
    return tensor.shape[dim.index] // (int(dim.outer) * int(dim.inner))


def _unfold(tensor: torch.Tensor, dim: Dim) -> torch.Tensor:
    """Return a view of `[..., outer * tokens * inner, ...]` as `[..., outer, tokens, inner, ...]`."""
    outer, inner = int(dim.outer), int(dim.inner)
    unflatten: Callable[..., torch.Tensor] = tensor.unflatten
    return unflatten(dim.index, (outer, length(tensor, dim), inner))
