"""Several threads run compiled code, and compile: each is given its own sizes' code, finished, and no two wait for each
other. What compilers do is a stand-in that takes its time; the slow tests have the real ones (`threads_child.py`)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import sympy
import torch
from torch import fx
from torch._dynamo import convert_frame

from mom_compile import reports
from mom_compile.lowering.pieces import Conditions, Piece, Variant
from mom_compile.lowering.templates import SizeTemplate, SymbolFacts
from mom_compile.notices import MomWarning, forget, warn_once
from mom_compile.runtime.host import store as store_module
from mom_compile.runtime.host.placement import Placement
from mom_compile.runtime.host.store import HostStore, Lease
from mom_compile.runtime.observers import Observers
from tests.models import tiny
from tests.threads import together
from tests.threads_child import difference, told
from tests.weights import offloaded

N = sympy.Symbol("n0", integer=True, nonnegative=True)
SECONDS = 0.01


def _piece() -> Piece:
    graph = fx.Graph()
    graph.output((graph.placeholder("n"),))
    return Piece(fx.GraphModule(torch.nn.Module(), graph), (SizeTemplate(N),), {N: SymbolFacts(8, 2)}, {})


def _compiles_slowly(conditions: Callable[[int], Conditions | None]) -> Callable[..., None]:
    """A compiler that gives code for one size: the code returns that size, or None before its kernels are there."""

    def compile_slowly(piece: Piece, hints: Any = None) -> None:
        size = hints[N] if hints else 8
        there = threading.Event()
        time.sleep(SECONDS)  # AOTAutograd and Inductor
        piece.variants.append(Variant(lambda inputs: size if there.is_set() else None, conditions(size)))
        piece.unfinished = [lambda: time.sleep(SECONDS), there.set]  # the C++ compiler

    return compile_slowly


def test_a_thread_is_never_given_another_sizes_code(monkeypatch: pytest.MonkeyPatch) -> None:
    for_one = _compiles_slowly(lambda size: Conditions.of([sympy.Eq(N, size)], [N]))
    monkeypatch.setattr(Piece, "compile", for_one)
    piece = _piece()

    def work(number: int) -> list[tuple[int, Any]]:
        return [(size, piece([size])) for size in (*range(10 + number, 20, 4), 20, 21)]

    found = [pair for pairs in together(4, work) for pair in pairs]
    assert all(size == got for size, got in found)
    assert len(piece.variants) == 12, "each size is compiled once"
    assert all(piece([size]) == size for size in range(10, 22))


def test_code_is_run_once_its_compilers_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Piece, "compile", _compiles_slowly(lambda size: None))
    piece = _piece()
    piece.compile()
    assert together(4, lambda number: piece([10 + number])) == [8] * 4


def test_a_wait_that_is_interrupted_is_made_up_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Piece, "compile", _compiles_slowly(lambda size: None))
    piece = _piece()
    piece.compile()
    first, interrupted = piece.unfinished[0], []

    def interrupt() -> None:
        if not interrupted:
            interrupted.append(True)
            raise KeyboardInterrupt
        first()

    piece.unfinished[0] = interrupt
    with pytest.raises(KeyboardInterrupt):
        piece([10])
    assert piece([10]) == 8 and piece.eager_reason is None


def test_sizes_that_a_piece_has_seen_take_no_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Piece, "compile", _compiles_slowly(lambda size: None))
    piece = _piece()
    piece([10])
    with convert_frame.compile_lock:
        assert together(1, lambda _: piece([10])) == [10]


def test_what_compiles_at_run_time_waits_for_dynamo_and_never_in_a_circle(monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread compiles under Dynamo, and meets a new size there; another meets one while a program runs."""
    monkeypatch.setattr(Piece, "compile", _compiles_slowly(lambda size: Conditions.of([sympy.Eq(N, size)], [N])))
    first, second = _piece(), _piece()
    compiling = 0

    def work(number: int) -> list[Any]:
        nonlocal compiling
        pieces = (first, second) if number % 2 else (second, first)
        if number < 2:
            return [piece([10 + number]) for piece in pieces]
        with convert_frame.compile_lock:
            compiling += 1
            got = [piece([10 + number]) for piece in pieces]
            assert compiling == 1, "another thread compiles"
            compiling -= 1
        return got

    assert together(4, work) == [[10 + number] * 2 for number in range(4)]


def test_two_threads_that_continue_one_cache_write_different_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    may_append = HostStore.may_append

    def slowly(store: HostStore, lease: Lease, rows: int) -> bool:
        found = may_append(store, lease, rows)
        time.sleep(SECONDS)
        return found

    monkeypatch.setattr(HostStore, "may_append", slowly)
    store = HostStore((2, 3), torch.float32, 4, Placement())
    prompt = Lease(store, 0, 4)
    store.rows(0, 4)
    made = together(4, lambda _: store.append(prompt, 0, 1))
    assert [lease is not None for lease in made].count(True) == 1


def test_two_threads_are_not_given_one_pooled_region(monkeypatch: pytest.MonkeyPatch) -> None:
    class Region:
        @property
        def capacity(self) -> int:
            time.sleep(SECONDS)
            return 8

    regions = [Region(), Region()]
    monkeypatch.setattr(store_module, "_POOL", [(Placement(), region) for region in regions])
    found = together(4, lambda _: store_module._pooled(8, Placement()))
    assert {id(region) for region in found if region is not None} == set(map(id, regions))
    assert found.count(None) == 2


def test_a_warning_is_given_once_whichever_thread_has_reason_for_it(recwarn: pytest.WarningsRecorder) -> None:
    forget()
    together(4, lambda _: warn_once("threads", "once"))
    forget()
    assert len([w for w in recwarn if w.category is MomWarning]) == 1


def test_observers_may_come_and_go_while_programs_run() -> None:
    events: Observers[[int]] = Observers()
    seen: list[int] = []
    with events.joined_by(seen.append):
        running: Iterable[Callable[[int], None]] = iter(events.now)
        with events.joined_by(lambda number: None):
            assert len(events.now) == 2
        for observe in running:
            observe(1)
    assert seen == [1] and not events.now


@pytest.mark.usefixtures("eager_pieces", "stock_is_eager")
def test_threads_keep_caches_and_read_weights_on_the_host() -> None:
    """Stores, copy engines and the pool of regions are one for all threads."""
    plain, model = tiny("Llama"), offloaded(tiny("Llama"))
    options = {"mini_seq_len": 8, "kv_offload": True, "strict": True}
    model.compile(backend="mom", dynamic=True, options=options)
    exact = {length: told(plain, length) for length in range(9, 41, 2)}
    told(model, 20)

    def work(number: int) -> float:
        return max(difference(told(model, length), exact[length]) for length in range(9 + 2 * number, 41, 8))

    assert max(together(4, work)) < 1e-5
    assert sum(bool(report.on_host) for report in reports()) >= 2, "a prompt and a token behind it"
    assert any(report.weights for report in reports())


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize(("where", "weights"), [("device", "none"), ("host", "none"), ("host", "weights")])
def test_many_threads_compile_with_two_workers_ten_times_in_a_row(where: str, weights: str) -> None:
    environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "2", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.threads_child", where, weights, "10"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=2900)
    found = json.loads(done.stdout)
    assert len(found["differences"]) == 10 and max(found["differences"]) < 1e-4, found
    assert not found["eager"] and found["graphs"] >= 2
