"""Overlapping outputs share a storage, and custom operators get the strides of eager mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

import mom_compile
from mom_passes.loops.shared_views import shared_views
from tests.captured import capture
from tests.programs import HIDDEN, STEPS, Weights, heads, weights_of
from tests.writes_seen import bytes_held, writes_seen

OPTIONS = {"strict": True, "mini_seq_len": 8}
W = weights_of(torch.float32)
HALF = HIDDEN // 2

#: Outputs of hidden states, each of which shares elements with another.
SHARED: dict[str, Callable[[torch.Tensor], Any]] = {
    "channels": lambda h: (h, h[..., :HALF]),
    "a piece of a split": lambda h: (h, h.chunk(2, -1)[1]),
    "an entry": lambda h: (h, h[0]),
    "an entry of a new dimension": lambda h: (h, h.unsqueeze(0)[0]),
    "a head": lambda h: (h, heads(h)[:, 0]),
    "every other channel": lambda h: (h, h[..., ::2]),
    "later tokens": lambda h: (h, h[:, 1:]),
    "heads": lambda h: (h, heads(h)),
    "overlapping channels": lambda h: (h[..., : HALF + 1], h[..., HALF:]),
    "channels of channels": lambda h: (h[..., :HALF], h[..., :HALF][..., 1:]),
    "last tokens and their channels": lambda h: (h[:, -20:], h[:, -30:, :HALF]),
    "all tokens together": lambda h: (h.view(-1, HIDDEN), h, h.view(-1, HIDDEN)[:, 2:]),
    "three": lambda h: (h[..., 0], h.mT[:, 0], h[..., HALF:]),
}
#: Outputs without common elements.
APART: dict[str, Callable[[torch.Tensor], Any]] = {
    "pieces of a split": lambda h: h.split(HALF, -1),
    "halves": lambda h: (h[..., :HALF], h[..., HALF:]),
    "heads": lambda h: (heads(h)[:, 0], heads(h)[:, 1]),
    "channels of one half": lambda h: (h[..., :2], h[..., 2:HALF]),
}


def hidden(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
    w = Weights(*parameters)
    for step in ("linear", "causal", "mlp"):
        x = STEPS[step](x, w)
    return x


def given(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 41, HIDDEN, generator=torch.Generator().manual_seed(0))


def outputs(backend: str, form: Callable[[torch.Tensor], Any], **how: Any) -> list[torch.Tensor]:
    """The outputs of the program, as it is or compiled."""

    def run(x: torch.Tensor, *parameters: torch.Tensor) -> Any:
        return form(hidden(x, *parameters))

    torch._dynamo.reset()
    compiled = torch.compile(run, backend=backend, options=OPTIONS, **how) if backend == "mom" else run
    with torch.no_grad():
        returned = tree_leaves(compiled(given(), *W))
    if backend == "mom":
        (report,) = mom_compile.reports()
        assert report.stages
    return returned


@pytest.mark.parametrize(
    ("name", "dynamic"), [*((name, False) for name in SHARED), *((name, True) for name in tuple(SHARED)[::4])]
)
def test_overlapping_outputs_share_a_storage(name: str, dynamic: bool, eager_pieces: None) -> None:
    expected, actual = outputs("eager", SHARED[name]), outputs("mom", SHARED[name], dynamic=dynamic)
    torch.testing.assert_close(actual, expected)
    assert bytes_held(actual) <= bytes_held(expected)
    assert any(writes_seen(expected)) and writes_seen(actual) == writes_seen(expected)


@pytest.mark.parametrize("name", APART)
def test_disjoint_outputs_hold_only_their_rows(name: str, eager_pieces: None) -> None:
    """The value that they are cut from need not exist."""
    expected, actual = outputs("eager", APART[name]), outputs("mom", APART[name])
    torch.testing.assert_close(actual, expected)
    assert not any(writes_seen(actual)) and not any(writes_seen(expected))
    assert bytes_held(actual) == sum(value.nbytes for value in actual)


def test_compiled_views_of_one_value_share_a_storage() -> None:
    def form(h: torch.Tensor) -> Any:
        return h, h[..., :HALF], heads(h)[:, 1], h[:, -1]

    expected, actual = outputs("eager", form), outputs("mom", form)
    torch.testing.assert_close(actual, expected)
    assert writes_seen(actual) == writes_seen(expected)
    assert bytes_held(actual) == bytes_held(expected)


def test_disjoint_views_of_equal_views_are_recognised() -> None:
    """Equal views are separate nodes, whose parts are still compared."""
    gm = capture(lambda x: ((y := x * 2).view(2, 41, 2, -1)[:, :, 0], y.view(2, 41, 2, -1)[:, :, 1]), x=given()).gm
    assert not shared_views(gm)


@torch.library.custom_op("mom_shared::strides_of", mutates_args=())
def strides_of(x: torch.Tensor) -> torch.Tensor:
    return torch.tensor(x.stride())


@strides_of.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty(x.dim(), dtype=torch.int64)


#: Operands of a custom operator.
OPERANDS: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (
    lambda h: h,
    lambda h: h[..., :4],
    lambda h: h.chunk(2, -1)[1],
    lambda h: h[:, 1:],
    lambda h: h[:, -1],
    lambda h: h.expand(2, -1, -1)[..., :4],
    lambda h: heads(h)[:, 0],
    lambda h: h.mT,
    lambda h: h.mT.contiguous(),
    lambda h: torch.relu(heads(h)),
    lambda h: h[:, :, None].expand(-1, -1, 2, -1),
    lambda h: torch.cat([h, h], 1),
)


@pytest.mark.parametrize("dynamic", [False, True], ids=["fixed", "any length"])
def test_custom_operators_get_the_strides_of_eager_mode(dynamic: bool, eager_pieces: None) -> None:
    def run(x: torch.Tensor, *parameters: torch.Tensor) -> Any:
        h = hidden(x, *parameters)
        return [strides_of(operand(h)) for operand in OPERANDS], hidden(h, *parameters)

    compiled = torch.compile(run, backend="mom", options=OPTIONS, dynamic=dynamic)
    with torch.no_grad():
        (found, _), (expected, _) = compiled(given(1), *W), run(given(1), *W)
    assert [one.tolist() for one in found] == [one.tolist() for one in expected]
