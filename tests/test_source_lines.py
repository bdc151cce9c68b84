"""Reasons name the user's line: the innermost frame outside of PyTorch and this package."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

import mom_compile
from mom_passes import source_lines
from mom_passes.errors import CannotChunk, PassError, RuleError
from mom_passes.rules import Dim
from mom_passes.source_lines import source_line
from tests.models import TinyDecoder, ids

HERE = Path(__file__)
PROMPT = ids(1, 37)


def line_with(text: str) -> str:
    """The line of this file that begins with a text, as reasons name it."""
    lines = [(number, line.strip()) for number, line in enumerate(HERE.read_text().splitlines(), 1)]
    ((number, code),) = [(number, line) for number, line in lines if line.startswith(text)]
    return f"{HERE.relative_to(Path.cwd())}:{number}: {code}"


class Scanned(nn.Module):
    """Each decoder's result goes through an operator that cannot be cut."""

    def __init__(self) -> None:
        super().__init__()
        self.decoders = nn.ModuleList(TinyDecoder(layers=1) for _ in range(2))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        first, second = (decoder(tokens) for decoder in self.decoders)
        one = first.logcumsumexp(1)
        two = second.logcumsumexp(1)
        return one + two


@pytest.fixture(scope="module")
def explained() -> Any:
    return mom_compile.explain(Scanned().eval(), PROMPT, options={"mini_seq_len": 8})


def test_an_operator_outside_loops_is_named_with_its_line_once_for_each_reason(explained: Any) -> None:
    text = str(explained)
    assert f"2 x  aten.logcumsumexp: accumulates along it, first at {line_with('one = first')}" in text
    assert "second.logcumsumexp" not in text


def test_details_have_the_line_of_each_operator(explained: Any) -> None:
    details = explained.details().splitlines()
    for text in ("one = first", "two = second"):
        assert any(line.endswith(f"accumulates along it, at {line_with(text)}") for line in details)


class Reads(nn.Module):
    """A size depends on data, and matrix products depend on it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = x.nonzero()[:, 0]
        return self.linear(torch.ones(kept.shape[0], 8))


def test_what_is_not_supported_is_named_with_its_line() -> None:
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        report = mom_compile.explain(Reads().eval(), torch.ones(20, 3))[0]
    assert report.fallback is not None
    assert report.fallback.endswith(f", at {line_with('kept = x.nonzero')}")


@pytest.mark.usefixtures("eager_pieces")
def test_a_faulty_rule_is_named_with_the_line_that_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from mom_passes.rules import registry

    def faulty(node: fx.Node, dim: Dim) -> Any:
        raise ValueError("a mistake")

    facts = registry.facts

    monkeypatch.setattr(
        registry, "facts",
        lambda node: registry.OperatorFacts(faulty) if "logcumsumexp" in str(node.target) else facts(node),
    )  # fmt: skip
    report = mom_compile.explain(Scanned().eval(), PROMPT, options={"mini_seq_len": 8})[0]
    assert report.failed
    assert str(report.fallback).endswith(f", at {line_with('one = first')}")


# --- one frame out of a stack ---

TORCH = Path(inspect.getfile(torch)).parent


def node_of(*frames: tuple[str, str]) -> fx.Node:
    node = fx.Graph().placeholder("x")
    node.meta["stack_trace"] = "".join(f'  File "{file}", line 7, in forward\n    {code}\n' for file, code in frames)
    return node


def test_frames_of_pytorch_and_of_this_package_are_not_the_users() -> None:
    ours = Path(mom_compile.__file__).parent / "scores.py"
    passes = Path(inspect.getfile(source_lines))
    stack = [("/models/outer.py", "inner(x)"), ("/models/inner.py", "f(x)")]
    inside = [(str(TORCH / "nn/functional.py"), "linear(x)"), (str(ours), "score(x)"), (str(passes), "g(x)")]
    assert source_line(node_of(*stack, *inside)) == "/models/inner.py:7: f(x)"
    assert source_line(node_of(*inside)) is None


def test_files_are_relative_to_the_path_and_long_lines_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend("/somewhere/site-packages")
    assert source_line(node_of(("/somewhere/site-packages/lib/model.py", "f(x)"))) == "lib/model.py:7: f(x)"
    shown = source_line(node_of(("/models/model.py", "f(" + "x" * 200)))
    assert shown is not None
    assert shown.endswith("xxx...") and len(shown) < 110


def test_errors_name_the_line_of_their_node() -> None:
    node = node_of(("/models/model.py", "f(x)"))
    for error in (CannotChunk(node, Dim(0), "why"), RuleError(node, Dim(0), "is wrong"), PassError("what", node)):
        assert str(error).endswith(", at /models/model.py:7: f(x)")
    assert CannotChunk(node, Dim(0), "why").reason == "why"
    assert str(PassError("what")) == "what"
    bare = fx.Graph().placeholder("x")
    assert source_line(bare) is None
    assert str(CannotChunk(bare, Dim(0), "why")) == "x (x) along dim 0: why"
