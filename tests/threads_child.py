"""Run by test_threads in a process with several compile workers: many threads call one compiled model for the first
time, each with lengths of its own, and compare with eager mode. Prints the largest difference of each round, as JSON.

Arguments: where the cache is ("device" or "host"), whether weights are on the host ("weights" or "none"), rounds.
"""

from __future__ import annotations

import json
import sys

import torch
from torch._inductor import config as inductor_config

import mom_compile
from benchmarks.models import keeping
from tests.models import ids, tiny
from tests.threads import together
from tests.weights import offloaded

THREADS = 8
#: What each thread asks for first is short, one mini-sequence: that is what a loop's body is compiled for anew.
LENGTHS = (*range(5, 20), *range(21, 96, 5))


@torch.no_grad()
def told(model, length: int) -> list[torch.Tensor]:
    """Logits behind a prompt and behind two tokens more."""
    out = model(input_ids=ids(2, length, seed=length), use_cache=True)
    logits = [out.logits]
    for step in (1, 2):
        kept = keeping(out.past_key_values, model)
        out = model(input_ids=ids(2, 1, seed=length + step), **kept, use_cache=True)
        logits.append(out.logits)
    return logits


def difference(found: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(found, exact, strict=True))


def a_round(where: str, weights: str, exact: dict[int, list[torch.Tensor]]) -> float:
    torch._dynamo.reset()
    model = tiny("Llama")
    if weights == "weights":
        offloaded(model)
    mom_compile.compile(model, dynamic=True, mini_seq_len=16, kv_offload=where == "host", strict=True)
    for length in (50, 70):  # pieces for prompts of several mini-sequences, as a server would have them
        told(model, length)

    def work(number: int) -> float:
        return max(difference(told(model, n), exact[n]) for n in LENGTHS[number::THREADS])

    worst = max(together(THREADS, work, seconds=500))
    # What a piece has remembered is right, too.
    return max(worst, *(difference(told(model, n), exact[n]) for n in LENGTHS))


if __name__ == "__main__":
    where, weights, rounds = sys.argv[1:]
    assert len(LENGTHS) == 30 and inductor_config.compile_threads > 1
    plain = tiny("Llama")
    exact = {n: told(plain, n) for n in LENGTHS}
    found = [a_round(where, weights, exact) for _ in range(int(rounds))]
    eager = [report.eager_pieces for report in mom_compile.reports() if report.eager_pieces]
    json.dump({"differences": found, "eager": eager, "graphs": len(mom_compile.reports())}, sys.stdout)
