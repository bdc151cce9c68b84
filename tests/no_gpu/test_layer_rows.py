"""Rows per mini-sequence that the rule chooses on simulated GPUs for captured graphs. Nothing is compiled."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from mom_compile.backend import rewrite, static_input_names
from mom_compile.cache_key import cache_tag, devices_of
from mom_compile.config import parse_options
from mom_compile.memory.model import static_bytes
from mom_compile.report import Report
from tests.no_gpu.graphs import Graph, graph_of
from tests.no_gpu.target import A100, H100, H200, RTX_4090, Gpu, pretended
from tests.no_gpu.test_compiles import SHAPES

transformers = pytest.importorskip("transformers")

ROWS = {A100: 1536, H100: 4096, H200: 4096, RTX_4090: 2048}
#: An L40S, for which no figures are recorded.
UNKNOWN = Gpu("pretended L40", 8, 9, 142, 101376, 102400, 96 << 20)


def graph(shape: str = "llama", tokens: int = 147_456, sequences: int = 1, **inputs: Any) -> Graph:
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(SHAPES[shape](), dtype=torch.bfloat16).eval()
    ids = torch.empty(sequences, tokens, dtype=torch.long)
    given = {"use_cache": True, "logits_to_keep": 1, **inputs}
    return graph_of(model, lambda: {"input_ids": ids, **given}).on_cuda(H200)


def report_of(captured: Graph, gpu: Gpu, **options: Any) -> Report:
    parsed = parse_options({"kv_offload": False, **options})
    with pretended(gpu):
        return rewrite(captured.gm, parsed, static_input_names(captured.gm, captured.more)).report()


def rows_of(report: Report) -> list[int]:
    """Rows of the stages, the most frequent first."""
    return [rows for rows, _ in Counter(stage.mini_seq_len for stage in report.stages).most_common()]


@pytest.fixture(scope="module")
def llama() -> Graph:
    return graph()


@pytest.mark.parametrize("gpu", ROWS, ids=lambda gpu: gpu.name)
def test_llama_3_8b_has_the_rows_of_the_rule_for_layers(llama: Graph, gpu: Gpu) -> None:
    rows = ROWS[gpu]
    report = report_of(llama, gpu)
    assert rows_of(report) == [rows]
    assert f"{rows} tokens at a time for 32 heads and 218 million weights a layer on {gpu.name}" in str(report)
    assert report.rows in report.details()


def test_a_stored_program_is_specific_to_gpu_and_options(llama: Graph) -> None:
    tags = []
    for gpu in (H100, H200, A100):
        with pretended(gpu):
            tags.append(cache_tag(parse_options({}), devices_of(llama.example_inputs)))
    assert len(set(tags)) == 3 and None not in tags


def test_a_program_stored_for_a_cpu_is_specific_to_the_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    said = []
    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=threads: count)
        said.append(devices_of([torch.empty(2), 3]))
    assert said == [["1 threads"], ["2 threads"]]


def test_an_unknown_gpu_has_the_rows_of_a_known_one_of_its_kind(llama: Graph) -> None:
    report = report_of(llama, UNKNOWN)
    assert "pretended L40, taken for 142 of the 128 multiprocessors of an RTX 4090" in report.rows
    assert rows_of(report) == [2048]


def test_the_rows_option_overrides_the_rule(llama: Graph) -> None:
    report = report_of(llama, H100, mini_seq_len=640)
    assert rows_of(report) == [640] and not report.rows


def test_rows_are_divided_among_the_sequences_of_a_batch() -> None:
    report = report_of(graph(tokens=32_768, sequences=8), H100)
    assert rows_of(report) == [512]
    assert "8 sequences" in report.rows


def test_only_a_memory_budget_reduces_rows_below_the_rule() -> None:
    """A short prompt without a cache, with few bytes at full length."""
    captured = graph(tokens=16_384, use_cache=False)
    assert rows_of(report_of(captured, H100)) == [4096]
    static = static_input_names(captured.gm, captured.more)
    weights = static_bytes(captured.gm, static, torch.device("cuda:0"))
    report = report_of(captured, H100, memory_budget=weights + (500 << 20))
    assert rows_of(report)[0] < 4096 and "fewer for memory_budget" in report.rows


def test_experts_have_the_larger_rows_of_both_rules() -> None:
    """300 rows for each of 8 experts, of which 2 are chosen, are 1200. Launches ask for more, counting the products
    with 2 of them: a row is multiplied with 394 million weights."""
    report = report_of(graph("mixtral"), H100)
    assert "394 million weights a layer" in report.rows
    assert rows_of(report)[0] == 2048
