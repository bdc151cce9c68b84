"""Multimodal and encoder models: their calls, `generate()`, and that their page is what its results give."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import mom_compile
from benchmarks import multimodal, multimodal_page
from benchmarks.multimodal_calls import TYPES, build, generate
from benchmarks.multimodal_worker import Work, compile_model, result, uses
from mom_compile.report.facts import PREFILL

OPTIONS = {"mini_seq_len": 64}


def check_uses(name: str, side: int = 16) -> tuple[Work, list[Any]]:
    """Compare prefill, decode step and `generate()` with eager mode. Return the work and the reports of the prefill."""
    subject = build(name, side)
    with torch.no_grad():
        wanted: dict[str, Any] = {}
        runs = uses(subject)
        for use, run in runs.items():
            wanted[use] = run(wanted)
        compile_model(subject.model, "mom", options=OPTIONS)
        work, got, before = Work(subject), dict[str, Any](), len(mom_compile.reports())
        with work.watched():
            got["prefill"] = runs["prefill"](got)
        made = mom_compile.reports()[before:]
        for use in list(runs)[1:]:
            got[use] = runs[use](got)
    for use in runs:
        if use == "generate":
            assert got[use] == wanted[use]
        else:
            torch.testing.assert_close(result(got[use]), result(wanted[use]), rtol=0, atol=1e-5)
    assert not any(report.failed for report in mom_compile.reports()[before:])
    return work, made


@pytest.mark.usefixtures("eager_pieces", "stock_is_eager")
@pytest.mark.parametrize(
    "name", ["t5", *(pytest.param(name, marks=pytest.mark.slow) for name in ("whisper", "mllama"))]
)
def test_an_encoder_and_its_decoder_are_in_loops(name: str) -> None:
    """In one graph, with loops over the tokens of each."""
    work, (prefill,) = check_uses(name)
    assert prefill.kind == PREFILL and prefill.stages
    for part in ("encoder", "decoder"):
        assert work.in_loops[part] >= 0.95 * work.all[part] > 0


@pytest.mark.usefixtures("eager_pieces", "stock_is_eager")
@pytest.mark.parametrize("name", ["llava", pytest.param("t5", marks=pytest.mark.slow)])
def test_generate_runs_encoders_in_loops(name: str) -> None:
    """`generate()` calls the encoder itself, before the model."""
    subject = build(name, 16)
    with torch.no_grad():
        tokens, _ = generate(subject)
        before = len(mom_compile.reports())
        mom_compile.compile(subject.model, options=OPTIONS)
        assert generate(subject)[0] == tokens
        looped = [report.tokens for report in mom_compile.reports()[before:] if report.stages]
        assert any(256 <= count <= 257 for count in looped[:1])
        assert any(count >= 300 for count in looped[1:])


def test_only_parts_besides_the_decoder_are_compiled_by_themselves() -> None:
    from mom_compile.compile import _called_alone

    llava = build("llava", 4).model
    assert _called_alone(llava) == [llava.model.vision_tower, llava.model.multi_modal_projector]
    t5 = build("t5", 4).model
    assert _called_alone(t5) == [t5.encoder]
    assert _called_alone(llava.model.language_model) == _called_alone(torch.nn.Linear(2, 2)) == []


def test_the_page_is_what_the_results_give() -> None:
    results = json.loads(multimodal.RESULTS.read_text())
    assert multimodal_page.PAGE.read_text() == multimodal_page.page(results)
    assert {key.partition(",")[0] for key in results["cells"]} <= {*TYPES}


def test_what_is_wrong_is_seen_on_the_page() -> None:
    good = {"difference": 1e-7, "graphs": 1}
    work = {"encoder": [95, 100], "decoder": [100, 100]}
    found = {"mom": {"prefill": good, "decode": good, "generate": {"same": True}, "work": work}}
    assert multimodal_page.is_right(found)
    assert multimodal_page.share(found, "encoder") == 0.95
    for use, bad in (("prefill", {"difference": 1e-3}), ("generate", {"same": False}), ("decode", {"error": "Oh: no"})):
        wrong = {"mom": {**found["mom"], use: bad}}
        assert not multimodal_page.is_right(wrong)
        stamp = json.loads(multimodal.RESULTS.read_text())["machine"]
        text = multimodal_page.page({"machine": stamp, "cells": {"llava, 1024": wrong, "t5, 1024": found}})
        assert "Of 2 rows, 1 are right" in text and ("**" in text)
