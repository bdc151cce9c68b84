"""A host address range that grows in place: reserved once, committed as rows arrive, released from both ends.

Terms
-----
backing   What provides the storage (see `backings.base`): host memory, pinned if a CUDA device copies from it, or parts
          of a file.
commit    Provide storage for the next bytes, in whole blocks. Committed bytes never move.
seam      The boundary of two pinned ranges. Each commit pins its own range, and a driver may refuse a copy across two.

    addresses   | released | committed ......... | reserved ...              |
                0          low                 high                     capacity

Appending to a tensor would copy it, and a graph cannot take a list of blocks as one tensor.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass

from mom_compile.runtime.host.backings.base import BLOCK, Backing, whole_blocks
from mom_compile.runtime.host.backings.registration import REGISTRAR
from mom_compile.runtime.host.done import CopyError, Done, Ticket
from mom_compile.runtime.host.holders import Begin, between
from mom_compile.runtime.host.limits import HostMemoryError, available_memory

#: A commit adds at least 1/SHARE of the committed bytes, and unneeded bytes are released once they reach 1/SHARE of the
#: rest. Decoding therefore seldom makes a system call, and at most two such shares are unused.
SHARE = 16

#: Regions smaller than this commit synchronously: pinning their next share takes less time than a kernel launch.
AHEAD_FROM = SHARE * BLOCK

#: Host memory left to other processes.
MARGIN = 256 << 20


@dataclass
class Totals:
    """Bytes that all regions have committed, in memory and in files."""

    memory: int = 0
    disk: int = 0


TOTALS = Totals()


class HostRegion:
    """A region of `capacity` bytes in whole `BLOCK`s; smaller if addresses run out, but not below `least`.

    Raises `HostMemoryError`.
    """

    def __init__(self, capacity: int, backing: Backing, least: int | None = None) -> None:
        self.backing = backing
        #: The last copy to or from this region. Each copy waits for the one before it.
        self.pending: Done | None = None
        self._asking = threading.Lock()
        self.low = self.high = 0
        #: The end at which the last background commit was attempted; it is not attempted twice at the same end.
        self._tried_ahead = -1
        fewest = capacity if least is None else least
        #: The whole address range as bytes.
        self.bytes = backing.reserve(whole_blocks(BLOCK, capacity), whole_blocks(BLOCK, fewest))
        self.capacity = self.bytes.numel()
        self._account = _Account(backing.on_disk)
        self._finalizer = weakref.finalize(self, _release, backing, self._account)

    @property
    def committed(self) -> int:
        """Committed bytes."""
        return self.high - self.low

    def commit(self, size: int) -> None:
        """Commit the bytes up to `size`, and start committing the next ones in the background if the backing can.

        Raises `HostMemoryError`; the region is then unchanged.
        """
        self.check()
        if size > self.capacity:
            raise HostMemoryError(f"{size} bytes of keys or values do not fit in the {self.capacity} reserved for them")
        self._settle_ahead(size)
        if size > self.high:
            self._commit_more(size)
        self._grow_ahead(size)

    def commit_ahead(self, size: int) -> None:
        """Start committing the bytes up to `size` of a new region, in whole blocks. Raises `HostMemoryError`."""
        self._commit_next(min(whole_blocks(self.backing.block, size), self.capacity) - self.high, ahead=True)

    def _settle_ahead(self, size: int) -> None:
        """Wait for background commits up to `size`. Bytes that were refused count as uncommitted again."""
        end = min(size, self.high)
        ready = self.backing.ready(end)
        if ready < end:
            self._account.add(ready - self.high)
            self.high = ready

    def _grow_ahead(self, size: int) -> None:
        """Start committing the next share in the background once half of the last one is used."""
        if not self.backing.goes_ahead or self.committed < AHEAD_FROM or self._tried_ahead == self.high:
            return
        share = whole_blocks(self.backing.block, self.committed // SHARE)
        if self.high - size < share // 2 and self.high < self.capacity:
            self._tried_ahead = self.high
            with contextlib.suppress(HostMemoryError):
                self._commit_next(min(share, self.capacity - self.high), ahead=True)

    def _commit_more(self, size: int) -> None:
        room = self.capacity - self.high
        wanted = min(whole_blocks(self.backing.block, size) - self.high, room)
        more = min(whole_blocks(self.backing.block, self.committed // SHARE), room) if self.committed else 0
        if more > wanted:
            with contextlib.suppress(HostMemoryError):
                return self._commit_next(more)
        self._commit_next(wanted)
        if more > wanted:
            self._tried_ahead = self.high  # memory is nearly exhausted

    def _commit_next(self, size: int, ahead: bool = False) -> None:
        if not self.backing.on_disk:
            _check_available(size)
        commit = self.backing.commit_ahead if ahead else self.backing.commit
        commit(self.high, size)
        self.high += size
        self._account.add(size)

    def keep(self, first: int, end: int) -> None:
        """Release the bytes outside `[first, end)` if there are enough to justify a system call.

        No copy may read or write the released bytes.
        """
        slack = self.slack(end - first)
        low = min(first // self.backing.block * self.backing.block, self.high)
        if low - self.low >= slack and self.backing.release(self.low, low - self.low):
            self._account.add(self.low - low)
            self.low = low
        high = max(whole_blocks(self.backing.block, end), self.low)
        if self.high - high >= slack and self.backing.release(high, self.high - high):
            self._account.add(high - self.high)
            self.high = high

    def slack(self, shown: int) -> int:
        """Bytes that may stay committed without use at each end, next to `shown` bytes in use."""
        return max(self.backing.block, shown // SHARE)

    def between_seams(self, first: int, end: int) -> Iterator[tuple[int, int]]:
        """Split bytes `[first, end)` into runs that each fall within one pinned range."""
        return between(self.backing.seams, first, end)

    def copied(self, begin: Begin) -> Ticket:
        """Start a copy after the last one. Concurrent callers are ordered by a lock."""
        self.check()
        with self._asking:
            ticket = begin(self.pending)
            self.pending = ticket.done
        return ticket

    def wait(self) -> None:
        """Wait until the host itself may read and write here. Raises `CopyError` if a copy failed.

        The last copy stays `pending`, so that other threads wait for it too.
        """
        self.check()
        if self.pending is not None:
            self.pending.synchronize()

    def check(self) -> None:
        """Raise `RuntimeError` if this process is a fork, in which reading the bytes would crash."""
        if self.backing.lost:
            raise RuntimeError(
                "these keys or values are in pinned memory, which a forked process does not inherit: copy them "
                "before the fork (tensor.fetch().cpu()), or start the process with multiprocessing's 'spawn'"
            )

    def abandon(self) -> None:
        """Wait for all copies before the region is reused; their errors do not matter, as no one reads the rows."""
        if self.backing.lost:
            return
        with contextlib.suppress(CopyError):
            self.wait()
        self.pending = None

    def close(self) -> None:
        """Unpin. Views of the bytes must not be used afterwards."""
        self._finalizer()


class _Account:
    """The bytes that one region has committed. Separate from the region so that its finalizer can subtract them."""

    def __init__(self, on_disk: bool) -> None:
        self.on_disk = on_disk
        self.bytes = 0

    def add(self, size: int) -> None:
        self.bytes += size
        if self.on_disk:
            TOTALS.disk += size
        else:
            TOTALS.memory += size


def _release(backing: Backing, account: _Account) -> None:
    backing.close()
    account.add(-account.bytes)


def _check_available(wanted: int) -> None:
    available = available_memory()
    if available is not None:
        available = max(0, available - REGISTRAR.left)  # memory that background pinning is about to take
    if available is not None and wanted + MARGIN > available:
        raise HostMemoryError(
            f"cannot allocate {wanted} bytes of host memory for keys and values: {available} bytes are available, "
            f"{MARGIN} of which are reserved for other processes. kv_offload='disk' with kv_dir stores them in files; "
            "kv_offload='auto' with a memory_budget keeps more layers on the device"
        )
