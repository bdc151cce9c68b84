"""Window layers are computed inside the loops: their keys and values never exist at full length, nor does the rest of
what a sliding cache shows of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import fx
from transformers import DynamicCache

import mom_compile
from benchmarks.models import keeping
from mom_compile.report.facts import PREFILL
from mom_passes.graph.arguments import argument
from mom_passes.loops.loop import loop_nodes
from mom_passes.loops.ports import CarryOut, Stored
from mom_passes.ops.attention import MOM_ATTENTION
from tests.models import next_token, prompt, small_model
from tests.programs import HIDDEN, STEPS, Weights, weights_of
from tests.shares import random_examples
from tests.test_properties import RANDOM_PROGRAMS, parameter_names
from tests.tracing import check_every_length, rewrite, trace

HEADS, GROUPS, CHANNELS = 4, 2, HIDDEN // 4


def window_layer(
    x: torch.Tensor, w: Weights, window: int, padded: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A layer with grouped heads in a window, and its keys and values. `padded`: how many rows each sequence has ahead
    of its first token."""
    batch, tokens, _ = x.shape
    matrices = w.square, w.square.t(), -w.square
    q, k, v = ((x @ m).view(batch, tokens, HEADS, CHANNELS).transpose(1, 2) for m in matrices)
    k, v = torch.tanh(k[:, :GROUPS]), torch.sin(v[:, :GROUPS])
    index = torch.arange(tokens)
    ahead = index[:, None] - index
    seen = ((ahead >= 0) & (ahead < window))[None, None]
    if padded is not None:
        seen = seen & (index >= padded[:, None])[:, None, None]
    keys, values = (t.repeat_interleave(HEADS // GROUPS, 1) for t in (k, v))
    rows = F.scaled_dot_product_attention(q, keys, values, attn_mask=seen)
    return x + rows.transpose(1, 2).reshape(x.shape), k, v


def program(layers: list[Any], *, keeps: bool = False, last: int = 0) -> Any:
    """A number is a layer in a window of so many rows, a name one of the steps of `tests.programs`. With `keeps` the
    rows are returned that the next token sees, with `last` so many rows of the result."""

    def run(x: torch.Tensor, *parameters: torch.Tensor) -> tuple[torch.Tensor, ...]:
        w, kept = Weights(*parameters), []
        for layer in layers:
            if isinstance(layer, str):
                x = STEPS[layer](x, w)
                continue
            x, *keys_and_values = window_layer(x, w, layer)
            kept += [rows[:, :, -layer + 1 :] for rows in keys_and_values if keeps and layer > 1]
        return (x[:, -last:], *kept)

    return run


def traced(layers: list[Any], tokens: int, dynamic: bool = False, **given: Any) -> tuple[fx.GraphModule, list[Any]]:
    weights = weights_of(torch.float64)
    x = torch.randn(2, tokens, HIDDEN, generator=torch.Generator().manual_seed(tokens), dtype=torch.float64)
    return trace(program(layers, **given), x, *weights, dynamic=dynamic), [x, *weights]


def check(gm: fx.GraphModule, inputs: list[Any], mini: int) -> fx.GraphModule:
    """The graph with loops, which computes the same."""
    rewritten, _ = rewrite(gm, mini, parameter_names(gm))
    for expected, actual in zip(gm(*inputs), rewritten(*inputs), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)
    return rewritten


def by_rows(gm: fx.GraphModule) -> list[fx.Node]:
    bodies = (module.loop.body for _, module in loop_nodes(gm))
    attentions = [n for body in bodies for n in body.graph.nodes if n.target is MOM_ATTENTION]
    return [node for node in attentions if argument(node, "first") is not None]


@random_examples(
    10,
    100,
    RANDOM_PROGRAMS,
    st.lists(st.integers(1, 9) | st.sampled_from(["linear", "mlp", "causal", "rope"]), min_size=1, max_size=5),
    st.integers(2, 9),
    st.integers(9, 40),
    st.integers(2, 7),
    st.booleans(),
    st.sampled_from([0, 1, 3]),
    st.booleans(),
)
def test_any_program_keeps_its_meaning(
    layers: list[Any], window: int, tokens: int, mini: int, keeps: bool, last: int, dynamic: bool
) -> None:
    """Windows longer and shorter than mini-sequences, lengths that these do not divide, caches that keep rows."""
    check(*traced(["mlp", *layers, window, "mlp"], tokens, dynamic, keeps=keeps, last=last), mini)


@pytest.mark.parametrize("dynamic", [False, True], ids=["fixed", "dynamic"])
def test_layers_are_one_loop_that_returns_what_the_cache_keeps(dynamic: bool) -> None:
    """Nothing exists at full length but the result."""
    gm, inputs = traced(["mlp", 4, "mlp", 4, "mlp"], 33, dynamic, keeps=True)
    rewritten = check(gm, inputs, 4)
    ((_, module),) = loop_nodes(rewritten)
    assert len(by_rows(rewritten)) == 2
    assert [type(output) for output in module.loop.outputs].count(Stored) == 1
    # The rows that the cache keeps are those that a mini-sequence passes on: no carries of their own.
    assert [type(output) for output in module.loop.outputs].count(CarryOut) == len(module.loop.carries) == 4


@pytest.mark.parametrize("dynamic", [False, True], ids=["fixed", "dynamic"])
def test_a_last_layer_in_a_window_leaves_nothing_at_full_length(dynamic: bool) -> None:
    """Only its last row is needed: it reads the last rows of its keys and values, and of the hidden states."""
    rewritten = check(*traced(["mlp", 4, "mlp", 4, "mlp"], 33, dynamic, keeps=True, last=1), 4)
    ((_, module),) = loop_nodes(rewritten)
    assert not module.loop.stored


def test_a_layer_that_sees_all_keys_is_a_barrier_between_two_loops() -> None:
    rewritten = check(*traced(["mlp", 4, "causal", 4, "mlp"], 33), 4)
    (_, before), _ = loop_nodes(rewritten)
    assert len(by_rows(rewritten)) == 2 and len(before.loop.stored) == 1  # its keys, which are the hidden states


@pytest.mark.parametrize("window", [18, 40])
def test_a_window_that_is_not_much_shorter_than_the_sequence_is_a_barrier(window: int) -> None:
    assert not by_rows(check(*traced(["mlp", window, "mlp", "linear"], 33), 4))


@pytest.mark.parametrize(("mini", "chosen"), [(2, False), (4, True)])
def test_a_window_many_times_longer_than_a_mini_sequence_is_a_barrier(mini: int, chosen: bool) -> None:
    assert bool(by_rows(check(*traced(["mlp", 17, "mlp", "linear"], 40), mini))) == chosen


def test_layers_that_would_pass_on_more_than_a_layer_keeps_are_cut_by_a_barrier() -> None:
    """Two layers of eleven pass on as much as one keeps at full length."""
    rewritten = check(*traced(["mlp", *[9] * 11, "mlp"], 33), 4)
    assert len(by_rows(rewritten)) == 8 and len(loop_nodes(rewritten)) == 4


def test_padded_sequences() -> None:
    """Keys of padding are found by their positions in the sequence."""
    weights = weights_of(torch.float64)

    def run(x: torch.Tensor, padded: torch.Tensor, *parameters: torch.Tensor) -> tuple[torch.Tensor, ...]:
        w = Weights(*parameters)
        x, k, _ = window_layer(STEPS["mlp"](x, w), w, 4, padded)
        return STEPS["mlp"](window_layer(x, w, 5, padded)[0], w), k[:, :, -3:]

    x = torch.randn(2, 33, HIDDEN, dtype=torch.float64)
    for padded in ([0, 7], [13, 2], [0, 0]):
        inputs = [x, torch.tensor(padded), *weights]
        gm = trace(run, *inputs)
        assert len(by_rows(check(gm, inputs, 4))) == 2


def refused(gm: fx.GraphModule) -> None:
    rewritten, _ = rewrite(gm, 4, parameter_names(gm))
    assert not by_rows(rewritten)


def masked(seen: Any) -> fx.GraphModule:
    """A layer of 33 rows with a mask of queries and keys."""
    weights = weights_of(torch.float64)

    def run(x: torch.Tensor, *parameters: torch.Tensor) -> tuple[torch.Tensor, ...]:
        w = Weights(*parameters)
        x = STEPS["mlp"](x, w)
        q, k, v = ((x @ m).view(2, 33, HEADS, -1).transpose(1, 2) for m in (w.square, w.square.t(), w.square + 1))
        index = torch.arange(33)
        mask = seen(index[:, None], index)[None, None]
        rows = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return (STEPS["mlp"](x + rows.transpose(1, 2).reshape(x.shape), w),)

    return trace(run, torch.randn(2, 33, HIDDEN, dtype=torch.float64), *weights)


@pytest.mark.parametrize(
    "seen",
    [
        lambda i, j: (i - j < 4) & (j - i < 4),
        lambda i, j: (i >= j) & (i // 4 == j // 4),
        lambda i, j: (i >= j) & (i - j < 8) & ((i - j) % 2 == 0),
        lambda i, j: (i >= j) & (i - j < 4) | (j < 1),
    ],
    ids=["looks ahead", "in chunks", "dilated", "with a first token that all see"],
)
def test_another_mask_is_no_window(seen: Any) -> None:
    gm = masked(seen)
    refused(gm)


def test_rows_after_an_existing_cache_are_no_window_layer() -> None:
    """The keys are longer than the queries."""
    weights = weights_of(torch.float64)

    def run(x: torch.Tensor, past: torch.Tensor, *parameters: torch.Tensor) -> tuple[torch.Tensor, ...]:
        w = Weights(*parameters)
        x = STEPS["mlp"](x, w)
        q, k = ((x @ m).view(2, 33, HEADS, -1).transpose(1, 2) for m in (w.square, w.square.t()))
        k = torch.cat([past, k], 2)
        ahead = torch.arange(33)[:, None] + 3 - torch.arange(36)
        rows = F.scaled_dot_product_attention(q, k, k, attn_mask=((ahead >= 0) & (ahead < 4))[None, None])
        return STEPS["mlp"](x + rows.transpose(1, 2).reshape(x.shape), w), k[:, :, -3:]

    x, past = torch.randn(2, 33, HIDDEN, dtype=torch.float64), torch.randn(2, HEADS, 3, 2, dtype=torch.float64)
    gm = trace(run, x, past, *weights)
    refused(gm)
    check(gm, [x, past, *weights], 4)


def test_compiled_for_every_length() -> None:
    """One body for all lengths, among them some that its mini-sequences do not divide."""
    check_every_length(program(["mlp", 3, "causal", 4, "mlp"]))


@pytest.mark.parametrize(
    ("family", "padded", "keep"),
    [
        ("Gemma3Text", False, 1),
        ("Mistral", True, 1),
        pytest.param("GptOss", False, 0, marks=pytest.mark.slow),
        pytest.param("GptOss", True, 1, marks=pytest.mark.slow),
        pytest.param("Gemma2", True, 0, marks=pytest.mark.slow),
        pytest.param("Mistral", False, 1, marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("eager_pieces")
def test_models_with_windows(family: str, padded: bool, keep: int) -> None:
    """Windows of 16, two lengths that mini-sequences do not divide, then decode steps. Sinks, capped scores and
    mixtures of experts are among the models."""
    model, reference = (small_model(family, num_hidden_layers=3) for _ in range(2))
    torch._dynamo.reset()
    model.compile(backend="mom", options={"mini_seq_len": 16, "strict": True})
    for tokens in (90, 77):
        inputs = prompt(2 if padded else 1, tokens, padded)
        cache, expected = DynamicCache(config=model.config), DynamicCache(config=model.config)
        with torch.no_grad():
            for _ in range(3):
                mine = model(**inputs, logits_to_keep=keep, **keeping(cache, model)).logits
                logits = reference(**inputs, logits_to_keep=keep, **keeping(expected, reference)).logits
                torch.testing.assert_close(mine, logits, rtol=0, atol=1e-4)
                inputs = next_token(inputs)
        for mine, theirs in zip(cache.layers, expected.layers, strict=True):
            torch.testing.assert_close(mine.keys, theirs.keys, rtol=0, atol=1e-4)
            torch.testing.assert_close(mine.values, theirs.values, rtol=0, atol=1e-4)
    prefill = [report for report in mom_compile.reports() if report.kind == PREFILL and report.stages]
    assert prefill and all("window" in stage.attention for stage in prefill[0].stages[:1])
    layers = len(model.config.layer_types) if hasattr(model.config, "layer_types") else 3
    assert all(len(report.stages) < layers for report in prefill)


@pytest.mark.parametrize(
    "offload", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["on the host", "on the device"]
)
@pytest.mark.usefixtures("eager_pieces")
def test_a_cache_on_the_host_gets_the_window(offload: bool) -> None:
    model, reference = (small_model("Gemma3Text", num_hidden_layers=3) for _ in range(2))
    torch._dynamo.reset()
    model.compile(backend="mom", options={"mini_seq_len": 16, "strict": True, "kv_offload": offload})
    inputs, shapes = prompt(1, 90), []
    cache, expected = DynamicCache(config=model.config), DynamicCache(config=model.config)
    with torch.no_grad():
        for _ in range(3):
            mine = model(**inputs, **keeping(cache, model)).logits
            logits = reference(**inputs, **keeping(expected, reference)).logits
            torch.testing.assert_close(mine, logits, rtol=0, atol=1e-4)
            shapes.append([tuple(layer.keys.shape) for layer in cache.layers])
            inputs = next_token(inputs)
    assert shapes[0][0][2] == 15 and shapes[0] == [(1, 2, n, shapes[0][0][3]) for n in (15, 15, 90)]


@pytest.mark.parametrize("last", [0, 1])
def test_one_graph_serves_all_lengths(last: int) -> None:
    """Also those of one row, and those shorter than the windows."""
    gm, (x, *weights) = traced(["mlp", 4, "mlp", 6, "mlp"], 33, dynamic=True, last=last)
    rewritten = check(gm, [x, *weights], 4)
    assert by_rows(rewritten)
    for tokens in (1, 2, 3, 5, 9, 40):
        given = torch.cat([x, x.flip(1)], 1)[:, :tokens]
        (expected,) = program(["mlp", 4, "mlp", 6, "mlp"], last=last)(given, *weights)
        (actual,) = rewritten(given, *weights)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)
