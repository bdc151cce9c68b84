"""A piece of a decode step as a CUDA graph: captured once, replayed for each token. IT HAS NEVER RUN ON A GPU.

A step of one token computes little: a layer's kernels take less time than their launches, some 35 microseconds by
replay instead of 120. Between two attentions, a piece has the same shapes in every step, and its weights do not move:

    fixed inputs    weights, read in place while their addresses are those that were captured
    other inputs    copied to the graph's own inputs: `[B, 1, hidden]` and smaller
    results         written to the same buffers each time, so they are valid until the next run. Results that outlive
                    the program's run, or that another stream may still read then, are copied

    the first `WARM_UP` runs                        without a graph: kernels are tuned, libraries create handles
    the next, and whenever a weight has moved       copy the other inputs, capture, replay
    all later runs                                  copy the other inputs, replay
    in another thread, or after a failed capture    without a graph

Steps with varying shapes, attention and the growing cache, stay outside.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

log = logging.getLogger(__name__)

#: Runs before a piece is captured.
WARM_UP = 2
#: Limit on the bytes of inputs that are copied; larger ones are e.g. fetched weights or keys of a cache.
MOST_MOVED = 1 << 20

Run = Callable[[list[Any]], Sequence[Any]]


@dataclass(frozen=True)
class Recorded:
    """A captured graph: `replay` computes `results` from `inputs`, all at fixed addresses."""

    replay: Callable[[], None]
    inputs: tuple[torch.Tensor, ...]
    results: tuple[Any, ...]


#: Captures `run(inputs)`.
Record = Callable[[Run, list[Any]], Recorded]


def record_on_cuda(run: Run, inputs: list[Any]) -> Recorded:
    """Capture on the current device; nothing is computed meanwhile. Copy threads may call CUDA during the capture."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=_pool(), capture_error_mode="thread_local"):
        results = run(list(inputs))
    return Recorded(graph.replay, tuple(inputs), tuple(results))


@functools.cache
def _pool() -> Any:
    """Return the memory pool of all graphs. The graphs of a program are replayed in order, and keep their results."""
    return torch.cuda.graph_pool_handle()


#: Capture functions by device type.
RECORDS: dict[str, Record] = {"cuda": record_on_cuda}


@dataclass(eq=False)
class Replayed:
    """A piece whose inputs have fixed shapes. `fixed` are the indices of weights among the inputs, `copied` those of
    results that must outlive the next run. Pickling omits the captured graph."""

    run: Run
    device: torch.device
    fixed: tuple[int, ...]
    copied: tuple[int, ...]
    runs: int = 0
    off: bool = False
    recorded: Recorded | None = None
    addresses: list[int] = field(default_factory=list)
    thread: int | None = None

    def __call__(self, arguments: list[Any]) -> Sequence[Any]:
        if self.off or self.device.type not in RECORDS or self.thread not in (None, threading.get_ident()):
            return self.run(arguments)
        if self.runs < WARM_UP:
            self.runs += 1
            return self.run(arguments)
        addresses = [arguments[index].data_ptr() for index in self.fixed]
        if self.recorded is None or addresses != self.addresses:
            self._record(arguments, addresses)
        if self.recorded is None:
            return self.run(arguments)
        for number, (own, given) in enumerate(zip(self.recorded.inputs, arguments, strict=True)):
            if number not in self.fixed:
                own.copy_(given)
        arguments.clear()
        self.recorded.replay()
        results = self.recorded.results
        return tuple(result.clone() if number in self.copied else result for number, result in enumerate(results))

    def _record(self, arguments: Sequence[Any], addresses: list[int]) -> None:
        inputs = [given if number in self.fixed else like(given) for number, given in enumerate(arguments)]
        self.recorded = None
        try:
            self.recorded = RECORDS[self.device.type](self.run, inputs)
        except Exception as error:
            self.off = True
            log.warning("a piece cannot be captured as a CUDA graph and runs without one: %s", error)
            return
        self.addresses, self.thread = addresses, threading.get_ident()

    def __getstate__(self) -> dict[str, Any]:
        return {"run": self.run, "device": self.device, "fixed": self.fixed, "copied": self.copied}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


def like(given: torch.Tensor) -> torch.Tensor:
    """Return a copy with the same shape and strides, in new memory."""
    own = torch.empty_strided(given.shape, given.stride(), dtype=given.dtype, device=given.device)
    return own.copy_(given)


def may_be_recorded(shapes: Sequence[tuple[Sequence[int], torch.dtype, torch.device] | None], fixed: Collection[int],
                    device: torch.device) -> bool:  # fmt: skip
    """Whether all inputs are tensors of fixed shapes on `device` (None: not), and those to copy are small."""
    moved = 0
    for number, one in enumerate(shapes):
        if one is None or one[2] != device:
            return False
        if number not in fixed:
            moved += torch.Size(one[0]).numel() * one[1].itemsize
    return moved <= MOST_MOVED
