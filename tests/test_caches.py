"""Compile caches on disk never mix us up with stock Inductor, cold or warm, whoever comes first."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._functorch import config as functorch_config
from torch.nn.attention.flex_attention import flex_attention
from torch.torch_version import TorchVersion

from benchmarks.without_codegen import pieces_run_eagerly
from mom_compile import cache_key, compiled, reports
from mom_compile.config import Options
from mom_compile.notices import MomWarning
from mom_compile.report import DECODE_STEP
from mom_compile.rules import chunk_rule
from mom_passes.rules import registry
from tests.models import TinyDecoder, ids, small_model

ROOT = Path(__file__).parent.parent


def run(backend: str, cache: Path, *more: str) -> dict[str, float]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "passes")])
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), "PYTHONPATH": path}
    command = [sys.executable, "-m", "tests.cache_child", backend, *more]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_stock_inductor_first(tmp_path):
    cold, ours, warm, ours_again = (run(b, tmp_path) for b in ("inductor", "mom", "inductor", "mom"))
    assert [ours["loops"], ours_again["loops"]] == [1, 1]
    assert max(r["difference"] for r in (cold, ours, warm, ours_again)) < 1e-5
    # The control: stock Inductor does use that cache here, and finds its own in it.
    assert (cold["autograd_hits"], cold["autograd_misses"], warm["autograd_hits"]) == (0, 1, 1)
    assert (ours["autograd_hits"], ours["autograd_saves"], ours["read"]) == (0, 1, False)
    # A second process traces nothing and compiles nothing: program and pieces are there.
    assert (ours_again["autograd_hits"], ours_again["autograd_saves"], ours_again["read"]) == (1, 0, True)
    assert ours_again["graph_hits"] == ours["graph_misses"] > 0 and ours_again["graph_misses"] == 0


@pytest.mark.slow
def test_ours_first(tmp_path):
    ours, stock = (run(b, tmp_path) for b in ("mom", "inductor"))
    assert ours["loops"] == 1
    assert max(ours["difference"], stock["difference"]) < 1e-5
    # Nothing of ours is served to stock Inductor.
    assert (stock["autograd_hits"], stock["autograd_misses"]) == (0, 1)


@pytest.mark.slow
def test_what_was_compiled_can_be_taken_to_another_machine(tmp_path):
    """By PyTorch's own artifacts, into an empty cache: a service starts with them."""
    file = str(tmp_path / "artifacts")
    first, second = (run("mom", tmp_path / name, file) for name in ("one", "other"))
    assert first["graph_misses"] > 0 and first["graph_hits"] == 0
    assert second["graph_hits"] == first["graph_misses"] and second["graph_misses"] == 0
    assert second["loops"] == 1 and second["read"] and second["difference"] < 1e-5


# --- what is stored, within one process: `torch._dynamo.reset()` forgets all that a new one would not know ---


@pytest.fixture
def compiled_cache(tmp_path, monkeypatch) -> Iterator[Path]:
    """An empty compile cache, which is on, and no rules but our own: other tests may have made some."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    foreign = registry.foreign_rules()
    monkeypatch.setattr(registry, "_FACTS", {k: facts for k, facts in registry._FACTS.items() if k not in foreign})
    with functorch_config.patch(enable_autograd_cache=True):
        yield tmp_path


@pytest.fixture
def cache(compiled_cache) -> Iterator[Path]:
    """Likewise, of programs whose pieces are not compiled."""
    with pieces_run_eagerly():
        yield compiled_cache


SLOWER: list[dict[str, Any]] = [{"scope": "mlp"}, {"inductor": {"epilogue_fusion": False}}]


def prefill(tokens: int = 37, **options) -> tuple[Any, Any]:
    """A compiled prefill as a process that starts now makes it: its result, and the report on it."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = TinyDecoder(layers=1).eval()
    fast = torch.compile(model, backend="mom", options={"mini_seq_len": 8, "strict": True, **options})
    with torch.no_grad():
        found = fast(ids(1, tokens), 1)
        torch.testing.assert_close(found, model(ids(1, tokens), 1), rtol=1e-4, atol=1e-5)
    return found, reports()[-1]


def test_a_graph_is_read_with_its_report(cache):
    (first, compiled), (second, read) = prefill(), prefill()
    assert torch.equal(first, second)
    assert (compiled.from_cache, read.from_cache) == (False, True)
    assert len(read.stages) == 1 and str(read.stages) == str(compiled.stages)
    assert str(read) == str(compiled) and read.expected_peak_bytes == compiled.expected_peak_bytes > 0
    assert not read.passes and "explain" in read.code() and "compile cache" in read.details()


def test_neither_backend_reads_what_the_other_stored(compiled_cache):
    """Each reads its own. The slow tests have a process for each backend."""
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.SiLU(), torch.nn.Linear(16, 8)).eval()
    x = torch.randn(2, 40, 8)

    def run(backend: str) -> tuple[int, int]:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        options = {"mini_seq_len": 8, "strict": True} if backend == "mom" else None
        with torch.no_grad():
            found = torch.compile(model, backend=backend, options=options)(x)
            torch.testing.assert_close(found, model(x), rtol=1e-4, atol=1e-5)
        assert bool(reports()) == (backend == "mom") and all(report.stages for report in reports())
        counted = torch._dynamo.utils.counters["aot_autograd"]
        return counted["autograd_cache_hit"], counted["autograd_cache_saved"]

    assert [run(backend) for backend in ("mom", "inductor")] == [(0, 1), (0, 1)]
    assert [run(backend) for backend in ("inductor", "mom")] == [(1, 0), (1, 0)]


def test_every_length_reads_its_own_graph(cache):
    """The second length makes a graph for all, which a third reads in another process."""

    def lengths(*tokens):
        torch._dynamo.reset()
        model = TinyDecoder(layers=1).eval()
        fast = torch.compile(model, backend="mom", options={"mini_seq_len": 8, "strict": True})
        with torch.no_grad():
            for count in tokens:
                torch.testing.assert_close(fast(ids(1, count), 1), model(ids(1, count), 1), rtol=1e-4, atol=1e-5)
        return [report.from_cache for report in reports()]

    assert lengths(37, 41) == [False, False]
    assert lengths(37, 53, 61) == [True, True]


@pytest.mark.parametrize(
    "changed",
    [{"mini_seq_len": 9}, *(pytest.param(more, marks=pytest.mark.slow) for more in SLOWER)],
    ids=str,
)
def test_other_options_read_nothing(cache, changed):
    prefill()
    assert not prefill(**changed)[1].from_cache
    assert prefill(**changed)[1].from_cache


def test_another_version_of_the_sources_reads_nothing(cache, monkeypatch):
    prefill()
    monkeypatch.setattr(cache_key, "_sources", lambda: "another")
    assert not prefill()[1].from_cache


def test_with_a_rule_of_the_users_own_nothing_is_stored(cache, monkeypatch):
    """Nothing tells whether it is the same one in another process."""
    chunk_rule("mylib::not_there")(lambda node, dim: None)
    assert cache_key.cache_tag(Options()) is None
    prefill()
    assert not prefill()[1].from_cache
    assert not list(cache.glob("aotautograd/*/*"))


@pytest.mark.parametrize(("folder", "pieces"), [("aotautograd", "cache"), ("fxgraph", "compiled_cache")])
def test_a_spoiled_entry_is_compiled_anew(folder, pieces, request):
    """Cut off, as by a full disk. Where only pieces are lost the program is read, and they are compiled."""
    cache = request.getfixturevalue(pieces)
    prefill()
    entries = [path for path in cache.glob(f"{folder}/**/*") if path.is_file()]
    assert entries
    for path in entries:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    report = prefill()[1]
    assert report.from_cache == (folder == "fxgraph")
    assert report.compiled_pieces and not report.eager_pieces
    assert (torch._dynamo.utils.counters["inductor"]["fxgraph_cache_miss"] > 0) == (folder == "fxgraph")


@torch.no_grad()
def test_a_request_that_is_not_honoured_is_told_of_a_graph_that_is_read_too(compiled_cache):
    def attend(query):
        return F.scaled_dot_product_attention(query, query, query)

    for read in (False, True):
        torch._dynamo.reset()
        fast = torch.compile(attend, backend="mom", options={"kv_offload": True, "scope": "none"})
        with pytest.warns(MomWarning, match="scope='none' asks for stock Inductor"):
            fast(torch.ones(1, 2, 16, 8))
        assert reports()[-1].from_cache == read


@pytest.mark.parametrize(
    "options", [{"kv_offload": True}, pytest.param({"memory_budget": 1_000_000}, marks=pytest.mark.slow)], ids=str
)
def test_keys_and_values_leave_for_the_host_in_a_graph_that_is_read(cache, options):
    """All of them, and those that do not fit: prefill and decode of an unmodified `generate()`."""
    texts = []
    for _ in range(2):
        torch._dynamo.reset()
        model = small_model("Llama", num_hidden_layers=3 if "memory_budget" in options else 2)
        model.compile(backend="mom", options={"mini_seq_len": 8, "strict": True, **options})
        text = model.generate(ids(1, 40), max_new_tokens=6, min_new_tokens=6, do_sample=False)
        texts.append((text.tolist(), [bool(report.on_host) for report in reports()]))
    # PyTorch 2.11 has no key for a tensor of a class of ours: steps with a cache on the host are compiled anew.
    known = TorchVersion(torch.__version__) >= (2, 12) or "memory_budget" in options
    assert [report.from_cache or (report.kind == DECODE_STEP and not known) for report in reports()] == [True] * 2
    assert texts[0] == texts[1] and any(texts[0][1])


@pytest.mark.slow
def test_a_step_left_on_the_device_is_compiled_anew_where_its_cache_does_not_fit(compiled_cache, monkeypatch):
    """What "auto" decided once, by what the device had free, is asked again; so is how many layers stay."""

    def generated() -> list[tuple[str, bool]]:
        torch._dynamo.reset()
        model = small_model("Llama", num_hidden_layers=3)
        model.compile(backend="mom", options={"mini_seq_len": 8, "strict": True, "memory_budget": "1GiB"})
        model.generate(ids(1, 40), max_new_tokens=3, min_new_tokens=3, do_sample=False)
        return [(report.kind, report.from_cache) for report in reports()]

    kinds = [kind for kind, _ in generated()]
    assert kinds[:2] == ["prefill", "decode step"]
    assert generated() == [(kind, True) for kind in kinds]
    monkeypatch.setattr(compiled, "budget_of", lambda options, device, weights: 1)
    # All keys and values of the prefill leave now, and the steps with a cache on the host are other graphs.
    assert generated()[0] == ("prefill", True)
    assert reports()[1].on_host and not reports()[1].from_cache


def test_what_needs_gradients_is_not_stored(cache):
    for _ in range(2):
        torch._dynamo.reset()
        model = TinyDecoder(layers=1)
        with pytest.warns(MomWarning, match="inference"):
            torch.compile(model, backend="mom")(ids(1, 20), 1).sum().backward()
        assert not reports()[-1].from_cache
    assert not list(cache.glob("aotautograd/*/*"))


def test_functions_within_a_graph_are_compiled_anew(cache):
    """FlexAttention's: two that differ are two graphs, and none is read for the other."""
    query, weight = torch.randn(1, 2, 40, 16), torch.randn(16, 16)

    def attended(shift: int) -> torch.Tensor:
        def score(value, batch, head, q, k):
            return value + shift * (q - k)

        def attend(query):
            return (flex_attention(query @ weight, query @ weight, query, score_mod=score) @ weight).relu()

        torch._dynamo.reset()
        options = {"mini_seq_len": 8, "strict": True}
        with torch.no_grad():
            found = torch.compile(attend, backend="mom", options=options)(query)
        assert reports()[-1].stages and not reports()[-1].from_cache
        return found

    first, other, again = (attended(shift) for shift in (1, 2, 1))
    assert torch.equal(first, again) and not torch.allclose(first, other)


class Scaled(torch.nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.scale = [torch.full((4,), value)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale[0]


def test_a_constant_of_the_graph_is_part_of_it(cache):
    """The key would have its shape alone."""
    found = []
    for value in (1.0, 2.0):
        torch._dynamo.reset()
        with torch.no_grad():
            found.append(torch.compile(Scaled(value), backend="mom")(torch.ones(40, 4)).sum().item())
    assert found == [160.0, 320.0]
