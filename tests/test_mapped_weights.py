"""Weights in a mapped file are read by system calls at the right offsets, and no more than needed.

A truncated file raises an error, and the process continues. Runs with the CPU engine and the CUDA engine on a stand-in.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mom_compile.runtime.copy_steps import FetchRows, FetchStart, FetchWait, KeepWeights, Settle
from mom_compile.runtime.host.done import CopyError
from mom_compile.runtime.host.engine import ThreadedEngine
from mom_compile.runtime.host.engines import engine_for
from mom_compile.runtime.host.file import Extent
from mom_compile.runtime.host.weight import HostWeight, host_weight
from mom_compile.runtime.host.weight_bytes import WeightBytes, map_file
from mom_compile.weights import offload_weights
from tests.models import TinyDecoder
from tests.no_gpu.at_once import CPU, STAGE, device_at_once

pytestmark = pytest.mark.filterwarnings("ignore:weights that are stored on the host are copied")

#: Views of a weight.
VIEWS = (
    lambda w: w.t(),
    lambda w: w[3:7],
    lambda w: w[:, 5:9],
    lambda w: w[::3],
    lambda w: w[2],
    lambda w: w[:0],
)


@pytest.fixture(autouse=True, params=["threads", "cuda"])
def _engine(request: pytest.FixtureRequest) -> Iterator[None]:
    with device_at_once() if request.param == "cuda" else contextlib.nullcontext():
        assert isinstance(engine_for(CPU), ThreadedEngine) == (request.param == "threads")
        yield


@dataclass
class Weights:
    """A file with random bytes, and weights in it."""

    path: Path
    bytes: torch.Tensor
    file: WeightBytes = field(init=False)

    def __post_init__(self) -> None:
        self.path.write_bytes(self.bytes.numpy().tobytes())
        self.file = map_file(self.path)

    def __call__(self, first: int, *shape: int, dtype: torch.dtype = torch.float32) -> HostWeight:
        """Return the weight that starts at byte `first`."""
        return host_weight(self._seen(self.file.region.bytes, first, shape, dtype), CPU)

    def expected(self, first: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return self._seen(self.bytes, first, shape, dtype)

    @staticmethod
    def _seen(whole: torch.Tensor, first: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        size = dtype.itemsize
        for length in shape:
            size *= length
        return whole[first : first + size].view(dtype).view(shape)


@pytest.fixture
def file(tmp_path: Path) -> Weights:
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(-100, 100, (40 * STAGE,), dtype=torch.int32, generator=generator).float()
    return Weights(tmp_path / "model.safetensors", numbers.view(torch.uint8))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Records offsets and sizes read from files."""
    found: list[tuple[int, int]] = []
    read = Extent.read

    def noted(extent: Extent, view: memoryview) -> None:
        found.append((extent.offset, extent.size))
        read(extent, view)

    monkeypatch.setattr(Extent, "read", noted)
    return found


def fetched(weight: HostWeight, over: object = None) -> torch.Tensor:
    """Fetch a weight like a program."""
    (arriving,) = FetchStart(0, CPU)([weight.host, 0, *([] if over is None else [over])])
    (buffer,) = FetchWait(0)([arriving, None])
    return buffer


@pytest.mark.parametrize("first", [0, 4, STAGE - 4, STAGE, 3 * STAGE + 52])
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 40])
def test_every_byte_is_read_from_its_offset(
    file: Weights, first: int, rows: int, reads: list[tuple[int, int]]
) -> None:
    weight, expected = file(first, rows, 64), file.expected(first, rows, 64)
    assert torch.equal(fetched(weight), expected)
    assert sum(size for _, size in reads) == weight.nbytes
    assert min(offset for offset, _ in reads) == first
    assert torch.equal(weight.fetch(), expected)


def test_two_weights_of_a_file_share_one_buffer(file: Weights) -> None:
    slot = None
    for layer in range(8):
        first = layer * 6 * STAGE
        (slot,) = FetchStart(0, CPU)([file(first, 90, 64).host, 0, *([] if slot is None else [slot])])
        (buffer,) = FetchWait(0)([slot, None])
        assert torch.equal(buffer, file.expected(first, 90, 64))


def test_other_dtypes_and_views_of_a_weight_are_fetched(file: Weights, reads: list[tuple[int, int]]) -> None:
    half = file(2 * STAGE, 30, 64, dtype=torch.bfloat16)
    assert torch.equal(fetched(half).view(torch.int16), file.expected(2 * STAGE, 30, 64, dtype=torch.int16))
    weight, expected = file(STAGE, 50, 64), file.expected(STAGE, 50, 64)
    reads.clear()
    for view in VIEWS:
        seen = view(weight)
        assert torch.equal(seen.fetch(), view(expected))
        assert torch.equal(fetched(seen), view(expected))
    assert all(offset >= STAGE and offset + size <= STAGE + weight.nbytes for offset, size in reads)


def test_only_selected_rows_are_read_each_once(
    file: Weights, reads: list[tuple[int, int]]
) -> None:
    table, expected = file(4 * STAGE, 200, 64), file.expected(4 * STAGE, 200, 64)
    for rows in (torch.tensor([[7, 8, 9], [150, 8, -1]]), torch.tensor([3], dtype=torch.int32), torch.tensor(5)):
        reads.clear()
        (got,) = FetchRows(CPU)([table.host, rows])
        assert torch.equal(got, expected[rows])
        wanted = sorted(set((rows % 200).flatten().tolist()))
        assert sum(size for _, size in reads) == len(wanted) * 256
        assert {(offset - 4 * STAGE) // 256 for offset, _ in reads} <= set(wanted)
    reads.clear()
    FetchRows(CPU)([table.host, torch.arange(40)])
    assert reads == [(4 * STAGE, 40 * 256)]
    assert torch.equal(FetchRows(CPU)([table[10:20].host, torch.tensor([1, -1])])[0], expected[[11, 19]])
    assert torch.equal(FetchRows(CPU)([table[:, 8:16].host, torch.tensor([1, -1])])[0], expected[[1, 199], 8:16])
    (none,) = FetchRows(CPU)([table.host, torch.empty(0, dtype=torch.long)])
    assert none.shape == (0, 64)


@pytest.mark.parametrize("row", [200, -201])
def test_a_row_index_out_of_range_raises(file: Weights, row: int) -> None:
    with pytest.raises(IndexError):
        FetchRows(CPU)([file(4 * STAGE, 200, 64).host, torch.tensor([1, row])])


def test_a_truncated_file_raises_with_its_name(file: Weights) -> None:
    there, cut = file(0, 40, 64), file(20 * STAGE, 60, 64)
    fetched(cut)
    os.truncate(file.path, 21 * STAGE)
    for ask in (
        lambda: fetched(cut),
        cut.fetch,
        lambda: cut.t().fetch(),
        lambda: fetched(cut[:, ::2]),
        lambda: FetchRows(CPU)([cut.host, torch.tensor([50])]),
    ):
        with pytest.raises(CopyError, match=r"^weights could not be copied to or from '.*safetensors': .*is shorter"):
            ask()
    assert torch.equal(fetched(there), file.expected(0, 40, 64))
    assert torch.equal(FetchRows(CPU)([cut.host, torch.tensor([3])])[0], file.expected(20 * STAGE, 60, 64)[[3]])


def test_a_failed_read_affects_only_itself(file: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, read = file(0, 40, 64), Extent.read

    def broken(extent: Extent, view: memoryview) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Extent, "read", broken)
    with pytest.raises(CopyError, match="Input/output error"):
        fetched(weight)
    monkeypatch.setattr(Extent, "read", read)
    assert torch.equal(fetched(weight), file.expected(0, 40, 64))
    assert weight.settled().shape == (40, 64)


def test_a_replaced_file_is_read_as_before(file: Weights) -> None:
    """Downloads are written separately and renamed: an open file does not change."""
    weight = file(0, 40, 64)
    other = file.path.with_suffix(".new")
    other.write_bytes(bytes(len(file.bytes)))
    other.rename(file.path)
    assert torch.equal(fetched(weight), file.expected(0, 40, 64))


def test_a_model_with_a_truncated_file_raises_and_stays_usable(tmp_path: Path) -> None:
    made, ids = TinyDecoder(), torch.tensor([[5, 9, 33, 63]])
    path = tmp_path / "model.safetensors"
    save_file(made.state_dict(), path)
    with torch.no_grad():
        expected = made(ids)
        offload_weights(made, CPU, memory_budget=100_000, directory=tmp_path)
        assert torch.equal(made(ids), expected)
        whole = path.read_bytes()
        os.truncate(path, len(whole) // 4)
        for _ in range(2):
            with pytest.raises(CopyError, match="the file is shorter than expected"):
                made(ids)
        with path.open("r+b") as again:
            again.write(whole)
        assert torch.equal(made(ids), expected)


def test_a_weight_fetched_by_one_thread_can_be_written_by_another(file: Weights) -> None:
    """In contrast to one that a program of another thread reads until its end."""
    weight = host_weight(file.expected(0, 40, 64).clone(), CPU)
    in_a_thread(lambda: (weight.fetch(), FetchRows(CPU)([weight.host, torch.tensor([1])])))
    weight.zero_()
    begun, go = threading.Event(), threading.Event()

    def program() -> None:
        KeepWeights((0,))([weight.host])
        (arriving,) = FetchStart(0, CPU)([weight.host, 0])
        FetchWait(0)([arriving, None])
        begun.set()
        go.wait(10)
        Settle(CPU)()

    running = threading.Thread(target=program)
    running.start()
    assert begun.wait(10)
    with pytest.raises(RuntimeError, match="a weight that a running model reads"):
        weight.fill_(2)
    go.set()
    running.join()
    weight.fill_(2)
    assert weight.fetch().eq(2).all()


def in_a_thread(work: Callable[[], object]) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
