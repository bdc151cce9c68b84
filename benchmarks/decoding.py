"""Time, memory and copies of decode steps over a cache."""

from __future__ import annotations

import copy
from typing import Any

import torch

from benchmarks import measure, workers
from benchmarks.models import keeping

#: Decode steps before the timed ones: the first compiles, the second makes lengths dynamic.
WARM_UP = 3


def decode(model: Any, cache: Any, steps: int, *, batch: int = 1, device: str = "cpu") -> dict[str, Any]:
    """Run steps of one token for each of `batch` sequences; the cache grows.

    step                  seconds of each, without warm-up
    step_peak             bytes of one more step above weights and cache
    to_host, to_device    bytes that a step copies
    host                  bytes of rows on the host after the timed steps
    """
    from mom_compile import host_memory
    from mom_compile.runtime.host.engines import engine_for

    token = torch.full((batch, 1), 7, device=device)
    kept = keeping(cache, model)

    @torch.no_grad()
    def step() -> None:
        model(input_ids=token, **kept, use_cache=True, logits_to_keep=1)

    workers.step("compile decode")
    for _ in range(WARM_UP):
        step()
    workers.step("decode")
    traffic = engine_for(torch.device(device)).traffic
    before = copy.copy(traffic)
    times = [measure.seconds(step, device) for _ in range(steps)]
    moved = {name: (getattr(traffic, name) - getattr(before, name)) / steps for name in ("to_host", "to_device")}
    row = {"step": times, **moved, "host": host_memory().rows}
    return row | {"step_peak": measure.peak_bytes(step, device).peak}
