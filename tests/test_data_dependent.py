"""Numbers that depend on data leave the loops as they are, if they are checked, returned or sizes of small results."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from mom_compile import reports
from mom_passes.graph.data_dependent import touches_unknown_numbers
from mom_passes.ops.spans import SPANS
from mom_passes.program.program import Compute
from mom_passes.program.schedule import schedule
from tests.programs import ATTENTION, HIDDEN, ROWWISE, weights_of
from tests.tracing import trace

W = weights_of(torch.float64)
MINI = {"mini_seq_len": 8, "strict": True}


def block(x: torch.Tensor) -> torch.Tensor:
    return ROWWISE["mlp"](ATTENTION["causal"](x, W), W)


def values(tokens: int = 40) -> torch.Tensor:
    return torch.randn(2, tokens, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(tokens))


@pytest.fixture(autouse=True)
def captured() -> Iterator[None]:
    """Dynamo breaks no graph where a number is read, or where sizes depend on data."""
    with torch._dynamo.config.patch(capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True):
        yield


def returned(x: torch.Tensor) -> Any:
    y = block(block(x))
    return y, y.sum().item(), (y[0, :, 0] > 0).sum().item() + 1


def checked(x: torch.Tensor) -> Any:
    count = (x[0, :, 0] < 1e6).sum().item()
    torch._check(count >= x.shape[1])
    return block(block(x))


def checked_between_layers(x: torch.Tensor) -> Any:
    y = block(x)
    torch._check((y < 1e6).all().item())
    return block(y)


def size_of_results(x: torch.Tensor) -> Any:
    count = (x[0, :, 0] > 0).sum().item()
    torch._check(count >= 0)
    return block(block(x)), torch.zeros(count), torch.arange(count) * 2 + 1


def factor_of_the_result(x: torch.Tensor) -> Any:
    return torch.relu(block(block(x)) * (x[0, :, 0] > 0).sum().item()) + 1


def found_entries(x: torch.Tensor) -> Any:
    y = block(block(x))
    return y, (y[0, :, 0] > 0).nonzero()


def counted_entries(x: torch.Tensor) -> Any:
    y = block(x)
    found = y[y[..., 0] > 0]
    torch._check(found.numel() <= y.numel())
    return block(y), found.relu().sum()


def unique_values(x: torch.Tensor) -> Any:
    return block(block(x)), *torch.unique((x[..., 0] * 3).to(torch.int64), return_counts=True)


CHECKED = [checked, checked_between_layers]
OTHERS = [returned, size_of_results, counted_entries]
SLOW = [pytest.param(one, marks=pytest.mark.slow) for one in (factor_of_the_result, found_entries, unique_values)]


@pytest.mark.usefixtures("eager_pieces", "stock_is_eager")
@pytest.mark.parametrize("program", [*CHECKED, *OTHERS, *SLOW])
def test_a_graph_with_numbers_that_depend_on_data_has_loops(program: Callable[..., Any]) -> None:
    """One that is captured for a length, and one for all lengths."""
    fast = torch.compile(program, backend="mom", options=MINI)
    with torch.no_grad():
        for tokens in (40, 61):
            torch.testing.assert_close(fast(values(tokens)), program(values(tokens)), rtol=1e-9, atol=1e-9)
        assert len(reports()) == 2
        assert all(report.stages and not report.work_outside for report in reports())
        if program in CHECKED:
            with pytest.raises(RuntimeError):
                fast(values() + 1e9)


@pytest.mark.slow
def test_numbers_that_depend_on_data_beside_compiled_pieces() -> None:
    def program(x: torch.Tensor) -> Any:
        return *size_of_results(x), counted_entries(x), x.sum().item()

    fast = torch.compile(program, backend="mom", options=MINI, dynamic=True)
    with torch.no_grad():
        for tokens in (40, 61):
            torch.testing.assert_close(fast(values(tokens)), program(values(tokens)), rtol=1e-9, atol=1e-9)
    (report,) = reports()
    assert report.stages and not report.eager_pieces


def test_nothing_compiled_takes_or_returns_sizes_that_depend_on_data() -> None:
    gm = trace(lambda x: torch.relu(torch.relu(x).nonzero() + 1).sum() * 2, torch.randn(3, 4), dynamic=True)
    steps = schedule(gm).steps
    called = [step.name for step in steps if any(map(touches_unknown_numbers, step.nodes))]
    assert called == ["nonzero", "add", "relu_1", "sum_1"]
    assert [len(step.nodes) for step in steps if isinstance(step, Compute)] == [1, 1]


def test_ranges_of_keys_have_a_batch_that_depends_on_data() -> None:
    """Images without their padding: `pixels[real]` and the patches of each."""
    with FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True) as mode:
        assert mode.shape_env is not None
        shown = torch.ones(mode.shape_env.create_unbacked_symint(), 5, dtype=torch.bool)
        assert SPANS(shown, None, None).shape[0] == shown.shape[0]
