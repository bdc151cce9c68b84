"""The small configurations of `benchmarks.architectures`, and that its page is what its results give."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch.torch_version import TorchVersion
from transformers import CONFIG_MAPPING

import mom_compile
from benchmarks import architectures, architectures_page, small_configs, text_decoders
from benchmarks.architectures_calls import PADDING, Caller, Subject, build, is_recurrent
from benchmarks.architectures_compiled import OPTIONS, SCALE, TOKENS, compiled_differences
from benchmarks.architectures_worker import BOUND_FLOAT32, Found
from benchmarks.models import keeping
from benchmarks.small_configs import REALISTIC, SMALL, Scale, exceptions, small_config
from benchmarks.text_decoders import TextDecoder
from tests.models import ids, small_model

#: Dense with grouped heads, experts, latent attention with groups of them, windows, old names of fields, a part for
#: text, state spaces alone and with attention, layers that share keys, exceptions.
KINDS = ("llama", "mixtral", "deepseek_v3", "gemma3_text", "gpt2", "dbrx", "llama4_text", "mamba", "jamba",
         "qwen3_next", "gemma3n_text", "bamba")  # fmt: skip


#: Older ones lack some of the types that exceptions are for.
KNOWS_ALL = TorchVersion(transformers.__version__) >= (5, 23)


@pytest.mark.parametrize("name", KINDS)
def test_a_small_one_of_every_kind_runs(name: str) -> None:
    config = small_config(name)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    assert sum(parameter.numel() for parameter in model.parameters()) < 2_000_000
    with torch.no_grad():
        out = model(input_ids=torch.randint(3, SMALL.words, (1, 21)), use_cache=True)
    assert out.logits.shape == (1, 21, SMALL.vocabulary)
    assert out.logits.isfinite().all()


def test_every_kind_of_layer_is_there_once() -> None:
    default, small = CONFIG_MAPPING["qwen3_next"](), small_config("qwen3_next")
    assert list(dict.fromkeys(default.layer_types)) == small.layer_types == ["linear_attention", "full_attention"]
    assert len(small_config("gpt_oss").layer_types) == small_config("gpt_oss").num_hidden_layers == 2
    assert small_config("llama").num_hidden_layers == 2
    one = replace(SMALL, layers=1)
    assert small_config("mixtral", one).num_hidden_layers == 1
    assert {small_config(name, one).num_hidden_layers for name in ("bamba", "lfm2", "qwen3_5_text")} == {2}
    assert small_config("lfm2").layer_types == ["conv", "full_attention"]


def test_sizes_keep_their_proportions() -> None:
    config = small_config("llama", REALISTIC)
    assert config.intermediate_size == 3.5 * config.hidden_size
    assert config.head_dim * config.num_attention_heads == config.hidden_size
    grouped, alone = small_config("mixtral"), small_config("falcon")
    assert 1 < grouped.num_key_value_heads < grouped.num_attention_heads
    assert (alone.num_kv_heads, alone.num_attention_heads) == (SMALL.heads, SMALL.heads)
    assert small_config("mixtral").sliding_window in (None, SMALL.window)
    assert (grouped.num_local_experts, grouped.num_experts_per_tok) == (SMALL.experts, SMALL.chosen)


def test_ids_of_what_is_no_word_are_in_no_prompt() -> None:
    config = small_config("gemma3")
    named = [config.image_token_index, config.boi_token_index, config.eoi_token_index]
    assert len(set(named)) == 3
    assert all(SMALL.words <= number < SMALL.vocabulary for number in named)


def test_exceptions_are_of_types_that_there_are_and_say_why() -> None:
    for name in small_configs.exceptional_types():
        own = exceptions(name)
        assert name in CONFIG_MAPPING or not KNOWS_ALL
        assert own["why"]
        assert set(own) <= {"why", "set", "start", "dtype", "skip", "beside"}


def test_text_decoders_are_those_that_are_no_causal_language_model() -> None:
    """Each is built of the composite whose own text part it is, not of one that takes any."""
    found = text_decoders.composites()
    assert not found.unread or not KNOWS_ALL
    assert not {*found.decoders} & {*architectures.model_types()}
    assert {*found.known} <= {*architectures.model_types()}
    assert "llava" in found.known["llama"]
    assert found.decoders["qwen3_vl_text"] == ["qwen3_vl", "cosmos3_omni"]
    assert found.decoders["glm4v_text"][0] == "glm4v"


#: Positions along three axes; attention to an encoder's states and the decoder's own at once.
DECODERS = {"qwen2_vl_text": "qwen2_vl", "t5gemma2_decoder": "t5gemma2"}


def test_a_text_decoder_is_what_its_composite_runs_on_embeddings() -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(small_config("qwen2_vl")).eval()
    decoder = TextDecoder(model.get_decoder(), model.get_output_embeddings(), {})
    embeds = decoder.embed(torch.randint(3, SMALL.words, (2, 21)))
    with torch.no_grad():
        torch.testing.assert_close(decoder(embeds).logits, model(inputs_embeds=embeds).logits)
        assert decoder(embeds, logits_to_keep=1).logits.shape == (2, 1, SMALL.vocabulary)


@pytest.mark.usefixtures("eager_pieces", "stock_is_eager")
@pytest.mark.parametrize("name", DECODERS)
def test_a_text_decoder_is_exact_from_embeddings(name: str) -> None:
    """A batch padded on the left and a token after it; every product of tokens is in a loop."""
    model = build(Subject(name, DECODERS[name]), SMALL, torch.float64)
    eager, ours = Caller(model, None), Caller(model, "mom")
    wanted: dict[str, Any] = {}
    got: dict[str, Any] = {}
    expected = [eager.use(use, wanted) for use in ("batch", "decode")]
    ours.compile()
    found = Found()
    for use, logits in zip(("batch", "decode"), expected, strict=True):
        torch.testing.assert_close(ours.use(use, got), logits, rtol=0, atol=1e-10)
    (prefill,) = [report for report in mom_compile.reports()[found.before :] if report.stages]
    beside = 2 * 2 * len(PADDING) * 9 * 64 * 32 if name == "t5gemma2_decoder" else 0  # keys and values, of nine states
    assert sum(prefill.work_outside.values()) == beside


# --- compiled for real ---


def subjects() -> list[Subject]:
    """What can be built and run in eager mode, as the results on the page say."""
    results = json.loads(architectures.RESULTS.read_text())
    found = [Subject(name) for name, entry in results["types"].items() if _runs(entry)]
    return found + [Subject(n, entry["composites"][0]) for n, entry in results["decoders"].items() if _runs(entry)]


def _runs(entry: dict[str, Any]) -> bool:
    return "prefill" in entry.get("uses", {}) and "eager_error" not in entry["uses"]["prefill"]


def check_compiled(subject: Subject, lengths: tuple[int, ...], scale: Scale = SCALE) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", mom_compile.MomWarning)
        apart = compiled_differences(subject, lengths, scale)
    assert set(apart) >= {f"prefill of {tokens}" for tokens in lengths}
    assert {use: by for use, by in apart.items() if not by <= BOUND_FLOAT32} == {}
    assert not any(report.failed or report.eager_pieces for report in mom_compile.reports())


@pytest.mark.slow
@pytest.mark.parametrize("subject", subjects(), ids=lambda subject: subject.name)
def test_every_type_is_right_when_compiled(subject: Subject) -> None:
    """Prefill and decode step at two lengths, without a piece that runs eagerly."""
    if (subject.composite or subject.name) not in CONFIG_MAPPING:
        pytest.skip("this version of transformers has no such type")
    check_compiled(subject, TOKENS)


#: Experts in one layer; the delta rule, Mamba-2 and short convolutions in a layer before one with attention and a dense
#: MLP. What stock Inductor would compile, mostly decode steps, runs node by node here: it would take three quarters of
#: the time.
@pytest.mark.usefixtures("stock_is_eager")
@pytest.mark.parametrize("name", ["mixtral", "qwen3_5_text", "bamba", pytest.param("lfm2", marks=pytest.mark.slow)])
def test_a_type_of_each_kind_is_right_when_compiled(name: str) -> None:
    check_compiled(Subject(name), TOKENS[:1], replace(SCALE, layers=1))
    assert any(report.stages for report in mom_compile.reports())


@pytest.mark.usefixtures("stock_is_eager")
def test_a_model_with_a_picture_is_right_when_compiled() -> None:
    """Its prompt, in which the picture's tokens see each other, and a decode step."""
    config = small_config("gemma3")
    config.mm_tokens_per_image = 4
    config.vision_config.image_size, config.vision_config.num_hidden_layers = 64, 1
    config.text_config.layer_types, config.text_config.num_hidden_layers = config.text_config.layer_types[:1], 1
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config).eval()
    tokens = torch.randint(3, SMALL.words, (1, TOKENS[0]))
    tokens[:, 100:104] = config.image_token_index
    pictured = (tokens == config.image_token_index).long()
    given = {"input_ids": tokens, "pixel_values": torch.randn(1, 3, 64, 64), "token_type_ids": pictured}
    model.compile(backend="mom", options=OPTIONS)
    with torch.no_grad():
        expected, found = (call(**given, use_cache=True) for call in (model.forward, model))
        caches = [keeping(out.past_key_values, model) for out in (expected, found)]
        after = [call(tokens[:, :1], **cache) for call, cache in zip((model.forward, model), caches, strict=True)]
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(after[1].logits, after[0].logits, rtol=1e-4, atol=1e-4)
    assert any(report.stages for report in mom_compile.reports())
    assert not any(report.failed or report.eager_pieces for report in mom_compile.reports())


def test_names_of_the_same_model_are_run_once() -> None:
    assert architectures.find_twin("gpt-sw3") == "gpt2"
    assert architectures.find_twin("llama4") == "llama4_text"
    assert architectures.find_twin("llama") is None


def test_results_are_kept_type_by_type(tmp_path) -> None:
    path = tmp_path / "results.json"
    results = architectures.Results(path)
    results.add("b", {"seconds": 1, "uses": {}})
    results.add("a", {"seconds": 2})
    results.add("b", {"compile_seconds": 3, "peaks": {}})
    results.add("b", {"seconds": 4}, replace=True)
    again = architectures.Results(path)
    assert list(again.types) == ["a", "b"]
    assert again.types["b"] == {"compile_seconds": 3, "peaks": {}, "seconds": 4}
    results.add("c_text", {"seconds": 5}, composites=["c", "d"])
    again = architectures.Results(path)
    assert list(again.types) == ["a", "b"]
    assert again.decoders == {"c_text": {"seconds": 5, "composites": ["c", "d"]}}


def test_the_page_is_what_the_results_give() -> None:
    results, compiled = (json.loads(path.read_text()) for path in (architectures.RESULTS, architectures.COMPILED))
    assert architectures_page.PAGE.read_text() == architectures_page.page(results, compiled)


def test_what_is_wrong_is_seen_on_the_page() -> None:
    right = {"difference": 1e-9, "graphs": 1, "breaks": 0, "work": 10, "work_outside": 0, "outside": {}, "left_out": {}}
    uses = dict.fromkeys(architectures_page.USES, right)
    stamp = {"torch": "t", "transformers": "f", "python": "p", "cpu": "c", "cores": 2, "threads": 1, "date": "d"}
    entry = {"parameters": 1, "bound": 1e-6}

    def page(**changed) -> str:
        types = {"sound": {**entry, "uses": uses}, "other": {**entry, "uses": {**uses, **changed}}}
        return architectures_page.page({"stamp": stamp, "types": types})

    assert "**2 are correct in all four uses**" in page()
    assert "2 of the 2 whose layers keep only keys and values (100%)" in page()
    wrong = page(decode={**right, "difference": 1e-3})
    assert "**1 are correct in all four uses**" in wrong
    assert "**1e-03**" in wrong
    assert "**fails**" in page(decode={"error": "IndexError: of ours"})
    assert "decode: of stock" in page(decode={"error": "x", "stock_error": "of stock"})
    outside = page(batch={**right, "work_outside": 5})
    assert "1 of the 2 whose layers keep only keys and values (50%)" in outside
    assert "aten.mm 50.0%: too tall" in page(batch={**right, "outside": {"aten.mm.default": [5, "too tall"]}})


def test_text_decoders_have_a_table_of_their_own() -> None:
    right = {"difference": 1e-9, "graphs": 1, "breaks": 0, "work": 10, "work_outside": 0, "outside": {}, "left_out": {}}
    stamp = {"torch": "t", "transformers": "f", "python": "p", "cpu": "c", "cores": 2, "threads": 1, "date": "d"}
    entry = {"parameters": 1, "bound": 1e-6, "uses": dict.fromkeys(architectures_page.USES, right)}
    odd = {"not_built": "so", "composites": ["o"]}
    decoders = {"seen_text": {**entry, "composites": ["seen", "heard"]}, "odd": odd}
    results = {"stamp": {**stamp, "decoders": 3}, "types": {"plain": entry}, "decoders": decoders}
    text = architectures_page.page({**results, "known": {"plain": ["wide", "deep"]}})
    first, second = text.split("## Text decoders of multimodal models")
    assert "| plain |" in first and "seen_text" not in first
    assert "| seen_text (seen, heard) |" in second and "| odd | so |" in second
    assert "2 of 3 types have been measured so far. Of 2 types 1 can be built" in second
    assert "The text parts of 2 other composites are types of the first table: plain (deep, wide)." in second


def test_types_compiled_for_real_have_a_table_of_their_own() -> None:
    stamp = {"torch": "t", "transformers": "f", "python": "p", "cpu": "c", "cores": 2, "threads": 1, "date": "d"}
    kept = {"stages": 3, "eager_pieces": 0, "cpu_seconds": 26.4}
    cells = {
        "sound 203": {"prefill": 2e-7, "step": 0.0, **kept},
        "wrong 2011": {"prefill": 3e-2, **kept},
        "broken 203": {"error": "NotCompiled: a piece", "cpu_seconds": 9.6},
    }
    text = architectures_page.page({"stamp": stamp, "types": {}}, {"machine": {**stamp, "date": "e"}, "cells": cells})
    _, section = text.split("## Compiled types")
    assert "2 cores, 1 threads; e." in section
    rows = [line for line in section.splitlines() if line.startswith("| ")]
    assert rows[1:] == [
        "| broken | 203 | **fails**: NotCompiled: a piece | – | – | 10 |",
        "| sound | 203 | 2e-07 | 0 | 0 | 26 |",
        "| wrong | 2011 | **3e-02** | – | 0 | 26 |",
    ]


def test_peaks_are_counted() -> None:
    peaks = {"inductor": {"peak": 100}, "mom": {"peak": 30}}
    text = architectures_page._peak_counts([{"peaks": peaks}, {"peaks": {**peaks, "mom": {"peak": 110}}}, {}])
    assert "of 2 types: 0.70x at the median, lower for 1" in text


def test_what_keeps_more_than_keys_and_values_is_recurrent() -> None:
    keeps: dict[str, bool] = {}
    for family in ("Llama", "Qwen3Next", "DeepseekV3", "Bamba"):
        with torch.no_grad():
            keeps[family] = is_recurrent(small_model(family)(ids(1, 20), use_cache=True))
    assert keeps == {"Llama": False, "Qwen3Next": True, "DeepseekV3": False, "Bamba": True}
