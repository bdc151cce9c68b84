"""`mom_compile.compile`, and the warnings about Dynamo's limit on the number of graphs."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo import config as dynamo_config

import mom_compile
from mom_compile import MomWarning, reports
from mom_compile.compiled import CompiledGraph
from mom_compile.torch_compat import recompiles

pytestmark = pytest.mark.usefixtures("eager_pieces", "stock_is_eager")


class Scaled(nn.Module):
    def __init__(self, by: float = 2.0) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.tensor(by), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.by


def halved(x: torch.Tensor) -> torch.Tensor:
    return x / 2


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[CompiledGraph]:
    """Graphs that ran, in order: what runs in eager mode is not among them."""
    found: list[CompiledGraph] = []
    call = CompiledGraph.__call__

    def noting(graph: CompiledGraph, inputs: Any) -> Any:
        found.append(graph)
        return call(graph, inputs)

    monkeypatch.setattr(CompiledGraph, "__call__", noting)
    return found


def call_with(function: Callable[..., Any], *sizes: int) -> list[str]:
    """Call it with tensors of some sizes; the warnings of ours."""
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for size in sizes:
            function(torch.ones(size))
    return [str(w.message) for w in caught if w.category is MomWarning]


def test_a_module_is_compiled_in_place_and_a_function_is_returned(ran: list[CompiledGraph]) -> None:
    model = Scaled()
    assert mom_compile.compile(model) is model
    compiled = mom_compile.compile(halved)
    with torch.no_grad():
        assert model(torch.ones(5)).tolist() == [2.0] * 5
        assert compiled(torch.ones(5)).tolist() == [0.5] * 5
    assert len(ran) == len(reports()) == 2


@pytest.mark.parametrize(
    ("model", "named", "said"),
    [
        (Scaled, {}, "not the class Scaled: make a model of it first"),
        ("google/gemma-3-270m", {}, "takes a module or a function, not a str"),
        (halved, {"options": "kv_offload"}, "options='kv_offload' is not a mapping; write"),
    ],
)
def test_other_things_than_models_functions_and_mappings_are_refused(model: Any, named: Any, said: str) -> None:
    with pytest.raises(TypeError, match=said):
        mom_compile.compile(model, **named)


def test_options_come_by_name_or_in_a_mapping_with_a_mode_beside_them(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda model, **settings: given.append(settings) or model)
    mom_compile.compile(halved, backend="mom", dynamic=True, kv_offload=True)
    mom_compile.compile(halved, mode="max-autotune", options={"inductor": {"max_autotune": False}}, mini_seq_len=64)
    first, second = given
    assert (first["backend"], first["dynamic"], first["options"]) == ("mom", True, {"kv_offload": True})
    assert second["options"]["mini_seq_len"] == 64 and "mode" not in second
    assert second["options"]["inductor"]["max_autotune"] is False
    assert len(second["options"]["inductor"]) > 1, "the rest of what the mode stands for"


@pytest.mark.parametrize(
    ("wrong", "error", "text"),
    [
        ({"kv_ofload": True}, ValueError, "did you mean 'kv_offload'"),
        ({"mode": "fastest"}, ValueError, "mode='fastest' is not valid"),
        ({"recompile_limit": 0}, ValueError, "recompile_limit=0 is not valid"),
        ({"recompile_limit": True}, ValueError, "recompile_limit=True is not valid"),
        ({"backend": "inductor"}, ValueError, "backend='inductor': mom_compile.compile compiles with 'mom'"),
        ({"strict": True, "options": {"strict": True}}, TypeError, "'strict' given twice"),
    ],
)
def test_what_is_wrong_is_said_at_once(wrong: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        mom_compile.compile(Scaled(), **wrong)


@pytest.mark.skipif(not recompiles.CAN_ISOLATE, reason="this PyTorch counts graphs by code object alone")
def test_models_that_share_their_code_have_graphs_of_their_own(ran: list[CompiledGraph]) -> None:
    models = [mom_compile.compile(Scaled(by), dynamic=False, recompile_limit=3) for by in (2.0, 3.0, 4.0)]
    said = [text for model in models for text in call_with(model, 5, 6, 7)]
    assert len(ran) == len(reports()) == 9, "no call is eager"
    assert [report.graphs.number for report in reports() if report.graphs] == [1, 2, 3] * 3
    assert len(said) == 3 and all("last of the 3 graphs" in text for text in said)


@pytest.mark.parametrize("model", [Scaled(), halved])
def test_the_limit_is_raised_where_graphs_cannot_be_counted_apart(
    model: Any, ran: list[CompiledGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recompiles, "CAN_ISOLATE", False)
    with dynamo_config.patch(recompile_limit=2):
        compiled = mom_compile.compile(model, dynamic=False, recompile_limit=4)
        said = call_with(compiled, 5, 6, 7)
        assert dynamo_config.recompile_limit == 2
    assert len(ran) == 3 and not said


def _by_default(function: Any) -> Any:
    return torch.compile(function, backend="mom", dynamic=False)


def _apart(function: Any) -> Any:
    return mom_compile.compile(function, dynamic=False, recompile_limit=3)


@pytest.mark.parametrize("compiled_by", [_by_default, _apart])
def test_the_limit_is_told_before_it_is_hit_and_when_it_is(
    compiled_by: Callable[[Any], Any], ran: list[CompiledGraph]
) -> None:
    def negative(x: torch.Tensor) -> torch.Tensor:
        return -x

    with dynamo_config.patch(recompile_limit=3):
        compiled = compiled_by(negative)
        assert call_with(compiled, 5, 6) == []
        assert not any("recompile_limit" in str(report) for report in reports())
        (near,) = call_with(compiled, 7)
        assert "last of the 3 graphs that torch._dynamo.config.recompile_limit allows" in near
        assert "a call that needs another one runs in eager mode" in str(reports()[-1])
        assert call_with(compiled, 5, 6, 7) == [] and len(ran) == 6
        (hit,) = call_with(compiled, 8, 9)
        assert hit.startswith("a call runs in eager mode") and "mom_compile.compile(model)" in hit
    assert len(ran) == 6 and len(reports()) == 3
    assert all(report.limit_hit for report in reports())
    assert "calls have run in eager mode since" in str(reports()[-1])


def test_another_backends_limit_is_none_of_ours() -> None:
    def positive(x: torch.Tensor) -> torch.Tensor:
        return +x

    with dynamo_config.patch(recompile_limit=1):
        assert call_with(torch.compile(positive, backend="eager", dynamic=False), 5, 6) == []


def test_the_page_on_troubles_has_the_warnings_as_they_are() -> None:
    root = Path(mom_compile.__file__).parent
    texts = "".join(path.read_text() for path in root.rglob("*.py"))
    texts = re.sub(r"[\"']\s+f?[\"']", "", texts)  # a literal that goes on in the next line
    page = (root.parent / "docs" / "troubleshooting.md").read_text()
    rows = re.findall(r"^\| (`[^|]+) \|", page[page.index("## Warnings") :], re.MULTILINE)
    named = [text for row in rows for text in re.findall("`([^`]+)`", row)]
    assert len(named) >= 8
    for text in named:
        assert all(part.strip() in texts for part in text.split("...")), text


class Answering(nn.Module):
    """Takes `return_dict` as models of transformers do: what is not given is asked of `config`."""

    def __init__(self, return_dict: bool) -> None:
        super().__init__()
        self.config = SimpleNamespace(return_dict=return_dict)

    def forward(self, x: torch.Tensor, **kwargs: Any) -> Any:
        by_name = kwargs.pop("return_dict", self.config.return_dict)
        return {"y": x * 2} if by_name else (x * 2,)


@pytest.mark.parametrize("default", [True, False])
def test_an_argument_that_says_the_default_needs_no_graph(default: bool, ran: list[CompiledGraph]) -> None:
    """`generate` passes `return_dict=True`, and omits it where tokens are drafted."""
    model, x = mom_compile.compile(Answering(default)), torch.ones(5)
    with torch.no_grad():
        given, omitted, other = model(x, return_dict=default), model(x), model(x, return_dict=not default)
    assert type(given) is type(omitted) is (dict if default else tuple)
    assert type(other) is (tuple if default else dict)
    assert len(ran) == 3 and len(reports()) == 2


def test_an_argument_stays_where_forward_has_a_default_of_its_own() -> None:
    class Other(Answering):
        def forward(self, x: torch.Tensor, return_dict: bool = False) -> Any:
            return super().forward(x, return_dict=return_dict)

    model: Any = mom_compile.compile(Other(True))
    with torch.no_grad():
        assert isinstance(model(torch.ones(5), return_dict=True), dict)
