"""Scenarios of a cache on simulated streams, with the real engine, steps and host tensors.

A story takes a simulation, does its work and checks the results. Together the stories need every wait and every record
of `mom_compile.runtime.host`.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch

from mom_compile.report.usage import host_memory
from mom_compile.runtime.copy_steps import Append, FetchStart, FetchWait, Offload, Settle
from mom_compile.runtime.host import bounce, region
from mom_compile.runtime.host import store as store_module
from mom_compile.runtime.host.backings.base import BLOCK
from mom_compile.runtime.host.backings.registration import REGISTRAR
from mom_compile.runtime.host.engine import MOST_LEAVING, CopyError
from mom_compile.runtime.host.file import Extent
from mom_compile.runtime.host.limits import HostMemoryError
from mom_compile.runtime.host.placement import Placement
from mom_compile.runtime.host.store import empty_host_pool, store_of
from mom_compile.runtime.host.tensor import HostTensor
from mom_compile.runtime.program import Program, Slot, Step
from tests.no_gpu.streams import CPU, SimStream, Simulation

Story = Callable[[Simulation], None]
ROW = (1, 2, 64)


def values(tokens: int, seed: int = 0, head_major: bool = False) -> torch.Tensor:
    """`[1, 2, tokens, 64]` of small integers, so that sums are exact. Token-major, or head-major."""
    count = torch.arange(tokens * 128, dtype=torch.float32).add(seed).remainder(251)
    return count.view(1, 2, tokens, 64) if head_major else count.view(tokens, 1, 2, 64).permute(1, 2, 0, 3)


def place(sim: Simulation) -> Placement:
    return sim.placement or Placement(pin=sim.pin)


def offload(sim: Simulation, value: torch.Tensor) -> HostTensor:
    (host,) = Offload(2, CPU, place(sim))([value, 0])
    assert isinstance(host, HostTensor)
    return host


def append(sim: Simulation, host: HostTensor, rows: torch.Tensor, first: int = 0) -> HostTensor:
    (longer,) = Append(2, CPU, place(sim))([host.host, rows, first])
    return longer


def fetch(host: HostTensor, rows: torch.Tensor) -> torch.Tensor:
    """The host's rows and new ones on the device, as in decode."""
    (arriving,) = FetchStart(2, CPU)([host.host, rows.shape[2]])
    (buffer,) = FetchWait(2)([arriving, rows])
    return buffer


def a_prompt_leaves_and_steps_bring_it_back(sim: Simulation) -> None:
    expected = values(40) + 1
    host = offload(sim, values(40) + 1)
    for step in range(4):
        new = values(1, step) + 1
        expected = torch.cat([expected, new], 2)
        sim.expect(fetch(host, new), expected)
        host = append(sim, host, new)
    Settle(CPU)()
    sim.expect(host.settled(), expected, by_host=True)


def a_prompt_that_is_stored_by_heads_leaves(sim: Simulation) -> None:
    host = offload(sim, values(40, head_major=True) + 1)
    sim.expect(host.fetch(), values(40, head_major=True) + 1)


def many_layers_leave_and_die_at_once(sim: Simulation) -> None:
    """Only a few layers are on the device at a time."""
    alive: list[weakref.ref[torch.Tensor]] = []
    hosts = []
    for layer in range(8):
        value = values(40, layer) + 1
        alive.append(weakref.ref(value.untyped_storage()))
        hosts.append(offload(sim, value))
        del value
        assert sum(storage() is not None for storage in alive) <= MOST_LEAVING
    Settle(CPU)()
    assert not any(storage() is not None for storage in alive)
    for layer, host in enumerate(hosts):
        sim.expect(host.fetch(), values(40, layer) + 1)


def a_buffer_is_had_where_another_died(sim: Simulation) -> None:
    """A fetch writes to memory that the computation has just freed."""
    hosts = [offload(sim, values(40, layer) + 1) for layer in range(3)]
    for layer, host in enumerate(hosts):
        seen = fetch(host, values(1))
        sim.expect(seen[:, :, :40] * 2, (values(40, layer) + 1) * 2)
        del seen


def rows_arrive_while_others_of_them_leave(sim: Simulation) -> None:
    """Copies in both directions on the same rows: the rows that leave last are fetched next and overwritten last."""
    old, new = values(40) + 1, values(2, 7) + 1
    host = offload(sim, values(40) + 1)
    (arriving,) = FetchStart(2, CPU)([host.host, 0])  # nothing has waited for the copy to the host
    shorter = host[:, :, :38]
    del host
    gc.collect()
    longer = append(sim, shorter, values(2, 7) + 1)  # over rows that are being read
    (buffer,) = FetchWait(2)([arriving, None])
    sim.expect(buffer, old)
    sim.expect(longer.fetch(), torch.cat([old[:, :, :38], new], 2))


def the_host_reads(sim: Simulation) -> None:
    host = offload(sim, values(5) + 1)
    sim.expect(host.settled(), values(5) + 1, by_host=True)
    host = offload(sim, values(5) + 1)
    assert host[:, :, 1].tolist() == (values(5) + 1)[:, :, 1].tolist()
    assert repr(offload(sim, values(5) + 1)).startswith(f"HostTensor({values(5) + 1!r}")
    for read in (lambda h: f"{h[0, 0, 0, 0]:.0f}", lambda h: torch.save(h, "/dev/null")):
        read(offload(sim, values(5) + 1))
    for rearranged in (
        lambda h: h.clone(),
        lambda h: h.index_select(0, torch.tensor([0])),
        lambda h: h[torch.tensor([0])],
    ):
        sim.expect(rearranged(offload(sim, values(5) + 1)).fetch(), values(5) + 1)


def the_host_writes(sim: Simulation) -> None:
    """Writes over rows that arrive and rows that are still being read."""
    host = offload(sim, values(5) + 1)
    host.mul_(2)
    sim.expect(host.fetch(), (values(5) + 1) * 2)
    (arriving,) = FetchStart(2, CPU)([host.host, 0])
    host.zero_()
    (buffer,) = FetchWait(2)([arriving, None])
    sim.expect(buffer, (values(5) + 1) * 2)


def two_continue_one_cache(sim: Simulation) -> None:
    host = offload(sim, values(5) + 1)
    one = append(sim, host, values(1, 3) + 1)
    other = append(sim, host, values(1, 9) + 1)  # the rows after it belong to the first cache: the host moves them
    for longer, seed in ((one, 3), (other, 9)):
        sim.expect(longer.fetch(), torch.cat([values(5) + 1, values(1, seed) + 1], 2))


def rows_of_a_dead_cache_are_the_next_ones(sim: Simulation) -> None:
    """The host reuses pinned memory while a copy to it is still queued."""
    host = offload(sim, values(5) + 1)
    kept = append(sim, host, values(1) + 1)
    dead = offload(sim, values(6, 5) + 1)
    Settle(CPU)()
    del dead
    gc.collect()
    other = append(sim, host, values(1, 9) + 1)  # a fork, in the memory of the deleted cache
    sim.expect(other.fetch(), torch.cat([values(5) + 1, values(1, 9) + 1], 2))
    sim.expect(kept.fetch(), torch.cat([values(5) + 1, values(1) + 1], 2))


def memory_is_unpinned(sim: Simulation) -> None:
    """When the pool is emptied, and at the end of a process without a wait."""
    host = offload(sim, values(5) + 1)
    Settle(CPU)()
    del host
    gc.collect()
    assert sim.runtime.ranges
    empty_host_pool()
    assert not sim.runtime.ranges
    store = store_of(offload(sim, values(5) + 1).host)
    assert store is not None
    store.region.close()
    assert not sim.runtime.ranges


class OfAnotherKind:
    """A copy of an engine without streams: it is done when the host has waited for it."""

    def __init__(self, target: torch.Tensor, source: torch.Tensor) -> None:
        self.copy = (target, source)

    def synchronize(self) -> None:
        target, source = self.copy
        target.copy_(source)


def rows_come_from_another_kind_of_device(sim: Simulation) -> None:
    host = offload(sim, values(5))
    store = store_of(host.host)
    assert store is not None
    store.region.wait()
    store.region.pending = OfAnotherKind(host.host, values(5) + 1)
    sim.expect(host.fetch(), values(5) + 1)


def rows_across_seams(sim: Simulation) -> None:
    """A cache in three ranges, each pinned by a call of its own, copied both ways and read in every way."""
    rows = BLOCK // 512
    host = offload(sim, values(rows - 50) + 1)
    host = append(sim, host, values(rows, 1) + 1)
    host = append(sim, host, values(100, 2) + 1)
    expected = torch.cat([values(rows - 50), values(rows, 1), values(100, 2)], 2) + 1
    assert len(sim.runtime.ranges) > 1
    sim.expect(fetch(host, values(1))[:, :, :-1], expected)
    sim.expect(host.fetch(), expected)
    sim.expect(host + 1, expected + 1)
    sim.expect(host.to(torch.float64), expected.double())
    sim.expect(host.to(CPU, copy=True), expected)
    sim.expect(host[:, 1:].to(torch.float64), expected[:, 1:].double())


def heads_alone_are_brought(sim: Simulation) -> None:
    """The host gathers rows that are not adjacent, after waiting for them."""
    sim.expect(offload(sim, values(5) + 1)[:, 1:].fetch(), values(5)[:, 1:] + 1)


def another_stream_computes(sim: Simulation) -> None:
    """A cache of one stream is continued on another. Memory returns to the first only when both are done with it."""
    host = offload(sim, values(40) + 1)
    (arriving,) = FetchStart(2, CPU)([host.host, 1])
    other = sim.stream()
    with torch.cuda.stream(other):
        other.wait_stream(sim.default)
        (buffer,) = FetchWait(2)([arriving, None])
        sim.expect(buffer[:, :, :40] + 0, values(40) + 1)
        for layer in range(MOST_LEAVING + 1):  # the first layer's tickets are released here
            host = append(sim, host, values(1, layer) + 1)
        Settle(CPU)()
    sim.default.wait_stream(other)
    del buffer, arriving
    sim.expect(host.fetch(), torch.cat([values(40), *(values(1, i) for i in range(MOST_LEAVING + 1))], 2) + 1)


def another_stream_waits_for_what_was_fetched(sim: Simulation) -> None:
    """The other stream has no order with the stream that began the copy."""
    host = offload(sim, values(40) + 1)
    other = sim.stream()
    (arriving,) = FetchStart(2, CPU)([host.host, 0])
    with torch.cuda.stream(other):
        (buffer,) = FetchWait(2)([arriving, None])
        sim.expect(buffer, values(40) + 1)
    sim.default.wait_stream(other)


def two_threads_read(sim: Simulation) -> None:
    """A wait of one thread orders nothing for the other."""
    host = offload(sim, values(5) + 1)
    first = sim.thread(lambda: sim.expect(host.settled(), values(5) + 1, by_host=True))
    second = sim.thread(lambda: sim.expect(host.settled(), values(5) + 1, by_host=True))
    first.join()
    second.join()


def two_threads_have_a_cache_each(sim: Simulation) -> None:
    def decode(seed: int, stream: SimStream) -> None:
        with torch.cuda.stream(stream):
            expected = values(40, seed) + 1
            host = offload(sim, values(40, seed) + 1)
            for step in range(MOST_LEAVING + 1):
                new = values(1, step) + 1
                expected = torch.cat([expected, new], 2)
                sim.expect(fetch(host, new), expected)
                host = append(sim, host, new)
            Settle(CPU)()
            sim.expect(host.fetch(), expected)

    threads = [sim.thread(lambda seed=seed: decode(seed, sim.stream())) for seed in range(2)]
    for thread in threads:
        thread.join()


def a_program_fails(sim: Simulation) -> None:
    """With copies that nothing has waited for: none stays queued, and no memory is reused too early."""

    def fail(arguments: list[object]) -> tuple[object, ...]:
        raise ZeroDivisionError

    host, start, end = offload(sim, values(40) + 1), FetchStart(2, CPU), Settle(CPU)
    steps = (
        Step("start", start, (Slot(0), 0), (1,), ()),
        Step("leave", Offload(2, CPU, place(sim)), (Slot(2), 0), (3,), (2,)),
        Step("fail", fail, (Slot(1),), (4,), ()),
    )
    program, value = Program(steps, 5, (), (Slot(4),), end), values(40, 1) + 1
    alive = weakref.ref(value.untyped_storage())
    inputs = [host.host, None, value, None, None]
    del value
    with contextlib.suppress(ZeroDivisionError):
        program(inputs)
    assert not sim.engine.abandoned
    assert not any(stream.queue for stream in sim.streams)
    assert not any(tasks.queue for tasks in sim.tasks)
    assert alive() is None
    sim.expect(host.fetch(), values(40) + 1)


def with_a_ticket_dropped(sim: Simulation) -> tuple[HostTensor, Callable[[], object]]:
    """A host value, and a reference to its source, which is still alive after its ticket is dropped."""
    host = offload(sim, values(40) + 1)
    (arriving,) = FetchStart(2, CPU)([host.host, 0])
    alive = weakref.ref(arriving.buffer.untyped_storage())
    del arriving
    gc.collect()
    assert alive() is not None
    return host, alive


def a_ticket_is_dropped(sim: Simulation) -> None:
    """The source is kept until the copy is done, and no stream waits for that."""
    host, alive = with_a_ticket_dropped(sim)
    sim.synchronize()
    sim.expect(host.fetch(), values(40) + 1)
    assert alive() is None


ROWS_OF_A_BLOCK = BLOCK // 512
PINNING = "mom-registration"


@contextlib.contextmanager
def small_ranges_ahead() -> Iterator[None]:
    """Treats blocks as slow to pin."""
    with mock.patch.object(region, "AHEAD_FROM", BLOCK), mock.patch.object(store_module, "AHEAD_FROM", BLOCK):
        yield


def nearly_two_blocks(sim: Simulation) -> HostTensor:
    """A cache with room for a few rows in its second block: pinning the third begins."""
    return offload(sim, values(2 * ROWS_OF_A_BLOCK - 4) + 1)


def the_next_rows_memory_is_pinned_meanwhile(sim: Simulation) -> None:
    """On another thread. This one continues meanwhile, as long as there is room."""
    launched = threading.Event()
    with small_ranges_ahead():
        sim.runtime.call = lambda: 0 if threading.current_thread().name != PINNING or launched.wait(5) else 999
        host = nearly_two_blocks(sim)
        expected = values(2 * ROWS_OF_A_BLOCK - 4) + 1
        for step in range(4):
            host = append(sim, host, values(1, step) + 1)
            expected = torch.cat([expected, values(1, step) + 1], 2)
        launched.set()  # else the driver refuses to pin after five seconds
        host = append(sim, host, values(1, 9) + 1)
        sim.expect(host.fetch(), torch.cat([expected, values(1, 9) + 1], 2))
    if sim.runtime.threads[1:] != [PINNING] * (len(sim.runtime.threads) - 1) or len(sim.runtime.threads) < 2:
        sim.problem("memory is pinned by who launches")


def rows_are_written_where_memory_is_being_pinned(sim: Simulation) -> None:
    """A write to rows that are not pinned yet waits for pinning."""
    begun = threading.Event()

    def slow() -> int:
        if threading.current_thread().name == PINNING:
            begun.set()
            time.sleep(0.3)
        return 0

    with small_ranges_ahead():
        sim.runtime.call = slow
        host = nearly_two_blocks(sim)
        assert begun.wait(5)
        host = append(sim, host, values(9, 1) + 1)
        sim.expect(host.fetch(), torch.cat([values(2 * ROWS_OF_A_BLOCK - 4), values(9, 1)], 2) + 1)


def memory_cannot_be_pinned_ahead(sim: Simulation) -> None:
    """The error is raised only when the memory is needed, after another attempt. The cache is unchanged by it."""
    refuse, asked = True, threading.Event()

    def refused() -> int:
        asked.set()
        return 2 if refuse else 0

    with small_ranges_ahead():
        host = nearly_two_blocks(sim)
        REGISTRAR.finish()
        sim.runtime.call, expected = refused, values(2 * ROWS_OF_A_BLOCK - 4) + 1
        host = append(sim, host, values(ROWS_OF_A_BLOCK, 1) + 1)  # nearly fills the third block: a fourth is begun
        expected = torch.cat([expected, values(ROWS_OF_A_BLOCK, 1) + 1], 2)
        assert asked.wait(5)
        with contextlib.suppress(HostMemoryError):
            append(sim, host, values(9, 2) + 1)
            sim.problem("rows went to memory that cannot be pinned")
        sim.expect(host.fetch(), expected)
        refuse = False
        host = append(sim, host, values(9, 2) + 1)
        sim.expect(host.fetch(), torch.cat([expected, values(9, 2) + 1], 2))


def the_next_layers_memory_is_pinned_meanwhile(sim: Simulation) -> None:
    """For keys and values, while this layer's leave, for no more layers than there are."""

    def leave(layer: int, ahead: int) -> HostTensor:
        (host,) = Offload(2, CPU, place(sim), ahead=ahead)([values(3 * ROWS_OF_A_BLOCK, layer) + 1, 0])
        REGISTRAR.finish()
        return host

    with small_ranges_ahead():
        hosts = [leave(layer, min(2, 3 - layer)) for layer in range(4)]
        for layer, host in enumerate(hosts):
            sim.expect(host.fetch(), values(3 * ROWS_OF_A_BLOCK, layer) + 1)
        own = [name for name in sim.runtime.threads if name != PINNING]
        if len(own) != 1 or host_memory().pooled != 0:
            sim.problem(f"{len(own)} layers' memory is pinned by who launches, {host_memory().pooled} bytes in vain")


def in_files(story: Story) -> Story:
    """The same story with the cache in a file, through buffers of 13.5 rows."""

    def told(sim: Simulation) -> None:
        with tempfile.TemporaryDirectory() as folder, mock.patch.object(bounce, "STAGE", 6912):
            sim.placement = Placement("disk", Path(folder))
            story(sim)

    told.__name__ = f"{story.__name__}_in_files"
    return told


def error_of(work: Callable[[], object]) -> str:
    try:
        work()
    except CopyError as error:
        return str(error)
    return "none"


def a_files_ticket_is_dropped(sim: Simulation) -> None:
    """The memory is kept until the thread has read the file and the device has the rows."""
    host, alive = with_a_ticket_dropped(sim)
    Settle(CPU)()
    assert alive() is None
    sim.expect(host.fetch(), values(40) + 1)


def a_disk_is_full(sim: Simulation) -> None:
    """In the middle of a copy: reads of its rows raise, other reads do not, and later copies succeed."""
    kept, value = offload(sim, values(40, 1) + 1), values(40) + 1
    Settle(CPU)()
    alive, calls = weakref.ref(value.untyped_storage()), iter((False, True))
    write = Extent.write

    def full(extent: Extent, view: memoryview) -> None:
        if next(calls, False):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(extent, view)

    with mock.patch.object(Extent, "write", full):
        host = offload(sim, value)
        del value
        Settle(CPU)()
    assert alive() is None
    assert not sim.engine.abandoned
    assert not any(tasks.queue for tasks in sim.tasks)
    longer = append(sim, host, values(1) + 1)
    for read in (host.fetch, longer.fetch, host.settled, longer.settled):
        if "No space left on device" not in error_of(read):
            sim.problem("rows that are not there are read")
    sim.expect(kept.fetch(), values(40, 1) + 1)
    sim.expect(offload(sim, values(40, 2) + 1).fetch(), values(40, 2) + 1)


def a_disk_cannot_be_read(sim: Simulation) -> None:
    """After a part was sent to the device: its buffer is not reused before that part has arrived."""
    host = offload(sim, values(40) + 1)
    calls, read = iter((False, True)), Extent.read

    def broken(extent: Extent, view: memoryview) -> None:
        if next(calls, False):
            raise OSError(errno.EIO, "Input/output error")
        read(extent, view)

    with mock.patch.object(Extent, "read", broken):
        (arriving,) = FetchStart(2, CPU)([host.host, 0])
        given = [arriving, None]
        del arriving
        if "Input/output error" not in error_of(lambda: FetchWait(2)(given)):
            sim.problem("rows that are not there are read")
    gc.collect()
    sim.expect(offload(sim, values(40, 2) + 1).fetch(), values(40, 2) + 1)


IN_FILES: tuple[Story, ...] = (
    a_prompt_leaves_and_steps_bring_it_back,
    a_prompt_that_is_stored_by_heads_leaves,
    many_layers_leave_and_die_at_once,
    a_buffer_is_had_where_another_died,
    rows_arrive_while_others_of_them_leave,
    the_host_reads,
    the_host_writes,
    two_continue_one_cache,
    rows_come_from_another_kind_of_device,
    heads_alone_are_brought,
    another_stream_computes,
    another_stream_waits_for_what_was_fetched,
    two_threads_read,
    two_threads_have_a_cache_each,
    a_program_fails,
    a_files_ticket_is_dropped,
    a_disk_is_full,
    a_disk_cannot_be_read,
)


STORIES: tuple[Story, ...] = (
    a_prompt_leaves_and_steps_bring_it_back,
    a_prompt_that_is_stored_by_heads_leaves,
    many_layers_leave_and_die_at_once,
    a_buffer_is_had_where_another_died,
    rows_arrive_while_others_of_them_leave,
    the_host_reads,
    the_host_writes,
    two_continue_one_cache,
    rows_of_a_dead_cache_are_the_next_ones,
    memory_is_unpinned,
    rows_come_from_another_kind_of_device,
    rows_across_seams,
    heads_alone_are_brought,
    another_stream_computes,
    another_stream_waits_for_what_was_fetched,
    two_threads_read,
    two_threads_have_a_cache_each,
    a_program_fails,
    a_ticket_is_dropped,
    *map(in_files, IN_FILES),
    the_next_rows_memory_is_pinned_meanwhile,
    memory_cannot_be_pinned_ahead,
    the_next_layers_memory_is_pinned_meanwhile,
    rows_are_written_where_memory_is_being_pinned,
)


def tell(story: Story, sim: Simulation) -> None:
    """Run a story from its beginning, without state of earlier ones."""
    gc.collect()
    empty_host_pool()
    with sim:
        try:
            story(sim)
        finally:
            REGISTRAR.finish()
            gc.collect()
            empty_host_pool()
