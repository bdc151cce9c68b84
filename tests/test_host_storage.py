"""Stores in host memory: rows are appended without moving, forked on conflict, and freed with their last reader."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import random
import re
import resource
import stat
import subprocess
import sys
import textwrap
import threading
import weakref
from pathlib import Path

import pytest
import torch

from mom_compile.report.usage import host_memory
from mom_compile.runtime.host import region as host_region
from mom_compile.runtime.host import store as host_storage
from mom_compile.runtime.host.backings.anonymous import Anonymous
from mom_compile.runtime.host.backings.base import BLOCK, SMALL_BLOCK
from mom_compile.runtime.host.backings.pinned import Pinned
from mom_compile.runtime.host.backings.registration import REGISTRAR
from mom_compile.runtime.host.file import hold
from mom_compile.runtime.host.limits import HostMemoryError
from mom_compile.runtime.host.placement import MEMORY, Placement
from mom_compile.runtime.host.region import AHEAD_FROM, MARGIN, HostRegion
from mom_compile.runtime.host.seams import between_seams, same_layout
from mom_compile.runtime.host.store import (
    HostStore,
    Lease,
    empty_host_pool,
    lease_of,
    prepare,
    without_base,
)

ROW = (2, 3, 4)
ROW_BYTES = 24 * 4


def store_with(rows: torch.Tensor, placement: Placement | None = None) -> tuple[HostStore, Lease]:
    store = HostStore(rows.shape[1:], rows.dtype, rows.shape[0], placement or Placement())
    store.rows(0, rows.shape[0]).copy_(rows)
    return store, Lease(store, 0, rows.shape[0])


def child(code: str) -> list[str]:
    """Return the output of a program that may crash its process or exhaust its files."""
    ran = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.splitlines()


def rows_of(count: int, start: int = 0) -> torch.Tensor:
    return torch.arange(start * 24, (start + count) * 24, dtype=torch.float32).view(count, *ROW)


def test_growing_a_store_moves_no_row():
    store, lease = store_with(rows_of(3))
    address = store.rows(0, 3).data_ptr()
    for rows in range(3, 200_000, 40_000):
        store.rows(rows, rows + 40_000).copy_(torch.full((), float(rows)))
        assert store.rows(0, rows + 40_000).data_ptr() == address
    torch.testing.assert_close(store.rows(0, 3), rows_of(3))
    assert lease.rows == 3


def test_memory_is_committed_in_blocks_and_released_with_the_last_view():
    gc.collect()
    before = host_memory()
    store, lease = store_with(rows_of(3))
    held = host_memory()
    assert held.memory - before.memory == SMALL_BLOCK
    assert held.rows - before.rows == 3 * ROW_BYTES
    rows = 3 * BLOCK // ROW_BYTES
    store.rows(0, rows)
    assert host_memory().memory - before.memory == 3 * BLOCK
    store.rows(0, rows + 1)  # commits grow by a share: not every row is a system call
    assert host_memory().memory - before.memory == 3 * BLOCK + 3 * BLOCK // 16
    view = store.rows(0, 3)
    gone = weakref.ref(store)
    del store, lease
    gc.collect()
    assert gone() is None
    torch.testing.assert_close(view, rows_of(3))  # a view outlives its store
    assert host_memory() == before


def test_only_the_longest_state_of_a_cache_is_appended_to_in_place():
    store, first = store_with(rows_of(5))
    assert store.may_append(first, 1)
    second = Lease(store, 0, 6)
    assert store.may_append(second, 1)
    assert not store.may_append(first, 1)  # row 5 belongs to another lease
    del second
    assert store.may_append(first, 1)


# --- memory held for the visible rows ---


def held_bytes(store: HostStore) -> int:
    """Bytes that the kernel holds for a store's addresses."""
    if store.region.backing.on_disk:
        return os.fstat(store.region.backing.file.number).st_blocks * 512
    address = store.region.bytes.data_ptr()
    resident, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            begin, end = (int(part, 16) for part in line.split()[0].split("-"))
            inside = address <= begin and end <= address + store.region.capacity
        elif inside and line.startswith("Rss:"):
            resident += int(line.split()[1]) * 1024
    return resident


@pytest.fixture(params=["memory", "disk"])
def placement(request, tmp_path) -> Placement:
    return Placement(request.param, tmp_path)


def ends(store: HostStore) -> int:
    """Bytes that may be held in addition to the rows: a share and two blocks at each end."""
    return store.used_bytes // 8 + 4 * store.region.backing.block


def test_a_sliding_window_holds_little_more_than_its_rows_and_moves_none(placement):
    length = 2 * BLOCK // ROW_BYTES if placement.tier == MEMORY else 16 * BLOCK // ROW_BYTES
    store, lease = store_with(rows_of(length), placement)
    address = store.region.bytes.data_ptr()
    step = length // 97
    for end in range(length + step, 6 * length, step):
        assert store.may_append(lease, step)
        following = Lease(store, end - length, end)
        store.rows(end - step, end).copy_(rows_of(step, end - step))
        lease = following
        assert store.region.committed <= store.used_bytes + ends(store)
    assert store.region.bytes.data_ptr() == address
    torch.testing.assert_close(store.rows(lease.first, lease.end), rows_of(length, lease.first), rtol=0, atol=0)
    most = store.used_bytes + ends(store)
    assert held_bytes(store) <= most <= 1.2 * store.used_bytes + 4 * store.region.backing.block


def test_a_cropped_cache_releases_rows_and_can_grow_again(placement):
    rows = 8 * BLOCK // ROW_BYTES
    store, lease = store_with(rows_of(rows), placement)
    cropped = Lease(store, 1000, 2000)
    before = host_memory()
    del lease
    after = host_memory()
    freed = (before.memory - after.memory) + (before.disk - after.disk)
    assert freed >= 8 * BLOCK - cropped.rows * ROW_BYTES - ends(store)
    assert held_bytes(store) <= cropped.rows * ROW_BYTES + ends(store)
    torch.testing.assert_close(store.rows(1000, 2000), rows_of(1000, 1000), rtol=0, atol=0)
    grown = Lease(store, 1000, rows)
    store.rows(2000, rows).copy_(rows_of(rows - 2000, 2000))
    torch.testing.assert_close(store.rows(1000, rows), rows_of(rows - 1000, 1000), rtol=0, atol=0)
    assert grown.rows == rows - 1000


def test_rows_between_two_leases_stay_while_both_exist():
    store, lease = store_with(rows_of(4 * BLOCK // ROW_BYTES))
    first, last = Lease(store, 0, 10), Lease(store, lease.end - 10, lease.end)
    held = store.region.committed
    del lease
    assert store.region.committed == held
    assert not store.may_append(last, 1) or last.first == 0  # it continues in a new store
    del last
    assert store.region.committed < held // 4
    torch.testing.assert_close(store.rows(0, 10), rows_of(10), rtol=0, atol=0)
    assert first.rows == 10


def test_leasing_released_rows_raises():
    store, lease = store_with(rows_of(4 * BLOCK // ROW_BYTES))
    kept = Lease(store, lease.end - 10, lease.end)
    del lease
    with pytest.raises(RuntimeError, match="after their last tensor was deleted"):
        Lease(store, 0, 10)
    assert store.held() == [kept]


def test_ending_a_lease_does_not_wait_for_a_locked_store():
    store, lease = store_with(rows_of(4 * BLOCK // ROW_BYTES))
    kept = Lease(store, 0, 10)
    held = store.region.committed
    with store._lock:
        del lease  # as the garbage collector may do
        assert store.region.committed == held
    del kept
    assert store.held() == []


# --- addresses ---


def test_a_full_store_is_not_appended_to(monkeypatch):
    monkeypatch.setattr(host_storage, "RESERVED_ROWS", 4)
    store, lease = store_with(rows_of(3))
    assert store.capacity == 6
    assert store.may_append(lease, 3)
    assert not store.may_append(lease, 4)


def test_reserved_addresses_are_limited_in_rows_and_in_bytes():
    store, _ = store_with(rows_of(3))
    assert store.capacity == 1 << 20
    wide = [HostStore((128, 32, 128), torch.float32, 100, Placement()) for _ in range(64)]
    assert all(store.capacity == 8192 for store in wide)  # 16 GiB
    assert HostStore((128, 32, 128), torch.float32, 10_000, Placement()).capacity == 20_000


def test_fewer_addresses_are_reserved_when_they_run_out_but_never_too_few():
    ran = child("""
        import resource, torch
        from mom_compile.runtime.host.limits import HostMemoryError
        from mom_compile.runtime.host.placement import Placement
        from mom_compile.runtime.host.store import HostStore
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (3 << 30), used + (3 << 30)))
        store = HostStore((1024, 256), torch.float32, 500, Placement())     # a MiB each
        print(500 <= store.capacity <= 3072)
        try:
            HostStore((1024, 256), torch.float32, 5000, Placement())
        except HostMemoryError as error:
            print("ulimit -v" in str(error))
    """)
    assert ran == ["True", "True"]


@pytest.mark.parametrize(
    ("view", "rows"),
    [
        (lambda t: t, (0, 6)),
        (lambda t: t[:, :, :4], (0, 4)),
        (lambda t: t[:, :, 2:5], (2, 5)),
        (lambda t: t[:, :, :0], (0, 0)),
        (lambda t: t[:1], None),
        (lambda t: t[..., 1:], None),
        (lambda t: t[:, :, ::2], None),
        (lambda t: t.clone(), None),
        (lambda t: t.view(torch.int32), None),
    ],
)
def test_the_rows_of_a_tensor_are_found_from_its_storage(view, rows):
    store, _ = store_with(rows_of(6))
    tensor = view(store.rows(0, 6).movedim(0, 2))
    found = lease_of(tensor, 2)
    if rows is None:
        assert found is None
    else:
        assert (found.first, found.end) == rows
        assert found.store is store


def test_without_base_keeps_the_rows_and_is_not_a_view():
    store, _ = store_with(rows_of(6))
    view = store.rows(0, 6).movedim(0, 2)[:, :, 1:]
    made = without_base(view)
    assert view._is_view()
    assert not made._is_view()
    assert made.data_ptr() == view.data_ptr()
    torch.testing.assert_close(made, view, rtol=0, atol=0)


# --- files ---


def file_of(store: HostStore) -> int:
    return store.region.backing.file.number


def test_files_are_private_to_their_owner_and_unnamed(tmp_path: Path):
    _store, lease = store_with(rows_of(3), Placement("disk", tmp_path))
    assert list(tmp_path.iterdir()) == []
    file = file_of(lease.store)
    assert stat.S_IMODE(os.fstat(file).st_mode) == 0o600
    assert os.fstat(file).st_nlink == 0
    assert os.fstat(file).st_blocks * 512 >= BLOCK


def test_files_are_counted_separately_and_closed_with_the_cache(tmp_path: Path):
    gc.collect()
    before = host_memory()
    store, lease = store_with(rows_of(3), Placement("disk", tmp_path))
    file = file_of(store)
    torch.testing.assert_close(store.rows(0, 3), rows_of(3))
    assert host_memory().disk - before.disk == BLOCK
    assert host_memory().memory == before.memory
    del store, lease
    gc.collect()
    assert host_memory() == before
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(file)


def test_a_full_disk_raises_before_a_row_is_written(tmp_path: Path, monkeypatch):
    store, lease = store_with(rows_of(3), Placement("disk", tmp_path))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(HostMemoryError, match=r"bytes on disk .*\(No space left on device\).*kv_dir"):
        store.rows(3, 3 + BLOCK // ROW_BYTES)
    torch.testing.assert_close(store.rows(0, 3), rows_of(3))
    assert lease.rows == 3


def test_stores_in_one_folder_share_a_file_but_no_bytes(tmp_path: Path):
    rng = random.Random(0)
    stores: list[tuple[HostStore, Lease, int]] = []
    for number in range(30):
        store, lease = store_with(rows_of(3, number), Placement("disk", tmp_path))
        stores.append((store, lease, number))
        if rng.random() < 0.4:
            stores.pop(rng.randrange(len(stores)))
        store, lease, number = rng.choice(stores)  # grow one of them
        longer = Lease(store, lease.first, lease.end + BLOCK // ROW_BYTES)
        store.rows(lease.end, longer.end).copy_(rows_of(BLOCK // ROW_BYTES, number + lease.end))
        stores[[s for s, _, _ in stores].index(store)] = (store, longer, number)
        del lease, longer
        for store, lease, number in stores:
            assert torch.equal(store.rows(lease.first, lease.end), rows_of(lease.rows, number))
    assert len({file_of(store) for store, _, _ in stores}) == 1
    file = file_of(stores[0][0])
    taken, held = os.fstat(file).st_blocks * 512, sum(store.region.committed for store, _, _ in stores)
    assert held <= taken < held + BLOCK  # plus overhead of the file system


def test_rows_on_disk_outlive_their_store_while_a_view_exists(tmp_path: Path):
    store, lease = store_with(rows_of(3), Placement("disk", tmp_path))
    view = store.rows(0, 3)
    del store, lease
    gc.collect()
    other, _lease = store_with(rows_of(3, 50), Placement("disk", tmp_path))
    torch.testing.assert_close(view, rows_of(3), rtol=0, atol=0)
    torch.testing.assert_close(other.rows(0, 3), rows_of(3, 50), rtol=0, atol=0)


def test_a_file_is_no_larger_than_its_contents(tmp_path: Path):
    store, _lease = store_with(rows_of(3), Placement("disk", tmp_path))
    assert os.fstat(file_of(store)).st_size == BLOCK


def test_hundreds_of_stores_share_one_descriptor_and_a_missing_one_raises(tmp_path: Path):
    ran = child(f"""
        import os, pathlib, resource, torch
        from mom_compile.runtime.host.limits import HostMemoryError
        from mom_compile.runtime.host.placement import Placement
        from mom_compile.runtime.host.store import HostStore, Lease
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        folders = [pathlib.Path({str(tmp_path)!r}, name) for name in "ab"]
        for folder in folders:
            folder.mkdir()
        before = len(os.listdir("/proc/self/fd"))
        stores = []
        for i in range(300):
            store = HostStore((4,), torch.float32, 3, Placement("disk", folders[0]))
            store.rows(0, 3).fill_(i)
            stores.append((store, Lease(store, 0, 3)))
        print(len(os.listdir("/proc/self/fd")) - before)
        print(all((store.rows(0, 3) == i).all() for i, (store, _) in enumerate(stores)))
        taken = []
        try:
            while True:
                taken.append(os.open("/dev/null", os.O_RDONLY))
        except OSError:
            pass
        stores[0][0].rows(0, 200_000)           # what has a file goes on growing
        try:
            HostStore((4,), torch.float32, 3, Placement("disk", folders[1]))
        except HostMemoryError as error:
            print("Too many open files" in str(error) and "ulimit -n" in str(error))
    """)
    assert ran == ["1", "True", "True"]


def test_a_fork_uses_its_own_file_and_does_not_change_its_parents(tmp_path: Path):
    ran = child(f"""
        import gc, os, pathlib, torch
        from mom_compile.runtime.host.placement import Placement
        from mom_compile.runtime.host.store import HostStore, Lease
        placement = Placement("disk", pathlib.Path({str(tmp_path)!r}))
        def made(value):
            store = HostStore((4,), torch.float32, 3, placement)
            store.rows(0, 3).fill_(value)
            return store, Lease(store, 0, 3)
        one, other = made(1), made(2)
        if os.fork() == 0:
            del one                             # its parent still has it
            gc.collect()
            mine = made(3)
            other[0].rows(0, 200_000)[3:] = 4
            os._exit(0 if (mine[0].rows(0, 3) == 3).all() else 1)
        print(os.waitstatus_to_exitcode(os.wait()[1]))
        more = made(5)
        print([(store.rows(0, 3) == value).all().item() for (store, _), value in ((one, 1), (other, 2), (more, 5))])
    """)
    assert ran == ["0", "[True, True, True]"]


def test_a_missing_folder_is_named_in_the_error(tmp_path: Path):
    with pytest.raises(HostMemoryError, match=r"kv_dir=.*nowhere"):
        store_with(rows_of(3), Placement("disk", tmp_path / "nowhere"))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux maps addresses where they are free, or not at all")
def test_a_fork_does_not_unmap_addresses_that_are_in_use():
    """An existing mapping is not replaced, and not unmapped with the view that its parent had of it."""
    memory = mmap.mmap(-1, 4 * BLOCK)
    memory[:5] = b"other"
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    with pytest.raises(OSError, match="exists"):
        hold(address, 4 * BLOCK)
    assert memory[:5] == b"other"

    ran = child("""
        import ctypes, gc, mmap
        from mom_compile.runtime.host.backings import pinned
        from mom_compile.runtime.host.backings.base import BLOCK
        backing = pinned.Pinned(lambda address, size: lambda: None)
        backing.reserve(BLOCK, BLOCK).fill_(7)
        there = (ctypes.c_char * BLOCK).from_address(backing.address)
        pinned._hold_addresses()                # as in a fork in which they are another's
        del backing
        gc.collect()
        print(there.raw == b"\\7" * BLOCK)
    """)
    assert ran == ["True"]


# --- allocation failures ---


def test_too_large_a_request_raises_with_the_amount_and_the_options(monkeypatch):
    monkeypatch.setattr(host_region, "available_memory", lambda: MARGIN + 2 * BLOCK)
    store, _lease = store_with(rows_of(3))
    wanted = 4 * BLOCK - SMALL_BLOCK
    with pytest.raises(HostMemoryError, match=rf"{wanted} bytes of host memory .*kv_offload='disk'.*memory_budget"):
        store.rows(0, 4 * BLOCK // ROW_BYTES)
    torch.testing.assert_close(store.rows(0, 3), rows_of(3))


def test_available_memory_is_read_from_the_machine():
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < host_region.available_memory() <= total


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_AS"), reason="no limit on address space here")
def test_failing_to_reserve_addresses_raises_with_advice():
    code = """
        import resource, torch
        from mom_compile.runtime.host.backings.anonymous import Anonymous
        from mom_compile.runtime.host.limits import HostMemoryError
        from mom_compile.runtime.host.region import HostRegion
        resource.setrlimit(resource.RLIMIT_AS, (64 << 30, 64 << 30))
        try:
            HostRegion(1 << 40, Anonymous())
        except HostMemoryError as error:
            assert "ulimit -v" in str(error) and str(1 << 40) in str(error), error
            print("refused")
        HostRegion(1 << 20, Anonymous()).commit(5)
    """
    ran = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout.strip()) == (0, "refused"), ran.stderr


# --- pinned memory, with a pin function that only counts ---


class Pins:
    """Counts what a driver would have pinned."""

    def __init__(self, refuse_above: int | None = None) -> None:
        self.ranges: dict[int, int] = {}
        self.calls = 0
        self.refuse_above = refuse_above

    def __call__(self, address: int, size: int):
        if self.refuse_above is not None and sum(self.ranges.values()) + size > self.refuse_above:
            raise HostMemoryError(f"{size} bytes of host memory cannot be pinned")
        self.calls += 1
        self.ranges[address] = size
        return lambda: self.ranges.pop(address) and None


def test_pinned_memory_of_a_deleted_cache_is_reused_without_pinning():
    empty_host_pool()
    pins = Pins()
    store, lease = store_with(rows_of(3), Placement(pin=pins))
    del store, lease
    gc.collect()
    assert host_memory().pooled == BLOCK
    _store, _lease = store_with(rows_of(4), Placement(pin=pins))
    assert pins.calls == 1
    assert host_memory().pooled == 0


def test_pinned_memory_is_reused_only_after_the_last_copy_from_it():
    empty_host_pool()
    done = []

    class Pending:
        def synchronize(self):
            done.append(True)

    pins = Pins()
    store, lease = store_with(rows_of(3), Placement(pin=pins))
    store.region.pending = Pending()
    del store, lease
    gc.collect()
    assert not done
    _store, _lease = store_with(rows_of(3), Placement(pin=pins))
    assert done == [True]


def test_the_pool_is_emptied_on_demand():
    pins = Pins()
    store, lease = store_with(rows_of(3), Placement(pin=pins))
    del store, lease
    gc.collect()
    empty_host_pool()
    assert pins.ranges == {}
    assert host_memory().pooled == 0


def test_the_pool_is_emptied_before_a_request_fails():
    empty_host_pool()
    pins = Pins(refuse_above=2 * BLOCK)
    one, lease = store_with(rows_of(3), Placement(pin=pins))
    other, other_lease = store_with(rows_of(3), Placement(pin=pins))
    del one, lease
    gc.collect()
    other.rows(0, BLOCK // ROW_BYTES + 1)  # a second block: the pooled region is freed for it
    assert len(pins.ranges) == 2
    with pytest.raises(HostMemoryError, match="cannot be pinned"):
        other.rows(0, 2 * BLOCK // ROW_BYTES + 1)
    assert other_lease.rows == 3


def test_a_region_is_a_multiple_of_its_blocks():
    for block, backing in ((SMALL_BLOCK, Anonymous()), (BLOCK, Pinned(Pins()))):
        region = HostRegion(1, backing)
        region.commit(1)
        assert region.capacity == BLOCK
        assert region.committed == block


def test_rows_across_seams_are_copied_in_pieces_within_pinned_ranges():
    pins = Pins()
    store, _lease = store_with(rows_of(3), Placement(pin=pins))
    for blocks in (1.5, 2.5, 3.2):  # a row spans one seam, then the next
        count = int(blocks * BLOCK) // ROW_BYTES
        rows = store.rows(0, count).movedim(0, 2)
        other = torch.randn(count, *store.row).movedim(0, 2)
        for host, there in between_seams(rows, other):
            assert any(
                start <= host.data_ptr() and host.data_ptr() + host.nbytes <= start + size
                for start, size in pins.ranges.items()
            )
            host.copy_(there)
        assert torch.equal(rows, other)
    assert len(pins.ranges) == len(store.region.backing.seams) > 2


def test_pinned_memory_grows_by_a_share_or_by_what_is_available():
    pins = Pins(refuse_above=43 * BLOCK)
    region = HostRegion(100 * BLOCK, Pinned(pins))
    region.commit(40 * BLOCK)
    region.commit(40 * BLOCK + 1)
    assert region.committed == 43 * BLOCK  # a sixteenth, in whole blocks
    region.close()
    region = HostRegion(100 * BLOCK, Pinned(Pins(refuse_above=41 * BLOCK)))
    region.commit(40 * BLOCK)
    region.commit(40 * BLOCK + 1)
    assert region.committed == 41 * BLOCK


def test_pinned_memory_grows_in_the_background_once_half_is_used():
    region = HostRegion(100 * BLOCK, Pinned(Pins()))
    region.commit(40 * BLOCK)
    assert region.committed == 43 * BLOCK
    region.commit(41 * BLOCK)
    assert region.committed == 43 * BLOCK
    region.commit(42 * BLOCK)
    assert region.committed == 46 * BLOCK
    region.commit(99 * BLOCK)
    assert region.committed == region.capacity
    region.close()


def test_small_regions_do_not_grow_in_the_background():
    region = HostRegion(100 * BLOCK, Pinned(Pins()))
    region.commit(AHEAD_FROM - BLOCK)
    assert region.committed == AHEAD_FROM - BLOCK
    empty_host_pool()
    store, _lease = store_with(rows_of(4), Placement(pin=Pins()))
    prepare(store, 2)
    assert host_memory().pooled == 0


def test_memory_being_pinned_does_not_count_as_available(monkeypatch):
    monkeypatch.setattr(host_region, "available_memory", lambda: MARGIN + 60 * BLOCK)
    pins, go = Pins(), threading.Event()

    def slow(address: int, size: int):
        assert threading.current_thread() is threading.main_thread() or go.wait(10)
        return pins(address, size)

    one, other = HostRegion(100 * BLOCK, Pinned(slow)), HostRegion(100 * BLOCK, Pinned(slow))
    one.commit_ahead(BLOCK)  # blocks the thread
    one.commit_ahead(41 * BLOCK)
    with pytest.raises(HostMemoryError, match=f"{21 * BLOCK} bytes of host memory"):
        other.commit(21 * BLOCK)
    go.set()
    REGISTRAR.finish()
    other.commit(21 * BLOCK)  # memory being pinned is not counted twice
    REGISTRAR.finish()
    assert sum(pins.ranges.values()) == one.committed + other.committed


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (torch.empty(1, 4, 6, 8), torch.empty(6, 1, 4, 8).movedim(0, 2), False),
        (torch.empty(6, 1, 4, 8).movedim(0, 2), torch.empty(1, 6, 4, 8).movedim(1, 2), True),  # a batch of one
        (torch.empty(6, 2, 4, 8).movedim(0, 2), torch.empty(2, 6, 4, 8).movedim(1, 2), False),
        (torch.empty(2, 4, 6, 8)[..., :4], torch.empty(2, 4, 6, 4), False),
        (torch.empty(2, 4, 6, 8), torch.empty(2, 4, 6, 8), True),
    ],
)
def test_layouts_are_the_same_if_one_run_of_bytes_can_be_copied(one, other, same):
    assert same_layout(one, other) is same
