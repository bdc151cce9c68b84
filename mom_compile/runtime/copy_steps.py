"""The steps of a program that move keys and values, and weights: what the `mom::` copy operators become.

FetchRows    chosen rows of a table, to the device
FetchChosen  the matrices of some experts, to the device
FetchStart   begins a copy to the device and goes on
FetchWait        waits for it and writes the new rows behind the old ones, where they are
Append      new rows to the host, behind those that are there; returns what the cache holds
Offload     a whole value to the host; returns what the cache holds
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import mom_passes.ops  # noqa: F401  defines mom::fetch
from mom_compile.runtime.host.done import CopyError, Ticket
from mom_compile.runtime.host.engine import CopyEngine
from mom_compile.runtime.host.engines import beside, engine_for
from mom_compile.runtime.host.holders import READERS, error_prefix, holder_of, settle
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
    """A device buffer whose first rows are on their way."""

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
    """`[host, keys]` to a device buffer like the host's, of which the entries `keys` are set."""

    device: torch.device

    def __call__(self, arguments: list[Any]) -> tuple[torch.Tensor]:
        host, keys = arguments
        arguments.clear()
        return (_fetch_chosen(host, keys, self.device),)


@dataclass(frozen=True)
class FetchStart:
    """`[host, rows]` to a device buffer that has the host's rows, soon, and room for more.

    `[host, rows, over]` to the buffer of another copy, which is as large and which nobody reads any more.
    """

    dim: int
    device: torch.device

    def __call__(self, arguments: list[Any]) -> tuple[Arriving]:
        host, rows, *over = arguments
        arguments.clear()
        held = host.shape[self.dim]
        buffer = over[0].buffer if over else buffer_like(host, rows, self.dim, self.device)
        return (Arriving(buffer, _arrive(buffer.narrow(self.dim, 0, held), host, engine_for(self.device))),)


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
    """`[host, new, first]` to rows `[first:]` of both, on the host. Old rows stay where they are."""

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
            # The rows that stay, in a store of their own.
            dropped = min(first, host.shape[self.dim])
            old = self._fork(host.narrow(self.dim, dropped, host.shape[self.dim] - dropped), rows)
            made = Lease(old.store, old.first + first - dropped, old.end + rows)
        _leave(made, old.end, new, self.dim, self.device)
        return (host_tensor(made, self.dim, self.device),)

    def _fork(self, host: torch.Tensor, more: int) -> Lease:
        """The host's rows in a store that has room for more."""
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

    `stays(sizes, bytes)` says whether rows that take so many bytes stay on the device after all, in a run of a graph
    with these sizes. `ahead` is how many values of the same kind leave next: memory for them is made ready meanwhile.
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
        _leave(lease, 0, leaving, self.dim, self.device)
        prepare(store, self.ahead)
        return (host_tensor(lease, self.dim, self.device),)


@dataclass(frozen=True)
class KeepWeights:
    """The beginning of a program: until its end nobody else writes to a weight that it is given. It would have read
    some of them before that and some after. `numbers` are those of the inputs that come from the host."""

    numbers: tuple[int, ...]

    def __call__(self, inputs: Sequence[Any]) -> None:
        for number in self.numbers:
            holder = holder_of(inputs[number])
            if isinstance(holder, WeightBytes):
                READERS.begin(holder)


@dataclass(frozen=True)
class Settle:
    """The end of a program, however it ends: what still leaves may be freed by the device as soon as it has left."""

    device: torch.device

    def __call__(self) -> None:
        READERS.end()
        engine_for(self.device).settle()


def own_if_worth(rows: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Some rows of a value that dies, in a storage of their own if the rest is worth it."""
    return rows.clone() if (value.numel() - rows.numel()) * MOST_WASTE > value.numel() else rows


def _leave(lease: Lease, first: int, rows: torch.Tensor, dim: int, device: torch.device) -> None:
    """Begin to copy rows to the end of a lease. Memory for them is had first: no token is lost if it cannot be."""
    region = lease.store.region
    target = lease.store.rows(first, first + rows.shape[dim]).movedim(0, dim)
    target._lease = lease  # type: ignore[attr-defined]  # neither store nor rows may go before their last copy
    region.copied(lambda after: engine_for(device).to_host(target, rows, after))


def _arrive(target: torch.Tensor, host: torch.Tensor, engine: CopyEngine) -> Ticket:
    """Begin to copy rows to a device. Whoever writes over them on the host waits until they have been read."""
    holder = holder_of(host)
    if holder is None:
        return engine.to_device(target, host, None)
    holder.region.check()
    return holder.region.copied(lambda after: engine.to_device(target, host, after))


def _fetch(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Through the engine, as in a program: beside the host, and never in one piece across two pinned ranges."""
    engine = beside(device)
    if engine is not None:
        target = torch.empty_like(host, device=device)
        _arrive(target, host, engine).wait()
        return target
    if is_mapped(host):
        with _raise_copy_error(host):
            return read(host)
    settle(host)
    return fetch_reference(host, device)


def _fetch_rows(host: torch.Tensor, rows: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The host chooses them itself: it has to know which ones, and so waits for the device that computed that. It waits
    for no copy: nothing on a device is ever copied to a weight. Of a mapped file it reads these rows alone."""
    engine = engine_for(device)
    at = rows.cpu()
    at = torch.where(at < 0, at + host.shape[0], at)
    if is_mapped(host):
        with _raise_copy_error(host):
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
    """Each entry once, however often it was chosen."""
    engine = engine_for(device)
    buffer = torch.empty_like(host, device=device)
    tickets = [_arrive(buffer[key], host[key], engine) for key in sorted(set(keys.flatten().tolist()))]
    for ticket in tickets:
        ticket.wait()
    return buffer


@contextlib.contextmanager
def _raise_copy_error(host: torch.Tensor) -> Iterator[None]:
    """Raises `CopyError` where a file cannot be read."""
    try:
        yield
    except OSError as error:
        raise CopyError(f"{error_prefix(host)}: {error}") from error


LIBRARY.impl("fetch", _fetch, "CPU")
LIBRARY.impl("fetch_weight", _fetch, "CPU")
for _key in ("CPU", "CUDA"):
    LIBRARY.impl("fetch_rows", _fetch_rows, _key)
    LIBRARY.impl("fetch_chosen", _fetch_chosen, _key)
