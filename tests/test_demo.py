"""What `make demo` prints: one table that is whole wherever it goes, and what is waited for, beforehand."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from examples import demo

ROWS: list[dict[str, Any]] = [
    {"backend": "eager", "peak": 400 << 20, "compile": 0.0, "text": "so it goes", "same_text": True, "difference": 0.0,
     "score": {"peak": 6000 << 20, "compile": 0.0, "mean": 3.5, "of_mean": 4e-5, "per_token": 1e-4}},
    {"backend": "mom", "peak": 100 << 20, "compile": 30.0, "text": "so it goes", "same_text": True, "difference": 2e-5,
     "score": {"peak": 300 << 20, "compile": 9.0, "mean": 3.5, "of_mean": 1e-7, "per_token": 2e-6}},
]  # fmt: skip


def test_a_piped_table_is_whole(capsys: pytest.CaptureFixture[str]) -> None:
    demo.print_table(ROWS, 3072)
    printed = capsys.readouterr().out
    (mom,) = (line for line in printed.splitlines() if line.startswith("│ mom"))
    cells = [cell.strip() for cell in mom.strip("│").split("│")]
    assert cells == ["mom", "100 MiB", "0.25x", "30 s", "300 MiB", "0.05x", "9 s"]
    assert "…" not in printed and "mom: the same text as eager" in printed and "so it goes" in printed


def test_another_text_is_shouted() -> None:
    assert any("ANOTHER TEXT" in line for line in demo.notes([ROWS[0], {**ROWS[1], "same_text": False}]))


def test_stock_inductor_is_for_who_asks() -> None:
    assert demo.parse([]).backends == ["eager", "mom"]
    assert demo.parse(["--full"]).backends == ["eager", "inductor", "mom"]
    assert demo.parse(["--backends", "mom"]).backends == ["mom"]


def test_every_wait_is_announced_as_long_as_it_is_expected() -> None:
    class Bar:
        console = type("Console", (), {"is_terminal": False, "print": lambda self, text, **_: said.append(text)})()

        def add_task(self, text: str, total: int) -> int:
            self.total = total
            return 0

        def update(self, task: int, completed: int, description: str) -> None:
            far.append(completed / self.total)

    said: list[str] = []
    far: list[float] = []
    steps = demo.all_steps(["eager", "mom"])
    waiting = demo.Waiting(Bar(), steps)
    for step in steps:
        waiting.advance(step)
    assert [re.sub(r" \(about \d+ s\)", "", text) for text in said] == steps
    assert far[0] == 0 and far == sorted(far) and far[-1] < 1
    assert not demo.EXPECTED.keys() - {*demo.all_steps(demo.FULL), "the model is unpacked already"}


def test_no_ratio_of_two_single_timings_is_printed() -> None:
    """Only ratios of peaks: calls of one process are not timed in turn with another's."""
    table = demo.table_of(ROWS, 3072)
    headings = [str(column.header) for column in table.columns]
    assert headings.count("of eager's") == 2 and not any("time" in heading for heading in headings)
    prefills, scores = [list(table.columns[i].cells) for i in (2, 5)]
    assert (prefills, scores) == (["1.00x", "0.25x"], ["1.00x", "0.05x"])
    assert "time when warm" not in str(table.title)


def test_eagers_scores_are_held_against_float64_outside_of_its_peak(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    measured: list[bool] = []
    monkeypatch.setattr(demo, "OUTPUT", tmp_path)
    monkeypatch.setattr(demo, "scorer", lambda *_: lambda ids: ids.float())

    def peak_bytes(run: Callable[[], None]) -> SimpleNamespace:
        measured.append(True)
        run()
        measured.pop()
        return SimpleNamespace(peak=1)

    monkeypatch.setattr(demo.measure, "peak_bytes", peak_bytes)
    monkeypatch.setattr(demo.workers, "step", lambda _: None)
    monkeypatch.setattr(demo, "exact_scores", lambda *_: torch.full((1,), float(len(measured))))
    assert demo.score(None, torch.arange(3), "eager")["peak"] == 1
    assert torch.load(tmp_path / "exact-score.pt").item() == 0, "scored in float64 while the peak was measured"
    assert (tmp_path / "eager-score.pt").exists()
