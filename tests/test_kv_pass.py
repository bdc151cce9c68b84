"""The pass that offloads keys and values: what it finds, what it inserts, and that results stay the same."""

from __future__ import annotations

import functools

import pytest
import torch
from transformers import DynamicCache

import mom_compile
from benchmarks.models import keeping
from mom_compile.config import parse_options
from mom_compile.memory.decide import fits_for_long
from mom_compile.runtime.host.tensor import HostTensor, on_host
from mom_passes.attention.form import attention_form
from mom_passes.errors import PassError
from mom_passes.graph.edit import copy_graph
from mom_passes.host.kv_offload import kv_offload
from mom_passes.host.kv_values import find_kv
from mom_passes.ops.transfers import APPEND, FETCH, FETCH_START, FETCH_WAIT, OFFLOAD
from mom_passes.program.overlap import overlap
from mom_passes.program.program import Call, Compute, Why
from mom_passes.program.schedule import schedule
from mom_passes.verify import verify
from tests.captured import Captured, capture
from tests.models import FAMILIES, TinyDecoder, ids, prompt, small_model, sweep

CPU = torch.device("cpu")
PAST = 29


def decode_step(name: str, rows: int = 1, *, host: bool = True, dynamic: bool | None = None) -> Captured:
    """The graph of `rows` new tokens over a cache of `PAST`, on the host or not."""
    model = small_model(name, torch.float64, num_hidden_layers=3)
    cache = DynamicCache(config=model.config)
    kept = keeping(cache, model)
    with torch.no_grad():
        model(**prompt(2, PAST), **kept)
    for layer in cache.layers if host else ():
        layer.keys, layer.values = on_host(layer.keys, CPU), on_host(layer.values, CPU)
    return capture(
        lambda input_ids: model(input_ids, **kept, logits_to_keep=1).logits,
        input_ids=ids(2, rows),
        dynamic=dynamic,
    )


@functools.cache
def llama_step() -> Captured:
    return decode_step("Llama")


def offloaded(captured: Captured, *, start: bool = True):
    gm = attention_form(copy_graph(captured.gm))
    record = kv_offload(gm, CPU, start=start)
    verify(gm)
    overlap(gm)
    verify(gm)
    return gm, record


def order(gm, *targets):
    return [node for node in gm.graph.nodes if node.target in targets]


@pytest.mark.parametrize(
    ("name", "rows", "dynamic"),
    [
        ("Mistral", 1, None),
        ("GPT2", 3, None),
        pytest.param("Llama", 3, True, marks=pytest.mark.slow),
        pytest.param("Mistral", 3, True, marks=pytest.mark.slow),
        pytest.param("Bloom", 1, True, marks=pytest.mark.slow),
    ],
)
def test_the_rewritten_graph_computes_the_same(name, rows, dynamic):
    captured = decode_step(name, rows, dynamic=dynamic)
    gm, record = offloaded(captured)
    assert len(record.leaving) == record.arriving == 6
    for mine, reference in zip(gm(*captured.inputs), captured.gm(*captured.inputs), strict=True):
        torch.testing.assert_close(mine, reference, rtol=0, atol=1e-6 if name == "Bloom" else 1e-10)


def test_each_past_is_fetched_once_and_only_new_rows_are_offloaded():
    gm, record = offloaded(llama_step())
    counts = {target: len(order(gm, target)) for target in (FETCH, FETCH_START, FETCH_WAIT, APPEND, OFFLOAD)}
    assert counts == {FETCH: 0, FETCH_START: 6, FETCH_WAIT: 6, APPEND: 6, OFFLOAD: 0}
    assert [value.layer for value in record.leaving] == [0, 0, 1, 1, 2, 2]
    output = next(iter(reversed(gm.graph.nodes)))
    assert sum(node.target is APPEND for node in output.args[0]) == 6


def test_a_fetch_starts_exactly_one_layer_ahead():
    gm, _ = offloaded(llama_step())
    copies = ["begin" if node.target is FETCH_START else "wait" for node in order(gm, FETCH_START, FETCH_WAIT)]
    assert copies == ["begin"] * 4 + ["wait"] * 2 + ["begin"] * 2 + ["wait"] * 4


def test_one_piece_is_between_the_copies_of_two_layers():
    gm, _ = offloaded(llama_step())
    copies = {FETCH_START, FETCH_WAIT, APPEND}
    runs = 0
    for node in gm.graph.nodes:
        computes = node.op == "call_function" and node.target not in copies
        runs += computes and (node.prev.target in copies or node.prev.op == "placeholder")
    assert runs == 4


def test_a_step_has_no_view_between_pieces_and_copies():
    """The values of a layer's heads are a view of a product without other readers, so its piece returns the view: a
    call for each view would make every decode step longer."""
    gm, _ = offloaded(llama_step())
    steps = schedule(gm).steps
    assert sum(isinstance(step, Compute) for step in steps) == 4
    assert not [step for step in steps if isinstance(step, Call) and step.why is Why.VIEW]


def test_a_cache_on_the_device_is_offloaded_only_if_allowed():
    captured = decode_step("Llama", host=False)
    gm, record = offloaded(captured)
    assert len(order(gm, OFFLOAD)) == 6
    assert record.arriving == 0
    for mine, reference in zip(gm(*captured.inputs), captured.gm(*captured.inputs), strict=True):
        torch.testing.assert_close(mine, reference, rtol=0, atol=1e-10)
    gm, record = offloaded(captured, start=False)
    assert not record
    assert gm.code == attention_form(copy_graph(captured.gm)).code


@pytest.mark.usefixtures("eager_pieces")
@pytest.mark.parametrize(
    ("name", "dynamic"),
    [("GPT2", None), *(pytest.param(*case, marks=pytest.mark.slow) for case in (("Llama", True), ("Falcon", None)))],
)
def test_keys_and_values_are_offloaded_before_the_next_layer_runs(name, dynamic):
    """Not at the end of the graph, with its outputs: until then they would all be on the device."""
    model = small_model(name, torch.float64)
    model.compile(backend="mom", dynamic=dynamic, options={"kv_offload": True, "mini_seq_len": 16, "strict": True})
    with torch.no_grad():
        model(**prompt(1, 40), use_cache=True, logits_to_keep=1)
    gm = mom_compile.reports()[-1].graph
    kinds = ["loop" if node.op == "call_module" else "leaves" for node in gm.graph.nodes if _moves(node)]
    assert kinds == ["loop", "leaves", "leaves"] * 2


def _moves(node) -> bool:
    return node.op == "call_module" or node.target is OFFLOAD


def test_a_cache_on_the_host_stays_there_whatever_the_option():
    _, record = offloaded(llama_step(), start=False)
    assert len(record.leaving) == 6


QUICK = {"Bloom"}


@pytest.mark.parametrize("name", sweep(FAMILIES, QUICK))
def test_keys_and_values_are_distinguished_from_other_outputs(name):
    """Two per layer, tokens in dimension 2; a sliding window keeps its last rows."""
    captured = decode_step(name)
    found = find_kv(attention_form(copy_graph(captured.gm))).found
    assert [value.layer for value in found] == [0, 0, 1, 1, 2, 2]
    assert {value.dim for value in found} == {2}
    window = FAMILIES[name].settings.get("sliding_window")
    for value in found:
        rows = value.kept.meta["val"].shape[2]
        assert rows in ({PAST + 1} if window is None else {PAST + 1, window - 1})
        assert value.first == value.full.meta["val"].shape[2] - rows


def test_layer_outputs_are_not_taken_for_a_cache():
    model = TinyDecoder(layers=3).double()

    def every_layer(input_ids):
        states = [model.embed(input_ids)]
        for layer in model.layers:
            states.append(layer(states[-1]))
        return tuple(states), model.head(states[-1])

    captured = capture(every_layer, input_ids=ids(1, 40))
    assert find_kv(attention_form(copy_graph(captured.gm))).found == ()


def test_returned_attention_weights_are_not_taken_for_a_cache():
    def attend(x):
        q, k, v = x, x + 1, x - 1
        weights = (q @ k.transpose(-1, -2)).softmax(-1)
        return weights @ v, weights, k, v

    captured = capture(attend, x=torch.randn(2, 3, 20, 8))
    found = find_kv(attention_form(copy_graph(captured.gm))).found
    assert [value.outputs for value in found] == [(2,), (3,)]


def test_a_step_is_not_cut_if_weights_and_twice_its_cache_fit():
    gm = attention_form(copy_graph(decode_step("Llama", host=False).gm))
    weights = [node for node in gm.graph.nodes if node.op == "placeholder"][:5]
    static = {node.name for node in weights}
    layer = 2 * 2 * (PAST + 1) * 2 * 16 * 8  # K and V of a batch of two, two heads, float64
    needed = sum(node.meta["val"].nbytes for node in weights) + 2 * (3 + 2) * layer
    for budget, fits in ((needed, True), (needed - 1, False)):
        options = parse_options({"kv_offload": "auto", "memory_budget": budget}, None)
        asked = fits_for_long(gm, find_kv(gm), options, static)
        assert asked is not None and asked.fits is fits
    assert fits_for_long(gm, find_kv(gm), parse_options({"kv_offload": True}, None), ()) is None
    # Without a budget nothing leaves a CPU.
    assert fits_for_long(gm, find_kv(gm), parse_options({"kv_offload": "auto"}, None), ()) is None


def test_a_step_with_host_values_is_always_cut():
    options = parse_options({"kv_offload": "auto", "memory_budget": "1TiB"}, None)
    gm = attention_form(copy_graph(llama_step().gm))
    assert find_kv(gm).found and fits_for_long(gm, find_kv(gm), options, ()) is None


@pytest.mark.parametrize("spoil", ["two readers", "filled late"])
def test_reading_a_buffer_before_it_is_filled_raises(spoil):
    gm, _ = offloaded(llama_step())
    wait = order(gm, FETCH_WAIT)[0]
    if spoil == "two readers":
        wait.next.append(gm.graph.call_function(torch.ops.aten.alias.default, (wait.args[0],)))
    else:
        next(iter(wait.users)).replace_input_with(wait, wait.args[0])
    with pytest.raises(PassError, match="before its copy ends"):
        verify(gm)


def test_reading_a_host_value_on_the_device_raises():
    gm, _ = offloaded(llama_step())
    append = order(gm, APPEND)[0]
    append.append(gm.graph.call_function(torch.ops.aten.alias.default, (append,)))
    with pytest.raises(PassError, match="on the host"):
        verify(gm)


def test_last_channels_and_heads_are_not_taken_for_last_rows(eager_pieces):
    def attend(x):
        q, k, v = x, x + 1, x - 1
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return y, k[..., :4], k[..., 4:], v[:, 1:], v[:, :, -7:]

    x = torch.randn(2, 3, 20, 8)
    found = find_kv(attention_form(copy_graph(capture(attend, x=x).gm))).found
    assert [value.outputs for value in found if value.full is not value.kept] == [(4,)]
    compiled = torch.compile(attend, backend="mom", options={"kv_offload": True, "strict": True, "mini_seq_len": 8})
    for actual, expected in zip(compiled(x), attend(x), strict=True):
        fetched = actual.fetch() if isinstance(actual, HostTensor) else actual
        torch.testing.assert_close(fetched, expected)
