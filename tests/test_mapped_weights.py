"""Weights in a file, mapped: read by calls at the right places, no more of them than is asked for; a file that was cut
short meanwhile is an error, and the process goes on. For a CPU's engine and for CUDA's, whose device is a stand-in."""

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

pytestmark = pytest.mark.filterwarnings("ignore:weights that are kept on the host are fetched one by one")

#: Ways to see a weight.
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
    """A file with bytes at random, and what a test sees of it as weights."""

    path: Path
    bytes: torch.Tensor
    file: WeightBytes = field(init=False)

    def __post_init__(self) -> None:
        self.path.write_bytes(self.bytes.numpy().tobytes())
        self.file = map_file(self.path)

    def __call__(self, first: int, *shape: int, dtype: torch.dtype = torch.float32) -> HostWeight:
        """The weight that begins at a byte."""
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
    """What has been read of files: offsets and sizes."""
    found: list[tuple[int, int]] = []
    read = Extent.read

    def noted(extent: Extent, view: memoryview) -> None:
        found.append((extent.offset, extent.size))
        read(extent, view)

    monkeypatch.setattr(Extent, "read", noted)
    return found


def fetched(weight: HostWeight, over: object = None) -> torch.Tensor:
    """As a program brings it."""
    (arriving,) = FetchStart(0, CPU)([weight.host, 0, *([] if over is None else [over])])
    (buffer,) = FetchWait(0)([arriving, None])
    return buffer


@pytest.mark.parametrize("first", [0, 4, STAGE - 4, STAGE, 3 * STAGE + 52])
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 40])
def test_every_byte_arrives_from_its_place_in_the_file(
    file: Weights, first: int, rows: int, reads: list[tuple[int, int]]
) -> None:
    weight, expected = file(first, rows, 64), file.expected(first, rows, 64)
    assert torch.equal(fetched(weight), expected)
    assert sum(size for _, size in reads) == weight.nbytes
    assert min(offset for offset, _ in reads) == first
    assert torch.equal(weight.fetch(), expected)


def test_two_weights_of_a_file_take_turns_in_one_slot(file: Weights) -> None:
    slot = None
    for layer in range(8):
        first = layer * 6 * STAGE
        (slot,) = FetchStart(0, CPU)([file(first, 90, 64).host, 0, *([] if slot is None else [slot])])
        (buffer,) = FetchWait(0)([slot, None])
        assert torch.equal(buffer, file.expected(first, 90, 64))


def test_other_types_and_views_of_a_weight_arrive(file: Weights, reads: list[tuple[int, int]]) -> None:
    half = file(2 * STAGE, 30, 64, dtype=torch.bfloat16)
    assert torch.equal(fetched(half).view(torch.int16), file.expected(2 * STAGE, 30, 64, dtype=torch.int16))
    weight, expected = file(STAGE, 50, 64), file.expected(STAGE, 50, 64)
    reads.clear()
    for view in VIEWS:
        seen = view(weight)
        assert torch.equal(seen.fetch(), view(expected))
        assert torch.equal(fetched(seen), view(expected))
    assert all(offset >= STAGE and offset + size <= STAGE + weight.nbytes for offset, size in reads)


def test_chosen_rows_are_all_that_is_read_each_once_and_neighbours_together(
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
def test_a_row_that_the_table_has_not_is_an_error_and_no_other_weights_bytes(file: Weights, row: int) -> None:
    with pytest.raises(IndexError):
        FetchRows(CPU)([file(4 * STAGE, 200, 64).host, torch.tensor([1, row])])


def test_a_file_that_was_cut_short_is_an_error_that_names_it_and_others_go_on(file: Weights) -> None:
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
        with pytest.raises(CopyError, match=r"^weights could not be copied to or from '.*safetensors': .*file ends"):
            ask()
    assert torch.equal(fetched(there), file.expected(0, 40, 64))
    assert torch.equal(FetchRows(CPU)([cut.host, torch.tensor([3])])[0], file.expected(20 * STAGE, 60, 64)[[3]])


def test_a_read_that_fails_once_is_an_error_of_that_read_alone(file: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, read = file(0, 40, 64), Extent.read

    def broken(extent: Extent, view: memoryview) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Extent, "read", broken)
    with pytest.raises(CopyError, match="Input/output error"):
        fetched(weight)
    monkeypatch.setattr(Extent, "read", read)
    assert torch.equal(fetched(weight), file.expected(0, 40, 64))
    assert weight.settled().shape == (40, 64)


def test_a_file_that_is_replaced_is_read_as_it_was(file: Weights) -> None:
    """Downloads are written apart and renamed: what is open stays what it was."""
    weight = file(0, 40, 64)
    other = file.path.with_suffix(".new")
    other.write_bytes(bytes(len(file.bytes)))
    other.rename(file.path)
    assert torch.equal(fetched(weight), file.expected(0, 40, 64))


def test_a_model_whose_file_is_cut_short_fails_where_it_is_read_and_lives_on(tmp_path: Path) -> None:
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
            with pytest.raises(CopyError, match="the file ends before the rows do"):
                made(ids)
        with path.open("r+b") as again:
            again.write(whole)
        assert torch.equal(made(ids), expected)


def test_a_weight_that_was_fetched_by_one_thread_may_be_written_by_another(file: Weights) -> None:
    """Unlike one that a program of another thread reads, up to its end."""
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
