"""Keys and values on the device grow in the storage that they are in.

Terms
-----
room      Rows of a storage behind the last one that a tensor shows. Rows are outermost in storage, so that a storage
          that grows moves no row within itself: every tensor that sees it still sees the same rows.
alone     No other tensor sees the storage of a tensor: neither a second cache made of it, nor a longer one that was
          cropped to it.

    alone, laid out so, with room      -> write the new rows behind the old ones
    alone, laid out so, without room   -> let the storage grow by a part of its rows, then write
    alone, laid out otherwise          -> copy the old rows to a storage with room, which the old tensor then is in too
    not alone                          -> copy the old rows to a storage with room

The result is a new tensor. The old tensor still shows its rows, so an error in a later step leaves a cache as it was.
Keys and values are extended one after another: of a cache that only this call sees, at most one of them exists twice.

This has run on CPUs, and never on a GPU.
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

#: Room that a storage gets beyond the rows that it needs: this part of them.
PART = 32
#: Of fewer rows, so many and at most this part.
LEAST, LARGEST_PART = 64, 8

#: A storage that is so many times as large as what is needed of it, behind a `crop` say, is left for a smaller one.
MOST_KEPT = 4

#: Two threads may extend the same tensor. The one that comes second finds the result of the first in the storage.
#: Collecting garbage may run code of others.
_LOCK = threading.RLock()

#: Set behind each trace of Dynamo, which leaves the inputs of the call in cycles of references.
_TRACED = threading.Event()


def expect_garbage() -> None:
    """Let the next `Extend` that finds a storage shared collect garbage first: a copy of a cache costs more."""
    _TRACED.set()


@dataclass(frozen=True)
class Extend:
    """`[past, new]` to `past` with the rows of `new` behind it along `dim` (see `growing_order`)."""

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
    """`past` with unset rows behind it, `rows` in all."""
    shape = list(past.shape)
    shape[dim] = rows
    strides = growing_strides(shape, dim)
    alone = is_alone(past) or _is_alone_but_for_garbage(past)
    if alone and _has_strides(past, strides) and _has_room(past, rows * strides[dim], rows):
        return _seen(past.untyped_storage(), int(past.storage_offset()), past, shape, strides)
    buffer = past.new_empty((rows + room_for(rows)) * strides[dim])
    result = _seen(buffer.untyped_storage(), 0, past, shape, strides)
    del buffer
    result.narrow(dim, 0, past.shape[dim]).copy_(past)
    if alone:
        past.data = _seen(result.untyped_storage(), 0, past, past.shape, strides)
    return result


def _is_alone_but_for_garbage(past: torch.Tensor) -> bool:
    if not _TRACED.is_set():
        return False
    _TRACED.clear()
    gc.collect()
    return is_alone(past)


def _has_room(past: torch.Tensor, numbers: int, rows: int) -> bool:
    """Whether the storage has room for so many numbers from the first of `past` on, or could be made to have it.

    A storage that begins with rows that `past` does not show does not grow: a window that moves on would keep them all.
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
    """How many rows of room a storage gets for so many rows."""
    return max(1, rows // PART, min(LEAST, rows // LARGEST_PART))


def _seen(
    storage: torch.UntypedStorage, offset: int, like: torch.Tensor, shape: Sequence[int], strides: Sequence[int]
) -> torch.Tensor:
    """A tensor over a storage that is a view of no other tensor."""
    return like.new_empty(0).set_(storage, offset, tuple(shape), tuple(strides))  # type: ignore[call-overload]


def _has_strides(value: torch.Tensor, strides: Sequence[int]) -> bool:
    found = zip(value.shape, value.stride(), strides, strict=True)
    return all(size == 1 or stride == wanted for size, stride, wanted in found)
