"""Every backing fulfils its interface, in regions and in a cache.

A registered tier that is missing in `PLACEMENTS` fails here: add a line there to test it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from mom_compile.config import parse_options
from mom_compile.memory.decide import placement_of
from mom_compile.report.usage import host_memory
from mom_compile.runtime.copy_steps import Append, Offload
from mom_compile.runtime.host import region as host_region
from mom_compile.runtime.host.backings.anonymous import Anonymous
from mom_compile.runtime.host.backings.base import BLOCK, Backing
from mom_compile.runtime.host.backings.in_file import InFile
from mom_compile.runtime.host.file import Extent
from mom_compile.runtime.host.limits import HostMemoryError
from mom_compile.runtime.host.placement import MEMORY, TIERS, Placement
from mom_compile.runtime.host.store import HostStore, empty_host_pool
from tests.backing_law import LAWS, Make, filled, noise

CPU = torch.device("cpu")


def counted_only(address: int, size: int) -> Callable[[], None]:
    """Pins nothing, so that ranges can be observed without a device."""
    return lambda: None


#: One line per kind of memory: the placement of new stores, given the test's folder.
PLACEMENTS: dict[str, Callable[[Path], Placement]] = {
    "memory": lambda folder: Placement(),
    "pinned memory": lambda folder: Placement(pin=counted_only),
    "disk": lambda folder: Placement("disk", folder),
}


@pytest.fixture(params=PLACEMENTS)
def placement(request: pytest.FixtureRequest, tmp_path: Path) -> Placement:
    empty_host_pool()
    return PLACEMENTS[request.param](tmp_path)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_a_backing_fulfils_its_interface(placement: Placement, law: Callable[[Make], None]) -> None:
    law(placement.backing)


def test_rows_beyond_the_reservation_raise(placement: Placement) -> None:
    store = HostStore((256,), torch.float32, 10, placement)
    store.rows(0, 10).fill_(1)
    with pytest.raises(HostMemoryError, match=rf"row {store.capacity} is beyond the {store.capacity} rows"):
        store.rows(store.capacity, store.capacity + 1)
    assert (store.rows(0, 10) == 1).all()


def test_a_failed_commit_raises_and_changes_nothing(placement: Placement, monkeypatch) -> None:
    region = filled(placement.backing, 3)
    before = host_memory()

    def refuse(first: int, size: int) -> None:
        raise HostMemoryError("refused")

    monkeypatch.setattr(region.backing, "commit", refuse)
    with pytest.raises(HostMemoryError, match="refused"):
        region.commit(9 * BLOCK)
    monkeypatch.setattr(host_region, "available_memory", lambda: 0)
    with pytest.raises(HostMemoryError, match="refused" if region.backing.on_disk else "bytes of host memory"):
        region.commit(9 * BLOCK)
    assert host_memory() == before
    assert torch.equal(region.bytes[: 3 * BLOCK], noise(3 * BLOCK))


def test_a_cache_works_with_each_backing(placement: Placement) -> None:
    """Offload, append in place, fork, read, delete."""
    gc.collect()
    empty_host_pool()
    before = host_memory()
    prompt, steps = torch.randn(1, 2, 300, 64), [torch.randn(1, 2, 1, 64) for _ in range(3)]
    (cache,) = Offload(2, CPU, placement)([prompt, 0])
    first = cache
    for step in steps:
        (cache,) = Append(2, CPU, placement)([cache.host, step, 0])
    assert torch.equal(cache.fetch(), torch.cat([prompt, *steps], dim=2))
    (other,) = Append(2, CPU, placement)([first.host, steps[2], 0])  # the rows after it belong to another lease
    assert torch.equal(other.fetch(), torch.cat([prompt, steps[2]], dim=2))
    held = host_memory()
    taken = held.disk - before.disk if placement.backing().on_disk else held.memory - before.memory
    assert taken >= held.rows - before.rows > 0
    del cache, first, other
    gc.collect()
    empty_host_pool()
    assert host_memory() == before


@pytest.mark.parametrize("tier", TIERS)
def test_every_tier_is_tested_and_is_a_valid_option(tier: str, tmp_path: Path) -> None:
    tried = {make(tmp_path).tier for make in PLACEMENTS.values()}
    assert tier in tried, f"{tier} is a tier: write a line for it in PLACEMENTS"
    folder = {"kv_dir": str(tmp_path)} if TIERS[tier].needs_directory else {}
    options = parse_options({"kv_offload": True if tier == MEMORY else tier, **folder})
    found = placement_of(options, CPU)
    assert found == Placement(tier, tmp_path if folder else None)
    assert type(found.backing()) is type(TIERS[tier].backing(found))


# --- tests of the tests: backings with one fault each ---


class GivesNothingBack(Anonymous):
    def release(self, first: int, size: int) -> bool:
        return True


class SharesItsBytes(InFile):
    """Each region starts where the file starts."""

    def commit(self, first: int, size: int) -> None:
        self.file.extent(first, size)
        Extent(self.file, first, first, size).map(self.address)


class KeepsItsAddresses(Anonymous):
    kept: ClassVar[list[torch.Tensor]] = []

    def reserve(self, capacity: int, least: int) -> torch.Tensor:
        self.kept.append(super().reserve(capacity, least))
        return self.kept[-1]


@pytest.mark.parametrize(
    ("make", "broken"),
    [
        (lambda folder: GivesNothingBack(), "what_is_given_back_is_gone_and_the_rest_stays"),
        (SharesItsBytes, "regions_share_no_byte"),
        (lambda folder: KeepsItsAddresses(), "all_is_given_back"),
    ],
)
def test_interface_tests_catch_broken_backings(make: Callable[[Path], Backing], broken: str, tmp_path: Path) -> None:
    found = []
    for law in LAWS:
        try:
            law(lambda: make(tmp_path))
        except AssertionError:
            found.append(law.__name__)
    KeepsItsAddresses.kept.clear()
    assert broken in found
