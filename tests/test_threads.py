"""Several threads run compiled code, and compile: each is given its own sizes' code, finished, and nobody waits in a
circle. What compilers do is a stand-in here that takes its time; `test_threads_compiled.py` has the real ones."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import sympy
import torch
from torch import fx
from torch._dynamo import convert_frame

from mom_compile.lowering.pieces import Conditions, Piece, SizeTemplate, SymbolFacts, Variant
from mom_compile.notices import MomWarning, forget, warn_once
from mom_compile.runtime.host.placement import Placement
from mom_compile.runtime.host.store import HostStore, Lease
from mom_compile.runtime.observers import Observers
from tests.threads import together

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
