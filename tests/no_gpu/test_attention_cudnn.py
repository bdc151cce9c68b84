"""Attention on Hopper and later: cuDNN for keys before a mini-sequence, flash for keys near it. No GPU is used.

chooses     the result of `way_of` for devices, versions and calls
computes    with stand-ins for both kernels, and blocks of keys so small that there are many
calls       on tensors without data, at the size of prefills: shapes, strides, bytes
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from mom_compile.memory.attention import ATTENTION, own_bytes
from mom_compile.runtime.attention import cudnn as attention_cudnn
from mom_compile.runtime.attention import ways
from mom_compile.runtime.attention.cuda import attention_cuda
from mom_compile.runtime.attention.cudnn import BLOCK, ROWS, blocks_before
from mom_compile.runtime.attention.merging import merge
from mom_compile.runtime.attention.ways import Way, way_of
from mom_passes.ops.attention import AttentionCall, attention_reference
from tests.no_gpu import attention as stand_ins
from tests.no_gpu.attention import Calls, kernels_of_pytorch, log_sum_exp, on_device
from tests.test_attention_kernels import CONDITIONS, TOLERANCE, Case, in_float64

HALF = torch.bfloat16


@pytest.fixture(scope="module", autouse=True)
def hopper() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        on_device(patch, (9, 0))
        yield


# --- chooses ---

HEADS, GROUPS, CHANNELS = 32, 8, 128


def prefill(
    start: int, rows: int, *, batch: int = 1, after: int = 0, dtype: torch.dtype = HALF, channels: int = CHANNELS,
    groups: int = GROUPS, layout: str = "token-major", window: int | None = None, is_causal: bool = True,
) -> AttentionCall:  # fmt: skip
    """A mini-sequence of `rows` at `start` of a prompt with `after` more tokens, as meta tensors."""

    def tensor(heads: int, tokens: int, layout: str) -> torch.Tensor:
        if layout == "token-major":
            return torch.empty(batch, tokens, heads, channels, device="meta", dtype=dtype).transpose(1, 2)
        return torch.empty(batch, heads, tokens, channels, device="meta", dtype=dtype)

    key, value = (tensor(groups, start + rows + after, layout) for _ in range(2))
    query = tensor(HEADS, rows, "head-major")  # the layout after rotary embeddings
    return AttentionCall(query, key, value, None, start, is_causal, channels**-0.5, window)


#: Rows for which cuDNN pays, a multiple of 128.
MANY = 512
LATE = prefill(BLOCK, MANY)


@pytest.mark.parametrize(
    ("call", "way"),
    [
        (LATE, Way.CUDNN),
        (prefill(20 * BLOCK, 2048, after=5000, batch=3), Way.CUDNN),
        (prefill(BLOCK + 77, MANY), Way.CUDNN),
        (prefill(BLOCK, MANY, dtype=torch.float16), Way.CUDNN),
        (prefill(BLOCK, MANY, groups=1), Way.CUDNN),
        (prefill(BLOCK, 2 * MANY, groups=HEADS, channels=64), Way.CUDNN),
        (prefill(BLOCK, MANY, window=BLOCK + MANY), Way.CUDNN),  # a window that hides no key
        # the first mini-sequence, and others with too few keys before them
        (prefill(0, 2048), Way.FLASH),
        (prefill(BLOCK - 1, MANY), Way.FLASH),
        # the last mini-sequence, a token of a decode step
        (prefill(BLOCK, MANY + 1), Way.FLASH),
        (prefill(BLOCK, 1), Way.FLASH),
        # so few numbers that launches take longer
        (prefill(BLOCK, MANY - ROWS, batch=4), Way.FLASH),
        (prefill(BLOCK, MANY, channels=64), Way.FLASH),
        (prefill(BLOCK, MANY, window=4096), Way.FLASH),
        (prefill(BLOCK, MANY, is_causal=False), Way.FLASH),
        # strides that depend on the number of keys
        (prefill(BLOCK, MANY, layout="head-major"), Way.FLASH),
        # more channels than this cuDNN supports
        (prefill(BLOCK, MANY, channels=256), Way.FLASH),
        (prefill(BLOCK, MANY, dtype=torch.float32), Way.EFFICIENT),
        (replace(LATE, keys=torch.empty(1, LATE.tokens, device="meta", dtype=torch.bool)), Way.BIAS),
    ],
)
def test_the_kernel_chosen_for_a_call(call: AttentionCall, way: Way) -> None:
    assert way_of(call) is way


@pytest.mark.parametrize(
    ("capability", "cudnn", "way"),
    [
        ((9, 0), 91900, Way.CUDNN),
        ((10, 0), 91900, Way.CUDNN),
        ((10, 3), 92400, Way.CUDNN),
        ((8, 0), 91900, Way.FLASH),
        ((8, 9), 91900, Way.FLASH),
        ((12, 0), 91900, Way.FLASH),
        ((9, 0), 91500, Way.FLASH),
        ((9, 0), 91002, Way.FLASH),
        ((9, 0), None, Way.FLASH),
    ],
)
def test_the_kernel_chosen_for_a_device_and_its_cudnn(
    capability: tuple[int, int], cudnn: int | None, way: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_device(monkeypatch, capability, cudnn)
    assert way_of(LATE) is way


@pytest.mark.parametrize("no", ["disabled", "deprioritized", "not for this call", "another flash"])
def test_flash_is_chosen_if_cudnn_is_disabled(no: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if no == "deprioritized":
        monkeypatch.setenv("TORCH_CUDNN_SDPA_DEPRIORITIZED", "1")
    elif no == "not for this call":
        monkeypatch.setattr(ways, "can_use_cudnn_attention", lambda params: False)
    elif no == "another flash":
        monkeypatch.setattr(ways, "current_flash_attention_impl", lambda: "FA3")
    else:
        monkeypatch.setattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: False)
    assert way_of(LATE) is Way.FLASH


# --- computes ---


class Kernels:
    """Stand-ins that record how many keys they get."""

    def __init__(self, patch: pytest.MonkeyPatch, block: int, rows: int) -> None:
        kernels_of_pytorch(patch)
        patch.setattr(attention_cudnn, "BLOCK", block)
        patch.setattr(ways, "ROWS", rows)
        patch.setattr(ways, "MIN_NUMBERS", 0)
        self.cudnn: list[int] = []
        self.flash: list[int] = []
        patch.setattr(attention_cudnn, "CUDNN", self._cudnn)
        patch.setattr(attention_cudnn, "flash", self._flash_of(attention_cudnn.flash))

    def _cudnn(self, query: torch.Tensor, key: torch.Tensor, *rest: Any, **named: Any) -> Any:
        self.cudnn.append(key.shape[2])
        return stand_ins.cudnn(query, key, *rest, **named)

    def _flash_of(self, flash: Any) -> Any:
        def recorded(call: AttentionCall) -> Any:
            self.flash.append(call.tokens)
            return flash(call)

        return recorded


def matches_its_definition(call: AttentionCall) -> None:
    result, dtype = attention_cuda(call), call.query.dtype
    expected = attention_reference(in_float64(call))
    assert result.dtype == dtype and result.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(result.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("start", "cudnn", "flash"),
    [(16, [16], 8), (31, [16], 23), (32, [32], 8), (16 * 7 + 5, [64, 32, 16], 13), (160, [128, 32], 8)],
)
@pytest.mark.parametrize(("batch", "groups", "group"), [(1, 2, 2), (1, 1, 4), (2, 2, 1), (3, 1, 1)])
@pytest.mark.parametrize("after", [0, 40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cudnn_computes_far_keys_and_flash_near_ones(
    start: int, cudnn: list[int], flash: int, batch: int, groups: int, group: int, after: int, dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Each of the 8 rows sees itself and the keys before it, whatever keys follow."""
    kernels = Kernels(monkeypatch, block=16, rows=8)
    sizes = (batch, groups, group, 8, start + 8 + after, 16, 16, start)
    matches_its_definition(Case(*sizes, True, None, None, (False,) * 4, "token-major", dtype, 0).call())
    assert kernels.cudnn == cudnn * batch
    assert kernels.flash == [flash] * batch


@pytest.mark.parametrize(
    ("start", "cudnn"), [(0, [8]), (16, [8, 16]), (48, [8, 32, 16]), (21, [16]), (7, [])]
)
@pytest.mark.parametrize(("batch", "group"), [(1, 2), (2, 1)])
def test_values_narrower_than_keys_are_supported(
    start: int, cudnn: list[int], batch: int, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Latent attention: cuDNN also reads the rows' own keys, if no keys are between them and the blocks."""
    kernels = Kernels(monkeypatch, block=1 << 20, rows=8)
    monkeypatch.setattr(attention_cudnn, "MLA_BLOCK", 16)
    sizes = (batch, 2, group, 8, start + 12, 192, 128, start)
    matches_its_definition(Case(*sizes, True, None, None, (False,) * 4, "token-major", torch.float16, 0).call())
    assert kernels.cudnn == cudnn * batch
    assert not kernels.flash


@st.composite
def far_cases(draw: st.DrawFn) -> tuple[Case, int]:
    """A case that is computed in parts, and the keys of a block: some keys before the rows, and any after them."""
    block, start, rows = draw(st.integers(2, 40)), draw(st.integers(2, 200)), draw(st.integers(1, 40))
    case = Case(
        batch=draw(st.integers(1, 3)),
        kv_heads=draw(st.integers(1, 3)),
        group=draw(st.integers(1, 3)),
        rows=rows,
        keys=start + rows + draw(st.integers(0, 20)),
        channels=16,
        value_channels=16,
        start=start,
        is_causal=True,
        window=draw(st.sampled_from([None, start + rows])),
        mask=None,
        broadcast=(False,) * 4,
        layout="token-major",
        dtype=draw(st.sampled_from([torch.bfloat16, torch.float16])),
        seed=draw(st.integers(0, 2**16)),
    )
    return case, min(block, start)


@given(far_cases())
@settings(max_examples=100, deadline=None)
def test_matches_its_definition(case_and_block: tuple[Case, int]) -> None:
    case, block = case_and_block
    with pytest.MonkeyPatch.context() as patch:
        kernels = Kernels(patch, block, rows=1)
        matches_its_definition(case.call())
    assert kernels.cudnn and kernels.flash


#: Each query sees one range of keys that ends with itself. (With padding on the right, these rows are padding.)
RANGES = {
    "no padding", "left padding", "one length of padding", "packed", "packed in order", "packed, no padding",
    "in order",
}  # fmt: skip


@pytest.mark.parametrize("conditions", CONDITIONS)
def test_conditions_on_keys_equal_masks(conditions: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys outside the range are cut off first: padding, packed sequences."""
    kernels = Kernels(monkeypatch, block=4, rows=1)
    sizes = (3, 2, 2, 30, 230, 16, 16, 200)
    matches_its_definition(
        Case(*sizes, True, None, None, (False,) * 4, "token-major", torch.float16, 0, conditions).call()
    )
    assert bool(kernels.cudnn) == (conditions in RANGES)


def test_merged_parts_round_at_most_half_as_much_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part is rounded, and so is their mean; one kernel rounds once."""
    Kernels(monkeypatch, block=16, rows=8)
    call = Case(1, 2, 2, 64, 240, 16, 16, 176, True, None, None, (False,) * 4, "token-major", HALF, 0).call()
    exact = attention_reference(in_float64(call))
    made = (attention_reference(call), attention_cuda(call))
    whole, parts = ((result.double() - exact).square().mean().sqrt() for result in made)
    assert 0 < whole < parts < 1.5 * whole


def test_no_row_of_a_prompt_is_lost_between_mini_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt of 301 tokens in mini-sequences of 24: the first has no keys before it, the last has 13 rows."""
    kernels = Kernels(monkeypatch, block=32, rows=8)
    sizes = (2, 2, 2, 301, 301, 16, 16, 0)
    whole = Case(*sizes, True, None, None, (False,) * 4, "token-major", torch.float16, 0).call()
    parts = [attention_cuda(whole.of_rows(first, min(24, 301 - first))) for first in range(0, 301, 24)]
    tolerance = TOLERANCE[torch.float16]
    expected = attention_reference(in_float64(whole))
    torch.testing.assert_close(torch.cat(parts, 2).double(), expected, atol=tolerance, rtol=tolerance)
    assert set(kernels.cudnn) == {32, 64, 128, 256}


def sums_and_result(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    return attention_reference(call), log_sum_exp(call).double()


@pytest.mark.parametrize("size", [1.0, 300.0], ids=["usual scores", "scores that overflow when exponentiated"])
def test_merged_parts_equal_the_whole(size: float) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, tokens, 8, dtype=torch.float64) for tokens in (7, 40, 40))
    call = AttentionCall(query * size, key, value, None, 0, False, 1.0)
    parts = [replace(call, key=k, value=v) for k, v in zip(key.split(13, 2), value.split(13, 2), strict=True)]
    merged = merge(map(sums_and_result, parts))
    assert merged.dtype == torch.float64
    # log-sum-exps are float32, as kernels return them
    torch.testing.assert_close(merged, attention_reference(call), atol=1e-4, rtol=1e-4)


def test_a_part_without_visible_keys_has_no_weight() -> None:
    """-inf for neither part, the first, the second or both, whatever finite numbers a kernel leaves there."""
    nothing = -math.inf
    first, second = (torch.full((1, 1, 4, 2), n, dtype=HALF) for n in (3.0, 5.0))
    sums = torch.tensor([[[0.0, nothing, 0.0, nothing]]]), torch.tensor([[[0.0, 0.0, nothing, nothing]]])
    first[:, :, 3] = 0
    merged = merge([(first, sums[0]), (second, sums[1])])
    assert merged.dtype == torch.float32
    assert merged[0, 0, :, 0].tolist() == [4.0, 5.0, 3.0, 0.0]
    blind = torch.full_like(second, 7.0), torch.full((1, 1, 4), nothing)
    once_more = merge([(merged, torch.logaddexp(*sums)), blind])
    assert once_more[0, 0, :, 0].tolist() == [4.0, 5.0, 3.0, 0.0]


def test_a_single_part_is_the_result() -> None:
    only = torch.ones(1, 1, 2, 2, dtype=HALF)
    assert merge([(only, torch.zeros(1, 1, 2))]) is only


# --- calls ---


@given(st.integers(0, 5_000_000))
def test_blocks_cover_all_keys_but_the_last_few(start: int) -> None:
    blocks = blocks_before(start)
    ends = [0, *(low + count for low, count in blocks)]
    assert [low for low, _ in blocks] == ends[:-1]
    assert start - BLOCK < ends[-1] <= start
    assert all(math.log2(count / BLOCK).is_integer() for _, count in blocks)
    counts = [count for _, count in blocks]
    assert counts == sorted(set(counts), reverse=True)


CUDNN, FLASH = "_scaled_dot_product_cudnn_attention", "_flash_attention_forward"


def plans(call: AttentionCall) -> set[tuple[Any, ...]]:
    """The key of PyTorch's cache of cuDNN plans: sizes and strides of the operands."""
    with torch.no_grad(), Calls() as calls:
        attention_cuda(call)
    return {operands for name, operands in calls.operands if name == CUDNN}


@pytest.mark.parametrize(
    ("batch", "groups", "layout"), [(1, GROUPS, "token-major"), (2, 1, "token-major"), (2, 1, "head-major")]
)
def test_prompts_of_all_lengths_have_few_plans(batch: int, groups: int, layout: str) -> None:
    """Mini-sequences of 2048, some of each prompt and its last: one plan for each length of a block."""
    found = set()
    for tokens in (600_000, 147_456, 100_003):
        for start in (*range(0, tokens, 7 * 2048), tokens - tokens % 2048):
            rows = min(2048, tokens - start)
            after = tokens - start - rows
            found |= plans(prefill(start, rows, after=after, batch=batch, groups=groups, layout=layout))
    assert {shapes[1][0][2] // BLOCK for shapes in found} == {1, 2, 4, 8, 16, 32, 64}
    assert len(found) == 7


LARGE = {
    "147,456 tokens": prefill(146_432, 1024),
    "600,000 tokens": prefill(598_016, 1024, after=960),
    "a batch": prefill(120_000, 2048, batch=2),
}
OTHERS = {"first": prefill(0, 1024), "many": prefill(BLOCK, MANY, batch=8), "odd": prefill(BLOCK, MANY + 1)}


@pytest.mark.parametrize("name", LARGE)
def test_pytorch_operators_accept_the_arguments(name: str) -> None:
    """A wrong argument raises: operators check their schema on meta tensors too."""
    call = LARGE[name]
    with torch.no_grad(), Calls() as calls:
        result = attention_cuda(call)
    assert {name for name in calls.names if "attention" in name} == {CUDNN, FLASH}
    assert result.shape == call.query.shape and result.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("name", LARGE)
def test_neither_keys_nor_values_are_copied(name: str) -> None:
    call = LARGE[name]
    with torch.no_grad(), Calls() as calls:
        attention_cuda(call)
    assert calls.largest <= max(call.query[:1].numel() * 4, call.query.numel() * 2), calls.largest_by
    assert calls.largest < call.key[:1].numel() * 2 / 4


@pytest.mark.parametrize("name", [*LARGE, *OTHERS])
def test_allocations_stay_within_the_memory_model(name: str) -> None:
    call = (LARGE | OTHERS)[name]
    with torch.no_grad(), Calls() as calls:
        result = attention_cuda(call)
    said = int(own_bytes(as_node(call), None).doit())
    taken = calls.most - result.numel() * result.element_size()
    assert 0 < taken <= said
    assert name not in LARGE or said <= 1.1 * taken


def as_node(call: AttentionCall) -> fx.Node:
    graph = fx.Graph()
    arguments = []
    for name, value in vars(call).items():
        if torch.is_tensor(value):
            node = graph.placeholder(name)
            node.meta["val"] = value
            value = node
        arguments.append(value)
    return graph.call_function(ATTENTION, tuple(arguments))
