"""Several ranks: the results of one, the same loops on each, and an error on every rank where they cannot agree."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import mom_compile
from tests.models import prompt, small_model
from tests.on_ranks import generated, killed_in_the_middle, missed_call, scenarios
from tests.ranks import Failure, run_ranks, start_ranks


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    """What each of two ranks returned, by scenario."""
    return run_ranks(scenarios, 2, timeout=20)


def test_the_rules_of_collectives_obey_the_law_on_two_ranks(found: list[dict[str, Any]]) -> None:
    assert found[0]["rule_law"] == found[1]["rule_law"] > 12


def test_a_parallel_decoder_equals_the_whole_one_at_every_length(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert len(rank["lengths"]) == 5 and max(rank["lengths"].values()) < 1e-5


def test_scores_of_a_divided_vocabulary_gather_no_logits(found: list[dict[str, Any]]) -> None:
    """Two all-reduces of a layer, `[2, 32]` float32 for a token. One of tops and whether they are NaN, one of sums and
    chosen columns, and one of greedy columns."""
    for rank in found:
        scores = rank["scores"]
        assert max(scores["differences"]) < 1e-4 and scores["greedy"]
        assert scores["scored"] > 0 and scores["gathers"] == 0 and scores["outside"] == 0
        assert scores["bytes_per_token"] == 2 * (2 * 32 * 4 + 2 * 4 + 3 * 8 + 8)


def test_scores_of_odd_logits_are_those_of_eager_mode(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert rank["odd_logits"] == {"-inf": [True] * 3, "nan": [True] * 3, "inf": [True] * 3}


def test_a_failure_in_one_of_two_groups_leaves_both_in_step(found: list[dict[str, Any]]) -> None:
    for rank, error in zip(found, ("RanksDiffer", "MemoryBudgetError"), strict=True):
        first, failed, *later = rank["two_groups"]
        assert failed.startswith(error) and not any((first, *later))


def test_ranks_that_share_weights_alone_have_prompts_of_their_own(found: list[dict[str, Any]]) -> None:
    assert [rank["own_lengths"] for rank in found] == [["", "", ""]] * 2


def test_prompts_of_different_lengths_are_an_error_on_every_rank(found: list[dict[str, Any]]) -> None:
    for rank in found:
        raised, next_call = rank["other_lengths"]
        assert raised.startswith("RanksDiffer") and "inputs of the same sizes" in raised
        assert "[50" in raised and "[70" in raised, "the sizes of both ranks are named"
        assert next_call < 1e-5


def test_other_options_are_an_error_on_every_rank(found: list[dict[str, Any]]) -> None:
    for rank in found:
        raised = rank["other_options"]
        assert raised.startswith("RanksDiffer") and "16 tokens at a time" in raised and "12 tokens at a time" in raised
        assert "mini_seq_len" in raised


def test_a_rank_that_cannot_compile_is_named_by_the_others(found: list[dict[str, Any]]) -> None:
    one, other = (rank["failed_compilation"] for rank in found)
    assert one.startswith("RanksDiffer") and "rank 1: RuntimeError: no room for the graph" in one
    assert "no room for the graph" in other and "RanksDiffer" not in other


def test_a_rank_that_falls_back_to_stock_is_an_error_on_every_rank(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert rank["left_to_stock"].startswith("RanksDiffer") and "rank 1: no loops" in rank["left_to_stock"]


def test_a_budget_that_one_rank_cannot_keep_is_an_error_on_every_rank(found: list[dict[str, Any]]) -> None:
    one, other = (rank["small_budget"] for rank in found)
    assert other.startswith("MemoryBudgetError")
    assert one.startswith("RanksDiffer") and "rank 1: MemoryBudgetError: memory_budget=" in one


def test_ranks_with_unequal_budgets_have_the_least_rows(found: list[dict[str, Any]]) -> None:
    (waits, difference), (others, other_difference) = (rank["unequal_budgets"] for rank in found)
    assert waits == others > 0
    assert max(difference, other_difference) < 1e-5


def test_ranks_that_exchange_rows_run_stock_code_and_agree_on_nothing(found: list[dict[str, Any]]) -> None:
    for rank in found:
        difference, (reason,) = rank["exchanged_rows"]
        assert difference < 1e-5
        assert "exchanges rows between ranks" in reason


def test_a_destroyed_group_is_named(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert "init_process_group" in rank["destroyed_group"]


def test_a_rank_that_is_killed_ends_the_others() -> None:
    answers = start_ranks(killed_in_the_middle, 2, timeout=15).answers(120)
    assert isinstance(answers[1], Failure)
    raised, seconds, on_host = answers[0]
    assert raised and seconds < 60, "compiling, and at most the group's timeout"
    assert on_host == 0


def test_a_rank_that_misses_a_call_is_named_after_the_timeout() -> None:
    """The other rank's call counts for nothing: the next calls of both are right."""
    (raised, differences), (_, others) = run_ranks(missed_call, 2, timeout=6)
    assert raised.startswith("RanksDiffer: rank 1 of process group")
    assert "did not begin within 6 s" in raised
    assert max(*differences, *others) < 1e-5


# --- transformers' own tensor parallelism ---

#: Families, the ranks they are divided among, options, and how many tokens are generated.
DIVIDED = [
    pytest.param("Llama", 2, {}, 1),
    pytest.param("Llama", 4, {}, 4, marks=pytest.mark.slow),
    *(
        pytest.param(family, 2, options, 4, marks=pytest.mark.slow)
        for family in ("Llama", "Qwen3", "Gemma3Text", "Mixtral", "Qwen3Moe", "GptOss", "Qwen3Next")
        for options in ({}, {"kv_offload": True})
    ),
]


@pytest.mark.parametrize(("family", "ranks", "options", "new"), DIVIDED)
def test_a_divided_model_generates_and_scores_as_on_one_rank(
    family: str, ranks: int, options: dict[str, Any], new: int, tmp_path: Path, eager_pieces: None, stock_is_eager: None
) -> None:
    """Greedy tokens, log-probabilities and loops of one rank, with a padded batch. Collectives are in loops, and each
    rank has its part of the weights."""
    changes = {"num_key_value_heads": 4} if ranks == 4 else {}
    model, inputs = small_model(family, num_hidden_layers=2, **changes), prompt(2, 45, padded=True)
    model.save_pretrained(tmp_path)
    found = run_ranks(generated, ranks, str(tmp_path), options, new, seconds=280)
    with torch.no_grad():
        wanted = model.generate(**inputs, max_new_tokens=new, do_sample=False).tolist()
        if new > 1:
            log_probs = mom_compile.token_log_probs(model, **inputs, mini_seq_len=16).log_probs
        torch._dynamo.reset()
        model.compile(backend="mom", options={"mini_seq_len": 16, "strict": True, **options})
        model.generate(**inputs, max_new_tokens=1)
    loops = next(len(report.stages) for report in mom_compile.reports() if report.stages)
    for rank in found:
        assert rank["ids"] == wanted and rank["loops"] == loops and not rank["failed"]
        assert rank["communication"].in_loops > 0 and rank["communication"].hidden > 0
        assert rank["bytes"] < sum(p.numel() for p in model.parameters()) * (0.5 + 0.5 / ranks)
        if new > 1:
            torch.testing.assert_close(torch.tensor(rank["log_probs"]), log_probs, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_example_prints_its_table() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = subprocess.run(
        [*command, "-m", "examples.tensor_parallel", "--tokens", "600"], capture_output=True, text=True, timeout=280
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert "prefill of 600 tokens on 2 ranks" in run.stdout
    assert re.search(r"rank 1: -?\d+% of the waiting is hidden", run.stdout)
