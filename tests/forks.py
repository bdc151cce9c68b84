"""What a forked child does, and what is known of one that hangs."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

#: A child that hangs is no child that passes.
SECONDS = 60.0


def in_a_fork(work: Callable[[], object]) -> bool:
    """Whether it is true there. Raises `TimeoutError`, which says where its threads are, of one that does not end."""
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if work() else 1)
        finally:
            os._exit(2)
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.002)
    where = _where(child)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise TimeoutError(f"a child does not end:\n{where}")


def _where(process: int) -> str:
    """The system call that each of its threads is in: Linux alone says so."""
    found = []
    for file in ("wchan", "syscall", "stack"):
        for thread in sorted(Path(f"/proc/{process}/task").glob("*")):
            try:
                found.append(f"{thread.name} {file}: {(thread / file).read_text().strip()}")
            except OSError as error:
                found.append(f"{thread.name} {file}: {error}")
    return "\n".join(found)
