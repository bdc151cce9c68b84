"""`mom::attention` on the CPU against its definition, and its peak memory."""

from __future__ import annotations

import math
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

import mom_compile.runtime.attention.register  # noqa: F401  registers the kernels
from mom_compile.runtime.attention import cpu as attention_cpu
from mom_compile.runtime.attention import rows as attention_rows
from mom_compile.runtime.attention.rows import observing_blocks
from mom_passes.ops.attention import AttentionCall, as_operator, attention_reference

OP = torch.ops.mom.attention.default
SPANS = torch.ops.mom.spans.default

CONDITIONS = (
    "no padding", "left padding", "right padding", "one length of padding", "nothing to see", "holes", "packed",
    "packed in order", "packed, padded", "packed, no padding", "segments that come back", "out of order", "in order",
)  # fmt: skip

#: Error allowed, relative to values around one. Kernels in half precision round their weights to it.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}


@dataclass(frozen=True)
class Case:
    """One call. `mask` is the kind of the mask, and which of its dimensions are broadcast."""

    batch: int
    kv_heads: int
    group: int
    rows: int
    keys: int
    channels: int
    value_channels: int
    start: int
    is_causal: bool
    window: int | None
    mask: str | None
    broadcast: tuple[bool, bool, bool, bool]
    layout: str
    dtype: torch.dtype
    seed: int
    #: Conditions on keys: see `_conditions`.
    conditions: str = ""
    shared: bool = False
    sinks: bool = False
    softcap: float | None = None

    def call(self) -> AttentionCall:
        torch.manual_seed(self.seed)
        heads = self.kv_heads * self.group
        query = self._tensor(heads, self.rows, self.channels)
        key = self._tensor(self.kv_heads, self.keys, self.channels)
        value = self._tensor(self.kv_heads, self.keys, self.value_channels)
        scale = self.channels**-0.5
        plain = AttentionCall(query, key, value, self._mask(heads), self.start, self.is_causal, scale, self.window)
        plain = replace(plain, softcap=self.softcap)
        if self.sinks:
            plain = replace(plain, sinks=torch.randn(heads).mul_(3.0))
        return replace(plain, **self._conditions()) if self.conditions else plain

    def _conditions(self) -> dict[str, torch.Tensor | None]:
        """Vectors `[B or 1, T]` and their spans. T covers the rows too, as in a graph."""
        batch, tokens = 1 if self.shared else self.batch, self.keys
        index = torch.arange(tokens).expand(batch, -1)
        pads = torch.randint(0, tokens + 1, (batch, 1))
        kinds: dict[str, tuple[torch.Tensor | None, ...]] = {
            "no padding": (index >= 0, None, None),
            "left padding": (index >= pads, None, None),
            "right padding": (index < pads, None, None),
            "one length of padding": (index >= pads[:1], None, None),
            "nothing to see": (index < 0, None, None),
            "holes": (torch.rand(batch, tokens) < 0.7, None, None),
        }
        if self.conditions in kinds:
            vectors = kinds[self.conditions]
        else:
            cuts = torch.rand(batch, tokens) < 0.1
            segments = cuts.cumsum(1)
            positions = index - torch.where(cuts, index, 0).cummax(1).values
            vectors = {
                "packed": (None, segments, None),
                "packed in order": (None, segments, positions),
                "packed, padded": (index >= pads, segments, None),
                "packed, no padding": (index >= 0, segments, None),
                "segments that come back": (None, segments % 3, None),
                "out of order": (None, segments, positions.flip(1)),
                "in order": (None, None, index + 3),
            }[self.conditions]
        return dict(zip(("keys", "segments", "positions"), vectors, strict=True), spans=SPANS(*vectors))

    def _tensor(self, heads: int, tokens: int, channels: int) -> torch.Tensor:
        if self.layout == "token-major":
            return torch.randn(self.batch, tokens, heads, channels).transpose(1, 2).to(self.dtype)
        if self.layout == "channels apart":
            return torch.randn(self.batch, heads, channels, tokens).transpose(2, 3).to(self.dtype)
        return torch.randn(self.batch, heads, tokens, channels).to(self.dtype)

    def _mask(self, heads: int) -> torch.Tensor | None:
        if self.mask is None:
            return None
        full = (self.batch, heads, self.rows, self.keys)
        shape = [1 if once else size for once, size in zip(self.broadcast, full, strict=True)]
        seen = torch.rand(shape) < 0.7
        if self.mask == "bool":
            return seen
        dtype = torch.float32 if self.mask == "float32" else self.dtype
        return torch.randn(shape).masked_fill_(~seen, -math.inf).to(dtype)


def run(call: AttentionCall) -> torch.Tensor:
    """Call the operator with the record's fields as positional arguments."""
    result: torch.Tensor = OP(*vars(call).values())
    return result


def in_float64(call: AttentionCall) -> AttentionCall:
    wide = {k: v.double() for k, v in vars(call).items() if torch.is_tensor(v) and v.is_floating_point()}
    return replace(call, **wide)


@st.composite
def cases(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.float32)) -> Case:
    rows = draw(st.one_of(st.integers(1, 5), st.integers(1, 90)))
    start = draw(st.one_of(st.just(0), st.integers(0, 150)))
    # Mostly keys up to the last row and some more; sometimes fewer keys than positions.
    keys = draw(st.one_of(st.just(start + rows), st.integers(start + rows, start + rows + 40), st.integers(1, 60)))
    channels = draw(st.sampled_from([1, 5, 8, 16]))
    mask = draw(st.sampled_from([None, None, "bool", "own dtype", "float32"]))
    return Case(
        batch=draw(st.integers(1, 3)),
        kv_heads=draw(st.integers(1, 3)),
        group=draw(st.integers(1, 3)),
        rows=rows,
        keys=keys,
        channels=channels,
        value_channels=draw(st.sampled_from([channels, channels, channels, 3])),
        start=start,
        is_causal=draw(st.booleans()),
        window=draw(st.one_of(st.none(), st.integers(1, 8), st.integers(1, 160))),
        mask=mask,
        broadcast=draw(st.tuples(*[st.booleans()] * 4)) if mask else (False,) * 4,
        layout=draw(st.sampled_from(["head-major", "token-major", "channels apart"])),
        dtype=draw(st.sampled_from(dtypes)),
        seed=draw(st.integers(0, 99)),
        sinks=draw(st.booleans()),
        softcap=draw(st.sampled_from([None, None, None, 0.7, 5.0])),
    )


@st.composite
def conditioned(draw: st.DrawFn) -> Case:
    """Cases whose rows are among the keys' tokens, with conditions on keys and no mask."""
    case = draw(cases())
    rows = min(case.rows, case.keys)
    return replace(
        case,
        rows=rows,
        start=draw(st.integers(0, case.keys - rows)),
        mask=None,
        broadcast=(False,) * 4,
        conditions=draw(st.sampled_from(CONDITIONS)),
        shared=draw(st.booleans()),
    )


@given(conditioned())
@settings(max_examples=300, deadline=None)
def test_conditions_on_keys_equal_masks(case: Case) -> None:
    assert_matches_definition(case)


@given(conditioned(), st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_conditions_on_keys_equal_masks_in_small_blocks(case: Case, fewest: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_rows, "FEWEST_ROWS", fewest)
        patch.setattr(attention_rows, "BLOCK_BYTES", 1)
        assert_matches_definition(case)


@pytest.mark.parametrize("conditions", CONDITIONS)
def test_ranges_of_keys_need_no_mask(conditions: str) -> None:
    """Padding at either end and packed sequences are calls of the plain kernel; other keys need a mask."""
    masked: list[AttentionCall] = []
    case = Case(3, 2, 2, 50, 200, 8, 8, 100, True, None, None, (False,) * 4, "head-major", torch.float64, 0, conditions)
    with observing_blocks(masked.append):
        assert_matches_definition(case)
    ranges = {"holes", "packed, padded", "segments that come back", "out of order"}
    assert bool(masked) == (conditions in ranges)


def assert_matches_definition(case: Case) -> None:
    call = case.call()
    result = run(call)
    expected = attention_reference(in_float64(call))
    assert result.dtype == case.dtype
    assert result.transpose(1, 2).is_contiguous(), f"not token-major: {result.stride()}"
    torch.testing.assert_close(result.double(), expected, atol=TOLERANCE[case.dtype], rtol=TOLERANCE[case.dtype])


@st.composite
def in_windows(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.float32)) -> Case:
    """Causal cases in a window whose rows are among the keys' tokens, with a mask, conditions on keys or neither."""
    plain, with_conditions = cases(dtypes), conditioned()
    case = draw(st.one_of(plain, with_conditions))
    case = replace(case, is_causal=True, window=draw(st.integers(1, 40)), dtype=draw(st.sampled_from(dtypes)))
    return replace(case, keys=max(case.keys, case.start + case.rows))


def with_keys_in_windows(call: AttentionCall) -> AttentionCall:
    """The same call on the keys and values in its windows. Ahead of the sequence these are NaN."""
    assert call.window is not None
    first, end = call.start - call.window + 1, call.start + call.rows

    def cut(rows: torch.Tensor) -> torch.Tensor:
        own = rows[:, :, max(0, first) : end]
        return torch.cat([own.new_full((*own.shape[:2], max(0, -first), own.shape[3]), math.nan), own], 2)

    return replace(call, key=cut(call.key), value=cut(call.value), first=first)


@given(in_windows())
@settings(max_examples=300, deadline=None)
def test_keys_in_the_windows_suffice(case: Case) -> None:
    """Masks, conditions and spans cover the whole sequence."""
    call = case.call()
    expected = attention_reference(in_float64(call))
    cut = with_keys_in_windows(call)
    for result in (run(cut), as_operator(attention_reference)(*vars(cut).values())):
        assert result.transpose(1, 2).is_contiguous()
        torch.testing.assert_close(result.double(), expected, atol=TOLERANCE[case.dtype], rtol=TOLERANCE[case.dtype])


def test_a_call_with_keys_in_the_windows_has_a_fake_result() -> None:
    cut = with_keys_in_windows(AttentionCall(*torch.randn(3, 1, 2, 9, 8), None, 0, True, 1.0, 4))
    meta = {name: value.to("meta") for name, value in vars(cut).items() if torch.is_tensor(value)}
    assert run(replace(cut, **meta)).shape == (1, 2, 9, 8)


@given(cases())
@settings(max_examples=300, deadline=None)
def test_matches_its_definition(case: Case) -> None:
    assert_matches_definition(case)


@given(cases((torch.bfloat16, torch.float16)))
@settings(max_examples=60, deadline=None)
def test_matches_its_definition_in_half_precision(case: Case) -> None:
    assert_matches_definition(case)


@given(cases(), st.integers(1, 40), st.integers(0, 2), st.integers(1, 3))
@settings(max_examples=100, deadline=None)
def test_matches_its_definition_in_small_blocks(case: Case, narrow: int, for_rows: int, fewest: int) -> None:
    """With small blocks and small split windows, so that there are many boundaries."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_cpu, "NARROW_WINDOW", narrow)
        patch.setattr(attention_cpu, "NARROW_FOR_ROWS", for_rows)
        patch.setattr(attention_cpu, "NARROW_ROWS", 2 * fewest + 1)
        patch.setattr(attention_rows, "FEWEST_ROWS", fewest)
        patch.setattr(attention_rows, "BLOCK_BYTES", 1)
        assert_matches_definition(case)


@pytest.mark.parametrize("window", [None, 1, 2, 127, 128, 129, 200, 255, 256, 300, 1000])
@pytest.mark.parametrize("rows", [1, 255, 300])
@pytest.mark.parametrize("with_a_bias", [True, False])
def test_rows_of_a_sequence_concatenate_to_the_whole(
    rows: int, window: int | None, with_a_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Includes windows hardly longer than the rows, with a bias or by split keys."""
    if not with_a_bias:
        monkeypatch.setattr(attention_cpu, "NARROW_FOR_ROWS", 0)
    length = 900
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, length, 16, dtype=torch.float64) for heads in (4, 2, 2))
    whole = attention_reference(AttentionCall(query, key, value, None, 0, True, 0.25, window))
    starts = range(0, length, rows) if rows > 1 else range(0, length, 97)
    for start in starts:
        block = query[:, :, start : start + rows]
        result = OP(block, key, value, None, start, True, 0.25, window)
        torch.testing.assert_close(result, whole[:, :, start : start + rows], atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(
    ("heads", "rows", "threads", "of_one_head"),
    [
        (8, 256, 2, 1024),
        (8, 100, 2, 400),
        (8, 40, 2, 40),  # too few rows for larger blocks even so
        (8, 768, 2, 768),  # large enough without merging
        (2, 256, 2, 256),  # one key head for each query head
        (8, 256, 16, 256),  # some threads would have no block
    ],
)
def test_grouped_heads_are_merged_to_rows_where_that_enlarges_blocks(
    monkeypatch: pytest.MonkeyPatch, heads: int, rows: int, threads: int, of_one_head: int
) -> None:
    seen: list[int] = []
    flash = attention_cpu.flash

    def observed(query: torch.Tensor, *rest: Any, **named: Any) -> Any:
        seen.append(query.shape[2])
        return flash(query, *rest, **named)

    monkeypatch.setattr(attention_cpu, "flash", observed)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    torch.manual_seed(0)
    query = torch.randn(2, rows, heads, 16, dtype=torch.float64).transpose(1, 2)
    key, value = torch.randn(2, 2, 2, 900, 16, dtype=torch.float64)
    for window in (850, None):
        seen.clear()
        call = AttentionCall(query, key, value, None, 900 - rows, True, 0.25, window, sinks=torch.randn(heads))
        result = attention_cpu.attention_cpu(call)
        torch.testing.assert_close(result, attention_reference(call), atol=1e-10, rtol=1e-10)
        assert result.transpose(1, 2).is_contiguous()
    assert seen == [of_one_head, rows]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value_channels", [8, 4])
def test_a_row_without_visible_keys_is_zero(dtype: torch.dtype, value_channels: int) -> None:
    """As in PyTorch's CPU attention; in both kernels, for every kind of mask."""
    query, key, value = (torch.randn(1, 2, 6, channels, dtype=dtype) for channels in (8, 8, value_channels))
    seen = torch.ones(6, 6, dtype=torch.bool)
    seen[3] = False
    additive = torch.zeros(6, 6, dtype=dtype).masked_fill(~seen, -math.inf)
    for mask in (seen, additive):
        for is_causal in (False, True):
            call = AttentionCall(query, key, value, mask, 0, is_causal, 1.0)
            result = run(call)
            assert torch.count_nonzero(result[:, :, 3]) == 0
            assert torch.isfinite(result).all()
            assert torch.count_nonzero(attention_reference(call)[:, :, 3]) == 0
    stock = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=seen)
    assert torch.count_nonzero(stock[:, :, 3]) == 0


def test_a_sink_equals_a_key_whose_value_is_zero() -> None:
    """With a given score: the definition with one more key, visible to every row and outside all windows."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, heads, 9, 8, dtype=torch.float64) for heads in (4, 2, 2))
    sinks, seen = torch.randn(4, dtype=torch.float64), torch.ones(9, 9, dtype=torch.bool).tril().triu(-4)
    scores = (query @ key.repeat_interleave(2, 1).transpose(2, 3) * 0.3).masked_fill(~seen, -math.inf)
    weights = torch.cat([scores, sinks[None, :, None, None].expand(2, -1, 9, 1)], -1).softmax(-1)[..., :-1]
    expected = weights @ value.repeat_interleave(2, 1)
    call = AttentionCall(query, key, value, None, 0, True, 0.3, 5, sinks=sinks)
    torch.testing.assert_close(attention_reference(call), expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(run(call), expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_sinks_of_any_size_and_dtype_match_the_definition(dtype: torch.dtype) -> None:
    """A very high sink takes all of a row's weight, a very low one none; neither overflows."""
    query, key = torch.randn(1, 4, 6, 8, dtype=dtype), torch.randn(1, 2, 6, 8, dtype=dtype)
    without = AttentionCall(query, key, key, None, 0, True, 1.0)
    result = run(replace(without, sinks=torch.tensor([1e30, -1e30, math.inf, -math.inf])))
    assert torch.count_nonzero(result[:, 0]) == torch.count_nonzero(result[:, 2]) == 0
    assert torch.equal(result[:, 1::2], run(without)[:, 1::2])


def test_empty_keys_and_empty_rows_are_supported() -> None:
    query, key = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8)
    none = key[:, :, :0]
    assert torch.equal(OP(query, none, none, None, 0, True, 1.0), torch.zeros(2, 4, 5, 8))
    assert torch.equal(OP(query, none, none, None, 0, True, 1.0, sinks=torch.ones(4)), torch.zeros(2, 4, 5, 8))
    assert OP(query[:, :, :0], key, key, None, 0, True, 1.0).shape == (2, 4, 0, 8)
    assert OP(query[:0], key[:0], key[:0], None, 0, True, 1.0).shape == (0, 4, 5, 8)


def test_the_definition_keeps_nan() -> None:
    """PyTorch's flash kernel may hide NaN: it treats a row of NaN scores as a row without visible keys."""
    query, key = torch.full((1, 1, 2, 4), math.nan), torch.randn(1, 1, 2, 4)
    assert attention_reference(AttentionCall(query, key, key, None, 0, True, 1.0)).isnan().all()


def test_padding_allocates_only_rows() -> None:
    """No mask is allocated, whatever the number of keys."""
    rows, keys, channels = 256, 8192, 64
    query = torch.randn(2, 8, rows, channels)
    key, value = torch.randn(2, 2, keys, channels), torch.randn(2, 2, keys, channels)
    padded = torch.arange(keys) >= torch.tensor([[1000], [0]])
    peak = peak_bytes(
        (query, key, value, None, keys - rows, True, 0.125, None, padded, None, None, SPANS(padded, None, None))
    )
    assert peak <= 3 * query.numel() * 4 + flash_scratch(channels), peak


def test_spans_passes_opcheck() -> None:
    keys, segments = torch.ones(2, 9, dtype=torch.bool), torch.zeros(2, 9, dtype=torch.int64)
    for vectors in ((keys, None, None), (keys[:1], segments, segments), (None, None, segments)):
        torch.library.opcheck(SPANS, vectors, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("mask", [None, torch.bool, torch.float32])
@pytest.mark.parametrize("window", [None, 24, 400])
def test_the_operator_passes_opcheck(mask: torch.dtype | None, window: int | None) -> None:
    """Schema, fake kernel and strides, by `torch.library.opcheck`."""
    query, key, value = torch.randn(1, 4, 40, 8), torch.randn(1, 2, 600, 8), torch.randn(1, 2, 600, 8)
    given = None if mask is None else torch.ones(1, 1, 40, 600, dtype=mask)
    arguments = (query, key, value, given, 500, True, 0.3, window)
    for sinks in (None, torch.randn(4)):
        torch.library.opcheck(OP, arguments, {"sinks": sinks}, test_utils=("test_schema", "test_faketensor"))


def test_a_call_has_a_field_for_each_argument_of_the_schema() -> None:
    """By name, in order, with the same type and default: `as_operator` relies on it."""
    types = {"Tensor": "torch.Tensor", "SymInt": "int", "int": "int", "bool": "bool", "float": "float"}
    types |= {f"Optional[{name}]": f"{own} | None" for name, own in types.items()}
    given = {"scale": "float"}  # a kernel gets a number where the operator gets None
    for argument, field in zip(OP._schema.arguments, fields(AttentionCall), strict=True):
        assert field.name == argument.name
        assert field.type == given.get(argument.name, types[str(argument.real_type)])
        assert argument.has_default_value() == (field.default is not MISSING)
        assert field.default in (MISSING, argument.default_value)


def test_a_kernel_gets_the_default_scale() -> None:
    q = torch.zeros(1, 1, 2, 16)
    scale_of = as_operator(lambda call: torch.tensor(call.scale))
    assert scale_of(q, q, q, None, 0, True, None) == 0.25
    assert scale_of(q, q, q, None, 0, True, 3.0) == 3.0


def peak_bytes(arguments: tuple[Any, ...]) -> int:
    """Peak bytes above those allocated at the start, from the allocator's records."""
    OP(*arguments)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
        result = OP(*arguments)
    del result
    live = peak = 0
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    assert peak > 0
    return peak


def test_causal_rows_allocate_only_rows() -> None:
    """Independent of the number of keys: the result, a temporary of its size, one being merged, and small buffers."""
    rows, channels = 256, 64
    for keys in (2048, 8192):
        query = torch.randn(1, 8, rows, channels)
        key, value = torch.randn(1, 2, keys, channels), torch.randn(1, 2, keys, channels)
        result_bytes = query.numel() * 4
        for start in (0, keys // 2, keys - rows):
            for sinks in (None, torch.randn(8)):
                peak = peak_bytes((query, key, value, None, start, True, 0.125, *(None,) * 5, sinks))
                assert peak <= 3 * result_bytes + flash_scratch(channels), (keys, start, peak, result_bytes)


def test_windowed_rows_allocate_only_rows() -> None:
    rows, channels, keys = 256, 64, 8192
    query = torch.randn(1, 8, rows, channels)
    key, value = torch.randn(1, 2, keys, channels), torch.randn(1, 2, keys, channels)
    for window in (64, 300, 4000):
        peak = peak_bytes((query, key, value, None, keys - rows, True, 0.125, window))
        bias = 2 * 4 * rows * (window + rows) if window < 128 else 0
        assert peak <= 6 * query.numel() * 4 + bias + flash_scratch(channels), (window, peak)


def test_masked_rows_allocate_at_most_a_block() -> None:
    """A boolean mask becomes additive one block at a time."""
    rows, keys = 1024, 8192
    query, key = torch.randn(1, 1, rows, 8), torch.randn(1, 1, keys, 8)
    mask = torch.rand(1, 4, rows, keys)[:, :1] > 0.5
    peak = peak_bytes((query, key, key, mask, 0, False, 0.3))
    assert peak < rows * keys * 4
    assert peak <= 1.6 * attention_rows.BLOCK_BYTES, peak


def flash_scratch(channels: int) -> int:
    """Scratch of the flash kernel per thread: scores, maxima, sums and a result tile of its 256 x 512 blocks."""
    return torch.get_num_threads() * 256 * (512 + 2 + channels) * 4 + (128 << 10)


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize(
    ("batch", "groups", "keys", "window", "sinks"),
    [(1, 1, 5001, None, False), (1, 1, 5001, 3000, True), (1, 2, 4097, None, True), (2, 1, 3000, None, False)],
)
def test_the_keys_of_one_row_are_split_by_the_number_of_threads(
    threads: int, batch: int, groups: int, keys: int, window: int | None, sinks: bool
) -> None:
    """With one key head there is work for one thread only, unless the keys are split."""
    generator = torch.Generator().manual_seed(0)
    key, value = torch.randn(2, batch, groups, keys, 32, dtype=torch.float64, generator=generator)
    query = torch.randn(batch, 4, 1, 32, dtype=torch.float64, generator=generator)
    sink = torch.randn(4, dtype=torch.float64, generator=generator) if sinks else None
    call = AttentionCall(query, key, value, None, keys - 1, True, 0.2, window, sinks=sink)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = attention_cpu.attention_cpu(call)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(found, attention_reference(call), rtol=0, atol=1e-14)
