"""One copy engine for each device, made when it is first asked for."""

from __future__ import annotations

import torch

from mom_compile.runtime.host.engine import CopyEngine, ThreadedEngine
from mom_compile.runtime.host.engine_cuda import CudaEngine

_ENGINES: dict[torch.device, CopyEngine] = {}


def engine_for(device: torch.device) -> CopyEngine:
    """The engine of a device, made when first asked for. Raises `NotImplementedError` for a type without one."""
    if str(device) == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    engine = _ENGINES.get(device)
    if engine is None:
        engine = _ENGINES.setdefault(device, _make(device))  # of two threads one makes it
    return engine


def beside(device: torch.device) -> CopyEngine | None:
    """The engine of a device that has memory of its own. None where the host reads and writes there itself, and for a
    device that has no engine."""
    try:
        engine = engine_for(device)
    except NotImplementedError:
        return None
    return None if engine.in_host_memory else engine


def _make(device: torch.device) -> CopyEngine:
    if device.type == "cpu":
        return ThreadedEngine()
    if device.type == "cuda":
        return CudaEngine(device)
    raise NotImplementedError(f"nothing can be kept on the host for a device of type {device.type!r}")
