"""What CONTRIBUTING.md says works: its code is run as it stands there, and the places that it names are there.

A block of code begins with the file it belongs to. What belongs to a new file becomes that module; what belongs to one
that exists runs among that module's names, and leaves the module as it was.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mom_compile import pipeline
from mom_compile.pipeline.form import TO_FORM, drop_whole_slices
from mom_compile.runtime.host.placement import TIERS, Placement
from mom_passes.loops.loop import loop_nodes
from mom_passes.rules import registry
from tests.backing_law import LAWS
from tests.programs import HIDDEN, STEPS, Weights, weights_of
from tests.rule_law import Call, check_call
from tests.rule_samples import floats
from tests.tracing import rewrite, trace

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "CONTRIBUTING.md").read_text()
#: Recipe -> file -> its code.
BLOCKS: dict[str, dict[str, str]] = {
    section.splitlines()[0]: dict(re.findall(r"```python\n# ([^\n]*)\n(.*?)```", section, re.DOTALL))
    for section in PAGE.split("\n## ")[1:]
}


Run = Callable[[str, str], dict[str, Any]]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a block and returns the names there are then. Neither its rules nor its modules outlive the test."""
    monkeypatch.setattr(registry, "_FACTS", dict(registry._FACTS))

    def run(recipe: str, label: str) -> dict[str, Any]:
        path = label.removeprefix("wrong: ")
        name = path.removeprefix("passes/").removesuffix(".py").replace("/", ".")
        if (ROOT / path).is_file():
            names = dict(vars(importlib.import_module(name)))
        else:
            module = types.ModuleType(name)
            monkeypatch.setitem(sys.modules, name, module)
            names = vars(module)
        exec(compile(BLOCKS[recipe][label], f"CONTRIBUTING.md, {label}", "exec"), names)
        return names

    return run


def test_a_rule_and_its_samples(ran: Run) -> None:
    recipe = "An operator rule"
    samples = ran(recipe, "tests/rule_samples.py")["_complex"]()
    ran(recipe, "passes/mom_passes/rules/view.py")
    assert all(check_call(call) for call in samples)
    ran(recipe, "wrong: passes/mom_passes/rules/view.py")
    with pytest.raises(AssertionError, match=r"view_as_real.* along dim \d, claim \(Rows\("):
        check_call(samples[0])


def test_a_pass_and_its_test(ran: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = "A pass"
    ran(recipe, "passes/mom_passes/graph/undone_permutes.py")
    ran(recipe, "tests/test_undone_permutes.py")["test_a_value_that_is_permuted_back_is_itself"]()
    step = ran(recipe, "mom_compile/pipeline/form.py")["permutes_undone"]
    at = TO_FORM.index(drop_whole_slices) + 1
    monkeypatch.setattr(pipeline, "TO_FORM", (*TO_FORM[:at], step, *TO_FORM[at:]))

    def program(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        w = Weights(*parameters)
        x = STEPS["causal"](STEPS["linear"](x, w), w).permute(2, 0, 1).permute(1, 2, 0)
        return STEPS["mlp"](x, w)

    x, weights = torch.randn(2, 13, HIDDEN, dtype=torch.float64), weights_of(torch.float64)
    gm = trace(program, x, *weights)
    rewritten, report = rewrite(gm, 4)
    assert ("permutes_undone", "1 permutes") in [(one.name, one.change) for one in report.passes]
    torch.testing.assert_close(rewritten(x, *weights), gm(x, *weights), rtol=0, atol=1e-10)


def test_a_recurrence_and_its_law(ran: Run) -> None:
    names = ran("A recurrence", "mylib/recurrence.py")
    assert len(BLOCKS["A recurrence"]["mylib/recurrence.py"].split("@chunk_rule")[1].splitlines()) <= 30
    target = torch.ops.mylib.recurrence.default
    assert check_call(Call(target, (floats(2, 7, 5), floats(5), floats(2, 5)))) == 1

    def program(x: torch.Tensor, *parameters: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        w = Weights(*parameters)
        x = STEPS["mlp"](x, w)
        rows, state = names["recurrence"](x, torch.sigmoid(w.square[0]), x.new_zeros(x.shape[0], HIDDEN))
        return STEPS["mlp"](x + rows, w), state

    x, weights = torch.randn(2, 13, HIDDEN, dtype=torch.float64), weights_of(torch.float64)
    gm = trace(program, x, *weights)
    rewritten, report = rewrite(gm, 4, tuple(n.name for n in gm.graph.nodes if n.op == "placeholder")[1:])
    ((_, module),) = loop_nodes(rewritten)
    assert module.loop.carries and not report.left_out
    for actual, expected in zip(rewritten(x, *weights), gm(x, *weights), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="no files in memory here")
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_a_tier_and_its_law(ran: Run, law: Any, tmp_path: Path) -> None:
    recipe = "A copy tier"
    ran(recipe, "mom_compile/runtime/host/backings/in_memory_file.py")
    tiers = ran(recipe, "mom_compile/runtime/host/placement.py")["TIERS"]
    assert tiers.keys() - TIERS.keys() == {"shared"}
    assert {**tiers, **TIERS} == tiers
    placement = ran(recipe, "tests/test_backings.py")["PLACEMENTS"].pop("shared")(tmp_path)
    assert placement == Placement("shared")
    law(lambda: tiers[placement.tier].backing(placement))


def test_files_and_sections_that_are_named_are_there() -> None:
    new = {path for blocks in BLOCKS.values() for path in blocks if not (ROOT / path.removeprefix("wrong: ")).is_file()}
    assert len(new) == 4  # a pass, its test, a recurrence, a backing
    roots = (ROOT, ROOT / "passes/mom_passes", ROOT / "mom_compile/runtime/host")
    named = {name for name in re.findall(r"`([\w/.]+\.(?:py|md))`", PAGE) if name not in new}
    assert [name for name in sorted(named) if not any((root / name).is_file() for root in roots)] == []
    titles = {title.lower().replace(" ", "-") for title in BLOCKS}
    assert set(re.findall(r"\(#([\w-]+)\)", PAGE)) <= titles
