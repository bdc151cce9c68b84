"""Split copies to and from pinned memory where two pinned ranges meet.

A driver accepts a host address range that is pinned as a whole or not at all. It is not specified whether it accepts
one that was pinned by two calls. Rows that span a seam are therefore copied in pieces, as bytes:

    region   |  pinned by the first commit  |  by the second  |
    rows              [ piece ............ ][ piece .. ]
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from mom_compile.runtime.host.holders import holder_of


def between_seams(host: torch.Tensor, other: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Split a copy of host rows to or from `other` into pairs of pieces that each fall within one pinned range.

    Tensors without a holder, or of different layouts, are one piece.
    """
    holder = holder_of(host)
    if holder is None or not same_layout(host, other):
        yield host, other
        return
    begin = host.data_ptr() - holder.region.bytes.data_ptr()
    runs = list(holder.region.between_seams(begin, begin + host.numel() * host.element_size()))
    if len(runs) == 1:
        yield host, other
        return
    one, two = as_bytes(host), as_bytes(other)
    for first, end in runs:
        yield one[first - begin : end - begin], two[first - begin : end - begin]


def same_layout(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two dense tensors store their elements in the same order, so that a copy is one run of bytes."""
    return (
        one.shape == other.shape
        and _order(one) == _order(other)
        and _in_order(one).is_contiguous()
        and _in_order(other).is_contiguous()
    )


def _order(tensor: torch.Tensor) -> list[int]:
    """Return the dimensions, outermost first. Dimensions of size 1 come first: their strides are arbitrary."""
    strides = tensor.stride()
    return sorted(range(tensor.dim()), key=lambda d: -strides[d] if tensor.shape[d] > 1 else -math.inf)


def _in_order(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.permute(_order(tensor))


def as_bytes(dense: torch.Tensor) -> torch.Tensor:
    """Return a dense tensor's bytes in storage order."""
    return _in_order(dense).view(-1).view(torch.uint8)
