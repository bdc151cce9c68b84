"""What a model is asked in its life: turns, packed prompts, hidden states, embeddings, autocast, threads.

Each compared with eager mode in float64, with every graph in loops that is worth it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import mom_compile
from benchmarks.architectures_worker import everything_in_float64
from tests.models import SMALL, ids, next_token, prompt, small_model, sweep

TOKENS = 70
KINDS = sweep(["Llama", "Gemma3Text", "Mixtral", "GPTNeoX"], quick=["Llama"])
#: Of any logit. Mixtral's router computes its softmax in float32, whatever the model's dtype.
BOUND = {"Mixtral": 1e-6}
OPTIONS = {"strict": True, "mini_seq_len": 16}


def compiled_model(family: str, dtype: torch.dtype = torch.float64, **compiling: Any) -> tuple[Any, Callable[..., Any]]:
    """A model that runs by mom when called, and its eager `forward`."""
    model = small_model(family, dtype)
    model.compile(backend="mom", options=OPTIONS, **compiling)
    return model, model.forward


def assert_close(actual: torch.Tensor, expected: torch.Tensor, family: str = "") -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=BOUND.get(family, 1e-9))


def loops() -> list[int]:
    """How many loops each graph has that was compiled so far."""
    return [len(report.stages) for report in mom_compile.reports()]


@pytest.fixture(autouse=True)
def pieces(eager_pieces: None, stock_is_eager: None) -> Iterator[None]:
    """Inductor's code is tested elsewhere."""
    with everything_in_float64():
        yield


@pytest.mark.parametrize("family", KINDS)
def test_a_prompt_goes_on_where_a_cache_ends(family: str) -> None:
    """Three turns of different lengths, and a token after each."""
    model, eager = compiled_model(family)
    caches = DynamicCache(config=model.config), DynamicCache(config=model.config)
    for turn, tokens in enumerate((TOKENS, 37, 52)):
        inputs = prompt(2, tokens, seed=turn)
        for more in (inputs, next_token(inputs, seed=20 + turn)):
            with torch.no_grad():
                actual, expected = (
                    run(**more, past_key_values=c).logits for run, c in zip((model, eager), caches, strict=True)
                )
            assert_close(actual, expected, family)
    assert sum(n > 0 for n in loops()) >= 2  # the first turn, and one that goes on


@pytest.mark.parametrize("family", KINDS)
def test_packed_prompts_are_apart(family: str) -> None:
    """Positions that begin anew: each prompt is as it is alone."""
    model, eager = compiled_model(family)
    lengths = (23, 40, 7)
    packed = ids(1, sum(lengths), vocabulary=SMALL.vocabulary)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    with torch.no_grad():
        actual = model(input_ids=packed, position_ids=positions, use_cache=False).logits
        assert_close(actual, eager(input_ids=packed, position_ids=positions, use_cache=False).logits, family)
        alone = [eager(input_ids=part, use_cache=False).logits for part in packed.split(lengths, 1)]
    if family != "GPTNeoX":  # Hugging Face's own does not tell them apart
        assert_close(actual, torch.cat(alone, 1), family)
    assert loops()[0] > 0


@pytest.mark.parametrize("family", KINDS)
def test_hidden_states_of_every_layer_are_returned(family: str) -> None:
    model, eager = compiled_model(family)
    inputs = prompt(2, TOKENS, padded=True)
    with torch.no_grad():
        actual = model(**inputs, output_hidden_states=True).hidden_states
        expected = eager(**inputs, output_hidden_states=True).hidden_states
    assert len(actual) == model.config.num_hidden_layers + 1
    for a, b in zip(actual, expected, strict=True):
        assert_close(a, b, family)
    assert loops()[0] > 0
    first = actual[0].clone()
    with torch.no_grad():
        model(**prompt(2, TOKENS, seed=5), output_hidden_states=True)
    assert torch.equal(actual[0], first)  # they are the caller's own


@pytest.mark.parametrize("family", KINDS)
def test_embeddings_in_place_of_tokens(family: str) -> None:
    model, eager = compiled_model(family)
    for tokens in (TOKENS, 45):
        embedded = torch.randn(2, tokens, SMALL.width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            actual, expected = model(inputs_embeds=embedded), eager(inputs_embeds=embedded)
        assert_close(actual.logits, expected.logits, family)
    assert all(n > 0 for n in loops())


@pytest.mark.parametrize("family", KINDS)
def test_autocast(family: str) -> None:
    """bfloat16 products over float32 weights, as near to float64 as eager mode is."""
    model, eager = compiled_model(family, torch.float32)
    exact = small_model(family, torch.float64)
    inputs = prompt(2, TOKENS, padded=True)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            actual, expected = model(**inputs).logits, eager(**inputs).logits
        wanted = exact(**inputs).logits
    seen = inputs["attention_mask"].bool()
    off, eagerly_off = ((logits[seen].double() - wanted[seen]).abs().max() for logits in (actual, expected))
    assert actual.dtype == expected.dtype
    assert off <= 2 * eagerly_off, (off, eagerly_off)
    assert loops()[0] > 0


@pytest.mark.parametrize("family", KINDS)
def test_sizes_that_are_symbols_from_the_start(family: str) -> None:
    model, eager = compiled_model(family, dynamic=True)
    for batch, tokens in ((2, TOKENS), (1, 45), (3, 33), (2, 17)):
        inputs = prompt(batch, tokens, padded=True)
        with torch.no_grad():
            actual, expected = model(**inputs), eager(**inputs)
        seen = inputs["attention_mask"].bool()
        assert_close(actual.logits[seen], expected.logits[seen], family)
    assert loops() and all(n > 0 for n in loops())


def test_two_threads_call_one_model() -> None:
    """Each with prompts of its own, of lengths that are compiled already and some that are not."""
    model, eager = compiled_model("Llama")
    failures: list[BaseException] = []

    def ask(seed: int) -> None:
        try:
            for tokens in (TOKENS, 41, 64, 41, TOKENS):
                inputs = prompt(2, tokens, seed=seed)
                with torch.no_grad():
                    assert_close(model(**inputs).logits, eager(**inputs).logits)
        except BaseException as failure:
            failures.append(failure)

    with torch.no_grad():
        model(**prompt(2, TOKENS))
    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not any(thread.is_alive() for thread in threads)
    assert not failures, failures
    assert all(n > 0 for n in loops())
