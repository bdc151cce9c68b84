"""A range of host addresses that grows in place: reserved whole at first, backed as rows arrive, freed from both ends.

Terms
-----
backing   What is behind the addresses (see `backings.base`): host memory, pinned where a CUDA device will copy from it,
          or parts of a file.
commit    Back the next bytes, whole blocks of them. What has been committed never moves.
seam      Where two pinned ranges meet: each commit pins a range of its own, and a driver may refuse a copy across.

    addresses   | given back | held ............ | reserved ...              |
                0           low                 high                     capacity

Growing by appending to a tensor would copy it, and a list of blocks is not one tensor that a graph could take.
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

#: What is held grows by this share of itself at least, and what is not needed any more is given back when it has become
#: as much: decoding seldom pays for a system call, and no more than two such shares are held in vain.
SHARE = 16

#: What pins so few bytes at a time takes less than a launch: nothing to do ahead.
AHEAD_FROM = SHARE * BLOCK

#: Host memory that is left to everybody else.
MARGIN = 256 << 20


@dataclass
class Totals:
    """Bytes committed now, by all regions: in memory and in files."""

    memory: int = 0
    disk: int = 0


TOTALS = Totals()


class HostRegion:
    """`capacity` bytes of addresses, or fewer where those cannot be had, but not fewer than `least`, in whole `BLOCK`s.

    What a commit puts behind them is the backing's. Raises `HostMemoryError`.
    """

    def __init__(self, capacity: int, backing: Backing, least: int | None = None) -> None:
        self.backing = backing
        #: The last copy that reads or writes here. Each waits for the one before, so all are done when it is.
        self.pending: Done | None = None
        self._asking = threading.Lock()
        self.low = self.high = 0
        #: The end from which it was last tried to grow ahead: if that is refused, it is not tried again from there.
        self._tried_ahead = -1
        fewest = capacity if least is None else least
        #: All addresses as bytes.
        self.bytes = backing.reserve(whole_blocks(BLOCK, capacity), whole_blocks(BLOCK, fewest))
        self.capacity = self.bytes.numel()
        self._account = _Account(backing.on_disk)
        self._finalizer = weakref.finalize(self, _release, backing, self._account)

    @property
    def committed(self) -> int:
        """Bytes that are held."""
        return self.high - self.low

    def commit(self, size: int) -> None:
        """Back the bytes up to `size`. Raises `HostMemoryError`, and then nothing has changed.

        Those that will be needed next are begun ahead, where the backing can.
        """
        self.check()
        if size > self.capacity:
            raise HostMemoryError(f"{size} bytes of keys or values do not fit in the {self.capacity} reserved for them")
        self._settle_ahead(size)
        if size > self.high:
            self._commit_more(size)
        self._grow_ahead(size)

    def commit_ahead(self, size: int) -> None:
        """Begin to back the bytes up to `size`, in whole blocks, of a region that is new. Raises `HostMemoryError`."""
        self._commit_next(min(whole_blocks(self.backing.block, size), self.capacity) - self.high, ahead=True)

    def _settle_ahead(self, size: int) -> None:
        """What was begun ahead is there, up to `size`, or else is not committed: it will be tried again."""
        asked = min(size, self.high)
        ready = self.backing.ready(asked)
        if ready < asked:
            self._account.add(ready - self.high)
            self.high = ready

    def _grow_ahead(self, size: int) -> None:
        """By the next share of what is held, when half of the last one is used."""
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
            self._tried_ahead = self.high  # there is hardly any left

    def _commit_next(self, size: int, ahead: bool = False) -> None:
        if not self.backing.on_disk:
            _check_available(size)
        commit = self.backing.commit_ahead if ahead else self.backing.commit
        commit(self.high, size)
        self.high += size
        self._account.add(size)

    def keep(self, first: int, end: int) -> None:
        """Give back what is held outside bytes `[first, end)`, where that is worth a system call.

        Rows outside must have no readers and no writers: they are gone.
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
        """Bytes that may be held in vain at each end, beside so many that are shown."""
        return max(self.backing.block, shown // SHARE)

    def between_seams(self, first: int, end: int) -> Iterator[tuple[int, int]]:
        """Bytes `[first, end)` as runs that each lie within one pinned range."""
        return between(self.backing.seams, first, end)

    def copied(self, begin: Begin) -> Ticket:
        """Begin a copy behind the last one: of two threads that ask at once, the second waits for the first one's."""
        self.check()
        with self._asking:
            ticket = begin(self.pending)
            self.pending = ticket.done
        return ticket

    def wait(self) -> None:
        """Until the host may read and write here itself. Raises `CopyError` if rows could not be copied.

        The last copy stays `pending`: another thread that asks meanwhile waits for it too.
        """
        self.check()
        if self.pending is not None:
            self.pending.synchronize()

    def check(self) -> None:
        """Raises `RuntimeError` where this process is a fork and has none of the bytes: reading them would end it."""
        if self.backing.lost:
            raise RuntimeError(
                "these keys or values are in pinned memory, and a forked process has none of its parent's: copy them "
                "before the fork (tensor.fetch().cpu()), or start the process by multiprocessing's 'spawn'"
            )

    def abandon(self) -> None:
        """Until nobody copies here any more, whose rows nobody will read: whether they are right does not matter."""
        if self.backing.lost:
            return
        with contextlib.suppress(CopyError):
            self.wait()
        self.pending = None

    def close(self) -> None:
        """Give pins back. Views of the bytes must not be used afterwards."""
        self._finalizer()


class _Account:
    """What one region has committed, kept apart from it so that its finalizer can take it off the totals."""

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
        available = max(0, available - REGISTRAR.left)  # what will be taken meanwhile
    if available is not None and wanted + MARGIN > available:
        raise HostMemoryError(
            f"{wanted} bytes of host memory for keys and values cannot be had: {available} are available, "
            f"{MARGIN} of which are left to others. kv_offload='disk' with kv_dir keeps them in files, "
            "kv_offload='auto' with a memory_budget keeps more layers on the device"
        )
