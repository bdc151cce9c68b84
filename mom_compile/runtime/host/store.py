"""Keys or values of one layer in host memory: rows of tokens that are appended and never moved.

Terms
-----
row     One token of all batch entries and heads, `[B, H, D]`, contiguous. Storage is `[tokens, B, H, D]`.
lease   A run of rows that a host tensor shows. Rows after the end of every lease may be overwritten, others may not.
        Rows outside all leases are released when a lease ends: a window has moved on, or a cache was cropped.
fork    A new store for a lease that appends after another lease has already appended.

    store:   released | row 7 | row 8 | ... | row n-1 |  reserved, not committed ...
    lease             [first,                 end)
    append                                       -> [end, end + r) of the same store, or a fork

Copies hold a lease of their rows while they run, so the rows cannot be released.
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

#: The rows for which addresses are reserved at first, and the limit in bytes: a process has 128 TiB of addresses. A
#: store of more rows reserves twice its size. A store that outgrows its addresses is copied to such a store.
RESERVED_ROWS = 1 << 20
MOST_RESERVED_BYTES = 16 << 30


class Lease:
    """Rows `[first, end)` of a store while a tensor shows them. Views of one tensor have one `root`."""

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
    """Rows of shape `row` and type `dtype` that grow at the end; initially `rows`. Raises `HostMemoryError`."""

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
        """Return rows as `[end - first, *row]`, committed. To write them, hold a lease.

        Raises `HostMemoryError`, also beyond `capacity`: check `may_append` before appending.
        """
        if end > self.capacity:
            raise HostMemoryError(f"row {end - 1} is beyond the {self.capacity} rows of reserved addresses")
        with self._lock:
            _commit(self.region, end * self.row_bytes)
        count = math.prod(self.row)
        typed = self.region.bytes[: self.capacity * self.row_bytes].view(self.dtype)
        return typed[first * count : end * count].view(end - first, *self.row)

    @property
    def in_file(self) -> bool:
        return isinstance(self.region.backing, InFile)

    def extents(self, first: int, end: int) -> tuple[Extent, ...]:
        """Return the positions of bytes `[first, end)` in their file. The caller holds a lease of them."""
        backing = self.region.backing
        assert isinstance(backing, InFile)
        with self._lock:
            return backing.parts(first, end)

    @property
    def used_bytes(self) -> int:
        """Bytes from the first row to the last row that a lease shows."""
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
                raise RuntimeError("keys or values on the host were accessed after their last tensor was deleted")
            self.leases.add(lease)

    def end(self, lease: Lease) -> None:
        """Release rows that no lease shows any more.

        The garbage collector may call this on any thread. If the store is locked, the next call releases the rows.
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
        """Return a lease of rows `[first, lease.end + rows)`, of which the caller may write the new ones, or None.

        None if `may_append` is false. If two threads continue the same cache, one gets the rows after it.
        """
        with self._appending:
            return Lease(self, first, lease.end + rows) if self.may_append(lease, rows) else None

    def may_append(self, lease: Lease, rows: int) -> bool:
        """Whether the rows after a lease are free and addressable, and few unused bytes precede it.

        Pinned memory cannot be released in parts.
        """
        free = all(other.end <= lease.end for other in self.held())
        unused = lease.first * self.row_bytes - self.region.low
        stale = unused > 2 * self.region.slack(lease.rows * self.row_bytes)
        return free and not stale and lease.end + rows <= self.capacity


#: Regions that are slow to create (pinned), of deleted stores or prepared for the next layer. The next prompt often
#: needs as much as the last one.
_POOL: list[tuple[Placement, HostRegion]] = []
#: Held while a region is removed. Finalizers append without it.
_TAKING = threading.Lock()


def _forked() -> None:
    """A fork inherits no pooled region, and no thread that would release the lock."""
    global _TAKING
    _TAKING = threading.Lock()
    _POOL.clear()


os.register_at_fork(after_in_child=_forked)


def _region(capacity: int, least: int, placement: Placement) -> HostRegion:
    """Return a pooled or new region of `capacity` bytes, or fewer if addresses run out."""
    region = _pooled(capacity, placement)
    if region is not None:
        region.abandon()  # a device may still read the deleted store's rows
        return region
    try:
        return HostRegion(capacity, placement.backing(), least)
    except HostMemoryError:
        if not _POOL:
            raise
        empty_host_pool()
        return HostRegion(capacity, placement.backing(), least)


def _pooled(capacity: int, placement: Placement) -> HostRegion | None:
    """Remove a region from the pool, or return None."""
    with _TAKING:
        for i, (pooled, region) in enumerate(_POOL):
            if pooled == placement and region.capacity >= capacity:
                return _POOL.pop(i)[1]
    return None


def prepare(store: HostStore, count: int) -> None:
    """Prepare memory in the pool for `count` stores like a new one, those of the next layer, if that takes long.

    A failure is ignored: the stores then allocate it themselves.
    """
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
    """Pool a reusable region. Others are freed with their last view."""
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
    """Return the store whose rows a tensor shows, or None for any other tensor."""
    holder = holder_of(tensor)
    return holder if isinstance(holder, HostStore) else None


def without_base(view: torch.Tensor) -> torch.Tensor:
    """Return the same rows as a tensor that is not a view: of a view, Dynamo would trace the whole base."""
    with torch.inference_mode(False), torch.no_grad():
        made = torch.empty(0, dtype=view.dtype)
        return made.set_(view.untyped_storage(), view.storage_offset(), view.shape, view.stride())


def lease_of(tensor: torch.Tensor, dim: int, root: object | None = None) -> Lease | None:
    """Lease the rows of a tensor if it shows whole, consecutive rows of a store along `dim`; else return None."""
    store = store_of(tensor)
    if store is None or tensor.dtype != store.dtype:
        return None
    rows = tensor.movedim(dim, 0)
    if rows.shape[1:] != store.row or not rows.is_contiguous():
        return None
    first, within = divmod(int(tensor.storage_offset()) * tensor.element_size(), store.row_bytes)
    return None if within else Lease(store, first, first + tensor.shape[dim], root)


def pooled_bytes() -> int:
    """Bytes of pinned host memory in the pool."""
    return sum(region.committed for _, region in list(_POOL))
