"""Weights are pinned in place: no page twice, unpinned with the last weight there, and usable if pinning fails.

The driver is a stand-in that refuses what CUDA would refuse.
"""

from __future__ import annotations

import gc
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from mom_compile.runtime.host import engine_cuda, weight_bytes
from mom_compile.runtime.host.backings.registration import Pin
from mom_compile.runtime.host.engine_cuda import pin_for
from mom_compile.runtime.host.limits import HostMemoryError
from mom_compile.runtime.host.seams import between_seams
from mom_compile.runtime.host.weight import HostWeight, host_weight
from mom_compile.runtime.host.weight_bytes import PAGE, bytes_under, map_file, pin_in_place
from mom_compile.weights import offload
from tests.forks import in_a_fork

CPU, GPU = torch.device("cpu"), torch.device("cuda", 1)
PIECE = 4 * PAGE


class Driver:
    """Pins whole pages, none of them twice, and at most `room` bytes."""

    def __init__(self, room: int = 1 << 40) -> None:
        self.room = room
        self.ranges: dict[int, int] = {}
        self.undone: list[int] = []
        #: Called while it unpins.
        self.meanwhile: Callable[[], object] = lambda: None

    def __call__(self, address: int, size: int) -> Callable[[], None]:
        assert address % PAGE == 0 and size % PAGE == 0 and size > 0
        for first, other in self.ranges.items():
            assert address >= first + other or address + size <= first, "pinned already"
        if sum(self.ranges.values()) + size > self.room:
            raise HostMemoryError(f"{size} bytes of host memory cannot be pinned")
        self.ranges[address] = size

        def undo() -> None:
            self.meanwhile()
            del self.ranges[address]
            self.undone.append(address)

        return undo

    def covers(self, tensor: torch.Tensor) -> bool:
        """Whether each byte is pinned."""
        at, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        for first, size in sorted(self.ranges.items()):
            if first <= at < first + size:
                at = first + size
        return at >= end


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    monkeypatch.setattr(weight_bytes, "PIECE", PIECE)
    made = Driver()
    yield made
    gc.collect()
    assert not made.ranges, "what is pinned outlives its weights"
    assert not weight_bytes._PINNED


def weights(*sizes: int) -> list[torch.Tensor]:
    """Separate storages, as bytes, adjacent in one block: neighbours share pages."""
    block = torch.zeros(sum(sizes) + 2 * PAGE, dtype=torch.uint8)
    first = -block.data_ptr() % PAGE
    made = []
    for size in sizes:
        part = memoryview(block.numpy())[first : first + size]
        made.append(torch.frombuffer(part, dtype=torch.uint8))
        first += size
    return made


def hosted(tensors: list[torch.Tensor], pin: Pin) -> list[HostWeight]:
    """Pin tensors and wrap them as weights, like `offload_weights`."""
    own = [tensor[:] for tensor in tensors]
    pin_in_place(own, pin)
    return [host_weight(tensor, CPU) for tensor in own]


def pieces(weight: torch.Tensor) -> list[int]:
    """Bytes of the copies in which a weight would be copied to a device."""
    host = weight.host if isinstance(weight, HostWeight) else weight
    return [one.nbytes for one, _ in between_seams(host, torch.empty_like(host))]


def check(driver: Driver, *held: HostWeight) -> None:
    """Each weight is pinned, and none of its copies spans two ranges."""
    for weight in held:
        assert driver.covers(weight.host)
        at = weight.host.data_ptr()
        for size in pieces(weight):
            assert any(first <= at and at + size <= first + other for first, other in driver.ranges.items())
            at += size


def test_tensors_that_share_a_page_are_pinned_together(driver: Driver) -> None:
    held = hosted(weights(100, 200, PAGE, 50), driver)
    assert sorted(driver.ranges.values()) == [2 * PAGE]
    check(driver, *held)
    assert all(pieces(weight) == [weight.nbytes] for weight in held)


def test_pages_are_unpinned_with_the_last_of_their_tensors(driver: Driver) -> None:
    held = hosted(weights(100, 200, 50), driver)
    while held:
        assert driver.ranges
        held.pop(0)
        gc.collect()
    assert not driver.ranges


def test_memory_is_kept_while_it_is_pinned(driver: Driver) -> None:
    """A neighbour may be deleted first: its page stays pinned."""
    held = hosted(weights(100, 200), driver)
    alive = weakref.ref(held[0].host.untyped_storage())
    del held[0]
    gc.collect()
    assert alive() is not None
    held.clear()
    gc.collect()
    assert alive() is None


def test_a_large_storage_is_pinned_in_pieces_and_copies_are_split_there(driver: Driver) -> None:
    (held,) = hosted(weights(3 * PIECE + 100), driver)
    assert sorted(driver.ranges.values()) == [PAGE, PIECE, PIECE, PIECE]
    assert pieces(held) == [PIECE, PIECE, PIECE, 100]
    check(driver, held)


def test_several_tensors_of_one_storage_are_pinned_once(driver: Driver) -> None:
    (block,) = weights(2 * PIECE)
    parts = [block[:100], block[50:PIECE], block[PIECE + 5 :], block[100:110]]
    held = hosted(parts, driver)
    check(driver, *held)
    assert len({id(weight.lease) for weight in held}) == 1
    del held[1:]
    gc.collect()
    check(driver, *held)


def test_the_gap_between_two_pinned_tensors_has_a_seam_at_each_end(driver: Driver) -> None:
    (block,) = weights(6 * PAGE)
    held = hosted([block[:PAGE], block[4 * PAGE :]], driver)
    assert sorted(driver.ranges.values()) == [PAGE, 2 * PAGE]
    whole = host_weight(block, CPU)
    assert pieces(whole) == [PAGE, 3 * PAGE, 2 * PAGE]
    del held


def test_adjacent_pinned_ranges_have_a_seam(driver: Driver) -> None:
    (block,) = weights(2 * PAGE)
    held = hosted([block[:PAGE]], driver) + hosted([block[PAGE:]], driver)
    assert pieces(host_weight(block, CPU)) == [PAGE, PAGE]
    check(driver, *held)


def test_an_empty_weight_has_no_pages(driver: Driver) -> None:
    assert hosted([torch.zeros(0, 8)], driver)
    assert not driver.ranges


# --- several models ---


def test_a_second_model_on_the_same_storage_shares_its_pins(driver: Driver) -> None:
    (block,) = weights(2 * PIECE)
    first = hosted([block], driver)
    before = dict(driver.ranges)
    second = hosted([block[10:], block[:20]], driver)
    assert driver.ranges == before
    del first
    gc.collect()
    assert driver.ranges == before
    check(driver, *second)


def test_a_second_model_that_shares_a_page_pins_only_its_other_pages(driver: Driver) -> None:
    a, b = weights(PAGE + 100, 2 * PAGE)
    first = hosted([a], driver)
    second = hosted([b], driver)
    check(driver, *first, *second)
    assert sorted(driver.ranges.values()) == [2 * PAGE, 2 * PAGE]
    assert pieces(second[0]) == [PAGE - 100, PAGE + 100]
    del first
    gc.collect()
    check(driver, *second)


def test_a_model_around_pinned_pages_pins_both_sides(driver: Driver) -> None:
    (block,) = weights(3 * PIECE)
    inner = hosted([block[PIECE + 10 : 2 * PIECE - 10]], driver)
    outer = hosted([block], driver)
    check(driver, *inner, *outer)
    del outer
    gc.collect()
    assert driver.ranges  # one storage: unpinned as a whole with its last weight
    del inner


def test_models_that_share_pages_at_random_work_in_any_order(driver: Driver) -> None:
    generator = torch.Generator().manual_seed(0)

    def number(below: int) -> int:
        return int(torch.randint(below, (), generator=generator))

    blocks = weights(*(number(3 * PIECE) + 1 for _ in range(12)))
    models: list[list[HostWeight]] = []
    for _ in range(150):
        if models and number(3) == 0:
            models.pop(number(len(models)))
        chosen = [blocks[number(len(blocks))] for _ in range(number(4) + 1)]
        cuts = [(block, sorted((number(block.numel()), number(block.numel())))) for block in chosen]
        models.append(hosted([block[first : end + 1] for block, (first, end) in cuts], driver))
        check(driver, *(weight for model in models for weight in model))
    models.clear()
    gc.collect()
    assert not driver.ranges


def test_two_threads_that_share_pages_pin_each_once(driver: Driver) -> None:
    blocks, errors = weights(*[PAGE // 3] * 60), []
    start = threading.Barrier(4)

    def offload_and_drop(number: int) -> None:
        start.wait(10)
        try:
            for i in range(40):
                held = hosted(blocks[(i + number) % 20 :: 2], driver)
                check(driver, *held)
                del held
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=offload_and_drop, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not errors


def test_pinning_waits_for_a_thread_that_unpins_the_same_pages(driver: Driver) -> None:
    (block,) = weights(2 * PAGE)
    held = hosted([block], driver)
    begun, go = threading.Event(), threading.Event()
    driver.meanwhile = lambda: (begun.set(), go.wait(10))
    dropping = threading.Thread(target=held.clear)
    dropping.start()
    assert begun.wait(10)
    threading.Timer(0.05, go.set).start()
    again = hosted([block], driver)
    driver.meanwhile = lambda: None
    dropping.join(10)
    check(driver, *again)
    assert driver.undone == [block.data_ptr()]


# --- failures to pin ---


def test_a_refused_pin_keeps_earlier_pins_and_copies_work(driver: Driver) -> None:
    driver.room = 2 * PIECE
    big, other = weights(3 * PIECE, 4 * PAGE)
    with pytest.raises(HostMemoryError, match=f"{PIECE} bytes of host memory cannot be pinned"):
        pin_in_place([big, other], driver)
    assert sum(driver.ranges.values()) == 2 * PIECE
    held = [host_weight(tensor, CPU) for tensor in (big, other)]
    assert pieces(held[0]) == [PIECE, PIECE, PIECE]  # the last is pageable: a separate copy
    assert pieces(held[1]) == [4 * PAGE]
    driver.room = 1 << 40
    pin_in_place([big, other], driver)  # a second model: the rest is tried again
    check(driver, *held)


def test_a_refused_pin_warns_once_with_its_cost(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    driver.room = PAGE
    monkeypatch.setattr(offload, "pin_for", lambda device: driver)
    tensors = weights(PAGE, PAGE)
    with pytest.warns(UserWarning, match="weights on the host cannot be pinned, so their copies .*4096 bytes of host"):
        offload._pin(tensors, GPU)
    held = [host_weight(tensor, GPU) for tensor in tensors]
    assert sum(driver.ranges.values()) == PAGE
    assert all(weight.settled().sum() == 0 for weight in held)


def test_files_and_other_devices_pin_nothing(driver: Driver, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(offload, "pin_for", lambda device: driver)
    (tmp_path / "weights").write_bytes(bytes(PAGE))
    mapped = map_file(tmp_path / "weights")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        offload._pin([mapped.region.bytes], GPU)
        offload._pin(weights(10), CPU)
    assert not driver.ranges


# --- forks ---


class Runtime:
    """Counts CUDA's calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        self.calls.append("pin")
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        self.calls.append("unpin")
        return 0


def test_a_fork_unpins_nothing_and_can_read_weights(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.inference_mode(False))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(engine_cuda, "_forget_error", lambda device: None)
    held = hosted([torch.arange(1000)], pin_for(GPU))

    def child() -> bool:
        right = torch.equal(held[0].settled(), torch.arange(1000)) and not weight_bytes._PINNED
        held.clear()
        gc.collect()
        return right and runtime.calls == ["pin"]

    assert in_a_fork(child)
    assert runtime.calls == ["pin"]
    held.clear()
    gc.collect()
    assert runtime.calls == ["pin", "unpin"]


def test_a_weight_written_in_place_stays_pinned(driver: Driver) -> None:
    (held,) = hosted([torch.zeros(5000)], driver)
    held.mul_(0).add_(3)
    assert bytes_under(held.host) is held.lease
    check(driver, held)
    assert held.settled().sum() == 15000
