"""Weights on the host in a rewritten graph: each is fetched once, one stage ahead, into one of two layers' buffers."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import fx

import mom_compile
from benchmarks.models import keeping
from benchmarks.without_codegen import pieces_run_eagerly
from mom_compile.runtime.host.engines import engine_for
from mom_passes.graph.edit import emit
from mom_passes.graph.values import bytes_of
from mom_passes.host.weights import _in_parts, _Weight
from mom_passes.ops.transfers import FETCH_CHOSEN, FETCH_ROWS, FETCH_START, FETCH_WAIT, FETCH_WEIGHT, taken_over
from mom_passes.program.slots import reuse_slots
from mom_passes.program.traffic import Arrival
from tests.models import SMALL, TinyDecoder, ids, prompt, small_model
from tests.tracing import trace
from tests.weights import least, offloaded

CPU = torch.device("cpu")
STRICT = {"strict": True, "mini_seq_len": 32}

#: The third layer takes over the buffers of the first.
THREE_LAYERS = {"num_hidden_layers": 3}


def weight_bytes(model: torch.nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


@cache
def explained(family: str, kind: str) -> Any:
    """The report of a prefill, or of the decode step after it."""
    model = small_model(family, **THREE_LAYERS)
    inputs = prompt(1, 100)
    if kind == "prefill":
        return mom_compile.explain(offloaded(model), **inputs, logits_to_keep=1, options=STRICT)[0]
    with torch.no_grad():
        past = model(**inputs).past_key_values
    offloaded(model)
    return mom_compile.explain(model, input_ids=ids(1, 1), **keeping(past, model), options=STRICT)[0]


def starts(report: Any) -> list[fx.Node]:
    return [node for node in report.graph.graph.nodes if node.target is FETCH_START]


def on_device(report: Any) -> Iterator[int]:
    """Bytes of fetched weights on the device, step by step."""
    arriving = set(starts(report))
    for moment in report.memory.moments:
        yield sum(report.memory.number(s.bytes) for s in moment.alive if s.node in arriving)


#: Decode steps of the others are fetched for like Llama's.
KINDS = [
    pytest.param(family, kind, marks=[pytest.mark.slow] if (family, kind) in slow else [])
    for slow in [{("Gemma3Text", "decode"), ("GPT2", "decode")}]
    for family in ("Llama", "Gemma3Text", "GPT2")
    for kind in ("prefill", "decode")
]


@pytest.mark.parametrize(("family", "kind"), KINDS)
def test_every_weight_is_fetched_once(family: str, kind: str) -> None:
    report = explained(family, kind)
    hosts = [start.args[0] for start in starts(report)]
    assert len(hosts) >= 12
    assert len(set(hosts)) == len(hosts)
    assert all(host.op == "placeholder" for host in hosts)
    assert not report.graph.graph.find_nodes(op="call_function", target=FETCH_WEIGHT)
    assert sum(arrival.bytes for arrival in report.weights.arrivals) == sum(map(bytes_of, hosts))


@pytest.mark.parametrize(("family", "kind"), KINDS)
def test_at_most_two_layers_are_on_the_device(family: str, kind: str) -> None:
    model = small_model(family, **THREE_LAYERS)
    made = mom_compile.offload_weights(model, "cpu", memory_budget=least(model))
    report = explained(family, kind)
    most = max(on_device(report))
    assert made.under_way // 4 < most <= made.under_way


@pytest.mark.parametrize(("family", "kind"), KINDS)
def test_a_copy_starts_one_stage_ahead(family: str, kind: str) -> None:
    """Computation takes place between the start of a copy and the wait for it, except for the first group."""
    report = explained(family, kind)
    nodes = list(report.graph.graph.nodes)
    waits = [node for node in nodes if node.target is FETCH_WAIT and node.args[0] in starts(report)]
    groups: list[list[fx.Node]] = []
    for wait in waits:
        same_group = groups and not _computes(nodes[nodes.index(groups[-1][-1]) + 1 : nodes.index(wait)])
        groups[-1].append(wait) if same_group else groups.append([wait])
    assert len(groups) >= 4
    for group in groups[1:]:
        for wait in group:
            between = nodes[nodes.index(wait.args[0]) : nodes.index(wait)]
            assert _computes(between), f"{wait.name} is waited for as soon as its copy has begun"


def _computes(nodes: list[fx.Node]) -> bool:
    return any(node.op == "call_module" or "mm" in str(node.target) for node in nodes)


@pytest.mark.parametrize(("family", "kind"), KINDS)
def test_a_slot_is_reused_after_its_last_reader(family: str, kind: str) -> None:
    report = explained(family, kind)
    reused = [(start, taken_over(start)) for start in starts(report) if taken_over(start) is not None]
    assert len(reused) >= len(starts(report)) // 4
    assert len({over for _, over in reused}) == len(reused), "a buffer was given twice"
    for start, over in reused:
        (wait,) = (user for user in over.users if user.target is FETCH_WAIT)
        readers = _all_readers(wait)
        assert readers and max(readers) < start
        assert start.meta["val"].shape == over.meta["val"].shape
        assert start.meta["val"].stride() == over.meta["val"].stride()


def _all_readers(value: fx.Node) -> set[fx.Node]:
    """The readers of a node or of its views (operators named `view`, `t`, `permute` and the like)."""
    found: set[fx.Node] = set()
    for user in value.users:
        if getattr(user.target, "is_view", False):
            found |= _all_readers(user)
        elif user.target is not FETCH_START:
            found.add(user)
    return found


def test_embeddings_fetch_rows_and_tied_ones_are_fetched_only_for_the_head() -> None:
    model = offloaded(small_model("Llama", tie_word_embeddings=True))
    report = mom_compile.explain(model, **prompt(2, 70), logits_to_keep=1, options=STRICT)[0]
    (rows,) = report.graph.graph.find_nodes(op="call_function", target=FETCH_ROWS)
    assert list(rows.meta["val"].shape) == [2, 70, SMALL.width]
    table = rows.args[0]
    assert [start.args[0] for start in starts(report)].count(table) == 1
    assert report.weights.rows == 2 * 70 * SMALL.width * 4


@pytest.mark.parametrize("code", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eager", "compiled"])
def test_a_decode_step_fetches_only_the_chosen_experts(code: bool) -> None:
    experts, chosen = 16, 2
    model = small_model("Qwen3Moe", num_experts=experts, num_experts_per_tok=chosen)
    layers = [layer.mlp.experts for layer in model.model.layers]
    banks = sum(bank.nbytes for layer in layers for bank in layer.parameters())
    inputs = prompt(1, 100)
    with torch.no_grad():
        past = model(**inputs).past_key_values
        step = ids(1, 1)
        wanted = model(step, **keeping(copy.deepcopy(past), model)).logits
        offloaded(model)
        given = keeping(copy.deepcopy(past), model)
        report = mom_compile.explain(model, input_ids=step, **given, options=STRICT)[0]
        assert len(report.graph.graph.find_nodes(op="call_function", target=FETCH_CHOSEN)) == 2 * len(layers)
        model.compile(backend="mom", options=STRICT)
        traffic = engine_for(CPU).traffic
        with contextlib.nullcontext() if code else pieces_run_eagerly():
            for _ in range(2):
                before = traffic.to_device
                found = model(step, **keeping(copy.deepcopy(past), model)).logits
                moved = traffic.to_device - before
    assert torch.allclose(found, wanted, atol=1e-5)
    whole = sum(arrival.bytes for arrival in report.weights.arrivals)
    assert report.weights.chosen == banks * chosen // experts
    assert moved == whole + report.weights.rows + report.weights.chosen


def test_a_prefill_fetches_whole_banks_of_experts() -> None:
    """Every expert is used by some token."""
    model = offloaded(small_model("Qwen3Moe"))
    report = mom_compile.explain(model, **prompt(1, 100), options=STRICT)[0]
    banks = {tuple(b.shape) for b in model.model.layers[0].mlp.experts.parameters()}
    fetched = [tuple(start.meta["val"].shape) for start in starts(report)]
    assert all(fetched.count(shape) == SMALL.layers for shape in banks)


CALLS = [
    (False, 1), (False, 100), (True, 1),
    *(pytest.param(False, tokens, marks=pytest.mark.slow) for tokens in (2, 33)),
    *(pytest.param(True, tokens, marks=pytest.mark.slow) for tokens in (2, 33, 100)),
]  # fmt: skip


@pytest.mark.parametrize(("kv_offload", "tokens"), CALLS)
def test_results_equal_those_with_weights_on_the_device(tokens: int, kv_offload: bool) -> None:
    """In float64, as eager mode. Without Inductor's code if keys and values are on the host as well."""
    with pieces_run_eagerly() if kv_offload else contextlib.nullcontext():
        check_results(tokens, kv_offload)


def check_results(tokens: int, kv_offload: bool) -> None:
    plain, moved = TinyDecoder(layers=3).double(), offloaded(TinyDecoder(layers=3).double())
    options = {**STRICT, "kv_offload": kv_offload}
    given = ids(2, tokens)
    with torch.no_grad():
        wanted = plain(given, 1)
        traffic = engine_for(CPU).traffic
        run = torch.compile(moved, backend="mom", options=options)
        run(given, 1)
        before = traffic.to_device
        found = run(given, 1)
    assert torch.allclose(found, wanted, atol=1e-6)
    on_host = sum(p.nbytes for p in moved.parameters() if isinstance(p, mom_compile.HostWeight))
    table = moved.embed.weight.nbytes
    assert on_host > weight_bytes(plain) // 2
    # Each weight is read once; of the table, one row per token.
    assert traffic.to_device - before == on_host - table + 2 * tokens * moved.embed.weight.shape[1] * 8


@pytest.mark.usefixtures("eager_pieces")
def test_the_budget_left_by_weights_is_used_for_keys_and_values() -> None:
    """The backend's budget is for everything on the device: buffers of fetched weights, but not weights on the host."""
    model = small_model("Llama", **THREE_LAYERS)
    moved = offloaded(copy.deepcopy(model))
    options = {**STRICT, "kv_offload": "auto", "memory_budget": weight_bytes(model) * 7 // 8}
    model.compile(backend="mom", options=options)
    too_small = pytest.raises(mom_compile.MemoryBudgetError, match=r"less than the weights alone.*offload_weights")
    with torch.no_grad(), too_small:
        model(**prompt(1, 100), logits_to_keep=1)
    moved.compile(backend="mom", options=options)
    with torch.no_grad():
        past = moved(**prompt(1, 100), logits_to_keep=1).past_key_values
    assert not any(isinstance(layer.keys, mom_compile.HostTensor) for layer in past.layers)
    options["memory_budget"] = max(on_device(explained("Llama", "prefill"))) // 2
    torch._dynamo.reset()
    moved.compile(backend="mom", options=options)
    with torch.no_grad(), pytest.raises(mom_compile.MemoryBudgetError, match="smallest budget is") as refused:
        moved(**prompt(1, 100), logits_to_keep=1)
    smallest = re.search(r"smallest budget is (\d+) bytes", str(refused.value))
    assert smallest is not None
    options["memory_budget"] = int(smallest[1])
    torch._dynamo.reset()
    moved.compile(backend="mom", options=options)
    with torch.no_grad():
        past = moved(**prompt(1, 100), logits_to_keep=1).past_key_values
    assert all(isinstance(layer.keys, mom_compile.HostTensor) for layer in past.layers)


def test_views_of_a_weight_are_equal_on_device_and_host() -> None:
    """A weight read in slices, one of them strided, is fetched once as a whole."""

    class Split(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.weight = torch.nn.Parameter(torch.randn(192, 64))
            self.other = torch.nn.Parameter(torch.randn(64, 64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first, second, third = self.weight.chunk(3)
            every_other = self.weight[::2][:64]
            return (x @ first.t()) * (x @ second.t()) + (x @ third.t()) + x @ every_other.t() + x @ self.other

    plain = torch.nn.Sequential(Split(), torch.nn.Tanh(), Split(), torch.nn.Tanh(), Split())
    moved = offloaded(copy.deepcopy(plain))
    x = torch.randn(1, 100, 64)
    with torch.no_grad():
        wanted = plain(x)
        report = mom_compile.explain(moved, x, options=STRICT)[0]
        found = torch.compile(moved, backend="mom", options=STRICT)(x)
    assert torch.allclose(found, wanted, atol=1e-4)
    assert len(starts(report)) == 6


def test_exposed_copy_time_is_reported() -> None:
    arrival = Arrival(("w",), bytes=50_000_000, work_before=10**9)
    assert arrival.exposed(25e9, 1e12) == pytest.approx(0.0)
    assert arrival.exposed(25e9, 1e14) == pytest.approx(0.002 - 2e-5)
    report = explained("Llama", "decode")
    whole = sum(a.bytes for a in report.weights.arrivals)
    assert report.exposed_seconds(1e9, 1e30) == pytest.approx(whole / 1e9)
    assert report.exposed_seconds(1e30, 1e9) == pytest.approx(0.0)
    assert "weights on the host: each token brings" in str(report)
    assert "weights on the host: each prefill brings" in str(explained("Llama", "prefill"))


def test_a_group_that_is_too_large_is_fetched_in_parts() -> None:
    graph = fx.Graph()
    values = []
    for size in (4, 4, 2, 8, 1):
        node = graph.placeholder(f"w{len(values)}")
        node.meta["val"] = torch.empty(size, dtype=torch.uint8)
        values.append(_Weight(node, (), node))
    parts = [[weight.bytes for weight in part] for part in _in_parts(values, 8)]
    assert parts == [[4, 4], [2], [8], [1]]


def test_fetched_weights_with_symbolic_sizes_reuse_buffers_of_equal_ones() -> None:
    """Fetched tensors other than parameters may have symbolic sizes, which are not hashable."""

    def products(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return x @ a @ b @ c

    a, b, c, x = torch.zeros(16, 16), torch.zeros(16, 16), torch.zeros(16, 12), torch.zeros(9, 16)
    gm = trace(products, a, b, c, x, dynamic=True)
    waits = []
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default):
        host = node.args[1]
        with gm.graph.inserting_before(node):
            start = emit(gm.graph, FETCH_START, (host, 0, 0, CPU))
            waits.append(emit(gm.graph, FETCH_WAIT, (start, None, 0)))
        node.update_arg(1, waits[-1])
    assert reuse_slots(gm, waits) == 1
    assert waits[1].args[0].args[-1] is waits[0].args[0]
