"""One copy engine per device, created on first use."""

from __future__ import annotations

import torch

from mom_compile.runtime.host.engine import CopyEngine, ThreadedEngine
from mom_compile.runtime.host.engine_cuda import CudaEngine

_ENGINES: dict[torch.device, CopyEngine] = {}


def engine_for(device: torch.device) -> CopyEngine:
    """Return the engine of a device. Raises `NotImplementedError` for a device type without one."""
    if str(device) == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    engine = _ENGINES.get(device)
    if engine is None:
        engine = _ENGINES.setdefault(device, _make(device))  # two threads may create one; the first is kept
    return engine


def engine_with_own_memory(device: torch.device) -> CopyEngine | None:
    """Return the engine of a device that has its own memory; None for the CPU and for devices without an engine."""
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
    raise NotImplementedError(f"offloading to the host is not implemented for device type {device.type!r}")
