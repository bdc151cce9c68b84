"""The harness behind docs/benchmarks.md: what is searched, kept and printed, and a cell measured for real."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import measure, physical, predicted, suite, suite_page
from benchmarks.longest import longest
from benchmarks.measure import MIB
from benchmarks.methods import METHODS, Cell, Setup
from benchmarks.results_file import OtherMachine, Results
from benchmarks.workers import Worker, WorkerFailed

LLAMA = Setup("llama-3-8b", 32, 147_456, dtype="bfloat16")
TINY = Setup("narrow", 1, 64)
MACHINE = {"torch": "2", "transformers": "5", "python": "3", "cpu": "one", "cores": 2, "threads": 2, "date": "today"}


# ------------------------------------------------------------------------------------------------ the search


@given(st.integers(0, 4000), st.integers(1, 30), st.integers(1, 60), st.integers(5_000, 2_000_000))
def test_the_search_ends_between_lengths_that_ran_and_did_not(fixed: int, each: int, k: int, limit: int) -> None:
    """Whatever the peak grows with; nothing is told that was not tried."""
    tried: dict[int, bool] = {}

    def peak_at(tokens: int) -> int | None:
        assert tokens not in tried, "no length is tried twice"
        peak = fixed + each * tokens + k * tokens * tokens // 1000
        tried[tokens] = peak <= limit
        return peak if tried[tokens] else None

    found = longest(peak_at, limit, first=256, grain=64, most=1 << 16)
    assert found.fits == 0 or tried[found.fits]
    if found.fails is None:
        assert found.fits == 1 << 16
    else:
        assert not tried[found.fails] and found.fails - found.fits <= max(64, found.fits // 50)
    assert all(not ran or tokens <= found.fits for tokens, ran in tried.items())
    assert len(tried) <= 25


# ------------------------------------------------------------------------------------------- physical limits


def test_the_papers_model_has_the_papers_bytes() -> None:
    """Llama-3-8B: 128 KiB of cache a token, 8 KiB of residual stream, 16 GB of weights."""
    assert physical.cache_bytes(LLAMA) == LLAMA.tokens * 128 * 1024
    assert physical.live_bytes(LLAMA, cache_on_host=False) == LLAMA.tokens * (128 + 8) * 1024
    assert physical.live_bytes(LLAMA, cache_on_host=True) == LLAMA.tokens * (4 + 8) * 1024
    one = Setup("llama-3-8b", 32, 1, dtype="bfloat16")
    assert physical.decode_bytes(one) == pytest.approx(15.0e9, rel=0.01)


def test_a_thousand_tokens_of_it_are_some_fourteen_teraflops() -> None:
    """2 operations for each of 6.98e9 weights in layers, less the last layer's."""
    few = Setup("llama-3-8b", 32, 1000, dtype="bfloat16")
    assert physical.prefill_flops(few) == pytest.approx(31 / 32 * 14.2e12, rel=0.02)


@given(st.integers(1, 64), st.integers(1, 1 << 20))
def test_a_batch_costs_what_its_sequences_cost(batch: int, tokens: int) -> None:
    one, all_ = Setup("small", 4, tokens), Setup("small", 4, tokens, batch=batch)
    assert physical.prefill_flops(all_) == pytest.approx(batch * physical.prefill_flops(one))
    assert physical.live_bytes(all_, cache_on_host=False) == batch * physical.live_bytes(one, cache_on_host=False)


# ------------------------------------------------------------------------------------------ what is on disk


def test_results_are_taken_up_where_a_run_was_cut_off(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    cell, other = Cell("mom", TINY), Cell("eager", TINY)
    results = Results(file, MACHINE)
    suite.keep(cell, {"seconds": []}, results)  # measured, and cut off before it was timed
    suite.keep(other, {"error": "out of memory: so many bytes"}, results)
    again = Results(file, {**MACHINE, "date": "tomorrow"})
    assert again.cells == results.cells
    assert suite.missing([cell, other], again) == [cell]
    again.cells[cell.key]["seconds"] = [1.0]
    assert suite.missing([cell, other], again) == []


def test_figures_of_another_machine_are_not_mixed_in(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    Results(file, MACHINE).write()
    with pytest.raises(OtherMachine, match="other cpu, torch; --fresh"):
        Results(file, {**MACHINE, "torch": "3", "cpu": "another"})
    assert Results(file, {**MACHINE, "cpu": "another"}, may_differ=("date", "cpu")).cells == {}


def test_every_method_is_a_cell_of_its_own_and_what_needs_a_gpu_is_none_on_a_cpu() -> None:
    cells = [cell for setup in suite.SETUPS for cell in suite.cells_of(setup, list(METHODS))]
    cells += suite.searches(list(METHODS))
    assert len({cell.key for cell in cells}) == len(cells) == (len(suite.SETUPS) + 1) * 7
    assert not {"offload", "chunked-offload"} & {cell.method for cell in cells}
    assert {"offload", "chunked-offload"} <= {cell.method for cell in suite.cells_of(LLAMA_ON_GPU, list(METHODS))}


def test_figures_of_a_gpu_stand_apart_by_memory(tmp_path: Path) -> None:
    gpu = Results(tmp_path / "gpu-some-card.json", {**MACHINE, "gpu": "Some Card"})
    gpu.data["rates"] = {"flops": 1e14, "bandwidth": 1e12}
    for memory in (None, 24 << 30):
        row = {"method": "mom", "setup": asdict(LLAMA_ON_GPU), "limit": None, "memory": memory}
        gpu.keep(f"mom {memory}", {**row, **figures(7 * MIB if memory else 9 * MIB, [1.0])})
    text = page(tmp_path, {Cell("mom", TINY): figures(5 * MIB, [1.0])})
    assert [line(text, "mom", table)[5] for table in (0, 1, 2)] == ["5.0 MiB", "9.0 MiB", "7.0 MiB"]
    assert "Some Card" in text and text.count("147,456 tokens, in 24 GiB") == 1


LLAMA_ON_GPU = Setup("llama-3-8b", 32, 147_456, dtype="bfloat16", device="cuda")


# ------------------------------------------------------------------------------------------------- the page


def figures(peak: int, seconds: list[float], first_logit: float = 2.0) -> dict[str, Any]:
    return {
        "first": 3.0, "peak": peak, "kept": 1, "reserved": None, "seconds": seconds, "step": [0.5, 0.25, 0.5],
        "logits": [first_logit, 1.0], "ids": [5, 3],
    }  # fmt: skip


def page(tmp_path: Path, rows: dict[Cell, dict[str, Any]]) -> str:
    results = Results(tmp_path / "results.json", MACHINE)
    results.data["rates"] = {"flops": 1e11, "bandwidth": 1e10}
    for cell, row in rows.items():
        suite.keep(cell, row, results)
    suite_page.write(results.path, tmp_path / "page.md")
    return (tmp_path / "page.md").read_text()


def line(text: str, method: str, table: int = 0) -> list[str]:
    """Cells of a method's row, by the table after that of the methods."""
    lines = [row for row in text.splitlines() if row.startswith(f"| {method} |")]
    return [cell.strip() for cell in lines[1 + table].split("|")[1:-1]]


def test_the_page_says_how_each_stands_to_inductor_and_to_the_least(tmp_path: Path) -> None:
    setup = Setup("half", 4, 1024)
    live = physical.live_bytes(setup, cache_on_host=False)
    rows = {
        Cell("eager", setup): figures(4 * live, [3.0, 1.0, 2.0]),
        Cell("inductor", setup): figures(8 * live, [4.0]),
        Cell("mom", setup): figures(2 * live, [1.0], 2.5),
        Cell("chunked", setup): {"error": "out of memory: so many bytes"},
    }
    text = page(tmp_path, rows)
    mom = line(text, "mom")
    assert [mom[4], mom[6], mom[7], mom[8], mom[9]] == ["0.25x", "2.00x", "0.25x", "2.0 tokens/s", "5e-01"]
    assert line(text, "eager")[2] == "2.00 s" and line(text, "inductor")[9] == "0e+00"
    assert line(text, "chunked")[1] == "out of memory"


def test_the_page_says_it_where_another_token_is_the_likeliest(tmp_path: Path) -> None:
    setup = Setup("half", 4, 1024)
    wrong = {**figures(1, [1.0]), "ids": [3, 5]}
    text = page(tmp_path, {Cell("eager", setup): figures(1, [1.0]), Cell("mom", setup): wrong})
    assert line(text, "mom")[9] == "others are largest"


def test_the_page_tells_the_longest_prompt_beside_inductor_and_the_paper(tmp_path: Path) -> None:
    found = {"inductor": (1000, 1020), "mlp": (2000, 2040), "mom": (4000, None)}
    rows = {
        Cell(name, suite.SEARCH, suite.LIMIT): {"fits": fits, "fails": fails} for name, (fits, fails) in found.items()
    }
    text = page(tmp_path, rows)
    assert line(text, "mom") == ["mom", "4,000 tokens", "nothing tried did", "4.00x", "2.00x"]
    assert line(text, "inductor")[2:] == ["1,020", "1.00x", "0.50x"]


def test_without_a_gpu_the_page_tells_what_is_predicted_and_calls_it_so() -> None:
    text = suite_page.text_of(suite.RESULTS)
    section = text[text.index("# GPUs") :]
    assert "Predicted, not measured" in section and "| 1,048,576 |" in section


def test_no_prediction_is_below_what_must_live() -> None:
    for tokens, cell in json.loads(predicted.RESULTS.read_text())["cells"].items():
        setup = Setup(predicted.BENCHED, 32, int(tokens), dtype="bfloat16", device="cuda")
        for name, host in (("mom", False), ("mom-host", True)):
            least = physical.live_bytes(setup, cache_on_host=host)
            assert least < cell["peaks"][name] < cell["peaks"]["mlp"] < cell["peaks"]["inductor"]


@pytest.mark.slow
def test_the_predictions_in_the_repository_are_those_of_this_code() -> None:
    made, kept = predicted.predicted(), json.loads(predicted.RESULTS.read_text())
    assert {name: made[name] for name in ("cells", "weights")} == {name: kept[name] for name in ("cells", "weights")}


def test_the_page_in_the_repository_is_made_of_the_results_in_the_repository() -> None:
    assert suite_page.PAGE.read_text() == suite_page.text_of(suite.RESULTS)


# ----------------------------------------------------------------------------------------------- for real


def test_a_limit_raises_what_a_gpu_raises_and_is_gone_after_it() -> None:
    import torch

    measure.watch_cpu()
    with measure.at_most(4 * MIB):
        kept = torch.empty(3 * MIB, dtype=torch.uint8)
        with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
            torch.empty(2 * MIB, dtype=torch.uint8)
        del kept
        torch.empty(4 * MIB, dtype=torch.uint8)
    torch.empty(8 * MIB, dtype=torch.uint8)


SPEC = {"method": "eager", "setup": asdict(TINY), "limit": None, "repeats": 0, "steps": 2}


def test_a_cell_is_measured_in_a_process_that_then_answers_with_times() -> None:
    with Worker("benchmarks.cells", {**SPEC, "lengths": [64, 96]}, timeout=120) as worker:
        first, second = worker.row(), worker.row()
        assert 0 < first["peak"] < second["peak"] and len(first["step"]) == 2 and len(first["logits"]) == 8
        assert worker.ask("time")["seconds"] > 0


@pytest.mark.slow
def test_a_search_in_a_process_stops_where_allocating_raised() -> None:
    spec = {**SPEC, "limit": 4 * MIB, "longest": {"first": 128, "grain": 64, "most": 1 << 12}}
    with Worker("benchmarks.cells", spec, timeout=120) as worker:
        found = worker.row()
    tried = {row["tokens"]: row for row in found["tried"]}
    assert tried[found["fits"]]["peak"] <= 4 * MIB and "out of memory" in tried[found["fails"]]["error"]


def test_a_worker_that_fails_says_why() -> None:
    """A module that is no worker takes the specification for a file; it ends at once."""
    message = r"json\.tool: exit status 2\n(?s:.*)No such file or directory"
    with pytest.raises(WorkerFailed, match=message), Worker("json.tool", SPEC) as worker:
        worker.row()
