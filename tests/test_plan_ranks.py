"""Plans for one rank of several: what transformers' tensor parallelism puts on a rank, without the other ranks."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import mom_compile
from mom_compile import PlanError
from mom_compile.planning.ranks import Ranks
from mom_compile.torch_compat.distributed import has_default_group, stand_in_group

BASE = {"hidden_size": 256, "intermediate_size": 896, "num_hidden_layers": 2, "num_attention_heads": 8,
        "num_key_value_heads": 4, "vocab_size": 1024, "max_position_embeddings": 1 << 16, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
CONFIGS = {
    "Llama": lambda **more: transformers.LlamaConfig(**{**BASE, **more}),
    "Qwen3": lambda **more: transformers.Qwen3Config(**{**BASE, "head_dim": 32, "tie_word_embeddings": True, **more}),
    "Mixtral": lambda **more: transformers.MixtralConfig(**{**BASE, "num_local_experts": 4, **more}),
}
TOKENS = 24

#: Loads each model on two ranks and prints for each the bytes of this rank's parameters and buffers, and of its cache.
WORKER = """
import json, sys, torch
from transformers import AutoModelForCausalLM
found = {}
for path in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(path, tp_plan="auto", dtype=torch.float32).eval()
    own = [p.to_local() if hasattr(p, "to_local") else p for p in model.parameters()]
    with torch.no_grad():
        past = model(torch.ones(1, %d, dtype=torch.long), use_cache=True).past_key_values
    cache = sum(layer.keys.nbytes + layer.values.nbytes for layer in past.layers)
    found[path] = [sum(p.nbytes for p in own) + sum(b.nbytes for b in model.buffers()), cache]
print(json.dumps(found))
torch.distributed.destroy_process_group()
""" % TOKENS  # noqa: UP031


def on_two_ranks(paths: list[Path]) -> list[dict[str, list[int]]]:
    """Return what each of two gloo ranks holds of each model."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-c", WORKER, *map(str, paths)]
    ranks = [
        subprocess.Popen(
            command, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    try:
        return [json.loads(process.communicate(timeout=240)[0].splitlines()[-1]) for process in ranks]
    finally:
        for process in ranks:
            process.kill()


def planned(config: Any, ranks: int, **settings: Any) -> mom_compile.Plan:
    given = {"seq_len": 2048, "dtype": "float32", "device": "cpu", **settings}
    return mom_compile.plan(config, tensor_parallel=ranks, **given)


@pytest.fixture(scope="module")
def llama_plans() -> dict[int, mom_compile.Plan]:
    return {ranks: planned(CONFIGS["Llama"](), ranks) for ranks in (1, 2)}


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="transformers would place ranks on GPUs")
def test_planned_weights_and_cache_of_a_rank_are_those_of_two_real_ranks(tmp_path: Path) -> None:
    torch.manual_seed(0)
    for family, config in CONFIGS.items():
        transformers.AutoModelForCausalLM.from_config(config()).save_pretrained(tmp_path / family)
    real = on_two_ranks([tmp_path / family for family in CONFIGS])
    for family, config in CONFIGS.items():
        found = planned(config(), 2)
        for rank in real:
            weights, cache = rank[str(tmp_path / family)]
            assert (found.subject.weight_bytes, found.kv_bytes_per_token * TOKENS) == (weights, cache), family


def test_a_rank_has_its_share_of_weights_cache_and_temporary_values(llama_plans: Any) -> None:
    one, two = llama_plans[1], llama_plans[2]
    assert (one.tensor_parallel, two.tensor_parallel) == (1, 2)
    assert one.subject.parameters == two.subject.parameters
    norms = 5 * 256 * 4 + 2 * 16 * 4  # and the frequencies of positions, whole on each rank
    assert abs(2 * (two.subject.weight_bytes - norms) - (one.subject.weight_bytes - norms)) < 2 * norms
    assert two.kv_bytes_per_token * 2 == one.kv_bytes_per_token == 2 * 2 * 4 * 32 * 4
    for way in one.ways:
        assert two.ways[way].peak_bytes(2048) < one.ways[way].peak_bytes(2048)
        assert two.ways[way].max_seq_len(64 << 20) > one.ways[way].max_seq_len(64 << 20)
    assert "on each of 2 ranks" in str(two) and "of one of 2 ranks, which holds 0.5 of" in two.notes[0]


def test_collectives_are_in_the_traced_graph(llama_plans: Any) -> None:
    planner = llama_plans[2]._planner
    found = [str(node.target) for node in planner.captured[0][-1].graph.graph.nodes]
    assert found.count("_c10d_functional.all_reduce.default") == 1 + 2 * 2  # the embedding, and two for each layer
    assert found.count("_c10d_functional.all_gather_into_tensor.default") == 1  # logits


def test_a_plan_leaves_no_process_group_behind(llama_plans: Any) -> None:
    llama_plans[2].peak_bytes(1500)
    assert not has_default_group()


def test_a_process_with_a_default_group_is_refused() -> None:
    with stand_in_group(4), pytest.raises(PlanError, match=r"tensor_parallel=2 needs .* has a group of 4; plan in a"):
        planned(CONFIGS["Llama"](), 2)
    assert not has_default_group()


@pytest.mark.parametrize(
    ("config", "ranks", "message"),
    [
        ({}, 0, r"tensor_parallel=0 is not valid; it is a number of ranks, 1 or more"),
        ({}, True, "tensor_parallel=True is not valid"),
        ({}, 3, r"3 does not divide the 8 attention heads of model.layers.0.self_attn.q_proj.* are 1, 2, 4, 8"),
        ({}, 8, r"8 does not divide the 4 key/value heads of model.layers.0.self_attn.k_proj.* are 1, 2, 4"),
    ],
)
def test_invalid_numbers_of_ranks_raise(config: dict[str, Any], ranks: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        planned(CONFIGS["Llama"](**config), ranks)


def test_a_model_without_a_plan_of_its_own_raises() -> None:
    config = transformers.GPT2Config(n_layer=2, n_embd=64, n_head=2, vocab_size=100)
    with pytest.raises(PlanError, match=r"no tensor-parallel plan for gpt2 .*; plan it without tensor_parallel"):
        planned(config, 2)


def test_a_plan_of_few_modules_is_noted() -> None:
    """transformers shards only the head of GPT-OSS."""
    config = transformers.GptOssConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, vocab_size=300, head_dim=32,
        intermediate_size=64, num_local_experts=4, num_experts_per_tok=2,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    assert "since transformers' plan leaves the other modules whole" in planned(config, 2).notes[0]


def test_a_head_tied_to_an_embedding_that_is_not_sharded_is_refused() -> None:
    config = transformers.Lfm2Config(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, vocab_size=300,
        full_attn_idxs=[0, 1], block_ff_dim=128,
    )  # fmt: skip
    with pytest.raises(PlanError, match=r"shards lm_head.weight of lfm2 and ties it to a weight that it does not"):
        planned(config, 2)


def test_one_rank_needs_no_group() -> None:
    with Ranks(1).group():
        assert not has_default_group()
