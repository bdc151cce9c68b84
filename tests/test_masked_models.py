"""Models with an attention mask: one compiled program is right for every mask, and makes none where it need not."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from transformers import DynamicCache

import mom_compile
from benchmarks.models import keeping
from mom_compile.runtime.attention.rows import observing_blocks
from mom_passes.ops.attention import AttentionCall
from tests.models import prompt, small_model

TOKENS = 70
Calls = list[AttentionCall]

#: What a mask of two sequences looks like, and whether what a query sees is then one range of keys.
MASKS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], bool]] = {
    "all ones": (lambda index: index >= 0, True),
    "left padding": (lambda index: index >= torch.tensor([[21], [0]]), True),
    "left padding of both": (lambda index: index >= torch.tensor([[3], [40]]), True),
    "right padding": (lambda index: index < torch.tensor([[TOKENS], [33]]), True),
    "holes": (lambda index: (index * 7 + torch.tensor([[0], [3]])) % 5 > 0, False),
    "one token": (lambda index: index == TOKENS - 1, True),
}


@pytest.fixture
def masked_calls() -> Iterator[Calls]:
    """Calls of the attention that had to make a mask because of what is said of the keys."""
    calls: Calls = []

    def watch(call: AttentionCall) -> None:
        if call.has_conditions or call.mask is not None:
            calls.append(call)

    with observing_blocks(watch):
        yield calls


def test_padding_in_batches_of_any_size(eager_pieces: None, masked_calls: Calls) -> None:
    """Ids and mask have a batch symbol each: nothing in the graph says that they are one number."""
    model = small_model("Llama", num_hidden_layers=2).double()
    compiled = torch.compile(model, backend="mom", options={"strict": True, "mini_seq_len": 16})
    for batch in (1, 2, 5):
        inputs = prompt(batch, TOKENS)
        inputs["attention_mask"] = (torch.arange(TOKENS) >= 7 * torch.arange(batch)[:, None]).long()
        with torch.no_grad():
            expected, actual = model(**inputs).logits, compiled(**inputs).logits
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)
    assert not masked_calls
    assert len(mom_compile.reports()) == 2
    inputs["attention_mask"] = inputs["attention_mask"][:3]
    with torch.no_grad(), pytest.raises((IndexError, RuntimeError), match=r"out of range|out of bounds"):
        compiled(**inputs)


@pytest.mark.parametrize("family", ["Llama", pytest.param("Mistral", marks=pytest.mark.slow), "Gemma3Text"])
def test_every_mask_by_one_program(family: str, eager_pieces: None, masked_calls: Calls) -> None:
    model = small_model(family).double()
    compiled = torch.compile(model, backend="mom", options={"strict": True, "mini_seq_len": 16})
    inputs = prompt(2, TOKENS)
    for name, (program, in_ranges) in MASKS.items():
        masked_calls.clear()
        inputs["attention_mask"] = program(torch.arange(TOKENS).expand(2, -1)).long()
        with torch.no_grad():
            expected, actual = model(**inputs).logits, compiled(**inputs).logits
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")
        assert bool(masked_calls) == (not in_ranges), name
    (report,) = mom_compile.reports()
    assert report.stages
    assert not report.left_out


@pytest.mark.parametrize("family", ["Llama", pytest.param("Gemma3Text", marks=pytest.mark.slow)])
def test_packed_sequences_are_attended_apart(family: str, eager_pieces: None, masked_calls: Calls) -> None:
    """`position_ids` that begin anew: each sequence comes out as it does alone, and no mask is made."""
    model = small_model(family).double()
    compiled = torch.compile(model, backend="mom", options={"strict": True, "mini_seq_len": 16})
    ids = prompt(1, TOKENS)["input_ids"]
    lengths = (9, 1, 40, 20)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    with torch.no_grad():
        packed = compiled(input_ids=ids, position_ids=positions, use_cache=False).logits
        alone = [model(input_ids=part, use_cache=False).logits for part in ids.split(lengths, dim=1)]
    torch.testing.assert_close(packed, torch.cat(alone, 1), rtol=0, atol=1e-9)
    assert not masked_calls
    (report,) = mom_compile.reports()
    assert report.stages


def test_a_second_turn_with_padding(eager_pieces: None, masked_calls: Calls) -> None:
    """Rows behind a past are causal from where they stand, and the padding of the first turn stays hidden."""
    model = small_model("Llama", num_hidden_layers=2).double()
    compiled = torch.compile(model, backend="mom", options={"strict": True, "mini_seq_len": 16})
    first = prompt(2, TOKENS, padded=True)
    more = prompt(2, 50, seed=1)["input_ids"]
    mask = torch.cat([first["attention_mask"], torch.ones_like(more)], 1)
    results = []
    with torch.no_grad():
        for each in (model, compiled):
            cache = keeping(DynamicCache(config=model.config), model)
            each(**first, **cache)
            results.append(each(input_ids=more, attention_mask=mask, **cache).logits)
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-9)
    assert not masked_calls
    assert [bool(report.stages) for report in mom_compile.reports()] == [True, True]
