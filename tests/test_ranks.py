"""Several ranks: the results of one, the same loops on each, and an error on every rank where they cannot agree."""

from __future__ import annotations

from typing import Any

import pytest

from tests.on_ranks import killed_in_the_middle, never_called, scenarios
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


def test_a_rank_that_never_calls_is_named_after_the_timeout() -> None:
    raised, _ = run_ranks(never_called, 2, timeout=2)
    assert raised.startswith("RanksDiffer: rank 1 of process group")
    assert "did not begin within 2 s" in raised
