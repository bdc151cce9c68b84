"""What `explain` tells: it prints well, and it is true."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sympy
import torch

import mom_compile
from tests.models import TinyDecoder, ids, tiny

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.usefixtures("fresh")


def explained(**options):
    return mom_compile.explain(TinyDecoder(layers=2).eval(), ids(1, 37), options={"mini_seq_len": 8, **options})


def test_it_tells_each_stage_its_tokens_and_what_crosses_with_bytes_per_token():
    report = explained()[0]
    assert report.token_dimension.startswith("dim 1 of ")
    assert [stage.name for stage in report.stages] == ["stage_0", "stage_1", "stage_2"]
    assert report.stages[1].mini_seq_len == 8
    assert report.stages[1].operators["aten.mm"] == 6
    text = str(report)
    assert "37 tokens in mini-sequences of 8" in text
    assert "128 B/token" in text


def test_it_names_what_was_left_out_and_why():
    model = TinyDecoder(layers=1).eval()
    report = mom_compile.explain(lambda x: model(x).logcumsumexp(1), ids(1, 37), options={"mini_seq_len": 8})[0]
    assert {name.split()[0]: why for name, why in report.left_out.items()} == {
        "aten.logcumsumexp.default": "accumulates along it"
    }


def test_it_tells_which_reductions_leave_a_loop_as_their_parts():
    model = TinyDecoder(layers=1).eval()
    report = mom_compile.explain(lambda x: model(x).mean(1), ids(1, 37), options={"mini_seq_len": 8})[0]
    assert not report.left_out
    assert [fold.operator for fold in report.stages[-1].folds] == [torch.ops.aten.mean.dim]
    assert "reduced in the loop: mean" in str(report)


def test_keys_values_and_the_residual_stream_are_the_full_length_values_of_a_decoder():
    """Per stage: what is at full length while it runs. The residual is one tensor, written over by each layer."""
    model = TinyDecoder(layers=4).eval()
    report = mom_compile.explain(model, ids(1, 37), 1, options={"mini_seq_len": 8})[0]
    residual, keys = 32 * 4, 2 * 8 * 4
    for stage in report.stages[1:]:
        assert sorted(value.bytes_per_token for value in stage.live) == [keys] * 4 + [residual]
    assert report.floor_bytes_per_token == residual + 4 * keys
    assert f"{residual + 4 * keys} B/token" in str(report)


def test_the_rewritten_graph_reads_as_code():
    code = explained().code()
    assert "stage_1" in code
    assert "torch.ops.mom.attention.default" in code


def test_it_says_why_a_graph_is_left_alone():
    text = str(mom_compile.explain(TinyDecoder(layers=1).eval(), ids(1, 5)))
    assert "stock Inductor: its 5 tokens fit in one mini-sequence" in text


def test_it_compiles_nothing(monkeypatch):
    def refuse(*args):
        raise AssertionError("explain compiled something")

    monkeypatch.setattr("mom_compile.torch_compat.SymbolicSizes.compile", refuse)
    assert explained()[0].stages


def test_a_wrong_option_is_an_error():
    with pytest.raises(ValueError, match="unknown option 'mini'"):
        explained(mini=3)


def test_the_log_shows_each_pass_with_its_time_and_change(caplog):
    with caplog.at_level(logging.DEBUG, logger="mom_compile"):
        explained()
    lines = [record.getMessage() for record in caplog.records if record.name == "mom_compile.pipeline"]
    assert any(line.startswith("cut_stages: ") and "ms: 4 stages" in line for line in lines)


def test_torch_logs_turns_the_log_on():
    assert torch._logging._internal._is_valid_module("mom_compile")


# --- without weights ---


def test_a_model_on_the_meta_device_is_explained_like_a_real_one():
    x = {"input_ids": ids(1, 37), "logits_to_keep": 1}
    expected = mom_compile.explain(tiny("Llama"), **x, options={"mini_seq_len": 8})
    with torch.device("meta"):
        model = tiny("Llama")
    tensors = [*model.parameters(), *model.buffers()]
    for function in (model, model.forward):
        torch._dynamo.reset()
        on_meta = {**x, "input_ids": x["input_ids"].to("meta")}
        found = mom_compile.explain(function, **on_meta, options={"mini_seq_len": 8})
        assert str(found) == str(expected)
        assert found[0].stages and not found[0].failed
    now = [*model.parameters(), *model.buffers()]
    assert all(one is other for one, other in zip(tensors, now, strict=True))


def test_a_meta_model_is_left_as_it_was_by_a_call_that_fails():
    with torch.device("meta"):
        model = TinyDecoder(layers=1).eval()
    before = list(model.parameters())
    with pytest.raises(Exception, match="too many values to unpack"):
        mom_compile.explain(model, torch.empty(1, 2, 3, 4, dtype=torch.long, device="meta"))
    assert all(one is other and one.is_meta for one, other in zip(before, model.parameters(), strict=True))


def test_a_function_of_meta_tensors_is_refused_by_name():
    x, w = torch.empty(2, 40, 8, device="meta"), torch.empty(8, 16, device="meta")
    report = mom_compile.explain(lambda x, w: torch.relu(x @ w), x, w, options={"mini_seq_len": 8})[0]
    assert "meta device" in report.fallback and not report.failed


def test_the_peak_is_an_expression_in_the_sizes_that_are_symbols():
    """Of the graph for any length; evaluated at the captured one it is the number above it."""
    model = TinyDecoder(layers=2).eval()
    x = ids(1, 37)
    torch._dynamo.mark_dynamic(x, 1)
    report = mom_compile.explain(model, x, options={"mini_seq_len": 8})[0]
    line = next(line for line in str(report).splitlines() if "in bytes:" in line)
    (symbol,) = report.memory.peak.free_symbols
    assert str(symbol) in line
    formula = sympy.sympify(line.partition(": ")[2], {str(symbol): symbol})
    assert report.memory.number(formula) == report.expected_peak_bytes
    assert report.memory.number(formula, {symbol: sympy.Integer(370)}) > 9 * report.floor_bytes
    torch._dynamo.reset()
    assert "in bytes:" not in str(explained()[0])


def test_a_memory_timeline_is_drawn(tmp_path):
    report = explained()[0]
    report.plot(tmp_path / "memory.png")
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"nothing to draw: .* tokens fit in one mini-sequence"):
        explained(mini_seq_len=64)[0].plot(tmp_path / "other.png")


PLAN = """
import torch
import mom_compile
from mom_passes.program.schedule import schedule
from tests.models import prompt, small_model

with torch.no_grad():
    options = {"mini_seq_len": 16, "kv_offload": True}
    report = mom_compile.explain(small_model("Gemma3Text"), **prompt(2, 90), options=options)[0]
print(report, report.code(), schedule(report.graph), report.memory.peak, sep="\\n")
"""


def test_the_same_graph_gives_the_same_program_whatever_the_hash_seed():
    plans = []
    for seed in ("1", "2"):
        path = os.pathsep.join([str(ROOT), str(ROOT / "passes")])
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": path}
        command = [sys.executable, "-c", PLAN]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
        assert done.returncode == 0, done.stderr
        plans.append(done.stdout)
    assert "loopstep stage_1" in plans[0]
    assert plans[0] == plans[1]
