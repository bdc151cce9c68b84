"""A simulated thread that runs tasks and copies rows of files: each task as late as its waits allow, or at any moment
before.

The thread is an agent. When it runs a task, it knows what the agent that submitted the task knew then; an agent that
waits for the task learns what the thread knows.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any
from unittest import mock

from mom_compile.runtime.host.bounce import Buffer, FileRows
from mom_compile.runtime.host.task_queue import Task, TaskQueue
from tests.no_gpu.ledger import Clock

if TYPE_CHECKING:
    from tests.no_gpu.streams import Simulation


class SimErrand(Task):
    def __init__(self, tasks: SimErrands, work: Callable[[], None], clock: Clock) -> None:
        super().__init__(work)
        self.tasks, self.clock = tasks, clock

    @property
    def ran(self) -> bool:
        self.tasks.sim.moment()
        if super().ran:
            self.tasks.sim.thread_clock.learn(self.clock)
        return super().ran

    def wait(self) -> None:
        self.tasks.sim.moment()
        while not super().ran:
            self.tasks.go_on()
        self.tasks.sim.thread_clock.learn(self.clock)


class SimErrands(TaskQueue):
    """Replaces a thread."""

    def __init__(self, sim: Simulation, name: str) -> None:
        super().__init__(name)
        self.sim = sim
        self.queue: collections.deque[SimErrand] = collections.deque()
        self.clock = Clock()
        sim.tasks.append(self)

    def put(self, work: Callable[[], None]) -> Task:
        self.sim.moment()
        task = SimErrand(self, work, Clock(self.sim.thread_clock))
        self.queue.append(task)
        return task

    def go_on(self) -> None:
        task = self.queue.popleft()
        self.clock.learn(task.clock)
        with self.sim.acting_as(self.name, self.clock):
            task.run()
        task.clock = Clock(self.clock)


def seen_by(sim: Simulation) -> contextlib.AbstractContextManager[Any]:
    """In this context, writes to and reads of files count as host accesses to both sides."""

    def of(name: str) -> Any:
        move = getattr(FileRows, name)

        def moved(rows: FileRows, buffer: Buffer) -> None:
            here = buffer.bytes[: rows.bytes.numel()]
            sim.moment()
            sim.host_moves(rows.bytes, here) if name == "write" else sim.host_moves(here, rows.bytes)
            move(rows, buffer)

        return mock.patch.object(FileRows, name, moved)

    @contextlib.contextmanager
    def both() -> Iterator[None]:
        with of("write"), of("read"):
            yield

    return both()
