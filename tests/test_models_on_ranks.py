"""Ways to run a model of transformers on several ranks: the results of one, and no rank waits for another in vain."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import mom_compile
from examples.scored_requests import answers
from mom_compile.notices import MomWarning, forget
from mom_compile.weights.nested import is_on_host
from mom_compile.weights.offload import least_budget
from tests import models_on_ranks as on_ranks
from tests.models import tiny
from tests.ranks import run_ranks
from tests.test_examples import request, words_tokenizer

Saved = Callable[..., str]


@pytest.fixture
def saved(tmp_path: Path) -> Saved:
    """Save a tiny model. Returns its folder."""

    def save(family: str, **changes: Any) -> str:
        tiny(family, **changes).save_pretrained(tmp_path)
        return str(tmp_path)

    return save


# --- data parallel ---

ASKED = [request(n, *sizes) for n, sizes in enumerate([(1, 30), (20, 1), (7, 40), (30, 2), (5, 5)])]
ASKED = [(name, [i % 60 for i in context], [i % 60 for i in more]) for name, context, more in ASKED]


@pytest.fixture(scope="module")
def shares() -> list[dict[str, Any]]:
    return run_ranks(on_ranks.data_parallel, 2, ASKED, timeout=120)


@pytest.mark.slow
def test_each_rank_has_the_answers_of_all(shares: list[dict[str, Any]], eager_pieces: None) -> None:
    expected = dict(answers(tiny("Llama"), ASKED, batch_size=2, longest=64))
    for rank in shares:
        assert rank["answers"].keys() == expected.keys()
        for number, (log_prob, greedy) in rank["answers"].items():
            assert log_prob == pytest.approx(expected[number][0], abs=1e-4)
            assert greedy == expected[number][1]


@pytest.mark.slow
def test_a_rank_that_cannot_answer_is_named_on_every_rank(shares: list[dict[str, Any]]) -> None:
    for rank in shares:
        assert rank["failure"].startswith("RuntimeError: requests were not answered. rank 1: TypeError")


@pytest.mark.slow
def test_ranks_score_their_own_prompts_without_waiting(shares: list[dict[str, Any]]) -> None:
    for rank in shares:
        off, exchanges = rank["own"]
        assert off < 1e-5
        assert exchanges == 0


LAUNCHED = """
import argparse, sys
from benchmarks.without_codegen import pieces_run_eagerly
from examples import evaluate
from examples.scored_requests import answers_of_ranks

def evaluated(model, tokenizer, documents):
    texts = [tokenizer(text).input_ids for text in documents]
    found = answers_of_ranks(model, [("", text[:1], text[1:]) for text in texts], batch_size=1, longest=100)
    assert len(found) == 3
    return {"metrics": {"log_likelihood": sum(log_prob for log_prob, _ in found.values())}}

with pieces_run_eagerly():
    evaluate.run_on_ranks(argparse.Namespace(model=sys.argv[1], documents=3, tokens=40), evaluated)
"""


@pytest.mark.slow
def test_the_example_of_the_harness_runs_under_torchrun(saved: Saved, tmp_path: Path) -> None:
    """Without the harness: its part is to call the model's subclass."""
    folder, script = saved("Llama"), tmp_path / "launched.py"
    words_tokenizer().save_pretrained(folder)
    script.write_text(LAUNCHED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run([*command, folder], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("3 documents of 40 tokens on 2 ranks") == 1
    assert done.stdout.count("log_likelihood") == 1


# --- FSDP2 ---


@pytest.mark.slow
@pytest.mark.parametrize("per_layer", [False, True])
def test_each_layer_of_a_fully_sharded_model_has_loops(per_layer: bool) -> None:
    for off, loops, _ in run_ranks(on_ranks.fully_sharded, 2, 2, per_layer):
        assert off < 1e-5
        assert loops.count(2) == 2, "attention and MLP of each layer"


# --- tensor and expert parallel ---


class DividedLayer(nn.Module):
    """`[B, S, 32]` to the same, by two DTensors, whose local tensors it multiplies with."""

    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__()
        up, down = torch.randn(64, 32) / 8, torch.randn(32, 64) / 8
        self.up = nn.Parameter(distribute_tensor(up, mesh, [Shard(0)]))
        self.down = nn.Parameter(distribute_tensor(down, mesh, [Shard(1)]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up: Any = self.up
        down: Any = self.down
        return x + F.linear(F.silu(F.linear(x, up.to_local())), down.to_local())


def test_the_local_tensor_of_a_divided_weight_stays_on_the_host(one_rank: None, eager_pieces: None) -> None:
    mesh = init_device_mesh("cpu", (1,))
    model = nn.Sequential(*(DividedLayer(mesh) for _ in range(4)))
    before, x = {name: value.full_tensor() for name, value in model.state_dict().items()}, torch.randn(1, 40, 32)
    with torch.no_grad():
        expected = model(x)
        made = mom_compile.offload_weights(model, "cpu", memory_budget=least_budget(model))
        assert made.on_host == 4 * 2 * 64 * 32 * 4
        assert all(isinstance(one, DTensor) and is_on_host(one) for one in model.parameters())
        assert not any(one.requires_grad for one in model.parameters())
        forget()  # another test may have had this warning
        with pytest.warns(MomWarning, match="copied to the device at each use"):
            assert torch.equal(model(x), expected)
        state = model.state_dict()
        assert all(torch.equal(value.full_tensor(), before[name]) for name, value in state.items())
        compiled = torch.compile(model, backend="mom", options={"strict": True, "mini_seq_len": 16})
        torch.testing.assert_close(compiled(x), expected)
    (report,) = mom_compile.reports()
    assert report.weights is not None and report.weights.bytes == made.on_host


@pytest.mark.slow
@pytest.mark.parametrize("load", [False, True])
def test_weights_of_each_rank_stay_on_its_host(saved: Saved, load: bool) -> None:
    for rank in run_ranks(on_ranks.on_host, 2, saved("Llama"), load):
        assert max(rank["eager"], rank["compiled"]) < 1e-5
        assert any("mlp.down_proj" in name for name in rank["on host"])
        assert rank["shapes"]["model.layers.0.mlp.down_proj.weight"] == [32, 24], "half of the columns"
        assert rank["state"] > 10, "state_dict() has the parts, and they are right"
        assert rank["copied"], "compiled programs copy weights ahead of their use"
        ((in_loops, outside),) = rank["communication"]
        assert in_loops > 0 and outside == 0


@pytest.mark.slow
def test_ranks_with_budgets_generate_the_same_tokens_at_every_length(saved: Saved) -> None:
    one, other = run_ranks(on_ranks.turns, 2, saved("Llama"), ("4MiB", "500KiB"))
    assert one["same"] and other["same"]
    assert one["waits"] == other["waits"]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe", "GptOss"])
def test_experts_of_each_rank_are_in_loops(saved: Saved, family: str) -> None:
    for rank in run_ranks(on_ranks.experts, 2, saved(family), "auto"):
        assert max(rank["eager"], rank["compiled"]) < 1e-5
        ((in_loops, outside),) = rank["communication"]
        assert in_loops > 0 and outside == 0, rank["reasons"]


@pytest.mark.slow
def test_tokens_that_are_sent_to_experts_are_left_to_stock(saved: Saved) -> None:
    """The split sizes depend on data."""
    for rank in run_ranks(on_ranks.experts, 2, saved("Qwen3Moe"), "all_to_all"):
        assert max(rank["eager"], rank["compiled"]) < 1e-5
        assert any("exchanges rows between ranks" in (reason or "") for reason in rank["reasons"])


@pytest.mark.slow
def test_each_stage_of_a_pipeline_has_loops(saved: Saved) -> None:
    for off, same, loops in run_ranks(on_ranks.pipeline, 2, saved("Llama")):
        assert off < 1e-5 and same
        assert max(loops) > 0


@pytest.mark.slow
def test_heads_that_ranks_cannot_divide_are_an_error_on_every_rank(saved: Saved) -> None:
    for raised in run_ranks(on_ranks.heads, 2, saved("Llama", num_key_value_heads=1)):
        for error in raised:
            assert error.startswith("UserError: model.layers.0.self_attn.k_proj has 1 head of 8 rows, which 2 ranks")


@pytest.mark.slow
def test_a_model_without_a_plan_is_an_error_on_every_rank(saved: Saved) -> None:
    for raised in run_ranks(on_ranks.loading, 2, saved("GPT2")):
        assert raised.startswith("ValueError") and "has no `tp_plan`" in raised
