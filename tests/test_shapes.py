"""Shipped shapes are the models that they are named after."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import mom_compile
from mom_compile.planning.configs import find_config
from mom_compile.planning.shapes import find_shape, nearest_shape, shapes

ROOT = Path(__file__).resolve().parent.parent
#: Published with all digits, and their config.json was read.
EXACT = ("Llama-3-8B", "Llama-3-70B", "Qwen2.5-7B", "Qwen3-30B-A3B", "Mistral-Nemo-12B", "Gemma-3-270M", "Gemma-3-27B",
         "Mixtral-8x7B", "GPT-OSS-20B")  # fmt: skip
#: Published as rounded numbers; their values were read elsewhere than in their config.json.
ROUNDED = ("Qwen3.5-27B", "Qwen3.5-35B-A3B", "Gemma-4-31B", "Gemma-4-26B-A4B", "Nemotron-H-8B", "Granite-4.0-H-Small",
           "GPT-OSS-120B", "DeepSeek-V3.2", "Kimi-Linear-48B-A3B", "GLM-5", "LFM2-1.2B", "Falcon-H1-7B")  # fmt: skip
NAMES = (*EXACT, *ROUNDED)
#: Bytes that a token adds to the cache in bfloat16: of attentions to all tokens, by hand.
CACHE = {
    "Qwen3.5-27B": 16 * 2 * 4 * 256 * 2,
    "Qwen3.5-35B-A3B": 10 * 2 * 2 * 256 * 2,
    "Gemma-4-31B": 10 * 2 * 4 * 512 * 2,
    "Gemma-4-26B-A4B": 5 * 2 * 2 * 512 * 2,
    "Nemotron-H-8B": 4 * 2 * 8 * 128 * 2,
    "Granite-4.0-H-Small": 4 * 2 * 8 * 128 * 2,
    "GPT-OSS-120B": 18 * 2 * 8 * 64 * 2,
    "LFM2-1.2B": 6 * 2 * 8 * 64 * 2,
    "Falcon-H1-7B": 44 * 2 * 2 * 128 * 2,
}


def test_all_are_there_each_with_its_source():
    assert set(shapes()) == set(NAMES)
    for shape in shapes().values():
        assert bool(shape.read_from) == (shape.name in ROUNDED)
        assert re.fullmatch(r"https://huggingface\.co/[\w.-]+/[\w.-]+/raw/main/config\.json", shape.source)
        repository = shape.source.split("/raw/")[0].removeprefix("https://huggingface.co/")
        assert repository in shape.what


@pytest.mark.parametrize("name", NAMES)
def test_a_shape_has_as_many_parameters_as_its_publisher_says(name):
    """Built by transformers without weights, without its network, and without a warning: those are errors here."""
    found = find_config(name)
    assert found.name == name and found.config.dtype is torch.bfloat16
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(found.config)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert abs(count / shapes()[name].parameters - 1) < (0.01 if name in EXACT else 0.03)


@pytest.mark.slow
@pytest.mark.parametrize("name", CACHE)
def test_a_token_of_a_hybrid_adds_the_keys_and_values_of_its_attentions_to_all_tokens(name):
    assert mom_compile.plan(name, seq_len=8192).kv_bytes_per_token == CACHE[name]


@pytest.mark.parametrize(
    ("name", "kinds"),
    [("Gemma-3-270M", {"sliding_attention": 15, "full_attention": 3}),
     ("Gemma-3-27B", {"sliding_attention": 52, "full_attention": 10}),
     ("GPT-OSS-20B", {"sliding_attention": 12, "full_attention": 12})],
)  # fmt: skip
def test_layers_with_a_window_are_those_that_have_one(name, kinds):
    """Which no number of parameters tells."""
    found = find_config(name).config
    assert {kind: found.layer_types.count(kind) for kind in set(found.layer_types)} == kinds
    assert found.sliding_window in (128, 512, 1024)


@pytest.mark.parametrize("name", ["llama-3-8b", "Llama3_8B", "meta-llama/Llama-3-8B", "LLAMA 3 8B"])
def test_a_name_is_found_however_it_is_written(name):
    assert find_shape(name).name == "Llama-3-8B"


@pytest.mark.parametrize(
    ("name", "meant"),
    [("llama-8b", "Llama-3-8B"), ("Qwen/Qwen3-30B", "Qwen3-30B-A3B"), ("gptoss", "GPT-OSS-20B"), ("qqqqqq", None)],
)
def test_the_nearest_name_is_known(name, meant):
    assert find_shape(name) is None and nearest_shape(name) == meant


def test_the_quantisation_of_a_checkpoint_is_read_apart_from_its_config():
    found = find_config("GPT-OSS-20B")
    assert found.quantization is not None and found.quantization["quant_method"] == "mxfp4"
    assert getattr(found.config, "quantization_config", None) is None
    assert not found.notes
    assert find_config("Llama-3-8B").quantization is None


def test_the_data_are_part_of_the_package():
    """What is no module goes into a wheel only where pyproject.toml says so."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    packed = {
        path
        for package, patterns in settings.items()
        for pattern in patterns
        for path in (ROOT / package.replace(".", "/")).glob(pattern)
    }
    files = [path for path in (ROOT / "mom_compile").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    data = {path for path in files if path.suffix != ".py"}
    assert len(data) >= len(NAMES) and data <= packed
