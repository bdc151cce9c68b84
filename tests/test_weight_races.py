"""Late copies of weights, alongside keys and values in both queues, never change results. Without waits they do."""

from __future__ import annotations

import contextlib
import functools
import gc
import random
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import fx, nn
from transformers import DynamicCache

from benchmarks.models import keeping
from benchmarks.without_codegen import pieces_run_eagerly
from mom_compile.runtime import copy_steps
from mom_compile.runtime.host.engine import ThreadTicket
from mom_compile.runtime.host.engines import engine_for
from mom_compile.runtime.host.weight import HostWeight
from mom_compile.runtime.program import Step, observing
from mom_compile.weights import OffloadedWeights, offload_weights
from mom_passes.program import slots
from tests.models import tiny

CPU = torch.device("cpu")
LAYERS = 4

pytestmark = pytest.mark.shared_graphs


@pytest.fixture(scope="module", autouse=True)
def _eager_pieces() -> Iterator[None]:
    """Shared by all tests, as several use the same compiled code."""
    with pieces_run_eagerly():
        yield


@dataclass(frozen=True)
class Story:
    """A prompt, then new tokens in portions."""

    prompt: int
    portions: tuple[int, ...]
    seed: int


def stories(counts: Sequence[int]) -> st.SearchStrategy[Story]:
    portions = st.lists(st.sampled_from(counts), min_size=1, max_size=2).map(tuple)
    return st.builds(Story, prompt=st.integers(17, 60), portions=portions, seed=st.integers(0, 1 << 16))


def model() -> nn.Module:
    return tiny("Llama", max_position_embeddings=256, num_hidden_layers=LAYERS).double()


@functools.cache
def eager_model() -> nn.Module:
    return model()


def offloaded(made: nn.Module) -> OffloadedWeights:
    """Offload with the smallest budget: all layers."""
    with pytest.raises(ValueError, match="the smallest budget is") as refused:
        offload_weights(made, CPU, memory_budget=1)
    least = int(str(refused.value).split("the smallest budget is ")[1].split()[0])
    done = offload_weights(made, CPU, memory_budget=least)
    assert sum(isinstance(parameter, HostWeight) for parameter in made.parameters()) >= 7 * LAYERS
    return done


def compiled_model(kv_offload: bool = True) -> nn.Module:
    made = model()
    offloaded(made)
    compile_it(made, kv_offload)
    return made


def compile_it(made: nn.Module, kv_offload: bool = True) -> None:
    made.compile(backend="mom", dynamic=True, options={"kv_offload": kv_offload, "mini_seq_len": 16, "strict": True})


@torch.no_grad()
def tell(model: nn.Module, story: Story) -> list[torch.Tensor]:
    """Logits after the prompt and after each portion."""
    generator = torch.Generator().manual_seed(story.seed)
    cache, logits = DynamicCache(), []
    for count in (story.prompt, *story.portions):
        ids = torch.randint(3, 64, (2, count), generator=generator)
        logits.append(model(ids, **keeping(cache, model), logits_to_keep=1).logits)
    return logits


def differs(model: nn.Module, story: Story) -> bool:
    pairs = zip(tell(model, story), tell(eager_model(), story), strict=True)
    return any(not torch.allclose(a, b, rtol=0, atol=1e-10) for a, b in pairs)


class Delays:
    """Seconds before each copy, in either queue: mostly none, seldom longer than several layers take."""

    def __init__(self, seed: int, scale: float = 1.0) -> None:
        self.random, self.scale = random.Random(seed), scale
        #: By queue.
        self.asked: dict[str, int] = {}

    def __call__(self) -> float:
        name = threading.current_thread().name
        self.asked[name] = self.asked.get(name, 0) + 1
        at = self.random.random()
        return self.scale * (0.004 if at < 0.01 else 0.0005 if at < 0.06 else 0.0)


@contextlib.contextmanager
def delayed(delays: Delays) -> Iterator[Delays]:
    engine = engine_for(CPU)
    engine.delay = delays
    try:
        yield delays
    finally:
        engine.delay = None


@pytest.fixture(scope="module")
def compiled(_eager_pieces: None) -> nn.Module:
    return compiled_model()


@pytest.mark.parametrize(
    ("runs", "counts"), [(6, (1,)), pytest.param(1000, (1, 1, 1, 2, 3), marks=pytest.mark.slow)], ids=("few", "many")
)
def test_random_delays_in_both_queues_change_nothing(compiled: nn.Module, runs: int, counts: Sequence[int]) -> None:
    @settings(max_examples=runs, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(stories(counts))
    def same(story: Story) -> None:
        assert not differs(compiled, story)

    with delayed(Delays(0)) as delays:
        same()
    assert delays.asked["mom-copies-to-device"] > runs * 2 * 7 * LAYERS
    assert delays.asked["mom-copies-to-host"] > runs * 2 * 2 * LAYERS


# --- results without waits ---

NOTICES = [Story(random.Random(i).randint(17, 60), (1,), i) for i in range(8)]


def goes_wrong(made: nn.Module, stories: Sequence[Story] = NOTICES) -> bool:
    with delayed(Delays(1, scale=5)):
        return any(differs(made, story) for story in stories)


def test_without_waits_for_copies_results_are_wrong(
    compiled: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not goes_wrong(compiled)
    monkeypatch.setattr(ThreadTicket, "wait", lambda self: None)
    assert goes_wrong(compiled)


@pytest.mark.slow
def test_without_waits_for_weights_results_are_wrong(compiled: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    wait = copy_steps.FetchWait.__call__

    def for_rows_alone(self: copy_steps.FetchWait, arguments: list[Any]) -> tuple[torch.Tensor]:
        return wait(self, arguments) if arguments[0].buffer.dim() > 2 else (arguments[0].buffer,)

    monkeypatch.setattr(copy_steps.FetchWait, "__call__", for_rows_alone)
    assert goes_wrong(compiled)


def test_reusing_a_slot_one_layer_early_gives_wrong_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """The copies for the next layer then overwrite the buffers that this layer reads."""
    taken = []

    def too_early(start: fx.Node) -> fx.Node:
        taken.append(start)
        return start

    monkeypatch.setattr(slots, "_last_reader", too_early)
    made = compiled_model(kv_offload=False)
    assert goes_wrong(made, [Story(story.prompt, (), story.seed) for story in NOTICES])
    assert len(taken) >= 7 * LAYERS


# --- several threads and models ---


def in_threads(*work: functools.partial[bool]) -> list[bool]:
    """Return the results of concurrent calls."""
    found: dict[int, bool] = {}
    start = threading.Barrier(len(work))

    def run(number: int) -> None:
        start.wait(20)
        found[number] = work[number]()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return [found[number] for number in range(len(work))]


def wrong_at_all(made: nn.Module, first: int) -> bool:
    return any(differs(made, story) for story in NOTICES[first::2])


def test_two_threads_run_one_model(compiled: nn.Module) -> None:
    assert not differs(compiled, NOTICES[0])
    with delayed(Delays(2)):
        assert in_threads(*(functools.partial(wrong_at_all, compiled, first) for first in range(2))) == [False, False]


@pytest.mark.slow
def test_two_threads_run_two_models_with_shared_weights(compiled: nn.Module) -> None:
    """The tensors share storages, so they have the same holders."""
    second = model()
    for own, shared in zip(second.parameters(), compiled.parameters(), strict=True):
        own.data = shared.host if isinstance(shared, HostWeight) else shared.data
    offloaded(second)
    leases = [{p.lease for p in made.parameters() if isinstance(p, HostWeight)} for made in (compiled, second)]
    assert leases[0] == leases[1]
    leases.clear()
    compile_it(second)
    assert not differs(second, NOTICES[0])
    with delayed(Delays(3)):
        work = [functools.partial(wrong_at_all, made, first) for first, made in enumerate((compiled, second))]
        assert in_threads(*work) == [False, False]
    del second, work, own, shared
    gc.collect()
    assert not differs(compiled, NOTICES[1])


def test_the_tested_program_reuses_slots(compiled: nn.Module) -> None:
    """Otherwise the tests above would not cover slots."""
    fetches: list[int] = []

    def note(step: Step, results: Any) -> None:
        if isinstance(step.run, copy_steps.FetchStart) and results[0].buffer.dim() == 2:
            fetches.append(len(step.arguments))

    with observing(note):
        assert not differs(compiled, Story(40, (), 0))
    assert len(fetches) >= 7 * LAYERS
    assert fetches.count(3) >= 7 * (LAYERS - 2)  # `over` a buffer
