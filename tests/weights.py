"""What tests of weights on the host begin with: a model all of whose layers are there, and what arrives of them."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

from mom_compile import HostWeight, offload_weights
from mom_compile.runtime.host.engines import engine_for
from tests.models import TinyDecoder

CPU = torch.device("cpu")


def decoder(**changes: Any) -> TinyDecoder:
    return TinyDecoder(**{"layers": 2, "width": 64, **changes}).eval()


def parts_of_one() -> TinyDecoder:
    """Two weights of each layer are views of one tensor."""
    model = decoder()
    for layer in model.layers:
        both = torch.cat([layer.gate.weight.data, layer.up.weight.data])
        layer.gate.weight, layer.up.weight = (nn.Parameter(half) for half in both.split(192))
    return model


def least(model: nn.Module, **asked: Any) -> int:
    """The smallest budget, as the error names it."""
    with pytest.raises(ValueError, match="the smallest budget is") as refused:
        offload_weights(model, CPU, memory_budget=1, **asked)
    found = re.search(r"the smallest budget is (\d+) bytes", str(refused.value))
    assert found is not None
    return int(found[1])


def offloaded(model: Any, **asked: Any) -> Any:
    """All layers on the host: no budget that is any smaller would do."""
    offload_weights(model, CPU, memory_budget=least(model, **asked), **asked)
    assert on_host(model)
    return model


def compiled(model: Any) -> Any:
    model.compile(backend="mom", options={"strict": True, "mini_seq_len": 64})
    return model


def on_host(model: nn.Module) -> set[str]:
    return {name for name, value in model.named_parameters(remove_duplicate=False) if isinstance(value, HostWeight)}


def bytes_arrived(call: Any) -> int:
    """What a call brings to the device."""
    traffic = engine_for(CPU).traffic
    before = traffic.to_device
    with torch.no_grad():
        call()
    return traffic.to_device - before
