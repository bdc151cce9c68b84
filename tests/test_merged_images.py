"""Tiny models of images and text: their towers and decoders run in loops, and are right."""

from __future__ import annotations

import pytest
import torch
import transformers

import mom_compile

IMAGE, PATCHES, TOKENS = 500, 64, 217


def llava() -> torch.nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlavaConfig(
        text_config={"model_type": "llama", **sizes, "num_key_value_heads": 2, "vocab_size": 512},
        vision_config={"model_type": "clip_vision_model", **sizes, "image_size": 112, "patch_size": 14},
        image_token_id=IMAGE,
        image_token_index=IMAGE,
    )
    torch.manual_seed(0)
    return transformers.LlavaForConditionalGeneration(config).eval()


def inputs(*counts: int) -> dict[str, torch.Tensor]:
    """Sequences with so many image tokens and an image each; the first is padded at the left."""
    torch.manual_seed(sum(counts))
    ids = torch.randint(3, 400, (len(counts), TOKENS))
    for row, count in zip(ids, counts, strict=True):
        row[40 : 40 + count] = IMAGE
    mask = torch.ones_like(ids)
    mask[0, :17] = 0
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(len(counts), 3, 112, 112)}


@pytest.mark.slow
def test_images_are_merged_into_text_in_loops() -> None:
    model = llava()
    fast = torch.compile(model, backend="mom", options={"mini_seq_len": 48})
    with torch.no_grad():
        # The second call has all image tokens in one sequence: the source continues across sequences.
        for counts in ((PATCHES, PATCHES), (0, 2 * PATCHES)):
            given = inputs(*counts)
            expected, actual = (call(**given, logits_to_keep=2).logits for call in (model, fast))
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
        with pytest.raises((ValueError, RuntimeError)):
            fast(**inputs(PATCHES, PATCHES - 3), logits_to_keep=2)
    kinds = {report.kind: report for report in mom_compile.reports() if report.stages}
    assert set(kinds) == {"encoder", "prefill"}
    assert not kinds["prefill"].left_out and not any(report.eager_pieces for report in mom_compile.reports())
    tower = kinds["encoder"]
    assert sum(tower.work_outside.values()) <= 0.05 * tower.work
