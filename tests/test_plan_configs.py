"""Configs are found, or an error says why not. Nothing is downloaded and no code shipped with a model is run."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import Gemma3Config, LlamaConfig, Qwen2_5_VLConfig, T5Config

import mom_compile
from mom_compile.planning.configs import PlanError, find_config

SMALL = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300, "torch_dtype": "float16"}  # fmt: skip


@pytest.fixture
def written(tmp_path):
    def write(fields, folder="small-llama"):
        (tmp_path / folder).mkdir(exist_ok=True)
        text = fields if isinstance(fields, str) else json.dumps(fields)
        (tmp_path / folder / "config.json").write_text(text)
        return tmp_path / folder

    return write


def test_a_folder_and_its_config_json_give_the_same_config(written):
    folder = written(SMALL)
    for path in (folder, folder / "config.json", str(folder)):
        found = find_config(path)
        assert isinstance(found.config, LlamaConfig) and found.config.hidden_size == 64
        assert (found.name, found.notes, found.config.dtype) == ("small-llama", (), torch.float16)


def test_a_config_may_have_any_name(written):
    folder = written(SMALL)
    (folder / "config.json").rename(folder / "other.json")
    assert find_config(folder / "other.json").config.num_hidden_layers == 2
    with pytest.raises(PlanError, match=r"has no config\.json; its JSON files are other\.json; give the folder of a "):
        find_config(folder)


def test_an_existing_folder_precedes_a_shape_of_that_name(written, monkeypatch):
    monkeypatch.chdir(written(SMALL, "Llama-3-8B").parent)
    assert find_config("Llama-3-8B").config.hidden_size == 64


def test_configs_of_save_pretrained_are_read(tmp_path):
    LlamaConfig(**{**SMALL, "rope_parameters": {"rope_type": "default", "rope_theta": 7e5}}).save_pretrained(tmp_path)
    assert find_config(tmp_path).config.rope_parameters["rope_theta"] == 7e5


def test_a_text_part_without_a_causal_language_model_is_planned():
    """Transformers has no causal language model of this type: a head is added to the decoder of the multimodal one."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": 300, "rope_parameters": rope}  # fmt: skip
    config = Qwen2_5_VLConfig(text_config=text)
    found = mom_compile.plan(config, seq_len=512, device="cpu")
    assert found.notes[0] == "the plan is for its text model only, qwen2_5_vl_text"
    explained = mom_compile.explain(config, seq_len=512, mini_seq_len=64)
    assert explained.reports[0].stages and not explained.reports[0].failed


def test_the_text_part_of_a_multimodal_model_is_planned(tmp_path):
    Gemma3Config(text_config={"hidden_size": 64, "num_hidden_layers": 2}).save_pretrained(tmp_path)
    found = find_config(tmp_path)
    assert found.config.model_type == "gemma3_text" and found.config.hidden_size == 64
    assert found.notes == ("gemma3 has parts other than its text model; the plan is for gemma3_text only",)


@pytest.mark.parametrize("inner", [False, True])
def test_the_quantisation_of_a_config_is_found(written, inner):
    bits = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    text = {**SMALL, **(bits if inner else {})}
    fields = {"model_type": "llava", "text_config": text} if inner else {**SMALL, **bits}
    found = find_config(written(fields))
    assert found.quantization == {"quant_method": "gptq", "bits": 4}
    assert found.config.hidden_size == 64 and getattr(found.config, "quantization_config", None) is None


def test_code_shipped_with_a_model_is_not_run(written):
    folder = written({**SMALL, "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Model"}})
    (folder / "evil.py").write_text("raise SystemExit('was run')")
    found = find_config(folder)
    assert found.notes == ("the model's own code (auto_map) is not run: the plan uses transformers' llama",)
    assert not hasattr(found.config, "auto_map")


def test_a_model_type_known_only_to_shipped_code_raises(written):
    folder = written({"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}})
    (folder / "evil.py").write_text("raise SystemExit('was run')")
    with pytest.raises(PlanError, match=r"no model type 'evil'; the model ships its code \(auto_map\), which is not"):
        find_config(folder)


def test_an_unknown_model_type_raises_with_the_closest(written):
    with pytest.raises(PlanError, match=r"small-llama.config\.json: transformers [\d.]+ has no .*'lama'; .*\bllama\b"):
        find_config(written({**SMALL, "model_type": "lama"}))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"model_type": "llama",\n "hidden_size": }', r"is not JSON: Expecting value in line 2, column 17"),
        ("", "is not JSON: Expecting value in line 1, column 1"),
        ("[1, 2]", "expected an object with named fields, got a list"),
        ("3", "got a number"),
        ("[" * 100_000, "nested too deeply"),
        ("{}", "is not a transformers config: it has no model_type"),
        ('{"model_type": 3}', "its model_type is 3, which is not a name"),
        ('{"model_type": "llama", "hidden_size": "wide"}', r"not a valid llama config: .*hidden_size"),
        ('{"model_type": "llama", "num_attention_heads": 5}', r"not a valid llama config: .*multiple"),
        ('{"model_type": "clip"}', r"no AutoModelForCausalLM for clip"),
        ('{"model_type": "bert"}', "bert is an encoder without a KV cache"),
        ('{"model_type": "t5"}', "t5 is an encoder with a decoder"),
    ],
)
def test_a_malformed_config_raises_with_the_fault(written, text, why):
    with pytest.raises(PlanError, match=why) as raised:
        find_config(written(text))
    assert "\n" not in str(raised.value)


def test_a_config_that_is_not_utf8_raises(written):
    folder = written(SMALL)
    (folder / "config.json").write_bytes(b"\x80PK\x03\x04")
    with pytest.raises(PlanError, match=r"is not a config: it is not UTF-8 .invalid start byte at byte 0"):
        find_config(folder)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("llama-8b", r"'llama-8b' is not a folder, a file or a shipped shape \(did you mean 'Llama-3-8B'\?\); shipped"),
        ("x" * 5000, "not a folder, a file or a shipped shape"),
        ("no/such/folder", r"'no/such/folder' is not a folder, a file or a shipped shape; .*Mixtral-8x7B"),
        ("openai/gpt-oss-7b", r"nothing is downloaded; `hf download openai/gpt-oss-7b config\.json --local"),
    ],
)
def test_an_unknown_name_raises(name, why):
    with pytest.raises(PlanError, match=why):
        find_config(name)


def test_a_plan_error_is_a_value_error():
    assert issubclass(PlanError, ValueError)
    assert T5Config().is_encoder_decoder  # assumed by a case above
