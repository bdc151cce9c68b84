"""Run by test_caches in a fresh process: compile one model with one backend, and say what happened, as JSON."""

from __future__ import annotations

import json
import sys

import torch

from tests.models import TinyDecoder, ids

if __name__ == "__main__":
    backend = sys.argv[1]
    model = TinyDecoder(layers=1).eval()
    options = {"mini_seq_len": 8, "strict": True} if backend == "mom" else None
    fast = torch.compile(model, backend=backend, options=options)
    with torch.no_grad():
        difference = float((fast(ids(1, 37), 1) - model(ids(1, 37), 1)).abs().max())
    loops = 0
    if backend == "mom":
        from mom_compile import reports

        loops = len(reports()[-1].stages)
    counters = torch._dynamo.utils.counters
    json.dump(
        {
            "difference": difference,
            "loops": loops,
            "autograd_hits": counters["aot_autograd"]["autograd_cache_hit"],
            "autograd_misses": counters["aot_autograd"]["autograd_cache_miss"],
            "autograd_saves": counters["aot_autograd"]["autograd_cache_saved"],
            "graph_hits": counters["inductor"]["fxgraph_cache_hit"],
        },
        sys.stdout,
    )
