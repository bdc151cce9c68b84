"""The real copy engine on simulated streams: correct however late copies run, incorrect without any of its waits."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from benchmarks.models import keeping
from mom_compile import HostTensor
from mom_compile.memory import decide
from mom_compile.runtime.copy_steps import FetchWait
from mom_compile.runtime.host import bounce, weight_bytes
from mom_compile.runtime.host.placement import Placement
from mom_compile.runtime.host.store import empty_host_pool
from tests.models import tiny
from tests.no_gpu.sabotage import Cut, cuts
from tests.no_gpu.stories import STORIES, Story, offload, tell, values
from tests.no_gpu.streams import CPU, Found, Schedule, Simulation, at_times, latest
from tests.no_gpu.weight_stories import (
    WEIGHT_STORIES,
    a_slot_is_read_before_its_copy_is_done,
    a_slot_is_taken_too_early,
    a_slot_is_taken_while_another_stream_reads_it,
)

#: Waits that these streams do not need, with the reason.
ELSEWHERE = {
    "copy_steps._fetch: settle(host)": "where the host's memory is the device's: tests/test_kv_races.py",
    "tensor._copied: source.settled()": "likewise: tests/test_host_tensor.py",
    "store.empty_host_pool: region.abandon()": "unpinning waits for the whole device; memory of another kind needs it",
}
EVERY = (*STORIES, *WEIGHT_STORIES)
ORDERS = st.lists(st.booleans(), max_size=40)


@pytest.mark.parametrize("story", EVERY, ids=lambda story: story.__name__)
def test_results_are_correct_if_copies_run_as_late_as_their_waits_allow(story: Story) -> None:
    tell(story, Simulation(latest))


def at_random() -> Iterator[Any]:
    """Each story. Stories of files that also exist in memory are marked slow."""
    for story in EVERY:
        twin = story.__name__.removesuffix("_in_files")
        has_twin = twin != story.__name__ and any(other.__name__ == twin for other in EVERY)
        yield pytest.param(story, marks=[pytest.mark.slow] if has_twin else [], id=story.__name__)


@pytest.mark.parametrize("story", list(at_random()))
def test_results_are_correct_whenever_copies_run(story: Story) -> None:
    @settings(max_examples=5, deadline=None, derandomize=True, database=None)
    @given(ORDERS)
    def at(order: list[bool]) -> None:
        tell(story, Simulation(at_times(order)))

    at()


#: Waits whose removal only late stories show: these stories run first, since reaching them takes seconds.
SHOWS_IN = {
    "engine_cuda.StreamTicket.wait: reader.wait_event(self.done.event)": "another_stream_computes",
    "engine_cuda.CudaEngine.begin: after.synchronize()": "rows_come_from_another_kind_of_device",
    "engine_cuda.CudaEngine.settle: one.done.finish()": "a_program_fails",
    "engine_cuda._gathered: after.synchronize()": "rows_across_seams",
    "engine_cuda.pin_for: torch.cuda.synchronize(device)": "memory_is_unpinned",
    "bounce.FileDone.finish: self.task.wait()": "a_program_fails_in_files",
    "bounce.FileDone.finish: self.event.synchronize()": "a_program_fails_in_files",
    "copy_steps.Append._fork: settle(host)": "rows_arrive_while_others_of_them_leave",
    "copy_steps._fetch_rows: engine.to_device(target, chosen, None).wait()": "rows_of_a_table_are_brought",
    "copy_steps._fetch_chosen: ticket.wait()": "matrices_of_chosen_experts_are_brought",
    "store._region: region.abandon()": "rows_of_a_dead_cache_are_the_next_ones",
    "region.HostRegion.abandon: self.wait()": "rows_of_a_dead_cache_are_the_next_ones",
    "weight_bytes.WeightRegion.wait: read.synchronize()": "a_weight_is_written",
    "tensor.HostTensor.__repr__: self.settled()": "the_host_reads",
    "tensor.HostTensor.__reduce_ex__: self.settled()": "the_host_reads",
    "tensor._to_host: value.settled()": "the_host_reads",
    "tensor_points.TensorPoints.tolist: self.settled()": "the_host_reads",
    "tensor_points.TensorPoints.__format__: self.settled()": "the_host_reads",
    "tensor._write: value.settled()": "the_host_writes",
    "program.Program.__call__: self.finish()": "a_program_fails",
}


def caught(cut: Cut) -> str | None:
    """The first story that goes wrong. Those of files are told first where the wait is one for files, and those of
    weights where it is one for weights; before these the one that is known to show it."""
    of_files = cut.module is bounce or cut.function.startswith("FileTicket")
    of_weights = cut.module is weight_bytes or cut.function.startswith(("_fetch_", "WeightRegion"))

    def unlikely(story: Story) -> tuple[bool, bool, bool]:
        return (
            SHOWS_IN.get(str(cut)) != story.__name__,
            story.__name__.endswith("_in_files") != of_files,
            (story in WEIGHT_STORIES) != of_weights,
        )

    for story in sorted(EVERY, key=unlikely):
        try:
            tell(story, Simulation(latest))
        except AssertionError:
            return story.__name__
    return None


#: For waits that are not needed, every story runs.
CUTS = [pytest.param(cut, marks=[pytest.mark.slow] if str(cut) in ELSEWHERE else [], id=str(cut)) for cut in cuts()]


@pytest.mark.parametrize("cut", CUTS)
def test_removing_any_wait_breaks_some_story(cut: Cut) -> None:
    with cut.made():
        assert (caught(cut) is None) == (str(cut) in ELSEWHERE)


def test_the_list_of_unneeded_waits_matches_the_code() -> None:
    assert ELSEWHERE.keys() | SHOWS_IN.keys() <= {str(cut) for cut in cuts()}
    assert set(SHOWS_IN.values()) <= {story.__name__ for story in EVERY}
    assert len(cuts()) > 20


# --- errors that the simulation finds ---


def unordered(sim: Simulation) -> None:
    x = torch.ones(4)
    with torch.cuda.stream(sim.stream()):
        x.mul_(2)


def read_by_another_thread(sim: Simulation) -> None:
    host = offload(sim, values(5))
    sim.thread(host.settled).join()
    sim.thread(lambda: sim.expect(host.host, values(5), by_host=True))  # it has no order with the agent that has waited
    sim.thread_clock.clear()
    sim.expect(host.host, values(5), by_host=True)


def source_freed(sim: Simulation) -> None:
    x, y = torch.ones(4), torch.empty(4)
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.current_stream().wait_stream(sim.default)
        y.copy_(x, non_blocking=True)
    del x
    sim.synchronize()


def target_reused(sim: Simulation) -> None:
    """Freed to a stream that knows of the copy, but not of the computation that reads the copied values."""
    x, other = torch.ones(4), sim.stream()
    other.wait_stream(sim.default)
    with torch.cuda.stream(other):
        y = x + 1
    del x, y


def unset_memory(sim: Simulation) -> None:
    sim.expect(torch.empty(4), torch.zeros(4))


@pytest.mark.parametrize(
    ("wrong", "seen"),
    [
        (unordered, "does not wait for"),
        (read_by_another_thread, "does not wait for a copy"),
        (source_freed, "the source of a copy was freed before it ran"),
        (target_reused, "memory is freed, and nothing has waited for"),
        (unset_memory, "not what it should be"),
        (a_slot_is_taken_too_early, "does not wait for a copy"),
        (a_slot_is_read_before_its_copy_is_done, "does not wait for a copy"),
        (a_slot_is_taken_while_another_stream_reads_it, "a copy .* does not wait for aten.mul"),
    ],
)
def test_the_simulation_finds_errors(wrong: Callable[[Simulation], None], seen: str) -> None:
    with pytest.raises(Found, match=seen):
        tell(wrong, Simulation(latest))


def test_events_order_streams() -> None:
    with Simulation(latest) as sim:
        x, other = torch.ones(4), sim.stream()
        other.wait_stream(sim.default)
        with torch.cuda.stream(other):
            x.mul_(2)
        sim.default.wait_stream(other)
        x.mul_(2)


# --- a whole model ---


class StreamLog:
    """A model and its cache, in successive simulations. Compiled code is kept and pins memory in the present one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sim: Simulation | None = None
        monkeypatch.setattr(decide, "placement_of", lambda options, device: Placement(pin=self.pin))
        self.reference = self.model()
        self.compiled = self.model()
        options = {"kv_offload": True, "mini_seq_len": 16, "strict": True}
        self.compiled.compile(backend="mom", dynamic=True, options=options)

    @staticmethod
    def model() -> torch.nn.Module:
        return tiny("Llama", max_position_embeddings=256, num_hidden_layers=3).double()

    def pin(self, address: int, size: int) -> Callable[[], None]:
        assert self.sim is not None
        return self.sim.pin(address, size)

    def under(self, schedule: Schedule, check: Callable[[list[torch.Tensor], list[torch.Tensor]], None]) -> None:
        gc.collect()
        empty_host_pool()
        expected, _ = self.tell(self.reference)
        with Simulation(schedule, everything=False) as self.sim:
            try:
                got, cache = self.tell(self.compiled)
                assert all(isinstance(layer.keys, HostTensor) for layer in cache.layers)
                assert not self.sim.engine.abandoned
                assert len(self.sim.runtime.ranges) >= 2 * len(cache.layers)
                check(got, expected)
            finally:
                cache = None
                gc.collect()
                empty_host_pool()

    @torch.no_grad()
    def tell(self, model: torch.nn.Module) -> tuple[list[torch.Tensor], DynamicCache]:
        """Logits after a prompt of 40 tokens and after a few more, two of which are removed again."""
        generator, cache, logits = torch.Generator().manual_seed(3), DynamicCache(), []
        for step, count in enumerate((40, 1, 1, 1, 1)):
            if step == 3:
                cache.crop(-2)
            ids = torch.randint(3, 64, (2, count), generator=generator)
            logits.append(model(ids, **keeping(cache, model), logits_to_keep=1).logits)
        return logits, cache


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, eager_pieces: None) -> Iterator[StreamLog]:
    with torch._dynamo.config.patch(recompile_limit=32):
        yield StreamLog(monkeypatch)


def same(got: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


@pytest.mark.slow
def test_a_models_cache_is_correct_however_late_copies_run_and_not_without_waits(told: StreamLog) -> None:
    told.under(latest, same)

    @settings(max_examples=5, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(ORDERS)
    def at(order: list[bool]) -> None:
        told.under(at_times(order), same)

    at()
    (forgotten,) = (cut for cut in cuts() if cut.function == f"{FetchWait.__name__}.__call__")
    with forgotten.made(), pytest.raises(Found, match="does not wait for a copy"):
        told.under(latest, lambda got, expected: None)


def test_the_cpu_engine_is_restored_after_a_simulation() -> None:
    from mom_compile.runtime.host.engines import engine_for

    with Simulation() as sim:
        assert engine_for(CPU) is sim.engine
    assert engine_for(CPU) is not sim.engine
