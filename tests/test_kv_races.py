"""Delayed copies do not change results; without the waits for them they do."""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from benchmarks.models import keeping
from mom_compile import HostTensor
from mom_compile.runtime.host.engine import ThreadTicket
from mom_compile.runtime.host.engines import engine_for
from tests.models import tiny
from tests.shares import some_and_many

CPU = torch.device("cpu")
#: One or more new rows, with a past of none, one or more rows: many graphs, which both tests need.
pytestmark = [pytest.mark.usefixtures("eager_pieces"), pytest.mark.shared_graphs]


@dataclass(frozen=True)
class Story:
    """A prompt, then new tokens in portions; before a portion some of the cache's last tokens may be cropped."""

    prompt: int
    batch: int
    portions: tuple[tuple[int, int], ...]
    seed: int


stories = st.builds(
    Story,
    prompt=st.integers(3, 60),
    batch=st.just(2),
    portions=st.lists(st.tuples(st.sampled_from([1, 1, 1, 2, 3]), st.sampled_from([0, 0, 0, 1, 2])), max_size=4).map(
        tuple
    ),
    seed=st.integers(0, 1 << 16),
)


@functools.cache
def eager_model():
    return tiny("Llama", max_position_embeddings=256).double()


@functools.cache
def compiled_model():
    model = tiny("Llama", max_position_embeddings=256).double()
    model.compile(backend="mom", dynamic=True, options={"kv_offload": True, "mini_seq_len": 16, "strict": True})
    return model


@torch.no_grad()
def tell(model, story: Story) -> tuple[list[torch.Tensor], DynamicCache]:
    """Logits after the prompt and after each portion."""
    generator = torch.Generator().manual_seed(story.seed)
    cache = DynamicCache()
    logits = []
    for count, lost in [(story.prompt, 0), *story.portions]:
        lost = min(lost, cache.get_seq_length() - 1)
        if lost > 0:
            cache.crop(-lost)
        ids = torch.randint(3, 64, (story.batch, count), generator=generator)
        logits.append(model(ids, **keeping(cache, model), logits_to_keep=1).logits)
    return logits, cache


class Delays:
    """Seconds before each copy: mostly none, sometimes longer than a whole forward pass."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def __call__(self) -> float:
        return self.random.choice([0.0, 0.0, 0.0, 0.001, 0.02])


def differs(model, story: Story) -> bool:
    expected, plain = tell(eager_model(), story)
    got, cache = tell(model, story)
    pairs = list(zip(got, expected, strict=True))
    for mine, reference in zip(cache.layers, plain.layers, strict=True):
        assert isinstance(mine.keys, HostTensor)
        pairs += [(mine.keys.fetch(), reference.keys), (mine.values.fetch(), reference.values)]
    return any(not torch.allclose(a, b, rtol=0, atol=1e-10) for a, b in pairs)


@pytest.fixture
def slow_copies():
    engine = engine_for(CPU)
    engine.delay = Delays(0)
    yield
    engine.delay = None


@some_and_many(8, 1000)
def test_random_delays_in_every_copy_change_nothing(slow_copies, runs):
    model = compiled_model()

    @settings(max_examples=runs, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(stories)
    def same(story):
        assert not differs(model, story)

    same()


def test_without_waits_for_copies_results_are_wrong(slow_copies, monkeypatch):
    model = compiled_model()
    monkeypatch.setattr(ThreadTicket, "wait", lambda self: None)
    rng = random.Random(0)
    stories = [Story(rng.randint(3, 60), 2, ((1, 0), (1, 0)), seed) for seed in range(20)]
    assert any(differs(model, story) for story in stories)
