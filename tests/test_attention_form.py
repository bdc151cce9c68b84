"""The rewrite of attentions to `mom.attention`: the operators that remain, and the same numbers."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx

import mom_compile.runtime.attention.register  # noqa: F401  registers the kernels
from mom_passes.attention.form import SDPA, attention_form
from mom_passes.graph.arguments import argument
from mom_passes.graph.edit import copy_graph
from mom_passes.ops.attention import MOM_ATTENTION
from mom_passes.verify import verify
from tests.captured import Captured, behind_a_past, capture
from tests.models import ids, tiny
from tests.tracing import trace

aten = torch.ops.aten
FLASH = aten._scaled_dot_product_flash_attention_for_cpu.default
EFFICIENT = aten._scaled_dot_product_efficient_attention.default

B, H, G, S, D = 2, 6, 2, 7, 4


def counts(gm: fx.GraphModule) -> Counter[Any]:
    return Counter(node.target for node in gm.graph.nodes if node.op == "call_function")


def attentions(gm: fx.GraphModule) -> list[fx.Node]:
    return gm.graph.find_nodes(op="call_function", target=MOM_ATTENTION)


def facts(node: fx.Node) -> dict[str, Any]:
    """The arguments that the pass sets."""
    return {name: argument(node, name) for name in ("mask", "is_causal", "window", "start")}


def conditions(node: fx.Node) -> dict[str, fx.Node | None]:
    """The conditions on keys."""
    return {name: argument(node, name) for name in ("keys", "segments", "positions", "spans")}


def rewritten(captured: Captured) -> fx.GraphModule:
    """The captured graph after the pass, checked: well formed, no SDPA left, same outputs."""
    gm = attention_form(copy_graph(captured.gm))
    verify(gm)
    assert not set(counts(gm)) & set(SDPA)
    for new, old in zip(gm(*captured.inputs), captured.outputs, strict=True):
        torch.testing.assert_close(new, old, atol=2e-6, rtol=2e-6)
    return gm


#: Family -> changed settings, the window of each layer, heads of keys and values.
MODELS: dict[str, tuple[dict[str, Any], list[int | None], int]] = {
    "Llama": ({}, [None, None], 2),
    "Gemma3Text": (
        {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
        [5, None],
        2,
    ),
    "GPT2": ({}, [None, None], 4),
    "GPTNeoX": ({}, [None, None], 4),
}


QUICK = {"Gemma3Text"}


@functools.cache
def prefill(family: str, use_cache: bool, dynamic: bool) -> Captured:
    """A prompt of 19 tokens; tests copy its graph."""
    model = tiny(family, **MODELS[family][0])
    return capture(model.forward, dynamic=dynamic, input_ids=ids(1, 19), use_cache=use_cache)


@pytest.mark.parametrize(
    ("family", "use_cache", "dynamic"),
    [
        *(pytest.param(f, False, True, marks=[] if f in QUICK else [pytest.mark.slow]) for f in MODELS),
        ("Llama", False, False), ("Gemma3Text", True, False),
    ],
)
def test_models_compute_the_same_with_one_attention_operator(family: str, use_cache: bool, dynamic: bool) -> None:
    """No mask is left, and keys and values have their own heads without repetition."""
    _, windows, heads = MODELS[family]
    gm = rewritten(prefill(family, use_cache, dynamic))
    nodes = attentions(gm)
    assert [facts(n) for n in nodes] == [{"mask": None, "is_causal": True, "window": w, "start": 0} for w in windows]
    assert {argument(n, "key").meta["val"].shape[1] for n in nodes} == {heads}
    assert not any(t in counts(gm) for t in (aten.index.Tensor, aten.le.Tensor, aten.where.self))
    assert not [n for n in gm.graph.nodes if n.target is aten.expand.default and n.meta["val"].dim() == 5]


#: A graph of any length has what one of a fixed length has, and symbols.
STATIC_TOO = pytest.mark.parametrize("dynamic", [pytest.param(False, marks=pytest.mark.slow), True])


@STATIC_TOO
def test_padding_becomes_a_condition_on_keys(dynamic: bool) -> None:
    """No mask is left, and `mom.spans` runs once for all layers."""
    mask = torch.ones(2, 19, dtype=torch.long)
    mask[0, :6] = 0
    model = tiny("Llama")
    captured = capture(model.forward, dynamic=dynamic, input_ids=ids(2, 19), attention_mask=mask, use_cache=False)
    gm = rewritten(captured)
    for node in attentions(gm):
        given, told = facts(node), conditions(node)
        assert given["is_causal"]
        assert given["mask"] is None
        assert tuple(told["keys"].meta["val"].shape)[-1] == attentions(gm)[0].meta["val"].shape[2]
    assert len({conditions(node)["keys"] for node in attentions(gm)}) == 1
    assert len(gm.graph.find_nodes(op="call_function", target=torch.ops.mom.spans.default)) == 1


@STATIC_TOO
def test_packed_sequences_become_segments(dynamic: bool) -> None:
    """`position_ids` that start again: the model's check for them becomes segment numbers."""
    at = torch.cat([torch.arange(8), torch.arange(11)]).expand(2, -1)
    model = tiny("Llama", num_hidden_layers=1)
    captured = capture(model.forward, dynamic=dynamic, input_ids=ids(2, 19), position_ids=at, use_cache=False)
    for node in attentions(rewritten(captured)):
        given, told = facts(node), conditions(node)
        assert given["mask"] is None
        assert told["segments"] is not None
        assert (told["positions"] is not None) != given["is_causal"]  # before transformers 5.23 causal by index


@pytest.mark.parametrize(
    ("new", "dynamic"),
    [(1, False), (7, True), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, True), (7, False)))],
)
def test_queries_after_a_past_need_no_mask(new: int, dynamic: bool) -> None:
    """A second turn is causal from its first position; a decode step sees all keys but padding."""
    captured = behind_a_past(tiny("Llama", num_hidden_layers=1), new, dynamic)
    for node in attentions(rewritten(captured)):
        given, told = facts(node), conditions(node)
        assert given["mask"] is None
        assert told["keys"] is not None
        assert given["is_causal"] == (new > 1)
        if new > 1:
            start = given["start"]
            assert (start if isinstance(start, int) else int(start.meta["val"])) == 12


def test_no_guards_are_added() -> None:
    gm = copy_graph(prefill("Gemma3Text", False, True).gm)
    sizes = [n.meta["val"] for n in gm.graph.nodes if isinstance(n.meta.get("val"), torch.SymInt)]
    env = sizes[0].node.shape_env
    before = len(env.guards), dict(env.replacements)
    attention_form(gm)
    assert (len(env.guards), dict(env.replacements)) == before


def tensors(*, kv_heads: int = H, keys: int = S) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    return torch.randn(B, H, S, D), torch.randn(B, kv_heads, keys, D), torch.randn(B, kv_heads, keys, D)


def check(function: Callable[..., Any], *inputs: torch.Tensor, dynamic: bool = False) -> fx.GraphModule:
    """Trace a function, rewrite it, and compare it with the function."""
    expected = function(*inputs)
    gm = attention_form(trace(function, *inputs, dynamic=dynamic))
    verify(gm)
    torch.testing.assert_close(gm(*inputs), expected, atol=2e-6, rtol=2e-6)
    return gm


def flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
    return FLASH(query, key, value, **options)[0]


def expanded(x: torch.Tensor, new: int) -> torch.Tensor:
    """The heads in dimension `new - 1` repeated: `[.., G, ..] -> [.., G, n, ..] -> [.., H, ..]`."""
    shape = list(x.shape)
    shape.insert(new, H // G)
    return x.unsqueeze(new).expand(shape).flatten(new - 1, new)


REPEATS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "expand, reshape": lambda x: expanded(x, 2),
    "repeat_interleave": lambda x: x.repeat_interleave(H // G, dim=1),
    "view": lambda x: x.unflatten(1, (-1, 1)).expand(-1, -1, H // G, -1, -1).flatten(1, 2),
    "before the transpose": lambda x: expanded(x.transpose(1, 2), 3).transpose(1, 2),
    "copied after": lambda x: expanded(x, 2).clone(),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("spelling", REPEATS)
def test_repeated_heads_become_grouped(spelling: str, dynamic: bool) -> None:
    repeat = REPEATS[spelling]
    gm = check(lambda q, k, v: flash(q, repeat(k), repeat(v), scale=0.4), *tensors(kv_heads=G), dynamic=dynamic)
    (node,) = attentions(gm)
    assert argument(node, "key").meta["val"].shape[1] == G
    assert argument(node, "value").meta["val"].shape[1] == G
    assert aten.expand.default not in counts(gm)


def test_one_key_head_for_all_query_heads_becomes_grouped() -> None:
    gm = check(lambda q, k, v: flash(q, k.expand(B, H, S, D), v.expand(B, H, S, D)), *tensors(kv_heads=1))
    assert argument(attentions(gm)[0], "key").op == "placeholder"


OTHER_REPEATS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    # Query head h would use key head h % G, not h // (H / G).
    "tiled": lambda x: x.repeat(1, H // G, 1, 1),
    "tiled by expand": lambda x: x[:, None].expand(B, H // G, G, S, D).reshape(B, H, S, D),
    "channels folded in": lambda x: x[:, :, :, None].expand(B, G, S, H // G, D).reshape(B, H, S, D),
}


@pytest.mark.parametrize("name", OTHER_REPEATS)
def test_other_repetitions_are_kept(name: str) -> None:
    repeat = OTHER_REPEATS[name]
    gm = check(lambda q, k, v: flash(q, repeat(k), repeat(v)), *tensors(kv_heads=G))
    assert argument(attentions(gm)[0], "key").meta["val"].shape[1] == H


def test_heads_repeated_for_keys_only_are_kept() -> None:
    query, key, _ = tensors(kv_heads=G)
    value = torch.randn(B, H, S, D)
    gm = check(lambda q, k, v: flash(q, k.repeat_interleave(H // G, 1), v), query, key, value)
    assert argument(attentions(gm)[0], "key").meta["val"].shape[1] == H


def seen(x: torch.Tensor) -> torch.Tensor:
    return torch.rand(B, 1, S, S, generator=torch.Generator().manual_seed(0)) > 0.3


def test_an_additive_mask_becomes_boolean_and_unexpanded() -> None:
    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        return flash(q, k, v, attn_mask=torch.where(keep, 0.0, -math.inf).expand(B, H, S, S))

    gm = check(function, *tensors(), seen(torch.empty(0)))
    assert argument(attentions(gm)[0], "mask").op == "placeholder"
    assert aten.where.self not in counts(gm)


def test_a_mask_with_a_finite_fill_stays_additive() -> None:
    """A row without visible keys is uniform with a finite fill and zero without."""

    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        return flash(q, k, v, attn_mask=torch.where(keep, 0.0, torch.finfo(torch.float32).min))

    keep = seen(torch.empty(0))
    keep[:, :, 2] = False
    gm = check(function, *tensors(), keep)
    assert argument(attentions(gm)[0], "mask").meta["val"].dtype == torch.float32


@pytest.mark.parametrize("operator", [FLASH, EFFICIENT])
def test_a_symbolic_number_of_channels_is_supported(operator: Any) -> None:
    """This occurs where weights are plain arguments and all sizes are symbols. The scale follows from the channels."""
    extra = (None, False) if operator is EFFICIENT else ()
    inputs = tensors()
    gm = trace(lambda q, k, v: operator(q, k, v, *extra, is_causal=True)[0], *inputs, dynamic=True)
    (node,) = attentions(attention_form(gm))
    verify(gm)
    assert isinstance(node.meta["val"].shape[3], torch.SymInt)
    expected = F.scaled_dot_product_attention(*inputs, is_causal=True)
    torch.testing.assert_close(gm(*inputs), expected, atol=2e-6, rtol=2e-6)


def test_a_causal_attention_that_is_not_square_is_kept() -> None:
    query, key, value = tensors(keys=S + 3)
    gm = check(lambda q, k, v: flash(q, k, v, is_causal=True), query, key, value)
    assert counts(gm)[FLASH] == 1
    gm = check(lambda q, k, v: flash(q, k, v), query, key, value)
    assert not attentions(gm)[0].args[5]


@pytest.mark.parametrize("ahead", [0, 3])
def test_a_causal_mask_may_start_at_any_key(ahead: int) -> None:
    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        keep = torch.arange(k.shape[2])[None] <= torch.arange(q.shape[2])[:, None] + ahead
        return flash(q, k, v, attn_mask=torch.where(keep, 0.0, -math.inf))

    (node,) = attentions(check(function, *tensors(keys=S + 3)))
    assert facts(node) == {"mask": None, "is_causal": True, "window": None, "start": ahead}


def test_a_mask_without_known_structure_is_kept() -> None:
    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        keep = torch.arange(k.shape[2])[None] != torch.arange(q.shape[2])[:, None]
        return flash(q, k, v, attn_mask=torch.where(keep, 0.0, -math.inf))

    (node,) = attentions(check(function, *tensors(keys=S + 3)))
    assert argument(node, "mask") is not None
    assert not argument(node, "is_causal")


def test_an_attention_whose_log_sum_exp_is_read_is_kept() -> None:
    gm = check(lambda q, k, v: FLASH(q, k, v, is_causal=True), *tensors())
    assert counts(gm)[FLASH] == 1


def test_an_attention_with_dropout_is_kept() -> None:
    gm = trace(lambda q, k, v: FLASH(q, k, v, 0.0)[0], *tensors())
    (node,) = gm.graph.find_nodes(op="call_function", target=FLASH)
    node.args = (*node.args[:3], 0.5)
    assert counts(attention_form(gm))[FLASH] == 1


def test_the_math_operator_is_rewritten() -> None:
    """It adds a boolean mask as numbers, so only calls with additive masks or none are rewritten."""
    math_op = aten._scaled_dot_product_attention_math.default
    graph = fx.Graph()
    fake = torch._subclasses.FakeTensorMode()
    query, keep = graph.placeholder("query"), graph.placeholder("keep")
    query.meta["val"], keep.meta["val"] = fake.from_tensor(tensors()[0]), fake.from_tensor(seen(torch.empty(0)))
    call = graph.call_function(math_op, (query, query, query, keep))
    call.meta["val"] = math_op(*(n.meta["val"] for n in call.args))
    result = graph.call_function(__import__("operator").getitem, (call, 0))
    result.meta["val"] = call.meta["val"][0]
    graph.output(result)
    gm = fx.GraphModule(torch.nn.Module(), graph)
    assert counts(attention_form(gm))[math_op] == 1
    call.args = call.args[:3]
    gm = attention_form(gm)
    assert len(attentions(gm)) == 1
    x = tensors()[0]
    torch.testing.assert_close(gm(x, None), F.scaled_dot_product_attention(x, x, x), atol=1e-6, rtol=1e-6)


def test_the_result_keeps_the_layout_that_views_rely_on() -> None:
    """The flash kernel follows the query's layout, `mom.attention` does not."""
    gm = check(lambda q, k, v: flash(q, k, v).view(B * H, S, D), *tensors())
    assert counts(gm)[aten.clone.default] == 1


def test_a_copy_to_the_new_layout_is_removed() -> None:
    gm = check(lambda q, k, v: flash(q, k, v).transpose(1, 2).contiguous().view(B, S, H * D), *tensors())
    assert counts(gm)[aten.clone.default] == 0


def test_the_padded_bias_of_the_efficient_operator_is_unpadded() -> None:
    """As SDPA calls it on a GPU: the bias padded to a multiple of eight and expanded. Shapes only."""
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in tensors()]
        bias = torch.empty(B, 1, S, S)

    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        padded = F.pad(bias, (0, 1))[..., :S].expand(B, H, S, S)
        return EFFICIENT(q, k, v, padded, False, scale=0.5)[0]

    try:
        gm = trace(function, *fakes, bias)
    except NotImplementedError:
        pytest.skip("this build of PyTorch cannot trace the operator without a GPU")
    (node,) = attentions(attention_form(gm))
    assert argument(node, "mask").op == "placeholder"
    assert argument(node, "scale") == 0.5


CUDNN = aten._scaled_dot_product_cudnn_attention.default


def for_cudnn(dtype: torch.dtype, said: Callable[[], torch.Tensor], fill: float = -65504.0) -> fx.Node:
    """The rewritten attention of a boolean mask that SDPA has filled for cuDNN. Shapes only."""
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t.to(dtype)) for t in tensors()]

    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return FLASH(q, k, v, attn_mask=torch.where(said(), 0.0, torch.scalar_tensor(fill, dtype=dtype)), scale=0.5)[0]

    gm = trace(function, *fakes)
    (node,) = gm.graph.find_nodes(op="call_function", target=FLASH)
    query, key, value = node.args[:3]
    node.target, node.args = CUDNN, (query, key, value, node.kwargs["attn_mask"], False)
    node.kwargs = {"scale": 0.5}
    gm.recompile()
    (found,) = attentions(attention_form(gm))
    return found


def causal() -> torch.Tensor:
    at = torch.arange(S)
    return (at <= at[:, None])[None, None]


def padded() -> torch.Tensor:
    seen = torch.arange(S) >= torch.tensor([[2], [0]])
    return causal() & seen[:, None, None, :]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_boolean_mask_filled_for_cudnn_is_recovered(dtype: torch.dtype) -> None:
    """-65504, in bfloat16 -65536, replaces -inf, which some versions of cuDNN do not accept."""
    node = for_cudnn(dtype, causal)
    assert facts(node) == {"mask": None, "is_causal": True, "window": None, "start": 0}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_padding_filled_for_cudnn_becomes_a_condition_on_keys(dtype: torch.dtype) -> None:
    """Rows without visible keys are zero, as with all other kernels of SDPA."""
    node = for_cudnn(dtype, padded)
    assert argument(node, "is_causal") is True
    mask = argument(node, "mask")
    assert mask is None or mask.meta["val"].dtype == torch.bool


def test_another_fill_is_not_taken_for_cudnns() -> None:
    node = for_cudnn(torch.bfloat16, causal, fill=-100.0)
    assert argument(node, "mask").meta["val"].dtype == torch.bfloat16 and argument(node, "is_causal") is False
