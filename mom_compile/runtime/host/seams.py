"""Copies to and from pinned memory, cut where two pinned ranges meet.

A driver takes a range of host addresses that is pinned, or one that is not; whether it takes one that was pinned in
two calls is not promised. So rows that lie across a seam are copied in pieces, as bytes:

    region   |  pinned by the first commit  |  by the second  |
    rows              [ piece ............ ][ piece .. ]
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from mom_compile.runtime.host.holders import holder_of


def between_seams(host: torch.Tensor, other: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Rows that are held on the host and as many elsewhere, in the same layout, as pairs of pieces that each lie within
    one pinned range. Anything else is one piece."""
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
    """Whether two dense tensors have their elements in the same order, so that a copy is one run of bytes."""
    return (
        one.shape == other.shape
        and _order(one) == _order(other)
        and _in_order(one).is_contiguous()
        and _in_order(other).is_contiguous()
    )


def _order(tensor: torch.Tensor) -> list[int]:
    """Dimensions, outermost in storage first. The strides of those with one step mean nothing: these come before."""
    strides = tensor.stride()
    return sorted(range(tensor.dim()), key=lambda d: -strides[d] if tensor.shape[d] > 1 else -math.inf)


def _in_order(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.permute(_order(tensor))


def as_bytes(dense: torch.Tensor) -> torch.Tensor:
    """All of a dense tensor, in the order of its storage."""
    return _in_order(dense).view(-1).view(torch.uint8)
