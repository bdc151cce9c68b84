"""Progress of slow compilations on standard error, and silence otherwise."""

from __future__ import annotations

import io
import re
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch

import mom_compile.backend as backend_module
from mom_compile import progress
from mom_compile.lowering.pieces import Piece
from tests.programs import HIDDEN, ROWWISE, weights_of
from tests.threads import together

pytestmark = pytest.mark.usefixtures("eager_pieces", "stock_is_eager")
W = weights_of(torch.float64)
#: Longer than the patience set here.
LONG = 0.15


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(progress.VARIABLE, "1")
    monkeypatch.setattr(progress, "PATIENCE", LONG / 3)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    capture = backend_module.capture

    def slowly(*args: Any, **kwargs: Any) -> Any:
        time.sleep(LONG)
        return capture(*args, **kwargs)

    monkeypatch.setattr(backend_module, "capture", slowly)


def lines(capfd: pytest.CaptureFixture[str]) -> list[str]:
    """Our lines on standard error since the last call; standard output must be empty."""
    out, err = capfd.readouterr()
    assert "mom_compile" not in out
    return [line for line in err.splitlines() if "mom_compile" in line]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def mlp(x: torch.Tensor) -> torch.Tensor:
    return ROWWISE["mlp"](x, W)


def call(function: Callable[..., Any], tokens: int = 40, **options: Any) -> None:
    compiled = torch.compile(function, backend="mom", options={"mini_seq_len": 8, **options})
    with torch.no_grad():
        compiled(torch.ones(2, tokens, HIDDEN, dtype=torch.float64))


@pytest.mark.usefixtures("slow")
def test_a_compilation_writes_a_first_and_a_last_line(capfd: pytest.CaptureFixture[str]) -> None:
    call(lambda x: mlp(x))
    first, last = lines(capfd)
    assert re.fullmatch(r"mom_compile: compiling a graph of \d+ operators, once for each kind of call", first)
    assert re.fullmatch(r"mom_compile: compiled in \d+ s: graph, 1 loops, expected peak .*", last)


def test_fast_compilations_write_nothing(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PATIENCE", 100.0)
    call(lambda x: mlp(x))
    assert lines(capfd) == []


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("by", ["option", "environment"])
def test_progress_can_be_off(by: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if by == "environment":
        monkeypatch.setenv(progress.VARIABLE, "0")
    call(lambda x: mlp(x), progress=by != "option")
    assert lines(capfd) == []


@pytest.mark.usefixtures("slow")
def test_a_terminal_shows_a_transient_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    call(lambda x: mlp(x))
    text = terminal.getvalue()
    assert "━" in text and "0:00:00" in text
    assert text.splitlines()[0].startswith("mom_compile: compiling a graph")
    assert text.splitlines()[-1].endswith("B") and "compiled in 0 s" in text


def test_a_failure_has_no_last_line(capfd: pytest.CaptureFixture[str]) -> None:
    def compile_in_vain() -> None:
        with progress.compiling("a graph", wanted=True):
            time.sleep(LONG)
            raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        compile_in_vain()
    assert lines(capfd) == ["mom_compile: compiling a graph"]


@pytest.mark.parametrize("wanted", [True, False])
def test_code_for_further_sizes_is_shown_if_the_last_graph_was(
    wanted: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    """A loop of a length for which its piece is not valid is compiled while the program runs."""
    pieces: list[Piece] = []
    compile_nothing = Piece.compile

    def remember(piece: Piece, hints: object = None) -> None:
        pieces.append(piece)
        compile_nothing(piece)

    def slowly(piece: Piece, hints: object = None) -> None:
        time.sleep(LONG)
        compile_nothing(piece)

    # Undone here: `monkeypatch` ends after `eager_pieces`, whose stand-in would remain.
    with mock.patch.object(Piece, "compile", remember):
        call(lambda x: mlp(x), progress=wanted)
    piece = pieces[0]
    piece.variants.clear()
    lines(capfd)
    with mock.patch.object(Piece, "compile", slowly):
        piece._choose(tuple(1000 + i for i in range(len(piece.symbols))))
    shown = ["mom_compile: compiling code for further sizes", "mom_compile: compiled in 0 s"]
    assert lines(capfd) == (shown if wanted else [])


@pytest.mark.usefixtures("slow")
def test_lines_of_several_threads_are_not_mixed(capfd: pytest.CaptureFixture[str]) -> None:
    together(4, lambda number: call(lambda x: mlp(x) + number))
    assert [line.split()[1] for line in lines(capfd)] == ["compiling", "compiled"] * 4


@pytest.mark.usefixtures("slow")
def test_a_closed_standard_error_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr("sys.stderr", closed)
    call(lambda x: mlp(x))
    monkeypatch.setattr("sys.stderr", None)
    call(lambda x: mlp(x))
