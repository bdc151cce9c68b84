"""Pinned host memory: which calls of the CUDA runtime are made, where and when. The runtime is a stand-in."""

from __future__ import annotations

import contextlib
import gc
import logging
import mmap
import pickle
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from mom_compile.runtime.copy_steps import Append, FetchStart, Offload
from mom_compile.runtime.host import engine_cuda
from mom_compile.runtime.host.backings.base import BLOCK, as_bytes
from mom_compile.runtime.host.backings.pinned import HUGE_PAGE, Pinned
from mom_compile.runtime.host.backings.registration import PIECE, REGISTRAR
from mom_compile.runtime.host.engine_cuda import PORTABLE, pin_for
from mom_compile.runtime.host.limits import HostMemoryError
from mom_compile.runtime.host.placement import Placement
from mom_compile.runtime.host.region import HostRegion
from mom_compile.runtime.host.store import empty_host_pool
from tests.forks import in_a_fork

CPU = torch.device("cpu")
SECOND = torch.device("cuda", 1)


@dataclass
class Runtime:
    """Records calls with the current device, and returns a code."""

    code: int = 0
    calls: list[tuple[object, ...]] = field(default_factory=list)
    #: The current device is one of the thread.
    local: threading.local = field(default_factory=threading.local)

    @property
    def current(self) -> torch.device | None:
        return getattr(self.local, "current", None)

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        self.calls.append(("pin", address, size, flags, self.current))
        return self.code

    def cudaHostUnregister(self, address: int) -> int:
        self.calls.append(("unpin", address, self.current))
        return self.code

    @contextlib.contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        before, self.local.current = self.current, device
        yield
        self.local.current = before


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Runtime]:
    empty_host_pool()
    made = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: made)
    monkeypatch.setattr(torch.cuda, "device", made.device)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: made.calls.append(("synchronize", device)))
    monkeypatch.setattr(engine_cuda, "_forget_error", lambda device: made.calls.append(("error forgotten", device)))
    yield made
    gc.collect()
    empty_host_pool()


def test_memory_is_pinned_for_all_devices_and_unpinned_when_its_own_is_idle(runtime: Runtime) -> None:
    undo = pin_for(SECOND)(4096, 8192)
    assert runtime.calls == [("pin", 4096, 8192, PORTABLE, SECOND)]
    runtime.calls.clear()
    undo()
    assert runtime.calls == [("synchronize", SECOND), ("unpin", 4096, SECOND)]
    assert runtime.current is None


def test_a_failed_pin_raises_an_error_with_advice(runtime: Runtime) -> None:
    runtime.code = 2
    with pytest.raises(HostMemoryError, match=r"cannot pin 8192 bytes .* \(CUDA error 2\); .*ulimit -l"):
        pin_for(SECOND)(4096, 8192)
    assert runtime.calls[-1] == ("error forgotten", SECOND)


def test_a_failed_unpin_is_logged_and_does_not_raise(runtime: Runtime, caplog: pytest.LogCaptureFixture) -> None:
    undo, runtime.code = pin_for(SECOND)(4096, 8192), 713
    with caplog.at_level(logging.WARNING):
        undo()
    assert "8192 bytes of host memory could not be unpinned (CUDA error 713)" in caplog.text
    assert runtime.calls[-1] == ("error forgotten", SECOND)


def test_a_fork_does_not_unpin_memory_of_its_parent(runtime: Runtime) -> None:
    undo = pin_for(SECOND)(4096, 8192)
    runtime.calls.clear()
    assert in_a_fork(lambda: undo() is None and not runtime.calls)


@dataclass(frozen=True)
class Mapping:
    first: int
    end: int
    flags: frozenset[str]


def mapping_of(address: int) -> Mapping | None:
    """The kernel's entry for an address of this process."""
    found: Mapping | None = None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == "VmFlags" and found is not None:
            return Mapping(found.first, found.end, frozenset(rest.split()))
        if "-" in name:
            first, end = (int(part, 16) for part in line.split()[0].split("-"))
            found = Mapping(first, end, frozenset()) if first <= address < end else None
    return None


@pytest.fixture
def region(runtime: Runtime) -> Iterator[HostRegion]:
    made = HostRegion(8 * BLOCK, Pinned(pin_for(SECOND)))
    yield made
    made.close()


def test_pinned_pages_are_whole_huge_pages(region: HostRegion) -> None:
    address = region.bytes.data_ptr()
    assert address % HUGE_PAGE == 0
    assert region.bytes.untyped_storage().data_ptr() == address  # stores are identified by it
    mapping = mapping_of(address)
    assert mapping is not None and address + region.capacity <= mapping.end
    if Path("/sys/kernel/mm/transparent_hugepage").exists():
        assert "hg" in mapping.flags


def test_a_fork_has_no_pinned_pages(region: HostRegion) -> None:
    region.commit(BLOCK)
    address = region.bytes.data_ptr()
    region.bytes[:BLOCK] = 1
    assert "dc" in mapping_of(address).flags  # type: ignore[union-attr]
    assert in_a_fork(lambda: "rd" not in mapping_of(address).flags)  # type: ignore[union-attr]
    assert in_a_fork(lambda: "rd" in mapping_of(torch.ones(1).data_ptr()).flags)  # type: ignore[union-attr]


def test_a_fork_maps_nothing_at_pinned_addresses(region: HostRegion) -> None:
    """Deleting their last view unmaps the addresses."""
    region.commit(BLOCK)
    address, view = region.bytes.data_ptr(), [region.bytes]

    def others() -> list[mmap.mmap]:
        made = [mmap.mmap(-1, region.capacity) for _ in range(20)]
        assert not any(address <= as_bytes(one).data_ptr() < address + region.capacity for one in made)
        view.clear()
        return made

    assert in_a_fork(lambda: all(one.write_byte(1) is None for one in others()))


def raises(work: Callable[[], object]) -> bool:
    try:
        work()
    except RuntimeError as error:
        return "a forked process does not inherit" in str(error)
    return False


def test_every_operation_on_a_cache_in_pinned_memory_raises_in_a_fork(runtime: Runtime) -> None:
    place, value = Placement(pin=pin_for(SECOND)), torch.ones(1, 2, 5, 64)
    (dead,) = Offload(2, CPU, place)([value, 0])
    (host,) = Offload(2, CPU, place)([value, 0])
    host.settled()
    del dead
    gc.collect()
    for asked in (
        lambda: host.settled(),
        lambda: host.fetch(),
        lambda: host + 1,
        lambda: repr(host),
        lambda: host[:, :, 1:].tolist(),
        lambda: host.clone(),
        lambda: host.mul_(2),
        lambda: pickle.dumps(host),
        lambda: FetchStart(2, CPU)([host.host, 1]),
        lambda: Append(2, CPU, place)([host.host, value, 0]),
    ):
        assert in_a_fork(lambda asked=asked: raises(asked))
    assert in_a_fork(lambda: torch.equal(Offload(2, CPU, place)([value, 0])[0].fetch(), value))  # a new cache
    assert torch.equal(host.fetch(), value)


def test_memory_pinned_in_advance_is_pinned_on_its_own_device_too(runtime: Runtime) -> None:
    region = HostRegion(8 * BLOCK, Pinned(pin_for(SECOND)))
    region.commit_ahead(BLOCK)
    REGISTRAR.finish()
    address = region.bytes.data_ptr()
    assert runtime.calls == [("pin", address, BLOCK, PORTABLE, SECOND)]
    region.commit(BLOCK)
    assert len(runtime.calls) == 1
    region.close()
    assert runtime.calls[1:] == [("synchronize", SECOND), ("unpin", address, SECOND)]


def test_a_large_range_is_pinned_in_pieces_that_copies_do_not_cross(runtime: Runtime) -> None:
    region = HostRegion(4 * PIECE, Pinned(pin_for(SECOND)))
    region.commit(2 * PIECE + BLOCK)
    address = region.bytes.data_ptr()
    pins = [call[1:3] for call in runtime.calls]
    assert pins[:3] == [(address, PIECE), (address + PIECE, PIECE), (address + 2 * PIECE, BLOCK)]
    assert list(region.between_seams(0, 2 * PIECE + 1)) == [(0, PIECE), (PIECE, 2 * PIECE), (2 * PIECE, 2 * PIECE + 1)]
    region.close()


def test_a_region_pins_what_it_commits_and_unpins_it_with_its_last_use(runtime: Runtime) -> None:
    region = HostRegion(8 * BLOCK, Pinned(pin_for(SECOND)))
    region.commit(BLOCK)
    region.commit(BLOCK + 1)
    address = region.bytes.data_ptr()
    assert [call[1:3] for call in runtime.calls] == [(address, BLOCK), (address + BLOCK, BLOCK)]
    runtime.calls.clear()
    del region
    gc.collect()
    assert {call[1] for call in runtime.calls if call[0] == "unpin"} == {address, address + BLOCK}
