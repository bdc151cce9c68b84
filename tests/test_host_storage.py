"""Rows on the host: appended without moving, forked where another state needs them, freed with their last reader."""

from __future__ import annotations

import gc
import os
import resource
import stat
import subprocess
import sys
import textwrap
import weakref
from pathlib import Path

import pytest
import torch

from mom_compile.runtime import host_region, host_storage
from mom_compile.runtime.host_region import BLOCK, MARGIN, HostMemoryError, HostRegion
from mom_compile.runtime.host_storage import HostStore, Lease, Placement, apart, empty_host_pool, host_memory, lease_of
from mom_compile.runtime.seams import between_seams, same_layout

ROW = (2, 3, 4)
ROW_BYTES = 24 * 4


def store_with(rows: torch.Tensor, placement: Placement | None = None) -> tuple[HostStore, Lease]:
    store = HostStore(rows.shape[1:], rows.dtype, rows.shape[0], placement or Placement())
    store.rows(0, rows.shape[0]).copy_(rows)
    return store, Lease(store, 0, rows.shape[0])


def rows_of(count: int, start: int = 0) -> torch.Tensor:
    return torch.arange(start * 24, (start + count) * 24, dtype=torch.float32).view(count, *ROW)


def test_growing_never_moves_a_row_that_is_there():
    store, lease = store_with(rows_of(3))
    address = store.rows(0, 3).data_ptr()
    for rows in range(3, 200_000, 40_000):
        store.rows(rows, rows + 40_000).copy_(torch.full((), float(rows)))
        assert store.rows(0, rows + 40_000).data_ptr() == address
    torch.testing.assert_close(store.rows(0, 3), rows_of(3))
    assert lease.rows == 3


def test_memory_is_taken_in_blocks_as_rows_come_and_given_back_with_the_last_view():
    gc.collect()
    before = host_memory()
    store, lease = store_with(rows_of(3))
    held = host_memory()
    assert held.memory - before.memory == BLOCK
    assert held.rows - before.rows == 3 * ROW_BYTES
    rows = 3 * BLOCK // ROW_BYTES
    store.rows(0, rows)
    assert host_memory().memory - before.memory == 3 * BLOCK
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
    assert not store.may_append(first, 1)  # row 5 is another's
    del second
    assert store.may_append(first, 1)


def test_a_window_that_has_moved_on_leaves_what_is_behind_it():
    store, whole = store_with(rows_of(40))
    del whole
    assert store.may_append(Lease(store, 10, 15), 1)
    assert not store.may_append(Lease(store, 11, 16), 1)


def test_a_store_that_is_full_is_not_appended_to(monkeypatch):
    monkeypatch.setattr(host_storage, "FEWEST_RESERVED_ROWS", 4)
    store, lease = store_with(rows_of(3))
    assert store.capacity == 6
    assert store.may_append(lease, 3)
    assert not store.may_append(lease, 4)


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
def test_the_rows_that_a_tensor_shows_are_read_off_it(view, rows):
    store, _ = store_with(rows_of(6))
    tensor = view(store.rows(0, 6).movedim(0, 2))
    found = lease_of(tensor, 2)
    if rows is None:
        assert found is None
    else:
        assert (found.first, found.end) == rows
        assert found.store is store


def test_a_tensor_apart_shows_the_same_rows_and_is_no_view():
    store, _ = store_with(rows_of(6))
    view = store.rows(0, 6).movedim(0, 2)[:, :, 1:]
    made = apart(view)
    assert view._is_view()
    assert not made._is_view()
    assert made.data_ptr() == view.data_ptr()
    torch.testing.assert_close(made, view, rtol=0, atol=0)


# --- files ---


def test_files_are_their_owners_alone_and_have_no_name(tmp_path: Path):
    _store, lease = store_with(rows_of(3), Placement(tmp_path))
    assert list(tmp_path.iterdir()) == []
    file = lease.store.region.file
    assert stat.S_IMODE(os.fstat(file).st_mode) == 0o600
    assert os.fstat(file).st_nlink == 0
    assert os.fstat(file).st_blocks * 512 >= BLOCK


def test_files_are_counted_apart_and_closed_with_the_cache(tmp_path: Path):
    gc.collect()
    before = host_memory()
    store, lease = store_with(rows_of(3), Placement(tmp_path))
    file = store.region.file
    torch.testing.assert_close(store.rows(0, 3), rows_of(3))
    assert host_memory().disk - before.disk == BLOCK
    assert host_memory().memory == before.memory
    del store, lease
    gc.collect()
    assert host_memory() == before
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(file)


def test_a_full_disk_is_an_error_before_a_row_is_written(tmp_path: Path, monkeypatch):
    store, lease = store_with(rows_of(3), Placement(tmp_path))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(HostMemoryError, match=r"bytes on disk .*\(No space left on device\).*kv_dir"):
        store.rows(3, 3 + BLOCK // ROW_BYTES)
    torch.testing.assert_close(store.rows(0, 3), rows_of(3))
    assert lease.rows == 3


def test_a_folder_that_is_gone_is_named(tmp_path: Path):
    with pytest.raises(HostMemoryError, match=r"kv_dir=.*nowhere"):
        store_with(rows_of(3), Placement(tmp_path / "nowhere"))


# --- memory that cannot be had ---


def test_more_than_the_machine_has_is_refused_with_the_amount_and_the_options(monkeypatch):
    monkeypatch.setattr(host_region, "available_memory", lambda: MARGIN + 2 * BLOCK)
    store, _lease = store_with(rows_of(3))
    with pytest.raises(HostMemoryError, match=rf"{3 * BLOCK} bytes of host memory .*kv_offload='disk'.*memory_budget"):
        store.rows(0, 4 * BLOCK // ROW_BYTES)
    torch.testing.assert_close(store.rows(0, 3), rows_of(3))


def test_the_machine_says_what_it_has_left():
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < host_region.available_memory() <= total


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_AS"), reason="no limit on address space here")
def test_addresses_that_cannot_be_reserved_are_an_error_that_says_so():
    code = """
        import resource, torch
        from mom_compile.runtime.host_region import HostMemoryError, HostRegion
        resource.setrlimit(resource.RLIMIT_AS, (64 << 30, 64 << 30))
        try:
            HostRegion(1 << 40)
        except HostMemoryError as error:
            assert "ulimit -v" in str(error) and str(1 << 40) in str(error), error
            print("refused")
        HostRegion(1 << 20).commit(5)
    """
    ran = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout.strip()) == (0, "refused"), ran.stderr


# --- pinned memory, with a pin that only counts ---


class Pins:
    """What a driver would have pinned."""

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


def test_pinned_memory_of_a_dead_cache_is_used_again_and_not_pinned_anew():
    empty_host_pool()
    pins = Pins()
    store, lease = store_with(rows_of(3), Placement(pin=pins))
    del store, lease
    gc.collect()
    assert host_memory().pooled == BLOCK
    _store, _lease = store_with(rows_of(4), Placement(pin=pins))
    assert pins.calls == 1
    assert host_memory().pooled == 0


def test_pinned_memory_is_not_used_again_before_the_last_copy_from_it_is_done():
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


def test_the_pool_is_given_back_before_memory_is_refused():
    empty_host_pool()
    pins = Pins(refuse_above=2 * BLOCK)
    one, lease = store_with(rows_of(3), Placement(pin=pins))
    other, other_lease = store_with(rows_of(3), Placement(pin=pins))
    del one, lease
    gc.collect()
    other.rows(0, BLOCK // ROW_BYTES + 1)  # a second block: the pooled one makes room
    assert len(pins.ranges) == 2
    with pytest.raises(HostMemoryError, match="cannot be pinned"):
        other.rows(0, 2 * BLOCK // ROW_BYTES + 1)
    assert other_lease.rows == 3


def test_a_region_has_whole_blocks():
    region = HostRegion(1)
    region.commit(1)
    assert region.capacity == region.committed == BLOCK


def test_rows_across_seams_are_copied_in_pieces_that_each_lie_in_one_pinned_range():
    pins = Pins()
    store, _lease = store_with(rows_of(3), Placement(pin=pins))
    for blocks in (1.5, 2.5, 3.2):  # a row lies across a seam, and across the next
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
    assert len(pins.ranges) == len(store.region.seams) > 2


def test_pinned_memory_grows_by_a_share_of_itself_or_by_what_can_be_had():
    pins = Pins(refuse_above=43 * BLOCK)
    region = HostRegion(100 * BLOCK, pin=pins)
    region.commit(40 * BLOCK)
    region.commit(40 * BLOCK + 1)
    assert region.committed == 43 * BLOCK  # a sixteenth, in whole blocks
    region.close()
    region = HostRegion(100 * BLOCK, pin=Pins(refuse_above=41 * BLOCK))
    region.commit(40 * BLOCK)
    region.commit(40 * BLOCK + 1)
    assert region.committed == 41 * BLOCK


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
