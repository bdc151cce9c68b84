"""The cost of weights on the host (`python -m benchmarks.weights`).

A Llama shape and a mixture of 64 experts, each with its weights on the device and with as many as possible on the host.
One process holds both models, compiled by mom; prefills and decode steps are timed in turn. On a CPU both memories are
the same: this shows what moves, what the device would hold, and the cost of a copy where copying uses the cores.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

import mom_compile
from benchmarks import measure, models
from benchmarks.measure import MIB
from mom_compile.runtime.host.engines import engine_for
from mom_compile.weights.offload import least_budget

CPU = torch.device("cpu")
RESIDENT, ON_HOST = "on the device", "on the host"
EXPERTS, CHOSEN = 64, 4


def mixture(layers: int) -> Any:
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        hidden_size=512, intermediate_size=1792, moe_intermediate_size=256, num_experts=EXPERTS,
        num_experts_per_tok=CHOSEN, num_hidden_layers=layers, num_attention_heads=8, num_key_value_heads=2, head_dim=64,
        vocab_size=32_000, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def moved(call: Callable[[], Any]) -> int:
    """Return the bytes that a call copies to the device."""
    traffic = engine_for(CPU).traffic
    before = traffic.to_device
    call()
    return traffic.to_device - before


@torch.no_grad()
def measured(name: str, model: Any, seq: int, repeats: int) -> list[str]:
    """Return lines of figures."""
    other = copy.deepcopy(model)
    weights = mom_compile.offload_weights(other, "cpu", memory_budget=least_budget(model))
    runs = {RESIDENT: model, ON_HOST: other}
    for one in runs.values():
        one.compile(backend="mom", options={"strict": True})
    ids, token = models.tokens(model, seq), models.tokens(model, 2)[:, :1]
    prefills = {key: partial(one, ids, logits_to_keep=1) for key, one in runs.items()}
    first = {key: call() for key, call in prefills.items()}
    difference = (first[RESIDENT].logits - first[ON_HOST].logits).abs().max().item()
    caches = {key: found.past_key_values for key, found in first.items()}
    steps = {key: partial(one, token, **models.keeping(caches[key], one)) for key, one in runs.items()}
    for step in (*steps.values(), *steps.values()):
        step()
    traffic = moved(prefills[ON_HOST]), moved(steps[ON_HOST])
    peaks = {key: measure.peak_bytes(call).peak for key, call in prefills.items()}
    times = [measure.alternate(calls, n) for calls, n in ((prefills, repeats), (steps, 4 * repeats))]
    total = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    lines = [f"{name}, {seq} tokens: weights {total / MIB:.0f} MiB; {weights}"]
    for what, taken, came in zip(("prefill", "decode step"), times, traffic, strict=True):
        seconds = {key: statistics.median(values) for key, values in taken.items()}
        lines.append(
            f"  {what}: {seconds[RESIDENT]:.3f} s {RESIDENT}, {seconds[ON_HOST]:.3f} s {ON_HOST} "
            f"({seconds[ON_HOST] / seconds[RESIDENT]:.2f}x), {came / MIB:.1f} MiB arrive"
        )
    lines.append(
        f"  peak of the prefill above the inputs: {peaks[RESIDENT] / MIB:.0f} MiB and {peaks[ON_HOST] / MIB:.0f} MiB, "
        f"weights under way included; logits differ by {difference:.1e}"
    )
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.weights", description="What weights on the host cost.")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--seq", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=("llama", "mixture"))
    options = parser.parse_args(arguments)
    measure.watch_cpu()
    if options.only != "mixture":
        model = models.llama("small", options.layers, seq=options.seq + 64)
        print("\n".join(measured("Llama shape", model, options.seq, options.repeats)), flush=True)
        del model
        torch._dynamo.reset()
    if options.only != "llama":
        layers = max(3, options.layers // 4)
        print("\n".join(measured(f"mixture of {EXPERTS}", mixture(layers), options.seq // 4, options.repeats)))
    print(measure.describe_machine(measure.machine()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
