"""Fresh subprocesses that report back: nothing compiled, cached or allocated for one figure reaches the next.

A worker is `python -m <module> --worker '<json>'`. It prints one event to a line, `@step text` or
`@row {json}`; what else it prints is kept only to explain a failure.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent


class WorkerFailed(RuntimeError):
    """A worker ended with an error or ran out of time; the message ends with the last lines it printed."""


def step(text: str) -> None:
    """In a worker: this step begins."""
    print(f"@step {text}", flush=True)


def row(result: Mapping[str, Any]) -> None:
    """In a worker: a finished figure. It is safe with the parent from here on."""
    print(f"@row {json.dumps(result)}", flush=True)


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
    command = [sys.executable, "-m", module, "--worker", json.dumps(spec)]
    rows: list[dict[str, Any]] = []
    tail: deque[str] = deque(maxlen=30)
    timed_out = threading.Event()
    with subprocess.Popen(
        command,
        cwd=_ROOT,
        env={**os.environ, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:

        def stop() -> None:
            timed_out.set()
            process.kill()

        timer = threading.Timer(threading.TIMEOUT_MAX if timeout is None else timeout, stop)
        timer.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                kind, _, text = line.rstrip("\n").partition(" ")
                if kind == "@step":
                    on_step(text)
                elif kind == "@row":
                    rows.append(json.loads(text))
                    on_row(rows[-1])
                else:
                    tail.append(line)
        except BaseException:
            process.kill()
            raise
        finally:
            timer.cancel()
    if process.returncode != 0:
        what = f"ran longer than {timeout:.0f} s" if timed_out.is_set() else f"exit status {process.returncode}"
        raise WorkerFailed(f"{module}: {what}\n{''.join(tail)}")
    return rows
