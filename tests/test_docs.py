"""The code and the console commands of the documentation run as printed, and the API reference is complete.

Substitutes replace a GPU, a download or hours of work: for a large shape the real weights are counted and a small model
is traced; the CPU replaces "cuda". A snippet that no runner here supports fails.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import mom_compile
from benchmarks.multimodal_calls import build
from mom_compile.cli import main
from mom_compile.cli.commands import commands
from mom_compile.memory.devices import DEVICES
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
#: Pages whose Python another test runs.
OF_ITS_OWN = {"README.md": "test_readme.py", "CONTRIBUTING.md": "test_contributing.py"}
WITH_PYTHON = [
    page
    for page in PAGES
    if page.name not in OF_ITS_OWN and any(block.language == "python" for block in blocks(page))
]
PRINTED = [line for page in (*PAGES, ROOT / "CONTRIBUTING.md") for line in console_lines(page)]
#: Each command once, however many pages print it.
COMMANDS = list({line.text: line for line in reversed(PRINTED)}.values())[::-1]


def test_every_block_has_a_known_language():
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
    """Plan shipped shapes with their own weights and the trace of a small model; shorten tables and plots."""

    def planned(
        config: Any, name: str, dtype: Any, model_class: Any = None, scheme: Any = None, ranks: Any = None
    ) -> Any:
        subject, weights = subject_of(config, name, dtype, model_class, scheme, ranks)
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
    """Return the small model's graph, which is for all lengths."""
    known = captured_once(batch_size, (type(model), sum(p.numel() for p in model.parameters()), model.dtype))
    if not known:
        known.append(capture_prefill(model, batch_size, seq_len))
    assert known[0].holds_for(seq_len)
    return known[0]


def offloaded(model: torch.nn.Module, device: str, memory_budget: str) -> None:
    """Substitute for `offload_weights`, with a budget that is too small for all layers of a small model."""
    assert device == "cuda" and parse_bytes(memory_budget) > 0
    largest = max(sum(p.nbytes for p in layer.parameters()) for layer in model.model.layers)
    offload_weights(model, "cpu", memory_budget=3 * largest)


def loaded(path: str, device: str, memory_budget: str) -> torch.nn.Module:
    """Substitute for `load_offloaded`, with a small model."""
    model = tiny("Llama", num_hidden_layers=4)
    offloaded(model, device, memory_budget)
    return tiny("Llama", num_hidden_layers=4)  # the next line of the page moves it


offload_weights = mom_compile.offload_weights


# --- Python ---


def with_model(layers: int = 1) -> dict[str, Any]:
    """A model that generates no more than a few tokens, and a prompt."""
    model, given = tiny("Llama", num_hidden_layers=layers, max_position_embeddings=2048), ids(1, 700)
    generate = model.generate

    def few(max_new_tokens: int, **prompt: Any) -> torch.Tensor:
        assert max_new_tokens > 0
        return generate(**prompt, max_new_tokens=4)

    model.generate = few
    prompt = {"input_ids": given, "attention_mask": torch.ones_like(given)}
    return {"model": model, "prompt": prompt, "long_prompt": prompt}


def with_image() -> dict[str, Any]:
    """A model of images and text, and what its processor makes of an image and a text."""
    subject = build("llava", 32)
    subject.model.generate = functools.partial(subject.model.generate, min_new_tokens=16, do_sample=False)
    return {"model": subject.model, "processor_output": subject.inputs}


def tower_had_loops(names: dict[str, Any]) -> None:
    given = names["processor_output"]["input_ids"]
    assert names["output"].shape[1] == given.shape[1] + 16
    assert {"encoder", "prefill"} <= {report.kind for report in mom_compile.reports() if report.stages}


def has_generated(names: dict[str, Any]) -> None:
    assert names["output"].shape[1] == 704
    assert any(report.stages for report in mom_compile.reports())


def cache_was_on_the_host(names: dict[str, Any]) -> None:
    has_generated(names)
    assert any(report.on_host for report in mom_compile.reports())


def weights_are_on_the_host(names: dict[str, Any]) -> None:
    assert any(isinstance(parameter, mom_compile.HostWeight) for parameter in names["model"].parameters())


def has_scored(names: dict[str, Any]) -> None:
    assert names["scores"].log_probs.shape == names["scores"].entropy.shape == (1, 699)
    assert not names["answer"].log_probs[0, :4].any() and names["answer"].log_probs[0, 4:].all()


def has_planned(names: dict[str, Any]) -> None:
    has_generated(names)
    assert names["plan"].max_seq_len("80GiB") > 0
    assert names["report"].expected_peak_bytes > 0


def of_capture() -> dict[str, Any]:
    """The operator of the page's rule."""
    if not hasattr(torch.ops.mylib, "scale_rows"):
        torch.library.define("mylib::scale_rows", "(Tensor x, Tensor scale) -> Tensor")
        torch.library.impl("mylib::scale_rows", "CompositeExplicitAutograd", lambda x, scale: x * scale)
    return {"torch": torch}


def rule_was_shown(names: dict[str, Any]) -> None:
    call = Call(torch.ops.mylib.scale_rows.default, (torch.randn(7, 5), torch.randn(5)))
    assert check_call(call) >= 1


#: Page -> the names that it assumes, and a check afterwards.
SHOWN: dict[str, tuple[Callable[[], dict[str, Any]], Callable[[dict[str, Any]], None]]] = {
    "batches.md": (with_model, has_generated),
    "cache_on_the_host.md": (with_model, cache_was_on_the_host),
    "from_capture_to_code.md": (of_capture, rule_was_shown),
    "getting_started.md": (with_model, has_generated),
    "hybrids.md": (with_model, has_generated),
    "images_and_video.md": (with_image, tower_had_loops),
    "larger_models.md": (functools.partial(with_model, layers=4), weights_are_on_the_host),
    "long_prompts.md": (with_model, has_planned),
    "options.md": (with_model, lambda names: None),
    "scoring.md": (with_model, has_scored),
}


@pytest.mark.usefixtures("eager_pieces", "stock_is_eager", "small_plans")
@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.name)
def test_python_runs_as_printed(page, monkeypatch):
    """In order, as a reader would paste it."""
    torch._dynamo.reset()
    monkeypatch.setattr(registry, "_FACTS", dict(registry._FACTS))
    monkeypatch.setattr(mom_compile, "load_offloaded", loaded)
    monkeypatch.setattr(mom_compile, "offload_weights", offloaded)
    assert page.name in SHOWN, f"{page.name} has Python, and SHOWN lacks it"
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
    """The target exists. It is not run: it takes minutes."""
    rules = re.findall(r"^([\w -]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    targets = {target for rule in rules for target in rule.split()}
    assert words[1] in targets and all(re.match(r"ARGS=", word) for word in words[2:])


def run_pip(words: list[str], capsys: Any) -> None:
    assert words[1] == "install"


RUNNERS: dict[str, Callable[[list[str], Any], None]] = {
    "mom-compile": run_mom_compile, "make": run_make, "pip": run_pip,
}  # fmt: skip
#: Values for names of the reader's own. CONFIG is a folder with the config of a small model.
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


# --- the site ---


def test_every_export_is_documented():
    """In numpy style, with the sections that it needs, and in the API reference."""
    assert list(hooks().faults()) == []


@pytest.mark.parametrize(
    ("doc", "fault"),
    [
        (None, " has no docstring"),
        ("Return x.", ": section Parameters lacks x"),
        ("Return x.\n\nParameters\n----------\nx : int\n    A.\ny : int\n    B.\n", ": section Parameters has y"),
        ("Return x.\n\nParameters\n----------\nx : int\n    A.\n", " has no section Returns"),
        ("Return x.\n\nParameters\n----------\nx : int\n    A.\n\nReturns\n-------\nint\n", " has no section Raises"),
    ],
)
def test_a_missing_section_is_found(doc: str | None, fault: str):
    def function(x: int) -> int:
        return x

    function.__doc__ = doc
    assert any(found.startswith(fault) for found in hooks()._function_faults(function, raises=True))


def test_the_navigation_has_every_page():
    """And no other. The site's start page and three more are files of the repository's root."""
    nav = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2].partition("\n\n")[0]
    files = {str(page.relative_to(ROOT / "docs")) for page in PAGES if page.parent != ROOT}
    assert sorted(re.findall(r"(\S+\.md)$", nav, re.MULTILINE)) == sorted({*files, *hooks().PAGES.values()})


def test_root_pages_link_into_the_site():
    for source in hooks().PAGES:
        for link in re.findall(r"\]\(([^)#]+\.(?:md|png))\)", hooks().root_page(source)):
            assert (ROOT / "docs" / link).is_file() or link in hooks().PAGES.values(), f"{source}: {link}"


@pytest.mark.parametrize("name", sorted(commands.commands))
def test_the_page_on_the_command_line_has_every_option(name: str):
    page = (ROOT / "docs" / "command_line.md").read_text()
    section = page.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
    options = {option for parameter in commands.commands[name].params for option in parameter.opts if option[0] == "-"}
    assert set(re.findall(r"`(--?[\w-]+)", section)) == options


def test_the_page_on_the_command_line_has_every_device():
    page = " ".join((ROOT / "docs" / "command_line.md").read_text().split())
    assert f"Recorded devices: {', '.join(DEVICES)}." in page


def test_the_support_matrix_is_that_of_the_results():
    support = importlib.import_module("benchmarks.support")
    assert support.PAGE.read_text() == support.page()


def test_nothing_of_the_theme_is_loaded_from_a_network():
    settings = (ROOT / "mkdocs.yml").read_text()
    assert re.search(r"^  font: false", settings, re.MULTILINE)
    assert "http://" not in settings and "https://" not in settings


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="mkdocs is not installed (extra docs)")
def test_the_site_builds_without_a_warning(tmp_path: Path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=250)
    assert (tmp_path / "api" / "mom_compile.html").is_file()


@functools.cache
def hooks() -> Any:
    """The module of the site's hooks, which is not in a package."""
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
