"""Weights in a mapped file, read by calls: where the file was cut short meanwhile, or its disk is broken, touching the
mapping would end the process, and a call is an error.

    the file     | ... | w, of which a tensor shows rows or all | ... |
    copy_rows            preadv -> target
    read                 preadv -> memory of its own, seen likewise
    read_rows            preadv of the chosen rows, each once; neighbours together

Everything here raises `OSError`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import torch

from mom_compile.runtime.host.holders import holder_of
from mom_compile.runtime.host.seams import as_bytes, same_layout
from mom_compile.runtime.host.weight_bytes import WeightBytes


def is_mapped(tensor: torch.Tensor) -> bool:
    """Whether it shows weights of a file."""
    holder = holder_of(tensor)
    return isinstance(holder, WeightBytes) and holder.in_file


def copy_rows(target: torch.Tensor, source: torch.Tensor) -> None:
    """`target.copy_(source)` in host memory, whatever the source is."""
    if not is_mapped(source):
        target.copy_(source)
    elif same_layout(target, source):
        _fill(as_bytes(target), source, _begin(source))
    else:
        target.copy_(read(source))


def read(host: torch.Tensor) -> torch.Tensor:
    """What a tensor shows, of the same strides, in memory of its own."""
    made = torch.empty_strided(host.shape, host.stride(), dtype=host.dtype)
    last = sum((size - 1) * step for size, step in zip(host.shape, host.stride(), strict=True))
    if host.numel():
        all_bytes = made.as_strided((last + 1,), (1,)).view(torch.uint8)
        _fill(all_bytes, host, _begin(host))
    return made


def read_rows(host: torch.Tensor, at: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A table `[rows, ...]` of the rows that `at` chooses, each once, and where they are in it. Raises `IndexError`."""
    wanted, where = at.unique(return_inverse=True)
    if wanted.numel() and not 0 <= int(wanted[0]) <= int(wanted[-1]) < host.shape[0]:
        raise IndexError(f"rows {int(wanted[0])} to {int(wanted[-1])} are asked for, of {host.shape[0]}")
    if not host.is_contiguous():
        return read(host), at
    table = host.new_empty([wanted.numel(), *host.shape[1:]])
    row = host.nbytes // max(1, host.shape[0])
    into = as_bytes(table)
    for first, end, run in _runs(wanted.tolist()):
        _fill(into[first * row : end * row], host, _begin(host) + run * row)
    return table, where


def _runs(rows: list[int]) -> Iterator[tuple[int, int, int]]:
    """Ascending numbers as runs without gaps: `[first, end)` in the list, and the first number."""
    first = 0
    for end in range(1, len(rows) + 1):
        if end == len(rows) or rows[end] != rows[end - 1] + 1:
            yield first, end, rows[first]
            first = end


def _begin(host: torch.Tensor) -> int:
    """The first byte that a tensor shows, in its region."""
    return int(host.storage_offset()) * host.element_size()


def _fill(target: torch.Tensor, host: torch.Tensor, first: int) -> None:
    """Contiguous bytes of host memory with those of a tensor's file from `first` on in its region."""
    holder = holder_of(host)
    assert holder is not None
    size = target.numel()
    view = memoryview((ctypes.c_char * size).from_address(target.data_ptr())).cast("B")
    at = 0
    for extent in holder.extents(first, first + size) if size else ():
        extent.read(view[at : at + extent.size])
        at += extent.size
