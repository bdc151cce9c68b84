"""`mom::` operators that copy keys, values and weights between device and host memory, each with a reference.

Terms
-----
host         A tensor in host memory. Keys and values have the device's shape `[B, H, T, D]` but are stored token-major:
             the token dimension is outermost, so that appending a row moves no other. Weights keep their layout.
buffer       A device buffer with the rows of a host tensor and room for new rows.
over         A buffer without further readers, whose storage the next buffer of the same kind reuses.

    prefill   host = offload(k, 2, 0, layer)               rows are copied to the host as soon as they are complete
    decode    buffer = fetch_start(host, 1, 2, device)     begins the copy, one layer ahead
              k      = fetch_wait(buffer, new, 2)          waits for it and completes the buffer
              host   = append(host, new, 2, 0)             only the new rows are copied to the host
              k      = extend(k, new, 2)                   a cache on the device: only the new rows are written

The references copy synchronously and change none of their arguments, so a rewritten graph is executable anywhere.
A runtime copies asynchronously, fills buffers in place and appends to the host tensor's own storage.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from mom_passes.ops.library import define, implement

FETCH = define("fetch(Tensor host, Device device) -> Tensor")
"""A copy of a host tensor on the device, in the host's layout."""

FETCH_WEIGHT = define("fetch_weight(Tensor host, Device device) -> Tensor")
"""A copy of a weight on the device, in the host's layout. Captured graphs contain it; a pass decides when it runs."""

FETCH_ROWS = define("fetch_rows(Tensor host, Tensor rows, Device device) -> Tensor")
"""`host[rows]` on the device: rows of a table that stays on the host."""

FETCH_CHOSEN = define("fetch_chosen(Tensor host, Tensor keys, Device device) -> Tensor")
"""A device buffer of the host's shape in which only the entries `keys` along dimension 0 are set."""

FETCH_START = define("fetch_start(Tensor host, SymInt rows, int dim, Device device, Tensor? over=None) -> Tensor")
"""A token-major device buffer with the rows of `host` and `rows` unset ones along `dim`, perhaps over `over`."""

FETCH_WAIT = define("fetch_wait(Tensor buffer, Tensor? new, int dim) -> Tensor")
"""The buffer with its last rows set to `new`, if given."""

APPEND = define("append(Tensor host, Tensor new, int dim, SymInt first) -> Tensor")
"""Rows `[first:]` of the host's and the new rows together, on the host."""

EXTEND = define("extend(Tensor past, Tensor new, int dim) -> Tensor")
"""`past` followed by `new` along `dim`, laid out in `growing_order`, on the device. A runtime writes `new` into the
storage of `past` if no other tensor shares that storage."""

OFFLOAD = define("offload(Tensor value, int dim, SymInt first, int layer=0) -> Tensor")
"""Rows `[first:]` of a device value, on the host. `layer` numbers the attention that reads it: a runtime decides layer
by layer what stays on the device."""

#: Operators that run between compiled pieces, never inside one.
COPIES = frozenset({FETCH_ROWS, FETCH_CHOSEN, FETCH_START, FETCH_WAIT, APPEND, EXTEND, OFFLOAD})

#: Operators that copy from the host to the device.
ARRIVING = frozenset({FETCH, FETCH_WEIGHT, FETCH_ROWS, FETCH_CHOSEN, FETCH_START})

HOST = torch.device("cpu")


def taken_over(start: fx.Node) -> fx.Node | None:
    """The buffer whose storage a `fetch_start` reuses, or None."""
    over = start.args[4] if len(start.args) > 4 else None
    assert over is None or isinstance(over, fx.Node)
    return over


def token_major(shape: Sequence[Any], dim: int, like: torch.Tensor, device: torch.device) -> torch.Tensor:
    """An uninitialised tensor of this shape with dimension `dim` outermost in storage."""
    order = [dim, *(i for i in range(len(shape)) if i != dim)]
    return torch.empty_permuted(list(shape), order, dtype=like.dtype, device=device)


def growing_order(shape: Sequence[Any], dim: int) -> list[int]:
    """The dimension order in storage of what `extend` returns, outermost first.

    Rows along `dim` come first, so that adding rows moves none. A batch dimension of size one precedes them, as in the
    result of a matrix product.
    """
    first = [0] if dim > 0 and isinstance(shape[0], int) and shape[0] == 1 else []
    return [*first, dim, *(d for d in range(len(shape)) if d != dim and d not in first)]


def growing_strides(shape: Sequence[int], dim: int) -> list[int]:
    """The strides of what `extend` returns, in elements."""
    strides, step = [0] * len(shape), 1
    for d in reversed(growing_order(shape, dim)):
        strides[d], step = step, step * shape[d]
    return strides


def buffer_like(host: torch.Tensor, rows: Any, dim: int, device: torch.device) -> torch.Tensor:
    """An uninitialised device buffer for the rows of `host` and `rows` more."""
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
    return _extend_fake(past, new, dim).copy_(torch.cat([past, new], dim))


def offload_reference(value: torch.Tensor, dim: int, first: int, layer: int = 0) -> torch.Tensor:
    rows = value.shape[dim] - first
    host = token_major(_with_rows(value, dim, rows), dim, value, HOST)
    return host.copy_(value.narrow(dim, first, rows))


def _fetch_fake(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    return torch.empty_like(host, device=device)


def _fetch_chosen_fake(host: torch.Tensor, keys: torch.Tensor, device: torch.device) -> torch.Tensor:
    return torch.empty_like(host, device=device)


def _fetch_wait_fake(buffer: torch.Tensor, new: torch.Tensor | None, dim: int) -> torch.Tensor:
    return torch.empty_like(buffer)


def _fetch_rows_fake(host: torch.Tensor, rows: torch.Tensor, device: torch.device) -> torch.Tensor:
    return host.new_empty([*rows.shape, *host.shape[1:]], device=device)


def _fetch_start_fake(
    host: torch.Tensor, rows: int, dim: int, device: torch.device, over: torch.Tensor | None = None
) -> torch.Tensor:
    return buffer_like(host, rows, dim, device)


def _append_fake(host: torch.Tensor, new: torch.Tensor, dim: int, first: int) -> torch.Tensor:
    return token_major(_with_rows(host, dim, host.shape[dim] + new.shape[dim] - first), dim, host, HOST)


def _extend_fake(past: torch.Tensor, new: torch.Tensor, dim: int) -> torch.Tensor:
    shape = _with_rows(past, dim, past.shape[dim] + new.shape[dim])
    return torch.empty_permuted(shape, growing_order(shape, dim), dtype=past.dtype, device=past.device)


def _offload_fake(value: torch.Tensor, dim: int, first: int, layer: int = 0) -> torch.Tensor:
    return token_major(_with_rows(value, dim, value.shape[dim] - first), dim, value, HOST)


implement(FETCH, fetch_reference, _fetch_fake)
implement(FETCH_WEIGHT, fetch_reference, _fetch_fake)
implement(FETCH_ROWS, fetch_rows_reference, _fetch_rows_fake)
implement(FETCH_CHOSEN, fetch_chosen_reference, _fetch_chosen_fake)
implement(FETCH_START, fetch_start_reference, _fetch_start_fake)
implement(FETCH_WAIT, fetch_wait_reference, _fetch_wait_fake)
implement(APPEND, append_reference, _append_fake)
implement(EXTEND, extend_reference, _extend_fake)
implement(OFFLOAD, offload_reference, _offload_fake)
