"""Pages are registered in a background thread: `complete` finishes a range, and `drop` waits for no one."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable

import pytest

from mom_compile.runtime.host.backings import registration
from mom_compile.runtime.host.backings.registration import Registrar, Registration
from mom_compile.runtime.host.limits import HostMemoryError
from tests.forks import in_a_fork

LIMIT = 10.0


class Driver:
    """Registers pieces of a hundred bytes. `gate` blocks calls of threads other than its creator."""

    def __init__(self, refuse: tuple[int, ...] = ()) -> None:
        self.refuse = refuse
        self.calls: list[tuple[int, str]] = []
        self.ranges: set[int] = set()
        self.begun, self.gate = threading.Event(), threading.Event()
        self.here = threading.current_thread()
        self.within: Callable[[], None] = lambda: None

    def __call__(self, address: int, size: int) -> Callable[[], None]:
        self.calls.append((address, threading.current_thread().name))
        if threading.current_thread() is not self.here:
            self.begun.set()
            assert self.gate.wait(LIMIT)
        self.within()
        if address in self.refuse:
            raise HostMemoryError(f"{size} bytes at {address} are refused")
        self.ranges.add(address)
        return lambda: self.ranges.remove(address)


@pytest.fixture(autouse=True)
def _pieces_of_a_hundred(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registration, "PIECE", 100)


def test_background_registration_does_not_block() -> None:
    driver, registrar = Driver(), Registrar()
    registrar.put(Registration(driver, 0, 300, None))
    assert driver.begun.wait(LIMIT)
    assert not driver.ranges  # and this thread was not blocked
    driver.gate.set()
    registrar.finish()
    assert driver.ranges == {0, 100, 200}
    assert {thread for _, thread in driver.calls} == {"mom-registration"}


def test_complete_waits_for_one_piece_and_registers_the_rest() -> None:
    driver, registrar = Driver(), Registrar()
    one = Registration(driver, 0, 450, None)
    registrar.put(one)
    assert driver.begun.wait(LIMIT)
    threading.Timer(0.05, driver.gate.set).start()
    one.complete()
    assert driver.ranges == {0, 100, 200, 300, 400}
    assert [thread for _, thread in driver.calls][-1] == driver.here.name
    registrar.finish()
    assert len(driver.calls) == 5


def test_complete_does_not_wait_for_ranges_queued_earlier() -> None:
    driver, registrar = Driver(), Registrar()
    before, one = Registration(driver, 0, 100, None), Registration(driver, 1000, 100, None)
    registrar.put(before)
    registrar.put(one)
    assert driver.begun.wait(LIMIT)
    one.complete()
    assert driver.ranges == {1000}
    driver.gate.set()
    registrar.finish()


def test_pieces_are_followed_by_pauses_of_equal_length() -> None:
    driver, registrar = Driver(), Registrar()
    driver.gate.set()
    driver.within = lambda: time.sleep(0.02)
    began = time.monotonic()
    registrar.put(Registration(driver, 0, 500, None))
    registrar.finish()
    assert time.monotonic() - began >= 9 * 0.02


def test_a_refusal_raises_in_complete_and_fails_queued_ranges() -> None:
    driver, registrar = Driver(refuse=(100,)), Registrar()
    one, other = Registration(driver, 0, 300, None), Registration(driver, 1000, 100, None)
    registrar.put(one)
    registrar.put(other)
    driver.gate.set()
    registrar.finish()
    assert [address for address, _ in driver.calls] == [0, 100]
    assert registrar.left == 0
    for refused in (one, one, other):
        with pytest.raises(HostMemoryError, match="100 bytes at 100 are refused"):
            refused.complete()
    one.drop()
    assert not driver.ranges
    registrar.put(Registration(driver, 2000, 100, None))  # later ranges are tried again
    registrar.finish()
    assert driver.ranges == {2000}


def test_other_errors_raise_in_complete_and_keep_the_thread() -> None:
    def broken(address: int, size: int) -> Callable[[], None]:
        raise ZeroDivisionError("broken")

    registrar, one = Registrar(), Registration(broken, 0, 300, None)
    registrar.put(one)
    registrar.finish()
    with pytest.raises(HostMemoryError, match="broken") as found:
        one.complete()
    assert isinstance(found.value.__cause__, ZeroDivisionError)
    with pytest.raises(ZeroDivisionError):
        Registration(broken, 0, 300, None).complete()


def test_a_range_dropped_during_registration_is_undone() -> None:
    driver, registrar = Driver(), Registrar()
    one = Registration(driver, 0, 300, None)
    registrar.put(one)
    assert driver.begun.wait(LIMIT)
    one.drop()  # does not wait
    driver.gate.set()
    registrar.finish()
    assert len(driver.calls) == 1
    assert not driver.ranges


def test_a_finalizer_may_drop_a_range_on_the_registering_thread() -> None:
    driver, registrar = Driver(), Registrar()
    one = Registration(driver, 0, 300, None)
    driver.within = one.drop
    driver.gate.set()
    registrar.put(one)
    registrar.finish()
    assert len(driver.calls) == 1
    assert not driver.ranges


def test_addresses_stay_mapped_until_registration_ends() -> None:
    class Memory:
        pass

    driver, registrar, memory = Driver(), Registrar(), Memory()
    alive = weakref.ref(memory)
    one = Registration(driver, 0, 300, memory)
    registrar.put(one)
    assert driver.begun.wait(LIMIT)
    one.drop()
    del one, memory
    assert alive() is not None
    driver.gate.set()
    registrar.finish()
    assert alive() is None


def test_the_thread_ends_when_the_queue_is_empty() -> None:
    driver, registrar = Driver(), Registrar()
    driver.gate.set()
    for address in (0, 1000):
        one = Registration(driver, address, 100, None)
        registrar.put(one)
        registrar.finish()
        assert "mom-registration" not in [thread.name for thread in threading.enumerate()]
    assert driver.ranges == {0, 1000}


def test_queued_bytes_are_counted() -> None:
    driver, registrar = Driver(), Registrar()
    one, other = Registration(driver, 0, 300, None), Registration(driver, 1000, 150, None)
    registrar.put(one)
    registrar.put(other)
    assert driver.begun.wait(LIMIT)
    assert registrar.left == 200 + 150  # a piece is being registered
    one.drop()
    assert registrar.left == 150
    driver.gate.set()
    registrar.finish()
    assert registrar.left == 0


AT_THE_END = """
import time, threading
from mom_compile.runtime.host.backings import registration
registration.PIECE = 100
begun = threading.Event()
def pin(address, size):
    begun.set()
    time.sleep(0.2)
    print("pinned", address, flush=True)
    return lambda: print("undone", address, flush=True)
registration.REGISTRAR.put(registration.Registration(pin, 0, 10**6, None))
registration.REGISTRAR.put(registration.Registration(pin, 10**7, 10**6, None))
assert begun.wait(10)
"""


def test_at_exit_only_the_current_piece_is_finished() -> None:
    found = subprocess.run([sys.executable, "-c", AT_THE_END], capture_output=True, text=True, timeout=60)
    assert (found.returncode, found.stderr) == (0, "")
    assert found.stdout.splitlines() == ["pinned 0", "undone 0"]


def test_a_fork_registers_in_its_own_thread() -> None:
    driver = Driver()
    registration.REGISTRAR.put(Registration(driver, 0, 100, None))
    assert driver.begun.wait(LIMIT)

    def child() -> bool:
        own = Driver()
        own.gate.set()
        registration.REGISTRAR.put(Registration(own, 0, 200, None))
        registration.REGISTRAR.finish()
        return own.ranges == {0, 100} and not driver.ranges

    assert in_a_fork(child)
    driver.gate.set()
    registration.REGISTRAR.finish()
    assert driver.ranges == {0}
