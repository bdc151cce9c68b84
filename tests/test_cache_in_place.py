"""A cache on the device grows in place: no old row is copied, and nobody else sees what a step writes."""

from __future__ import annotations

import copy
import functools
import gc
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from transformers import DynamicCache

from benchmarks import measure
from benchmarks.models import keeping
from mom_compile import reports
from mom_compile.runtime.extend import LEAST, Extend, room_for
from mom_passes.ops.transfers import EXTEND, extend_reference, token_major
from tests.models import ids, small_model, sweep
from tests.shares import random_examples

DIM = 2

pytestmark = pytest.mark.shared_graphs


def rows(count: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """`[B, G, count, D]`, head by head, as eager mode lays them out."""
    return torch.randn(2, 3, count, 4, generator=torch.Generator().manual_seed(seed)).to(dtype)


def extend(past: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    (result,) = Extend(DIM)([past, new])
    return result


def grown(count: int) -> torch.Tensor:
    """A cache with room."""
    return extend(rows(count - 1), rows(1, seed=1))


def place(value: torch.Tensor) -> int:
    return value.untyped_storage().data_ptr()


# --- one tensor ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_rows_are_behind_the_old_ones_token_by_token(dtype: torch.dtype) -> None:
    past, new = rows(5, 0, dtype), rows(2, 1, dtype)
    found, wanted = extend(past, new), extend_reference(past, new, DIM)
    assert torch.equal(found, torch.cat([past, new], DIM))
    assert (found.stride(), found.shape, found.dtype) == (wanted.stride(), wanted.shape, dtype)


def test_rows_laid_out_otherwise_move_once_and_then_stay_where_they_are() -> None:
    past = rows(80)
    before = place(past)
    found = extend(past, rows(1, 1))
    assert place(found) == place(past) != before, "the old tensor moves, so that its rows do not exist twice"
    assert torch.equal(past, rows(80))
    del past
    at, wanted = place(found), found.clone()
    for seed in range(room_for(81)):
        new = rows(1, seed)
        found, wanted = extend(found, new), torch.cat([wanted, new], DIM)
        assert place(found) == at
    assert torch.equal(found, wanted)


def test_a_storage_without_room_grows_and_every_tensor_over_it_keeps_its_rows() -> None:
    """A prefill returns rows that are laid out so, without room."""
    past = token_major([2, 3, 7, 4], DIM, torch.empty(0), torch.device("cpu")).copy_(rows(7))
    storage, before = past.untyped_storage(), past.nbytes
    found = extend(past, rows(1, 1))
    assert found.untyped_storage()._cdata == storage._cdata and storage.nbytes() > before
    assert torch.equal(past, rows(7)) and torch.equal(found, torch.cat([rows(7), rows(1, 1)], DIM))


def test_a_step_allocates_nothing_while_there_is_room() -> None:
    measure.watch_cpu()
    past, new = grown(1000), rows(1, 2)
    peak = measure.peak_bytes(lambda: extend(past, new)).peak
    assert peak < 64 * new.nbytes  # the objects, and no rows


@pytest.mark.gpu
def test_on_a_gpu_a_storage_grows_and_no_other_is_made() -> None:
    past = token_major([1, 8, 5000, 64], DIM, torch.empty(0), torch.device("cuda")).normal_()
    wanted, new = past.clone(), torch.randn(1, 8, 1, 64, device="cuda")
    found = extend(past, new)
    del past
    at = place(found)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.max_memory_allocated()
    for _ in range(LEAST - 1):
        found = extend(found, new)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < wanted.nbytes // 10 and place(found) == at
    assert torch.equal(found[:, :, :5000], wanted) and torch.equal(found[:, :, 5000:], new.expand(-1, -1, LEAST, -1))


@pytest.mark.parametrize("made", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("extended", [torch.no_grad, torch.inference_mode])
def test_a_cache_that_was_made_in_another_mode_grows(made: Callable[[], Any], extended: Callable[[], Any]) -> None:
    for past in (rows(80), token_major([2, 3, 80, 4], DIM, torch.empty(0), torch.device("cpu")).copy_(rows(80))):
        with made():
            past = past.clone()
        with extended():
            found = extend(past, rows(1, 1))
            found = extend(found, rows(1, 2))
        assert torch.equal(found, torch.cat([rows(80), rows(1, 1), rows(1, 2)], DIM)) and torch.equal(past, rows(80))


# --- others who see it ---


def test_of_two_caches_that_share_a_tensor_each_gets_its_own_rows() -> None:
    past = grown(6)
    old = past.clone()
    one = extend(past, rows(1, 2))
    two = extend(past, rows(1, 3))
    assert place(one) == place(past) != place(two)
    assert torch.equal(one, torch.cat([old, rows(1, 2)], DIM)) and torch.equal(two, torch.cat([old, rows(1, 3)], DIM))
    assert torch.equal(past, old)


def test_a_cropped_cache_goes_on_in_place() -> None:
    """Assisted decoding crops a cache behind every round."""
    past = grown(9)
    wanted, at = past[:, :, :6].clone(), place(past)
    past = past[:, :, :6]
    found = extend(past, rows(2, 2))
    assert place(found) == at and torch.equal(found, torch.cat([wanted, rows(2, 2)], DIM))


def test_what_was_cropped_is_not_written_to_while_somebody_has_it() -> None:
    past = grown(9)
    old, cropped = past.clone(), past[:, :, :6]
    found = extend(cropped, rows(2, 2))
    assert place(found) != place(past) and torch.equal(past, old)
    assert torch.equal(found, torch.cat([old[:, :, :6], rows(2, 2)], DIM))


def test_a_window_grows_behind_its_own_rows() -> None:
    past = grown(9)
    wanted = past[:, :, 4:].clone()
    past = past[:, :, 4:]
    found = extend(past, rows(1, 2))
    assert torch.equal(found, torch.cat([wanted, rows(1, 2)], DIM))


def test_a_window_that_moves_on_does_not_keep_what_is_behind_it() -> None:
    past = grown(9)
    for seed in range(4 * LEAST):
        past = extend(past, rows(1, seed))[:, :, -9:]
    assert past.untyped_storage().nbytes() <= (10 + room_for(10)) * past[:, :, :1].nbytes


def test_a_cache_that_was_cropped_to_little_gives_the_rest_back() -> None:
    past = grown(500)
    wanted = past[:, :, :5].clone()
    past = past[:, :, :5]
    found = extend(past, rows(1, 2))
    assert torch.equal(found, torch.cat([wanted, rows(1, 2)], DIM))
    assert found.untyped_storage().nbytes() <= 8 * found[:, :, :1].nbytes


def test_memory_that_numpy_shows_is_not_moved() -> None:
    past = token_major([2, 3, 7, 4], DIM, torch.empty(0), torch.device("cpu")).copy_(rows(7))
    seen = past.numpy()
    found = extend(past, rows(1, 1))
    assert place(found) != place(past) and (seen == rows(7).numpy()).all()
    assert torch.equal(found, torch.cat([rows(7), rows(1, 1)], DIM))


def _of_numpy() -> tuple[torch.Tensor, Any]:
    array = np.zeros((9, 2, 3, 4), np.float32)
    return torch.from_numpy(array), array


def _of_bytes() -> tuple[torch.Tensor, Any]:
    data = bytearray(9 * 24 * 4)
    return torch.frombuffer(data, dtype=torch.float32).view(9, 2, 3, 4), np.frombuffer(data, np.float32)


def _seen_through_dlpack() -> tuple[torch.Tensor, Any]:
    whole = torch.zeros(9, 2, 3, 4)
    return whole, np.from_dlpack(whole)


def _part_of_a_storage() -> tuple[torch.Tensor, Any]:
    whole = torch.zeros(12, 2, 3, 4)
    return torch.empty(0).set_(whole.untyped_storage()[: 9 * 24 * 4], 0, (9, 2, 3, 4)), whole


def _of_another_process() -> tuple[torch.Tensor, Any]:
    whole = torch.zeros(9, 2, 3, 4).share_memory_()
    other = torch.UntypedStorage._new_shared_fd_cpu(*whole.untyped_storage()._share_fd_cpu_())
    return whole, torch.empty(0).set_(other, 0, whole.shape, whole.stride())


def _saved_for_a_gradient() -> tuple[torch.Tensor, Any]:
    whole = torch.zeros(9, 2, 3, 4, requires_grad=True)
    return whole, (whole * whole).mul(0)


@pytest.mark.parametrize(
    "made",
    [_of_numpy, _of_bytes, _seen_through_dlpack, _part_of_a_storage, _of_another_process, _saved_for_a_gradient],
)
@torch.no_grad()
def test_memory_that_somebody_else_sees_is_not_written_to(made: Callable[[], tuple[torch.Tensor, Any]]) -> None:
    with torch.enable_grad():
        whole, other = made()
    past, at = whole.permute(1, 2, 0, 3)[:, :, :6], place(whole)
    del whole
    found = extend(past, rows(2, 1))
    assert place(found) != at and place(past) == at
    assert torch.equal(found, torch.cat([torch.zeros(2, 3, 6, 4), rows(2, 1)], DIM))
    assert not other.any()


def test_memory_that_dlpack_shows_is_not_moved() -> None:
    past = token_major([2, 3, 7, 4], DIM, torch.empty(0), torch.device("cpu")).copy_(rows(7))
    seen, at = np.from_dlpack(past), place(past)
    found = extend(past, rows(1, 1))
    assert place(found) != place(past) == at and (seen == rows(7).numpy()).all()


def test_of_two_threads_that_extend_one_tensor_each_gets_its_own_rows() -> None:
    for _ in range(20):
        past, results = grown(6), {}
        old, barrier = past.clone(), threading.Barrier(2)

        def run(seed: int, past: torch.Tensor = past, results: dict = results, barrier: Any = barrier) -> None:
            barrier.wait()
            results[seed] = extend(past, rows(1, seed))

        threads = [threading.Thread(target=run, args=(seed,)) for seed in (2, 3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for seed, found in results.items():
            assert torch.equal(found, torch.cat([old, rows(1, seed)], DIM))
        assert len(results) == 2


def test_without_memory_to_grow_the_cache_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    past = token_major([2, 3, 7, 4], DIM, torch.empty(0), torch.device("cpu")).copy_(rows(7))

    def fails(self: torch.UntypedStorage, size: int) -> None:
        raise RuntimeError("not enough memory")

    with monkeypatch.context() as patched:
        patched.setattr(torch.UntypedStorage, "resize_", fails)
        with pytest.raises(RuntimeError, match="not enough memory"):
            extend(past, rows(1, 1))
    assert torch.equal(past, rows(7))
    assert torch.equal(extend(past, rows(1, 1)), torch.cat([rows(7), rows(1, 1)], DIM))


USES = st.sampled_from(["append", "crop", "fork", "drop", "window"])


@random_examples(40, 400, settings(deadline=None), st.lists(st.tuples(USES, st.integers(1, 90)), max_size=12))
def test_any_use_gives_what_concatenation_gives(uses: list[tuple[str, int]]) -> None:
    """Caches, each with what it would be if rows were concatenated."""
    caches = [(rows(3), rows(3))]
    for number, (use, size) in enumerate(uses):
        at = size % len(caches)
        found, wanted = caches[at]
        if use == "append":
            new = rows(size, number)
            caches[at] = extend(found, new), torch.cat([wanted, new], DIM)
        elif use == "fork":
            caches.append((found, wanted))
        elif use == "drop" and len(caches) > 1:
            del caches[at]
        elif use in ("crop", "window") and found.shape[DIM] > 1:
            keep = 1 + size % (found.shape[DIM] - 1)
            some = slice(keep) if use == "crop" else slice(-keep, None)
            caches[at] = found[:, :, some], wanted[:, :, some].clone()
        del found, wanted
        assert all(torch.equal(found, wanted) for found, wanted in caches)


# --- whole models ---


OPTIONS = {"mini_seq_len": 16, "strict": True}


def plain_model(family: str = "Llama") -> Any:
    """Two layers, or one of each kind."""
    return small_model(family, **({} if family == "Gemma3Text" else {"num_hidden_layers": 2}))


def compiled(family: str = "Llama", **options: Any) -> Any:
    model = plain_model(family)
    model.compile(backend="mom", options={**OPTIONS, **options})
    return model


@functools.cache
def shared_models() -> tuple[Any, Any]:
    """A compiled Llama whose graphs all tests share, and the same in eager mode."""
    return compiled(), plain_model()


def step(model: Any, cache: Any, token: int, **named: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([[token]]), **keeping(cache, model), use_cache=True, **named).logits[0, -1]


def prefilled(model: Any, tokens: int = 50) -> Any:
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids(1, tokens), **keeping(cache, model), use_cache=True, logits_to_keep=1)
    return cache


@pytest.mark.usefixtures("eager_pieces")
def test_a_decode_step_writes_its_rows_where_the_prefill_left_the_others() -> None:
    torch._dynamo.reset()
    model, _ = shared_models()
    cache = prefilled(model)
    storages = [layer.keys.untyped_storage()._cdata for layer in cache.layers]
    for token in range(4):
        step(model, cache, token)
    assert [layer.keys.untyped_storage()._cdata for layer in cache.layers] == storages
    graph = reports()[-1].graph
    assert len(graph.graph.find_nodes(op="call_function", target=EXTEND)) == 2 * len(cache.layers)
    assert reports()[-1].kind == "decode step" and reports()[-1].fallback is None


@pytest.mark.usefixtures("eager_pieces")
@pytest.mark.parametrize(
    "family", sweep(["Llama", "GPT2", "Gemma3Text", "Mixtral"], quick=["Llama", "Gemma3Text"])
)
def test_steps_over_a_cache_in_place_give_eager_logits(family: str) -> None:
    model, plain = shared_models() if family == "Llama" else (compiled(family), plain_model(family))
    found, wanted = prefilled(model), prefilled(plain)
    for token in range(5):
        assert torch.allclose(step(model, found, token), step(plain, wanted, token), atol=1e-5)


class Prefixed(torch.nn.Module):
    """Attention to keys of its own and then to those that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.past = torch.nn.Parameter(token_major([1, 2, 7, 16], DIM, torch.empty(0), torch.device("cpu")).normal_())

    def forward(self, query: torch.Tensor, new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        keys = torch.cat([self.past, new], DIM)
        return torch.nn.functional.scaled_dot_product_attention(query, keys, keys), keys


@pytest.mark.usefixtures("eager_pieces")
def test_a_parameter_is_no_cache_that_grows() -> None:
    model = Prefixed()
    before, size = model.past.detach().clone(), model.past.untyped_storage().nbytes()
    query, new = torch.randn(1, 2, 1, 16), torch.randn(1, 2, 1, 16)
    run = torch.compile(model, backend="mom", options=OPTIONS)
    with torch.no_grad():
        for _ in range(2):
            found, keys = run(query, new)
            wanted, wanted_keys = model(query, new)
            assert torch.allclose(found, wanted, atol=1e-6) and torch.equal(keys, wanted_keys)
            keys.zero_()
    assert torch.equal(model.past, before) and model.past.untyped_storage().nbytes() == size
    assert reports()[-1].layer_pieces


def read_behind(query: torch.Tensor, past: torch.Tensor, new: torch.Tensor) -> tuple[torch.Tensor, ...]:
    keys = torch.cat([past, new], DIM)
    seen = torch.nn.functional.scaled_dot_product_attention(query, keys, keys)
    return torch.nn.functional.scaled_dot_product_attention(seen, past, past), keys


def joined_with_more(query: torch.Tensor, past: torch.Tensor, new: torch.Tensor) -> tuple[torch.Tensor, ...]:
    keys, twice = torch.cat([past, new], DIM), torch.cat([past, past, new], DIM)
    return torch.nn.functional.scaled_dot_product_attention(query, keys, keys), keys, twice


@pytest.mark.usefixtures("eager_pieces", "stock_is_eager")
@pytest.mark.parametrize("function", [read_behind, joined_with_more])
@pytest.mark.parametrize("queries", [1, 5])
def test_an_input_that_is_read_by_something_else_keeps_its_strides(function: Any, queries: int) -> None:
    """Pieces check the strides of their inputs."""
    run = torch.compile(function, backend="mom", options=OPTIONS)
    for tokens in (40, 41):
        query, past, new = (torch.randn(1, 2, size, 16) for size in (queries, tokens, queries))
        before, strides = past.clone(), past.stride()
        with torch.no_grad():
            found, wanted = run(query, past, new), function(query, past, new)
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, wanted, strict=True))
        assert past.stride() == strides and torch.equal(past, before)


def forked(cache: Any) -> Any:
    """A second cache over the tensors of the first."""
    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in cache.layers]
    return other


@pytest.mark.usefixtures("eager_pieces")
@pytest.mark.parametrize("second", [copy.deepcopy, forked])
def test_two_caches_of_one_prefix_go_on_by_themselves(second: Callable[[Any], Any]) -> None:
    model, plain = shared_models()
    one, wanted = prefilled(model), prefilled(plain)
    step(model, one, 1), step(plain, wanted, 1)
    two, wanted_two = second(one), copy.deepcopy(wanted)
    for token in range(3):
        assert torch.allclose(step(model, one, token), step(plain, wanted, token), atol=1e-5)
        assert torch.allclose(step(model, two, 9 - token), step(plain, wanted_two, 9 - token), atol=1e-5)


@pytest.mark.usefixtures("eager_pieces")
def test_a_cache_that_is_cropped_and_used_in_eager_mode_between_steps_goes_on() -> None:
    model, plain = shared_models()
    found, wanted = prefilled(model), prefilled(plain)
    for turn in range(3):
        for token in range(3):
            assert torch.allclose(step(model, found, token), step(plain, wanted, token), atol=1e-5)
        for cache in (found, wanted):
            cache.crop(-2 - turn)
        assert torch.allclose(step(plain, found, 5), step(plain, wanted, 5), atol=1e-5)
        with torch.no_grad():
            more = model(ids(1, 20), **keeping(found, model), use_cache=True).logits
            wanted_more = plain(ids(1, 20), **keeping(wanted, plain), use_cache=True).logits
        assert torch.allclose(more, wanted_more, atol=1e-5)


@pytest.mark.usefixtures("eager_pieces")
def test_a_step_that_fails_leaves_the_cache_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain = shared_models()
    found, wanted = prefilled(model), prefilled(plain)
    step(model, found, 1), step(plain, wanted, 1)
    calls: list[int] = []
    whole = Extend.__call__

    def fails(self: Extend, arguments: list[Any]) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("not enough memory")
        return whole(self, arguments)

    with monkeypatch.context() as patched:
        patched.setattr(Extend, "__call__", fails)
        with pytest.raises(RuntimeError, match="not enough memory"):
            step(model, found, 2)
    gc.collect()
    assert [layer.keys.shape for layer in found.layers] == [layer.keys.shape for layer in wanted.layers]
    for token in range(3):
        assert torch.allclose(step(model, found, token), step(plain, wanted, token), atol=1e-5)


@pytest.mark.usefixtures("eager_pieces")
@pytest.mark.parametrize(
    "asked",
    [{"num_beams": 2}, pytest.param({}, marks=pytest.mark.slow), {"prompt_lookup_num_tokens": 3}],
    ids=["beams", "greedy", "assisted"],
)
def test_generation_gives_eager_tokens(asked: dict[str, Any]) -> None:
    tokens = ids(1 if "prompt_lookup_num_tokens" in asked else 3, 40)
    tokens[:, 20:] = tokens[:, :20]
    given = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    given["attention_mask"][1:2, :7] = 0
    asked = {"max_new_tokens": 12, "pad_token_id": 0, "eos_token_id": 7, "do_sample": False, **asked}
    wanted = plain_model().double().generate(**given, **asked)
    model = plain_model().double()
    model.compile(backend="mom", options=OPTIONS)
    assert torch.equal(model.generate(**given, **asked), wanted)
