"""Keys or values of one layer in host memory: rows of tokens that are appended and never moved.

Terms
-----
row     One token of all batch entries and heads, `[B, H, D]`, contiguous. Storage is `[tokens, B, H, D]`.
lease   A run of rows that a host tensor shows. Rows behind every lease's end may be written over; others may not.
        What lies outside all leases is given back when one of them ends: a window has moved on, a cache was cropped.
fork    A store of its own for a lease that wants to append where another lease already has.

    store:   given back | row 7 | row 8 | ... | row n-1 |  room, reserved but not backed ...
    lease               [first,                 end)
    append                                         -> [end, end + r) of the same store, or a fork

Who copies rows holds a lease of them, also for a copy that still runs: nobody can see that rows are gone.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
import weakref
from collections.abc import Sequence

import torch

from mom_compile.runtime.host.backings.in_file import InFile
from mom_compile.runtime.host.file import Extent
from mom_compile.runtime.host.holders import hold, holder_of
from mom_compile.runtime.host.limits import HostMemoryError
from mom_compile.runtime.host.placement import Placement
from mom_compile.runtime.host.region import AHEAD_FROM, HostRegion

#: Rows for which addresses are reserved at first, and the most bytes of addresses for them: a process has 128 TiB.
#: A store of more rows reserves twice what it has, and one that outgrows its addresses moves to such a store.
RESERVED_ROWS = 1 << 20
MOST_RESERVED_BYTES = 16 << 30


class Lease:
    """Rows `[first, end)` of a store, as long as somebody can see them. Views of one tensor have one `root`."""

    def __init__(self, store: HostStore, first: int, end: int, root: object | None = None) -> None:
        self.store = store
        self.first = first
        self.end = end
        self.root = root if root is not None else object()
        store.begin(self)

    def __del__(self) -> None:
        self.store.end(self)

    @property
    def rows(self) -> int:
        return self.end - self.first

    def overlaps(self, other: Lease) -> bool:
        return other.first < self.end and self.first < other.end


class HostStore:
    """Rows of shape `row` and type `dtype`, growing at the end. Raises `HostMemoryError` where it cannot.

    `rows` are those that will be there at first.
    """

    what = "keys or values"
    where = "their file in kv_dir"

    def __init__(self, row: Sequence[int], dtype: torch.dtype, rows: int, placement: Placement) -> None:
        self.row = tuple(row)
        self.dtype = dtype
        self.placement = placement
        self.row_bytes = max(1, math.prod(self.row) * dtype.itemsize)
        wanted = max(min(RESERVED_ROWS, MOST_RESERVED_BYTES // self.row_bytes), 2 * rows)
        self.region = _region(wanted * self.row_bytes, rows * self.row_bytes, placement)
        self.capacity = min(wanted, self.region.capacity // self.row_bytes)
        weakref.finalize(self, _give_back, placement, self.region)
        self.leases: weakref.WeakSet[Lease] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._appending = threading.Lock()
        hold(self)

    def rows(self, first: int, end: int) -> torch.Tensor:
        """Rows as `[end - first, *row]`, backed by memory. Who writes there has a lease of them.

        Raises `HostMemoryError`, also beyond `capacity`: who appends asks `may_append` first.
        """
        if end > self.capacity:
            raise HostMemoryError(f"row {end - 1} is beyond the {self.capacity} rows that addresses are reserved for")
        with self._lock:
            _commit(self.region, end * self.row_bytes)
        count = math.prod(self.row)
        typed = self.region.bytes[: self.capacity * self.row_bytes].view(self.dtype)
        return typed[first * count : end * count].view(end - first, *self.row)

    @property
    def in_file(self) -> bool:
        return isinstance(self.region.backing, InFile)

    def extents(self, first: int, end: int) -> tuple[Extent, ...]:
        """Where bytes `[first, end)` of the region are in their file. Whoever asks has a lease of them."""
        backing = self.region.backing
        assert isinstance(backing, InFile)
        with self._lock:
            return backing.parts(first, end)

    @property
    def used_bytes(self) -> int:
        """Bytes of the rows from the first that is shown to the last."""
        first, end = self._shown()
        return (end - first) * self.row_bytes

    def held(self) -> list[Lease]:
        with self._lock:
            return list(self.leases)

    def _shown(self) -> tuple[int, int]:
        held = self.held()
        return min((lease.first for lease in held), default=0), max((lease.end for lease in held), default=0)

    def begin(self, lease: Lease) -> None:
        with self._lock:
            if lease.rows > 0 and lease.first * self.row_bytes < self.region.low:
                raise RuntimeError("keys or values on the host are shown again after the last tensor of them had gone")
            self.leases.add(lease)

    def end(self, lease: Lease) -> None:
        """Give back what no lease shows any more.

        This may be called anywhere, by the garbage collector too: if the store is at work, the next time will do.
        """
        if not self._lock.acquire(blocking=False):
            return
        try:
            self.leases.discard(lease)
            held = list(self.leases)
            if held:
                first, end = min(other.first for other in held), max(other.end for other in held)
                self.region.keep(first * self.row_bytes, end * self.row_bytes)
        finally:
            self._lock.release()

    def append(self, lease: Lease, first: int, rows: int) -> Lease | None:
        """A lease of rows `[first, lease.end + rows)`, the last of which are the caller's to write; None where
        `may_append` says no. Of two threads that continue the same cache, one gets the rows behind it."""
        with self._appending:
            return Lease(self, first, lease.end + rows) if self.may_append(lease, rows) else None

    def may_append(self, lease: Lease, rows: int) -> bool:
        """Whether rows after a lease are nobody's and there are addresses for them, and little is held in vain before
        it (pinned memory cannot be given back in parts)."""
        free = all(other.end <= lease.end for other in self.held())
        behind = lease.first * self.row_bytes - self.region.low
        stale = behind > 2 * self.region.slack(lease.rows * self.row_bytes)
        return free and not stale and lease.end + rows <= self.capacity


#: Regions that are slow to make, pinned ones, of dead stores and for the next layer's: the next prompt needs as much as
#: the last one did.
_POOL: list[tuple[Placement, HostRegion]] = []
#: Held while a region is taken out. Finalizers append regions without holding it.
_TAKING = threading.Lock()


def _forked() -> None:
    """A fork has nothing of the pool, and no thread that would release the lock."""
    global _TAKING
    _TAKING = threading.Lock()
    _POOL.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def _region(capacity: int, least: int, placement: Placement) -> HostRegion:
    """Addresses for so many bytes, or for fewer if they cannot be had."""
    region = _pooled(capacity, placement)
    if region is not None:
        region.abandon()  # a device may still read what the dead store had
        return region
    try:
        return HostRegion(capacity, placement.backing(), least)
    except HostMemoryError:
        if not _POOL:
            raise
        empty_host_pool()
        return HostRegion(capacity, placement.backing(), least)


def _pooled(capacity: int, placement: Placement) -> HostRegion | None:
    """A region out of the pool, or None."""
    with _TAKING:
        for i, (pooled, region) in enumerate(_POOL):
            if pooled == placement and region.capacity >= capacity:
                return _POOL.pop(i)[1]
    return None


def prepare(store: HostStore, count: int) -> None:
    """Have memory ready for so many stores like one that has just been made, where it takes long to have it: those of
    the next layer. It is in the pool, like that of dead stores. Where it cannot be had now, it is asked for again."""
    region, placement, size = store.region, store.placement, store.used_bytes
    if not region.backing.goes_ahead or size < AHEAD_FROM:
        return
    fitting = sum(pooled == placement and other.capacity >= region.capacity for pooled, other in list(_POOL))
    with contextlib.suppress(HostMemoryError):
        for _ in range(count - fitting):
            ready = HostRegion(region.capacity, placement.backing())
            ready.commit_ahead(size)
            _POOL.append((placement, ready))


def _give_back(placement: Placement, region: HostRegion) -> None:
    """What is not used again is freed with its last view."""
    if region.backing.reusable:
        _POOL.append((placement, region))


def _commit(region: HostRegion, size: int) -> None:
    try:
        region.commit(size)
    except HostMemoryError:
        if not _POOL:
            raise
        empty_host_pool()
        region.commit(size)


def empty_host_pool() -> None:
    """Free the pinned host memory that no cache uses.

    `host_memory().pooled` is its size in bytes.
    """
    while True:
        with _TAKING:
            if not _POOL:
                return
            _, region = _POOL.pop()
        region.abandon()
        region.close()


def store_of(tensor: torch.Tensor) -> HostStore | None:
    """The store whose rows a tensor shows, or None for any other tensor."""
    holder = holder_of(tensor)
    return holder if isinstance(holder, HostStore) else None


def without_base(view: torch.Tensor) -> torch.Tensor:
    """The same rows as a tensor that is no view: for a view, Dynamo would trace the whole region it is a view of."""
    with torch.inference_mode(False), torch.no_grad():
        made = torch.empty(0, dtype=view.dtype)
        return made.set_(view.untyped_storage(), view.storage_offset(), view.shape, view.stride())


def lease_of(tensor: torch.Tensor, dim: int, root: object | None = None) -> Lease | None:
    """A new lease of the rows a tensor shows, if it shows whole rows of a store in order along `dim`; else None."""
    store = store_of(tensor)
    if store is None or tensor.dtype != store.dtype:
        return None
    rows = tensor.movedim(dim, 0)
    if rows.shape[1:] != store.row or not rows.is_contiguous():
        return None
    first, within = divmod(int(tensor.storage_offset()) * tensor.element_size(), store.row_bytes)
    return None if within else Lease(store, first, first + tensor.shape[dim], root)


def pooled_bytes() -> int:
    """Pinned host memory that waits for the next cache."""
    return sum(region.committed for _, region in list(_POOL))
