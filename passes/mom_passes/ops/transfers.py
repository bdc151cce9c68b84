"""`mom::` operators that move keys and values, and weights, between the device and host memory, with a reference each.

Terms
-----
host         A tensor in host memory. Keys and values are seen as the device's `[B, H, T, D]` but stored token-major:
             rows of tokens outermost, so that appending a row never moves another. Weights lie as they are.
buffer       A device buffer with the host's rows and space for the rows to come.
over         A buffer that nobody reads any more, in whose storage the next one of its kind is.

    prefill   host = offload(k, 2, 0, layer)               rows leave as soon as they are complete
    decode    buffer = fetch_start(host, 1, 2, device)      begins the copy; one layer ahead
              k      = fetch_wait(buffer, new, 2)           waits for it; `buffer` is now complete
              host = append(host, new, 2, 0)               only the new rows leave
              k      = extend(k, new, 2)                   of a cache on the device: only the new rows are written

The references copy at once and change none of their arguments, so a rewritten graph is executable anywhere.
A runtime makes the copies asynchronous, fills a buffer where it is and appends to the host's own storage.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from mom_passes.ops.library import LIBRARY

_TAGS = (torch.Tag.pt2_compliant_tag,)

LIBRARY.define("fetch(Tensor host, Device device) -> Tensor", tags=_TAGS)
"""All of a host tensor on the device, in the host's layout."""

LIBRARY.define("fetch_weight(Tensor host, Device device) -> Tensor", tags=_TAGS)
"""All of a weight on the device, in the host's layout. A graph is captured with it; a pass says when it arrives."""

LIBRARY.define("fetch_rows(Tensor host, Tensor rows, Device device) -> Tensor", tags=_TAGS)
"""`host[rows]` on the device: rows of a table that stays on the host."""

LIBRARY.define("fetch_chosen(Tensor host, Tensor keys, Device device) -> Tensor", tags=_TAGS)
"""A buffer like the host's of which entries `keys` along dimension 0 are set, and no others."""

LIBRARY.define("fetch_start(Tensor host, SymInt rows, int dim, Device device, Tensor? over=None) -> Tensor", tags=_TAGS)
"""A token-major device buffer with the host's rows and `rows` more, unset, along `dim`; it may lie in `over`."""

LIBRARY.define("fetch_wait(Tensor buffer, Tensor? new, int dim) -> Tensor", tags=_TAGS)
"""The buffer with its last rows set to `new`; with None, just what has arrived."""

LIBRARY.define("append(Tensor host, Tensor new, int dim, SymInt first) -> Tensor", tags=_TAGS)
"""Rows `[first:]` of the host's and the new rows, on the host."""

LIBRARY.define("extend(Tensor past, Tensor new, int dim) -> Tensor", tags=_TAGS)
"""`past` with the rows of `new` behind it along `dim`, laid out in `growing_order`, on the device. A runtime writes
`new` into the storage of `past` where no other tensor sees that storage."""

LIBRARY.define("offload(Tensor value, int dim, SymInt first, int layer=0) -> Tensor", tags=_TAGS)
"""Rows `[first:]` of a device value, on the host. `layer` is whose attention reads it: what stays is told by layers."""

FETCH = torch.ops.mom.fetch.default
FETCH_WEIGHT = torch.ops.mom.fetch_weight.default
FETCH_ROWS = torch.ops.mom.fetch_rows.default
FETCH_CHOSEN = torch.ops.mom.fetch_chosen.default
FETCH_START = torch.ops.mom.fetch_start.default
FETCH_WAIT = torch.ops.mom.fetch_wait.default
APPEND = torch.ops.mom.append.default
EXTEND = torch.ops.mom.extend.default
OFFLOAD = torch.ops.mom.offload.default

#: What a runtime runs between compiled pieces, never inside one.
COPIES = frozenset({FETCH_ROWS, FETCH_CHOSEN, FETCH_START, FETCH_WAIT, APPEND, EXTEND, OFFLOAD})

#: What reads a value on the host and brings it to the device.
ARRIVING = frozenset({FETCH, FETCH_WEIGHT, FETCH_ROWS, FETCH_CHOSEN, FETCH_START})

HOST = torch.device("cpu")


def taken_over(start: fx.Node) -> fx.Node | None:
    """The buffer in whose storage the one that a `fetch_start` makes is, or None."""
    return start.args[4] if len(start.args) > 4 else None  # type: ignore[return-value]


def token_major(shape: Sequence[Any], dim: int, like: torch.Tensor, device: torch.device) -> torch.Tensor:
    """An uninitialised tensor of that shape whose rows along `dim` are outermost in storage."""
    order = [dim, *(i for i in range(len(shape)) if i != dim)]
    return torch.empty_permuted(list(shape), order, dtype=like.dtype, device=device)


def growing_order(shape: Sequence[Any], dim: int) -> list[int]:
    """The dimensions of what `extend` returns, from the outermost in storage: rows first, so that none moves when there
    are more. A batch of one stands before them, as where products lay it."""
    first = [0] if dim > 0 and isinstance(shape[0], int) and shape[0] == 1 else []
    return [*first, dim, *(d for d in range(len(shape)) if d != dim and d not in first)]


def growing_strides(shape: Sequence[int], dim: int) -> list[int]:
    """The strides of what `extend` returns."""
    strides, step = [0] * len(shape), 1
    for d in reversed(growing_order(shape, dim)):
        strides[d], step = step, step * shape[d]
    return strides


def buffer_like(host: torch.Tensor, rows: Any, dim: int, device: torch.device) -> torch.Tensor:
    """An uninitialised device buffer for the host's rows and `rows` more."""
    return token_major(_with_rows(host, dim, host.shape[dim] + rows), dim, host, device)


def _with_rows(value: torch.Tensor, dim: int, rows: Any) -> list[Any]:
    shape = list(value.shape)
    shape[dim] = rows
    return shape


def fetch_reference(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    return torch.empty_like(host, device=device).copy_(host)


def fetch_rows_reference(host: torch.Tensor, rows: torch.Tensor, device: torch.device) -> torch.Tensor:
    return host[rows.to(HOST)].to(device)


def fetch_chosen_reference(host: torch.Tensor, keys: torch.Tensor, device: torch.device) -> torch.Tensor:
    chosen = torch.zeros_like(host, device=device)
    at = keys.to(HOST)
    chosen[at.to(device)] = host[at].to(device)
    return chosen


def fetch_start_reference(
    host: torch.Tensor, rows: int, dim: int, device: torch.device, over: torch.Tensor | None = None
) -> torch.Tensor:
    buffer = buffer_like(host, rows, dim, device)
    buffer.narrow(dim, 0, host.shape[dim]).copy_(host)
    return buffer


def fetch_wait_reference(buffer: torch.Tensor, new: torch.Tensor | None, dim: int) -> torch.Tensor:
    filled = buffer.clone()
    if new is not None:
        filled.narrow(dim, buffer.shape[dim] - new.shape[dim], new.shape[dim]).copy_(new)
    return filled


def append_reference(host: torch.Tensor, new: torch.Tensor, dim: int, first: int) -> torch.Tensor:
    return offload_reference(torch.cat([host, new.to(HOST)], dim), dim, first)


def extend_reference(past: torch.Tensor, new: torch.Tensor, dim: int) -> torch.Tensor:
    return _extend_fake(past, new, dim).copy_(torch.cat([past, new], dim))  # type: ignore[no-any-return]


def offload_reference(value: torch.Tensor, dim: int, first: int, layer: int = 0) -> torch.Tensor:
    rows = value.shape[dim] - first
    host = token_major(_with_rows(value, dim, rows), dim, value, HOST)
    return host.copy_(value.narrow(dim, first, rows))


@torch.library.register_fake("mom::fetch", lib=LIBRARY)
def _fetch_fake(host, device):  # type: ignore[no-untyped-def]
    return torch.empty_like(host, device=device)


@torch.library.register_fake("mom::fetch_weight", lib=LIBRARY)
def _fetch_weight_fake(host, device):  # type: ignore[no-untyped-def]
    return torch.empty_like(host, device=device)


@torch.library.register_fake("mom::fetch_rows", lib=LIBRARY)
def _fetch_rows_fake(host, rows, device):  # type: ignore[no-untyped-def]
    return host.new_empty([*rows.shape, *host.shape[1:]], device=device)


@torch.library.register_fake("mom::fetch_chosen", lib=LIBRARY)
def _fetch_chosen_fake(host, keys, device):  # type: ignore[no-untyped-def]
    return torch.empty_like(host, device=device)


@torch.library.register_fake("mom::fetch_start", lib=LIBRARY)
def _fetch_start_fake(host, rows, dim, device, over=None):  # type: ignore[no-untyped-def]
    return buffer_like(host, rows, dim, device)


@torch.library.register_fake("mom::fetch_wait", lib=LIBRARY)
def _fetch_wait_fake(buffer, new, dim):  # type: ignore[no-untyped-def]
    return torch.empty_like(buffer)


@torch.library.register_fake("mom::append", lib=LIBRARY)
def _append_fake(host, new, dim, first):  # type: ignore[no-untyped-def]
    rows = host.shape[dim] + new.shape[dim] - first
    return token_major(_with_rows(host, dim, rows), dim, host, HOST)


@torch.library.register_fake("mom::extend", lib=LIBRARY)
def _extend_fake(past, new, dim):  # type: ignore[no-untyped-def]
    shape = _with_rows(past, dim, past.shape[dim] + new.shape[dim])
    return torch.empty_permuted(shape, growing_order(shape, dim), dtype=past.dtype, device=past.device)


@torch.library.register_fake("mom::offload", lib=LIBRARY)
def _offload_fake(value, dim, first, layer=0):  # type: ignore[no-untyped-def]
    return token_major(_with_rows(value, dim, value.shape[dim] - first), dim, value, HOST)


for _name, _reference in (
    ("fetch", fetch_reference),
    ("fetch_weight", fetch_reference),
    ("fetch_rows", fetch_rows_reference),
    ("fetch_chosen", fetch_chosen_reference),
    ("fetch_start", fetch_start_reference),
    ("fetch_wait", fetch_wait_reference),
    ("append", append_reference),
    ("extend", extend_reference),
    ("offload", offload_reference),
):
    LIBRARY.impl(_name, _reference, "CompositeExplicitAutograd")
