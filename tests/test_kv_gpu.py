"""The KV cache on the host of a CUDA device: copies on a stream, pinned memory. Skipped where there is none."""

from __future__ import annotations

import gc

import pytest
import torch

from mom_compile import HostTensor, empty_host_pool, host_memory
from mom_compile.runtime.host.engines import engine_for
from tests.models import prompt, small_model

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("fresh")]


def generate(model, tokens: int, new: int = 24):
    inputs = {name: value.cuda() for name, value in prompt(2, tokens).items()}
    return model.generate(**inputs, max_new_tokens=new, do_sample=False, return_dict_in_generate=True)


@pytest.mark.parametrize("name", ["Llama", "Gemma3Text"])
def test_generate_keeps_its_cache_in_pinned_memory_and_gives_the_same_tokens(name):
    model = small_model(name).cuda()
    expected = generate(model, 300).sequences
    model.compile(backend="mom", options={"kv_offload": True, "mini_seq_len": 64, "strict": True})
    result = generate(model, 300)
    assert torch.equal(result.sequences, expected)
    for layer in result.past_key_values.layers:
        assert isinstance(layer.keys, HostTensor)
        assert layer.keys.device.type == "cuda"
        assert layer.keys.host.is_pinned()


def test_copies_are_in_order_with_the_computation_on_both_sides():
    engine = engine_for(torch.device("cuda"))
    host = torch.empty(1 << 24).pin_memory()
    for value in range(20):
        source = torch.full((1 << 24,), float(value), device="cuda")
        out = engine.to_host(host, source, None)
        del source
        torch.full((1 << 24,), -1.0, device="cuda")  # would take the source's memory if it were free
        back = torch.empty(1 << 24, device="cuda")
        engine.to_device(back, host, out).wait()
        assert float(back.min()) == float(back.max()) == value


def test_pinned_memory_is_given_back_on_demand():
    model = small_model("Llama").cuda()
    model.compile(backend="mom", options={"kv_offload": True, "mini_seq_len": 64})
    result = generate(model, 300)
    assert host_memory().memory > 0
    del result
    gc.collect()
    assert host_memory().pooled > 0
    empty_host_pool()
    assert host_memory().memory == 0
