"""Program steps that move keys, values and weights; the `mom::` copy operators are lowered to them.

FetchRows     copies selected rows of a table to the device
FetchChosen   copies the matrices of some experts to the device
FetchStart    starts a copy to the device
FetchWait     waits for that copy and writes the new rows after the old ones
Append        copies new rows to the host after the existing ones; returns the cache's contents
Offload       copies a whole value to the host; returns the cache's contents
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import mom_passes.ops  # noqa: F401  defines mom::fetch
from mom_compile.runtime.host.done import Ticket
from mom_compile.runtime.host.engine import CopyEngine
from mom_compile.runtime.host.engines import engine_for, engine_with_own_memory
from mom_compile.runtime.host.holders import READERS, holder_of, settle
from mom_compile.runtime.host.mapped import is_mapped, read, read_rows
from mom_compile.runtime.host.placement import Placement
from mom_compile.runtime.host.store import HostStore, Lease, lease_of, prepare
from mom_compile.runtime.host.tensor import HostTensor, host_tensor
from mom_compile.runtime.host.weight_bytes import WeightBytes
from mom_passes.ops.library import LIBRARY
from mom_passes.ops.transfers import buffer_like, fetch_reference
from mom_passes.program.parts import MOST_WASTE


@dataclass
class Arriving:
    """A device buffer whose first rows are being copied."""

    buffer: torch.Tensor
    ticket: Ticket


@dataclass(frozen=True)
class FetchRows:
    """`[host, rows]` to `host[rows]` on the device."""

    device: torch.device

    def __call__(self, arguments: list[Any]) -> tuple[torch.Tensor]:
        host, rows = arguments
        arguments.clear()
        return (_fetch_rows(host, rows, self.device),)


@dataclass(frozen=True)
class FetchChosen:
    """`[host, keys]` to a device buffer with the host's shape, in which only the entries `keys` are set."""

    device: torch.device

    def __call__(self, arguments: list[Any]) -> tuple[torch.Tensor]:
        host, keys = arguments
        arguments.clear()
        return (_fetch_chosen(host, keys, self.device),)


@dataclass(frozen=True)
class FetchStart:
    """`[host, rows]` to a device buffer with room for `rows` more, into which the host's rows are being copied.

    `[host, rows, over]` reuses the buffer of another copy, of the same size and no longer read.
    """

    dim: int
    device: torch.device

    def __call__(self, arguments: list[Any]) -> tuple[Arriving]:
        host, rows, *over = arguments
        arguments.clear()
        held = host.shape[self.dim]
        buffer = over[0].buffer if over else buffer_like(host, rows, self.dim, self.device)
        return (Arriving(buffer, _copy_to_device(buffer.narrow(self.dim, 0, held), host, engine_for(self.device))),)


@dataclass(frozen=True)
class FetchWait:
    """`[arriving, new or None]` to the complete device buffer."""

    dim: int

    def __call__(self, arguments: list[Any]) -> tuple[torch.Tensor]:
        arriving, new = arguments
        arguments.clear()
        arriving.ticket.wait()
        buffer: torch.Tensor = arriving.buffer
        if new is not None:
            buffer.narrow(self.dim, buffer.shape[self.dim] - new.shape[self.dim], new.shape[self.dim]).copy_(new)
        return (buffer,)


@dataclass(frozen=True)
class Append:
    """`[host, new, first]` to rows `[first:]` of both, on the host. Old rows are not moved."""

    dim: int
    device: torch.device
    placement: Placement

    def __call__(self, arguments: list[Any]) -> tuple[HostTensor]:
        host, new, first = arguments
        arguments.clear()
        old = lease_of(host, self.dim)
        rows = new.shape[self.dim]
        made = old.store.append(old, old.first + first, rows) if old is not None else None
        if old is None or made is None:
            # Copy the remaining rows to a new store.
            dropped = min(first, host.shape[self.dim])
            old = self._fork(host.narrow(self.dim, dropped, host.shape[self.dim] - dropped), rows)
            made = Lease(old.store, old.first + first - dropped, old.end + rows)
        _copy_to_host(made, old.end, new, self.dim, self.device)
        return (host_tensor(made, self.dim, self.device),)

    def _fork(self, host: torch.Tensor, more: int) -> Lease:
        """Copy the host's rows to a new store with room for more."""
        settle(host)
        rows = host.movedim(self.dim, 0)
        store = HostStore(rows.shape[1:], rows.dtype, rows.shape[0] + more, self.placement)
        lease = Lease(store, 0, rows.shape[0])
        store.rows(0, rows.shape[0]).copy_(rows)
        engine_for(self.device).traffic.on_host += rows.numel() * rows.element_size()
        return lease


@dataclass(frozen=True)
class Offload:
    """`[value, first, *sizes]` to rows `[first:]` of a device value, on the host.

    `stays(sizes, bytes)` decides whether rows of `bytes` bytes stay on the device in a run with these graph sizes.
    `ahead` is the number of similar values that are offloaded next: memory for them is prepared in the background.
    """

    dim: int
    device: torch.device
    placement: Placement
    stays: Callable[[tuple[int, ...], int], bool] | None = None
    ahead: int = 0

    def __call__(self, arguments: list[Any]) -> tuple[torch.Tensor]:
        value, first, *sizes = arguments
        arguments.clear()
        held = value.shape[self.dim]
        leaving = value.narrow(self.dim, first, held - first)
        if self.stays is not None and self.stays(tuple(sizes), leaving.numel() * leaving.element_size()):
            return (own_if_worth(leaving, value),)
        row = leaving.movedim(self.dim, 0).shape[1:]
        store = HostStore(row, value.dtype, held - first, self.placement)
        lease = Lease(store, 0, held - first)
        _copy_to_host(lease, 0, leaving, self.dim, self.device)
        prepare(store, self.ahead)
        return (host_tensor(lease, self.dim, self.device),)


@dataclass(frozen=True)
class KeepWeights:
    """At the start of a program: forbid other threads to write to its weights until it ends, as it would read some of
    them before the write and some after. `numbers` are the positions of host inputs."""

    numbers: tuple[int, ...]

    def __call__(self, inputs: Sequence[Any]) -> None:
        for number in self.numbers:
            holder = holder_of(inputs[number])
            if isinstance(holder, WeightBytes):
                READERS.begin(holder)


@dataclass(frozen=True)
class Settle:
    """At the end of a program, also after an exception: free the sources of copies to the host as these finish."""

    device: torch.device

    def __call__(self) -> None:
        READERS.end()
        engine_for(self.device).settle()


def own_if_worth(rows: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Return rows of a value that is not needed any more; a copy if that frees enough of the value."""
    return rows.clone() if (value.numel() - rows.numel()) * MOST_WASTE > value.numel() else rows


def _copy_to_host(lease: Lease, first: int, rows: torch.Tensor, dim: int, device: torch.device) -> None:
    """Start to copy rows to the end of a lease. Memory is allocated first, so that a failure loses no token."""
    region = lease.store.region
    target = lease.store.rows(first, first + rows.shape[dim]).movedim(0, dim)
    target._lease = lease  # type: ignore[attr-defined]  # keeps the store and its rows until the copy is done
    region.copied(lambda after: engine_for(device).to_host(target, rows, after))


def _copy_to_device(target: torch.Tensor, host: torch.Tensor, engine: CopyEngine) -> Ticket:
    """Start to copy rows to a device. Later writes to them on the host wait for this copy."""
    holder = holder_of(host)
    if holder is None:
        return engine.to_device(target, host, None)
    holder.region.check()
    return holder.region.copied(lambda after: engine.to_device(target, host, after))


def _fetch(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Fetch through the engine, as a program does, so that the copy is split at seams."""
    engine = engine_with_own_memory(device)
    if engine is not None:
        target = torch.empty_like(host, device=device)
        _copy_to_device(target, host, engine).wait()
        return target
    if is_mapped(host):
        return read(host)
    settle(host)
    return fetch_reference(host, device)


def _fetch_rows(host: torch.Tensor, rows: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Fetch rows selected on the host, which waits for the device to compute the indices.

    It waits for no copy, as no device ever writes a weight. Of a mapped file it reads only these rows.
    """
    engine = engine_for(device)
    at = rows.cpu()
    at = torch.where(at < 0, at + host.shape[0], at)
    if is_mapped(host):
        host, at = read_rows(host, at)
    if engine.in_host_memory:
        found = host[at]
        engine.traffic.to_device += found.numel() * found.element_size()
        return found
    chosen = engine.pinned([*at.shape, *host.shape[1:]], dtype=host.dtype)
    torch.index_select(host, 0, at.flatten(), out=chosen.view(-1, *host.shape[1:]))
    target = torch.empty_like(chosen, device=device)
    engine.to_device(target, chosen, None).wait()
    return target


def _fetch_chosen(host: torch.Tensor, keys: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy each chosen entry once."""
    engine = engine_for(device)
    buffer = torch.empty_like(host, device=device)
    tickets = [_copy_to_device(buffer[key], host[key], engine) for key in sorted(set(keys.flatten().tolist()))]
    for ticket in tickets:
        ticket.wait()
    return buffer


LIBRARY.impl("fetch", _fetch, "CPU")
LIBRARY.impl("fetch_weight", _fetch, "CPU")
for _key in ("CPU", "CUDA"):
    LIBRARY.impl("fetch_rows", _fetch_rows, _key)
    LIBRARY.impl("fetch_chosen", _fetch_chosen, _key)
