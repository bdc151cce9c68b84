"""Shared set-up: `gpu` tests are skipped where there is no CUDA device; every test starts with nothing compiled."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from benchmarks.without_codegen import pieces_run_eagerly, stock_runs_eagerly
from tests import kernel_batches

os.environ.setdefault("MOM_COMPILE_PROGRESS", "0")  # tests of the progress lines turn them on

# With a handler on this logger torch records every symbolic decision with its stack, a tenth of the time of a trace.
# Its own handler goes by itself; pytest puts its own on all loggers that do not propagate.
logging.getLogger("torch.__trace").propagate = True

# A graph that an earlier test, or an earlier run, has compiled would be read from the disk: tests compile theirs.
torch._functorch.config.enable_autograd_cache = False

# One run of g++ per graph in place of one per kernel.
kernel_batches.install()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


def pytest_collection_finish() -> None:
    """What imports have made is there for good: no test's `gc.collect()` need look at it again. And to look every 700
    objects takes a tenth of the time of a trace."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(200_000, 20, 50)


@pytest.fixture(autouse=True)
def nothing_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Forget the graphs of a test behind it, since Dynamo counts them by code object, which tests share. Collect its
    garbage, and keep what outlives it out of the `gc.collect()` of later tests."""
    yield
    if request.node.get_closest_marker("shared_graphs") is None:
        torch._dynamo.reset()
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def graphs_of_a_module(request: pytest.FixtureRequest) -> Iterator[None]:
    """Keep graphs between the tests of a module that is marked `shared_graphs`.

    A code object may have as many graphs as its tests need. One more is an error: Dynamo would run it in eager mode.
    """
    if request.node.get_closest_marker("shared_graphs") is None:
        yield
        return
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True):
        yield
    torch._dynamo.reset()


@pytest.fixture
def eager_pieces() -> Iterator[None]:
    """Run pieces eagerly: everything but Inductor's code generation, in a fraction of the time.

    What compiled code would rely on is checked: every input is as its template says.
    """

    with pieces_run_eagerly():
        yield


@pytest.fixture
def stock_is_eager() -> Iterator[None]:
    """Run eagerly what goes to stock Inductor."""

    with stock_runs_eagerly():
        yield


@pytest.fixture
def one_rank() -> Iterator[None]:
    """A process group of one rank: its collectives return what they are given."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
