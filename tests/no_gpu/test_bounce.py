"""Rows of files through real threads and buffers, with a device whose copies complete immediately: every byte at any
size and any speed, and disk errors raised where the rows are waited for.

`stories.py` covers copies of a device that complete late.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mom_compile.runtime.copy_steps import Append, FetchStart, FetchWait, Offload, Settle
from mom_compile.runtime.host import bounce
from mom_compile.runtime.host.backings.base import BLOCK
from mom_compile.runtime.host.backings.in_file import InFile
from mom_compile.runtime.host.bounce import in_file
from mom_compile.runtime.host.engine import CopyError
from mom_compile.runtime.host.engine_cuda import CudaEngine
from mom_compile.runtime.host.file import Extent
from mom_compile.runtime.host.limits import HostMemoryError
from mom_compile.runtime.host.placement import Placement
from mom_compile.runtime.host.store import store_of
from mom_compile.runtime.host.tensor import HostTensor
from tests.no_gpu.at_once import CPU, STAGE, device_at_once


@pytest.fixture(autouse=True)
def engine() -> Iterator[CudaEngine]:
    with device_at_once() as made:
        yield made


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    """`[1, 2, tokens, width]` of bytes."""
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def rows(tokens: int, width: int, seed: int = 0) -> torch.Tensor:
    return noise(tokens, 1, 1, width, seed=seed).permute(1, 2, 0, 3)


def leave(value: torch.Tensor, folder: Path) -> HostTensor:
    (host,) = Offload(2, CPU, Placement("disk", folder))([value, 0])
    assert isinstance(host, HostTensor)
    assert in_file(host.host)
    return host


def fetched(host: HostTensor) -> torch.Tensor:
    (arriving,) = FetchStart(2, CPU)([host.host, 0])
    (buffer,) = FetchWait(2)([arriving, None])
    return buffer


SIZES = (1, 7, STAGE - 1, STAGE, STAGE + 1, 2 * STAGE, 3 * STAGE + 11)


@pytest.mark.parametrize("size", SIZES)
def test_every_byte_is_written_and_read_back(size: int, tmp_path: Path) -> None:
    value = rows(size, 1, seed=size)
    host = leave(value, tmp_path)
    assert torch.equal(fetched(host), value)
    assert torch.equal(host.settled(), value)  # as the file is mapped


@pytest.mark.parametrize("seed", range(4))
def test_caches_that_grow_in_one_file_are_correct_whichever_copy_is_slow(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each cache is in several parts of the file that are not adjacent. The threads sleep before each task."""
    chance = random.Random(seed)
    for name in ("read", "write"):
        move = getattr(Extent, name)

        def slowly(extent: Extent, view: memoryview, move=move) -> None:
            time.sleep(chance.choice((0, 0, 0.002)))
            move(extent, view)

        monkeypatch.setattr(Extent, name, slowly)
    monkeypatch.setattr(bounce, "STAGE", chance.choice((100_003, BLOCK // 3 + 1, 2 * BLOCK)))
    place, widths = Placement("disk", tmp_path), (513, 1000)
    values = [rows(800, width, seed=i) for i, width in enumerate(widths)]
    hosts = [leave(value, tmp_path) for value in values]
    for step in range(6):
        for i, width in enumerate(widths):
            new = rows(900 if step % 3 == 1 else chance.choice((1, 3, 900)), width, seed=10 * step + i)
            (arriving,) = FetchStart(2, CPU)([hosts[i].host, new.shape[2]])
            (hosts[i],) = Append(2, CPU, place)([hosts[i].host, new, 0])
            values[i] = torch.cat([values[i], new], 2)
            (buffer,) = FetchWait(2)([arriving, new])
            assert torch.equal(buffer, values[i])
    Settle(CPU)()
    for host, value in zip(hosts, values, strict=True):
        store = store_of(host.host)
        assert store is not None and isinstance(store.region.backing, InFile)
        assert len(store.region.backing.extents) > 1
        assert torch.equal(host.settled(), value)
        assert torch.equal(fetched(host), value)


def test_launches_do_not_wait_for_a_slow_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go, write = threading.Event(), Extent.write

    def slow(extent: Extent, view: memoryview) -> None:
        assert go.wait(10)
        write(extent, view)

    monkeypatch.setattr(Extent, "write", slow)
    value = rows(3 * STAGE, 1)
    host = leave(value, tmp_path)
    (arriving,) = FetchStart(2, CPU)([host.host, 0])
    go.set()  # else nothing would be written
    (buffer,) = FetchWait(2)([arriving, None])
    assert torch.equal(buffer, value)


def test_an_unreadable_file_raises_and_does_not_end_the_process(tmp_path: Path) -> None:
    """A mapped file would end the process."""
    host = leave(rows(5 * STAGE, 1), tmp_path)
    Settle(CPU)()
    store = store_of(host.host)
    assert store is not None and isinstance(store.region.backing, InFile)
    os.ftruncate(store.region.backing.file.number, 2 * STAGE)
    with pytest.raises(CopyError, match=r"kv_dir: .*the file is shorter than expected"):
        host.fetch()
    with pytest.raises(CopyError, match="the file is shorter"):  # whatever is asked of these rows from now on
        host.settled()
    other = leave(rows(100, 1, seed=1), tmp_path)
    assert torch.equal(fetched(other), rows(100, 1, seed=1))


def test_a_copy_raises_if_its_buffers_cannot_be_pinned(tmp_path: Path, engine: CudaEngine) -> None:
    def refuse(address: int, size: int):
        raise HostMemoryError(f"{size} bytes cannot be pinned")

    pin, engine._to_files._pin = engine._to_files._pin, refuse
    host = leave(rows(10, 1), tmp_path)
    with pytest.raises(CopyError, match=f"{2 * STAGE} bytes cannot be pinned"):
        host.fetch()
    engine._to_files._pin = pin
    assert torch.equal(fetched(leave(rows(10, 1), tmp_path)), rows(10, 1))
