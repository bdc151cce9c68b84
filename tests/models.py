"""The models of all tests, and what they are asked: small, with random weights that are the same every time.

    TinyDecoder(layers, width, heads, groups, vocabulary)   plain modules, for tests that need no transformers
    tiny(family, ...)                                       two layers of width 32, a vocabulary of 64: to be compiled
    small_model(family, ...)                                two layers of width 64, a vocabulary of 320: to be run
    ids, prompt, next_token                                 what they are called with

A family is what Hugging Face puts before `Config`: "Llama", "GPTNeoX", "Gemma3Text". Those we promise are `FAMILIES`;
`MIXTURES` have experts, `UNUSUAL` are decoders whose caches hold something else than keys and values of heads,
`ENCODER_DECODERS` speaks for itself. Of any other the sizes must have the usual names. What else is given by name goes
to the configuration. A test that needs a third layer says so: `num_hidden_layers=3`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

# --- of plain modules ---


class Norm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class Layer(nn.Module):
    """Grouped heads, a gated MLP, norms before both."""

    def __init__(self, width: int, heads: int, groups: int) -> None:
        super().__init__()
        self.size = width // heads
        self.norm1, self.norm2 = Norm(width), Norm(width)
        self.q = nn.Linear(width, width, bias=False)
        self.kv = nn.Linear(width, 2 * groups * self.size, bias=False)
        self.o = nn.Linear(width, width, bias=False)
        self.gate = nn.Linear(width, 3 * width, bias=False)
        self.up = nn.Linear(width, 3 * width, bias=False)
        self.down = nn.Linear(3 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, _ = x.shape
        normed = self.norm1(x)
        q = self.q(normed).view(batch, tokens, -1, self.size).transpose(1, 2)
        k, v = self.kv(normed).view(batch, tokens, -1, self.size).transpose(1, 2).chunk(2, dim=1)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(seen.transpose(1, 2).reshape(batch, tokens, -1))
        normed = self.norm2(x)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))


class TinyDecoder(nn.Module):
    """`[B, S]` token ids to `[B, keep or S, vocabulary]` logits."""

    def __init__(self, layers: int = 2, width: int = 32, heads: int = 4, groups: int = 2, vocabulary: int = 64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Layer(width, heads, groups) for _ in range(layers))
        self.norm = Norm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: torch.Tensor, keep: int = 0) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x)[:, -keep:])


# --- of Hugging Face ---


@dataclass(frozen=True)
class Size:
    width: int
    layers: int
    #: Of an MLP.
    inner: int
    vocabulary: int
    heads: int = 4
    groups: int = 2


TINY = Size(32, 2, 48, 64)
SMALL = Size(64, 2, 224, 320)

#: How a configuration calls the sizes.
Names = Callable[[Size], dict[str, Any]]


def _plain(size: Size) -> dict[str, Any]:
    return {
        "hidden_size": size.width,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "vocab_size": size.vocabulary,
    }


def _with_mlp(size: Size) -> dict[str, Any]:
    return {**_plain(size), "intermediate_size": size.inner}


def _grouped(size: Size) -> dict[str, Any]:
    return {**_with_mlp(size), "num_key_value_heads": size.groups}


def _sized_heads(size: Size) -> dict[str, Any]:
    return {**_grouped(size), "head_dim": size.width // size.heads}


def _gemma3(size: Size) -> dict[str, Any]:
    """Every third layer sees all tokens, and the second of two."""
    return {**_sized_heads(size), "sliding_window_pattern": min(size.layers, 3)}


def _delta_rule(size: Size) -> dict[str, Any]:
    """Every second layer has attention."""
    types = ["full_attention" if layer % 2 else "linear_attention" for layer in range(size.layers)]
    return {**_sized_heads(size), "layer_types": types}


def _gpt2(size: Size) -> dict[str, Any]:
    return {"n_embd": size.width, "n_layer": size.layers, "n_head": size.heads, "vocab_size": size.vocabulary}


def _bloom(size: Size) -> dict[str, Any]:
    return {"hidden_size": size.width, "n_layer": size.layers, "n_head": size.heads, "vocab_size": size.vocabulary}


def _mpt(size: Size) -> dict[str, Any]:
    return {"d_model": size.width, "n_layers": size.layers, "n_heads": size.heads, "vocab_size": size.vocabulary}


def _opt(size: Size) -> dict[str, Any]:
    return {**_plain(size), "ffn_dim": size.inner, "word_embed_proj_dim": size.width}


def _falcon(size: Size) -> dict[str, Any]:
    return {**_plain(size), "num_kv_heads": size.groups}


def _both_halves(size: Size) -> dict[str, Any]:
    """Two layers each, whatever the size."""
    halves = {f"{half}_{name}": n for half in ("encoder", "decoder") for name, n in (("layers", 2), ("ffn_dim", 96))}
    heads = {f"{half}_attention_heads": size.heads for half in ("encoder", "decoder")}
    return {"d_model": size.width, "vocab_size": size.vocabulary, **halves, **heads}


def _t5(size: Size) -> dict[str, Any]:
    sizes = {"d_kv": size.width // size.heads, "d_ff": 96, "num_layers": 2, "num_heads": size.heads}
    return {"d_model": size.width, "vocab_size": size.vocabulary, **sizes}


@dataclass(frozen=True)
class Family:
    names: Names = _grouped
    #: What is not a size.
    settings: dict[str, Any] = field(default_factory=dict)


FAMILIES = {
    "Llama": Family(),
    "Qwen3": Family(_sized_heads),
    "Mistral": Family(_grouped, {"sliding_window": 16}),
    "Gemma3Text": Family(_gemma3, {"sliding_window": 16}),
    "Gemma2": Family(_sized_heads, {"sliding_window": 16}),
    "GPTNeoX": Family(_with_mlp),
    "GPT2": Family(_gpt2, {"n_positions": 256}),
    "OPT": Family(_opt, {"max_position_embeddings": 256}),
    "Falcon": Family(_falcon, {"alibi": False, "new_decoder_architecture": True}),
    "Bloom": Family(_bloom),
    "Phi": Family(_with_mlp),
    "Olmo2": Family(),
}

_EXPERTS = {"intermediate_size": 96, "moe_intermediate_size": 32, "num_experts_per_tok": 2}
_LATENT = {
    **_EXPERTS,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
_LINEAR = {
    **_EXPERTS,
    "num_experts": 4,
    "shared_expert_intermediate_size": 32,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
_MAMBA = {
    "intermediate_size": 96,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
    "mamba_expand": 2,
    "attn_layer_indices": [1],
}
UNUSUAL = {
    "DeepseekV2": Family(_grouped, _LATENT),
    "DeepseekV3": Family(_grouped, _LATENT),
    "Qwen3Next": Family(_delta_rule, _LINEAR),
    "Bamba": Family(_grouped, _MAMBA),
}

_CHOSEN = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
#: Their routers differ: softmax before or after the best are taken, sigmoid, groups; so do biases, experts that every
#: token has, and layers without any. Llama 4 multiplies every token with every expert.
MIXTURES = {
    "Mixtral": Family(_grouped, {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "Qwen2Moe": Family(_grouped, {**_CHOSEN, "num_experts": 4, "shared_expert_intermediate_size": 40}),
    "Qwen3Moe": Family(_sized_heads, {**_CHOSEN, "num_experts": 8}),
    "Olmoe": Family(_grouped, {"num_experts": 4, "num_experts_per_tok": 2}),
    "GptOss": Family(_sized_heads, {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16}),
    "DeepseekV3": Family(_grouped, {**_LATENT, **_CHOSEN, "n_group": 2, "n_routed_experts": 4}),
    "DeepseekV2": Family(_grouped, {**_LATENT, **_CHOSEN}),
    "Glm4Moe": Family(
        _sized_heads, {**_CHOSEN, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
    ),
    "Llama4Text": Family(
        _sized_heads, {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 96}
    ),
    "MiniMax": Family(_sized_heads, {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "Ernie4_5_Moe": Family(
        _grouped, {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32, "moe_layer_start_index": 1}
    ),
    "GraniteMoe": Family(_grouped, {"num_local_experts": 4, "num_experts_per_tok": 2}),
}

_AUDIO = {"num_mel_bins": 16, "max_source_positions": 50, "max_target_positions": 64}
ENCODER_DECODERS = {
    "Bart": Family(_both_halves, {"decoder_start_token_id": 1}),
    "Whisper": Family(_both_halves, {"decoder_start_token_id": 1, **_AUDIO}),
    "T5": Family(_t5, {"decoder_start_token_id": 1}),
}

_KNOWN = {**UNUSUAL, **FAMILIES, **MIXTURES, **ENCODER_DECODERS, "Mpt": Family(_mpt, {"max_seq_len": 128})}


def tiny(family: str, **changes: Any) -> Any:
    return _model(family, TINY, **changes)


def small_model(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    return _model(family, SMALL, dtype, **changes)


def _model(family: str, size: Size, dtype: torch.dtype = torch.float32, *, seed: int = 0, **changes: Any) -> Any:
    import transformers  # tests of the plain decoder do without

    known = _KNOWN.get(family, Family())
    size = replace(size, layers=changes.pop("num_hidden_layers", size.layers))
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = getattr(transformers, f"{family}Config")(**{**known.names(size), **tokens, **known.settings, **changes})
    torch.manual_seed(seed)
    if family in ENCODER_DECODERS:
        model = getattr(transformers, f"{family}ForConditionalGeneration")(config)
    else:
        model = transformers.AutoModelForCausalLM.from_config(config)
    return model.eval().to(dtype)


def sweep(names: Iterable[str], quick: Collection[str]) -> list[Any]:
    """Parameters of a test: `make test` takes the quick ones, `make sweep` the others."""
    return [pytest.param(name, marks=[] if name in quick else [pytest.mark.slow]) for name in names]


# --- what they are called with ---


def ids(batch: int, tokens: int, seed: int = 0, vocabulary: int = TINY.vocabulary) -> torch.Tensor:
    """Random tokens, none of them a special one."""
    return torch.randint(3, vocabulary, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def prompt(batch: int, tokens: int, padded: bool = False, seed: int = 0) -> dict[str, torch.Tensor]:
    """Inputs of a small model; with `padded`, the first sequence has five tokens of padding on its left."""
    inputs = {"input_ids": ids(batch, tokens, seed, SMALL.vocabulary)}
    if padded:
        mask = torch.ones(batch, tokens, dtype=torch.long)
        mask[0, :5] = 0
        inputs["attention_mask"] = mask
    return inputs


def next_token(inputs: dict[str, torch.Tensor], seed: int = 9) -> dict[str, torch.Tensor]:
    """Inputs of the decode step that follows."""
    batch = inputs["input_ids"].shape[0]
    step = {"input_ids": ids(batch, 1, seed, SMALL.vocabulary)}
    if "attention_mask" in inputs:
        step["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones(batch, 1, dtype=torch.long)], 1)
    return step
