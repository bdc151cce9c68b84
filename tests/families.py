"""Small random models of the decoder families we promise, as Hugging Face builds them."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest
import torch
import transformers
from torch import nn

_SMALL = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 320}
_GROUPED = {**_SMALL, "num_key_value_heads": 2, "intermediate_size": 224}
_HEAD16 = {**_GROUPED, "head_dim": 16}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _GROUPED),
    "qwen3": ("Qwen3Config", _HEAD16),
    "mistral": ("MistralConfig", {**_GROUPED, "sliding_window": 16}),
    "gemma3": ("Gemma3TextConfig", {**_HEAD16, "sliding_window": 16, "sliding_window_pattern": 3}),
    "gemma2": ("Gemma2Config", {**_HEAD16, "sliding_window": 16}),
    "gpt_neox": ("GPTNeoXConfig", {**_SMALL, "intermediate_size": 224}),
    "gpt2": ("GPT2Config", {"n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 320, "n_positions": 256}),
    "opt": (
        "OPTConfig",
        {**_SMALL, "ffn_dim": 224, "word_embed_proj_dim": 64, "max_position_embeddings": 256},
    ),
    "falcon": ("FalconConfig", {**_SMALL, "alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "bloom": ("BloomConfig", {"hidden_size": 64, "n_layer": 3, "n_head": 4, "vocab_size": 320}),
    "phi": ("PhiConfig", {**_SMALL, "intermediate_size": 224}),
    "olmo2": ("Olmo2Config", _GROUPED),
}


def sweep(names: Iterable[str], quick: Collection[str]) -> list[Any]:
    """Parameters of a test: `make test` takes the quick ones, `make sweep` the others."""
    return [pytest.param(name, marks=[] if name in quick else [pytest.mark.slow]) for name in names]


def small_model(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Three layers with random weights, the same every time."""
    config_class, settings = FAMILIES[name]
    config = getattr(transformers, config_class)(**settings, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval().to(dtype)


def prompt(batch: int, tokens: int, padded: bool = False, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random token ids; with `padded`, the first sequence has five tokens of padding on its left."""
    generator = torch.Generator().manual_seed(seed)
    inputs = {"input_ids": torch.randint(3, 320, (batch, tokens), generator=generator)}
    if padded:
        mask = torch.ones(batch, tokens, dtype=torch.long)
        mask[0, :5] = 0
        inputs["attention_mask"] = mask
    return inputs


def next_token(inputs: dict[str, torch.Tensor], seed: int = 9) -> dict[str, torch.Tensor]:
    """Inputs of the decode step that follows."""
    batch = inputs["input_ids"].shape[0]
    step = {"input_ids": torch.randint(3, 320, (batch, 1), generator=torch.Generator().manual_seed(seed))}
    if "attention_mask" in inputs:
        step["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones(batch, 1, dtype=torch.long)], 1)
    return step
