"""A CUDA device whose copies complete immediately, for the real engine with real threads, files and buffers."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from unittest import mock

import torch

from mom_compile.runtime.host import bounce, engines
from mom_compile.runtime.host.engine_cuda import CudaEngine

CPU = torch.device("cpu")
STAGE = 4096


class AtOnce:
    """A stream and an event, on which no wait is ever needed."""

    def wait_event(self, event: AtOnce) -> None: ...

    def record(self, stream: AtOnce | None = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


ONE = AtOnce()


@contextlib.contextmanager
def device_at_once() -> Iterator[CudaEngine]:
    """In this context the CPU's engine is a CUDA engine whose buffers for files hold `STAGE` bytes."""
    with contextlib.ExitStack() as stack:
        for name in ("Stream", "Event", "current_stream"):
            stack.enter_context(mock.patch.object(torch.cuda, name, return_value=ONE))
        stack.enter_context(mock.patch.object(torch.cuda, "stream", return_value=contextlib.nullcontext()))
        stack.enter_context(mock.patch.object(bounce, "STAGE", STAGE))
        made = CudaEngine(CPU, pin=lambda address, size: lambda: None)
        stack.enter_context(mock.patch.object(made, "pinned", torch.empty))
        stack.enter_context(mock.patch.dict(engines._ENGINES, {CPU: made}))
        yield made
        made.settle()
        gc.collect()
