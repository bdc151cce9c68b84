"""What the README shows runs as it is printed, and it can be read in a few minutes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import transformers

import mom_compile
from mom_compile.quantities import parse_bytes
from tests.models import ids, tiny

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()


@pytest.mark.usefixtures("eager_pieces", "stock_is_eager")
def test_snippets_run_as_printed(monkeypatch, capsys):
    """In order, as a reader would paste them; the model that the first one loads is a tiny one."""
    monkeypatch.setattr(
        transformers.AutoModelForCausalLM, "from_pretrained", lambda name: tiny("Llama", max_position_embeddings=2048)
    )
    monkeypatch.setattr(mom_compile, "load_offloaded", on_this_device)
    given = ids(1, 1200)
    prompt = {"input_ids": given, "attention_mask": torch.ones_like(given)}
    namespace = {"AutoModelForCausalLM": transformers.AutoModelForCausalLM, "prompt": prompt}
    snippets = re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    assert len(snippets) >= 5
    reports = []
    for snippet in snippets:
        if "load_offloaded" in snippet:  # another program: one function has so many graphs in Dynamo and no more
            reports += mom_compile.reports()
            torch._dynamo.reset()
        exec(compile(snippet, "README.md", "exec"), namespace)
        if "output" in snippet:
            assert 1200 < namespace["output"].shape[1] <= 1216
    printed = capsys.readouterr().out
    assert "prefill of 1200 tokens: expected peak" in printed
    assert namespace["scores"].log_probs.shape == (1, 1199)
    reports += mom_compile.reports()
    assert sum(bool(report.stages) for report in reports) >= 4, "prefills and scores in loops"
    assert not any(report.failed for report in reports)
    assert any(report.on_host for report in reports)
    assert any(report.weights for report in reports)
    assert any(isinstance(parameter, mom_compile.HostWeight) for parameter in namespace["model"].parameters())


def on_this_device(path: str, device: str, memory_budget: str) -> torch.nn.Module:
    """As `load_offloaded` does it for a GPU, with a tiny model in place of the checkpoint."""
    assert device == "cuda" and parse_bytes(memory_budget) > 0
    model = tiny("Llama", num_hidden_layers=4, max_position_embeddings=2048)
    largest = max(sum(p.nbytes for p in layer.parameters()) for layer in model.model.layers)
    mom_compile.offload_weights(model, "cpu", memory_budget=3 * largest)
    return model


def test_it_is_short_and_its_links_lead_somewhere():
    assert len(TEXT.split()) < 1200
    links = re.findall(r"\]\(([^)#]+)\)", TEXT)
    assert len(links) >= 5
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert link.startswith("http") or (page.parent / link).exists(), f"{page.name}: {link}"
