"""Mixtures of experts: prefill in eager mode, with stock Inductor and with mom (`python -m benchmarks.experts`).

The shapes are those of four well-known mixtures, narrower and with two layers. One process holds the model and all
backends; calls are timed in turn, and medians are compared. The KV cache is kept and logits are computed for the last
token only. `mom-N` is mom with mini-sequences of N tokens.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import transformers

from benchmarks import measure, models
from benchmarks.measure import MIB

_COMMON = {"vocab_size": 32_000, "num_hidden_layers": 2, "hidden_size": 512, "max_position_embeddings": 16_384}
#: Name -> config class and sizes: the numbers of experts and of chosen experts, widths in proportion.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": (
        "MixtralConfig",
        {"num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 1792, "num_local_experts": 8,
         "num_experts_per_tok": 2},
    ),
    "gpt-oss": (
        "GptOssConfig",
        {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 64, "intermediate_size": 512,
         "num_local_experts": 32, "num_experts_per_tok": 4, "sliding_window": 128},
    ),
    "qwen3": (
        "Qwen3MoeConfig",
        {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 64, "intermediate_size": 1792,
         "moe_intermediate_size": 192, "num_experts": 128, "num_experts_per_tok": 8},
    ),
    "deepseek-v3": (
        "DeepseekV3Config",
        {"num_attention_heads": 8, "num_key_value_heads": 8, "intermediate_size": 1280, "moe_intermediate_size": 144,
         "n_routed_experts": 128, "num_experts_per_tok": 8, "n_shared_experts": 1, "n_group": 8, "topk_group": 4,
         "first_k_dense_replace": 0, "kv_lora_rank": 64, "q_lora_rank": 128, "qk_rope_head_dim": 16,
         "qk_nope_head_dim": 32, "v_head_dim": 32},
    ),
}  # fmt: skip


def mixture(shape: str) -> Any:
    name, sizes = SHAPES[shape]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**_COMMON, **sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def compiled(model: Any, backend: str) -> Any:
    if backend == "eager":
        return model
    if backend.startswith("mom-"):
        return torch.compile(model, backend="mom", options={"mini_seq_len": int(backend.removeprefix("mom-"))})
    return torch.compile(model, backend=backend)


def measured(shape: str, seq: int, backends: Sequence[str], repeats: int) -> list[dict[str, Any]]:
    """Return a row for each backend: peak bytes above the inputs, median seconds, and the difference from eager's
    logits."""
    model = mixture(shape)
    ids = models.tokens(model, seq)
    calls = {name: partial(models.prefill, compiled(model, name), ids, cache=True) for name in backends}
    reference = models.prefill(model, ids, cache=True)[0]
    rows = {}
    for name, call in calls.items():
        difference = (call()[0] - reference).abs().max().item()
        rows[name] = {"shape": shape, "backend": name, "difference": difference, "peak": measure.peak_bytes(call).peak}
        print(json.dumps(rows[name]), file=sys.stderr, flush=True)
    times = measure.alternate(calls, repeats)
    return [{**row, "seconds": statistics.median(times[name])} for name, row in rows.items()]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.experts", description="What mixtures of experts take.")
    parser.add_argument("--seq", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--backends", nargs="+", default=["eager", "inductor", "mom"])
    options = parser.parse_args(arguments)
    measure.watch_cpu()
    for shape in options.shapes:
        torch._dynamo.reset()
        rows = measured(shape, options.seq, options.backends, options.repeats)
        base = next((row for row in rows if row["backend"] == "inductor"), rows[0])
        for row in rows:
            print(
                f"{shape} {row['backend']}: peak {row['peak'] / MIB:.1f} MiB ({row['peak'] / base['peak']:.3f}x), "
                f"{row['seconds']:.2f} s ({row['seconds'] / base['seconds']:.3f}x), difference {row['difference']:.1e}"
            )
    print(measure.describe_machine(measure.machine()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
