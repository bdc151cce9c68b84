"""Picks by an index tensor move up: only the picked rows are computed, with equal results."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mom_compile
from mom_passes.attention.form import attention_form
from mom_passes.graph.edit import copy_graph
from mom_passes.tokens.demanded_rows import demanded_rows
from mom_passes.tokens.dims import analyse_token_dims
from mom_passes.tokens.picked_rows import picked_rows
from tests.models import SMALL, ids, small_model, sweep
from tests.programs import ATTENTION, HIDDEN, ROWWISE, STEPS, Weights, weights_of
from tests.test_demanded_rows import assert_same, rows_of
from tests.test_properties import RANDOM_PROGRAMS, parameter_names
from tests.tracing import rewrite, trace

MM = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default)


def entries(x):
    return torch.arange(x.shape[0])


#: Picks of rows `[B, 3]`. Some row numbers are negative if the operator allows it.
PICKS = {
    "one of each": lambda x, rows: x[entries(x), rows[:, 0]],
    "several of each": lambda x, rows: x[entries(x)[:, None], rows],
    "expanded entries": lambda x, rows: x[entries(x)[:, None].expand(-1, rows.shape[1]), rows],
    "narrow numbers": lambda x, rows: x[entries(x), rows[:, 0].int()],
    "the same of all": lambda x, rows: x[:, rows[0]],
    "the same of all, in two dimensions": lambda x, rows: x[:, rows],
    "entries and one number": lambda x, rows: x[entries(x), rows[0, :1]],
    "entries and a row of numbers": lambda x, rows: x[entries(x)[:, None], rows[:1]],
    "gathered": lambda x, rows: x.gather(1, (rows % x.shape[1])[:, :, None].expand(-1, -1, x.shape[2])),
    "gathered by a copy": lambda x, rows: x.gather(1, (rows % x.shape[1])[:, :, None].repeat(1, 1, x.shape[2])),
    "gathered, the same of all": lambda x, rows: x.gather(1, (rows[:1] % x.shape[1])[:, :, None].expand_as(x[:, :3])),
    "selected": lambda x, rows: x.index_select(1, rows[0] % x.shape[1]),
    "looked up": lambda x, rows: torch.nn.functional.embedding(rows % x.shape[1], x[0]),
    "of a slice": lambda x, rows: x[:, 1:][entries(x), rows[:, 0] % (x.shape[1] - 1)],
    "of picks": lambda x, rows: x[:, rows[0]][entries(x), rows[:, 0] % 3],
    "twice": lambda x, rows: x[entries(x), rows[:, 0]] + x[entries(x), rows[:, 1]],
    "together with a slice": lambda x, rows: x[entries(x), rows[:, 0]] + x[:, -1],
    # What is left as it is:
    "other entries": lambda x, rows: x[(entries(x) + 1) % x.shape[0], rows[:, 0]],
    "reversed entries": lambda x, rows: x[entries(x).flip(0), rows[:, 0]],
    "entries across": lambda x, rows: x[entries(x)[None, :], rows.T.contiguous()],
    "channels": lambda x, rows: x[:, rows[0], rows[0] % x.shape[2]][..., None].expand(-1, -1, HIDDEN),
    "other rows for each channel": lambda x, rows: x.gather(1, (rows % 3)[:, :, None] + torch.arange(x.shape[2]) % 2),
    "a mask": lambda x, rows: x * (x[entries(x), rows[:, 0]] > 0)[:, None],
}  # fmt: skip


def graph_of(names, cut, *, batch=2, tokens=13, dynamic=False, also_whole=False, seed=0):
    weights = weights_of(torch.float64)

    def program(x, rows, *parameters):
        for name in names:
            x = STEPS[name](x, Weights(*parameters))
        picked = PICKS[cut](x @ Weights(*parameters).square, rows) @ Weights(*parameters).square
        return (picked, x) if also_whole else (picked,)

    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, tokens, HIDDEN, generator=generator, dtype=torch.float64)
    rows = torch.randint(-tokens, tokens, (batch, 3), generator=generator)
    return trace(program, x, rows, *weights, dynamic=dynamic), (x, rows, *weights)


def parameters(gm):
    placeholders = [n.name for n in gm.graph.nodes if n.op == "placeholder"]
    return tuple(name for name in parameter_names(gm) if name != placeholders[1])


def moved(gm):
    gm = attention_form(copy_graph(gm))
    static = {n for n in gm.graph.nodes if n.op == "placeholder" and n.name in parameters(gm)}
    dims = analyse_token_dims(gm, static_inputs=static)
    if dims is None:
        return gm
    gm = demanded_rows(gm, dims)
    static = {n for n in gm.graph.nodes if n.op == "placeholder" and n.name in parameters(gm)}
    dims = analyse_token_dims(gm, static_inputs=static)
    return gm if dims is None else picked_rows(gm, dims)


LAYERS = ["linear", "causal", "mlp", "rope", "causal", "mlp", "layer_norm"]


@pytest.mark.parametrize("dynamic", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("cut", PICKS)
def test_graphs_with_every_kind_of_pick_are_equal(cut, dynamic):
    gm, inputs = graph_of(LAYERS, cut, dynamic=dynamic)
    expected = gm(*inputs)
    assert_same(moved(gm)(*inputs), expected)
    assert_same(rewrite(gm, 4, parameters(gm))[0](*inputs), expected)


def products(gm):
    """Rows of all products but those of keys and values, per call."""
    return [n.meta["val"].shape[:-1].numel() for n in gm.graph.nodes if n.target in MM]


LEFT = {"other entries", "reversed entries", "entries across", "channels", "other rows for each channel", "twice",
        "together with a slice", "of picks", "looked up", "a mask"}  # fmt: skip


@pytest.mark.parametrize("cut", [name for name in PICKS if name not in LEFT])
def test_every_kind_of_pick_moves(cut):
    """The last attention has only the picked queries, and products after it only the picked rows."""
    gm, inputs = graph_of(LAYERS, cut)
    after = moved(gm)
    first, last = (
        n.args[0].meta["val"].shape[2] for n in after.graph.nodes if n.target is torch.ops.mom.attention.default
    )
    count = inputs[1].numel() if "two dimensions" in cut else inputs[1].shape[1]
    assert first == 13 and last in (1, count)
    assert all(rows <= inputs[0].shape[0] * count for rows in products(after)[-4:])


@pytest.mark.parametrize("cut", sorted(LEFT - {"of picks", "looked up"}))
def test_unsupported_picks_leave_the_graph_unchanged(cut):
    gm, _ = graph_of(LAYERS, cut)
    shapes = [
        n.args[0].meta["val"].shape[2] for n in moved(gm).graph.nodes if n.target is torch.ops.mom.attention.default
    ]
    assert shapes == [13, 13]


ANY_PICK = (
    st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=6),
    st.sampled_from(sorted(PICKS)),
    st.integers(1, 3),
    st.integers(8, 19),
    st.booleans(),
    st.integers(0, 99),
)


@settings(RANDOM_PROGRAMS, max_examples=12)
@given(*ANY_PICK)
def test_random_programs_with_picks_are_equal(names, cut, batch, tokens, also_whole, seed):
    gm, inputs = graph_of(names, cut, batch=batch, tokens=tokens, also_whole=also_whole, seed=seed)
    assert_same(moved(gm)(*inputs), gm(*inputs))


@pytest.mark.slow
@settings(RANDOM_PROGRAMS, max_examples=100)
@given(*ANY_PICK)
def test_many_random_programs_with_picks_are_equal(names, cut, batch, tokens, also_whole, seed):
    gm, inputs = graph_of(names, cut, batch=batch, tokens=tokens, also_whole=also_whole, seed=seed)
    assert_same(moved(gm)(*inputs), gm(*inputs))


@pytest.mark.parametrize("name", sorted({**ROWWISE, **ATTENTION}))
@pytest.mark.parametrize("cut", sweep(["one of each", "the same of all"], quick=["one of each"]))
def test_every_rowwise_step_runs_on_the_picked_rows_only(name, cut):
    gm, inputs = graph_of(["linear", "causal", name], cut, batch=2, tokens=11)
    after = moved(gm)
    assert_same(after(*inputs), gm(*inputs))
    picked = {"one of each": 1, "the same of all": 3}[cut]
    queries = rows_of(after, torch.ops.mom.attention.default)
    if name in ATTENTION:
        assert picked in queries or picked * 2 in products(after)
    else:
        assert queries == [picked]


def test_a_value_with_a_reader_of_all_rows_is_computed_once():
    gm, inputs = graph_of(["mlp", "causal", "mlp"], "one of each", also_whole=True)
    after = moved(gm)
    assert_same(after(*inputs), gm(*inputs))
    assert len(products(after)) == len(products(gm))


@pytest.mark.parametrize("cut", ["one of each", "the same of all", "selected"])
@pytest.mark.parametrize("number", [13, -14])
def test_a_row_number_out_of_range_raises(cut, number):
    gm, (x, rows, *weights) = graph_of(LAYERS, cut)
    after = moved(gm)
    rows = torch.full_like(rows, number)
    if cut == "selected":
        rows = rows % 13  # index_select takes no others
        assert_same(after(x, rows, *weights), gm(x, rows, *weights))
        return
    for graph in (gm, after):
        with pytest.raises((IndexError, RuntimeError)):
            graph(x, rows, *weights)


# ----------------------------------------------------------------------------------------------- whole models

OPTIONS = {"strict": True, "mini_seq_len": 16}


def compiled(function: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(function, backend="mom", options=OPTIONS, dynamic=True)


@pytest.mark.parametrize(
    "family", sweep(["Llama", "GPT2", "Gemma3Text", "Mistral", "Qwen3"], quick=["Llama"])
)
@pytest.mark.parametrize("side", sweep(["left", "right", "none"], quick=["left"]))
def test_models_return_logits_of_the_last_token_per_sequence(family: str, side: str, eager_pieces: None) -> None:
    """Logits `[B, V]` of sequences of different lengths, in float64; loops compute no logits."""
    model = small_model(family, torch.float64, num_hidden_layers=2)

    def yes_or_no(input_ids, mask):
        last = (mask * torch.arange(mask.shape[1])).argmax(1) if side != "right" else mask.sum(1) - 1
        at = (mask.cumsum(1) - 1).clamp(min=0)
        given = {} if side == "none" else {"attention_mask": mask, "position_ids": at}
        hidden = model.base_model(input_ids=input_ids, **given, use_cache=False).last_hidden_state
        return model.lm_head(hidden)[torch.arange(input_ids.shape[0]), last]

    run = compiled(yes_or_no)
    for tokens in (70, 53):
        batch = ids(3, tokens, tokens, SMALL.vocabulary)
        mask = torch.ones_like(batch)
        for row, count in enumerate((tokens, 33, 2)):
            mask[row, count:] = side == "none"
        if side == "left":
            mask = mask.flip(1)
        with torch.no_grad():
            expected = yes_or_no(batch, mask)
            torch.testing.assert_close(run(batch, mask), expected, rtol=0, atol=1e-10)
    (report,) = mom_compile.reports()
    stored = [one.type.shape for stage in report.stages for one in stage.crossing]
    assert stored and not any(shape[-1] == SMALL.vocabulary for shape in stored)
    # The operators of the last layer after its keys and values are in no loop.
    assert len(report.stages) == model.config.num_hidden_layers


@pytest.mark.slow
def test_models_return_logits_of_several_rows_per_sequence_or_of_shared_rows(eager_pieces: None) -> None:
    model = small_model("Llama", torch.float64)

    def own(input_ids, rows):
        hidden = model.model(input_ids=input_ids, use_cache=False).last_hidden_state
        return model.lm_head(hidden[torch.arange(input_ids.shape[0])[:, None], rows])

    def same(input_ids, rows):
        hidden = model.model(input_ids=input_ids, use_cache=False).last_hidden_state
        return model.lm_head(hidden[:, rows[0]])

    for function in (own, same):
        run = compiled(function)
        for tokens in (70, 53):
            batch = ids(2, tokens, tokens, SMALL.vocabulary)
            rows = torch.tensor([[3, -1, 3, 40], [-tokens, 0, 17, 1]])
            with torch.no_grad():
                torch.testing.assert_close(run(batch, rows), function(batch, rows), rtol=0, atol=1e-10)
        assert mom_compile.reports()[-1].stages


@pytest.mark.slow
def test_compiled_picks_save_memory_and_check_row_numbers() -> None:
    """With Inductor, a row number out of range raises, too."""
    model = small_model("Llama")

    def picked(input_ids, last):
        hidden = model.model(input_ids=input_ids, use_cache=False).last_hidden_state
        return model.lm_head(hidden[torch.arange(input_ids.shape[0]), last])

    run = compiled(picked)
    batch = ids(2, 64, 0, SMALL.vocabulary)
    with torch.no_grad():
        for last in (torch.tensor([63, 5]), torch.tensor([-1, -64])):
            torch.testing.assert_close(run(batch, last), picked(batch, last), rtol=1e-5, atol=1e-5)
        # Inductor 2.11 leaves the lower bound of this kernel unchecked.
        for beyond in (64,) if torch.__version__.startswith("2.11") else (64, -65):
            with pytest.raises((IndexError, RuntimeError)):
                run(batch, torch.tensor([3, beyond]))
    (report,) = mom_compile.reports()
    assert report.stages and not report.eager_pieces


# ------------------------------------------------------------------------------------------------- attention


def vectors(batch, tokens):
    """Per-key arguments of an attention: two packed sequences, and one key that is masked."""
    at = torch.arange(tokens).expand(batch, -1)
    first = 5 + torch.arange(batch)[:, None]
    return {"keys": at != 2, "segments": (at >= first).long(), "positions": torch.where(at >= first, at - first, at)}


CALLS = {
    "causal": {"is_causal": True},
    "window": {"is_causal": True, "window": 3},
    "keys": {"is_causal": True, "told": ("keys",)},
    "segments": {"is_causal": True, "told": ("keys", "segments")},
    "segments of all": {"is_causal": True, "told": ("segments",), "alike": True},
    "positions": {"told": ("segments", "positions"), "window": 3},
    "positions, causal, window": {"is_causal": True, "told": ("positions",), "window": 4},
    "boolean mask": {"is_causal": True, "mask": torch.bool},
    "additive mask": {"is_causal": True, "mask": torch.float64, "window": 6},
    "mask alone": {"mask": torch.float64},
    "mask of each entry": {"mask": torch.bool, "own": True, "is_causal": True},
    "everybody": {},
}


@pytest.mark.parametrize("start", [pytest.param(0, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize("cut", sweep(["one of each", "several of each", "the same of all"], quick=["several of each"]))
@pytest.mark.parametrize("call", CALLS)
def test_picked_queries_see_the_same_keys(call: str, cut: str, start: int) -> None:
    """Also with `start` keys in a cache: the position of a query is its row number plus `start`."""
    batch, queries, tokens = 3, 12, 12 + start
    asked = dict(CALLS[call])
    told = vectors(1 if asked.pop("alike", False) else batch, tokens)
    told = {name: told[name] for name in asked.pop("told", ())}
    mask_type, own = asked.pop("mask", None), asked.pop("own", False)
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(batch if own else 1, 1, queries, tokens, generator=generator, dtype=torch.float64) - 0.3
    mask = None if mask_type is None else mask > 0 if mask_type is torch.bool else mask
    past = torch.randn(batch, 2, start, 4, generator=generator, dtype=torch.float64)
    given = (past, *([] if mask is None else [mask]), *told.values())

    def program(x, rows, square, past, *more):
        more = iter(more)
        masked = None if mask is None else next(more)
        keys = torch.cat([past, (x @ square).view(batch, queries, 2, 4).transpose(1, 2)], 2)
        query = (x @ square.T).view(batch, queries, 2, 4).transpose(1, 2)
        call = {"is_causal": False, **asked, **dict(zip(told, more, strict=True))}
        attended = torch.ops.mom.attention(query, keys, keys, masked, start, call.pop("is_causal"), 0.5, **call)
        return (PICKS[cut](attended.transpose(1, 2).reshape(batch, queries, 8) @ square, rows),)

    x = torch.randn(batch, queries, 8, generator=generator, dtype=torch.float64)
    rows = torch.randint(-queries, queries, (batch, 3), generator=generator)
    inputs = (x, rows, weights_of(torch.float64).square, *given)
    gm = trace(program, *inputs)
    names = [n for n in gm.graph.nodes if n.op == "placeholder"]
    dims = analyse_token_dims(gm, static_inputs={names[2], *names[3:]})
    assert dims is not None and dims.seed_dim.index == 1
    after = picked_rows(gm, dims)
    (attention,) = after.graph.find_nodes(op="call_function", target=torch.ops.mom.attention.default)
    assert attention.args[0].meta["val"].shape[2] == (1 if cut == "one of each" else 3)
    assert_same(after(*inputs), gm(*inputs))


def test_many_picked_queries_stay_in_the_loops() -> None:
    """Their mask would be too large. Operators after the attention run on picked rows."""
    weights = weights_of(torch.float64)

    def program(x, rows, *parameters):
        for name in ("causal", "mlp", "causal", "mlp"):
            x = STEPS[name](x, Weights(*parameters))
        return ((x @ Weights(*parameters).up.T)[:, rows],)

    x = torch.randn(1, 300, HIDDEN, dtype=torch.float64)
    rows = torch.randint(300, (100,))
    gm = trace(program, x, rows, *weights)
    after = moved(gm)
    assert rows_of(after, torch.ops.mom.attention.default) == [300, 300]
    assert products(after)[-1] == 100
    assert_same(after(x, rows, *weights), gm(x, rows, *weights))
