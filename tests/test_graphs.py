"""Few graphs are made of a model, and none of its calls is eager."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

import mom_compile
from benchmarks.graphs import SESSION, Call, Counted, make, session, small

pytestmark = pytest.mark.usefixtures("eager_pieces", "stock_is_eager")
OPTIONS = {"mini_seq_len": 16, "strict": True}

#: Prompts of any length, of one sequence and of several.
PLAIN = (Call("one", (150,)), Call("one", (40,)), Call("several", (90, 90)), Call("several", (30, 30, 30)))

#: Graphs of the whole session, as docs/graphs.md has them. Qwen3 has Llama's cache and no window.
MOST = {"Gemma3Text": 26, "Llama": 12, "Qwen3": 12}


def run(family: str, calls: Sequence[Call]) -> list[Counted]:
    """What a compiled model took for the calls, whose tokens are those of eager mode."""
    plain, model = small(family), mom_compile.compile(small(family), options=OPTIONS)
    counted = list(session(model, calls))
    for number, one in enumerate(counted):
        assert torch.equal(one.tokens, make(plain, one.call, 10 * number)), one.call
    return counted


def test_prompts_of_any_length_and_number_take_four_graphs() -> None:
    """A prompt and a token behind it, of one sequence and of several: the second of a kind needs no graph."""
    counted = run("Llama", PLAIN)
    assert [one.graphs for one in counted] == [2, 0, 2, 0]
    assert all(one.calls == 4 and not one.eager for one in counted)


def test_a_step_behind_a_prompt_and_those_behind_it_are_one_graph() -> None:
    """The window's rows lie alike behind both."""
    counted = run("Gemma3Text", (Call("above the window", (150,)), Call("above the window", (90,))))
    assert [one.graphs for one in counted] == [2, 0]


def test_a_call_that_is_eager_is_counted() -> None:
    """Where this fails, the other tests of this file show nothing."""
    model: Any = mom_compile.compile(small("Llama"), options=OPTIONS, recompile_limit=1)
    with pytest.warns(mom_compile.MomWarning, match="a call runs in eager mode"):
        (counted,) = session(model, PLAIN[:1])
    assert (counted.graphs, counted.calls, counted.eager) == (1, 4, 3)
    assert mom_compile.reports()[-1].limit_hit


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_session_with_three_families_in_one_process_has_no_eager_call() -> None:
    """Their forwards share one code object."""
    for family, most in MOST.items():
        counted = run(family, SESSION)
        assert len(counted) >= 40 and not any(one.eager for one in counted)
        assert sum(one.graphs for one in counted) <= most, family
    assert not any(report.limit_hit for report in mom_compile.reports())
