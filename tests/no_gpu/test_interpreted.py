"""Code compiled for a GPU computes what eager mode does: Triton kernels, interpreted on the CPU.

TRITON_INTERPRET is read when triton is imported, so each test starts a process (`interpreted`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="the triton wheel is not installed (extra test-triton)")
pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parents[2]


def interpreted(folder: Path, *arguments: str) -> list[dict[str, Any]]:
    """A cache of its own, so that interpreted code is not taken for compiled code."""
    own = {"TORCHINDUCTOR_CACHE_DIR": str(folder), "TRITON_CACHE_DIR": str(folder / "triton"), "TRITON_INTERPRET": "1"}
    environment = {**os.environ, **own}
    command = [sys.executable, "-m", "tests.no_gpu.interpreted", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def is_as_exact_as_eager_mode(found: dict[str, Any]) -> bool:
    """At most 1.5 times as far from float64."""
    return bool(found["ours"] <= 1.5 * found["eager"])


def runs_as_it_would_there(found: dict[str, Any], iterations: int) -> None:
    """Only Triton kernels run, those of each loop for every mini-sequence."""
    assert found["loops"] >= 3
    assert not found["eager_pieces"]
    assert found["launched"] and min(found["launched"].values()) >= 1
    assert max(found["launched"].values()) >= 2 * iterations, "alike layers run the same kernels"


def test_llama_is_as_accurate_as_eager_mode_and_a_planted_bug_is_found(tmp_path: Path) -> None:
    """70 tokens by 32: the last mini-sequence is shorter. With the bug, rows after the first have wrong positions."""
    found, wrong = interpreted(tmp_path, "Llama", "--bug")
    runs_as_it_would_there(found, iterations=3)
    assert is_as_exact_as_eager_mode(found)
    assert wrong["changed"]
    assert not is_as_exact_as_eager_mode(wrong)


@pytest.mark.slow
@pytest.mark.parametrize(("tokens", "rows"), [(150, 32), (65, 32), (127, 63)])
def test_other_families_are_as_accurate_as_eager_mode(tokens: int, rows: int, tmp_path: Path) -> None:
    """Windows, learnt positions, biases by distance; last mini-sequences of one row less and one row more."""
    families = ("Llama", "Gemma3Text", "GPT2", "Bloom")
    results = interpreted(tmp_path, *families, "--tokens", str(tokens), "--rows", str(rows))
    assert [found["family"] for found in results] == list(families)
    for found in results:
        runs_as_it_would_there(found, iterations=tokens // rows)
        assert is_as_exact_as_eager_mode(found), found
