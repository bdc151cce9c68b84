"""Compile caches on disk never mix us up with stock Inductor, cold or warm, whoever comes first."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(backend: str, cache: Path) -> dict[str, float]:
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.cache_child", backend]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("order", [("inductor", "mom"), ("mom", "inductor")], ids=["stock first", "ours first"])
def test_neither_backend_is_served_the_other_ones_artifact(order, tmp_path):
    cold = {backend: run(backend, tmp_path) for backend in order}
    warm = {backend: run(backend, tmp_path) for backend in order}
    for results in (cold, warm):
        assert results["mom"]["loops"] == 2
        assert max(results[backend]["difference"] for backend in order) < 1e-5
        assert results["mom"]["autograd_hits"] == results["mom"]["autograd_saves"] == 0
    # The control: stock Inductor does use that cache here, and nothing but its own earlier run fills it.
    assert cold["inductor"]["autograd_hits"] == 0
    assert cold["inductor"]["autograd_misses"] == 1
    assert warm["inductor"]["autograd_hits"] == 1
    # Pieces are welcome in the graph cache: the second time all of ours come from there.
    assert warm["mom"]["graph_hits"] > 0
