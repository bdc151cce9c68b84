"""How the package is called: options both ways, configs by name, short texts of what is returned, names and types."""

from __future__ import annotations

import ast
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mom_compile
from mom_compile import TokenScores, explain, load_offloaded, plan
from mom_compile.config import Options, joined_options, meant_as_option, option_names, parse_options
from mom_compile.planning.estimate import Load, estimate
from tests.models import SMALL, TinyDecoder, ids, small_model

ROOT = Path(__file__).resolve().parent.parent
FIELDS = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
          "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(FIELDS))
    return tmp_path


# --- options ---


def test_options_are_joined_and_none_is_given_twice() -> None:
    assert joined_options({"scope": "mlp"}, {"strict": True}) == {"scope": "mlp", "strict": True}
    assert joined_options(None, {}) == {}
    with pytest.raises(TypeError, match=r"'scope' given twice: in options=\{\.\.\.\} and by name"):
        joined_options({"scope": "mlp"}, {"scope": "mlp"})


def test_an_explanation_takes_options_both_ways() -> None:
    model = TinyDecoder(layers=2).eval()
    found = [
        explain(model, ids(1, 37), options={"mini_seq_len": 8, "kv_offload": True}),
        explain(model, ids(1, 37), mini_seq_len=8, kv_offload=True),
        explain(model, ids(1, 37), options={"mini_seq_len": 8}, kv_offload=True),
    ]
    assert len({str(one) for one in found}) == 1
    assert str(found[0]) != str(explain(model, ids(1, 37), mini_seq_len=16, kv_offload=True))


def test_an_option_does_not_go_to_a_model_that_takes_anything() -> None:
    """Models of transformers have `**kwargs`, where it would vanish."""
    model = small_model("Llama", num_hidden_layers=1)
    report = explain(model, ids(1, 40), kv_offload=True, mini_seq_len=16)[0]
    assert report.on_host and "in mini-sequences of 16" in report.details()
    for given, message in (
        ({"kv_offload": "maybe"}, "kv_offload='maybe' is not valid"),
        ({"kv_ofload": True}, "did you mean 'kv_offload'"),
        ({"max_autotune": True}, "it is an Inductor option"),
        ({"options": {"kv_offload": True}, "kv_offload": True}, "given twice"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            explain(model, ids(1, 40), **given)


def test_a_name_that_is_both_an_option_and_an_argument() -> None:
    class Scoped(TinyDecoder):
        def forward(self, ids: torch.Tensor, scope: int = 0) -> Any:  # type: ignore[override]
            return super().forward(ids) + scope

    model = Scoped(layers=1).eval()
    with pytest.raises(TypeError, match=r"scope is an option of the backend and an argument of Scoped"):
        explain(model, ids(1, 37), scope="mlp")
    found = explain(model, ids(1, 37), options={"scope": "none"}, scope=1)
    assert "scope='none' asks for stock Inductor" in str(found)


def test_no_option_is_as_alike_a_usual_argument_as_a_misspelt_one() -> None:
    """An explanation refuses what is nearly an option, so no name that models have may be."""
    usual = ("seq_len", "max_seq_len", "logits_to_keep", "position_ids", "past_key_values", "labels", "use_cache")
    assert not any(map(meant_as_option, usual))
    assert all(map(meant_as_option, ("kv_ofload", "mini_seqlen", "memorybudget", "KV_offload")))


def test_a_plan_and_scores_take_options_both_ways(folder: Path) -> None:
    assert plan(folder, seq_len=64, device="cpu", options={"kv_offload": True}, strict=True).way == "mom-cache"
    with pytest.raises(TypeError, match="'memory_budget' given twice"):
        plan(folder, seq_len=64, options={"memory_budget": 1}, memory_budget=1)
    with pytest.raises(ValueError, match="did you mean 'scope'"):
        plan(folder, seq_len=64, options={"scop": "mlp"})
    model, text = small_model("Llama", num_hidden_layers=1), ids(1, 40, 0, SMALL.vocabulary)
    with pytest.raises(TypeError, match="'scope' given twice"):
        mom_compile.token_log_probs(model, text, options={"scope": "mlp"}, scope="mlp")
    with pytest.raises(ValueError, match="did you mean 'scope'"):
        mom_compile.token_log_probs(model, text, scop="mlp")


# --- a config in place of a model ---


def test_a_config_is_explained_as_on_the_command_line(folder: Path) -> None:
    found = explain(str(folder), seq_len="600", mini_seq_len=64)
    assert str(found).splitlines()[0] == f"{folder.name} (llama), a prefill of 1 x 600 tokens"
    assert found[0].tokens == 600 and "in mini-sequences of 64" in found.details()
    transformers = importlib.import_module("transformers")
    config = transformers.AutoConfig.from_pretrained(folder)
    assert str(explain(config, seq_len=600, mini_seq_len=64)[0]) == str(found[0])


@pytest.mark.parametrize(
    ("arguments", "named", "message"),
    [
        (("Llama-3-8b",), {"seq_len": "many"}, "seq_len='many' is not valid"),
        (("Llama-3-8B",), {"batch_size": 0}, "batch_size=0 is not valid"),
        (("Llama-3-8B",), {"dtype": "int8"}, "dtype='int8' is not valid"),
        (("Llama-3-8B",), {"kv_ofload": True}, "did you mean 'kv_offload'"),
        (("Llama-3-8B",), {"logits_to_keep": 1}, "unknown option 'logits_to_keep'"),
        (("Llama-4-8B",), {}, "or a shipped shape"),
        (("Llama-3-8B", torch.ones(2)), {}, "takes no arguments of a call"),
        ((3,), {}, "cannot plan a value of type int"),
    ],
)
def test_what_cannot_be_explained_of_a_config(arguments: Any, named: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        explain(*arguments, **named)


# --- short texts ---


def one_line(value: Any) -> str:
    text = repr(value)
    assert "\n" not in text and len(text) < 260 and text.startswith(f"<{type(value).__name__}"), text
    return text


def test_what_is_returned_is_shown_in_one_line_with_units(folder: Path) -> None:
    found = explain(TinyDecoder(layers=2).eval(), ids(1, 37), mini_seq_len=8)
    assert "loops, expected peak" in one_line(found[0]) and "KiB" in repr(found[0])
    assert one_line(found).startswith("<Explanation of 1 graph: ") and "KiB" in repr(found)
    made = plan(folder, seq_len=64, device="cpu", memory_budget="1GiB")
    assert one_line(made).startswith(f"<Plan: {folder.name}, ") and "KiB of weights" in repr(made)
    assert "1 x 64 tokens on cpu" in repr(made) and "within 1.0 GiB" in repr(made)
    time = one_line(estimate(Load(10**15, 10**10, 10, 32, 10**9, 0), "h100"))
    assert "s on H100, bound by arithmetic" in time
    assert re.search(r" ([KMG]i)?B of keys and values in ", one_line(mom_compile.host_memory()))
    held = mom_compile.host_memory()
    shown_as = {"loops": found, "expected peak": found[0], "stock Inductor": made, "keys and values": held}
    for words, shown in shown_as.items():
        html = shown._repr_html_()
        assert html.startswith("<pre") and html.rstrip().endswith("</pre>") and words in html
    with pytest.raises(ValueError, match="is not a known device; known devices are A100"):
        made.estimate("cpu")


def test_scores_are_shown_by_their_means() -> None:
    log_probs = torch.tensor([[-1.0, -3.0, 0.0]])
    scores = TokenScores(log_probs, log_probs == -1.0, -log_probs)
    assert one_line(scores) == (
        "<TokenScores: 1 sequence x 3 tokens, 2 of them scored; means: log-probability -2, entropy 2 nats, greedy 50%>"
    )
    assert "&lt;TokenScores" in scores._repr_html_()
    nothing = TokenScores(torch.zeros(1, 3), torch.zeros(1, 3, dtype=torch.bool))
    assert one_line(nothing) == "<TokenScores: 1 sequence x 3 tokens, 0 of them scored>"


def test_offloaded_weights_are_shown_in_units() -> None:
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
    made = mom_compile.offload_weights(model, "cpu", memory_budget="1GiB")
    assert one_line(made).startswith("<OffloadedWeights: 65 KiB of weights on cpu")


# --- names and types ---


def test_public_names_are_those_that_are_listed() -> None:
    tree = ast.parse((ROOT / "mom_compile" / "__init__.py").read_text())
    nodes = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    imported = {alias.asname or alias.name for node in nodes for alias in node.names}
    assert sorted(imported) == sorted(mom_compile.__all__)
    for name in ("mom_compile.rules", "mom_compile.planning", "mom_compile.weights", "mom_compile.report"):
        module = importlib.import_module(name)
        assert all(hasattr(module, listed) for listed in module.__all__)


def test_chunk_rules_have_one_home() -> None:
    from mom_compile import rules

    assert rules.__all__ and not any(hasattr(mom_compile, name) for name in rules.__all__)


def test_options_that_are_named_are_those_that_are_parsed() -> None:
    assert set(option_names()) == set(vars(Options())) and parse_options({}) == Options()


# --- a checkpoint that is not here ---


@pytest.mark.parametrize(("name", "hub"), [("meta-llama/Llama-3.1-8B", True), ("gpt2", True), ("not/a/model", False)])
def test_a_name_on_the_hub_is_not_downloaded_and_it_says_how(name: str, hub: bool) -> None:
    with pytest.raises(ValueError, match="is not a folder; expected a folder with safetensors files") as raised:
        load_offloaded(name, "cpu", memory_budget="1GiB")
    text = str(raised.value)
    assert hub == (f"`hf download {name} --local-dir FOLDER`" in text) == ("HF_HUB_OFFLINE" in text)


def test_the_package_is_built_with_what_types_need(tmp_path: Path) -> None:
    """By setuptools itself, as `pip install` builds it."""
    arguments = ["-q", "egg_info", "--egg-base", str(tmp_path), "build_py", "--build-lib", str(tmp_path)]
    program = f"import setuptools; setuptools.setup(script_args={arguments!r})"
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], cwd=ROOT, check=True, timeout=120)
    for package in ("mom_compile", "mom_passes"):
        assert (tmp_path / package / "py.typed").is_file() and (tmp_path / package / "__init__.py").is_file()
    assert list((tmp_path / "mom_compile" / "planning" / "shapes").glob("*.json"))


def test_a_class_is_not_explained() -> None:
    with pytest.raises(TypeError, match="explain\\(\\) takes a model or a config, not the class Linear"):
        explain(torch.nn.Linear, torch.ones(2))
