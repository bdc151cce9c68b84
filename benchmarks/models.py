"""The measured model shapes, with random weights."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import DynamicCache, Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

SHAPES: dict[str, dict[str, int]] = {
    # Wide enough that the intermediates dominate the peak, small enough for two cores.
    "small": {
        "hidden_size": 1024,
        "intermediate_size": 3584,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "vocab_size": 32_000,
    },
    # Compile time does not depend on the widths, so this one is quick to run.
    "narrow": {
        "hidden_size": 256,
        "intermediate_size": 896,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "vocab_size": 32_000,
    },
    # Half as wide as "small".
    "half": {
        "hidden_size": 512,
        "intermediate_size": 1792,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 32_000,
    },
    "llama-3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128_256,
    },
}


def llama(
    shape: str, layers: int, *, dtype: torch.dtype = torch.float32, device: str = "cpu", seq: int = 8192
) -> LlamaForCausalLM:
    """Return a Llama in eval mode, created on its device."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **SHAPES[shape], num_hidden_layers=layers, max_position_embeddings=seq, rope_theta=500_000.0, dtype=dtype
    )
    with torch.device(device):
        return LlamaForCausalLM._from_config(config, dtype=dtype).eval()


def windows(seq: int) -> Gemma3ForCausalLM:
    """Return a small Gemma 3 in eval mode, five of six layers with a window of 128 tokens."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=128,
        sliding_window=128,
        layer_types=[*["sliding_attention"] * 5, "full_attention"],
        vocab_size=1000,
        max_position_embeddings=seq,
    )
    return Gemma3ForCausalLM(config).eval()


def tokens(model: Any, seq: int, batch: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(model.config.vocab_size, (batch, seq), generator=generator).to(model.device)


def keeping(cache: Any, model: Any) -> dict[str, Any]:
    """Return a cache under the name of the model's argument: `past_key_values` before transformers 5.24."""
    return {"cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values": cache}


def cached(cache: Any) -> list[torch.Tensor]:
    """Return keys and values of all layers."""
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


@torch.no_grad()
def prefill(
    model: Any, ids: torch.Tensor, *, cache: bool, mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, Any]:
    """Return last-token logits, and the KV cache if it is kept. The baseline never computes more logits than these.

    `mask` is an attention mask `[B, S]`, as `generate()` always passes one.
    """
    output = model(input_ids=ids, attention_mask=mask, use_cache=cache, logits_to_keep=1)
    return output.logits, output.past_key_values


@torch.no_grad()
def chunked_prefill(model: Any, ids: torch.Tensor, *, chunk: int) -> tuple[torch.Tensor, Any]:
    """Run `generate(prefill_chunk_size=chunk)`: the prompt in chunks over a growing cache, in eager mode."""
    cache = DynamicCache(config=model.config)
    kept = keeping(cache, model)
    for piece in ids.split(chunk, dim=1):
        output = model(input_ids=piece, **kept, use_cache=True, logits_to_keep=1)
    return output.logits, cache
