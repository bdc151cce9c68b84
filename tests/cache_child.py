"""Run by test_caches in a fresh process: compile one model with one backend, and say what happened, as JSON.

A second argument is a file of compiled artifacts: it is loaded if it is there, else written.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from tests.models import TinyDecoder, ids

if __name__ == "__main__":
    backend = sys.argv[1]
    artifacts = Path(sys.argv[2]) if len(sys.argv) > 2 else None
    loaded = artifacts is not None and artifacts.exists()
    if artifacts is not None and loaded:
        torch.compiler.load_cache_artifacts(artifacts.read_bytes())
    model = TinyDecoder(layers=1).eval()
    options = {"mini_seq_len": 8, "strict": True} if backend == "mom" else None
    fast = torch.compile(model, backend=backend, options=options)
    with torch.no_grad():
        difference = float((fast(ids(1, 37), 1) - model(ids(1, 37), 1)).abs().max())
    if artifacts is not None and not loaded:
        saved = torch.compiler.save_cache_artifacts()
        assert saved is not None
        artifacts.write_bytes(saved[0])
    loops, read = 0, False
    if backend == "mom":
        from mom_compile import reports

        loops, read = len(reports()[-1].stages), reports()[-1].from_cache
    counters = torch._dynamo.utils.counters
    json.dump(
        {
            "difference": difference,
            "loops": loops,
            "read": read,
            "autograd_hits": counters["aot_autograd"]["autograd_cache_hit"],
            "autograd_misses": counters["aot_autograd"]["autograd_cache_miss"],
            "autograd_saves": counters["aot_autograd"]["autograd_cache_saved"],
            "graph_misses": counters["inductor"]["fxgraph_cache_miss"],
            "graph_hits": counters["inductor"]["fxgraph_cache_hit"],
        },
        sys.stdout,
    )
