"""Compile caches on disk never mix us up with stock Inductor, cold or warm, whoever comes first."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(backend: str, cache: Path, *more: str) -> dict[str, float]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "passes")])
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), "PYTHONPATH": path}
    command = [sys.executable, "-m", "tests.cache_child", backend, *more]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_stock_inductor_first(tmp_path):
    cold, ours, warm, ours_again = (run(b, tmp_path) for b in ("inductor", "mom", "inductor", "mom"))
    for result in (ours, ours_again):
        assert result["loops"] == 1
        assert result["autograd_hits"] == result["autograd_saves"] == 0
    assert max(r["difference"] for r in (cold, ours, warm, ours_again)) < 1e-5
    # The control: stock Inductor does use that cache here.
    assert (cold["autograd_hits"], cold["autograd_misses"], warm["autograd_hits"]) == (0, 1, 1)
    # Pieces are welcome in the graph cache: the second time ours come from there.
    assert ours_again["graph_hits"] > 0


def test_ours_first(tmp_path):
    ours, stock = (run(b, tmp_path) for b in ("mom", "inductor"))
    assert ours["loops"] == 1
    assert max(ours["difference"], stock["difference"]) < 1e-5
    # Nothing of ours is served to stock Inductor.
    assert (stock["autograd_hits"], stock["autograd_misses"]) == (0, 1)


@pytest.mark.slow
def test_what_was_compiled_can_be_taken_to_another_machine(tmp_path):
    """By PyTorch's own artifacts, into an empty cache: a service starts with them."""
    file = str(tmp_path / "artifacts")
    first, second = (run("mom", tmp_path / name, file) for name in ("one", "other"))
    assert first["graph_misses"] > 0 and first["graph_hits"] == 0
    assert second["graph_hits"] == first["graph_misses"] and second["graph_misses"] == 0
    assert second["loops"] == 1 and second["difference"] < 1e-5
