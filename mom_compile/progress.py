"""What a user sees while a model compiles: a line on standard error when it begins and one when it has ended.

    mom_compile: compiling a graph of 2311 operators, once for each kind of call
    mom_compile: compiled in 31 s: prefill, 19 loops, expected peak 119 MiB

On a terminal a bar stands below the first line meanwhile. What takes less than `PATIENCE` seconds is not worth a word.
Nothing is written to standard output. `MOM_COMPILE_PROGRESS=0` in the environment turns it off for a process, the
option `progress=False` for a model.

A compilation writes from two threads: the one that compiles, and a timer that begins to show it. Each compilation holds
Dynamo's lock, so that there is one at a time.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

#: Seconds that pass in silence.
PATIENCE = 1.0
#: "0" in it: silence.
VARIABLE = "MOM_COMPILE_PROGRESS"


class Compilation:
    """One thing that is compiled. `result` is what the last line says of it."""

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
        """So many pieces will be made: each counts when it has been written, and again when it is ready."""
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
    # rich takes a tenth of a second to import, and is needed for what takes longer than that alone.
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
    except ValueError:  # it is closed
        return False


def _write(text: str) -> None:
    """A line in one piece. A standard error that is closed or full is no reason to fail."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(f"mom_compile: {text}\n")
            sys.stderr.flush()


#: What is compiled now, if anybody is to know.
_now: Compilation | None = None
#: Whether the graph that was compiled last was to be told of. Code for further sizes, compiled while a program runs,
#: belongs to no graph alone.
_wanted = True


@contextlib.contextmanager
def compiling(what: str, wanted: bool | None = None) -> Iterator[Compilation | None]:
    """Tell of what is compiled within, if it is `wanted` and takes its time; None: if the last graph's was. The caller
    holds Dynamo's lock."""
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
    """The graph that is being compiled has so many pieces."""
    if _now is not None:
        _now.expect(pieces)


def advance() -> None:
    """A piece has been written, or is ready."""
    if _now is not None:
        _now.advance()
