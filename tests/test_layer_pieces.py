"""Decode steps are cut at layers, which share their pieces; what is captured for one length shares those of all."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import fx
from transformers import StaticCache

from benchmarks.models import keeping
from mom_compile import reports
from mom_compile.backend import make
from mom_compile.config import parse_options
from mom_compile.lowering.canonical import NO_LITERALS, Literals
from mom_compile.pipeline import run_pipeline
from mom_compile.report.facts import PieceLog
from mom_passes.ops.transfers import EXTEND
from mom_passes.program.program import Call, Compute, Transfer, Why
from mom_passes.program.rewritten import Rewritten
from tests.captured import capture
from tests.models import ids, tiny
from tests.programs import ATTENTION, HIDDEN, ROWWISE, weights_of

LAYERS = 6
STATIC = {"mini_seq_len": 8, "strict": True}


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


def generate(model: Any, tokens: int) -> torch.Tensor:
    given = ids(1, tokens)
    asked = {"attention_mask": torch.ones_like(given), "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    return model.generate(input_ids=given, **asked)  # type: ignore[no-any-return]


@functools.cache
def decode_graph(layers: int = 2, tokens: int = 20, family: str = "Llama") -> fx.GraphModule:
    """A decode step as captured, over a cache of so many tokens."""
    model = tiny(family, num_hidden_layers=layers)
    with torch.no_grad():
        past = model(ids(1, tokens), use_cache=True).past_key_values

    def step(token: torch.Tensor) -> Any:
        out = model.forward(input_ids=token, **keeping(past, model), use_cache=True)
        return out.logits, *(t for layer in out.past_key_values.layers for t in (layer.keys, layer.values))

    return capture(step, token=ids(1, 1)).gm


def by_layers(graph: fx.GraphModule) -> Rewritten | None:
    """What the passes make of a graph that loops would not help."""
    limit = parse_options(STATIC).limit("cpu")
    found = run_pipeline(graph, static_inputs=(), limit=limit)
    assert found.no_loops is not None and found.by_layers == (found.program is not None)
    return found.program


@pytest.mark.slow
def test_layers_of_a_decode_step_share_their_pieces_and_those_of_other_lengths() -> None:
    model = tiny("Llama", num_hidden_layers=LAYERS)
    expected = [generate(model, tokens) for tokens in (21, 38)]
    model.compile(backend="mom", options=STATIC)

    assert torch.equal(generate(model, 21), expected[0])
    prefill, step = reports()  # a prompt is laid out as a step leaves the cache: one graph for all steps
    assert prefill.stages and step.layer_pieces == LAYERS + 1
    assert len(step.compiled_pieces) == 3, "the first layer, any other and the head"
    assert "7 pieces by layers" in step.headline

    assert torch.equal(generate(model, 38), expected[1])
    longer = reports()[2:]
    assert longer and longer[0].stages
    compiled = [report.compiled_pieces for report in longer]
    if torch.__version__.startswith("2.11"):
        # Its Dynamo writes the graph of all lengths otherwise, and for one piece of a step Inductor writes no C++.
        assert sum(map(len, compiled)) <= 3
        return
    assert compiled == [[]] * len(longer), "symbols in place of lengths"
    assert not any(report.eager_pieces for report in reports())


def test_what_a_piece_of_layers_computes_is_the_graph() -> None:
    rewritten = by_layers(decode_graph())
    assert rewritten is not None
    computed = [node for step in rewritten.plan.steps for node in step.nodes]
    assert set(computed) == {node for node in rewritten.gm.graph.nodes if node.op == "call_function"}


@pytest.mark.parametrize(("family", "layers"), [("Llama", 1), ("Llama", 2), ("Mixtral", 2)])
def test_keys_and_values_cut_a_decode_step_once_in_each_layer(family: str, layers: int) -> None:
    rewritten = by_layers(decode_graph(layers, family=family))
    assert rewritten is not None
    steps = rewritten.plan.steps
    assert not any(isinstance(step, Call) and step.why is Why.NUMBER for step in steps)
    assert sum(isinstance(step, Compute) for step in steps) == layers + 1
    assert [step.node.target for step in steps if isinstance(step, Transfer)] == [EXTEND] * 2 * layers


def test_a_step_that_writes_to_its_inputs_stays_whole() -> None:
    model = tiny("Llama", num_hidden_layers=1)
    cache = StaticCache(config=model.config, max_cache_len=32)
    kept = keeping(cache, model)
    with torch.no_grad():
        model(ids(1, 20), **kept)
    graph = capture(lambda token: model.forward(input_ids=token, **kept).logits, token=ids(1, 1)).gm
    assert any(node.target is torch.ops.aten.copy_.default for node in graph.graph.nodes)
    assert by_layers(graph) is None


def test_cuda_graphs_record_a_step_as_a_whole(eager_pieces: None) -> None:
    graph, options = decode_graph(), parse_options(None)
    assert make(graph, options, PieceLog(), {"cudagraphs": True})[1] is None
    assert make(graph, options, PieceLog(), {})[1] is not None


def test_a_length_that_parameters_have_is_left_as_a_number() -> None:
    width = tiny("Llama").config.hidden_size
    for tokens, found in ((20, 20), (width, 0), (width + 1, 0)):
        graph = decode_graph(1, tokens)
        inputs = [n for n in graph.graph.nodes if n.op == "placeholder"]
        pasts = [n for n in inputs if n.meta["val"].dim() == 4]
        literals = Literals.of(graph, {n.name for n in inputs if n not in pasts})
        assert literals.length == found
        assert len(literals.own) == (len(pasts) if found else 0)
        assert (literals == NO_LITERALS) == (found == 0)


def test_a_number_that_happens_to_be_the_length_keeps_its_meaning() -> None:
    weights = weights_of(torch.float64)

    def program(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = ATTENTION["causal"](ROWWISE["mlp"](x, weights), weights)
        first = y.cumsum(1)[:, :40]  # runs between loops: 40 is no length here, and the length at first
        return ROWWISE["mlp"](y, weights), first * torch.arange(40, dtype=x.dtype)[:, None]

    compiled = torch.compile(program, backend="mom", options=STATIC)
    generator = torch.Generator().manual_seed(0)
    for tokens in (40, 57, 83):
        x = torch.randn(2, tokens, HIDDEN, dtype=torch.float64, generator=generator)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), program(x))
    assert [bool(report.stages) for report in reports()] == [True] * len(reports()) and len(reports()) >= 2
