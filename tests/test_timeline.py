"""Live bytes after each step of a program equal the expected bytes, and both are drawn."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch

import mom_compile
from benchmarks.measure import live_bytes, watch_cpu
from mom_compile.timeline import StepBytes, of_program
from mom_passes.program.program import LoopStep
from tests.models import TinyDecoder, ids, tiny


@functools.cache
def report_of(layers=2):
    return mom_compile.explain(TinyDecoder(layers=layers).eval(), ids(1, 37), options={"mini_seq_len": 8})[0]


@pytest.fixture
def drawn(monkeypatch):
    """Records the lines that are drawn, by label."""
    from matplotlib.axes import Axes

    lines, plot = {}, Axes.plot

    def note(self, places, heights, **style):
        lines[style["label"]] = list(heights)
        return plot(self, places, heights, **style)

    monkeypatch.setattr(Axes, "plot", note)
    return lines


@pytest.mark.usefixtures("eager_pieces")
def test_live_bytes_after_each_step_equal_the_expected(tmp_path, drawn):
    watch_cpu()
    model, x = tiny("Llama", num_hidden_layers=3, max_position_embeddings=1024), ids(1, 800)
    model.compile(backend="mom", options={"mini_seq_len": 64})
    with torch.no_grad():
        model(x, logits_to_keep=1)
        with mom_compile.measured_steps(live_bytes) as measured:
            model(x, logits_to_keep=1)
    report = mom_compile.reports()[-1]
    moments = report.memory.moments
    assert [step.name for step in measured] == [moment.step.name for moment in moments]
    loops = [moment for moment in moments if isinstance(moment.step, LoopStep)]
    assert len(loops) >= 3
    for step, (moment, after) in zip(measured, itertools.pairwise(loops), strict=False):
        # Values that die in a step are freed after it.
        alive = sum(report.memory.number(storage.bytes) for storage in moment.alive if storage in after.alive)
        assert step.name == moment.step.name and abs(step.bytes - alive) <= 0.02 * alive
    report.plot(tmp_path / "memory.png", measured)
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")
    assert drawn == {"measured, after each step": [step.bytes / 2**20 for step in measured]}


def test_of_several_runs_the_last_is_drawn():
    memory = report_of().memory
    names = [moment.step.name for moment in memory.moments]
    other = [StepBytes("piece_of_another", 7)]
    runs = [[StepBytes(name, 100 * run + i) for i, name in enumerate(names)] for run in (1, 2)]
    assert of_program(memory, [*runs[0], *other, *runs[1], *other]) == [200 + i for i in range(len(names))]


def test_plain_numbers_must_match_the_steps(tmp_path, drawn):
    report = report_of()
    count = len(report.memory.moments)
    report.plot(tmp_path / "memory.png", [1 << 20] * count)
    assert drawn == {"measured, after each step": [1.0] * count}
    with pytest.raises(ValueError, match=f"measured has {count + 1} numbers, but the program has {count} steps"):
        report.plot(tmp_path / "other.png", [1] * (count + 1))
    assert not (tmp_path / "other.png").exists()


def test_measurements_of_another_program_raise(tmp_path):
    with pytest.raises(ValueError, match=r"no run of this program was measured: its \d+ steps are not among the 1"):
        report_of().plot(tmp_path / "memory.png", [StepBytes("stage_0", 3)])
    with pytest.raises(ValueError, match="measured has 0 numbers"):
        report_of().plot(tmp_path / "memory.png", [])


def test_a_cpu_requires_a_function_that_counts_bytes(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"measured_steps\(live_bytes\)"), mom_compile.measured_steps():
        pass
