"""FlexAttention: an operator between loops, with its graphs inside; around it everything is as with any attention."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from benchmarks.measure import peak_bytes, watch_cpu
from mom_compile import MomWarning, explain, reports
from mom_compile.pipeline import NotWorthwhile, run_pipeline
from mom_compile.report import DECODE_STEP, PREFILL, Report
from mom_passes.attention.flex import flex_attentions, outline_flex, restore_flex_attention
from mom_passes.errors import CannotChunk
from mom_passes.graph.edit import copy_graph
from mom_passes.loops.loop import RowLimit, loops
from mom_passes.rules import Dim, claim_for
from mom_passes.torch_compat import FLEX_ATTENTION
from mom_passes.verify import Contract, verify
from tests.captured import Captured, capture
from tests.models import ids, prompt, small_model
from tests.tracing import reported

#: Hugging Face passes a flag that PyTorch has no use for any more.
pytestmark = pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask:DeprecationWarning")

#: Keys that a query sees, itself included.
WINDOW = 150


def in_window(b: Any, h: Any, q: Any, kv: Any) -> Any:
    return (kv <= q) & (kv > q - WINDOW)


def block_mask(tokens: int) -> BlockMask:
    return create_block_mask(in_window, None, None, tokens, tokens, device="cpu")


class FlexLayer(nn.Module):
    """Grouped heads with ALiBi and a score for each key of each sequence: both captured by the score function."""

    def __init__(self, width: int, heads: int, groups: int, scale: int = 1) -> None:
        super().__init__()
        self.size, self.scale = width // heads, scale
        self.slopes = nn.Parameter(-torch.rand(heads))
        self.q = nn.Linear(width, width, bias=False)
        self.kv = nn.Linear(width, 2 * groups * self.size, bias=False)
        self.o = nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor, keys: torch.Tensor, mask: BlockMask, plain: bool) -> tuple[torch.Tensor, ...]:
        batch, tokens, _ = x.shape
        q = self.q(x).view(batch, tokens, -1, self.size).transpose(1, 2)
        k, v = (part.view(batch, tokens, -1, self.size).transpose(1, 2) for part in self.kv(x).chunk(2, dim=-1))
        q, k, v = q + 0.5, k - 0.5, v * 2  # stock Inductor does not compile views of products here
        seen = self.by_products(q, k, v, keys) if plain else self.by_flex(q, k, v, keys, mask)
        x = x + self.o(seen.transpose(1, 2).reshape(batch, tokens, -1))
        return x + self.down(torch.nn.functional.gelu(self.up(x))), k, v

    def by_flex(self, q: Any, k: Any, v: Any, keys: Any, mask: BlockMask) -> torch.Tensor:
        def scored(score: Any, b: Any, h: Any, at: Any, kv: Any) -> Any:
            return score * self.scale + self.slopes[h] * (at - kv) + keys[b, kv]

        return flex_attention(q, k, v, score_mod=scored, block_mask=mask, enable_gqa=True)

    def by_products(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for part in (k, v))
        at, kv = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
        scores = q @ k.transpose(2, 3) / math.sqrt(self.size) * self.scale
        scores = scores + self.slopes[:, None, None] * (at - kv) + keys[:, None, None]
        return scores.masked_fill(~in_window(0, 0, at, kv), -math.inf).softmax(-1) @ v


class FlexDecoder(nn.Module):
    """`[B, S]` ids and `[B, S]` scores of keys to `[B, keep or S, 64]` logits, and each layer's keys and values."""

    def __init__(self, layers: int = 2, width: int = 32, scales: tuple[int, ...] = (), heads: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(64, width)
        self.layers = nn.ModuleList(FlexLayer(width, heads, 2, scale) for scale in scales or (1,) * layers)
        self.head = nn.Linear(width, 64, bias=False)

    def forward(
        self, ids: torch.Tensor, keys: torch.Tensor, mask: BlockMask | None, keep: int = 0
    ) -> tuple[torch.Tensor, ...]:
        x, cache = self.embed(ids), []
        for layer in self.layers:
            x, k, v = layer(x, keys, mask, mask is None)
            cache += [k, v]
        return self.head(x[:, -keep:] if keep else x), *cache


def inputs(batch: int, tokens: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    keys = torch.randn(batch, tokens, generator=torch.Generator().manual_seed(tokens), dtype=dtype)
    return ids(batch, tokens, seed=tokens), keys


@functools.cache
def captured(batch: int = 2, tokens: int = 200, dynamic: bool = False, **model: Any) -> Captured:
    decoder = FlexDecoder(**model).double()
    tokens_, keys = inputs(batch, tokens)
    return capture(decoder, dynamic=dynamic, ids=tokens_, keys=keys, mask=block_mask(tokens))


def rewritten(graph: Captured, **options: Any) -> tuple[Any, Report]:
    parameters = {
        n.name for n, v in zip(graph.gm.graph.find_nodes(op="placeholder"), graph.inputs, strict=True)
        if isinstance(v, nn.Parameter)
    }  # fmt: skip
    made, report = reported(run_pipeline(graph.gm, static_inputs=parameters, limit=RowLimit(32), **options))
    verify(made.gm, Contract.of(graph.gm), level=2)
    return made.gm, report


@torch.no_grad()
def runs_alike(gm: Any, graph: Captured, tolerance: float) -> None:
    for expected, actual in zip(graph.outputs, gm(*graph.inputs), strict=True):
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# --- the pass ---


def test_a_call_is_one_operator_without_its_graphs():
    gm = copy_graph(captured().gm)
    assert outline_flex(gm) == 2
    assert not gm.graph.find_nodes(op="get_attr")
    calls = list(flex_attentions(gm))
    assert len(calls) == 2 and all(call.args[3] is None and call.args[4][-1] is None for call in calls)


@pytest.mark.parametrize("dynamic", [False, True])
def test_what_is_put_back_is_what_was_captured(dynamic):
    graph = captured(dynamic=dynamic)
    gm = copy_graph(graph.gm)
    outline_flex(gm)
    runs_alike(gm, graph, 0)
    restore_flex_attention(gm)
    assert not list(flex_attentions(gm))
    assert len(gm.graph.find_nodes(op="call_function", target=FLEX_ATTENTION)) == 2
    verify(gm, Contract.of(graph.gm))
    runs_alike(gm, graph, 0)


def test_layers_have_one_structure_if_their_functions_are_alike():
    gm = copy_graph(captured(scales=(2, 2, 3)).gm)
    outline_flex(gm)
    first, second, third = (call.target.structure for call in flex_attentions(gm))
    assert first == second != third


def test_no_dimension_is_cut_and_each_says_why():
    gm = copy_graph(captured().gm)
    outline_flex(gm)
    for dim, reason in enumerate(("batch entry", "index of the head", "block mask", "channels")):
        with pytest.raises(CannotChunk, match=reason):
            claim_for(next(flex_attentions(gm)), Dim(dim))


@pytest.mark.parametrize("dynamic", [False, True])
def test_everything_but_the_attention_is_in_loops(dynamic):
    graph = captured(dynamic=dynamic)
    gm, report = rewritten(graph)
    assert len(loops(gm)) == 3
    assert report.kind == PREFILL
    assert list(report.left_out) == list(report.work_outside)
    assert list(report.left_out) == [f"flex_attention ({node.name})" for node in flex_attentions(gm)]
    assert all("counts queries" in why for why in report.left_out.values())
    runs_alike(gm, graph, 1e-10)


def test_a_long_prompt_whose_work_is_nearly_all_attention_has_loops_too():
    report = explain(
        FlexDecoder(1, width=16, heads=2), *inputs(1, 3000, torch.float32), block_mask(3000),
        options={"mini_seq_len": 512},
    )[0]  # fmt: skip
    assert sum(report.work_outside.values()) > 0.8 * report.work
    assert len(report.stages) == 2


def test_more_sequences_than_tokens_are_not_taken_for_tokens():
    """Sequences have nothing to do with each other: a loop over them would be no loop over tokens."""
    _, report = rewritten(captured(batch=60, tokens=40))
    assert report.token_dimension.endswith("40 (now 40)")


def test_one_query_of_each_sequence_is_a_decode_step():
    def step(x, w, wk, wo, k, v, mask):
        q, new = (x @ w).view(50, 1, 2, 8).transpose(1, 2), (x @ wk).view(50, 1, 2, 8).transpose(1, 2)
        seen = flex_attention(q, torch.cat([k, new], 2), torch.cat([v, new], 2), block_mask=mask)
        return seen.transpose(1, 2).reshape(50, 1, 16) @ wo

    past, weights = torch.randn(50, 2, 39, 8), dict.fromkeys(("w", "wk", "wo"), nn.Parameter(torch.randn(16, 16)))
    mask = create_block_mask(lambda b, h, q, kv: q + 39 >= kv, None, None, 1, 40, device="cpu")
    graph = capture(step, x=torch.randn(50, 1, 16), **weights, k=past, v=past + 1, mask=mask)
    with pytest.raises(NotWorthwhile, match="decode step"):
        rewritten(graph)


def test_only_the_rows_that_are_asked_for_are_computed_behind_it():
    decoder, (tokens, keys) = FlexDecoder(2), inputs(1, 300, torch.float32)
    few, every = (
        explain(decoder, tokens, keys, block_mask(300), keep=keep, options={"mini_seq_len": 64})[0] for keep in (1, 0)
    )
    attention = sum(every.work_outside.values())
    assert few.work - attention < 0.7 * (every.work - attention)


def test_keys_and_values_leave_for_the_host():
    _, report = reported(run_pipeline(captured().gm, static_inputs=(), limit=RowLimit(32), kv_on_host=True))
    assert len(report.on_host) == 4 and not report.on_device


# --- a compiled model, its pieces run node by node ---


@pytest.mark.usefixtures("eager_pieces")
def test_a_score_function_of_ones_own_with_what_it_captures():
    """At lengths that neither the mini-sequence nor a block of the mask divides."""
    decoder = FlexDecoder(2).double()
    fast = torch.compile(decoder, backend="mom", options={"mini_seq_len": 32, "strict": True})
    for batch, tokens in ((2, 200), (2, 301), (3, 389)):
        given = inputs(batch, tokens)
        with torch.no_grad():
            for expected, actual in zip(decoder(*given, None), fast(*given, block_mask(tokens)), strict=True):
                torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    assert all(len(report.stages) == 3 and len(report.left_out) == 2 for report in reports())


@pytest.mark.usefixtures("eager_pieces")
def test_layers_share_their_pieces():
    made = []
    for layers in (3, 4):
        torch._dynamo.reset()
        fast = torch.compile(FlexDecoder(layers), backend="mom", options={"mini_seq_len": 64, "strict": True})
        with torch.no_grad():
            fast(*inputs(1, 200, torch.float32), block_mask(200))
        made.append(len(reports()[-1].compiled_pieces))
    assert made[0] == made[1]


@pytest.mark.usefixtures("eager_pieces")
def test_layers_of_other_functions_do_not_share_theirs():
    decoder = FlexDecoder(scales=(1, 1, 2)).double()
    fast, given = torch.compile(decoder, backend="mom", options={"mini_seq_len": 64, "strict": True}), inputs(1, 200)
    with torch.no_grad():
        torch.testing.assert_close(fast(*given, block_mask(200))[0], decoder(*given, None)[0], rtol=1e-10, atol=1e-10)
    assert sum("flex" in name or "piece" in name for name in reports()[-1].compiled_pieces) == 2


# --- Hugging Face ---


def flex_and_eager(family: str, **changes: Any) -> tuple[Any, Any]:
    """A small model with FlexAttention, compiled, and the same with attention written as products."""
    model, eager = (small_model(family, attn_implementation=kind, **changes) for kind in ("flex_attention", "eager"))
    eager.load_state_dict(model.state_dict())
    return model, eager


def compiled(family: str, layers: int = 3, **options: Any) -> tuple[Any, Any]:
    model, eager = flex_and_eager(family, num_hidden_layers=layers)
    model.compile(backend="mom", options={"mini_seq_len": 32, "strict": True, **options})
    return model, eager


def same_tokens(model: Any, eager: Any, given: dict[str, torch.Tensor], options: dict[str, Any]) -> None:
    assert torch.equal(model.generate(**given, **options, disable_compile=True), eager.generate(**given, **options))


def looped() -> list[Report]:
    return [report for report in reports() if report.stages and report.left_out]


@pytest.mark.usefixtures("eager_pieces", "stock_is_eager")
def test_a_padded_batch():
    model, eager = compiled("Llama", layers=2)
    given = prompt(2, 150, padded=True)
    real = given["attention_mask"].bool()
    with torch.no_grad():
        torch.testing.assert_close(model(**given).logits[real], eager(**given).logits[real], rtol=1e-4, atol=1e-5)
    (report,) = looped()
    assert report.kind == PREFILL and len(report.stages) == 3
    assert {why.split()[0] for why in report.left_out.values()} == {"FlexAttention"}
    assert list(report.left_out) == list(report.work_outside)


@pytest.mark.slow
@pytest.mark.usefixtures("eager_pieces", "stock_is_eager")
def test_as_much_is_in_loops_as_with_the_default_attention():
    work = []
    for attention in ("flex_attention", "sdpa"):
        torch._dynamo.reset()
        model = small_model("Llama", attn_implementation=attention, num_hidden_layers=3)
        model.compile(backend="mom", options={"mini_seq_len": 32, "strict": True})
        with torch.no_grad():
            model(**prompt(2, 150))
        found = [report for report in reports() if report.stages]
        work.append((sum(r.work for r in found), sum(sum(r.work_outside.values()) for r in found)))
    (flex, outside), (whole, nothing) = work
    assert flex == whole and nothing == 0
    # Of three layers, all queries with all keys, and the weights with the values.
    assert outside == 3 * (2 * 150 * 64) * 150 * 2


@pytest.mark.slow
@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
@pytest.mark.parametrize("kv_offload", [False, True])
@pytest.mark.usefixtures("eager_pieces", "stock_is_eager")
def test_generation_with_windows_and_soft_caps(family, kv_offload):
    """At lengths that no block of the mask divides, behind padding, with the cache on the device or on the host."""
    model, eager = compiled(family, kv_offload=kv_offload)
    for tokens in (140, 333):
        given = prompt(2, tokens, padded=True)
        options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
        with torch.no_grad():
            same_tokens(model, eager, given, options)
    assert not any(report.failed for report in reports())
    assert any(report.kind == DECODE_STEP for report in reports())
    assert all(len(report.on_host) == 2 * 3 * kv_offload and not report.on_device for report in looped())


# --- compiled ---


class Peak(FlexDecoder):
    """Wide MLPs, so that stock Inductor's peak is theirs."""

    def __init__(self, layers: int = 6) -> None:
        super().__init__(layers, width=64, heads=4)
        for layer in self.layers:
            layer.up, layer.down = nn.Linear(64, 1024), nn.Linear(1024, 64)


def test_inductor_compiles_it_once_for_all_layers():
    decoder, given = FlexDecoder(2), inputs(1, 200, torch.float32)
    fast = torch.compile(decoder, backend="mom", options={"mini_seq_len": 64, "strict": True})
    with torch.no_grad():
        for expected, actual in zip(decoder(*given, None), fast(*given, block_mask(200)), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    (report,) = reports()
    assert not report.eager_pieces and len(report.left_out) == 2
    assert sum(name.startswith("piece") for name in report.compiled_pieces) == 1


@pytest.mark.slow
def test_the_peak_is_below_stock_inductors():
    watch_cpu()
    decoder, given, mask = Peak(), inputs(2, 1000, torch.float32), block_mask(1000)
    peaks = {}
    with torch.no_grad():
        expected = decoder(*given, None)
        for backend, options in (("inductor", None), ("mom", {"mini_seq_len": 128, "strict": True})):
            torch._dynamo.reset()
            fast = torch.compile(decoder, backend=backend, options=options, dynamic=False)
            for a, b in zip(fast(*given, mask), expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
            peaks[backend] = peak_bytes(lambda fast=fast: fast(*given, mask)).peak
    (report,) = reports()
    assert not report.eager_pieces and len(report.left_out) == 6
    assert len(report.compiled_pieces) <= 6
    assert peaks["mom"] < 0.6 * peaks["inductor"]
    assert 0.8 * peaks["mom"] < report.expected_peak_bytes < 1.25 * peaks["mom"]


@pytest.mark.slow
@pytest.mark.parametrize("padded", [False, True])
def test_compiled_steps_of_all_lengths(padded):
    """What a mask captures are sizes there: the names of symbols must not be mistaken in C++."""
    model, eager = flex_and_eager("Llama", num_hidden_layers=6)
    model.compile(backend="mom", options={"mini_seq_len": 64, "strict": True})
    given = prompt(2, 200, padded=padded)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    with torch.no_grad():
        same_tokens(model, eager, given, options)
    assert not any(report.eager_pieces or report.failed for report in reports())
    steps = [report for report in reports() if report.kind == DECODE_STEP and report.layer_pieces]
    assert steps and all(len(report.compiled_pieces) < report.layer_pieces for report in steps)


@pytest.mark.slow
def test_what_inductor_refuses_runs_eagerly_with_its_reason():
    """FlexAttention of doubles on a CPU."""
    decoder, given = FlexDecoder(2).double(), inputs(1, 200)
    fast = torch.compile(decoder, backend="mom", options={"mini_seq_len": 64})
    with torch.no_grad(), pytest.warns(MomWarning, match="FlexAttention for CPU"):
        torch.testing.assert_close(fast(*given, block_mask(200))[0], decoder(*given, None)[0], rtol=1e-9, atol=1e-9)
    reasons = reports()[-1].eager_pieces.values()
    assert len(reasons) == 2 and all("FlexAttention for CPU" in reason for reason in reasons)
