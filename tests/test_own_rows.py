"""Returned rows of a larger value get their own storage: in loops, between loops and in graphs for stock Inductor."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

import mom_compile
import mom_compile.backend as backend_module
import mom_compile.pipeline as pipeline_module
from benchmarks import models
from benchmarks.measure import MIB, peak_bytes, shown_and_held, watch_cpu
from mom_compile import MomWarning, reports
from mom_compile.pipeline import for_stock
from mom_compile.report import DECODE_STEP
from mom_compile.report.units import in_units
from mom_compile.runtime.copy_steps import Offload
from mom_compile.runtime.host.placement import Placement
from mom_compile.torch_compat.inductor import mark_boxed
from mom_passes.graph.edit import copy_graph
from mom_passes.loops.loop import loop_nodes
from mom_passes.ops.rows import COPY_ROWS
from mom_passes.program.memory import memory
from mom_passes.program.own_rows import own_rows
from mom_passes.program.program import LoopStep
from mom_passes.program.schedule import schedule
from tests.models import TinyDecoder, ids, next_token, prompt, small_model, sweep
from tests.programs import HIDDEN, STEPS, Weights, weights_of
from tests.shares import at_least, some_and_many
from tests.test_in_place import decoder, layer, taken
from tests.test_properties import RANDOM_PROGRAMS, parameter_names
from tests.tracing import rewrite, trace

WEIGHTS = weights_of(torch.float64)
TOKENS = 23


def x_of(batch=2, tokens=TOKENS):
    return torch.randn(batch, tokens, HIDDEN, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def behind(tensor):
    """Bytes that a tensor keeps allocated, relative to its own."""
    return tensor.untyped_storage().nbytes() / max(1, tensor.numel() * tensor.element_size())


def share(a, b):
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


#: Crops of a value whose tokens are in dimension 1.
CROPS = {
    "head": lambda v: v[:, :5],
    "tail": lambda v: v[:, -5:],
    "middle": lambda v: v[:, 3:9],
    "strided": lambda v: v[:, ::3],
    "selected": lambda v: v[:, -1],
    "channels": lambda v: v[..., :2],
    "of one entry": lambda v: v[:1],
    "viewed": lambda v: v[:, -6:].unflatten(1, (2, 3)).transpose(0, 1),
    "twice": lambda v: v[:, :-2][:, -4:],
    "split": lambda v: v.split(4, 1)[2],
    "expanded": lambda v: v[:, -2:].unsqueeze(0).expand(3, -1, -1, -1),
}

#: The source of the value: a loop, an operator that needs all tokens at once, an operator on an input alone.
SOURCES = {
    "loop": lambda x, w: layer(x @ w.square, w),
    "whole": lambda x, w: layer(x @ w.square, w).cumsum(1),
    "cheap": lambda x, w: x * 2,
}


@functools.cache
def program(source, *crops):
    """Operators after a value, and some crops of the value."""

    def run(x, *parameters):
        w = Weights(*parameters)
        value = SOURCES[source](x, w)
        return (layer(layer(value, w), w), *(CROPS[crop](value) for crop in crops))

    return run


@functools.lru_cache
def traced(function, batch, dynamic):
    """A graph that tests with loops and without copy."""
    return trace(function, x_of(batch), *WEIGHTS, dynamic=dynamic)


def check(function, *, loops=True, dynamic=False, batch=2):
    """The outputs of the rewritten graph, which equal eager mode's, and the copies that were made."""
    x = x_of(batch)
    gm = copy_graph(traced(function, batch, dynamic))
    assert dynamic == any(isinstance(size, torch.SymInt) for size in next(iter(gm.graph.nodes)).meta["val"].shape)
    if loops:
        rewritten, report = rewrite(gm, 4, parameter_names(gm))
        assert loop_nodes(rewritten)
        own = report.own_rows
    else:
        rewritten, own = for_stock(gm)
    for given_x in (x, x_of(batch, 2 * TOKENS)) if dynamic else (x,):
        outputs = rewritten(given_x, *WEIGHTS)
        for mine, expected in zip(outputs, gm(given_x, *WEIGHTS), strict=True):
            torch.testing.assert_close(mine, expected, rtol=0, atol=1e-10)
    return outputs, own


@pytest.mark.parametrize("loops", [True, False], ids=["loops", "stock"])
@pytest.mark.parametrize("crop", sorted(CROPS))
@pytest.mark.parametrize("source", sorted(SOURCES))
def test_a_returned_crop_holds_only_its_rows(source, crop, loops):
    outputs, own = check(program(source, crop), loops=loops)
    assert behind(outputs[1]) <= 1.15
    # A loop may compute only those rows.
    assert own or loops


@pytest.mark.parametrize("loops", [True, False], ids=["loops", "stock"])
@pytest.mark.parametrize(
    "crop", sweep(["head", "tail", "selected", "channels", "viewed"], quick=["head", "tail", "viewed"])
)
def test_a_returned_crop_holds_only_its_rows_at_dynamic_lengths(crop, loops):
    outputs, own = check(program("loop", crop), loops=loops, dynamic=True)
    assert behind(outputs[1]) <= 1.15
    assert own or loops


@functools.cache
def cropped_keys(*crops):
    """Keys of the second of three layers, of which crops are returned."""

    def run(x, *parameters):
        w = Weights(*parameters)
        first = layer(x @ w.square, w)
        keys = first @ w.square
        seen = F.scaled_dot_product_attention(first, keys, keys * w.scale, is_causal=True)
        return (layer(STEPS["mlp"](seen, w), w), *(CROPS.get(crop, lambda v: v)(keys) for crop in crops))

    return run


def test_a_crop_is_copied_after_the_last_loop_that_reads_the_base():
    gm = trace(cropped_keys("tail"), x_of(), *WEIGHTS)
    rewritten, report = rewrite(gm, 4, parameter_names(gm), skip=("residual_in_place",))
    (made,) = report.own_rows
    assert (made.bytes, made.base_bytes) == (2 * 5 * HIDDEN * 8, 2 * TOKENS * HIDDEN * 8)
    (own,) = (node for node in rewritten.graph.nodes if node.target is COPY_ROWS)
    names = [str(node.target) for node in rewritten.graph.nodes if node.op == "call_module" and node < own]
    found = memory(schedule(rewritten))
    live = {moment.step.name: moment.alive for moment in found.moments if isinstance(moment.step, LoopStep)}
    # The loop that reads the keys has them at full length, the one after it only the rows that are kept.
    assert made.base in [v.name for v in live[names[-1]]]
    for after in set(live) - set(names):
        assert made.base not in [v.name for v in live[after]]
        assert [found.number(v.bytes) for v in live[after] if v.name == own.name] == [made.bytes]
    assert set(live) - set(names)


def test_without_the_pass_a_crop_keeps_the_whole_value_alive():
    x = x_of()
    gm = trace(cropped_keys("tail"), x, *WEIGHTS)
    rewritten, _ = rewrite(gm, 4, parameter_names(gm), skip=("rows_of_their_own",))
    assert behind(rewritten(x, *WEIGHTS)[1]) > 4


@pytest.mark.parametrize("loops", [True, False], ids=["loops", "stock"])
def test_disjoint_crops_are_copied_separately_and_overlapping_ones_together(loops):
    (_, head, tail), own = check(cropped_keys("head", "tail"), loops=loops)
    assert len(own) == 2
    assert behind(head) == behind(tail) == 1 and not share(head, tail)


@pytest.mark.parametrize("loops", [True, False], ids=["loops", "stock"])
@pytest.mark.parametrize("crops", [("head", "middle"), ("middle", "head"), ("tail", "selected"), ("head", "head")])
def test_a_write_to_one_of_two_overlapping_crops_is_visible_in_the_other(crops, loops):
    (_, one, other), own = check(cropped_keys(*crops), loops=loops)
    assert len(own) == 1
    assert share(one, other) and behind(one) <= 9 / 5 + 1e-6
    before = other.clone()
    one.add_(1)
    assert not torch.equal(before, other)


@pytest.mark.parametrize("loops", [True, False], ids=["loops", "stock"])
@pytest.mark.parametrize("crops", [("tail", "whole"), ("tail", "strided")])
def test_nothing_is_copied_if_the_base_is_kept_or_the_overlap_is_unknown(crops, loops):
    (_, one, other), own = check(cropped_keys(*crops), loops=loops)
    assert not own
    assert share(one, other)


def test_crops_along_different_dimensions_are_not_copied():
    (_, one, other), own = check(cropped_keys("tail", "channels"), loops=False)
    assert not own
    assert share(one, other)


def test_a_crop_of_nearly_all_rows_is_not_copied():
    _, own = check(lambda x, *w: (layer(x, Weights(*w)), x.cumsum(1)[:, 1:]), loops=False)
    assert not own


@pytest.mark.parametrize("loops", [True, False], ids=["loops", "stock"])
def test_a_returned_view_of_an_input_stays_a_view(loops):
    def run(x, *parameters):
        return (*cropped_keys("tail")(x, *parameters), x[:, -3:])

    x = x_of()
    gm = trace(run, x, *WEIGHTS)
    rewritten = rewrite(gm, 4, parameter_names(gm))[0] if loops else for_stock(gm)[0]
    assert share(rewritten(x, *WEIGHTS)[2], x)
    assert behind(rewritten(x, *WEIGHTS)[1]) == 1


def test_a_base_that_an_operator_writes_to_is_not_copied():
    def run(x, *parameters):
        return (x.cumsum(1)[:, -2:],)

    gm = trace(run, x_of(), *WEIGHTS)
    assert own_rows(copy_graph(gm))
    (whole,) = (node for node in gm.graph.nodes if node.target is torch.ops.aten.cumsum.default)
    with gm.graph.inserting_before(gm.graph.output_node()):
        gm.graph.call_function(torch.ops.aten.zero_.default, (whole,)).meta["val"] = whole.meta["val"]
    assert not own_rows(gm)


def test_a_copy_keeps_the_storage_order():
    """Token-major heads stay token-major and dense."""

    def run(x, *parameters):
        return (x.cumsum(1).unflatten(-1, (2, -1)).transpose(1, 2)[:, :, -5:],)

    gm = trace(run, x_of(), *WEIGHTS)
    (rows,) = for_stock(gm)[0](x_of(), *WEIGHTS)
    assert rows.shape == (2, 2, 5, 4)
    assert rows.stride() == (40, 4, 8, 1)


WINDOW = 40


def windowed(past, new):
    return (torch.cat([past, new], dim=2)[:, :, -WINDOW + 1 :],)


@pytest.mark.parametrize("tokens", [WINDOW, 3 * WINDOW], ids=["one row more", "many more"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["of one length", "of any length"])
def test_a_prompts_window_has_the_strides_of_a_decode_steps(dynamic, tokens):
    """Dynamo guards on strides: otherwise the first step after a prompt would need its own graph."""
    heads, empty = torch.randn(2, 3, tokens, 4), torch.randn(2, 3, 0, 4)
    gm = trace(lambda x: windowed(empty, x.cumsum(2)), heads, dynamic=dynamic)
    whole, own = for_stock(gm)
    (rows,) = whole(heads)
    assert bool(own) == (dynamic or tokens > WINDOW)
    (after,) = windowed(rows, torch.randn(2, 3, 1, 4))
    assert rows.shape == after.shape
    assert rows.stride() == after.stride()
    assert torch.equal(rows, windowed(empty, heads.cumsum(2))[0])
    assert behind(rows) == WINDOW / (WINDOW - 1)


def test_a_residual_with_a_returned_crop_is_still_overwritten():
    def run(x, *parameters):
        last, first = decoder(x, *parameters, hidden_too=True)
        return last, first[:, -2:]

    x = x_of()
    gm = trace(run, x, *WEIGHTS)
    rewritten, report = rewrite(gm, 4, parameter_names(gm))
    assert report.own_rows and len(taken(rewritten)) == 3
    for mine, expected in zip(rewritten(x, *WEIGHTS), gm(x, *WEIGHTS), strict=True):
        torch.testing.assert_close(mine, expected, rtol=0, atol=1e-10)


def returns_the_same_rows(names, kept, batch, loops):
    """Whether rows of a program's outputs were copied. The outputs are the same with and without."""

    def run(x, *parameters):
        values = [x]
        for name in names:
            values.append(STEPS[name](values[-1], Weights(*parameters)))
        made = values[1:]
        return (values[-1] @ Weights(*parameters).square, *(CROPS[crop](made[i % len(made)]) for i, crop in kept))

    x = x_of(batch)
    gm = trace(run, x, *WEIGHTS)
    expected = gm(x, *WEIGHTS)
    try:
        if loops:
            rewritten, report = rewrite(gm, 4, parameter_names(gm))
            own = report.own_rows
        else:
            rewritten, own = for_stock(gm)
    except pipeline_module.NotWorthwhile:
        rewritten, own = for_stock(gm)
    for mine, other in zip(rewritten(x, *WEIGHTS), expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-10 * max(1.0, float(other.abs().max())), equal_nan=True)
    return bool(own)


@some_and_many(30, 100)
def test_random_programs_return_the_same_rows(runs):
    with at_least(0.8, "copy rows out of a larger value") as copied:

        @settings(RANDOM_PROGRAMS, max_examples=runs)
        @given(
            st.lists(st.sampled_from(sorted(STEPS)), min_size=2, max_size=6),
            st.lists(st.tuples(st.integers(0, 5), st.sampled_from(sorted(CROPS))), min_size=1, max_size=4),
            st.integers(1, 3),
            st.booleans(),
        )
        def the_same_rows(names, kept, batch, loops):
            copied.append(returns_the_same_rows(names, kept, batch, loops))

        the_same_rows()


# --- models ---


def run_captured(gm, example_inputs, **kwargs):
    """Replaces stock Inductor by the graph itself."""

    def run(inputs):
        values = list(inputs)
        inputs.clear()
        return gm(*values)

    return mark_boxed(run)


@pytest.fixture
def nothing_compiled(monkeypatch, eager_pieces):
    patched = functools.partial(backend_module.compile_graph, stock=run_captured)
    monkeypatch.setattr(backend_module, "compile_graph", patched)


def assert_rows_alone(cache):
    for tensor in models.cached(cache):
        assert behind(tensor) <= 1.2, (tensor.shape, tensor.untyped_storage().nbytes())


@pytest.mark.usefixtures("nothing_compiled")
@pytest.mark.parametrize(
    ("batch", "lengths"),
    [
        pytest.param(2, [20], id="no loops"),
        pytest.param(1, [41, 65], id="loops, then of any length"),
        pytest.param(2, [9, 20], id="within the window first", marks=pytest.mark.slow),
    ],
)
def test_a_sliding_windows_cache_holds_only_the_window_after_every_step(batch, lengths):
    """Windows of 16. Of two lengths that are compiled the second is a symbol."""
    model, reference = (small_model("Mistral", num_hidden_layers=3) for _ in range(2))
    model.compile(backend="mom", options={"kv_offload": False, "mini_seq_len": 32, "strict": True})
    for length in lengths:
        inputs = prompt(batch, length)
        cache, expected = DynamicCache(config=model.config), DynamicCache(config=model.config)
        with torch.no_grad():
            for step in range(3):
                mine = model(**inputs, **models.keeping(cache, model)).logits
                logits = reference(**inputs, **models.keeping(expected, reference)).logits
                torch.testing.assert_close(mine, logits, rtol=0, atol=1e-4)
                assert_rows_alone(cache)
                inputs = next_token(inputs, seed=step)
    prefill = [report for report in reports() if report.own_rows]
    # A loop passes the windows of two layers on and returns them. One layer is a barrier, whose window is copied.
    passed_on = [sum(len(stage.folds) for stage in report.stages) for report in prefill]
    assert prefill and all(len(report.own_rows) + n == 6 for report, n in zip(prefill, passed_on, strict=True))
    assert passed_on == ([4, 4] if lengths == [41, 65] else [0] * len(prefill))
    # A step drops one row of sixteen, which is not worth a copy.
    steps = [report for report in reports() if report.kind == DECODE_STEP]
    assert steps and not any(report.own_rows for report in steps) and len(prefill) <= 2


@pytest.mark.usefixtures("nothing_compiled")
def test_a_step_of_many_tokens_keeps_only_the_window():
    model = small_model("Mistral", num_hidden_layers=3)
    options = {"kv_offload": False, "mini_seq_len": 64, "strict": True}
    model.compile(backend="mom", dynamic=False, options=options)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        for tokens in (30, 21):
            model(**prompt(2, tokens), **models.keeping(cache, model))
            assert_rows_alone(cache)
    assert [len(report.own_rows) for report in reports()] == [6, 6]


def test_explain_lists_the_copied_rows():
    """Of one layer of three: the loops pass the windows of the others on."""
    model, inputs = small_model("Mistral", num_hidden_layers=3), prompt(1, 41)
    found = mom_compile.explain(model, **inputs, options={"mini_seq_len": 8, "kv_offload": False})
    assert [(rows.bytes, rows.base_bytes) for rows in found[0].own_rows] == [(15 * 2 * 16 * 4, 41 * 2 * 16 * 4)] * 2
    assert "rows of their own: 2 parts (slice" in found.details()
    assert f"{in_units(2 * 15 * 2 * 16 * 4)} of {in_units(2 * 41 * 2 * 16 * 4)}" in found.details()
    assert "2 parts of larger values, windows of a cache say, kept without the rest: 3.8 KiB of 10 KiB" in str(found)
    short = mom_compile.explain(model, **inputs, options={"kv_offload": False})
    assert short[0].no_loops is not None and len(short[0].own_rows) == 6
    assert "rows of their own" in short.details() and "6 parts of larger values" in str(short)


def test_a_layer_that_is_not_offloaded_keeps_only_its_rows():
    value = torch.arange(2 * 3 * 40 * 4.0).view(2, 3, 40, 4)
    step = Offload(2, torch.device("cpu"), Placement(), stays=lambda sizes, size: True)
    (kept,) = step([value, 30])
    assert torch.equal(kept, value[:, :, 30:]) and behind(kept) == 1
    (kept,) = step([value, 1])
    assert share(kept, value)


def test_a_failing_pass_falls_back_with_a_warning_and_raises_under_strict(monkeypatch):
    def fails(gm):
        raise RuntimeError("a bug of ours")

    monkeypatch.setattr("mom_compile.pipeline.moves.own_rows", fails)
    model = TinyDecoder(layers=1).eval()
    with torch.no_grad():
        fast = torch.compile(model, backend="mom", options={"mini_seq_len": 8})
        with pytest.warns(MomWarning, match="a bug of ours"):
            logits = fast(ids(1, 6))
        torch.testing.assert_close(logits, model(ids(1, 6)), rtol=1e-5, atol=1e-5)
        assert reports()[-1].failed
        with pytest.raises(Exception, match="a bug of ours"):
            torch.compile(model, backend="mom", options={"mini_seq_len": 8, "strict": True})(ids(1, 5))


# --- compiled ---


@pytest.mark.parametrize("crop", ["head", "tail"])
def test_inductor_keeps_the_copy(crop):
    """The copy has the strides of its source. Inductor would remove a `clone` of it."""
    weight = torch.randn(8, 8, dtype=torch.float64)
    rows = {"head": lambda y: y[:4], "tail": lambda y: y[-4:]}[crop]

    def run(x):
        y = (x @ weight).exp()
        return rows(y), y @ weight

    x = torch.randn(40, 8, dtype=torch.float64)
    with torch.no_grad():
        kept, other = torch.compile(run, backend="mom", options={"mini_seq_len": 64, "strict": True})(x)
    assert reports()[-1].fallback is not None
    torch.testing.assert_close((kept, other), run(x))
    assert behind(kept) == 1


class Cropping(TinyDecoder):
    """Logits of the last token, and the rows that a window's cache keeps: the last rows of each layer's keys."""

    WINDOW = 16

    def forward(self, ids):
        x, kept = self.embed(ids), []
        for one in self.layers:
            normed = one.norm1(x)
            q, k, v = (heads(rows, one.size) for rows in (one.q(normed), *one.kv(normed).chunk(2, -1)))
            kept += [k[:, :, -self.WINDOW :], v[:, :, -self.WINDOW :]]
            seen = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            x = x + one.o(seen.transpose(1, 2).flatten(2))
            x = x + one.down(F.silu(one.gate(one.norm2(x))) * one.up(one.norm2(x)))
        return self.head(self.norm(x[:, -1:])), kept


def heads(rows, size):
    return rows.unflatten(-1, (-1, size)).transpose(1, 2)


def test_the_measured_peak_excludes_rows_that_are_not_kept():
    watch_cpu()
    model = Cropping(layers=5).eval()
    fast = torch.compile(model, backend="mom", options={"mini_seq_len": 8, "strict": True})
    tokens, width = 512, 2 * 8 * 4
    with torch.no_grad():
        x = ids(1, tokens)
        logits, kept = fast(x)
        torch.testing.assert_close((logits, kept), model(x), rtol=1e-4, atol=1e-4)
        assert all(behind(rows) == 1 for rows in kept)
        peak = peak_bytes(functools.partial(fast, x)).peak
    # The residual stream, keys and values of two layers at full length; of earlier layers only the kept rows.
    floor = tokens * (32 * 4 + 4 * width) + 3 * 2 * model.WINDOW * width
    assert reports()[-1].floor_bytes == floor
    assert floor <= peak <= floor + 96 * 1024
    assert len(reports()[-1].own_rows) == 10


@pytest.mark.slow
def test_a_gemma_like_prefill_of_4096_tokens_takes_16_mib():
    watch_cpu()
    model = models.windows(4096)
    fast = torch.compile(model, backend="mom", options={"strict": True})
    call = functools.partial(models.prefill, fast, models.tokens(model, 4096), cache=True)
    _, cache = call()
    shown, held = shown_and_held(models.cached(cache))
    assert held <= 1.2 * shown
    del cache
    assert peak_bytes(call).peak <= 16 * MIB
