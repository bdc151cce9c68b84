"""Attention to packed sequences: mini-sequences are whole sequences, so that keys and values are never stored at full
length, and model files that call attention for each sequence are traced as one call."""

from __future__ import annotations

import functools
import importlib
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

import mom_compile
from benchmarks.measure import peak_bytes, watch_cpu
from mom_compile.packed_attention import same_sequence
from mom_passes.graph.arguments import argument
from mom_passes.loops.loop import loop_nodes, split_between
from mom_passes.ops.attention import MOM_ATTENTION
from tests.programs import HIDDEN, STEPS, Weights, weights_of
from tests.shares import random_examples
from tests.test_properties import RANDOM_PROGRAMS, parameter_names
from tests.tracing import rewrite, trace

watch_cpu()
HEADS, CHANNELS = 4, HIDDEN // 4


def boundaries(*lengths: int) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def packed_layer(x: torch.Tensor, w: Weights, ends: torch.Tensor) -> torch.Tensor:
    """A layer whose tokens attend to their own packed sequence, both ways; one row of tokens, `[1, S, HIDDEN]`."""
    q, k, v = (
        (x @ m).view(1, x.shape[1], HEADS, CHANNELS).transpose(1, 2) for m in (w.square, w.square.t(), -w.square)
    )
    rows = F.scaled_dot_product_attention(q, torch.tanh(k), torch.sin(v), attn_mask=same_sequence(ends, x.shape[1]))
    return x + rows.transpose(1, 2).reshape(x.shape)


def program(layers: list[str]) -> Any:
    """"short" and "long" are layers over the packings of two inputs, other names steps of `tests.programs`."""

    def run(x: torch.Tensor, short: torch.Tensor, long: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        w, ends = Weights(*parameters), {"short": short, "long": long}
        for layer in layers:
            x = packed_layer(x, w, ends[layer]) if layer in ends else STEPS[layer](x, w)
        return x

    return run


def traced(
    layers: list[str], short: torch.Tensor, long: torch.Tensor, dynamic: bool = False
) -> tuple[fx.GraphModule, list[Any]]:
    tokens = int(short[-1])
    x = torch.randn(1, tokens, HIDDEN, generator=torch.Generator().manual_seed(tokens), dtype=torch.float64)
    inputs = [x, short, long, *weights_of(torch.float64)]
    return trace(program(layers), *inputs, dynamic=dynamic), inputs


def check(gm: fx.GraphModule, inputs: list[Any], mini: int) -> fx.GraphModule:
    """Return the graph with loops for a call with these inputs. It computes the same."""
    rewritten, _ = rewrite(gm, mini, parameter_names(gm)[2:], inputs=inputs)
    torch.testing.assert_close(rewritten(*inputs), gm(*inputs), rtol=0, atol=1e-10)
    return rewritten


def kept(gm: fx.GraphModule) -> list[fx.Node]:
    """The attentions in loops that read keys of the mini-sequence alone."""
    bodies = (module.loop.body for _, module in loop_nodes(gm))
    attentions = [n for body in bodies for n in body.graph.nodes if n.target is MOM_ATTENTION]
    return [node for node in attentions if argument(node, "first") is not None]


LENGTHS = st.lists(st.integers(0, 7), min_size=1, max_size=12).filter(lambda lengths: sum(lengths) > 8)


@random_examples(
    25,
    150,
    RANDOM_PROGRAMS,
    st.lists(st.sampled_from(["short", "long", "linear", "mlp", "causal", "rope"]), min_size=1, max_size=5),
    LENGTHS,
    st.integers(1, 5),
    st.integers(2, 7),
    st.booleans(),
)
def test_any_program_keeps_its_meaning(
    layers: list[str], lengths: list[int], together: int, mini: int, dynamic: bool
) -> None:
    """Sequences shorter and longer than mini-sequences, of one token or none; a coarser packing of the same tokens."""
    groups = [sum(lengths[i : i + together]) for i in range(0, len(lengths), together)]
    check(*traced(["mlp", *layers, "short", "mlp"], boundaries(*lengths), boundaries(*groups), dynamic), mini)


@pytest.mark.parametrize("dynamic", [False, True], ids=["fixed", "dynamic"])
def test_layers_of_short_sequences_are_one_loop(dynamic: bool) -> None:
    """Nothing is stored at full length but the result."""
    short, long = boundaries(4, 3, 6, 1, 5, 4, 6, 4), boundaries(7, 12, 14)
    rewritten = check(*traced(["mlp", "short", "mlp", "short", "mlp"], short, long, dynamic), 8)
    ((_, module),) = loop_nodes(rewritten)
    assert len(kept(rewritten)) == 2 and len(module.loop.stored) == 1 and len(module.loop.within) == 1


def test_two_packings_are_in_one_loop_that_cuts_neither() -> None:
    short, long = boundaries(*[3] * 12), boundaries(6, 12, 6, 12)
    rewritten = check(*traced(["short", "mlp", "long", "mlp", "short"], short, long), 12)
    ((_, module),) = loop_nodes(rewritten)
    assert len(kept(rewritten)) == 3 and len(module.loop.within) == 2


def test_attention_to_long_sequences_is_a_barrier_between_layers_of_short_ones() -> None:
    short, long = boundaries(*[4] * 10), boundaries(40)
    rewritten = check(*traced(["short", "mlp", "long", "short", "mlp"], short, long), 8)
    assert len(kept(rewritten)) == 2 and len(loop_nodes(rewritten)) == 2


def test_a_sequence_may_exceed_a_mini_sequence_where_it_is_a_small_part_of_all_tokens() -> None:
    """32 frames of 8 patches in mini-sequences of 4: a barrier would store the keys and values of 256 tokens."""
    frames = boundaries(*[8] * 32)
    rewritten = check(*traced(["mlp", "long", "mlp"], frames, frames), 4)
    ((_, module),) = loop_nodes(rewritten)
    assert len(kept(rewritten)) == 1 and module.loop.rows == module.loop.unbroken == 8


def test_a_call_that_is_not_known_has_barriers() -> None:
    """A plan is made without data."""
    short = boundaries(*[4] * 10)
    gm, inputs = traced(["mlp", "short", "mlp"], short, short)
    rewritten, _ = rewrite(gm, 8, parameter_names(gm)[2:])
    assert not kept(rewritten) and len(loop_nodes(rewritten)) == 2
    torch.testing.assert_close(rewritten(*inputs), gm(*inputs), rtol=0, atol=1e-10)


@settings(RANDOM_PROGRAMS, max_examples=200)
@given(LENGTHS, st.integers(1, 4), st.integers(2, 9))
def test_mini_sequences_cut_no_range(lengths: list[int], together: int, mini: int) -> None:
    groups = [sum(lengths[i : i + together]) for i in range(0, len(lengths), together)]
    tokens = sum(lengths)
    ranges = [ranges_of(boundaries(*lengths)), ranges_of(boundaries(*groups))]
    pieces = split_between(ranges, tokens, mini)
    ends = [start + count for start, count in pieces]
    assert [start for start, _ in pieces] == [0, *ends[:-1]] and ends[-1] == tokens
    assert all(count > 1 for _, count in pieces) or len(pieces) == 1
    allowed = {0, *itertools.accumulate(groups)}
    assert allowed.issuperset(ends)
    # As few as can be: two neighbours are longer than a mini-sequence, where none was joined for being a single row.
    joined = 1 in groups
    assert joined or all(a + b > mini for (_, a), (_, b) in itertools.pairwise(pieces))


def ranges_of(ends: torch.Tensor) -> torch.Tensor:
    rows = [[int(a), int(b)] for a, b in itertools.pairwise(ends) for _ in range(int(b - a))]
    return torch.tensor([rows])


def test_ranges_in_several_places_allow_no_cut() -> None:
    unknown = torch.full((1, 6, 2), -1)
    assert split_between([unknown], 6, 2) == [(0, 6)]
    assert split_between([torch.tensor([[[0, 6]]])], 6, 2) == [(0, 6)]


# --- calls of other data ---


@pytest.mark.parametrize("order", [(0, 1, 0), (1, 0, 1)], ids=["short first", "long first"])
def test_each_call_runs_the_program_for_its_sequences(order: tuple[int, ...]) -> None:
    """Dynamo has one graph: the boundaries are data. The second program is compiled when it is needed, once."""
    torch._dynamo.reset()
    weights, calls = weights_of(torch.float32), [boundaries(*[8] * 8), boundaries(60, *[0] * 6, 4)]

    def model(x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        return program(["mlp", "short", "mlp", "short", "mlp"])(x, ends, ends, *weights)  # type: ignore[no-any-return]

    compiled = torch.compile(model, backend="mom", options={"strict": True, "mini_seq_len": 16})
    x = torch.randn(1, 64, HIDDEN, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for number in order:
            torch.testing.assert_close(compiled(x, calls[number]), model(x, calls[number]), rtol=1e-5, atol=1e-5)
    stages = [len(report.stages) for report in mom_compile.reports()]
    assert stages == [(1, 3)[number] for number in order[:2]]


# --- model files ---


@functools.cache
def tower() -> Any:
    """A vision tower with windows of 16 patches, and one layer with attention to a frame."""
    name = "transformers.models.qwen2_5_vl"
    models = importlib.import_module(f"{name}.modeling_qwen2_5_vl")
    configs = importlib.import_module(f"{name}.configuration_qwen2_5_vl")
    shape = {"depth": 3, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32}
    sizes = {"patch_size": 14, "spatial_merge_size": 2, "window_size": 56, "fullatt_block_indexes": [1]}
    torch.manual_seed(0)
    config = configs.Qwen2_5_VLVisionConfig(**shape, **sizes)
    config._attn_implementation = "sdpa"
    return models.Qwen2_5_VisionTransformerPretrainedModel(config).eval()


def frames(count: int, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(side)
    return torch.randn(count * side * side, 1176, generator=generator), torch.tensor([[count, side, side]])


def test_a_vision_tower_with_windows_is_one_graph_without_keys_at_full_length() -> None:
    """transformers breaks the graph in each layer and calls attention for each window."""
    torch._dynamo.reset()
    model, call = tower(), frames(6, 8)
    with torch.no_grad():
        expected = model(*call)
        actual = torch.compile(model, backend="mom", options={"mini_seq_len": 128})(*call)
    torch.testing.assert_close(actual.pooler_output, expected.pooler_output, rtol=1e-4, atol=1e-5)
    (report,) = [report for report in mom_compile.reports() if report.stages]
    (stage,) = [stage for stage in report.stages if stage.attention]
    assert stage.operators["mom.attention"] == 3 and not report.eager_pieces
    # Groups of four patches, which the merger makes one embedding: the hidden states, and the embeddings.
    assert [stored.type.shape for stored in stage.crossing] == [(384, 32), (96, 32)]
    assert stage.mini_seq_len == 32


def test_other_backends_trace_the_model_as_it_is() -> None:
    torch._dynamo.reset()
    model, call = tower(), frames(2, 8)
    graphs: list[fx.GraphModule] = []

    def spy(gm: fx.GraphModule, inputs: Any) -> Any:
        graphs.append(gm)
        return gm

    with torch.no_grad():
        torch.testing.assert_close(
            torch.compile(model, backend=spy)(*call).pooler_output, model(*call).pooler_output, rtol=1e-4, atol=1e-5
        )
    assert not any("bucketize" in str(node.target) for gm in graphs for node in gm.graph.nodes)


def test_a_tower_that_needs_gradients_keeps_its_code() -> None:
    model, call = tower(), frames(1, 8)
    torch._dynamo.reset()
    with pytest.warns(mom_compile.MomWarning, match="gradients"):
        actual = torch.compile(model, backend="mom", options={"mini_seq_len": 16})(*call).pooler_output
    torch.testing.assert_close(actual, model(*call).pooler_output, rtol=1e-4, atol=1e-5)
    assert actual.requires_grad


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "glm4v", "qwen2_5_omni"])
def test_attention_of_model_files_is_substituted(name: str) -> None:
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    own = [one for one in vars(module).values() if isinstance(one, type) and one.__module__ == module.__name__]
    packed = [one for one in own if hasattr(vars(one).get("forward"), "__wrapped__") and "Attention" in one.__name__]
    assert packed and "_mom_takes_boundaries" in vars(module)


def test_the_mask_has_the_sequences_as_blocks() -> None:
    lengths = (3, 0, 1, 4)
    expected = torch.block_diag(*(torch.ones(n, n) for n in lengths if n)).bool()
    assert torch.equal(same_sequence(boundaries(*lengths), 8)[0, 0], expected)


@pytest.mark.slow
def test_a_long_video_needs_less_memory_than_stock_inductor() -> None:
    """48 frames of 64 patches: 3,072 tokens, in mini-sequences of 128."""
    model, call = tower(), frames(48, 8)
    peaks = {}
    for backend, options in (("inductor", None), ("mom", {"mini_seq_len": 128})):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend=backend, options=options)
        with torch.no_grad():
            compiled(*call)
            peaks[backend] = peak_bytes(lambda compiled=compiled: compiled(*call)).peak
    assert peaks["mom"] < 0.6 * peaks["inductor"]
