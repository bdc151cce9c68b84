"""Rows that are written where a mask is true, such as image embeddings among those of text, are written in loops."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import pytest
import torch

import mom_compile
from mom_passes.loops.loop import loop_nodes
from mom_passes.tokens.masked_rows import masked_rows
from tests.captured import capture
from tests.programs import HIDDEN, STEPS, Weighted, weights_of
from tests.test_properties import parameter_names
from tests.tracing import rewrite, trace

aten = torch.ops.aten
Merge = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def scattered(x: torch.Tensor, mask: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    return x.masked_scatter(mask.unsqueeze(-1).expand_as(x), source)


def scattered_once_inverted(x: torch.Tensor, mask: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    return x.masked_scatter(~(~mask)[..., None].expand_as(x).clone(), source[None])


def scattered_as_on_a_gpu(x: torch.Tensor, mask: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    with mock.patch("torch._inductor.codegen.common.has_backend_feature", return_value=True):
        return scattered(x, mask, source)


def put(x: torch.Tensor, mask: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    return aten.index_put(x, [mask], source[:SOURCE_ROWS])


def added(x: torch.Tensor, mask: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    return aten.index_put(x, [mask], source[:SOURCE_ROWS], True)


def put_everywhere(x: torch.Tensor, mask: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    return aten.index_put(x, [mask], source[:1])


SOURCE_ROWS = 7
MERGES: dict[str, Merge] = {
    "scattered": scattered,
    "scattered, mask inverted": scattered_once_inverted,
    "scattered as on a GPU": scattered_as_on_a_gpu,
    "put": put,
    "added": added,
    "one row put": put_everywhere,
}


def given(batch: int, tokens: int = 18, rows: int = SOURCE_ROWS, ones: int = SOURCE_ROWS) -> list[torch.Tensor]:
    """Values `[B, S, H]`, a mask `[B, S]` with so many ones, and source rows `[N, H]`."""
    generator = torch.Generator().manual_seed(batch)
    x, source = (torch.randn(*shape, HIDDEN, generator=generator).double() for shape in ((batch, tokens), (rows,)))
    mask = torch.zeros(batch * tokens, dtype=torch.bool)
    mask[torch.randperm(batch * tokens, generator=generator)[:ones]] = True
    return [x, mask.view(batch, tokens), source]


def between_layers(merge: Merge) -> Callable[..., torch.Tensor]:
    def run(x: torch.Tensor, mask: torch.Tensor, source: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        w = weights_of(torch.float64).__class__(*parameters)
        x = merge(STEPS["mlp"](x, w), mask, source)
        return STEPS["mlp"](STEPS["causal"](x, w), w)

    return run


@pytest.mark.parametrize(("batch", "dynamic"), [(1, False), (3, True)])
@pytest.mark.parametrize("name", MERGES)
def test_rows_are_written_in_a_loop(name: str, batch: int, dynamic: bool) -> None:
    inputs, weights = given(batch), weights_of(torch.float64)
    run = between_layers(MERGES[name])
    gm = trace(run, *inputs, *weights, dynamic=dynamic)
    rewritten, report = rewrite(gm, 4, parameter_names(gm)[2:])
    assert not report.left_out
    assert len(loop_nodes(rewritten)) == 2, "the write must be no barrier"
    torch.testing.assert_close(rewritten(*inputs, *weights), run(*inputs, *weights), rtol=0, atol=1e-10)


def test_a_mask_that_is_an_expanded_input_is_one_of_rows() -> None:
    x, mask, source = given(2)
    inputs = (x, mask[..., None].expand_as(x), source)
    gm = trace(lambda x, mask, source: x.masked_scatter(mask, source), *inputs)
    assert len(masked_rows(gm)) == 1
    assert torch.equal(gm(*inputs), x.masked_scatter(*inputs[1:]))


def test_a_mask_that_differs_within_rows_stays() -> None:
    x, _, source = given(2)
    inputs = (x, x > 2, source)
    gm = trace(lambda x, mask, source: x.masked_scatter(mask, source), *inputs)
    assert not masked_rows(gm)
    assert torch.equal(gm(*inputs), x.masked_scatter(*inputs[1:]))


@pytest.mark.parametrize(("rows", "ones"), [(7, 0), (7, 3), (0, 0), (1, 1), (2, 1)])
def test_sources_may_be_longer_or_empty(rows: int, ones: int) -> None:
    inputs = given(2, rows=rows, ones=ones)
    gm = trace(scattered, *inputs)
    assert len(masked_rows(gm)) == (rows > 0)
    assert torch.equal(gm(*inputs), scattered(*inputs))


@pytest.mark.parametrize(("merge", "rows"), [(scattered, 6), (scattered, 0), (put, 6)])
def test_too_few_rows_are_an_error(merge: Merge, rows: int) -> None:
    inputs = given(2, rows=rows)
    gm = trace(merge, *inputs)
    masked_rows(gm)
    with pytest.raises(RuntimeError):
        merge(*inputs)
    with pytest.raises(RuntimeError, match=r"source|shape mismatch"):
        gm(*inputs)


def test_too_many_rows_to_put_are_an_error() -> None:
    x, mask, source = given(2, ones=5)
    gm = trace(put, x, mask, source)
    masked_rows(gm)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        gm(x, mask, source)


def add_visual(x: torch.Tensor, mask: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """As Qwen3-VL adds features of deeper layers of its vision tower."""
    x = x.clone()
    x[mask, :] = x[mask, :] + source
    return x


def test_rows_that_are_read_written_and_added_to_depend_on_no_size_of_data() -> None:
    x, mask, source = given(2)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        captured = capture(lambda x, mask, source: add_visual(x, mask, source) * 2, x=x, mask=mask, source=source)
    assert len(masked_rows(captured.gm)) == 1
    indices = [n.args[1] for n in captured.gm.graph.find_nodes(op="call_function", target=aten.index.Tensor)]
    assert all(one.meta["val"].dtype is torch.int64 for (one,) in indices)
    assert torch.equal(captured.gm(*captured.inputs)[0], add_visual(x, mask, source) * 2)


@pytest.mark.usefixtures("eager_pieces", "stock_is_eager")
def test_layers_after_such_rows_run_in_loops() -> None:
    run, inputs, weights = between_layers(add_visual), given(2), weights_of(torch.float64)
    with torch.no_grad(), torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        fast = torch.compile(run, backend="mom", options={"strict": True, "mini_seq_len": 4})
        torch.testing.assert_close(fast(*inputs, *weights), run(*inputs, *weights), rtol=0, atol=1e-10)
    (report,) = mom_compile.reports()
    assert len(report.stages) == 2 and not report.left_out


@pytest.mark.parametrize(
    ("mask", "replaced"),
    [(torch.tensor([True, False, True]), 1), (torch.tensor([[True, False]] * 3), 1), (torch.tensor([0, 2, 2]), 0)],
)
def test_a_masked_write_of_one_number_becomes_where(mask: torch.Tensor, replaced: int) -> None:
    def masked(x: torch.Tensor, mask: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
        return aten.index_put(x, [mask], number)

    inputs = (torch.randn(3, 2), mask, torch.tensor(7.0))
    gm = trace(masked, *inputs)
    assert len(masked_rows(gm)) == replaced
    assert len(gm.graph.find_nodes(op="call_function", target=aten.where.self)) == replaced
    torch.testing.assert_close(gm(*inputs), masked(*inputs))


def test_compiled_writes_are_right_and_raise() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.run = Weighted(lambda x, *parameters: x)

        def forward(self, x: torch.Tensor, mask: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
            return between_layers(scattered)(x, mask, source, *self.run.parameters())

    model = Model()
    fast = torch.compile(model, backend="mom", options={"strict": True, "mini_seq_len": 4})
    inputs = [one.float() if one.is_floating_point() else one for one in given(2)]
    with torch.no_grad():
        torch.testing.assert_close(fast(*inputs), model(*inputs), rtol=1e-5, atol=1e-5)
        (report,) = mom_compile.reports()
        assert report.stages and not report.left_out and not report.eager_pieces
        with pytest.raises(RuntimeError, match="source"):
            fast(inputs[0], torch.ones_like(inputs[1]), inputs[2])
