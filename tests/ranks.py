"""Functions that run on several ranks, each a process in one gloo group, for tests of collectives.

The ranks are forked from a server that has imported PyTorch and transformers, so that starting them takes no import.
"""

from __future__ import annotations

import datetime
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

#: What a rank may have imported when it starts.
IMPORTED = [
    "torch",
    "torch._inductor.compile_fx",
    "torch.distributed.tensor",
    "transformers",
    "tests.kernel_batches",
    "tests.ranks",
]


class RankFailed(AssertionError):
    """A rank raised, ended without an answer, or took too long."""


def run_ranks(
    function: Callable[..., Any], ranks: int, *given: Any, seconds: float = 240, timeout: float = 60
) -> list[Any]:
    """Return what `function(rank, *given)` returns on each rank.

    Parameters
    ----------
    function
        A function of a module. Its result must be picklable.
    seconds
        After so many seconds the ranks are killed.
    timeout
        Seconds that a collective waits for other ranks.

    Raises
    ------
    RankFailed
        If a rank raises, ends without a result, or takes longer.
    """
    answers = start_ranks(function, ranks, *given, timeout=timeout).answers(seconds)
    failed = {rank: answer for rank, answer in answers.items() if isinstance(answer, Failure)}
    if failed:
        raise RankFailed("\n".join(f"rank {rank}: {failure}" for rank, failure in failed.items()))
    return [answers[rank] for rank in range(ranks)]


class Failure(str):
    """The traceback of a rank that raised, or why there is no answer."""


class Ranks:
    """Running ranks."""

    def __init__(self, processes: dict[int, Any], pipes: dict[int, Connection], folder: Any) -> None:
        self.processes, self.pipes, self._folder = processes, pipes, folder

    def answers(self, seconds: float) -> dict[int, Any]:
        """Wait for all ranks. Return for each its result, or a `Failure`. Kills ranks that take longer."""
        ends, found = time.monotonic() + seconds, {}
        left = dict(self.pipes)
        while left and time.monotonic() < ends:
            ready = wait(list(left.values()), timeout=max(0.0, ends - time.monotonic()))
            for rank, pipe in list(left.items()):
                if pipe in ready:
                    del left[rank]
                    try:
                        found[rank] = pipe.recv()
                    except EOFError:
                        found[rank] = Failure("ended without an answer")
        for rank in left:
            found[rank] = Failure(f"no answer after {seconds} s")
        for rank, process in self.processes.items():
            if rank in left:
                process.kill()
            process.join(20)
        self._folder.cleanup()
        return found


def start_ranks(function: Callable[..., Any], ranks: int, *given: Any, timeout: float = 60) -> Ranks:
    """Start `function(rank, *given)` on each rank."""
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    folder = tempfile.TemporaryDirectory(prefix="mom_compile_ranks_")
    processes, pipes = {}, {}
    for rank in range(ranks):
        ours, theirs = context.Pipe(duplex=False)
        arguments = (theirs, function, rank, ranks, os.path.join(folder.name, "store"), timeout, given)
        processes[rank] = context.Process(target=_run, args=arguments, daemon=True)
        processes[rank].start()
        theirs.close()
        pipes[rank] = ours
    return Ranks(processes, pipes, folder)


def _run(
    answer: Connection,
    function: Callable[..., Any],
    rank: int,
    ranks: int,
    store: str,
    timeout: float,
    given: tuple[Any, ...],
) -> None:
    import torch
    import torch.distributed as dist

    from tests import kernel_batches

    kernel_batches.install()
    try:
        torch.set_num_threads(1)
        # As torchrun sets them; transformers shards a model only where it finds them.
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        within = datetime.timedelta(seconds=timeout)
        dist.init_process_group("gloo", store=dist.FileStore(store, ranks), rank=rank, world_size=ranks, timeout=within)
        result = function(rank, *given)
    except BaseException:
        result = Failure(traceback.format_exc())
    answer.send(result)
    answer.close()
    os._exit(0)  # no destructor of a group waits for other ranks
