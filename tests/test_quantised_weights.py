"""What quantised checkpoints take: sizes of published ones, and the formats that fields of each method stand for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from mom_compile.planning.configs import find_config
from mom_compile.planning.quantised import BITS, Format, Role, UnreadableError, scheme_of, scheme_of_bits
from mom_compile.planning.subject import subject_of
from mom_compile.planning.weights import weights_of


def planned(name: str, given: dict[str, Any] | None = None) -> Any:
    found = find_config(name)
    return subject_of(found.config, name, torch.bfloat16, None, scheme_of(given or found.quantization or {}))


def test_gpt_oss_takes_what_its_checkpoint_takes() -> None:
    """Its index says total_size 13761264768; a plan has 256 bytes of buffers beside it."""
    assert planned("GPT-OSS-20B")[0].weight_bytes == 13_761_264_768 + 256


def test_llama_takes_what_its_checkpoint_of_bitsandbytes_takes() -> None:
    """unsloth/llama-3-8b-bnb-4bit has 5.70 GB."""
    given = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_use_double_quant": True}
    assert planned("Llama-3-8B", given)[0].weight_bytes == pytest.approx(5.70e9, rel=0.002)


def one(given: dict[str, Any], name: str = "model.layers.0.mlp.up_proj.weight", role: Role = Role.LINEAR) -> Any:
    return scheme_of(given).format_of(name, role)


MATRIX = (512, 1024)
COUNT = 512 * 1024
PACKED = {"num_bits": 4, "strategy": "group", "group_size": 128, "symmetric": True, "type": "int"}
FLOAT4 = {"num_bits": 4, "strategy": "tensor_group", "group_size": 16, "symmetric": True, "type": "float"}
FLOAT8 = {"num_bits": 8, "strategy": "channel", "symmetric": True, "type": "float"}
INT4 = {"default": {"_type": "Int4WeightOnlyConfig", "_data": {"group_size": 64}}}


@pytest.mark.parametrize(
    ("given", "size"),
    [
        ({"load_in_4bit": True, "quant_method": "bitsandbytes"}, COUNT // 2 + COUNT // 64 * 4),
        ({"load_in_8bit": True}, COUNT + 512 * 4),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128},
         COUNT // 2 + COUNT // 128 * 2 + COUNT // 128 // 2 + 1024 * 4),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1}, COUNT + 512 * 3 + 1024 * 4),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, COUNT // 2 + COUNT // 128 * 2 + COUNT // 128 // 2),
        ({"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "zero_point": False}, COUNT // 2 + COUNT // 64 * 2),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, COUNT + 4 * 8 * 4),
        ({"quant_method": "fp8"}, COUNT + 4),
        ({"quant_method": "fbgemm_fp8"}, COUNT + 512 * 4),
        ({"quant_method": "compressed-tensors", "config_groups": {"a": {"targets": ["Linear"], "weights": PACKED}}},
         COUNT // 2 + COUNT // 128 * 2),
        ({"quant_method": "compressed-tensors", "config_groups": {"a": {"targets": ["Linear"], "weights": FLOAT4}}},
         COUNT // 2 + COUNT // 16),
        ({"quant_method": "compressed-tensors", "config_groups": {"a": {"targets": ["Linear"], "weights": FLOAT8}}},
         COUNT + 512 * 2),
        ({"quant_method": "torchao", "quant_type": "int8_weight_only"}, COUNT + 512 * 2),
        ({"quant_method": "torchao", "quant_type": INT4}, COUNT // 2 + COUNT // 64 * 4),
        ({"quant_method": "quanto", "weights": "int8"}, COUNT + 512 * 2),
        ({"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4, "group_size": 64}}},
         COUNT // 2 + COUNT // 64 * 4),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, COUNT // 2 + COUNT // 16),
    ],
    ids=lambda value: str(value)[:60],
)  # fmt: skip
def test_a_method_takes_the_bytes_of_its_format(given: dict[str, Any], size: int) -> None:
    assert one(given).bytes(MATRIX) == size


@pytest.mark.parametrize(
    ("name", "role", "is_quantised"),
    [
        ("model.layers.0.mlp.up_proj.weight", Role.LINEAR, True),
        ("model.layers.10.mlp.up_proj.weight", Role.LINEAR, True),
        ("model.layers.1.mlp.up_proj.weight", Role.LINEAR, False),
        ("model.layers.0.self_attn.q_proj.weight", Role.LINEAR, False),
        ("model.layers.0.mlp.experts.gate_up_proj", Role.BANK, True),
        ("lm_head.weight", Role.HEAD, False),
        ("model.embed_tokens.weight", Role.EMBEDDING, False),
        ("model.norm.weight", Role.OTHER, False),
    ],
)
def test_what_is_excluded_has_no_format(name: str, role: Role, is_quantised: bool) -> None:
    """By a whole part of a name, and by `*`; a model with pictures calls its text `language_model`."""
    skips = ["model.language_model.layers.1", "model.layers.*.self_attn"]
    given = {"quant_method": "awq", "bits": 4, "modules_to_not_convert": skips}
    assert (one(given, name, role) is not None) == is_quantised


def test_the_head_is_quantised_where_the_config_says_so() -> None:
    gptq = {"quant_method": "gptq", "bits": 4}
    assert one({**gptq, "lm_head": True}, "lm_head.weight", Role.HEAD) and not one(gptq, "lm_head.weight", Role.HEAD)
    packed = {"quant_method": "compressed-tensors", "config_groups": {"a": {"targets": ["Linear"], "weights": PACKED}}}
    assert one(packed, "lm_head.weight", Role.HEAD)
    assert not one({**packed, "ignore": ["lm_head"]}, "lm_head.weight", Role.HEAD)


def test_groups_of_modules_have_formats_of_their_own() -> None:
    groups = {"a": {"targets": ["Linear"], "weights": PACKED}, "b": {"targets": ["re:.*down_proj"], "weights": FLOAT8}}
    given = {"quant_method": "compressed-tensors", "config_groups": groups, "ignore": ["re:.*shared_expert.*"]}
    assert one(given).bits == 4 and one(given, "model.layers.0.mlp.down_proj.weight").bits == 8
    assert one(given, "model.layers.0.mlp.experts.down_proj", Role.BANK).bits == 8
    assert one(given, "model.layers.0.mlp.experts.gate_up_proj", Role.BANK).bits == 4
    assert one(given, "model.layers.0.mlp.shared_expert.up_proj.weight") is None


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"quant_method": "vptq"}, "the method 'vptq' is not known"),
        ({}, "no method is named"),
        ({"quant_method": "gptq"}, "the fields of gptq are not readable"),
        ({"quant_method": "torchao", "quant_type": "float3"}, "torchao are not readable"),
        ({"quant_method": "compressed-tensors", "config_groups": {"a": {}}}, "not readable"),
        ({"quant_method": "bitsandbytes"}, "neither load_in_4bit nor load_in_8bit"),
    ],
)
def test_what_is_not_known_is_refused(given: dict[str, Any], why: str) -> None:
    with pytest.raises(UnreadableError, match=why):
        scheme_of(given)


@pytest.mark.parametrize("bits", BITS)
def test_bits_stand_for_a_format(bits: int) -> None:
    fmt = scheme_of_bits(bits).format_of("model.layers.0.mlp.up_proj.weight", Role.LINEAR)
    assert fmt is not None and bits * COUNT // 8 < fmt.bytes(MATRIX) < (bits + 0.3) * COUNT // 8


def test_a_bank_has_the_scales_of_each_expert() -> None:
    assert Format(4, 32, scale_bytes=1).bytes((8, 96, 64)) == 8 * 96 * 64 // 2 + 8 * 96 * 2
    assert Format(8, scale_bytes=4, block=(128, 128)).bytes((8, 200, 64)) == 8 * 200 * 64 + 8 * 2 * 4


def test_a_token_reads_the_experts_that_are_chosen_for_it() -> None:
    config = transformers.Qwen3MoeConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=32, vocab_size=100,
        num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32, intermediate_size=64,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    found = weights_of(model, config, None)
    banks = 2 * 8 * 3 * 64 * 32 * 4
    table = 100 * 64 * 4
    assert found.each.bank_bytes == banks and found.each.share == 0.25
    assert found.each.read(1) == found.each.bytes + banks // 4
    assert found.each.read(3) == found.each.bytes + banks * 3 // 4 and found.each.read(9) == found.each.bytes + banks
    rotary = sum(buffer.nbytes for buffer in model.buffers())
    assert found.all == found.each.bytes + banks + table + rotary
    assert found.leaving.bank_bytes == banks and found.all - found.resident > banks
