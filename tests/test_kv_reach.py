"""Keys and values stay on the device only for a stated reason: all families, attention implementations and caches.

The first half examines captured graphs; the second half runs them with pieces that are not compiled.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from transformers import DynamicCache, StaticCache

import mom_compile
from benchmarks.models import keeping
from mom_compile import HostTensor, MomWarning
from mom_compile.runtime.host.tensor import on_host
from mom_passes.attention.form import attention_form
from mom_passes.graph.edit import copy_graph
from mom_passes.graph.whole_slices import drop_whole_slices_of
from mom_passes.host.kv_offload import kv_offload
from mom_passes.host.kv_values import STATIC, UNREAD, KVValues, find_kv
from mom_passes.ops.transfers import FETCH_START
from mom_passes.verify import verify
from tests.captured import Captured, capture
from tests.models import FAMILIES, UNUSUAL, prompt, small_model

CPU = torch.device("cpu")
OPTIONS = {"kv_offload": True, "mini_seq_len": 16, "strict": True}
PROMPT = 41


@dataclass(frozen=True)
class Way:
    """A family and how to run it. `settings` are passed to its configuration, `generation` to `generate()`."""

    family: str
    attention: str = "sdpa"
    autocast: bool = False
    batch: int = 1
    rows: int = PROMPT
    settings: dict[str, Any] = field(default_factory=dict)
    generation: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        named = [f"{k}={v}" for k, v in {**self.settings, **self.generation}.items()]
        cast = ["autocast"] if self.autocast else []
        return "-".join([self.family, self.attention, *cast, f"{self.batch}x{self.rows}", *named])

    def model(self) -> Any:
        # In float64, eager attention turns masks into -inf and rows that see nothing into NaN, and grouped products of
        # experts support at most float32.
        narrow = self.family in UNUSUAL or self.autocast or self.attention == "eager"
        model = small_model(self.family, torch.float32 if narrow else torch.float64, **self.settings)
        if self.attention != "sdpa":  # the default of families that support it
            model.set_attn_implementation(self.attention)
        return model

    def casting(self) -> Any:
        return torch.autocast("cpu", torch.bfloat16) if self.autocast else contextlib.nullcontext()

    @property
    def tolerance(self) -> float:
        if self.autocast:
            return 0.02
        return 1e-5 if self.family in UNUSUAL or self.attention == "eager" else 1e-6


def ways(quick: list[Way], slow: list[Way]) -> list[Any]:
    marked = [pytest.param(way, id=str(way), marks=[pytest.mark.slow]) for way in slow if way not in quick]
    return [pytest.param(way, id=str(way)) for way in quick] + marked


def held(cache: Any) -> list[torch.Tensor]:
    """Everything a cache keeps with one row per token; states of convolutions and recurrences are excluded."""
    return [
        tensor
        for layer in cache.layers
        for name in ("keys", "values")
        if isinstance(tensor := getattr(layer, name, None), torch.Tensor) and tensor.numel()
    ]


# --- in the captured graph ---


def graph_of(way: Way, *, past: int = 0, new: int | None = None) -> tuple[Captured, Any]:
    """Return the graph of a prefill, or of `new` rows over a cache of `past` rows on the host, and the new cache."""
    model = way.model()
    cache = DynamicCache(config=model.config)
    kept = keeping(cache, model)
    with torch.no_grad(), way.casting():
        if past:
            model(**prompt(way.batch, past), **kept)
            for layer in cache.layers:
                if isinstance(getattr(layer, "keys", None), torch.Tensor):
                    layer.keys, layer.values = on_host(layer.keys, CPU), on_host(layer.values, CPU)
        rows = prompt(way.batch, new or way.rows)["input_ids"]
        captured = capture(lambda input_ids: model(input_ids, **kept, logits_to_keep=1).logits, input_ids=rows)
    return captured, cache


def accounted(captured: Captured, cache: Any, kv: KVValues) -> tuple[int, int]:
    """Return how many of a cache's tensors are offloaded and how many stay with a reason. There are no others."""
    leave = {i for value in kv.found for i in value.outputs}
    stay = {value.output for value in kv.left_out}
    counts = [0, 0]
    for tensor in held(cache):
        places = {i for i, output in enumerate(captured.outputs) if _is(output, tensor)}
        assert places, "a tensor of the cache is no output of the graph"
        assert places & (leave | stay), f"outputs {places} leave neither nor is a reason given"
        counts[0 if places & leave else 1] += 1
    return counts[0], counts[1]


def _is(output: Any, tensor: torch.Tensor) -> bool:
    same_storage = isinstance(output, torch.Tensor) and output.data_ptr() == tensor.data_ptr()
    return same_storage and output.shape == tensor.shape


def found_in(captured: Captured) -> KVValues:
    gm = copy_graph(captured.gm)
    drop_whole_slices_of(gm)
    return find_kv(attention_form(gm))


PREFILLS = ways(
    [
        Way("Mistral", settings={"sliding_window": 64}),
        Way("Mistral", rows=16),
        Way("Llama", "eager"),
        Way("Llama", autocast=True),
        Way("DeepseekV3"),
    ],
    [Way(name, attention) for name in (*FAMILIES, *UNUSUAL) for attention in ("sdpa", "eager")]
    + [Way(name, autocast=True) for name in FAMILIES]
    + [Way(name, rows=rows, batch=2) for name in ("Mistral", "Gemma3Text", "Gemma2") for rows in (15, 16, 17)],
)


@pytest.mark.parametrize("way", PREFILLS)
def test_a_prefill_offloads_its_whole_cache(way):
    captured, cache = graph_of(way)
    layers = 1 if way.family in ("Qwen3Next", "Bamba") else 2
    assert accounted(captured, cache, found_in(captured)) == (2 * layers, 0)


@pytest.mark.parametrize("rows", [1, pytest.param(5, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "way",
    ways(
        [Way("Mistral", "eager"), Way("DeepseekV3", "eager")],
        [Way(name) for name in (*FAMILIES, "DeepseekV2", "DeepseekV3")]
        + [Way(name, autocast=True) for name in ("Llama", "Gemma3Text")],
    ),
)
def test_a_step_offloads_only_the_new_rows_of_its_whole_cache(way, rows):
    captured, _ = graph_of(way, past=PROMPT, new=rows)
    gm = attention_form(copy_graph(captured.gm))
    record = kv_offload(gm, CPU, start=True)
    verify(gm)
    assert len(record.leaving) == record.arriving == 4
    assert all(value.past is not None for value in record.leaving)
    assert record.left_out == {}
    for mine, reference in zip(gm(*captured.inputs), captured.outputs, strict=True):
        torch.testing.assert_close(mine, reference, rtol=0, atol=way.tolerance)


def test_latents_are_distinguished_from_hidden_states():
    """Latents are read only by the products that compute one attention's keys and values."""
    captured, _ = graph_of(Way("DeepseekV3"))
    found = found_in(captured).found
    assert [value.layer for value in found] == [0, 0, 1, 1]
    assert {value.dim for value in found} == {2}
    assert sorted({value.full.meta["val"].shape[-1] for value in found}) == [8, 16]


def test_hidden_states_are_not_taken_for_latents():
    """Queries and the next layer's states are computed from them too."""
    wide, narrow = (torch.randn(8, 8) for _ in range(2))

    def layer(x):
        state = x + 1
        q, k, v = state @ wide, (state @ narrow) @ wide, state @ narrow
        heads = [t.unflatten(-1, (2, 4)).transpose(1, 2) for t in (q, k, v)]
        after = state + torch.nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        return state, after, after @ wide

    kv = found_in(capture(layer, x=torch.randn(1, 20, 8)))
    assert (kv.found, kv.left_out) == ((), ())


def test_products_that_inductor_writes_as_sums_are_recognised_as_attention():
    """With `coordinate_descent_tuning` on a GPU, Inductor does so for one query row."""

    def attend(q, past_k, past_v, x):
        k, v = torch.cat([past_k, x + 1], 1), torch.cat([past_v, x - 1], 1)
        weights = (q.unsqueeze(-1) * k.transpose(-1, -2).unsqueeze(1)).sum(2).softmax(-1)
        return (weights.unsqueeze(-1) * v.unsqueeze(1)).sum(2), k, v, weights

    inputs = {name: torch.randn(6, rows, 8) for name, rows in (("q", 1), ("past_k", 20), ("past_v", 20), ("x", 1))}
    kv = found_in(capture(attend, **inputs))
    assert [(value.outputs, value.dim, value.layer) for value in kv.found] == [((1,), 1, 0), ((2,), 1, 0)]
    assert kv.left_out == ()


def test_a_growing_value_without_attention_stays_with_a_reason():
    def index(past, x):
        keys = torch.cat([past, x], 1)
        return (x @ keys.transpose(-1, -2)).relu().topk(3).indices, keys

    (left,) = found_in(capture(index, past=torch.randn(2, 20, 8), x=torch.randn(2, 1, 8))).left_out
    assert (left.output, left.reason) == (1, UNREAD)


def test_the_state_of_a_convolution_is_not_a_token_cache():
    def shift(state, x):
        state = torch.cat([state, x], 2)
        return (state[..., -3:] * 2).sum(-1), state[..., -4:]

    kv = found_in(capture(shift, state=torch.randn(2, 8, 4), x=torch.randn(2, 8, 1)))
    assert (kv.found, kv.left_out) == ((), ())


@pytest.mark.parametrize(
    "way",
    ways(
        [Way("Llama", batch=2), Way("Mistral", batch=2)],
        [Way("Gemma3Text", batch=2), Way("Qwen3Next", batch=2), Way("Bamba", batch=2), Way("Mistral", rows=10)],
    ),
)
def test_a_preallocated_cache_stays_with_a_reason(way):
    """Its buffers, created in the prefill, are constants into which rows are written, or copied for a window."""
    model = way.model()
    cache = StaticCache(config=model.config, max_cache_len=64)
    kept = keeping(cache, model)
    with torch.no_grad():
        captured = capture(
            lambda **inputs: model(**inputs, **kept, logits_to_keep=1).logits,
            **prompt(way.batch, way.rows, padded=True),
        )
    kv = found_in(captured)
    leave, stay = accounted(captured, cache, kv)
    assert leave == 0
    assert stay == len(kv.left_out) > 0
    assert {value.reason for value in kv.left_out} == {STATIC}


def test_a_view_of_a_past_is_fetched_as_a_view():
    """For a past without new rows, an attention written as products reads `view(expand(past))`."""

    def attend(q, k, v):
        k, v = (t.expand(2, 4, 20, 8).view(8, 20, 8) for t in (k, v))
        return (q @ k.transpose(-1, -2)).softmax(-1) @ v

    k, v = (on_host(torch.randn(2, 4, 20, 8), CPU) for _ in range(2))
    captured = capture(attend, q=torch.randn(8, 1, 8), k=k, v=v)
    gm = attention_form(copy_graph(captured.gm))
    record = kv_offload(gm, CPU, start=True)
    verify(gm)
    assert record.arriving == 2
    buffers = [node for node in gm.graph.nodes if node.target is FETCH_START]
    assert any(buffer.args[0].op == "call_function" for buffer in buffers)
    torch.testing.assert_close(gm(*captured.inputs)[0], captured.outputs[0])


# --- from the prompt to the last token ---


def generated(model: Any, way: Way, inputs: dict[str, torch.Tensor], **more: Any) -> Any:
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    asked = {"return_dict_in_generate": True, "output_logits": True}
    with way.casting():
        return model.generate(**inputs, **{**settings, **asked, **way.generation, **more})


def both(way: Way, inputs: dict[str, torch.Tensor], **more: Any) -> Any:
    """Return the tokens of the compiled model, after comparing them with those of the eager model."""
    expected = generated(way.model(), way, inputs, **more)
    model = way.model()
    model.compile(backend="mom", options=OPTIONS)
    result = generated(model, way, inputs, **more)
    assert torch.equal(result.sequences, expected.sequences)
    for a, b in zip(result.logits, expected.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=way.tolerance)
    return result


@pytest.mark.usefixtures("eager_pieces")
@pytest.mark.parametrize(
    "way",
    ways(
        [Way("Mistral", "eager", settings={"sliding_window": 64}, batch=2)],
        [Way("DeepseekV3", batch=2)]
        + [Way("Gemma3Text", attention, settings={"sliding_window": 64}) for attention in ("sdpa", "eager")]
        + [Way(name, autocast=True) for name in ("Llama", "GPT2", "Gemma3Text")]
        + [Way(name, "eager", batch=2) for name in ("Llama", "Bloom", "GPT2", "DeepseekV2", "DeepseekV3")]
        + [Way(name, batch=2) for name in ("Qwen3Next", "Bamba")]
        + [Way(name, "eager", batch=2, generation={"num_beams": 3}) for name in ("Llama", "DeepseekV3")],
    ),
)
def test_generation_equals_eager_mode_with_the_whole_cache_on_the_host(way):
    result = both(way, prompt(way.batch, way.rows, padded=way.batch > 1))
    kept = held(result.past_key_values)
    assert kept
    assert all(isinstance(tensor, HostTensor) for tensor in kept)
    assert not any(report.on_device for report in mom_compile.reports())


@pytest.mark.usefixtures("eager_pieces", "stock_is_eager")
@pytest.mark.parametrize(
    "way",
    ways(
        [Way("Llama", batch=2)],
        [Way(name, batch=2) for name in ("Mistral", "Gemma3Text", "Qwen3Next", "Bamba")]
        + [Way("Mistral", batch=2, rows=10)],
    ),
)
def test_a_static_cache_in_a_padded_batch_generates_the_same_tokens(way):
    with pytest.warns(MomWarning, match="allocates room for all tokens ahead"):
        result = both(way, prompt(2, way.rows, padded=True), cache_implementation="static")
    assert not any(isinstance(tensor, HostTensor) for tensor in held(result.past_key_values))
    for report in mom_compile.reports():
        assert set(report.on_device.values()) == {STATIC}


@pytest.mark.usefixtures("eager_pieces")
@pytest.mark.parametrize(
    ("name", "attention"),
    [
        ("Whisper", "eager"),
        *(pytest.param(n, a, marks=pytest.mark.slow) for n in ("Bart", "T5", "Whisper") for a in ("sdpa", "eager")),
    ],
)
def test_both_caches_of_an_encoder_decoder_are_on_the_host(name, attention):
    """Keys and values of the encoder are computed once and then read through views; its states are an output."""
    eager, model = small_model(name), small_model(name)
    for each in (eager, model):
        each.set_attn_implementation(attention)
    model.compile(backend="mom", options=OPTIONS)
    torch.manual_seed(3)
    source = {"input_features": torch.randn(2, 16, 100)} if name == "Whisper" else prompt(2, PROMPT, padded=True)
    with torch.no_grad():
        expected, _, _ = answers(eager, source)
        logits, cache, states = answers(model, source)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    kept = held(cache.self_attention_cache) + held(cache.cross_attention_cache)
    assert len(kept) == 8
    assert all(isinstance(tensor, HostTensor) for tensor in kept)
    assert not isinstance(states, HostTensor)


def answers(model: Any, source: dict[str, torch.Tensor]) -> tuple[list[torch.Tensor], Any, torch.Tensor]:
    """Return the logits of a prompt of two tokens and three more, the cache, and the encoder's output."""
    cache = transformers.EncoderDecoderCache(DynamicCache(), DynamicCache())
    kept = keeping(cache, model)
    first = model(**source, decoder_input_ids=torch.tensor([[1, 7], [1, 9]]), **kept)
    states, logits = first.encoder_last_hidden_state, [first.logits]
    mask = {name: value for name, value in source.items() if name == "attention_mask"}
    for token in (5, 6, 7):
        step = model(**mask, encoder_outputs=(states,), decoder_input_ids=torch.tensor([[token]] * 2), **kept)
        logits.append(step.logits)
    return logits, cache, states


@pytest.mark.usefixtures("eager_pieces")
@pytest.mark.parametrize(
    "way",
    ways([Way("Llama", "eager", batch=2)], [Way("DeepseekV3", batch=2), Way("Bloom", batch=2)]),
)
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda cache: cache.reorder_cache(torch.tensor([1, 0])), id="reorder"),
        pytest.param(lambda cache: cache.crop(-3), id="crop", marks=pytest.mark.slow),
        pytest.param(lambda cache: cache.batch_repeat_interleave(2), id="repeat", marks=pytest.mark.slow),
        pytest.param(lambda cache: cache.batch_select_indices(torch.tensor([1])), id="select", marks=pytest.mark.slow),
    ],
)
def test_a_cut_or_rearranged_cache_continues_like_eager_mode(way, change):
    eager, model = way.model(), way.model()
    model.compile(backend="mom", options=OPTIONS)
    caches = [DynamicCache(config=eager.config), DynamicCache(config=eager.config)]
    with torch.no_grad():
        for one, cache in zip((eager, model), caches, strict=True):
            one(**prompt(2, PROMPT), **keeping(cache, eager))
            change(cache)
        for step in range(3):
            rows = held(caches[0])[0].shape[0]
            token = prompt(rows, 1, seed=step)
            want, got = (m(**token, **keeping(c, eager)).logits for m, c in zip((eager, model), caches, strict=True))
            torch.testing.assert_close(got, want, rtol=0, atol=way.tolerance)
    assert all(isinstance(tensor, HostTensor) for tensor in held(caches[1]))


@pytest.mark.slow
@pytest.mark.usefixtures("eager_pieces")
@pytest.mark.parametrize("way", ways([Way("DeepseekV3"), Way("Llama", "eager"), Way("Llama", autocast=True)], []))
def test_a_second_turn_continues_from_the_host(way):
    eager, model = way.model(), way.model()
    model.compile(backend="mom", options=OPTIONS)
    caches = [DynamicCache(config=eager.config), DynamicCache(config=eager.config)]
    with torch.no_grad(), way.casting():
        for turn in (prompt(1, PROMPT), prompt(1, 1, seed=1), prompt(1, 37, seed=2), prompt(1, 1, seed=3)):
            want, got = (
                m(**turn, **keeping(c, eager), logits_to_keep=1).logits
                for m, c in zip((eager, model), caches, strict=True)
            )
            torch.testing.assert_close(got, want, rtol=0, atol=way.tolerance)
            assert all(isinstance(tensor, HostTensor) for tensor in held(caches[1]))
