"""Finds accesses to memory that a device may order differently than intended, with vector clocks.

Terms
-----
agent     An independent order of accesses: a stream, or a thread of the host.
clock     What an agent knows of the others: `{agent: number of its last finished operation}`.

    touch:  an operation is checked against all accesses to the same bytes unknown to its agent, one of both a write
    free:   memory returns to the stream that allocated it, which must know of every access to it
    unpin:  the agent must know of every access to the range

A copy must lie within one pinned range.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from mom_compile.runtime.host.holders import holder_of


class Clock(dict[str, int]):
    def learn(self, other: Clock) -> None:
        for agent, at in other.items():
            self[agent] = max(at, self.get(agent, 0))

    def step(self, agent: str) -> tuple[str, int]:
        self[agent] = self.get(agent, 0) + 1
        return agent, self[agent]


@dataclass(frozen=True)
class Access:
    """An access to bytes `[first, end)` of a storage by an operation of an agent."""

    stamp: tuple[str, int]
    write: bool
    first: int
    end: int
    what: str

    def known_to(self, clock: Clock) -> bool:
        agent, at = self.stamp
        return clock.get(agent, 0) >= at

    def replaced_by(self, later: Access) -> bool:
        """Whether every agent that is ordered after `later` is ordered after this access too."""
        return later.first <= self.first and self.end <= later.end and (later.write or not self.write)


class Owner(Protocol):
    """A stream that allocates memory."""

    clock: Clock


@dataclass
class Memory:
    """A storage. `owner` is the stream that allocated it, None for host memory."""

    address: int
    owner: Owner | None
    accesses: list[Access] = field(default_factory=list)

    @property
    def on_host(self) -> bool:
        return self.owner is None


class Device(Protocol):
    """The current agent, the pinned ranges, and a list of problems. `active` ends with the simulation."""

    active: bool

    @property
    def current(self) -> Owner: ...

    @property
    def thread_clock(self) -> Clock: ...

    @property
    def ranges(self) -> list[tuple[int, int]]: ...

    def problem(self, text: str) -> None: ...


class Ledger:
    """The accesses to all memory seen so far, by storage."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.memories: dict[int, Memory] = {}

    def touch(
        self, stamp: tuple[str, int], clock: Clock, touched: Sequence[tuple[torch.Tensor, bool]], what: str, host: bool
    ) -> None:
        """Check and record one operation of the host or a stream, whose knowledge of other agents is `clock`."""
        for tensor, write in touched:
            first, end = _extent(tensor)
            memory = self.memory(tensor)
            if memory.on_host and not host:
                self._check_seams(memory.address + first, memory.address + end)
            if first < end:
                self._access(memory, Access(stamp, write, first, end, f"{what} ({stamp[0]})"), clock)

    def _access(self, memory: Memory, new: Access, clock: Clock) -> None:
        kept = []
        for old in memory.accesses:
            overlap = old.first < new.end and new.first < old.end
            known = old.known_to(clock)
            if overlap and (old.write or new.write) and not known:
                self.device.problem(f"{new.what} does not wait for {old.what}, which touches the same bytes")
            if not (known and old.replaced_by(new)):
                kept.append(old)
        memory.accesses = [*kept, new]

    def knows(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self.memories

    def memory(self, tensor: torch.Tensor, by_host: bool = False) -> Memory:
        """The record of a tensor's storage. A storage seen for the first time was just allocated, with `by_host` by the
        host."""
        storage = tensor.untyped_storage()
        found = self.memories.get(storage._cdata)
        if found is None:
            found = self.memories[storage._cdata] = Memory(storage.data_ptr(), self.device.current)
            weakref.finalize(storage, self._freed, storage._cdata).atexit = False
        if by_host or holder_of(tensor) is not None or self._pinned(storage.data_ptr()):
            found.owner = None
        return found

    def _pinned(self, address: int) -> bool:
        return any(first <= address < first + size for first, size in self.device.ranges)

    def _freed(self, number: int) -> None:
        memory = self.memories.pop(number)
        clock = Clock(self.device.thread_clock)
        if memory.owner is not None:
            clock.learn(memory.owner.clock)
        for access in memory.accesses:
            if self.device.active and not access.known_to(clock):
                self.device.problem(f"memory is freed, and nothing has waited for {access.what}")

    def unpinned(self, address: int, size: int) -> None:
        for memory in self.memories.values():
            for access in memory.accesses if memory.on_host else ():
                first, end = memory.address + access.first, memory.address + access.end
                if first < address + size and address < end and not access.known_to(self.device.thread_clock):
                    self.device.problem(f"memory is unpinned, and nothing has waited for {access.what}")

    def _check_seams(self, first: int, end: int) -> None:
        within = [a for a, size in self.device.ranges if first < a + size and a < end]
        if len(within) > 1:
            self.device.problem(f"one copy of {end - first} bytes lies across {len(within)} pinned ranges")


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """The range of bytes that a tensor spans in its storage."""
    if tensor.numel() == 0:
        return 0, 0
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    first = tensor.storage_offset()
    return first * tensor.element_size(), (first + last + 1) * tensor.element_size()
