"""The KV cache of a CUDA device on the host: copies on streams, pinned memory. Skipped without a GPU."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from benchmarks.models import keeping
from mom_compile import HostTensor, empty_host_pool, host_memory
from mom_compile.config import parse_options
from mom_compile.memory import decide
from mom_compile.runtime.copy_steps import Append, Offload
from mom_compile.runtime.host.backings.base import BLOCK
from mom_compile.runtime.host.bounce import STAGE
from mom_compile.runtime.host.engines import engine_for
from tests.models import prompt, small_model

pytestmark = pytest.mark.gpu


def generate(model, tokens: int, new: int = 24):
    inputs = {name: value.cuda() for name, value in prompt(2, tokens).items()}
    return model.generate(**inputs, max_new_tokens=new, do_sample=False, return_dict_in_generate=True)


@pytest.mark.parametrize("name", ["Llama", "Gemma3Text"])
def test_generate_keeps_its_cache_in_pinned_memory_and_gives_the_same_tokens(name):
    model = small_model(name, num_hidden_layers=3).cuda()
    expected = generate(model, 300).sequences
    model.compile(backend="mom", options={"kv_offload": True, "mini_seq_len": 64, "strict": True})
    result = generate(model, 300)
    assert torch.equal(result.sequences, expected)
    for layer in result.past_key_values.layers:
        assert isinstance(layer.keys, HostTensor)
        assert layer.keys.device.type == "cuda"
        assert layer.keys.host.is_pinned()


@torch.no_grad()
def logits_of_steps(model: Any, tokens: int, steps: int) -> tuple[torch.Tensor, DynamicCache]:
    """Return the last logits after a prompt and after each of the given tokens, `[steps + 1, B, vocabulary]`."""
    device, cache = model.device, DynamicCache()
    given = prompt(2, tokens + steps)["input_ids"].to(device)
    logits = []
    for portion in given.split([tokens, *[1] * steps], dim=1):
        logits.append(model(input_ids=portion, **keeping(cache, model), logits_to_keep=1).logits[:, -1])
    return torch.stack(logits), cache


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["Llama", "Gemma3Text"])
def test_logits_are_as_close_to_float64_as_those_of_eager_mode(name, dtype):
    """In bfloat16 by FlashAttention with grouped heads, in float32 by another kernel."""
    model = small_model(name, num_hidden_layers=3).to(dtype)
    exact, _ = logits_of_steps(copy.deepcopy(model).double(), 300, 6)
    model = model.cuda()
    eager, _ = logits_of_steps(model, 300, 6)
    model.compile(backend="mom", options={"kv_offload": True, "mini_seq_len": 64, "strict": True})
    ours, cache = logits_of_steps(model, 300, 6)
    assert all(isinstance(layer.keys, HostTensor) and layer.keys.dtype == dtype for layer in cache.layers)
    distance, eagers = ((logits.cpu().double() - exact).norm() for logits in (ours, eager))
    assert 0 < distance <= 1.5 * eagers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_copies_are_ordered_with_the_computation(dtype):
    """In both directions, each on its own stream, on the same rows."""
    engine, size = engine_for(torch.device("cuda")), 1 << 24
    host = torch.empty(size, dtype=dtype).pin_memory()
    for value in range(20):
        source = torch.full((size,), float(value), dtype=dtype, device="cuda")
        out = engine.to_host(host, source, None)
        del source
        torch.full((size,), -1.0, dtype=dtype, device="cuda")  # would take the source's memory if it were free
        back = torch.empty(size, dtype=dtype, device="cuda")
        engine.to_device(back, host, out.done).wait()
        assert float(back.min()) == float(back.max()) == value


def in_three_parts(rows, dtype, device, place):
    """Return rows that were offloaded and appended to twice, on the host and as expected."""
    new = [torch.randn(1, 2, rows, 64, dtype=dtype, device=device) for _ in range(3)]
    (host,) = Offload(2, device, place)([new[0], 0])
    for more in new[1:]:
        (host,) = Append(2, device, place)([host.host, more, 0])
    return host, torch.cat(new, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_across_seams_of_pinned_memory_are_fetched_correctly(dtype):
    device, rows = torch.device("cuda", 0), 3 * BLOCK // (2 * 64 * dtype.itemsize)
    place = decide.placement_of(parse_options({"kv_offload": True}), device)
    host, expected = in_three_parts(rows, dtype, device, place)
    assert torch.equal(host.fetch(), expected)
    assert torch.equal(host.to(torch.float64), expected.double())
    assert torch.equal(host[:, 1:].fetch(), expected[:, 1:])
    assert torch.equal(host.cpu(), expected.cpu())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_in_a_file_are_fetched_correctly(dtype, tmp_path):
    """Several buffers long, not a multiple of one, in several parts of the file."""
    device, rows = torch.device("cuda", 0), 3 * STAGE // (2 * 64 * dtype.itemsize) + 11
    place = decide.placement_of(parse_options({"kv_offload": "disk", "kv_dir": str(tmp_path)}), device)
    host, expected = in_three_parts(rows, dtype, device, place)
    assert torch.equal(host.fetch(), expected)
    assert torch.equal(host[:, 1:].fetch(), expected[:, 1:])
    assert torch.equal(host.cpu(), expected.cpu())


def test_memory_pinned_in_the_background_takes_copies():
    """For the next layers, in pieces, and for appended rows."""
    device, rows, dtype = torch.device("cuda", 0), 1 << 18, torch.bfloat16  # 64 MiB
    place = decide.placement_of(parse_options({"kv_offload": True}), device)
    values = [torch.randn(1, 2, rows, 64, dtype=dtype, device=device) for _ in range(3)]
    hosts = [Offload(2, device, place, ahead=2 - layer)([value, 0])[0] for layer, value in enumerate(values)]
    for layer, (host, value) in enumerate(zip(hosts, values, strict=True)):
        new = torch.randn(1, 2, 1 + (rows // 10) * layer, 64, dtype=dtype, device=device)
        (longer,) = Append(2, device, place)([host.host, new, 0])
        assert torch.equal(longer.fetch(), torch.cat([value, new], 2))


def test_pinned_memory_is_freed_on_demand():
    model = small_model("Llama", num_hidden_layers=3).cuda()
    model.compile(backend="mom", options={"kv_offload": True, "mini_seq_len": 64})
    result = generate(model, 300)
    assert host_memory().memory > 0
    del result
    gc.collect()
    assert host_memory().pooled > 0
    empty_host_pool()
    assert host_memory().memory == 0
