"""Attention written as two products, with and without sinks: what is recognised, and the same numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx

import mom_compile.runtime.attention.register  # noqa: F401  registers the kernels
from mom_passes.attention.form import attention_form
from mom_passes.graph.arguments import argument
from mom_passes.verify import verify
from tests.captured import behind_a_past, capture
from tests.models import ids, tiny
from tests.test_attention_form import attentions, conditions, facts
from tests.tracing import trace

aten = torch.ops.aten
B, H, G, R, T, D, DV = 2, 6, 2, 7, 11, 4, 3


def operands(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    """Queries, keys, values and sinks."""
    torch.manual_seed(0)
    shapes = ((B, H, R, D), (B, G, T, D), (B, G, T, DV), (H,))
    return tuple(torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes)


def repeated(x: torch.Tensor) -> torch.Tensor:
    return x[:, :, None].expand(-1, -1, H // G, -1, -1).reshape(B, H, T, -1)


def scores_of(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return q @ repeated(k).transpose(2, 3) * 0.4


def of_heads(sinks: torch.Tensor) -> torch.Tensor:
    return sinks.reshape(1, -1, 1, 1).expand(B, -1, R, -1)


def largest(scores: torch.Tensor) -> torch.Tensor:
    return scores.max(dim=-1, keepdim=True).values


def causal(lowest: float = -math.inf) -> torch.Tensor:
    keep = torch.arange(T)[None] <= torch.arange(R)[:, None] + T - R
    return torch.where(keep, 0.0, lowest)[None, None]


Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def sunk(joined: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Attention:
    """Attention whose scores, joined with sinks in some way, go into a softmax."""

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
        weights = joined(scores_of(q, k) + causal().to(q), sinks).softmax(-1)
        return weights[..., :-1].to(v.dtype) @ repeated(v)

    return attention


SINKS: dict[str, Attention] = {
    "joined": sunk(lambda scores, sinks: torch.cat([scores, of_heads(sinks)], -1)),
    "less the largest": sunk(lambda s, sinks: (c := torch.cat([s, of_heads(sinks)], -1)) - largest(c)),
    "of one number": sunk(lambda s, sinks: torch.cat([s, sinks[:1].view(1, 1, 1, 1).expand(B, H, R, 1)], -1)),
    "in float32": sunk(lambda s, sinks: torch.cat([s, of_heads(sinks)], -1).float()),
}


def check(function: Attention, dtype: torch.dtype = torch.float64, dynamic: bool = False) -> fx.GraphModule:
    inputs = operands(dtype)
    gm = attention_form(trace(function, *inputs, dynamic=dynamic))
    verify(gm)
    bound = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 4e-2}[dtype]
    torch.testing.assert_close(gm(*inputs), function(*inputs), rtol=bound, atol=bound)
    return gm


def no_scores(gm: fx.GraphModule, rows: Any, keys: Any) -> bool:
    """Whether no value has a row of all keys for each query."""
    values = [node.meta.get("val") for node in gm.graph.nodes]
    return not any(
        isinstance(value, torch.Tensor) and value.dim() > 2 and value.shape[-2:] in ((rows, keys), (rows, keys + 1))
        for value in values
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SINKS)
def test_sinks_become_an_argument(name: str, dtype: torch.dtype) -> None:
    gm = check(SINKS[name], dtype)
    (node,) = attentions(gm)
    assert facts(node) == {"mask": None, "is_causal": True, "window": None, "start": T - R}
    assert argument(node, "sinks").meta["val"].shape == (H,)
    assert argument(node, "key").meta["val"].shape == (B, G, T, D)
    assert argument(node, "scale") == 0.4
    assert no_scores(gm, R, T)


def without(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    return (scores_of(q, k) + causal().to(q)).softmax(-1) @ repeated(v)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_products_without_sinks_are_recognised(dtype: torch.dtype) -> None:
    gm = check(without, dtype)
    (node,) = attentions(gm)
    assert argument(node, "sinks") is None
    assert argument(node, "is_causal")
    assert no_scores(gm, R, T)


def test_a_float32_product_of_half_precision_operands_is_recognised() -> None:
    """Kernels compute so anyway: queries and keys become operands in half precision."""

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
        scores = q.float() @ repeated(k).float().transpose(2, 3) * 0.4
        weights = torch.cat([scores, of_heads(sinks).float()], -1).softmax(-1)[..., :-1]
        return weights.to(v.dtype) @ repeated(v)

    (node,) = attentions(check(attention, torch.bfloat16))
    assert {argument(node, name).meta["val"].dtype for name in ("query", "key", "value")} == {torch.bfloat16}


def test_with_a_sink_a_finite_fill_hides_keys() -> None:
    """Also in a row without visible keys: the sink has all its weight. Without a sink the row would see all keys."""

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
        rows, keys = torch.arange(R)[:, None], torch.arange(T)[None]
        seen = (keys != rows) & (rows != 3)
        mask = torch.where(seen[None, None], 0.0, torch.finfo(torch.float32).min)
        return torch.cat([scores_of(q, k) + mask, of_heads(sinks)], -1).softmax(-1)[..., :-1] @ repeated(v)

    (node,) = attentions(check(attention))
    assert argument(node, "mask").meta["val"].dtype == torch.bool


CAPS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "divided": lambda scores: torch.tanh(scores / 0.5) * 0.5,
    "multiplied": lambda scores: 0.5 * torch.tanh(scores * 2.0),
    "in float32": lambda scores: torch.tanh(scores.float() / 0.5).to(scores.dtype) * 0.5,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CAPS)
def test_capped_scores_are_recognised(name: str, dtype: torch.dtype) -> None:
    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
        return (CAPS[name](scores_of(q, k)) + causal().to(q)).softmax(-1) @ repeated(v)

    gm = check(attention, dtype)
    (node,) = attentions(gm)
    assert argument(node, "softcap") == 0.5
    assert argument(node, "scale") == pytest.approx(0.4)
    assert facts(node) == {"mask": None, "is_causal": True, "window": None, "start": T - R}
    assert no_scores(gm, R, T)


def capped_behind_the_mask(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    return (torch.tanh((scores_of(q, k) + causal(-9.0)) / 0.5) * 0.5).softmax(-1) @ repeated(v)


def several_times(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    weights = scores_of(q, k).softmax(-1)
    return torch.cat([weights @ repeated(v), weights], -1)


def of_each_row(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    own = of_heads(sinks) * q[..., :1]
    return torch.cat([scores_of(q, k), own], -1).softmax(-1)[..., :-1] @ repeated(v)


def at_the_front(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    return torch.cat([of_heads(sinks), scores_of(q, k)], -1).softmax(-1)[..., 1:] @ repeated(v)


def cut_at_the_front(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    return torch.cat([scores_of(q, k), of_heads(sinks)], -1).softmax(-1)[..., 1:] @ repeated(v)


def over_the_rows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    return scores_of(q, k).softmax(-2) @ repeated(v)


def less_of_a_key(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    scores = scores_of(q, k)
    return (scores - scores[..., :1, :]).softmax(-1) @ repeated(v)


def less_before_it_is_joined(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    scores = scores_of(q, k)
    return torch.cat([scores - largest(scores), of_heads(sinks)], -1).softmax(-1)[..., :-1] @ repeated(v)


def of_other_sums(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    powers = scores_of(q, k).exp()
    return powers / (powers + 1).sum(-1, keepdim=True) @ repeated(v)


OTHERS = (capped_behind_the_mask, several_times, of_each_row, at_the_front, cut_at_the_front,
          over_the_rows, less_of_a_key, less_before_it_is_joined, of_other_sums)  # fmt: skip


@pytest.mark.parametrize("function", OTHERS)
def test_other_products_are_kept(function: Attention) -> None:
    assert not attentions(check(function))


def test_a_softmax_with_a_narrower_range_is_kept() -> None:
    """The smallest number of float64 is -inf in float32, in which such a row would have no weights."""

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
        return (scores_of(q, k) + causal().to(q)).float().softmax(-1).to(v.dtype) @ repeated(v)

    assert not attentions(attention_form(trace(attention, *operands())))


@pytest.mark.parametrize(
    ("tokens", "dynamic", "padded"),
    [
        (19, False, True),
        pytest.param(2, True, True, marks=pytest.mark.slow),
        pytest.param(19, True, False, marks=pytest.mark.slow),
    ],
)
def test_a_model_with_sinks_computes_the_same(tokens: int, dynamic: bool, padded: bool) -> None:
    """GPT-OSS, with sliding and full layers in turn: no mask is left, and no value of rows x keys."""
    mask = torch.ones(3, tokens, dtype=torch.long)
    mask[0, : tokens // 2] = 0
    given = {"attention_mask": mask} if padded else {}
    model = tiny("GptOss", sliding_window=5)
    captured = capture(model.forward, dynamic=dynamic, input_ids=ids(3, tokens), use_cache=False, **given)
    gm = attention_form(captured.gm)
    verify(gm)
    for new, old in zip(gm(*captured.inputs), captured.outputs, strict=True):
        torch.testing.assert_close(new[mask.bool()], old[mask.bool()], atol=2e-6, rtol=2e-6)
    nodes = attentions(gm)
    assert [argument(node, "window") for node in nodes] == [5 if dynamic or tokens > 5 else None, None]
    for node in nodes:
        rows = node.meta["val"].shape[2]
        assert argument(node, "mask") is None and argument(node, "is_causal")
        assert argument(node, "sinks").op == "placeholder"
        assert argument(node, "key").meta["val"].shape[1] == 2
        assert (conditions(node)["keys"] is not None) == padded
        assert no_scores(gm, rows, rows)


@pytest.mark.parametrize(
    ("new", "dynamic"),
    [(1, False), (7, True), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, True), (7, False)))],
)
def test_a_model_with_sinks_and_a_past_computes_the_same(new: int, dynamic: bool) -> None:
    """A second turn and a decode step. The past of a sliding layer has only the keys of its window."""
    captured = behind_a_past(tiny("GptOss", sliding_window=5), new, dynamic)
    gm = attention_form(captured.gm)
    verify(gm)
    window, full = attentions(gm)
    assert argument(full, "mask") is None
    # The length of a window's past is a symbol without known relation to other lengths: its mask is kept.
    assert argument(window, "mask") is None or (dynamic and argument(window, "mask").meta["val"].dtype == torch.bool)
    # Of batch and heads; before transformers 5.23 the angles of positions are a product too.
    assert not [n for n in gm.graph.nodes if n.target is aten.bmm.default and n.meta["val"].shape[0] == 2 * 4]
    for new_value, old in zip(gm(*captured.inputs), captured.outputs, strict=True):
        torch.testing.assert_close(new_value, old, atol=2e-6, rtol=2e-6)
