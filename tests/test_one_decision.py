"""The passes run once on a graph, whatever is decided of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

import mom_compile
from mom_compile import pipeline
from mom_compile.backend import Rewriting, rewrite
from mom_compile.config import parse_options
from mom_compile.report import DECODE_STEP, PREFILL
from mom_compile.report.facts import Facts
from mom_passes.loops.loop import loops
from mom_passes.ops.transfers import OFFLOAD
from tests.captured import capture
from tests.models import ids, tiny
from tests.test_layer_pieces import decode_graph

LAYERS = 2


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The steps that look for tokens, of which a run of the passes has one."""
    found: list[str] = []
    original = pipeline.make_loops

    def counted(*given: Any) -> Any:
        found.append("run")
        return original(*given)

    monkeypatch.setattr(pipeline, "make_loops", counted)
    return found


def prefill(tokens: int, options: Mapping[str, Any]) -> Rewriting:
    model = tiny("Llama", num_hidden_layers=LAYERS)

    def call(x: torch.Tensor) -> Any:
        out = model.forward(input_ids=x, use_cache=True, logits_to_keep=1)
        return out.logits, *(t for layer in out.past_key_values.layers for t in (layer.keys, layer.values))

    graph = capture(call, x=ids(1, tokens)).gm
    return rewrite(graph, parse_options(options), ())


@pytest.mark.parametrize("budget", [None, "10GiB"])
def test_a_short_prompt_goes_through_the_passes_once(runs: list[str], budget: str | None) -> None:
    """It is found to have one mini-sequence when its loops are made; with a budget, that its cache may stay."""
    found = prefill(300, {"memory_budget": budget})
    assert runs == ["run"]
    assert found.by_layers and found.no_loops == "its 300 tokens fit in one mini-sequence of 300"
    assert found.decision is not None and not loops(found.decision.program.gm)
    assert found.facts.kind == PREFILL and len(found.facts.growing) == 2 * LAYERS
    assert (found.for_long is not None) == (budget is not None)


def test_a_short_prompt_whose_cache_leaves_goes_through_the_passes_once(runs: list[str]) -> None:
    found = prefill(300, {"kv_offload": True})
    assert runs == ["run"] and not found.by_layers and found.decision is not None
    graph = found.decision.program.gm.graph
    assert len(graph.find_nodes(op="call_function", target=OFFLOAD)) == 2 * LAYERS == len(found.facts.on_host)


@pytest.mark.parametrize("kv_offload", ["auto", False])
def test_a_short_prompt_has_loops_where_the_budget_is_too_small_for_one_mini_sequence(kv_offload: str | bool) -> None:
    def of(budget: int) -> tuple[Rewriting, int]:
        found = prefill(300, {"memory_budget": budget, "kv_offload": kv_offload})
        assert found.decision is not None and found.decision.choice is not None
        return found, found.decision.choice.smallest(())

    (_, whole), (_, cut) = of(1 << 30), of(1)
    assert cut < whole
    for budget in (cut, whole - 1):
        found, _ = of(budget)
        assert found.no_loops is None and found.decision is not None and not found.decision.refusal


def test_a_long_prompt_has_loops_and_is_not_asked_whether_all_may_stay(runs: list[str]) -> None:
    found = prefill(700, {"memory_budget": "10GiB"})
    assert runs == ["run"] and found.no_loops is None and found.for_long is None
    assert found.decision is not None and len(loops(found.decision.program.gm)) == LAYERS


@pytest.mark.parametrize("budget", [None, "10GiB", 1000])
def test_a_decode_step_goes_through_the_passes_once(runs: list[str], budget: str | int | None) -> None:
    found = rewrite(decode_graph(LAYERS), parse_options({"memory_budget": budget}), ())
    assert runs == ["run"] and found.facts.kind == DECODE_STEP
    assert found.by_layers == (budget != 1000)
    assert "all" in found.facts.on_device or budget != "10GiB"


def test_the_report_is_made_of_frozen_facts() -> None:
    found = prefill(700, {"mini_seq_len": 64})
    report = found.report(nodes=7)
    assert isinstance(found.facts, Facts)
    assert (report.nodes, report.kind, report.work) == (7, found.facts.kind, found.facts.work)
    assert [step.name for step in report.passes] == [step.name for step in found.facts.passes]
    assert isinstance(report, mom_compile.Report)
