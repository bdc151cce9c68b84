"""A config is found where it is, or it is said why not; nothing is downloaded and no code of a model's own is run."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import Gemma3Config, LlamaConfig, T5Config

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


def test_a_folder_and_its_config_json_are_one(written):
    folder = written(SMALL)
    for path in (folder, folder / "config.json", str(folder)):
        found = find_config(path)
        assert isinstance(found.config, LlamaConfig) and found.config.hidden_size == 64
        assert (found.name, found.notes, found.config.dtype) == ("small-llama", (), torch.float16)


def test_a_config_may_have_any_name(written):
    folder = written(SMALL)
    (folder / "config.json").rename(folder / "other.json")
    assert find_config(folder / "other.json").config.num_hidden_layers == 2
    with pytest.raises(PlanError, match=r"has no config\.json; of JSON it has other\.json; give the folder that save_"):
        find_config(folder)


def test_a_folder_here_comes_before_a_shape_of_its_name(written, monkeypatch):
    monkeypatch.chdir(written(SMALL, "Llama-3-8B").parent)
    assert find_config("Llama-3-8B").config.hidden_size == 64


def test_what_save_pretrained_writes_is_read(tmp_path):
    LlamaConfig(**{**SMALL, "rope_parameters": {"rope_type": "default", "rope_theta": 7e5}}).save_pretrained(tmp_path)
    assert find_config(tmp_path).config.rope_parameters["rope_theta"] == 7e5


def test_of_several_parts_the_text_part_is_planned(tmp_path):
    Gemma3Config(text_config={"hidden_size": 64, "num_hidden_layers": 2}).save_pretrained(tmp_path)
    found = find_config(tmp_path)
    assert found.config.model_type == "gemma3_text" and found.config.hidden_size == 64
    assert found.notes == ("gemma3 has other parts beside its text model: planned is that alone, gemma3_text",)


@pytest.mark.parametrize("inner", [False, True])
def test_fewer_bits_are_found(written, inner):
    bits = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    text = {**SMALL, **(bits if inner else {})}
    fields = {"model_type": "llava", "text_config": text} if inner else {**SMALL, **bits}
    found = find_config(written(fields))
    assert found.quantization == {"quant_method": "gptq", "bits": 4}
    assert found.config.hidden_size == 64 and getattr(found.config, "quantization_config", None) is None


def test_code_that_comes_with_a_model_is_not_run(written):
    folder = written({**SMALL, "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Model"}})
    (folder / "evil.py").write_text("raise SystemExit('was run')")
    found = find_config(folder)
    assert found.notes == ("the code that comes with it (auto_map) is not run: planned is transformers' own llama",)
    assert not hasattr(found.config, "auto_map")


def test_a_model_that_is_nothing_but_its_own_code_is_refused(written):
    folder = written({"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}})
    (folder / "evil.py").write_text("raise SystemExit('was run')")
    with pytest.raises(PlanError, match=r"no model type 'evil'; its code comes with the model \(auto_map\), and no"):
        find_config(folder)


def test_an_unknown_model_type_is_refused_with_the_nearest(written):
    with pytest.raises(PlanError, match=r"small-llama.config\.json: transformers [\d.]+ has no .*'lama'; .*\bllama\b"):
        find_config(written({**SMALL, "model_type": "lama"}))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"model_type": "llama",\n "hidden_size": }', r"is no JSON: Expecting value in line 2, column 17"),
        ("", "is no JSON: Expecting value in line 1, column 1"),
        ("[1, 2]", "holds a list, and a config is an object of named fields"),
        ("3", "holds a number"),
        ("[" * 100_000, "nested too deeply"),
        ("{}", "is no config of transformers: it has no model_type"),
        ('{"model_type": 3}', "its model_type is 3, which is no name"),
        ('{"model_type": "llama", "hidden_size": "wide"}', r"no valid config of llama: .*hidden_size"),
        ('{"model_type": "llama", "num_attention_heads": 5}', r"no valid config of llama: .*multiple"),
        ('{"model_type": "clip"}', r"no language model \(AutoModelForCausalLM\) of clip"),
        ('{"model_type": "bert"}', "bert is an encoder: it keeps no keys and values"),
        ('{"model_type": "t5"}', "t5 is an encoder with a decoder"),
    ],
)
def test_a_malformed_config_is_refused_with_what_is_wrong(written, text, why):
    with pytest.raises(PlanError, match=why) as raised:
        find_config(written(text))
    assert "\n" not in str(raised.value)


def test_what_is_no_text_is_no_config(written):
    folder = written(SMALL)
    (folder / "config.json").write_bytes(b"\x80PK\x03\x04")
    with pytest.raises(PlanError, match=r"no text in UTF-8, so no config: invalid start byte at byte 0"):
        find_config(folder)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("llama-8b", r"'llama-8b' is no folder, no file and no shipped shape \(did you mean 'Llama-3-8B'\?\); shipped"),
        ("x" * 5000, "no folder, no file and no shipped shape"),
        ("no/such/folder", r"'no/such/folder' is no folder, no file and no shipped shape; .*Mixtral-8x7B"),
        ("openai/gpt-oss-120b", r"nothing is downloaded; `hf download openai/gpt-oss-120b config\.json --local"),
    ],
)
def test_a_name_that_stands_for_nothing_is_refused(name, why):
    with pytest.raises(PlanError, match=why):
        find_config(name)


def test_a_refusal_is_a_value_error():
    assert issubclass(PlanError, ValueError)
    assert T5Config().is_encoder_decoder  # what one of the cases above rests on
