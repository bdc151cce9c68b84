"""Small decoders of ten families, wide enough that mini-sequences dominate the peak.

A family is the prefix of a `Config` class of Hugging Face. Each has three layers; windows are much shorter than
prompts.
"""

from __future__ import annotations

from typing import Any

VOCABULARY = 1000

_WIDE = {"hidden_size": 256, "num_hidden_layers": 3, "num_attention_heads": 8, "max_position_embeddings": 4096}
_GROUPED = {**_WIDE, "num_key_value_heads": 2, "intermediate_size": 1024}
_CHOSEN = {"num_experts_per_tok": 2, "moe_intermediate_size": 128}

FAMILIES: dict[str, dict[str, Any]] = {
    # dense
    "Llama": _GROUPED,
    "Qwen3": {**_GROUPED, "head_dim": 32},
    "GPT2": {"n_embd": 256, "n_layer": 3, "n_head": 8, "n_positions": 4096},
    "OPT": {**_WIDE, "ffn_dim": 1024, "word_embed_proj_dim": 256},
    "Phi": {**_WIDE, "intermediate_size": 1024},
    "GPTNeoX": {**_WIDE, "intermediate_size": 1024},
    # windows
    "Gemma3Text": {**_GROUPED, "head_dim": 32, "sliding_window": 128, "sliding_window_pattern": 3},
    "Mistral": {**_GROUPED, "sliding_window": 256},
    "GptOss": {
        **_GROUPED, "head_dim": 32, "sliding_window": 128, "intermediate_size": 256, "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    # experts
    "Mixtral": {**_GROUPED, "intermediate_size": 512, "num_local_experts": 8, "num_experts_per_tok": 2},
    "Qwen3Moe": {**_GROUPED, **_CHOSEN, "head_dim": 32, "num_experts": 8},
    # latent keys and values
    "DeepseekV3": {
        **_WIDE, **_CHOSEN, "num_key_value_heads": 8, "intermediate_size": 512, "n_routed_experts": 8, "n_group": 2,
        "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 96, "kv_lora_rank": 64, "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 32, "v_head_dim": 32,
    },
}  # fmt: skip


def family_model(family: str) -> Any:
    """Return a float32 model of the family on the CPU, with the same random weights every time."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        **FAMILIES[family], vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    return transformers.AutoModelForCausalLM.from_config(config).eval()
