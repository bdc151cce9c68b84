"""The threaded engine copies asynchronously and in order, and keeps tensors alive while it copies them."""

from __future__ import annotations

import contextlib
import gc
import subprocess
import sys
import threading
import weakref

import pytest
import torch

from mom_compile.runtime.host.backings.anonymous import Anonymous
from mom_compile.runtime.host.backings.base import BLOCK
from mom_compile.runtime.host.engine import MOST_LEAVING, CopyError, ThreadedEngine
from mom_compile.runtime.host.engines import engine_for
from mom_compile.runtime.host.placement import Placement
from mom_compile.runtime.host.region import HostRegion
from mom_compile.runtime.host.store import HostStore
from mom_compile.runtime.host.task_queue import TaskQueue
from mom_compile.runtime.host.weight_bytes import bytes_under
from tests.forks import in_a_fork


@pytest.fixture
def held():
    """An engine whose copies start only on request."""
    engine, go = ThreadedEngine(), threading.Event()
    engine.delay = lambda: float(not go.wait(10))
    yield engine, go
    go.set()


def test_a_copy_does_not_block_its_caller(held):
    engine, go = held
    target = torch.zeros(4)
    ticket = engine.to_device(target, torch.ones(4), None)
    assert target.sum() == 0
    go.set()
    ticket.wait()
    assert target.sum() == 4


def test_copies_run_in_order(held):
    engine, go = held
    target = torch.zeros(3)
    tickets = [engine.to_device(target, torch.full((3,), float(i)), None) for i in range(20)]
    go.set()
    tickets[-1].wait()
    assert target.tolist() == [19.0] * 3


@pytest.fixture
def slow_departures():
    """An engine whose copies to the host start only on request."""
    engine, go = ThreadedEngine(), threading.Event()
    engine.delay = lambda: float("to-host" in threading.current_thread().name and not go.wait(10))
    yield engine, go
    go.set()


def test_copies_to_the_device_do_not_wait_for_copies_to_the_host(slow_departures):
    engine, go = slow_departures
    left, arrived = torch.zeros(4), torch.zeros(4)
    leaving = engine.to_host(left, torch.ones(4), None)
    engine.to_device(arrived, torch.ones(4), None).wait()
    assert (arrived.sum(), left.sum()) == (4, 0)
    go.set()
    leaving.wait()
    assert left.sum() == 4


def test_copies_of_the_same_rows_are_ordered_across_queues(slow_departures):
    engine, go = slow_departures
    rows, seen = torch.zeros(4), torch.zeros(4)
    leaving = engine.to_host(rows, torch.ones(4), None)
    arriving = engine.to_device(seen, rows, leaving.done)
    again = engine.to_host(rows, torch.full((4,), 2.0), arriving.done)
    assert not arriving.done.finished()
    go.set()
    again.wait()
    assert (seen.tolist(), rows.tolist()) == ([1.0] * 4, [2.0] * 4)


def test_chains_across_both_queues_and_threads_do_not_deadlock(slow_departures):
    """Each copy waits for one in the other queue, also of another thread, without a deadlock."""
    engine, go = slow_departures
    region, counts = HostRegion(BLOCK, Anonymous()), []
    region.commit(4)

    def ask():
        for i in range(200):
            rows, other = region.bytes[:4], torch.full((4,), i % 100, dtype=torch.uint8)
            leaves = i % 2 == 0
            begin = engine.to_host if leaves else engine.to_device
            region.copied(lambda after: begin(*((rows, other) if leaves else (other, rows)), after))  # noqa: B023
        counts.append(i)

    go.set()
    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert counts == [199] * 4
    region.wait()
    assert len(set(region.bytes[:4].tolist())) == 1  # copies did not interleave


def test_the_host_waits_for_copies_of_all_threads(held):
    engine, go = held
    region = HostRegion(BLOCK, Anonymous())
    region.commit(4)
    targets = [torch.zeros(4, dtype=torch.uint8) for _ in range(8)]

    def ask(target):
        region.copied(lambda after: engine.to_device(target, region.bytes[:4].fill_(7), after))

    threads = [threading.Thread(target=ask, args=(target,)) for target in targets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert not any(target.any() for target in targets)
    go.set()
    region.wait()
    assert all(target.eq(7).all() for target in targets)


def test_a_source_lives_until_its_copy_is_done(held):
    engine, go = held
    source, target = torch.ones(4), torch.zeros(4)
    alive = weakref.ref(source)
    ticket = engine.to_host(target, source, None)
    del source
    gc.collect()
    assert alive() is not None
    go.set()
    ticket.wait()
    gc.collect()
    assert alive() is None
    assert target.sum() == 4


def test_the_number_of_copies_to_the_host_is_limited(held):
    engine, go = held
    for _ in range(MOST_LEAVING):
        engine.to_host(torch.zeros(4), torch.ones(4), None)
    asked = threading.Thread(target=lambda: engine.to_host(torch.zeros(4), torch.ones(4), None))
    asked.start()
    asked.join(0.2)
    assert asked.is_alive()  # it waits until the first copy is done
    go.set()
    asked.join(10)
    assert not asked.is_alive()


def test_copies_to_the_host_are_done_when_a_program_ends(held):
    engine, go = held
    source = torch.ones(4)
    alive = weakref.ref(source)
    engine.to_host(torch.zeros(4), source, None)
    del source
    go.set()
    engine.settle()
    gc.collect()
    assert alive() is None


def test_bytes_are_counted_by_direction():
    engine = ThreadedEngine()
    engine.to_host(torch.zeros(4), torch.ones(4), None)
    engine.to_device(torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64), None).wait()
    assert (engine.traffic.to_host, engine.traffic.to_device) == (16, 24)


def test_copy_failure_raises_in_the_waiting_thread():
    engine = ThreadedEngine()
    bad = engine.to_host(torch.zeros(3), torch.ones(4), None)
    with pytest.raises(CopyError, match="size of tensor"):
        bad.wait()
    target = torch.zeros(4)
    engine.to_host(target, torch.ones(4), None).wait()
    assert target.sum() == 4


def test_a_copy_after_a_failed_one_of_the_same_rows_fails():
    engine = ThreadedEngine()
    bad = engine.to_host(torch.zeros(3), torch.ones(4), None)
    then = engine.to_device(torch.zeros(3), torch.ones(3), bad)
    with pytest.raises(CopyError, match="size of tensor"):
        then.wait()


def test_a_failed_copy_does_not_stop_copies_of_other_rows():
    engine = ThreadedEngine()
    engine.to_host(torch.zeros(3), torch.ones(4), None)
    tickets = [engine.to_host(torch.zeros(4), torch.ones(4), None) for _ in range(2 * MOST_LEAVING)]
    tickets[-1].wait()


def test_inference_tensors_can_be_copied_to():
    engine = ThreadedEngine()
    with torch.inference_mode():
        target = torch.zeros(4)
    engine.to_device(target, torch.ones(4), None).wait()
    assert target.sum() == 4


def test_a_forked_process_copies_with_its_own_thread():
    engine = ThreadedEngine()
    engine.to_device(torch.zeros(4), torch.ones(4), None).wait()

    def child():
        target = torch.zeros(4)
        engine.to_device(target, torch.ones(4), None).wait()
        return target.tolist() == [1.0] * 4

    assert in_a_fork(child)


def fails_as_lost(work):
    try:
        work()
    except CopyError as error:
        return "pending when this process was forked" in str(error)
    return False


def test_copies_pending_at_a_fork_fail_in_the_fork_only(held):
    """The fork must not wait for its parent's thread, neither for rows nor before the next copy."""
    engine, go = held
    target, rows = torch.zeros(4), torch.zeros(4)
    arriving = engine.to_device(target, torch.ones(4), None)
    leaving = [engine.to_host(rows, torch.ones(4), None) for _ in range(MOST_LEAVING)]

    def child():
        go.set()
        lost = fails_as_lost(arriving.wait) and fails_as_lost(leaving[0].done.synchronize)
        behind = engine.to_device(torch.zeros(4), rows, leaving[0].done)  # the rows do not exist
        own = torch.zeros(4)
        engine.to_host(own, torch.ones(4), None).wait()
        engine.settle()
        return lost and fails_as_lost(behind.wait) and own.sum() == 4 and target.sum() == 0

    assert in_a_fork(child)
    go.set()
    arriving.wait()
    leaving[-1].wait()
    assert (target.sum(), rows.sum()) == (4, 4)


def test_a_copy_done_before_a_fork_is_done_in_the_fork():
    engine, target = ThreadedEngine(), torch.zeros(4)
    ticket = engine.to_device(target, torch.ones(4), None)
    ticket.wait()
    assert in_a_fork(lambda: ticket.wait() is None and ticket.done.finished() and target.sum() == 4)


@contextlib.contextmanager
def asking_all_the_time(ask):
    """A thread starts copies continuously meanwhile."""
    stop = threading.Event()

    def again():
        while not stop.is_set():
            ask()

    thread = threading.Thread(target=again)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def test_a_fork_during_puts_has_its_own_thread():
    """Whatever that thread holds at that moment. Without PyTorch, which does not support a fork while it computes."""
    tasks = TaskQueue("asked")

    def child():
        task = tasks.put(lambda: None)
        task.wait()
        return task.ran and task.error is None

    with asking_all_the_time(lambda: tasks.put(lambda: None)):
        assert all(in_a_fork(child) for _ in range(10))


@pytest.mark.slow
def test_a_fork_during_copies_has_a_working_engine():
    engine = ThreadedEngine()

    def child():
        target = torch.zeros(4)
        engine.to_device(target, torch.ones(4), None).wait()
        return target.sum() == 4

    with asking_all_the_time(lambda: engine.to_device(torch.zeros(4), torch.ones(4), None)):
        assert all(in_a_fork(child) for _ in range(100))


ENDS_WITH_COPIES_UNDER_WAY = """
import torch
from mom_compile.runtime.host.engine import ThreadedEngine

engine, rows = ThreadedEngine(), torch.zeros(1 << 16)
last = [engine.to_device(rows, torch.ones(1 << 16), None) for _ in range(2000)][-1]
assert not last.finished()
"""


def test_a_process_with_running_copies_exits_normally():
    """Its threads are not stopped inside PyTorch, which would abort the process."""
    command = [sys.executable, "-c", ENDS_WITH_COPIES_UNDER_WAY]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def test_tasks_not_started_at_exit_fail_without_a_wait(held):
    engine, go = held
    begun = threading.Event()
    engine.delay = lambda: float(begun.set() is not None or not go.wait(10))
    first, second = (engine.to_device(torch.zeros(4), torch.ones(4), None) for _ in range(2))
    begun.wait(10)
    ending = engine._to_device.lose()
    with pytest.raises(CopyError, match="had not begun when the process ended"):
        second.wait()
    go.set()
    first.wait()
    ending.join(10)
    assert not ending.is_alive()


def test_an_error_keeps_no_tensor_alive():
    engine, source = ThreadedEngine(), torch.ones(4)
    alive = weakref.ref(source)
    bad = engine.to_host(torch.zeros(3), source, None)
    del source
    with pytest.raises(CopyError, match="size of tensor"):
        bad.wait()
    gc.collect()
    assert alive() is None


def test_errors_name_the_copied_data():
    engine = ThreadedEngine()
    table = torch.ones(4)
    holder = bytes_under(table)
    with pytest.raises(CopyError, match=r"^weights could not be copied: The size of tensor"):
        engine.to_device(torch.zeros(3), table, None).wait()
    store = HostStore((4,), torch.float32, 2, Placement())
    with pytest.raises(CopyError, match=r"^keys or values could not be copied: The size of tensor"):
        engine.to_device(torch.zeros(3), store.rows(0, 1), None).wait()
    with pytest.raises(CopyError, match=r"^rows could not be copied between device and host: The size of tensor"):
        engine.to_device(torch.zeros(3), torch.ones(4), None).wait()
    del holder


def test_each_device_has_one_engine_and_unknown_types_raise():
    assert engine_for(torch.device("cpu")) is engine_for(torch.device("cpu"))
    with pytest.raises(NotImplementedError, match="'meta'"):
        engine_for(torch.device("meta"))
