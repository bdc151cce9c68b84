"""Read weights of a mapped file by system calls. If the file was truncated or its disk fails, accessing the mapping
would crash the process, while a call returns an error.

    the file     | ... | w, of which a tensor shows some or all rows | ... |
    copy_rows            preadv -> target
    read                 preadv -> new memory with the same strides
    read_rows            preadv of the selected rows, each once; adjacent rows together

All functions raise `CopyError` if the file cannot be read.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import torch

from mom_compile.runtime.host.done import CopyError
from mom_compile.runtime.host.holders import error_prefix, holder_of
from mom_compile.runtime.host.seams import as_bytes, same_layout
from mom_compile.runtime.host.weight_bytes import WeightBytes


def is_mapped(tensor: torch.Tensor) -> bool:
    """Whether a tensor shows weights of a file."""
    holder = holder_of(tensor)
    return isinstance(holder, WeightBytes) and holder.in_file


def copy_rows(target: torch.Tensor, source: torch.Tensor) -> None:
    """Run `target.copy_(source)` in host memory; `source` may be mapped."""
    if not is_mapped(source):
        target.copy_(source)
    elif same_layout(target, source):
        _fill(as_bytes(target), source, _begin(source))
    else:
        target.copy_(read(source))


def read(host: torch.Tensor) -> torch.Tensor:
    """Return a copy of a tensor with the same strides in host memory."""
    made = torch.empty_strided(host.shape, host.stride(), dtype=host.dtype)
    last = sum((size - 1) * step for size, step in zip(host.shape, host.stride(), strict=True))
    if host.numel():
        all_bytes = made.as_strided((last + 1,), (1,)).view(torch.uint8)
        _fill(all_bytes, host, _begin(host))
    return made


def read_rows(host: torch.Tensor, at: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a table `[rows, ...]` of the distinct rows that `at` selects, and their indices. Raises `IndexError`."""
    wanted, where = at.unique(return_inverse=True)
    if wanted.numel() and not 0 <= int(wanted[0]) <= int(wanted[-1]) < host.shape[0]:
        raise IndexError(f"rows {int(wanted[0])} to {int(wanted[-1])} are out of range for {host.shape[0]} rows")
    if not host.is_contiguous():
        return read(host), at
    table = host.new_empty([wanted.numel(), *host.shape[1:]])
    row = host.nbytes // max(1, host.shape[0])
    into = as_bytes(table)
    for first, end, run in _runs(wanted.tolist()):
        _fill(into[first * row : end * row], host, _begin(host) + run * row)
    return table, where


def _runs(rows: list[int]) -> Iterator[tuple[int, int, int]]:
    """Group ascending numbers into runs without gaps: `[first, end)` in the list, and the first number."""
    first = 0
    for end in range(1, len(rows) + 1):
        if end == len(rows) or rows[end] != rows[end - 1] + 1:
            yield first, end, rows[first]
            first = end


def _begin(host: torch.Tensor) -> int:
    """Return the offset of a tensor's first byte in its region."""
    return int(host.storage_offset()) * host.element_size()


def _fill(target: torch.Tensor, host: torch.Tensor, first: int) -> None:
    """Fill contiguous host memory from a tensor's file, starting at byte `first` of its region."""
    holder = holder_of(host)
    assert holder is not None
    size = target.numel()
    view = memoryview((ctypes.c_char * size).from_address(target.data_ptr())).cast("B")
    at = 0
    for extent in holder.extents(first, first + size) if size else ():
        try:
            extent.read(view[at : at + extent.size])
        except OSError as error:
            raise CopyError(f"{error_prefix(host)}: {error}") from error.with_traceback(None)  # its frames hold tensors
        at += extent.size
