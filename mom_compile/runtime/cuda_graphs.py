"""A piece of a decode step as a CUDA graph: recorded once, replayed for each token. IT HAS NEVER RUN ON A GPU.

A step of one token has little to compute: a layer's kernels take less than their launches, some 35 microseconds with a
replay in place of 120. Between two attentions a piece has the same shapes in every step, and its weights lie where they
lay. So

    fixed inputs    weights, read where they are: as long as their addresses are those that were recorded
    moving inputs   all others, copied to where the graph reads them: `[B, 1, hidden]` and smaller
    results         written to the same place each time, so they hold until the piece runs again. Those that outlive the
                    program's run, or that another stream may still read then, are copied

    the first `WARM_UP` runs                        as ever: kernels are tuned, libraries make their handles
    the next, and whenever a weight has moved       copy what moves, record, replay
    any other                                       copy what moves, replay
    another thread's, or after a failure to record  as ever

What is not of one shape, attention and the cache's rows that grow, stays outside: those are other steps of the program.
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

#: Runs before a piece is recorded.
WARM_UP = 2
#: Bytes of moving inputs beyond which a copy of them is no small thing: a weight that is fetched, keys of a cache.
MOST_MOVED = 1 << 20

Run = Callable[[list[Any]], Sequence[Any]]


@dataclass(frozen=True)
class Recorded:
    """A graph: `replay` computes `results` of `inputs`, all of them where they were when it was recorded."""

    replay: Callable[[], None]
    inputs: tuple[torch.Tensor, ...]
    results: tuple[Any, ...]


#: Records `run(inputs)`.
Record = Callable[[Run, list[Any]], Recorded]


def record_on_cuda(run: Run, inputs: list[Any]) -> Recorded:
    """By the current device's stream. Nothing is computed meanwhile. Threads that copy may call CUDA beside it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=_pool(), capture_error_mode="thread_local"):
        results = run(list(inputs))
    return Recorded(graph.replay, tuple(inputs), tuple(results))


@functools.cache
def _pool() -> Any:
    """One for all graphs: of a program they are replayed one after the other, and their results stay theirs."""
    return torch.cuda.graph_pool_handle()


#: By type of device.
RECORDS: dict[str, Record] = {"cuda": record_on_cuda}


@dataclass(eq=False)
class Replayed:
    """Runs a piece whose inputs have fixed shapes. `fixed` numbers the inputs that are weights, `copied` the results
    that hold longer than until the next run. It is pickled without what it has recorded."""

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
            log.warning("a piece cannot be recorded as a CUDA graph, and runs without: %s", error)
            return
        self.addresses, self.thread = addresses, threading.get_ident()

    def __getstate__(self) -> dict[str, Any]:
        return {"run": self.run, "device": self.device, "fixed": self.fixed, "copied": self.copied}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


def like(given: torch.Tensor) -> torch.Tensor:
    """A tensor of its own with the shape, strides and values of another."""
    own = torch.empty_strided(given.shape, given.stride(), dtype=given.dtype, device=given.device)
    return own.copy_(given)


def may_be_recorded(shapes: Sequence[tuple[Sequence[int], torch.dtype, torch.device] | None], fixed: Collection[int],
                    device: torch.device) -> bool:  # fmt: skip
    """Whether inputs are tensors of fixed shapes on one device (None: another), and those that move are small."""
    moved = 0
    for number, one in enumerate(shapes):
        if one is None or one[2] != device:
            return False
        if number not in fixed:
            moved += torch.Size(one[0]).numel() * one[1].itemsize
    return moved <= MOST_MOVED
