"""An unmodified `generate()` with its KV cache on the host: same tokens, two graphs, only new rows are copied."""

from __future__ import annotations

import copy
import functools
import gc
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import Cache, DynamicCache, StaticCache
from transformers.cache_utils import QuantizedLayer

import mom_compile
from benchmarks import measure
from benchmarks.models import keeping
from mom_compile import HostMemoryError, HostTensor, MomWarning, host_memory
from mom_compile.runtime.copy_steps import Append, FetchStart, Offload
from mom_compile.runtime.host import region as host_region
from mom_compile.runtime.host.engine import ThreadTicket
from mom_compile.runtime.host.engines import engine_for
from mom_compile.runtime.loop import CompiledLoop
from mom_compile.runtime.program import Step, observing
from tests.models import FAMILIES, prompt, small_model, sweep

CPU = torch.device("cpu")
NEW = 6
OPTIONS = {"kv_offload": True, "mini_seq_len": 16, "strict": True}

pytestmark = [pytest.mark.usefixtures("eager_pieces"), pytest.mark.shared_graphs]


#: The third layer is the first that may take over buffers of an earlier one.
THREE_LAYERS, TWO_LAYERS = {"num_hidden_layers": 3}, {"num_hidden_layers": 2}


def generate(model, inputs, **more):
    settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    return model.generate(**inputs, **{**settings, **more}, return_dict_in_generate=True)


def compiled(name: str, changes: dict[str, int] | None = None, **options):
    model = small_model(name, torch.float64, **(changes or THREE_LAYERS))
    model.compile(backend="mom", options={**OPTIONS, **options})
    return model


@functools.cache
def shared_model(layers: int):
    """A compiled Llama whose graphs all tests share."""
    return compiled("Llama", {"num_hidden_layers": layers})


@functools.cache
def eager_model(layers: int):
    return small_model("Llama", torch.float64, num_hidden_layers=layers)


def tensors(cache):
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def same_cache(mine, reference, atol=1e-9):
    for a, b in zip(tensors(mine), tensors(reference), strict=True):
        torch.testing.assert_close(a.fetch() if isinstance(a, HostTensor) else a, b, rtol=0, atol=atol)


#: The others are similar; `make sweep` runs them.
QUICK = {"Mistral"}


@pytest.mark.parametrize("name", sweep(FAMILIES, QUICK))
def test_a_family_generates_the_same_tokens_with_its_cache_on_the_host(name):
    inputs = prompt(1, 41)
    expected = generate(small_model(name, torch.float64, **THREE_LAYERS), inputs)
    result = generate(compiled(name), inputs)
    assert torch.equal(result.sequences, expected.sequences)
    assert all(isinstance(tensor, HostTensor) for tensor in tensors(result.past_key_values))
    # These two compute parts of a layer in float32 for any dtype of the model.
    same_cache(result.past_key_values, expected.past_key_values, atol=1e-6 if name in ("Gemma2", "Bloom") else 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Llama", "Mistral", "GPT2"])
def test_a_padded_batch_generates_the_same_tokens(name):
    inputs = prompt(3, 41, padded=True)
    expected = generate(small_model(name, torch.float64, **THREE_LAYERS), inputs)
    result = generate(compiled(name), inputs)
    assert torch.equal(result.sequences, expected.sequences)
    same_cache(result.past_key_values, expected.past_key_values)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Llama", "Qwen3", "Mistral", "Gemma3Text", "GPT2"])
def test_sixty_four_tokens_after_four_thousand_equal_eager_mode(name):
    longer = {"n_positions" if name == "GPT2" else "max_position_embeddings": 8192}
    inputs = prompt(1, 4096)
    expected = generate(small_model(name, torch.float64, **THREE_LAYERS, **longer), inputs, max_new_tokens=64)
    counters.clear()
    result = generate(compiled(name, {**THREE_LAYERS, **longer}, mini_seq_len=512), inputs, max_new_tokens=64)
    assert torch.equal(result.sequences, expected.sequences)
    assert counters["stats"]["unique_graphs"] <= 2
    assert all(isinstance(tensor, HostTensor) for tensor in tensors(result.past_key_values))


def test_two_graphs_are_compiled_in_all_and_a_second_prompt_adds_none_for_decode():
    model = shared_model(3)
    torch._dynamo.reset()
    counters.clear()
    generate(model, prompt(1, 41), max_new_tokens=12)
    assert counters["stats"]["unique_graphs"] == 2
    prefill, decode = mom_compile.reports()
    assert [value.layer for value in prefill.on_host] == [0, 0, 1, 1, 2, 2]
    assert not any(value.has_past for value in prefill.on_host)
    assert all(value.has_past for value in decode.on_host)
    assert "to the host: rows of 6 keys and values of 3 layers, 1536 B/token" in prefill.details()
    assert "to the host: new rows" in decode.details()
    assert "no loops" in decode.details()
    generate(model, prompt(1, 57), max_new_tokens=12)
    assert counters["stats"]["unique_graphs"] == 3  # a prefill of any length; decode as before


def test_beam_search_reorders_on_the_host(monkeypatch):
    inputs = prompt(2, 41)
    expected = generate(eager_model(2), inputs, num_beams=3)
    model = shared_model(2)
    original = HostTensor.fetch
    fetch = lambda self: original(self) if self.traced else pytest.fail("a cache was brought back")  # noqa: E731
    monkeypatch.setattr(HostTensor, "fetch", fetch)
    assert torch.equal(generate(model, inputs, num_beams=3).sequences, expected.sequences)


@pytest.mark.slow
def test_assisted_generation_crops_the_cache_and_appends_in_place(monkeypatch):
    inputs = prompt(1, 41)
    helper = small_model("Llama", torch.float64, **THREE_LAYERS)
    with torch.no_grad():
        helper.lm_head.weight[::3] *= -1  # often wrong, so that tokens are rejected
    expected = generate(eager_model(3), inputs, assistant_model=helper)
    cropped = []
    original = DynamicCache.crop
    monkeypatch.setattr(DynamicCache, "crop", lambda self, n: (cropped.append(n), original(self, n)))
    traffic = engine_for(CPU).traffic
    before = traffic.on_host
    result = generate(compiled("Llama"), inputs, assistant_model=helper)
    assert torch.equal(result.sequences, expected.sequences)
    assert cropped
    assert traffic.on_host == before


@pytest.mark.slow
def test_a_second_turn_continues_a_cache_that_is_on_the_host():
    first, second = prompt(1, 41), prompt(1, 23, seed=5)["input_ids"]
    answers = []
    for model in (eager_model(3), compiled("Llama")):
        turn = generate(model, first)
        both = {"input_ids": torch.cat([turn.sequences, second], 1)}
        answers.append(generate(model, both, **keeping(turn.past_key_values, model)))
    assert torch.equal(answers[1].sequences, answers[0].sequences)
    same_cache(answers[1].past_key_values, answers[0].past_key_values)


@pytest.mark.slow
def test_inference_mode_and_chunked_prefill_give_the_same_tokens():
    inputs = prompt(1, 41)
    expected = generate(eager_model(3), inputs)
    with torch.inference_mode():
        assert torch.equal(generate(compiled("Llama"), inputs).sequences, expected.sequences)
    chunked = generate(compiled("Llama"), inputs, prefill_chunk_size=16)
    assert torch.equal(chunked.sequences, expected.sequences)


# --- traffic and memory ---


def test_only_new_rows_are_copied_to_the_host_and_no_row_moves_there():
    model = shared_model(3)
    traffic = engine_for(CPU).traffic
    row = 3 * 2 * 2 * 16 * 8  # layers, keys and values, heads, channels, bytes
    before = copy.copy(traffic)
    generate(model, prompt(1, 41), max_new_tokens=1)
    assert traffic.to_host - before.to_host == 41 * row
    assert traffic.to_device == before.to_device
    before = copy.copy(traffic)
    generate(model, prompt(1, 41), max_new_tokens=9)
    assert traffic.to_host - before.to_host == (41 + 8) * row
    assert traffic.to_device - before.to_device == sum(range(41, 41 + 8)) * row
    assert traffic.on_host == before.on_host


def test_memory_for_the_next_layer_is_prepared_except_after_the_last():
    ahead: list[int] = []

    def watch(step: Step, results: Sequence[Any]) -> None:
        if isinstance(step.run, Offload):
            ahead.append(step.run.ahead)

    with observing(watch):
        generate(shared_model(3), prompt(1, 41), max_new_tokens=1)
    assert ahead == [2, 2, 2, 2, 1, 0]  # keys and values of three layers


class Rooms:
    """Bytes of living device buffers into which pasts are fetched."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def watch(self, step: Step, results: Sequence[Any]) -> None:
        if isinstance(step.run, FetchStart):
            buffer = results[0].buffer
            size = buffer.numel() * buffer.element_size()
            self.add(size)
            weakref.finalize(buffer, self.add, -size)

    def add(self, size: int) -> None:
        self.now += size
        self.most = max(self.most, self.now)


def test_two_layers_are_on_the_device_at_most_while_decoding():
    buffers = Rooms()
    with observing(buffers.watch):
        generate(shared_model(3), prompt(1, 41), max_new_tokens=9)
    layer = 2 * (41 + 8) * 2 * 16 * 8
    assert 0 < buffers.most <= 2 * layer
    gc.collect()
    assert buffers.now == 0


def test_a_hundred_prompts_hold_no_more_memory_than_one():
    model = shared_model(2)

    def run() -> DynamicCache:
        cache = DynamicCache()
        with torch.no_grad():
            model(**prompt(1, 41), **keeping(cache, model))
            model(torch.tensor([[7]]), **keeping(cache, model))
        return cache

    run()  # Dynamo keeps the tensors it compiled with until they are collected
    gc.collect()
    start = host_memory()
    held = set()
    for _ in range(100):
        cache = run()
        held.add(host_memory())
        del cache
        assert host_memory() == start  # without garbage collection
    assert len(held) == 1


# --- placement ---


def test_a_cache_on_disk_has_the_same_rows_and_is_deleted_with_the_cache(tmp_path):
    inputs = prompt(2, 41)
    expected = generate(eager_model(2), inputs)
    gc.collect()
    before = host_memory()
    result = generate(compiled("Llama", TWO_LAYERS, kv_offload="disk", kv_dir=str(tmp_path)), inputs)
    assert torch.equal(result.sequences, expected.sequences)
    same_cache(result.past_key_values, expected.past_key_values)
    held = host_memory()
    assert held.disk > 0
    assert held.memory == before.memory
    assert list(tmp_path.iterdir()) == []
    del result
    gc.collect()
    assert host_memory() == before


@pytest.mark.slow
@pytest.mark.parametrize(("budget", "resident"), [("1GiB", [0, 1, 2]), (None, [0, 1, 2])])
def test_auto_keeps_as_many_layers_as_fit(budget, resident):
    inputs = prompt(1, 41)
    expected = generate(eager_model(3), inputs)
    result = generate(compiled("Llama", kv_offload="auto", memory_budget=budget), inputs)
    assert torch.equal(result.sequences, expected.sequences)
    layers = result.past_key_values.layers
    assert [i for i, layer in enumerate(layers) if not isinstance(layer.keys, HostTensor)] == resident
    assert [isinstance(layer.keys, HostTensor) for layer in layers] == [
        isinstance(layer.values, HostTensor) for layer in layers
    ]


@pytest.mark.slow
def test_decode_steps_are_not_rewritten_if_the_cache_will_fit_for_long():
    """With "auto", a step is cut into pieces only if something is on the host or may have to be offloaded."""
    torch._dynamo.reset()
    model = compiled("Llama", kv_offload="auto", memory_budget="1GiB")
    generate(model, prompt(1, 41), max_new_tokens=2)
    prefill, decode = mom_compile.reports()
    assert prefill.fallback is None
    assert decode.fallback is not None
    assert "2 times the present cache" in str(decode)


@pytest.mark.slow
def test_a_partial_budget_keeps_evenly_spread_layers():
    inputs = prompt(1, 41)
    expected = generate(eager_model(3), inputs)
    torch._dynamo.reset()
    model = compiled("Llama")
    generate(model, inputs, max_new_tokens=1)
    prefill, layer = mom_compile.reports()[0], 2 * 41 * 2 * 16 * 8
    weights = sum(p.numel() * p.element_size() for p in (*model.parameters(), *model.buffers()))
    needed = weights + 41 * prefill.floor_bytes_per_token + prefill.iteration_bytes
    torch._dynamo.reset()
    result = generate(compiled("Llama", kv_offload="auto", memory_budget=int(needed + 1.5 * layer)), inputs)
    assert torch.equal(result.sequences, expected.sequences)
    assert [isinstance(one.keys, HostTensor) for one in result.past_key_values.layers] == [True, True, False]


@pytest.mark.slow
def test_one_graph_decides_by_the_sizes_of_each_run():
    """As many layers as fit in addition to the program's peak for these sizes, in one graph for all sizes."""
    torch._dynamo.reset()
    model, room = small_model("Llama", torch.float64, **THREE_LAYERS), 10**6
    weights = sum(p.numel() * p.element_size() for p in (*model.parameters(), *model.buffers()))
    options = {**OPTIONS, "kv_offload": "auto", "memory_budget": weights + room}
    model.compile(backend="mom", dynamic=True, options=options)
    resident = []
    for batch, tokens in ((2, 41), (2, 120), (2, 160), (2, 200), (2, 240), (5, 300)):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            given = prompt(batch, tokens)
            run = functools.partial(model, **given, past_key_values=cache, use_cache=True, logits_to_keep=1)
            if mom_compile.reports():
                (report,) = mom_compile.reports()
                sizes = {symbol: batch if hint == 2 else tokens for symbol, hint in report.memory.hints.items()}
                needed = report.memory.number(report.memory.peak, sizes) + sum(x.nbytes for x in given.values())
                if needed > room:
                    with pytest.raises(mom_compile.MemoryBudgetError, match=f"a prompt of {tokens} tokens"):
                        run()
                    resident.append(-1)
                    continue
            run()
        (report,) = mom_compile.reports()
        sizes = {symbol: batch if hint == 2 else tokens for symbol, hint in report.memory.hints.items()}
        needed = report.memory.number(report.memory.peak, sizes) + sum(x.nbytes for x in given.values())
        resident.append(sum(not isinstance(layer.keys, HostTensor) for layer in cache.layers))
        assert resident[-1] == max(0, min(3, (room - needed) // (2 * batch * tokens * 2 * 16 * 8)))
    assert set(resident) == {-1, 0, 1, 2, 3}


# --- failures ---


@pytest.mark.slow
def test_a_cache_can_be_continued_after_its_model_is_recompiled():
    inputs, step = prompt(1, 41), torch.tensor([[7]])
    model, reference = compiled("Llama"), eager_model(3)
    mine, expected = DynamicCache(), DynamicCache()
    with torch.no_grad():
        model(**inputs, **keeping(mine, model))
        reference(**inputs, **keeping(expected, reference))
        torch._dynamo.reset()
        for options in (OPTIONS, {"strict": True, "kv_offload": False}, OPTIONS):
            model.compile(backend="mom", options=options)
            got = model(step, **keeping(mine, model)).logits
            torch.testing.assert_close(got, reference(step, **keeping(expected, reference)).logits, rtol=0, atol=1e-9)
    same_cache(mine, expected)


def test_writes_to_a_cache_between_steps_take_effect():
    inputs, step = prompt(1, 41), torch.tensor([[7]])
    model, reference = shared_model(2), eager_model(2)
    mine, expected = DynamicCache(), DynamicCache()
    with torch.no_grad():
        for one, cache in ((model, mine), (reference, expected)):
            one(**inputs, **keeping(cache, one))
            cache.layers[0].keys[:, :, 3:9] = 0.5
            cache.layers[1].values.mul_(2)
        got = model(step, **keeping(mine, model)).logits
        torch.testing.assert_close(got, reference(step, **keeping(expected, reference)).logits, rtol=0, atol=1e-9)


def test_a_copied_cache_can_be_continued_separately():
    inputs = prompt(1, 41)
    model, reference = shared_model(2), eager_model(2)
    mine, expected = DynamicCache(), DynamicCache()
    with torch.no_grad():
        model(**inputs, **keeping(mine, model))
        reference(**inputs, **keeping(expected, reference))
        for token in (7, 8):
            branches = copy.deepcopy(mine), copy.deepcopy(expected)
            got, want = (
                one(torch.tensor([[token]]), **keeping(cache, one)).logits
                for one, cache in zip((model, reference), branches, strict=True)
            )
            torch.testing.assert_close(got, want, rtol=0, atol=1e-9)
    same_cache(mine, expected)


@pytest.mark.parametrize("error", [KeyboardInterrupt])
def test_an_interruption_while_a_copy_runs_leaves_everything_usable(error, monkeypatch):
    inputs = prompt(1, 41)
    model = shared_model(2)
    expected = generate(model, inputs).sequences
    gc.collect()
    before = host_memory()
    waits = iter(range(1000))
    original = ThreadTicket.wait

    def interrupted(self):
        if threading.current_thread() is threading.main_thread() and next(waits) == 10:
            raise error("stop")
        original(self)

    with monkeypatch.context() as patched:
        patched.setattr(ThreadTicket, "wait", interrupted)
        with pytest.raises(error, match="stop"):
            generate(model, inputs)
    assert torch.equal(generate(model, inputs).sequences, expected)
    gc.collect()
    assert host_memory() == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, pytest.param(RuntimeError, marks=pytest.mark.slow)])
def test_an_exception_in_a_prefill_leaves_no_copy_and_holds_no_memory(error, monkeypatch):
    inputs = prompt(1, 41)
    model = shared_model(3)
    expected = generate(model, inputs).sequences
    engine = engine_for(CPU)
    sources: list[weakref.ref] = []
    calls = iter(range(1000))
    original, copied = CompiledLoop.__call__, engine.to_host

    def third_fails(self, arguments):
        if next(calls) == 2:
            raise error("stop")
        return original(self, arguments)

    def to_host(target, source, after):
        sources.append(weakref.ref(source))
        return copied(target, source, after)

    gc.collect()
    before = host_memory()
    with monkeypatch.context() as patched:
        patched.setattr(CompiledLoop, "__call__", third_fails)
        patched.setattr(engine, "to_host", to_host)
        patched.setattr(engine, "delay", lambda: 0.05)
        with pytest.raises(error, match="stop") as caught:
            generate(model, inputs)
    assert len(sources) == 4  # keys and values of two layers
    assert not engine._leaving
    assert all(source() is None for source in sources)  # although the traceback still exists
    assert caught.tb is not None
    del caught
    gc.collect()
    assert host_memory() == before
    assert torch.equal(generate(model, inputs).sequences, expected)


def test_running_out_of_host_memory_raises_and_the_model_stays_usable(monkeypatch):
    inputs = prompt(1, 41)
    model = shared_model(2)
    with monkeypatch.context() as patched:
        patched.setattr(host_region, "available_memory", lambda: 0)
        with pytest.raises(HostMemoryError, match="kv_offload='disk'"):
            generate(model, inputs)
    reference = generate(eager_model(2), inputs)
    assert torch.equal(generate(model, inputs).sequences, reference.sequences)


def test_no_token_is_lost_when_memory_runs_out_in_the_middle(monkeypatch):
    inputs, step = prompt(1, 41), torch.tensor([[7]])
    model = shared_model(2)
    cache = DynamicCache()
    with torch.no_grad():
        model(**inputs, **keeping(cache, model))
        expected = copy.deepcopy(cache)
        with monkeypatch.context() as patched:
            patched.setattr(Append, "__call__", lambda step, arguments: (_ for _ in ()).throw(HostMemoryError("full")))
            with pytest.raises(HostMemoryError, match="full"):
                model(step, **keeping(cache, model))
        assert cache.get_seq_length() == 41
        a, b = (model(step, **keeping(one, model)).logits for one in (cache, expected))
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_the_peak_of_a_prefill_does_not_grow_with_the_layers():
    peaks = {}
    for layers in (3, 6):
        model = compiled("Llama", {"num_hidden_layers": layers}, mini_seq_len=64)
        inputs = prompt(1, 1024)

        def prefill(model=model, inputs=inputs):
            with torch.no_grad():
                return model(**inputs, use_cache=True, logits_to_keep=1)

        prefill()
        peaks[layers] = measure.peak_bytes(prefill).peak
    layer = 2 * 1024 * 2 * 16 * 8
    assert abs(peaks[6] - peaks[3]) < layer / 4


# --- caches that stay on the device ---


@pytest.mark.slow
def test_a_static_cache_stays_on_the_device_with_a_reason():
    inputs = prompt(1, 41)
    expected = generate(eager_model(3), inputs)
    torch._dynamo.reset()
    model = compiled("Llama")
    cache = StaticCache(config=model.config, max_cache_len=64)
    with pytest.warns(MomWarning, match="kv_offload=True is not honoured for .*static cache"):
        result = generate(model, inputs, **keeping(cache, model), disable_compile=True)
    assert torch.equal(result.sequences, expected.sequences)
    assert not any(isinstance(tensor, HostTensor) for tensor in tensors(result.past_key_values))
    reasons = [reason for report in mom_compile.reports() for reason in report.on_device.values()]
    assert any("static cache" in reason for reason in reasons)


class Int8Layer(QuantizedLayer):
    """Eight bits per channel, with a scale for each token, similar to quanto and HQQ."""

    def _quantize(self, tensor, axis):
        scale = tensor.abs().amax(-1, keepdim=True).clamp_min(1e-9) / 127
        return (tensor / scale).round().to(torch.int8), scale

    def _dequantize(self, pair):
        return pair[0] * pair[1]


@pytest.mark.parametrize(("rows", "new"), [(80, 1), pytest.param(40, NEW, marks=pytest.mark.slow)])
def test_a_quantised_cache_works_and_stays_on_the_device_with_a_reason(rows, new):
    """Prefilled with loops, and without, by stock Inductor's steps that fill its residual and quantise it."""
    inputs = prompt(1, rows)
    torch._dynamo.reset()

    def answer(model):
        cache = Cache(layers=[Int8Layer(residual_length=4) for _ in range(3)])
        return generate(model, inputs, **keeping(cache, model), max_new_tokens=new)

    expected = answer(eager_model(3))
    with pytest.warns(MomWarning, match="kv_offload=True is not honoured") as caught:
        result = answer(compiled("Llama", mini_seq_len=50))
    assert any("quantised" in str(warning.message) for warning in caught)
    assert torch.equal(result.sequences, expected.sequences)
    for mine, reference in zip(result.past_key_values.layers, expected.past_key_values.layers, strict=True):
        kept = zip((*mine._quantized_keys, mine.values), (*reference._quantized_keys, reference.values), strict=True)
        for a, b in kept:
            assert not isinstance(a, HostTensor)
            # Inductor's float32 sines of positions differ from eager mode's in the last bit.
            torch.testing.assert_close(a, b, rtol=0, atol=1e-9 if new == 1 else 1e-6)
    prefill = mom_compile.reports()[0]
    assert bool(prefill.stages) == (rows > 50)
    assert not prefill.on_host
    assert len(prefill.on_device) == 12  # integers and scales, keys and values, three layers
    assert "quantised" in str(prefill)


class TokensFirst:
    """A custom cache: `[B, T, H, D]`, one tensor each for keys and values."""

    def __init__(self) -> None:
        self.keys = self.values = None

    def update(self, keys, values):
        keys, values = keys.transpose(1, 2), values.transpose(1, 2)
        if self.keys is not None:
            keys, values = torch.cat([self.keys, keys], 1), torch.cat([self.values, values], 1)
        self.keys, self.values = keys, values
        return keys.transpose(1, 2), values.transpose(1, 2)


def test_a_custom_cache_with_another_layout_is_found():
    def attend(x, cache):
        q, k, v = (t.view(1, -1, 2, 8).transpose(1, 2) for t in (x @ WQ, x @ WK, x @ WV))
        k, v = cache.update(k, v)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1)

    generator = torch.Generator().manual_seed(0)
    WQ, WK, WV = (torch.randn(16, 16, generator=generator, dtype=torch.float64) for _ in range(3))
    run = torch.compile(attend, backend="mom", options=OPTIONS)
    mine, reference = TokensFirst(), TokensFirst()
    with torch.no_grad():
        for tokens in (37, 1, 1, 1):
            x = torch.randn(1, tokens, 16, generator=generator, dtype=torch.float64)
            torch.testing.assert_close(run(x, mine), attend(x, reference), rtol=0, atol=1e-10)
            assert isinstance(mine.keys, HostTensor)
    torch.testing.assert_close(mine.keys.fetch(), reference.keys, rtol=0, atol=1e-10)
