"""The threaded engine copies beside the computation, in order, and keeps what it copies alive."""

from __future__ import annotations

import gc
import os
import threading
import weakref

import pytest
import torch

from mom_compile.runtime.host.engine import MOST_LEAVING, CopyError, ThreadedEngine
from mom_compile.runtime.host.engines import engine_for


@pytest.fixture
def held():
    """An engine whose copies start only when told to."""
    engine, go = ThreadedEngine(), threading.Event()
    engine.delay = lambda: float(not go.wait(10))
    yield engine, go
    go.set()


def test_a_copy_runs_beside_the_one_who_asked_for_it(held):
    engine, go = held
    target = torch.zeros(4)
    ticket = engine.to_device(target, torch.ones(4), None)
    assert target.sum() == 0
    go.set()
    ticket.wait()
    assert target.sum() == 4


def test_copies_are_done_in_the_order_they_were_asked_for(held):
    engine, go = held
    target = torch.zeros(3)
    tickets = [engine.to_device(target, torch.full((3,), float(i)), None) for i in range(20)]
    go.set()
    tickets[-1].wait()
    assert target.tolist() == [19.0] * 3


def test_a_source_may_be_dropped_at_once_and_dies_with_its_copy(held):
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


def test_no_more_than_a_few_values_are_leaving_at_a_time(held):
    engine, go = held
    for _ in range(MOST_LEAVING):
        engine.to_host(torch.zeros(4), torch.ones(4), None)
    asked = threading.Thread(target=lambda: engine.to_host(torch.zeros(4), torch.ones(4), None))
    asked.start()
    asked.join(0.2)
    assert asked.is_alive()  # it waits for the first to have left
    go.set()
    asked.join(10)
    assert not asked.is_alive()


def test_when_a_program_ends_nothing_is_leaving_any_more(held):
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


def test_a_copy_that_fails_tells_whoever_waits_for_it_and_the_engine_goes_on():
    engine = ThreadedEngine()
    bad = engine.to_host(torch.zeros(3), torch.ones(4), None)
    with pytest.raises(CopyError, match="size of tensor"):
        bad.wait()
    target = torch.zeros(4)
    engine.to_host(target, torch.ones(4), None).wait()
    assert target.sum() == 4


def test_a_copy_after_one_that_failed_on_the_same_rows_fails_too():
    engine = ThreadedEngine()
    bad = engine.to_host(torch.zeros(3), torch.ones(4), None)
    then = engine.to_device(torch.zeros(3), torch.ones(3), bad)
    with pytest.raises(CopyError, match="size of tensor"):
        then.wait()


def test_somebody_elses_failure_does_not_stop_a_value_from_leaving():
    engine = ThreadedEngine()
    engine.to_host(torch.zeros(3), torch.ones(4), None)
    tickets = [engine.to_host(torch.zeros(4), torch.ones(4), None) for _ in range(2 * MOST_LEAVING)]
    tickets[-1].wait()


def test_a_copy_into_an_inference_tensor_is_a_copy_like_others():
    engine = ThreadedEngine()
    with torch.inference_mode():
        target = torch.zeros(4)
    engine.to_device(target, torch.ones(4), None).wait()
    assert target.sum() == 4


def test_a_forked_process_copies_with_a_thread_of_its_own():
    engine = ThreadedEngine()
    engine.to_device(torch.zeros(4), torch.ones(4), None).wait()
    child = os.fork()
    if child == 0:
        target = torch.zeros(4)
        engine.to_device(target, torch.ones(4), None).wait()
        os._exit(0 if target.tolist() == [1.0] * 4 else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


def test_a_device_has_one_engine_and_an_unknown_kind_none():
    assert engine_for(torch.device("cpu")) is engine_for(torch.device("cpu"))
    with pytest.raises(NotImplementedError, match="'meta'"):
        engine_for(torch.device("meta"))
