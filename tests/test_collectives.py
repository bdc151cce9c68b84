"""Collectives in loop bodies: one operator with its wait, a rule, and a second mini-sequence while one is under way."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import fx

import mom_compile
from mom_compile.runtime import parted
from mom_compile.runtime.parted import Collective, PartedBody, RunPart, run_in_turns
from mom_passes.errors import CannotChunk
from mom_passes.graph.collectives import outline_collectives
from mom_passes.loops.body_parts import BodyParts, may_overlap, second_in_flight
from mom_passes.loops.loop import Loop
from mom_passes.loops.ports import COUNT, CarryIn, TensorType
from mom_passes.ops.collectives import ALL_GATHER, ALL_REDUCE, COLLECTIVES, REDUCE_SCATTER
from mom_passes.program.program import LoopStep
from mom_passes.rules import Dim, Rows, claim_for
from mom_passes.torch_compat import collective, graph_module
from tests.models import TinyDecoder, ids
from tests.parallel import ParallelDecoder, ParallelNorms, reduced
from tests.tracing import rewrite, trace

aten = torch.ops.aten


# --- as one operator ---


def test_a_collective_and_its_wait_become_one_operator(one_rank: None) -> None:
    gm = trace(lambda x: reduced(x.sin()).cos(), torch.randn(4, 3))
    begin, wait = collective("all_reduce"), collective("wait_tensor")
    assert [node.target for node in gm.graph.nodes if node.target in (begin, wait)] == [begin, wait]
    assert outline_collectives(gm) == 1
    operators = [node.target for node in gm.graph.nodes if node.op == "call_function"]
    assert operators == [aten.sin.default, ALL_REDUCE, aten.cos.default]
    x = torch.randn(4, 3)
    torch.testing.assert_close(gm(x), x.sin().cos())


def test_a_collective_that_is_read_before_its_wait_stays(one_rank: None) -> None:
    gm = trace(lambda x: reduced(x), torch.randn(4, 3))
    (begin,) = gm.graph.find_nodes(op="call_function", target=collective("all_reduce"))
    output = next(iter(reversed(gm.graph.nodes)))
    output.args = ((output.args[0], begin),)
    assert outline_collectives(gm) == 0


# --- rules ---


def call(target: Any, shape: list[int], *others: Any) -> fx.Node:
    graph = fx.Graph()
    rows = graph.placeholder("rows")
    rows.meta["val"] = torch.empty(shape, device="meta")
    node = graph.call_function(target, (rows, *others))
    node.meta["val"] = target(rows.meta["val"], *others)
    return node


def test_a_gather_along_features_has_the_ranks_in_front_of_the_tokens() -> None:
    """`[S, V]` of each rank to `[ranks * S, V]`: rows of the result have `outer=ranks`."""
    node = call(ALL_GATHER, [10, 3], 2, "group")
    assert claim_for(node, Dim(0, outer=2)).needs == (Rows(Dim(0)),)
    assert claim_for(node, Dim(0, outer=4, inner=5)).needs == (Rows(Dim(0, outer=2, inner=5)),)
    assert claim_for(node, Dim(1)).needs == (Rows(Dim(1)),)
    scattered = call(REDUCE_SCATTER, [20, 3], "sum", 2, "group")
    assert claim_for(scattered, Dim(0)).needs == (Rows(Dim(0, outer=2)),)


def test_tokens_that_differ_between_ranks_are_a_barrier() -> None:
    with pytest.raises(CannotChunk, match="its ranks have different tokens"):
        claim_for(call(ALL_GATHER, [10, 3], 2, "group"), Dim(0))


# --- in loops ---


def loops_of(report: mom_compile.Report) -> list[Loop]:
    assert report.memory is not None
    return [moment.step.loop for moment in report.memory.moments if isinstance(moment.step, LoopStep)]


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("sums", ["before", "after"])
def test_a_loop_with_collectives_equals_the_whole(one_rank: None, eager_pieces: None, sums: str, overlap: bool) -> None:
    """Two collectives, a carry before or between them, lengths that mini-sequences do not divide, and dynamic ones."""
    model = ParallelNorms(sums=sums)
    compiled = torch.compile(
        model, backend="mom", options={"mini_seq_len": 8, "strict": True, "overlap_collectives": overlap}
    )
    before = parted.WAITED.collectives
    with torch.no_grad():
        for tokens in (41, 17, 64, 9):
            x = torch.randn(2, tokens, 16, generator=torch.Generator().manual_seed(tokens))
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
    (loop,) = loops_of(mom_compile.reports()[0])
    assert loop.in_flight == 1 + overlap
    assert sum(node.target in COLLECTIVES for node in loop.body.graph.nodes) == 2
    assert parted.WAITED.collectives - before == 2 * (6 + 3 + 8 + 2)


def test_every_layer_reduces_in_its_loops(one_rank: None, eager_pieces: None) -> None:
    """A tensor-parallel decoder has the loops of a decoder on one rank, and no collective at full length."""
    whole, given = TinyDecoder(layers=3), ids(1, 45)
    counts = []
    for model in (whole, ParallelDecoder(whole, 0, 1)):
        torch._dynamo.reset()
        with torch.no_grad():
            found = torch.compile(model, backend="mom", options={"mini_seq_len": 16, "strict": True})(given)
        torch.testing.assert_close(found, whole(given), rtol=1e-5, atol=1e-5)
        (report,) = mom_compile.reports()
        counts.append(len(report.stages))
        assert not any("reduce" in name or "gather" in name for name in report.left_out)
    assert counts[0] == counts[1] > 3


def test_a_compiled_loop_with_collectives_is_shared_by_layers_and_lengths(one_rank: None) -> None:
    """Inductor's code: each part is compiled once for all layers and both lengths."""
    whole = TinyDecoder(layers=4)
    model = ParallelDecoder(whole, 0, 1)
    compiled = torch.compile(model, backend="mom", options={"mini_seq_len": 16, "strict": True})
    with torch.no_grad():
        for tokens in (45, 70):
            given = ids(1, tokens)
            torch.testing.assert_close(compiled(given), whole(given), rtol=1e-5, atol=1e-5)
    first, second = mom_compile.reports()
    assert not first.eager_pieces and first.bodies_shared >= 6
    assert not second.compiled_pieces


@pytest.mark.parametrize(("tokens", "exposed"), [(32, 0), (24, 1)])
def test_the_report_counts_collectives_and_how_many_are_hidden(one_rank: None, tokens: int, exposed: int) -> None:
    """Two collectives in each mini-sequence of 8. The last of an odd number of them is alone during its second."""

    def norms(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return reduced(reduced(x @ w).sin() @ w) + x

    gm = trace(norms, torch.randn(tokens, 16), torch.randn(16, 16))
    _, report = rewrite(gm, 8, ("w_1",))
    found = report.communication
    assert found is not None and found.in_loops == tokens // 4
    assert found.bytes_per_token == 2 * 16 * 4 and found.outside == 0
    assert found.hidden == found.in_loops - exposed
    assert str(found) in str(report) and str(found) in "".join(report.details())


# --- parts of a body ---


def typed(node: fx.Node, *shape: Any) -> fx.Node:
    node.meta["type"] = TensorType(shape, torch.float32, torch.device("cpu"))
    return node


def test_cheap_values_and_writes_are_in_the_parts_that_need_them() -> None:
    """`angles` is computed in the part that reads it, and the write of `x` follows the last read of its place."""
    graph = fx.Graph()
    start, count = graph.placeholder("start"), graph.placeholder("count")
    x, w = typed(graph.placeholder("x"), COUNT, 8), typed(graph.placeholder("w"), 8, 8)
    angles = typed(graph.call_function(aten.cos.default, (x,)), COUNT, 8)
    hidden = typed(graph.call_function(aten.mm.default, (x, w)), COUNT, 8)
    total = typed(graph.call_function(ALL_REDUCE, (hidden, "sum", "group")), COUNT, 8)
    turned = typed(graph.call_function(aten.mul.Tensor, (total, angles)), COUNT, 8)
    place = typed(graph.placeholder("place"), COUNT, 8)
    graph.call_function(aten.copy_.default, (place, hidden))
    graph.call_function(aten.copy_.default, (x, turned))
    graph.output(())
    body = BodyParts(graph)
    first, second = body.parts
    assert [node.target for node in first.nodes] == [aten.mm.default, aten.copy_.default]
    assert [node.target for node in second.nodes] == [aten.cos.default, aten.mul.Tensor, aten.copy_.default]
    assert first.outputs == (hidden,) and second.inputs == (x, total)
    assert {start, count}.isdisjoint(first.inputs)
    assert body.owns_operand(0), "nothing reads it after the collective: it is reduced in place"
    assert body.crossing(0) == [total]


@pytest.mark.parametrize(("read_later", "product"), [(False, True), (True, True), (False, False)])
def test_a_collective_replaces_its_operand_only_if_that_is_a_buffer_of_its_own(read_later: bool, product: bool) -> None:
    graph = fx.Graph()
    graph.placeholder("start"), graph.placeholder("count")
    x, w = typed(graph.placeholder("x"), COUNT, 8), typed(graph.placeholder("w"), 8, 8)
    made = graph.call_function(*((aten.mm.default, (x, w)) if product else (aten.mul.Tensor, (x, 1.0))))
    viewed = typed(graph.call_function(aten.view.default, (typed(made, COUNT, 8), [-1, 2, 4])), COUNT, 2, 4)
    total = typed(graph.call_function(ALL_REDUCE, (viewed, "sum", "group")), COUNT, 2, 4)
    last = graph.call_function(aten.add.Tensor, (total, viewed if read_later else 1.0))
    graph.output((typed(last, COUNT, 2, 4),))
    assert BodyParts(graph).owns_operand(0) is (product and not read_later)


@pytest.mark.parametrize("viewed", [False, True])
def test_a_collective_reads_rows_before_they_are_overwritten(viewed: bool) -> None:
    graph = fx.Graph()
    graph.placeholder("start"), graph.placeholder("count")
    x, w = typed(graph.placeholder("x"), COUNT, 8), typed(graph.placeholder("w"), 8, 8)
    product = typed(graph.call_function(aten.mm.default, (x, w)), COUNT, 8)
    rows = typed(graph.call_function(aten.view.default, (x, [-1, 8])), COUNT, 8) if viewed else x
    total = typed(graph.call_function(ALL_REDUCE, (rows, "sum", "group")), COUNT, 8)
    place = typed(graph.placeholder("place"), COUNT, 8)
    graph.call_function(aten.copy_.default, (place, total))
    over = graph.call_function(aten.copy_.default, (x, product))
    graph.output(())
    first, second = BodyParts(graph).parts
    assert over not in first.nodes and over in second.nodes


def loop_of(graph: fx.Graph, *inputs: Any) -> Loop:
    body = graph_module(torch.nn.Module(), graph)
    return Loop(0, 40, 8, inputs, (), body, widest=1)


@pytest.mark.parametrize("crosses", [True, False])
def test_a_carry_across_a_collective_keeps_mini_sequences_apart(crosses: bool) -> None:
    graph = fx.Graph()
    graph.placeholder("start"), graph.placeholder("count")
    carry = typed(graph.placeholder("carry"), 8)
    added = typed(graph.call_function(aten.add.Tensor, (carry, carry)), 8)
    total = typed(graph.call_function(ALL_REDUCE, (added, "sum", "group")), 8)
    graph.output((total if crosses else added,))
    loop = loop_of(graph, CarryIn(carry.meta["type"], 0))
    assert may_overlap(loop) is not crosses
    assert second_in_flight(loop) == 8 * 4


def test_the_memory_of_a_second_mini_sequence_is_planned(one_rank: None) -> None:
    """What crosses a collective exists twice: the reduced rows, and the input's rows are the caller's."""

    def norms(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return reduced(reduced(x @ w).sin() @ w) + x

    gm = trace(norms, torch.randn(40, 16), torch.randn(16, 16))
    (_, report), (_, one) = rewrite(gm, 8, ("w_1",)), rewrite(gm, 8, ("w_1",), overlap_collectives=False)
    (loop,), (alone,) = loops_of(report), loops_of(one)
    assert (loop.in_flight, alone.in_flight) == (2, 1)
    assert second_in_flight(loop) == COUNT * 16 * 4
    assert report.memory.number(report.memory.peak) - one.memory.number(one.memory.peak) == 8 * 16 * 4


# --- turns ---


def body_of(parts: int, in_flight: int, run: Any) -> PartedBody:
    """A body of `parts` parts of one value: `run(part, mini-sequence)`."""
    steps: list[Any] = []
    for part in range(parts):

        def computed(taken: list[Any], part: int = part) -> tuple[Any]:
            run(part, taken[0])
            return (taken[0],)

        steps.append(RunPart(computed, (part,), (part,), ()))
        if part + 1 < parts:
            steps.append(Collective("all_reduce", ("sum", "group"), part, part + 1, ()))
    return PartedBody(tuple(steps), parts, in_flight)


def test_two_mini_sequences_take_turns() -> None:
    """The next one begins in the turn in which one finishes; a collective is waited for one turn after it began."""
    events: list[str] = []
    body = body_of(3, 2, lambda part, one: events.append(f"{one}{part}"))
    with (
        mock.patch.object(parted, "begin_collective", lambda name, value, *_: value),
        mock.patch.object(parted.WAITED, "wait", lambda value: events.append(f"wait {value}")),
    ):
        run_in_turns((body.turns([one]) for one in "ABC"), 2)
    assert events == [
        "A0", "B0", "wait A", "A1", "wait B", "B1",
        "wait A", "A2", "C0", "wait B", "B2", "wait C", "C1", "wait C", "C2",
    ]  # fmt: skip


def test_one_at_a_time_runs_each_to_its_end() -> None:
    events: list[str] = []
    body = body_of(2, 1, lambda part, one: events.append(f"{one}{part}"))
    with (
        mock.patch.object(parted, "begin_collective", lambda name, value, *_: value),
        mock.patch.object(parted.WAITED, "wait"),
    ):
        run_in_turns((body.turns([one]) for one in "AB"), 1)
    assert events == ["A0", "A1", "B0", "B1"]


@pytest.mark.parametrize(("in_flight", "ratio"), [(2, 1.0), (1, 1.5)])
def test_a_collective_is_hidden_by_the_next_mini_sequence(in_flight: int, ratio: float) -> None:
    """Two parts of 1 s each by a clock of the test, and a collective that takes half a mini-sequence's time."""
    clock, count = [0.0], 16

    def run(part: int, one: Any) -> None:
        clock[0] += 1

    def wait(ready: float) -> None:
        clock[0] = max(clock[0], ready)

    with (
        mock.patch.object(parted, "begin_collective", side_effect=lambda *_: clock[0] + 1),
        mock.patch.object(parted.WAITED, "wait", wait),
    ):
        run_in_turns((body_of(2, in_flight, run).turns([None]) for _ in range(count)), in_flight)
    assert clock[0] / (2 * count) == ratio
