"""A prompt and all its decode steps are two graphs, and a prompt of another length adds one: none for its steps.

Dynamo captures a graph anew for each layout of a cache, and takes a size for dynamic once it has seen two. So the first
keys and values lie as later ones do, as in eager mode, and say that they will be longer.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from mom_compile import HostTensor
from mom_passes.ops.transfers import growing_strides
from tests.models import prompt, small_model

NEW = 5
KEPT: dict[str, Any] = {"mini_seq_len": 16, "strict": True}
ON_HOST = {**KEPT, "kv_offload": True}

#: Longer than the windows, and so short that nothing is cut.
LONG, LONGER, SHORT = 70, 91, 9

#: Graphs after each of three prompts. Rows of a window lie alone behind a prompt, beside a dropped one behind a step:
#: on the device a prompt's first step has a graph of its own.
ONE_FOR_STEPS, TWO_FOR_STEPS = (2, 3, 3), (3, 4, 4)


def generate(model: Any, tokens: int) -> torch.Tensor:
    made = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    return model.generate(**prompt(1, tokens), **made)


def keys(model: Any, tokens: int) -> list[torch.Tensor]:
    with torch.no_grad():
        cache = model(**prompt(1, tokens), use_cache=True, logits_to_keep=1).past_key_values
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


#: Two layers, of each kind.
CHANGES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Gemma3Text": {"layer_types": ["sliding_attention", "full_attention"]},
    "Mistral": {"sliding_window": 16},
}


@pytest.mark.parametrize(
    ("family", "options"),
    [
        pytest.param("Llama", KEPT, id="Llama kept"),
        pytest.param("Llama", ON_HOST, id="Llama on host", marks=pytest.mark.slow),
        pytest.param("Gemma3Text", KEPT, id="Gemma kept", marks=pytest.mark.slow),
        pytest.param("Gemma3Text", ON_HOST, id="Gemma on host"),
        pytest.param("Mistral", KEPT, id="Mistral kept", marks=pytest.mark.slow),
        pytest.param("Mistral", ON_HOST, id="Mistral on host", marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("eager_pieces", "stock_is_eager")
def test_decode_steps_of_all_prompts_are_one_graph(family: str, options: dict[str, Any]) -> None:
    eager, model = (small_model(family, torch.float64, num_hidden_layers=2, **CHANGES[family]) for _ in range(2))
    model.compile(backend="mom", options=options)
    counters.clear()
    counts = ONE_FOR_STEPS if family == "Llama" or options is ON_HOST else TWO_FOR_STEPS
    for tokens, graphs in zip((LONG, LONGER, LONG - 20), counts, strict=True):
        assert torch.equal(generate(model, tokens), generate(eager, tokens))
        assert counters["stats"]["unique_graphs"] == graphs


@pytest.mark.parametrize(
    ("family", "tokens"),
    [
        ("Llama", LONG),
        ("Llama", 1),
        ("GPT2", SHORT),
        *(
            pytest.param(family, tokens, marks=pytest.mark.slow)
            for family, known in [("Llama", [SHORT]), ("Qwen3", [LONG, SHORT, 1]), ("GPT2", [LONG, 1])]
            for tokens in known
        ),
    ],
)
@pytest.mark.usefixtures("eager_pieces", "stock_is_eager")
def test_the_first_keys_and_values_are_laid_out_to_grow(family: str, tokens: int) -> None:
    """Not head by head, as in eager mode: a decode step would have to move them."""
    expected = keys(small_model(family), tokens)
    model = small_model(family)
    model.compile(backend="mom", options=KEPT)
    found = keys(model, tokens)
    for value in found:
        known = zip(value.shape, value.stride(), growing_strides(value.shape, 2), strict=True)
        assert all(stride == wanted for size, stride, wanted in known if size > 1)
    for mine, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, reference)


@pytest.mark.usefixtures("eager_pieces", "stock_is_eager")
def test_rows_on_the_host_have_all_heads_of_a_token_together() -> None:
    """A device copies whole runs of bytes; eager mode's layout has as many as heads."""
    model = small_model("Llama")
    model.compile(backend="mom", options=ON_HOST)
    for value in keys(model, LONG):
        assert isinstance(value, HostTensor)
        assert value.host.permute(2, 0, 1, 3).is_contiguous()


@pytest.mark.usefixtures("eager_pieces", "stock_is_eager")
def test_sizes_stay_numbers_where_the_user_wants_them_to() -> None:
    model = small_model("Llama", torch.float64)
    model.compile(backend="mom", dynamic=False, options=KEPT)
    for value in keys(model, LONG):
        assert not any("dynamic_indices" in name for name in vars(value))


def test_a_cat_with_one_operand_that_has_elements_is_eagers() -> None:
    """In values and in layout, as channels-last images have theirs, and with other dtypes."""
    empty = torch.empty(0)
    image = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    nothing, half = torch.empty(2, 0, 4, 5), torch.empty(2, 0, 4, 5, dtype=torch.float16)
    alike = nothing.contiguous(memory_format=torch.channels_last)
    turned = image.permute(0, 2, 1, 3)
    for operands in ([image, empty], [nothing, image], [alike, image], [turned, empty], [half, image]):
        fn = torch.compile(lambda *x: torch.cat(x, 1), backend="mom", options={"strict": True})
        expected, found = torch.cat(operands, 1), fn(*operands)
        assert torch.equal(found, expected)
        assert (found.dtype, found.stride()) == (expected.dtype, expected.stride())
        torch._dynamo.reset()
