"""The laws of backings as functions: each makes regions of one kind, uses them, and says what was promised.

    for law in LAWS:
        law(lambda: Anonymous())

A law takes what makes a new backing. None knows which kind it is, so a kind that is made up tomorrow is held to all.
"""

from __future__ import annotations

import gc
import mmap
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mom_compile.runtime.host.backings.base import BLOCK, Backing
from mom_compile.runtime.host.limits import HostMemoryError
from mom_compile.runtime.host.region import TOTALS, HostRegion

Make = Callable[[], Backing]


def noise(size: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def filled(make: Make, blocks: int, seed: int = 0, capacity: int = 16) -> HostRegion:
    """A region with so many blocks of noise."""
    region = HostRegion(capacity * BLOCK, make())
    region.commit(blocks * BLOCK)
    region.bytes[: blocks * BLOCK] = noise(blocks * BLOCK, seed)
    return region


def resident(region: HostRegion) -> int:
    """Bytes of host memory that the kernel has behind a region's addresses."""
    begin, found, inside = region.bytes.data_ptr(), 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, _, value = line.partition(":")
        if not value or "-" in name:
            first, last = (int(part, 16) for part in line.split()[0].split("-"))
            inside = begin <= first and last <= begin + region.capacity
        elif inside and name == "Rss":
            found += int(value.split()[0]) * 1024
    return found


def reserved() -> int:
    """Bytes of addresses that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def addresses_are_bytes_and_cost_nothing(make: Make) -> None:
    before = (TOTALS.memory, TOTALS.disk)
    with torch.inference_mode():
        region = HostRegion(16 * BLOCK, make(), least=2 * BLOCK)
    assert region.bytes.dtype == torch.uint8
    assert not region.bytes.is_inference()  # rows of it outlive the mode
    assert 2 * BLOCK <= region.capacity <= 16 * BLOCK
    assert region.capacity % BLOCK == 0
    assert region.committed == resident(region) == 0
    assert (TOTALS.memory, TOTALS.disk) == before


def blocks_are_whole_pages(make: Make) -> None:
    block = make().block
    assert block % mmap.PAGESIZE == 0
    assert BLOCK % block == 0


def what_is_written_is_read_back(make: Make) -> None:
    region = filled(make, 3)
    assert torch.equal(region.bytes[: 3 * BLOCK], noise(3 * BLOCK))


def growing_moves_nothing_and_keeps_contents(make: Make) -> None:
    region, written = HostRegion(16 * BLOCK, make()), noise(16 * BLOCK)
    address, high = region.bytes.data_ptr(), 0
    for size in (1, 5000, BLOCK, BLOCK + 1, 3 * BLOCK - 1, 9 * BLOCK + 7, 16 * BLOCK):
        region.commit(size)
        assert size <= region.committed
        region.bytes[high:size] = written[high:size]
        high = size
        assert torch.equal(region.bytes[:high], written[:high])
    assert region.committed == region.capacity
    assert region.bytes.data_ptr() == address


def beyond_what_is_reserved_is_an_error(make: Make) -> None:
    region = filled(make, 3)
    with pytest.raises(HostMemoryError, match=rf"{region.capacity + 1} bytes .* {region.capacity} reserved"):
        region.commit(region.capacity + 1)
    assert region.committed < 4 * BLOCK
    assert torch.equal(region.bytes[: 3 * BLOCK], noise(3 * BLOCK))


def what_is_given_back_is_gone_and_the_rest_stays(make: Make) -> None:
    """Or nothing has changed, where a kind cannot give parts back."""
    region, written = filled(make, 12), noise(12 * BLOCK)
    committed, counted = region.committed, TOTALS.memory + TOTALS.disk
    region.keep(5 * BLOCK, 7 * BLOCK)
    assert region.committed in (2 * BLOCK, committed)
    assert counted - (TOTALS.memory + TOTALS.disk) == committed - region.committed
    assert resident(region) <= region.committed
    assert torch.equal(region.bytes[5 * BLOCK : 7 * BLOCK], written[5 * BLOCK : 7 * BLOCK])
    gone = region.committed < committed
    region.commit(12 * BLOCK)
    if gone:  # were they there again, somebody would have kept them
        assert not torch.equal(region.bytes[7 * BLOCK : 12 * BLOCK], written[7 * BLOCK :])
    region.bytes[7 * BLOCK : 12 * BLOCK] = written[: 5 * BLOCK]
    assert torch.equal(region.bytes[5 * BLOCK : 7 * BLOCK], written[5 * BLOCK : 7 * BLOCK])
    assert torch.equal(region.bytes[7 * BLOCK : 12 * BLOCK], written[: 5 * BLOCK])


def regions_share_no_byte(make: Make) -> None:
    """Not even what one has given back while the other grows."""
    one, other = filled(make, 3, seed=1), filled(make, 3, seed=2)
    one.keep(BLOCK, 2 * BLOCK)
    other.commit(6 * BLOCK)
    other.bytes[3 * BLOCK : 6 * BLOCK] = noise(3 * BLOCK, seed=3)
    one.commit(4 * BLOCK)
    one.bytes[2 * BLOCK : 4 * BLOCK] = noise(2 * BLOCK, seed=4)
    assert torch.equal(one.bytes[BLOCK : 2 * BLOCK], noise(3 * BLOCK, seed=1)[BLOCK : 2 * BLOCK])
    assert torch.equal(one.bytes[2 * BLOCK : 4 * BLOCK], noise(2 * BLOCK, seed=4))
    assert torch.equal(other.bytes[: 3 * BLOCK], noise(3 * BLOCK, seed=2))
    assert torch.equal(other.bytes[3 * BLOCK : 6 * BLOCK], noise(3 * BLOCK, seed=3))


def a_view_outlives_its_region(make: Make) -> None:
    region = filled(make, 3)
    view = region.bytes[BLOCK : 2 * BLOCK]
    del region
    gc.collect()
    other = filled(make, 3, seed=1)
    assert torch.equal(view, noise(3 * BLOCK)[BLOCK : 2 * BLOCK])
    assert torch.equal(other.bytes[: 3 * BLOCK], noise(3 * BLOCK, seed=1))


def all_is_given_back(make: Make) -> None:
    """Bytes, addresses and open files."""
    gc.collect()
    counted, files, addresses = (TOTALS.memory, TOTALS.disk), open_files(), reserved()
    regions = [filled(make, 3, capacity=1024) for _ in range(4)]  # a GiB of addresses each
    assert (TOTALS.memory, TOTALS.disk) != counted
    assert reserved() - addresses >= 4 * 1024 * BLOCK
    regions.pop().close()  # and once more when it dies
    del regions
    gc.collect()
    assert (TOTALS.memory, TOTALS.disk) == counted
    assert open_files() <= files
    assert reserved() - addresses < 512 * BLOCK


LAWS: tuple[Callable[[Make], None], ...] = (
    addresses_are_bytes_and_cost_nothing,
    blocks_are_whole_pages,
    what_is_written_is_read_back,
    growing_moves_nothing_and_keeps_contents,
    beyond_what_is_reserved_is_an_error,
    what_is_given_back_is_gone_and_the_rest_stays,
    regions_share_no_byte,
    a_view_outlives_its_region,
    all_is_given_back,
)
