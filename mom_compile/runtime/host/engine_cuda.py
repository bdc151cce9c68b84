"""Copies on CUDA streams of their own, with an event in each direction. Its tests ran on an H200; proved on simulated
streams (`tests/no_gpu/streams.py`), which every wait in here is taken away from in turn.

    compute stream:  ... ready ---------------------- wait(done) ...
    copy stream:          wait(ready)  copy  done

`record_stream` is not used: memory it holds back comes free late and fragments. A ticket keeps both tensors until the
stream that owns them has been told to wait for the copy; memory that is then freed can only be reused after it.
The host is never made to wait, except by `synchronize`, where it gathers rows that lie apart, after an exception, and
for a file (`bounce.py`).
"""

from __future__ import annotations

import collections
import contextlib
import functools
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from mom_compile.runtime.host.backings.registration import Pin
from mom_compile.runtime.host.bounce import FileDone, Way, in_file
from mom_compile.runtime.host.done import CopyError, Done
from mom_compile.runtime.host.engine import CopyEngine
from mom_compile.runtime.host.holders import error_prefix
from mom_compile.runtime.host.limits import HostMemoryError
from mom_compile.runtime.host.mapped import is_mapped, read
from mom_compile.runtime.host.seams import between_seams, same_layout
from mom_compile.runtime.host.task_queue import TaskQueue

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StreamDone:
    event: torch.cuda.Event

    def synchronize(self) -> None:
        self.event.synchronize()

    def finished(self) -> bool:
        """Nobody touches what was copied any more."""
        return self.event.query()

    finish = synchronize


@dataclass(frozen=True)
class Abandoned:
    """A copy whose ticket was dropped before anybody waited for it, and what it copies."""

    done: StreamDone | FileDone
    tensors: tuple[torch.Tensor, ...]


class StreamTicket:
    """`owner` is the stream that computed when the copy was asked for: the tensors' memory goes back to it."""

    def __init__(self, engine: CudaEngine, done: StreamDone | FileDone, owner: torch.cuda.Stream) -> None:
        self.done = done
        self._engine = engine
        self._owner = owner
        self.tensors: tuple[torch.Tensor, ...] = ()

    def wait(self) -> None:
        self.release()
        reader = torch.cuda.current_stream(self._engine.device)
        if reader != self._owner:
            reader.wait_event(self.done.event)

    def release(self) -> None:
        self._owner.wait_event(self.done.event)
        self.tensors = ()

    def __del__(self) -> None:
        # Dropped without a wait (an exception in between): the memory must not be reused too early. No stream is made
        # to wait here: whoever forgot to would not be seen.
        if self.tensors:
            self._engine.abandoned.append(Abandoned(self.done, self.tensors))


class FileTicket(StreamTicket):
    """What streams may wait for is there when the thread that reads or writes the file has come so far."""

    done: FileDone

    def wait(self) -> None:
        super().wait()
        self.done.check()

    def release(self) -> None:
        self.done.task.wait()
        super().release()


class CudaEngine(CopyEngine):
    """A queue for each direction, since a link carries both at once. Copies of the same rows stay in order: each waits
    for the one `after`. An error ends the process' use of the device, so tickets need not pass one on."""

    def __init__(
        self, device: torch.device, pin: Pin | None = None, tasks: Callable[[str], TaskQueue] = TaskQueue
    ) -> None:
        super().__init__()
        self.device = device
        self.arriving = torch.cuda.Stream(device)
        self.departing = torch.cuda.Stream(device)
        pin = pin or pin_for(device)
        self._from_files = Way(self.arriving, pin, tasks("mom-files-to-device"))
        self._to_files = Way(self.departing, pin, tasks("mom-device-to-files"))
        #: Appended to by finalisers, so without a lock.
        self.abandoned: collections.deque[Abandoned] = collections.deque()

    def begin(self, target: torch.Tensor, source: torch.Tensor, after: Done | None, to_host: bool) -> StreamTicket:
        self._forget_finished()
        owner = torch.cuda.current_stream(self.device)
        queue = self.departing if to_host else self.arriving
        if not same_layout(target, source):
            source = _on_device(target, source) if to_host else _gathered(source, after)
        ready = torch.cuda.Event()
        ready.record(owner)
        if in_file(target if to_host else source):
            way = self._to_files if to_host else self._from_files
            ticket: StreamTicket = FileTicket(self, way.copy(target, source, ready, after, to_host), owner)
            ticket.tensors = (target, source)
            return ticket
        done = torch.cuda.Event()
        ticket = StreamTicket(self, StreamDone(done), owner)
        queue.wait_event(ready)
        if isinstance(after, StreamDone):
            queue.wait_event(after.event)
        elif after is not None:  # the engine of another kind of device had these rows
            after.synchronize()
        ticket.tensors = (target, source)
        pieces = between_seams(target, source) if to_host else ((b, a) for a, b in between_seams(source, target))
        try:
            with torch.cuda.stream(queue):
                for to, rows in pieces:
                    to.copy_(rows, non_blocking=True)
        finally:
            done.record(queue)
        return ticket

    def settle(self) -> None:
        """Nothing stays queued, nor keeps memory, after an exception either."""
        super().settle()
        with contextlib.suppress(IndexError):  # there are no more, or another thread was quicker
            while True:
                one = self.abandoned.popleft()  # its tensors live until then
                one.done.finish()

    def _forget_finished(self) -> None:
        """Whoever dropped a ticket late is not waited for: what is not done stays."""
        with contextlib.suppress(IndexError):
            for _ in range(len(self.abandoned)):
                one = self.abandoned.popleft()
                if not one.done.finished():
                    self.abandoned.append(one)


def _on_device(target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """A source in the layout that rows have on the host: a strided copy to there would go row by row, and the device
    transposes faster."""
    return torch.empty_like(target, device=source.device).copy_(source)


def _gathered(source: torch.Tensor, after: Done | None) -> torch.Tensor:
    """Rows that lie apart, side by side: the host does that itself, once they are there."""
    if after is not None:
        after.synchronize()
    if not is_mapped(source):
        return source.clone()
    try:
        return read(source)
    except OSError as error:
        raise CopyError(f"{error_prefix(source)}: {error}") from error


def _forget_error(device: torch.device) -> None:
    """A call that CUDA refused leaves its error behind, and PyTorch raises it at the next kernel: let that be here."""
    with contextlib.suppress(RuntimeError):
        torch.ones(1, device=device)


#: Pinned for every context of the process: any of its devices may copy from there.
PORTABLE = 1


@functools.cache
def pin_for(device: torch.device) -> Pin:
    """What pins a range of host addresses, and undoes it. Raises `HostMemoryError` where the driver refuses."""

    def pin(address: int, size: int) -> Callable[[], None]:
        runtime, process = torch.cuda.cudart(), os.getpid()
        with torch.cuda.device(device):
            code = int(runtime.cudaHostRegister(address, size, PORTABLE))
        if code != 0:
            _forget_error(device)
            raise HostMemoryError(
                f"{size} bytes of host memory cannot be pinned (CUDA error {code}); "
                "a limit on locked memory (ulimit -l) may forbid it. Of keys and values, kv_offload='auto' with a "
                "memory_budget keeps more on the device, and kv_offload='disk' with kv_dir needs little; weights do "
                "without it, more slowly"
            )

        def unpin() -> None:
            if os.getpid() != process:
                return  # a fork has no CUDA, and what is pinned is its parent's
            with torch.cuda.device(device):
                torch.cuda.synchronize(device)
                code = int(runtime.cudaHostUnregister(address))
            if code != 0:
                # Raised from a finaliser it would reach nobody.
                _forget_error(device)
                log.warning("%d bytes of host memory could not be unpinned (CUDA error %d)", size, code)

        return unpin

    return pin
