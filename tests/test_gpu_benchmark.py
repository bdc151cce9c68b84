"""The plumbing of `benchmarks.gpu`, which has not run on a GPU: what it asks for, how long it takes, what it keeps."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import cells, gpu, gpu_questions, measure
from benchmarks.gpu import GIB, PARTS, K, Part
from benchmarks.gpu_questions import QUESTIONS, Question
from benchmarks.methods import Setup
from benchmarks.physical import Rates
from benchmarks.results_file import Results
from benchmarks.workers import WorkerFailed

LLAMA = Setup("llama-3-8b", 32, 144 * K, dtype="bfloat16", device="cuda")


#: What a product of 2048 x 4096 x 14336 reached on an H200 (benchmarks/results/h200-2026-11-28.json), and less than
#: that of an A100.
H200, A100 = 789e12, 250e12


@pytest.fixture
def results(tmp_path: Path) -> Results:
    found = Results(tmp_path / "gpu.json", measure.machine())
    found.data["rates"] = {"flops": H200, "bandwidth": 4e12}
    return found


@pytest.fixture
def lines(tmp_path: Path) -> gpu.Lines:
    return gpu.Lines(tmp_path / "gpu.jsonl")


def read(lines: gpu.Lines) -> list[dict[str, Any]]:
    return [json.loads(line) for line in lines.path.read_text().splitlines()]


def test_ours_is_measured_at_the_papers_length_in_five_minutes(results: Results) -> None:
    first, second = PARTS[:2]
    assert (first.method, second.method) == ("mom", "inductor")
    assert gpu.due(first, LLAMA, results, 300) == first.lengths
    results.data["rates"]["flops"] = A100
    assert gpu.due(first, LLAMA, results, 300) == (16 * K, 64 * K), "by the rates that the device has"


def test_questions_are_asked_once_the_rates_are_known_and_the_most_telling_first() -> None:
    kinds = [one.kind for one in QUESTIONS]
    assert kinds[0] == "rates" and set(kinds) == {"rates", "decode", "prefill", "host", "weights"}
    assert [one.method for one in QUESTIONS[1:3]] == ["eager", "mom"]
    assert len({one.name for one in QUESTIONS}) == len(QUESTIONS)


@pytest.mark.parametrize("part", PARTS, ids=lambda part: f"{part.method}-{part.memory}")
def test_a_length_that_would_not_be_done_waits_for_the_next_run(part: Part, results: Results) -> None:
    *_, last = part.lengths
    needed = gpu.EXPECTED_REST + sum(gpu.expected_seconds(replace(LLAMA, tokens=n), H200) for n in part.lengths)
    assert gpu.due(part, LLAMA, results, needed + 1) == part.lengths
    assert last not in gpu.due(part, LLAMA, results, needed - 1)
    assert gpu.due(part, LLAMA, results, gpu.EXPECTED_REST) == ()


def test_what_is_known_is_not_measured_again(results: Results) -> None:
    part = PARTS[0]
    results.keep(part.key(16 * K), {"method": "mom", "error": "out of memory"})
    assert gpu.due(part, LLAMA, results, 1e9) == part.lengths[1:]


def test_the_parts_do_not_measure_one_thing_twice() -> None:
    keys = [part.key(tokens) for part in PARTS for tokens in part.lengths]
    assert len(set(keys)) == len(keys)
    assert {"mom", "inductor", "eager", "mlp", "chunked", "chunked-offload", "offload", "prefill-only", "mom-host"} == {
        part.method for part in PARTS
    }
    assert {part.memory for part in PARTS} == {None, 24 * GIB, 80 * GIB}


def test_no_gpu_test_is_left_out() -> None:
    folder = Path(__file__).parent
    marked = {file.name for file in folder.rglob("test_*.py") if f"mark.{'gpu'}" in file.read_text()}
    assert marked == {Path(name).name for name in gpu.GPU_TESTS}


class Fake:
    """A worker of which every length takes no time, but for those that fail."""

    failing: int = 0
    asked: list[dict[str, Any]]

    def __init__(self, module: str, spec: dict[str, Any], **_: Any) -> None:
        self.left = list(spec["lengths"])
        type(self).asked.append(spec)

    def __enter__(self) -> Fake:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def row(self) -> dict[str, Any]:
        tokens = self.left.pop(0)
        if tokens == self.failing:
            raise WorkerFailed("benchmarks.cells: exit status 1")
        return {"tokens": tokens, "peak": 1 << 20, "reserved": None, "first": 1.0, "seconds": [0.5]}


def test_a_process_that_fails_is_a_result_and_the_next_one_runs(
    monkeypatch: pytest.MonkeyPatch, results: Results, lines: gpu.Lines
) -> None:
    monkeypatch.setattr(Fake, "asked", [], raising=False)
    monkeypatch.setattr(Fake, "failing", 64 * K)
    monkeypatch.setattr(gpu, "Worker", Fake)
    options = gpu.parse(["--only", "lengths", "--budget", "1e9", "--methods", "mom", "mom-host"])
    gpu.run(options, results, lines)
    assert {row["length"] for row in read(lines) if "length" in row} == results.cells.keys()
    first = PARTS[0]
    assert "exit status 1" in results.cells[first.key(64 * K)]["error"]
    assert first.key(144 * K) not in results.cells, "what was not tried is not told of"
    capped = Part("mom-host", (), 80 * GIB)
    assert results.cells[capped.key(455 * K)]["setup"]["tokens"] == 455 * K
    assert {spec["method"] for spec in Fake.asked} == {"mom", "mom-host"}


def test_a_long_prompt_is_prefilled_once_after_its_graphs_are_compiled(
    monkeypatch: pytest.MonkeyPatch, results: Results
) -> None:
    monkeypatch.setattr(Fake, "asked", [], raising=False)
    monkeypatch.setattr(gpu, "Worker", Fake)
    rows = list(gpu.run_part(Part("mom", (455 * K,)), LLAMA, (455 * K,), 1e9))
    assert [row["tokens"] for row in rows] == [455 * K]
    (spec,) = Fake.asked
    assert spec["lengths"] == [*gpu.SHORT, 455 * K] and spec["once"] <= 455 * K


NARROW = Setup("narrow", 2, 0)


def ask(capsys: pytest.CaptureFixture[str], kind: str, method: str, lengths: list[int]) -> list[dict[str, Any]]:
    gpu_questions.answer(Question("asked", "", kind, method, rows=32 if method == "mom" else "auto"), NARROW, lengths)
    return rows_of(capsys)


def test_the_rates_are_a_question(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_questions.physical, "measure_rates", lambda *_: Rates(1.0, 2.0))
    assert ask(capsys, "rates", "eager", []) == [{"rates": {"flops": 1.0, "bandwidth": 2.0}}]


@pytest.mark.parametrize("method", ["eager", "mom"])
def test_a_prefill_is_timed_until_it_returns_and_until_it_is_done(
    method: str, capsys: pytest.CaptureFixture[str], eager_pieces: None, stock_is_eager: None
) -> None:
    rows = ask(capsys, "prefill", method, [64, 96])
    for tokens in (64, 96):
        own = [row for row in rows if row.get("tokens") == tokens]
        timed = [row for row in own if "wall" in row]
        assert len(timed) == gpu_questions.PREFILLS and all(0 < row["host"] <= row["wall"] for row in timed)
        assert sum("first" in row for row in own) == sum("peak" in row for row in own) == 1
        (kernels,) = (row["kernels"] for row in own if "kernels" in row)
        assert kernels and all(len(kernel) == 3 for kernel in kernels)
    told = [row["report"] for row in rows if "report" in row]
    assert len(told) == (2 if method == "mom" else 0) and all(report["fallback"] is None for report in told)


@pytest.mark.parametrize(
    "kind", ["host", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("decode", "weights"))]
)
def test_decode_steps_are_timed_with_and_without_a_mask(
    kind: str, capsys: pytest.CaptureFixture[str], eager_pieces: None, stock_is_eager: None
) -> None:
    rows = ask(capsys, kind, "mom", [64])
    plain = [row for row in rows if "step" in row and "wall" in row and "masked" not in row]
    masked = [row for row in rows if "masked" in row]
    assert [row["step"] for row in plain] == list(range(gpu_questions.STEPS))
    assert [row["step"] for row in masked] == list(range(gpu_questions.MASKED_STEPS))
    assert any("kernels" in row and "step" in row for row in rows)
    assert any("peak" in row for row in rows) == (kind != "decode")
    assert ("offload_weights" in rows[0]) == (kind == "weights")


def test_a_step_without_memory_leaves_the_rows_that_there_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: Any) -> None:
        raise OUT

    monkeypatch.setattr(gpu_questions, "steps", fails)
    rows = ask(capsys, "host", "eager", [32])
    assert any("peak" in row for row in rows)
    assert rows[-1]["error"].startswith("out of memory") and rows[-1]["step"] is None


def test_a_run_that_is_killed_keeps_every_line_that_it_had(tmp_path: Path) -> None:
    """A process of its own is killed while a question's is under way."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--shape", "narrow", "--question-layers", "1"]
    command += ["--tokens", "32", "--only", "questions", "--ask", "decode eager"]
    root = Path(gpu.__file__).resolve().parent.parent
    with subprocess.Popen(command, cwd=root, env={**os.environ, "OUT": str(tmp_path)}, stdout=subprocess.PIPE) as run:
        assert run.stdout is not None
        for line in run.stdout:
            if b'"step": 3' in line:
                run.kill()
                break
    (file,) = tmp_path.glob("gpu-*.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    steps = [row["step"] for row in rows if row.get("question") == "decode eager" and "step" in row]
    assert steps[:4] == [0, 1, 2, 3] and "machine" in rows[0]


def test_a_question_that_ended_in_an_error_is_asked_again_and_an_answered_one_is_not() -> None:
    assert gpu.answered([{"tokens": 1}]) and gpu.answered([{"error": "out of memory: CUDA"}])
    assert not gpu.answered([]) and not gpu.answered([{"tokens": 1}, {"error": "ran longer than 60 s"}])


@pytest.mark.parametrize(
    ("line", "outcome"),
    [
        ("[gw3] [ 12%] PASSED tests/test_kv_gpu.py::test_a[x-1] ", "PASSED"),
        ("tests/test_kv_gpu.py::test_a[x] FAILED   [ 50%]", "FAILED"),
        ("FAILED tests/test_kv_gpu.py::test_a - assert", None),
        ("collected 3 items", None),
    ],
)
def test_what_pytest_says_of_a_test(line: str, outcome: str | None) -> None:
    found = gpu.OUTCOME.search(line)
    assert (found and found[1]) == outcome


class Compiling(RuntimeError):
    """As compilers wrap what they meet."""


def wrapped(cause: BaseException, message: str) -> Compiling:
    try:
        try:
            raise cause
        except BaseException as inner:
            raise Compiling(message) from inner
    except Compiling as error:
        return error


OUT = torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.25 GiB.\nmore of it")


@pytest.mark.parametrize(
    "error",
    [
        OUT,
        wrapped(OUT, "backend='inductor' raised"),
        wrapped(wrapped(OUT, "InductorError"), "backend='mom' raised"),
        Compiling("backend='inductor' raised:\nOutOfMemoryError: CUDA out of memory. Tried to allocate 20.25 GiB."),
    ],
    ids=["itself", "wrapped", "wrapped twice", "in a message alone"],
)
def test_out_of_memory_is_known_however_it_is_wrapped(error: Exception) -> None:
    reason = measure.out_of_memory(error)
    assert reason is not None and reason.startswith("out of memory: ") and reason.endswith("20.25 GiB.")


def test_another_error_is_not_taken_for_it() -> None:
    assert measure.out_of_memory(wrapped(ValueError("a size"), "backend='mom' raised")) is None


SPEC = {
    "method": "eager", "setup": {"shape": "narrow", "layers": 1, "tokens": 64}, "lengths": [32, 64], "repeats": 1,
    "steps": 0, "limit": None,
}  # fmt: skip


def rows_of(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line[5:]) for line in capsys.readouterr().out.splitlines() if line.startswith("@row ")]


def test_running_out_of_memory_while_compiling_is_a_record_and_the_next_length_is_tried(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = measure.seconds
    failing = [wrapped(OUT, "backend='mom' raised")]

    def first_fails(fn: Any, device: str = "cpu") -> float:
        if failing:
            raise failing.pop()
        return seconds(fn, device)

    monkeypatch.setattr(measure, "seconds", first_fails)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    cells.worker(dict(SPEC))
    first, second = rows_of(capsys)
    assert first == {"method": "eager", "tokens": 32, "error": "out of memory: " + str(OUT).splitlines()[0]}
    assert second["tokens"] == 64 and second["peak"] > 0 and "error" not in second


def test_a_decode_step_without_memory_leaves_the_figures_of_its_prefill(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise OUT

    monkeypatch.setattr(cells, "decode", fails)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    cells.worker({**SPEC, "steps": 2})
    for row in rows_of(capsys):
        assert row["peak"] > 0 and len(row["seconds"]) == 1 and "error" not in row
        assert row["step_error"].startswith("out of memory")
        assert "decode out of memory" in gpu.show({**row, "memory": None, "setup": {"tokens": row["tokens"]}})


def test_from_a_length_on_one_call_is_all(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO())
    cells.worker({**SPEC, "once": 64})
    short, long = rows_of(capsys)
    assert short["first"] > 0 and len(short["seconds"]) == 1
    assert long["first"] is None and len(long["seconds"]) == 1 and long["peak"] > short["peak"]


def test_any_other_error_ends_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*_: object) -> None:
        raise ValueError("a size")

    monkeypatch.setattr(cells, "figures", wrong)
    with pytest.raises(ValueError, match="a size"):
        cells.worker(dict(SPEC))


def test_what_the_allocator_had_is_shown_where_there_is_one() -> None:
    row: dict[str, Any] = {"method": "mom", "setup": {"tokens": 64}, "memory": 24 * GIB, "peak": 3 << 20}
    row |= {"first": 1.0, "seconds": [0.5], "reserved": 9 << 20}
    assert "9 MiB reserved" in gpu.show(row) and "in 24 GiB" in gpu.show(row)
    assert "reserved" not in gpu.show({**row, "reserved": None})
    assert "out of memory" in gpu.show({**row, "error": "out of memory: so much"})
