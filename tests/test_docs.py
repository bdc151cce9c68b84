"""What the pages in docs show runs as it is printed, and so does every command of a console.

In place of a GPU, a download or hours there is the nearest substitute: of a large shape the weights are counted as they
are, and what is traced is a small model; the CPU stands in for "cuda". A snippet that nothing here can run fails.
"""

from __future__ import annotations

import functools
import importlib
import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import mom_compile
from mom_compile.cli import main
from mom_compile.planning import picture, planner
from mom_compile.planning.prefill import capture_prefill
from mom_compile.planning.subject import subject_of
from mom_compile.quantities import parse_bytes
from mom_passes.rules import registry
from tests.models import ids, tiny
from tests.pages import PAGES, ROOT, Block, blocks, console_lines
from tests.rule_law import Call, check_call

#: The module, which its function hides.
planning = importlib.import_module("mom_compile.planning.plan")
#: Pages with Python, but for those that have a test of their own.
OF_ITS_OWN = {"README.md": "test_readme.py", "CONTRIBUTING.md": "test_contributing.py"}
WITH_PYTHON = [
    page
    for page in PAGES
    if page.name not in OF_ITS_OWN and any(block.language == "python" for block in blocks(page))
]
COMMANDS = [line for page in (*PAGES, ROOT / "CONTRIBUTING.md") for line in console_lines(page)]


def test_every_block_is_of_a_kind_that_is_run_or_read():
    found = [block for page in PAGES for block in blocks(page)]
    assert [str(block) for block in found if block.language not in ("python", "console", "text", "")] == []
    assert {block.language for block in found} >= {"python", "console"} and len(COMMANDS) >= 10
    assert all((ROOT / "tests" / test).is_file() for test in OF_ITS_OWN.values())


# --- substitutes ---


#: The model that is traced in place of a large one.
SMALL = transformers.LlamaConfig(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
    vocab_size=100,
)  # fmt: skip


@pytest.fixture
def small_plans(monkeypatch):
    """A shipped shape has its own weights, and is traced as a small model, once; tables and plots are short."""
    def planned(config: Any, name: str, dtype: Any, model_class: Any = None, scheme: Any = None) -> Any:
        subject, weights = subject_of(config, name, dtype, model_class, scheme)
        if subject.weight_bytes < 1 << 30:
            return subject, weights
        traced, own = subject_of(SMALL, name, torch.bfloat16)
        whole = replace(subject, layers=traced.layers, counts=traced.counts, build=traced.build)
        return whole, replace(weights, shapes=own.shapes)

    monkeypatch.setattr(planning, "subject_of", planned)
    monkeypatch.setattr(planner, "capture_prefill", captured)
    monkeypatch.setattr(importlib.import_module("mom_compile.cli.plan"), "CONTEXTS", 1)
    monkeypatch.setattr(picture, "POINTS", 3)


@functools.cache
def captured_once(batch_size: int, model: tuple[Any, ...]) -> list[Any]:
    return []


def captured(model: torch.nn.Module, batch_size: int, seq_len: int) -> Any:
    """The small model's graph, which holds for all lengths."""
    known = captured_once(batch_size, (type(model), sum(p.numel() for p in model.parameters()), model.dtype))
    if not known:
        known.append(capture_prefill(model, batch_size, seq_len))
    assert known[0].holds_for(seq_len)
    return known[0]


def offloaded(model: torch.nn.Module, device: str, memory_budget: str) -> None:
    """As `offload_weights` does it for a GPU, with a budget that a few layers of a small model do not fit into."""
    assert device == "cuda" and parse_bytes(memory_budget) > 0
    largest = max(sum(p.nbytes for p in layer.parameters()) for layer in model.model.layers)
    offload_weights(model, "cpu", memory_budget=3 * largest)


def loaded(path: str, device: str, memory_budget: str) -> torch.nn.Module:
    """In place of a checkpoint, as `offloaded`."""
    model = tiny("Llama", num_hidden_layers=4)
    offloaded(model, device, memory_budget)
    return tiny("Llama", num_hidden_layers=4)  # the next line of the page moves it


offload_weights = mom_compile.offload_weights


# --- Python ---


def of_options() -> dict[str, Any]:
    """A model of which no more than a few tokens are generated, and a prompt."""
    model, given = tiny("Llama", num_hidden_layers=4), ids(1, 700)
    generate = model.generate

    def few(max_new_tokens: int, **prompt: Any) -> torch.Tensor:
        assert max_new_tokens > 0
        return generate(**prompt, max_new_tokens=4)

    model.generate = few
    return {"model": model, "long_prompt": {"input_ids": given, "attention_mask": torch.ones_like(given)}}


def options_were_shown(names: dict[str, Any]) -> None:
    assert names["output"].shape == (1, 704)
    assert any(report.on_host for report in mom_compile.reports())
    assert names["plan"].max_seq_len("80GiB") > 0
    assert any(isinstance(parameter, mom_compile.HostWeight) for parameter in names["model"].parameters())


def of_capture() -> dict[str, Any]:
    """The operator that the page has a rule for."""
    if not hasattr(torch.ops.mylib, "scale_rows"):
        torch.library.define("mylib::scale_rows", "(Tensor x, Tensor scale) -> Tensor")
        torch.library.impl("mylib::scale_rows", "CompositeExplicitAutograd", lambda x, scale: x * scale)
    return {"torch": torch}


def rule_was_shown(names: dict[str, Any]) -> None:
    call = Call(torch.ops.mylib.scale_rows.default, (torch.randn(7, 5), torch.randn(5)))
    assert check_call(call) >= 1


#: Page -> the names that it takes for granted, and what has to be true in the end.
SHOWN: dict[str, tuple[Callable[[], dict[str, Any]], Callable[[dict[str, Any]], None]]] = {
    "options.md": (of_options, options_were_shown),
    "from_capture_to_code.md": (of_capture, rule_was_shown),
}


@pytest.mark.usefixtures("eager_pieces", "stock_is_eager", "small_plans")
@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.name)
def test_python_runs_as_printed(page, monkeypatch):
    """In order, as a reader would paste it."""
    monkeypatch.setattr(registry, "_FACTS", dict(registry._FACTS))
    monkeypatch.setattr(mom_compile, "load_offloaded", loaded)
    monkeypatch.setattr(mom_compile, "offload_weights", offloaded)
    assert page.name in SHOWN, f"{page.name} has Python, and SHOWN does not say how it is run"
    before, after = SHOWN[page.name]
    names = {"mom_compile": mom_compile, **before()}
    for block in blocks(page):
        if block.language == "python":
            exec(compile("\n" * block.line + block.text, str(page), "exec"), names)
    after(names)


# --- consoles ---


def run_mom_compile(words: list[str], capsys: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words[1:])
    out, err = capsys.readouterr()
    assert ended.value.code in ((0, 1) if words[1] == "doctor" else (0,)), err
    if words[1] == "plan" and "--help" not in words:
        assert re.search(r"^time of mom.*: about ", out, re.MULTILINE), "its own way does not fit"


def run_make(words: list[str], capsys: Any) -> None:
    """The target is there. It is not made: it takes minutes."""
    rules = re.findall(r"^([\w -]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    targets = {target for rule in rules for target in rule.split()}
    assert words[1] in targets and all(re.match(r"ARGS=", word) for word in words[2:])


def run_pip(words: list[str], capsys: Any) -> None:
    assert words[1] == "install"


RUNNERS: dict[str, Callable[[list[str], Any], None]] = {
    "mom-compile": run_mom_compile, "make": run_make, "pip": run_pip,
}  # fmt: skip
#: What stands for a name of the reader's own. CONFIG is a folder with a small model's.
PLACEHOLDERS = {"SHAPE": "Llama-3-8B"}


@pytest.mark.usefixtures("small_plans")
@pytest.mark.parametrize("line", COMMANDS, ids=str)
def test_a_command_runs_as_printed(line: Block, monkeypatch, tmp_path: Path, capsys):
    monkeypatch.chdir(tmp_path)
    SMALL.save_pretrained(tmp_path / "CONFIG")
    words = [PLACEHOLDERS.get(word, word) for word in shlex.split(line.text)]
    assert words[0] in RUNNERS, f"{line}: nothing here can run {words[0]!r}"
    RUNNERS[words[0]](words, capsys)
    if "--plot" in words:
        assert (tmp_path / words[words.index("--plot") + 1]).stat().st_size > 10_000

