"""Progress of a compilation: one line on standard error at the beginning, and one at the end.

    mom_compile: compiling a graph of 2311 operators, once for each kind of call
    mom_compile: compiled in 31 s: prefill, 19 loops, expected peak 119 MiB

A terminal also shows a bar below the first line. Compilations of less than `PATIENCE` seconds write nothing. Nothing is
written to standard output. The environment variable `MOM_COMPILE_PROGRESS=0` turns progress off for a process, the
option `progress=False` for a model.

Two threads write: the one that compiles, and a timer that writes the first line. Each compilation holds Dynamo's lock,
so only one runs at a time.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

#: Seconds before the first line is written.
PATIENCE = 1.0
#: The environment variable that turns progress off if it is "0".
VARIABLE = "MOM_COMPILE_PROGRESS"


class Compilation:
    """The progress of one compilation. `result` is the text of the last line."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.result = ""
        self._pieces = 0
        self._made = 0
        self._began = time.perf_counter()
        self._lock = threading.Lock()
        self._shown = self._ended = False
        self._bar: Any = None
        self._timer = threading.Timer(PATIENCE, self._show)
        self._timer.daemon = True
        self._timer.start()

    def expect(self, pieces: int) -> None:
        """Set the number of pieces. Each advances the bar twice: when it is generated and when it is compiled."""
        with self._lock:
            self._pieces = 2 * pieces
            self._draw()

    def advance(self) -> None:
        with self._lock:
            self._made += 1
            self._draw()

    def end(self, succeeded: bool) -> None:
        self._timer.cancel()
        with self._lock:
            self._ended = True
            if self._bar is not None:
                self._bar.stop()
            if self._shown and succeeded:
                result = f": {self.result}" if self.result else ""
                _write(f"compiled in {time.perf_counter() - self._began:.0f} s{result}")

    def _show(self) -> None:
        with self._lock:
            if self._ended:
                return
            self._shown = True
            _write(f"compiling {self.what}")
            if _is_terminal():
                self._bar = _bar()
                self._bar.start()
                self._draw()

    def _draw(self) -> None:
        if self._bar is not None:
            total = self._pieces if self._pieces >= self._made else None
            self._bar.update(self._bar.task_ids[0], completed=self._made, total=total)


def _bar() -> Any:
    # Importing rich takes a tenth of a second, so only compilations that show a bar import it.
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TimeElapsedColumn

    columns = (BarColumn(), TimeElapsedColumn())
    console = Console(file=sys.stderr)
    bar = Progress(*columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False)
    bar.add_task("compiling", total=None)
    return bar


def _is_terminal() -> bool:
    try:
        return sys.stderr is not None and sys.stderr.isatty()
    except ValueError:  # standard error is closed
        return False


def _write(text: str) -> None:
    """Write a line in one call. Errors of standard error (closed, disk full) are ignored."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(f"mom_compile: {text}\n")
            sys.stderr.flush()


#: The compilation that is shown.
_now: Compilation | None = None
#: Whether progress was wanted for the last compiled graph. It also applies to code compiled while a program runs, for
#: further sizes, which graphs share.
_wanted = True


@contextlib.contextmanager
def compiling(what: str, wanted: bool | None = None) -> Iterator[Compilation | None]:
    """Show the progress of a compilation in this context if it is `wanted` and slow. None: as for the last graph.

    The caller holds Dynamo's lock.
    """
    global _now, _wanted
    if wanted is not None:
        _wanted = wanted
    if not _wanted or _now is not None or os.environ.get(VARIABLE) == "0":
        yield _now
        return
    _now = compilation = Compilation(what)
    succeeded = False
    try:
        yield compilation
        succeeded = True
    finally:
        _now = None
        compilation.end(succeeded)


def expect(pieces: int) -> None:
    """Set the number of pieces of the graph that is being compiled."""
    if _now is not None:
        _now.expect(pieces)


def advance() -> None:
    """Record that the code of a piece has been generated, or that the piece has been compiled."""
    if _now is not None:
        _now.advance()
