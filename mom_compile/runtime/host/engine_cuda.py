"""Copies on dedicated CUDA streams, with one event per dependency. Its tests ran on an H200.

`tests/no_gpu/streams.py` simulates streams; tests there remove each wait of this module in turn and expect an error.

    compute stream:  ... ready ---------------------- wait(done) ...
    copy stream:          wait(ready)  copy  done

`record_stream` is not used: it delays the reuse of memory and fragments it. Instead, a ticket keeps both tensors alive
until the stream that owns them waits for the copy; memory freed after that is reused only after that wait. The host
waits only in `synchronize`, before it gathers rows that are not contiguous, after an exception, and for a file
(`bounce.py`).
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
from mom_compile.runtime.host.bounce import FileDone, FileQueue, in_file
from mom_compile.runtime.host.done import Done
from mom_compile.runtime.host.engine import CopyEngine
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
        """Whether the copy no longer accesses its tensors."""
        return self.event.query()

    finish = synchronize


@dataclass(frozen=True)
class Abandoned:
    """A copy whose ticket was dropped without a wait, and the tensors it accesses."""

    done: StreamDone | FileDone
    tensors: tuple[torch.Tensor, ...]


class StreamTicket:
    """`owner` is the stream that was current when the copy was started; the tensors' memory is returned to it."""

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
        # Dropped without a wait (an exception in between): the memory must not be reused too early. No stream waits
        # here, so that tests notice a forgotten wait.
        if self.tensors:
            self._engine.abandoned.append(Abandoned(self.done, self.tensors))


class FileTicket(StreamTicket):
    """Streams can wait only once the thread that reads or writes the file has recorded the event."""

    done: FileDone

    def wait(self) -> None:
        super().wait()
        self.done.check()

    def release(self) -> None:
        self.done.task.wait()
        super().release()


class CudaEngine(CopyEngine):
    """One stream per direction, since a link transfers both at once. Copies of the same rows are ordered by `after`.

    Tickets need not pass on errors, as a CUDA error ends the process's use of the device.
    """

    def __init__(
        self, device: torch.device, pin: Pin | None = None, tasks: Callable[[str], TaskQueue] = TaskQueue
    ) -> None:
        super().__init__()
        self.device = device
        self.arriving = torch.cuda.Stream(device)
        self.departing = torch.cuda.Stream(device)
        pin = pin or pin_for(device)
        self._from_files = FileQueue(self.arriving, pin, tasks("mom-files-to-device"))
        self._to_files = FileQueue(self.departing, pin, tasks("mom-device-to-files"))
        #: Finalizers append to it, so it has no lock.
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
            files = self._to_files if to_host else self._from_files
            ticket: StreamTicket = FileTicket(self, files.copy(target, source, ready, after, to_host), owner)
            ticket.tensors = (target, source)
            return ticket
        done = torch.cuda.Event()
        ticket = StreamTicket(self, StreamDone(done), owner)
        queue.wait_event(ready)
        if isinstance(after, StreamDone):
            queue.wait_event(after.event)
        elif after is not None:  # rows last copied by another kind of engine
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
        """Also after an exception, leave no copy running and no memory held."""
        super().settle()
        with contextlib.suppress(IndexError):  # it is empty, perhaps due to another thread
            while True:
                one = self.abandoned.popleft()  # keeps its tensors alive until then
                one.done.finish()

    def _forget_finished(self) -> None:
        """Drop abandoned copies that are done, without waiting for the others."""
        with contextlib.suppress(IndexError):
            for _ in range(len(self.abandoned)):
                one = self.abandoned.popleft()
                if not one.done.finished():
                    self.abandoned.append(one)


def _on_device(target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """Copy a source to the layout of the host's rows on the device, which transposes faster than a strided copy."""
    return torch.empty_like(target, device=source.device).copy_(source)


def _gathered(source: torch.Tensor, after: Done | None) -> torch.Tensor:
    """Make rows contiguous on the host, once the copy before has written them."""
    if after is not None:
        after.synchronize()
    return read(source) if is_mapped(source) else source.clone()


def _forget_error(device: torch.device) -> None:
    """Clear the error of a refused CUDA call, which PyTorch would otherwise raise at the next kernel."""
    with contextlib.suppress(RuntimeError):
        torch.ones(1, device=device)


#: cudaHostRegisterPortable: pinned for all devices of the process.
PORTABLE = 1


@functools.cache
def pin_for(device: torch.device) -> Pin:
    """Return a function that pins a host address range. It raises `HostMemoryError` if the driver refuses."""

    def pin(address: int, size: int) -> Callable[[], None]:
        runtime, process = torch.cuda.cudart(), os.getpid()
        with torch.cuda.device(device):
            code = int(runtime.cudaHostRegister(address, size, PORTABLE))
        if code != 0:
            _forget_error(device)
            raise HostMemoryError(
                f"cannot pin {size} bytes of host memory (CUDA error {code}); "
                "a limit on locked memory (ulimit -l) may be the cause. For keys and values, kv_offload='auto' with a "
                "memory_budget keeps more on the device, and kv_offload='disk' with kv_dir needs little pinned memory; "
                "weights also work without it, more slowly"
            )

        def unpin() -> None:
            if os.getpid() != process:
                return  # a fork has no CUDA context, and the memory is pinned by its parent
            with torch.cuda.device(device):
                torch.cuda.synchronize(device)
                code = int(runtime.cudaHostUnregister(address))
            if code != 0:
                # An exception in a finalizer would be lost.
                _forget_error(device)
                log.warning("%d bytes of host memory could not be unpinned (CUDA error %d)", size, code)

        return unpin

    return pin
