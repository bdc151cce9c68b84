"""Copies on a CUDA stream of their own, with an event in each direction. Written without a GPU; never run on one yet.

    compute stream:  ... ready ---------------------- wait(done) ...
    copy stream:          wait(ready)  copy  done

`record_stream` is not used: memory it holds back comes free late and fragments. A ticket keeps both tensors until the
computation has been told to wait for the copy; memory that is then freed can only be reused after it.
The host is never made to wait, except by `synchronize`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch

from mom_compile.runtime.host.backings.pinned import Pin
from mom_compile.runtime.host.engine import CopyEngine, Ticket
from mom_compile.runtime.host.limits import HostMemoryError
from mom_compile.runtime.host.seams import between_seams, same_layout


class StreamTicket:
    def __init__(self, done: torch.cuda.Event, device: torch.device, tensors: tuple[torch.Tensor, ...]) -> None:
        self._done = done
        self._device = device
        self._tensors: tuple[torch.Tensor, ...] = tensors

    def wait(self) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._done)
        self._tensors = ()

    def synchronize(self) -> None:
        self._done.synchronize()
        self.wait()

    def release(self) -> None:
        self.wait()

    def __del__(self) -> None:
        # Dropped without a wait (an exception in between): the tensors' memory must still not be reused too early.
        if self._tensors:
            self.wait()


class CudaEngine(CopyEngine):
    """One stream for both directions, so that copies of the same rows stay in order. An error ends the process' use of
    the device, so `after` needs no attention."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def begin(self, target: torch.Tensor, source: torch.Tensor, after: Ticket | None) -> StreamTicket:
        compute = torch.cuda.current_stream(self.device)
        staged = source
        if target.device.type == "cpu" and not same_layout(target, source):
            # A strided copy to the host would go row by row; the device transposes faster.
            staged = torch.empty_like(target, device=self.device).copy_(source)
        ready, done = torch.cuda.Event(), torch.cuda.Event()
        ready.record(compute)
        self.stream.wait_event(ready)
        with torch.cuda.stream(self.stream):
            for to, rows in _pieces(target, staged):
                to.copy_(rows, non_blocking=True)
        done.record(self.stream)
        return StreamTicket(done, self.device, (target, staged))


def _pieces(target: torch.Tensor, source: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    if target.device.type == "cpu":
        return between_seams(target, source)
    return ((to, rows) for rows, to in between_seams(source, target))


def _forget_error(device: torch.device) -> None:
    """A call that CUDA refused leaves its error behind, and PyTorch raises it at the next kernel: let that be here."""
    with contextlib.suppress(RuntimeError):
        torch.ones(1, device=device)


@functools.cache
def pin_for(device: torch.device) -> Pin:
    """What pins a range of host addresses, and undoes it. Raises `HostMemoryError` where the driver refuses."""

    def pin(address: int, size: int) -> Callable[[], None]:
        runtime = torch.cuda.cudart()
        with torch.cuda.device(device):
            code = int(runtime.cudaHostRegister(address, size, 0))
        if code != 0:
            _forget_error(device)
            raise HostMemoryError(
                f"{size} bytes of host memory for keys and values cannot be pinned (CUDA error {code}); "
                "a limit on locked memory (ulimit -l) may forbid it. kv_offload='disk' with kv_dir needs none, "
                "kv_offload='auto' with a memory_budget keeps more layers on the device"
            )

        def unpin() -> None:
            torch.cuda.synchronize(device)
            runtime.cudaHostUnregister(address)

        return unpin

    return pin
