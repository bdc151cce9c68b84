"""Append keys and values on the device within their storage.

Terms
-----
room      Rows of a storage after the last row that a tensor shows. Rows are outermost in storage, so growing a storage
          moves no row within it: every tensor that uses it still shows the same rows.
alone     No other tensor uses a tensor's storage, such as a second cache made of it or a longer one cropped to it.

    alone, rows outermost, with room      -> write the new rows after the old ones
    alone, rows outermost, without room   -> grow the storage by a fraction of its rows, then write
    alone, another layout                 -> copy the old rows to a storage with room, and move the old tensor there too
    not alone                             -> copy the old rows to a storage with room

The result is a new tensor. The old tensor still shows its rows, so an error in a later step leaves a cache unchanged.
Keys and values are extended one after another: at most one of them exists twice, if only this call uses the cache.

This has run on CPUs, never on a GPU.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mom_compile.torch_compat.storages import is_alone
from mom_passes.ops.transfers import growing_strides

#: A storage gets room for this fraction of the rows it needs: 1 / PART.
PART = 32
#: Room for few rows: LEAST rows, but at most 1 / LARGEST_PART of the rows needed.
LEAST, LARGEST_PART = 64, 8

#: A storage larger than this multiple of what is needed, e.g. after a `crop`, is replaced by a smaller one.
MOST_KEPT = 4

#: Two threads may extend the same tensor; the second then finds the rows of the first in the storage. Reentrant, since
#: garbage collection may run other code.
_LOCK = threading.RLock()

#: Set after each trace of Dynamo, which leaves the call's inputs in reference cycles.
_TRACED = threading.Event()


def expect_garbage() -> None:
    """Make the next `Extend` that finds a shared storage collect garbage first, which costs less than a copy."""
    _TRACED.set()


@dataclass(frozen=True)
class Extend:
    """`[past, new]` to `past` followed by the rows of `new` along `dim` (see `growing_order`)."""

    dim: int

    def __call__(self, arguments: list[Any]) -> tuple[torch.Tensor]:
        past, new = arguments
        arguments.clear()
        held = past.shape[self.dim]
        with _LOCK:
            result = _with_rows(past, self.dim, held + new.shape[self.dim])
        result.narrow(self.dim, held, new.shape[self.dim]).copy_(new)
        return (result,)


def _with_rows(past: torch.Tensor, dim: int, rows: int) -> torch.Tensor:
    """Return `past` followed by uninitialized rows, `rows` in all."""
    shape = list(past.shape)
    shape[dim] = rows
    strides = growing_strides(shape, dim)
    alone = is_alone(past) or _is_alone_but_for_garbage(past)
    if alone and _has_strides(past, strides) and _has_room(past, rows * strides[dim], rows):
        return _over_storage(past.untyped_storage(), int(past.storage_offset()), past, shape, strides)
    buffer = past.new_empty((rows + room_for(rows)) * strides[dim])
    result = _over_storage(buffer.untyped_storage(), 0, past, shape, strides)
    del buffer
    result.narrow(dim, 0, past.shape[dim]).copy_(past)
    if alone:
        past.data = _over_storage(result.untyped_storage(), 0, past, past.shape, strides)
    return result


def _is_alone_but_for_garbage(past: torch.Tensor) -> bool:
    if not _TRACED.is_set():
        return False
    _TRACED.clear()
    gc.collect()
    return is_alone(past)


def _has_room(past: torch.Tensor, numbers: int, rows: int) -> bool:
    """Whether the storage has, or can be grown to have, `numbers` elements from the first of `past` on.

    A storage that starts with rows that `past` does not show is not grown: a sliding window would keep them all.
    """
    storage, size, first = past.untyped_storage(), past.element_size(), int(past.storage_offset())
    needed = (first + numbers) * size
    if needed <= storage.nbytes():
        return storage.nbytes() <= MOST_KEPT * needed
    if first > 0 or past.numel() == 0 or not storage.resizable():
        return False
    storage.resize_(needed + room_for(rows) * (numbers // rows) * size)
    return True


def room_for(rows: int) -> int:
    """Return the number of rows of room for a storage of `rows` rows."""
    return max(1, rows // PART, min(LEAST, rows // LARGEST_PART))


def _over_storage(
    storage: torch.UntypedStorage, offset: int, like: torch.Tensor, shape: Sequence[int], strides: Sequence[int]
) -> torch.Tensor:
    """Return a tensor over a storage that is not a view of another tensor."""
    return like.new_empty(0).set_(storage, offset, tuple(shape), tuple(strides))  # type: ignore[call-overload]


def _has_strides(value: torch.Tensor, strides: Sequence[int]) -> bool:
    found = zip(value.shape, value.stride(), strides, strict=True)
    return all(size == 1 or stride == wanted for size, stride, wanted in found)
