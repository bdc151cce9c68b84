"""Causal convolutions are computed inside the loops, and so are the states that a cache keeps of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st

import mom_compile
from mom_passes.loops.loop import loop_nodes
from mom_passes.loops.ports import CarryOut
from mom_passes.ops.convolution import LAST_ROWS
from mom_passes.tokens.causal_convolutions import causal_convolutions
from tests.programs import HIDDEN, STEPS, Weights, weights_of
from tests.shares import random_examples
from tests.test_properties import RANDOM_PROGRAMS, parameter_names
from tests.tracing import Weighted, rewrite, trace

aten = torch.ops.aten


def depthwise(w: Weights, kernel: int) -> torch.Tensor:
    return w.square[:kernel, :HIDDEN].t()[:, None]


def cut_off(x: torch.Tensor, w: Weights) -> torch.Tensor:
    """As Mamba does it: padding at both ends, and the rows after the last one cut off."""
    rows = F.conv1d(x.transpose(1, 2), depthwise(w, 4), w.square[4], padding=3, groups=HIDDEN)
    return x + F.silu(rows[..., : x.shape[1]]).transpose(1, 2)


def padded(x: torch.Tensor, w: Weights) -> torch.Tensor:
    """Zeros ahead, and a convolution without padding. Here it is dilated, and mixes the channels."""
    weight = torch.stack([w.square, w.square.t(), w.square], 2)
    return x + F.conv1d(F.pad(x.transpose(1, 2), (4, 0)), weight / 8, dilation=2).transpose(1, 2)


CONVOLUTIONS = {"cut off": cut_off, "padded": padded}


def program(names: list[str], keeps: bool = False) -> Any:
    def run(x: torch.Tensor, *parameters: torch.Tensor) -> tuple[torch.Tensor, ...]:
        w, kept = Weights(*parameters), []
        for name in names:
            if name in CONVOLUTIONS and keeps:
                kept.append(F.pad(x.transpose(1, 2), (4 - x.shape[1], 0)))
            x = {**STEPS, **CONVOLUTIONS}[name](x, w)
        return (torch.tanh(x), *kept)

    return run


@random_examples(
    8,
    80,
    RANDOM_PROGRAMS,
    st.lists(
        st.sampled_from([*CONVOLUTIONS, *CONVOLUTIONS, "linear", "mlp", "causal", "rope"]), min_size=1, max_size=5
    ),
    st.sampled_from(sorted(CONVOLUTIONS)),
    st.integers(9, 23),
    st.integers(2, 7),
    st.booleans(),
    st.booleans(),
)
def test_any_program_keeps_its_meaning(
    names: list[str], last: str, tokens: int, mini: int, keeps: bool, dynamic: bool
) -> None:
    """Mini-sequences shorter than the kernel are among them. Every convolution is in a loop."""
    weights = weights_of(torch.float64)
    x = torch.randn(2, tokens, HIDDEN, generator=torch.Generator().manual_seed(tokens), dtype=torch.float64)
    gm = trace(program(["mlp", *names, last, "mlp"], keeps), x, *weights, dynamic=dynamic)
    rewritten, report = rewrite(gm, mini, parameter_names(gm))
    assert not any("conv" in name for name in report.left_out), report.left_out
    assert any(module.loop.carries for _, module in loop_nodes(rewritten))
    for expected, actual in zip(gm(x, *weights), rewritten(x, *weights), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dynamic", [False, True], ids=["fixed", "dynamic"])
def test_layers_of_convolutions_are_one_loop_that_returns_their_states(dynamic: bool) -> None:
    """Nothing exists at full length but the result. A state is the last value of a carry."""
    weights = weights_of(torch.float64)
    x = torch.randn(2, 33, HIDDEN, dtype=torch.float64)
    gm = trace(program(["mlp", "cut off"] * 3, keeps=True), x, *weights, dynamic=dynamic)
    rewritten, report = rewrite(gm, 4, parameter_names(gm))
    ((_, module),) = loop_nodes(rewritten)
    assert len(module.loop.stored) == 1 and not report.left_out
    assert [type(output) for output in module.loop.outputs].count(CarryOut) == 3


@pytest.mark.parametrize(
    "convolution",
    [
        lambda x, w: F.conv1d(x.transpose(1, 2), depthwise(w, 3), padding=1, groups=HIDDEN),
        lambda x, w: F.conv1d(x.transpose(1, 2), depthwise(w, 4), padding=3, groups=HIDDEN),
        lambda x, w: F.conv1d(x.transpose(1, 2), depthwise(w, 4), padding=3, groups=HIDDEN)[..., 1 : 1 + x.shape[1]],
        lambda x, w: F.conv1d(F.pad(x.transpose(1, 2), (2, 1)), depthwise(w, 4), groups=HIDDEN),
        lambda x, w: F.conv1d(F.pad(x.transpose(1, 2), (3, 0), value=1.0), depthwise(w, 4), groups=HIDDEN),
        lambda x, w: F.conv1d(F.pad(x.transpose(1, 2), (4, 0)), depthwise(w, 4), groups=HIDDEN),
        lambda x, w: F.conv1d(F.pad(x.transpose(1, 2), (3, 0)), depthwise(w, 4), groups=HIDDEN, stride=2),
    ],
    ids=["looks ahead", "keeps the tail", "cuts the head", "pads both ends", "pads with ones", "pads more", "strided"],
)
def test_a_convolution_that_is_not_causal_stays(convolution: Any) -> None:
    weights = weights_of(torch.float64)
    gm = trace(lambda x, *p: (convolution(x, Weights(*p)),), torch.randn(2, 9, HIDDEN, dtype=torch.float64), *weights)
    assert causal_convolutions(gm) == []


def test_a_kernel_of_one_row_is_in_the_loop() -> None:
    weights = weights_of(torch.float64)

    def run(x: torch.Tensor, *p: torch.Tensor) -> tuple[torch.Tensor, ...]:
        w = Weights(*p)
        return (STEPS["mlp"](x + F.conv1d(STEPS["mlp"](x, w).mT, w.square[..., None], w.bias).mT, w),)

    x = torch.randn(2, 33, HIDDEN, dtype=torch.float64)
    gm = trace(run, x, *weights)
    rewritten, report = rewrite(gm, 4, parameter_names(gm))
    assert len(loop_nodes(rewritten)) == 1 and not report.left_out
    torch.testing.assert_close(rewritten(x, *weights)[0], gm(x, *weights)[0], rtol=0, atol=1e-10)


def test_a_pad_that_crops_features_is_in_the_loop() -> None:
    weights = weights_of(torch.float64)

    def run(x: torch.Tensor, *p: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = STEPS["mlp"](x, Weights(*p))
        return (STEPS["mlp"](x + F.pad(x, (-4, 0)).repeat(1, 1, 2), Weights(*p)),)

    x = torch.randn(2, 33, HIDDEN, dtype=torch.float64)
    gm = trace(run, x, *weights)
    rewritten, report = rewrite(gm, 4, parameter_names(gm))
    assert len(loop_nodes(rewritten)) == 1 and not report.left_out
    torch.testing.assert_close(rewritten(x, *weights)[0], gm(x, *weights)[0], rtol=0, atol=1e-10)


def test_a_convolution_of_folded_rows_is_in_the_loop() -> None:
    """Each row is a batch entry of the convolution, which goes over its features. The kernel holds padded rows."""
    weights = weights_of(torch.float64)

    def run(x: torch.Tensor, *p: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = STEPS["mlp"](x, Weights(*p))
        rows = F.conv1d(F.pad(x.reshape(-1, 1, HIDDEN), (3, 0)), Weights(*p).square[:1, None, :4])
        return (STEPS["mlp"](x + rows.reshape(x.shape), Weights(*p)),)

    x = torch.randn(2, 33, HIDDEN, dtype=torch.float64)
    gm = trace(run, x, *weights)
    rewritten, report = rewrite(gm, 4, parameter_names(gm))
    assert len(loop_nodes(rewritten)) == 1 and not report.left_out
    torch.testing.assert_close(rewritten(x, *weights)[0], gm(x, *weights)[0], rtol=0, atol=1e-10)


def test_a_state_of_a_prompt_shorter_than_the_kernel_has_zeros_ahead() -> None:
    x = torch.randn(2, 3, 2)
    expected = F.pad(x, (3, 0))[..., -4:]
    assert torch.equal(torch.ops.mom.last_rows(torch.zeros(2, 3, 4), x, 2), expected)


def test_a_pad_that_keeps_many_rows_stays() -> None:
    gm = trace(lambda x: (F.pad(x, (-3, 0)),), torch.randn(2, 4, 9))
    assert causal_convolutions(gm) == []


@pytest.mark.parametrize("captured", [3, 9])
def test_a_pad_by_a_symbolic_size_is_a_state(captured: int) -> None:
    """Also if the captured prompt is shorter than the kernel."""
    gm = trace(lambda x: (F.pad(x, (4 - x.shape[2], 0)),), torch.randn(2, 4, captured), dynamic=True)
    (state,) = causal_convolutions(gm)
    assert state.target is LAST_ROWS
    for tokens in (2, 4, 9, 30):
        x = torch.randn(2, 4, tokens)
        assert torch.equal(gm(x)[0], F.pad(x, (4 - tokens, 0)))


def test_a_state_of_as_many_rows_as_the_captured_prompt(eager_pieces: None) -> None:
    """The last three rows are dense for three tokens only. Other lengths share the graph."""

    def run(x: torch.Tensor, *p: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = STEPS["mlp"](x, Weights(*p))
        state = torch.zeros_like(x.mT[..., -3:]).copy_(x.mT[..., -3:])
        return STEPS["mlp"](x, Weights(*p)), state

    model = Weighted(run)
    compiled = torch.compile(model, backend="mom", options={"strict": True, "mini_seq_len": 8}, dynamic=True)
    for tokens in (3, 5, 40):
        x = torch.randn(2, tokens, HIDDEN, generator=torch.Generator().manual_seed(tokens))
        with torch.no_grad():
            for expected, actual in zip(model(x), compiled(x), strict=True):
                torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_convolutions_compile_for_every_length() -> None:
    """Outside of loops, too: the last length is one mini-sequence."""
    model = Weighted(program(["mlp", "cut off", "causal", "padded", "mlp"], keeps=True))
    compiled = torch.compile(model, backend="mom", options={"strict": True, "mini_seq_len": 8})
    for tokens in (41, 64, 18, 9):
        x = torch.randn(2, tokens, HIDDEN, generator=torch.Generator().manual_seed(tokens))
        with torch.no_grad():
            for expected, actual in zip(model(x), compiled(x), strict=True):
                torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert not any(report.left_out or report.eager_pieces for report in mom_compile.reports())
