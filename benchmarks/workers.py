"""Fresh subprocesses that report back: nothing compiled, cached or allocated for one figure reaches the next.

A worker is `python -m <module> --worker '<json>'`. It prints one event to a line, `@step text` or
`@row {json}`; what else it prints is kept only to explain a failure. One that goes on answering (`Worker.ask`) reads
its questions from standard input, a line each (`questions`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

_ROOT = Path(__file__).resolve().parent.parent


class WorkerFailed(RuntimeError):
    """A worker ended with an error or ran out of time; the message ends with the last lines it printed."""


def step(text: str) -> None:
    """In a worker: this step begins."""
    print(f"@step {text}", flush=True)


def row(result: Mapping[str, Any]) -> None:
    """In a worker: a finished figure. It is safe with the parent from here on."""
    print(f"@row {json.dumps(result)}", flush=True)


def questions() -> Iterator[str]:
    """In a worker: what it is asked, until nobody asks any more."""
    for line in sys.stdin:
        yield line.strip()


class Worker:
    """A process that has been started with `spec`, to be used as a context: it is gone at the end of that.

    `timeout` seconds after its start it is killed, whatever it does. `on_step` sees its steps while rows are waited
    for.
    """

    def __init__(
        self,
        module: str,
        spec: Mapping[str, Any],
        *,
        timeout: float | None = None,
        env: Mapping[str, str] | None = None,
        on_step: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.module, self.timeout, self.on_step = module, timeout, on_step
        self._tail: deque[str] = deque(maxlen=30)
        self._timed_out = threading.Event()
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, "--worker", json.dumps(spec)],
            cwd=_ROOT,
            env={**os.environ, **(env or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._timer = threading.Timer(threading.TIMEOUT_MAX if timeout is None else timeout, self._stop)
        self._timer.start()

    def rows(self) -> Iterator[dict[str, Any]]:
        """Rows as they arrive, until the worker ends. Raises `WorkerFailed` where that is an error."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            kind, _, text = line.rstrip("\n").partition(" ")
            if kind == "@step":
                self.on_step(text)
            elif kind == "@row":
                yield json.loads(text)
            else:
                self._tail.append(line)
        if self._process.wait() != 0:
            late = self._timed_out.is_set()
            what = f"ran longer than {self.timeout:.0f} s" if late else f"exit status {self._process.returncode}"
            raise WorkerFailed(f"{self.module}: {what}\n{''.join(self._tail)}")

    def row(self) -> dict[str, Any]:
        """The next row. Raises `WorkerFailed` where there is none."""
        for found in self.rows():
            return found
        raise WorkerFailed(f"{self.module}: ended without a figure\n{''.join(self._tail)}")

    def ask(self, question: str) -> dict[str, Any]:
        """The row with which the worker answers."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(question + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # It has ended; `row` says why.
        return self.row()

    def _stop(self) -> None:
        self._timed_out.set()
        self._process.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._timer.cancel()
        self._process.kill()
        with self._process:  # closes its pipes and waits
            pass


def run_worker(
    module: str,
    spec: Mapping[str, Any],
    *,
    timeout: float | None = None,
    env: Mapping[str, str] | None = None,
    on_step: Callable[[str], None] = lambda text: None,
    on_row: Callable[[dict[str, Any]], None] = lambda result: None,
) -> list[dict[str, Any]]:
    """Run `module` as a worker and return its rows; `on_row` sees each as it arrives."""
    rows: list[dict[str, Any]] = []
    with Worker(module, spec, timeout=timeout, env=env, on_step=on_step) as worker:
        for found in worker.rows():
            rows.append(found)
            on_row(found)
    return rows
