"""New subprocesses that report results: nothing compiled, cached or allocated for one figure affects the next.

A worker is `python -m <module> --worker '<json>'`. It prints one event to a line, `@step text` or `@row {json}`; other
output is kept only to explain a failure. A worker that answers questions (`Worker.ask`) reads them from standard input,
one to a line (`questions`).
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
    """In a worker: report that a step begins."""
    print(f"@step {text}", flush=True)


def row(result: Mapping[str, Any]) -> None:
    """In a worker: report a finished figure."""
    print(f"@row {json.dumps(result)}", flush=True)


def questions() -> Iterator[str]:
    """In a worker: yield the questions of the parent until it closes the pipe."""
    for line in sys.stdin:
        yield line.strip()


class Worker:
    """A process started with `spec`, as a context manager that ends it.

    It is killed `timeout` seconds after its start. `on_step` receives its steps while rows are awaited.
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
        """Yield rows as they arrive, until the worker ends. Raises `WorkerFailed` on an error."""
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
        """Return the next row. Raises `WorkerFailed` if there is none."""
        for found in self.rows():
            return found
        raise WorkerFailed(f"{self.module}: ended without a figure\n{''.join(self._tail)}")

    def ask(self, question: str) -> dict[str, Any]:
        """Send a question and return the answering row."""
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
    """Run `module` as a worker and return its rows; `on_row` receives each as it arrives."""
    rows: list[dict[str, Any]] = []
    with Worker(module, spec, timeout=timeout, env=env, on_step=on_step) as worker:
        for found in worker.rows():
            rows.append(found)
            on_row(found)
    return rows
