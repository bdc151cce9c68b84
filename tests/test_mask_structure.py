"""The proved form of a mask agrees with the mask itself, element by element."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from mom_passes.attention.key_vectors import KeyVectors
from mom_passes.attention.mask_form import MaskForm
from mom_passes.attention.mask_structure import MaskAnalysis
from mom_passes.ops.attention import KeyConditions
from tests.captured import capture
from tests.models import ids, tiny
from tests.shares import random_examples
from tests.tracing import trace

Program = Callable[[torch.Tensor], torch.Tensor]

SMALLEST = torch.finfo(torch.float32).min


def traced_mask(program: Program, length: int, symbolic: bool) -> fx.Node:
    """The output node of `program(x)`, for an `x` of `length` elements."""
    gm = trace(program, torch.zeros(length), dynamic=symbolic)
    (output,) = gm.graph.find_nodes(op="output")
    return output.args[0]


def form_of(program: Program, length: int = 9, symbolic: bool = False) -> MaskForm | None:
    return MaskAnalysis().form(traced_mask(program, length, symbolic))


def allowed(form: MaskForm, rows: int, keys: int) -> torch.Tensor:
    """The definition without conditions on keys: the keys that each row sees under a form."""
    query, key = torch.arange(rows)[:, None] + int(form.start), torch.arange(keys)[None]
    seen = key <= query if form.causal else torch.ones(rows, keys, dtype=torch.bool)
    return seen if form.window is None or not form.causal else seen & (key > query - form.window)


def assert_holds(form: MaskForm, mask: torch.Tensor, conditions: torch.Tensor | None = None) -> None:
    """`conditions`: the keys that each query of each batch entry sees under the conditions on keys."""
    seen = mask if mask.dtype == torch.bool else mask == 0
    bound = allowed(form, *mask.shape[-2:]).expand(mask.shape)
    seen, bound = torch.broadcast_tensors(seen, bound if conditions is None else bound & conditions)
    if form.exact:
        assert torch.equal(seen, bound)
        if mask.dtype != torch.bool:
            assert (mask.expand_as(bound)[~bound] <= SMALLEST).all()
        return
    hidden = ~mask if mask.dtype == torch.bool else mask == -math.inf
    assert (hidden | bound).all()


def conditions_of(form: MaskForm, mask: fx.Node, inputs: list[Any]) -> torch.Tensor:
    """The keys that each query sees under the form's conditions, from the vectors made for them in the graph."""
    if not kinds(form):
        return torch.ones((), dtype=torch.bool)
    graph, (batch, *_, keys) = mask.graph, mask.meta["val"].shape
    output = next(iter(reversed(graph.nodes)))
    made = KeyVectors(graph).arguments(form, (batch, keys), before=output)
    module = fx.GraphModule(torch.nn.Module(), graph)
    vectors = dict(zip(made, values_of(module, list(made.values()), inputs), strict=True))
    spans = vectors.pop("spans", None)
    window = None if form.causal else form.window
    rows, keys = values_of(module, [mask], inputs)[0].shape[-2:]
    seen = KeyConditions(**vectors).visible((0, rows), (0, keys), window, torch.device("cpu"))
    if spans is not None:
        assert_spans(spans, seen.expand(-1, -1, rows, keys), form)
    return seen


def assert_spans(spans: torch.Tensor, seen: torch.Tensor, form: MaskForm) -> None:
    """A range of `mom.spans` equals the visible keys, up to the query where there are positions."""
    batch, _, rows, keys = seen.shape
    query, key = torch.arange(rows)[:, None], torch.arange(keys)[None]
    for entry in range(batch):
        found = spans[min(entry, len(spans) - 1)].expand(rows, 2)
        if found[0, 0] < 0:
            continue
        within = (key >= found[:, :1]) & (key < found[:, 1:])
        if form.positions is not None:
            within &= key <= query
            within &= key > query - (form.window or keys)
        assert torch.equal(within, seen[entry, 0])


def positions(x: torch.Tensor) -> torch.Tensor:
    return torch.arange(x.shape[0])


def pair(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return positions(x)[:, None], positions(x)[None]


def causal(x: torch.Tensor) -> torch.Tensor:
    query, key = pair(x)
    return key <= query


def windowed(x: torch.Tensor, window: int) -> torch.Tensor:
    query, key = pair(x)
    return (key <= query) & (key > query - window)


def additive(seen: torch.Tensor, fill: float = -math.inf) -> torch.Tensor:
    return torch.where(seen, 0.0, fill)


def old_style(x: torch.Tensor) -> torch.Tensor:
    return torch.full((x.shape[0], x.shape[0]), SMALLEST).triu_(1)


def chunked(x: torch.Tensor) -> torch.Tensor:
    query, key = pair(x)
    return (key // 4 == query // 4) & (key <= query)


def packed(x: torch.Tensor) -> torch.Tensor:
    """Sequences that begin wherever `x > 1`."""
    number = (x > 1).cumsum(0)
    return number[:, None] == number[None]


def given_positions(x: torch.Tensor) -> torch.Tensor:
    return (x * 4).to(torch.int64)


def ordered(x: torch.Tensor, window: int | None = None) -> torch.Tensor:
    at = given_positions(x)
    seen = at[None] <= at[:, None]
    return seen if window is None else seen & (at[None] > at[:, None] - window)


def behind_a_past(x: torch.Tensor, window: int | None = None) -> torch.Tensor:
    """Queries after five keys."""
    query, key = positions(x)[:, None] + 5, torch.arange(x.shape[0] + 5)[None]
    seen = key <= query
    return seen if window is None else seen & (key > query - window)


CAUSAL = MaskForm(True)
FIVE = sympy.Integer(5)

#: A program, its form without conditions on keys, and the kinds of these conditions.
KNOWN: dict[str, tuple[Program, MaskForm | None] | tuple[Program, MaskForm | None, str]] = {
    "causal": (causal, CAUSAL),
    "additive": (lambda x: additive(causal(x)), CAUSAL),
    "smallest instead of -inf": (lambda x: additive(causal(x), SMALLEST), CAUSAL),
    "another number": (lambda x: additive(causal(x), -1e4), None),
    "tril": (lambda x: torch.ones(x.shape[0], x.shape[0], dtype=torch.bool).tril(), CAUSAL),
    "triu of smallest": (old_style, CAUSAL),
    "inverted": (lambda x: torch.zeros(x.shape[0], x.shape[0]).masked_fill(~causal(x), SMALLEST), CAUSAL),
    "with heads": (lambda x: causal(x)[None, None].expand(2, 3, -1, -1), CAUSAL),
    "window": (lambda x: windowed(x, 4), MaskForm(True, 4)),
    "window of one": (lambda x: additive(windowed(x, 1), SMALLEST), MaskForm(True, 1)),
    "two windows": (lambda x: windowed(x, 4) & windowed(x, 6), MaskForm(True, 4)),
    "shifted alike": (lambda x: (positions(x) + 5)[None] <= (positions(x) + 5)[:, None], CAUSAL),
    "all": (lambda x: pair(x)[0] >= 0 * pair(x)[1], MaskForm(False)),
    "padding": (lambda x: causal(x) & (x > 0)[None], CAUSAL, "keys"),
    "padding, additive": (lambda x: additive(causal(x) & (x > 0)[None]), CAUSAL, "keys"),
    "padding and window": (lambda x: windowed(x, 3) & (x > 0)[None], MaskForm(True, 3), "keys"),
    "padding looked up": (lambda x: causal(x) & (x > 0)[positions(x)][None], CAUSAL, "keys"),
    "padding, negated": (lambda x: causal(x) & ~(x > 0)[None], CAUSAL, "keys"),
    "two conditions": (lambda x: causal(x) & (x > 0)[None] & (x < 1)[None], CAUSAL, "keys keys"),
    "padded queries": (lambda x: causal(x) & (x > 0)[:, None], MaskForm(True, exact=False)),
    "packed": (lambda x: causal(x) & packed(x), CAUSAL, "segments"),
    "packed and padded": (lambda x: causal(x) & packed(x) & (x > 0)[None], CAUSAL, "keys segments"),
    "packed alone": (packed, MaskForm(False), "segments"),
    "not of one segment": (lambda x: causal(x) & ~packed(x), MaskForm(True, exact=False)),
    "in given order": (lambda x: ordered(x, None), MaskForm(False), "positions"),
    "in a window of given positions": (lambda x: ordered(x, 3), MaskForm(False, 3), "positions"),
    "packed in given order": (lambda x: packed(x) & ordered(x), MaskForm(False), "segments positions"),
    "in the opposite order": (lambda x: ordered(x).T, None),
    "window of positions alone": (lambda x: given_positions(x)[None] > given_positions(x)[:, None] - 3, None),
    "two windows, of both kinds": (lambda x: ordered(x, 3) & windowed(x, 4), MaskForm(True, 4, exact=False)),
    "padding, smallest": (lambda x: additive(causal(x) & (x > 0)[None], SMALLEST), None),
    "padding alone": (lambda x: (x > 0)[None].expand(x.shape[0], -1), MaskForm(False), "keys"),
    "bias and -inf": (lambda x: torch.where(causal(x), x[None], -math.inf), MaskForm(True, exact=False)),
    "strict": (lambda x: pair(x)[1] < pair(x)[0], MaskForm(True, exact=False)),
    "one ahead": (lambda x: pair(x)[1] <= pair(x)[0] + 1, MaskForm(True, start=sympy.Integer(1))),
    "one ahead, smallest": (lambda x: additive(pair(x)[1] <= pair(x)[0] + 1, SMALLEST), None),
    "behind a past": (lambda x: behind_a_past(x, None), MaskForm(True, start=FIVE)),
    "window behind a past": (lambda x: behind_a_past(x, 4), MaskForm(True, 4, start=FIVE)),
    "behind a past, smallest": (lambda x: additive(behind_a_past(x), SMALLEST), MaskForm(True, start=FIVE)),
    "transposed": (lambda x: causal(x).T, None),
    "or": (lambda x: causal(x) | (x > 0)[None], None),
    "window alone": (lambda x: pair(x)[1] > pair(x)[0] - 4, None),
    "chunked": (chunked, MaskForm(True, exact=False)),
    "a float": (lambda x: causal(x).float(), None),
}


@pytest.mark.parametrize("symbolic", [False, True])
@pytest.mark.parametrize("name", KNOWN)
def test_the_form_of_known_masks_is_proved(name: str, symbolic: bool) -> None:
    program, expected, *conditions = KNOWN[name]
    mask = traced_mask(program, 9, symbolic)
    form = MaskAnalysis().form(mask)
    if expected is None:
        assert form is None
        return
    assert form is not None
    assert kinds(form) == " ".join(conditions)
    assert replace(form, keys=(), segments=None, positions=None) == expected
    for length in (9, 4, 13) if symbolic else (9,):
        for x in (torch.randn(length), torch.arange(length) / 4, torch.ones(length)):
            value = program(x)
            assert_holds(form, value, conditions_of(form, mask, [x]).expand(1, 1, *value.shape[-2:])[0, 0])


def kinds(form: MaskForm) -> str:
    """The kinds of conditions on keys that a form has."""
    found = ["keys"] * len(form.keys)
    return " ".join(found + [name for name in ("segments", "positions") if getattr(form, name) is not None])


class Draw:
    """Builds a random program. Its decisions are drawn once, so that it can run at many lengths."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw

    def integer(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))

    def position(self) -> Program:
        """A vector that mostly, but not always, counts up by one, not always from 0."""
        kind, shift = self.integer(0, 9), self.draw(st.sampled_from([0, 0, 0, 1, -1, 2]))
        makers: list[Program] = [
            lambda x: torch.arange(x.shape[0]) + shift,
            lambda x: torch.arange(shift, x.shape[0] + shift),
            lambda x: torch.ones(x.shape[0], dtype=torch.int64).cumsum(0) - 1 + shift,
            lambda x: torch.cat([positions(x)[:1] - 1, positions(x)])[1:],
            lambda x: torch.cat([positions(x)[:1] - 1, positions(x)])[:-1] + shift,
            lambda x: torch.cat([positions(x)[:1], positions(x)])[:-1],
            lambda x: positions(x)[positions(x)],
            lambda x: (positions(x) * 2)[positions(x)] - positions(x),
            lambda x: positions(x)[positions(x) - 1],
            lambda x: (positions(x)[:, None] - positions(x)[None] * 0).select(1, shift),
        ]
        return makers[kind]

    def statement(self) -> Program:
        query, key = self.position(), self.position()
        compare = self.draw(st.sampled_from([torch.le, torch.lt, torch.ge, torch.gt, torch.eq, torch.ne]))
        offset, factor = self.integer(-4, 4), self.draw(st.sampled_from([1, 1, 1, 1, 2, -1]))
        packed = self.draw(st.booleans())

        def program(x: torch.Tensor) -> torch.Tensor:
            if packed and offset == 0:
                jumps = (query(x)[1:] - query(x)[:-1] != 1).cumsum(0)
                jumps = torch.cat([jumps[:1] * 0, jumps])
                return jumps[:, None] == jumps[None]
            return compare(key(x)[None] * factor, query(x)[:, None] * factor + offset)

        return program

    def mask(self) -> Program:
        """A combination of statements, as a boolean or an additive mask."""
        statements = [self.statement() for _ in range(self.integer(1, 3))]
        joins = [self.draw(st.sampled_from(["and", "and", "and", "or"])) for _ in statements]
        negate = self.draw(st.sampled_from([False, False, True]))
        start_causal = self.draw(st.booleans())
        padded, in_segments = self.integer(0, 3) == 3, self.integer(0, 3) == 3
        ending = self.draw(st.sampled_from(["bool", "-inf", "smallest", "swapped", "sum", "expand", "view", "number"]))

        def program(x: torch.Tensor) -> torch.Tensor:
            seen = causal(x) if start_causal else statements[0](x)
            for statement, join in zip(statements, joins, strict=True):
                seen = seen & statement(x) if join == "and" else torch.logical_or(seen, statement(x))
            seen = ~seen if negate else seen
            seen = seen & (x > 0)[None] if padded else seen
            seen = seen & packed(x) if in_segments else seen
            return self.finished(seen, x, ending)

        return program

    @staticmethod
    def finished(seen: torch.Tensor, x: torch.Tensor, ending: str) -> torch.Tensor:
        endings: dict[str, Callable[[], torch.Tensor]] = {
            "bool": lambda: seen,
            "-inf": lambda: additive(seen),
            "smallest": lambda: additive(seen, SMALLEST),
            "swapped": lambda: torch.where(seen, -math.inf, 0.0),
            "sum": lambda: additive(seen) + additive(causal(x)),
            "expand": lambda: seen[None, None].expand(2, 1, -1, -1),
            "view": lambda: seen.view(1, x.shape[0], 1, x.shape[0]).permute(0, 2, 1, 3),
            "number": lambda: seen.to(torch.int64) * causal(x).to(torch.int64) == 1,
        }
        return endings[ending]()


@st.composite
def programs(draw: st.DrawFn) -> Program:
    return Draw(draw).mask()


@random_examples(40, 400, settings(deadline=None), programs(), st.integers(3, 12), st.booleans())
def test_the_form_of_a_random_mask_is_correct(program: Program, length: int, symbolic: bool) -> None:
    mask = traced_mask(program, length, symbolic)
    form = MaskAnalysis().form(mask)
    if form is None:
        return
    for n in (3, 4, 7, 11) if symbolic else (length,):
        x = torch.randn(n)
        assert_holds(form, program(x), conditions_of(form, mask, [x]))


@given(st.integers(2, 40), st.integers(1, 45))
@settings(max_examples=60, deadline=None)
def test_the_size_of_a_window_is_exact(length: int, window: int) -> None:
    def program(x: torch.Tensor) -> torch.Tensor:
        return windowed(x, window)

    form = form_of(program, length)
    assert form is not None
    assert form.exact
    assert_holds(form, program(torch.zeros(length)))
    # A window as long as the sequence is none.
    assert form.window == (window if window < length else None)


FAMILIES: dict[str, tuple[dict[str, Any], set[int | None]]] = {
    "Llama": ({"num_hidden_layers": 1}, {None}),
    "Mistral": ({"num_hidden_layers": 1, "sliding_window": 5}, {5}),
    "Qwen3": ({"num_hidden_layers": 1}, {None}),
    "Phi3": ({"num_hidden_layers": 1, "sliding_window": 5}, {5}),
    "Gemma3Text": (
        {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
        {5, None},
    ),
}


def attention_masks(gm: fx.GraphModule) -> list[fx.Node]:
    target = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    nodes = gm.graph.find_nodes(op="call_function", target=target)
    return [node.kwargs["attn_mask"] for node in nodes if node.kwargs.get("attn_mask") is not None]


#: With symbolic sizes a proof takes longer: one model with full attention, and one with both kinds.
QUICK = {"Llama"}
#: Models whose masks are built as those of others.
ALIKE = {"Qwen3", "Phi3", "Mistral"}
CASES = [pytest.param(family, False, marks=[pytest.mark.slow] if family in ALIKE else []) for family in FAMILIES] + [
    pytest.param(family, True, marks=[] if family in QUICK else [pytest.mark.slow]) for family in FAMILIES
]


@pytest.mark.parametrize(("family", "dynamic"), CASES)
def test_the_form_of_masks_of_hugging_face_models_is_proved(family: str, dynamic: bool) -> None:
    """With and without padding. The values of the masks come from a run of the graph."""
    changes, windows = FAMILIES[family]
    model = tiny(family, **changes)
    for batch, padding in ((1, False), (2, True)):
        inputs = {"input_ids": ids(batch, 11)}
        if padding:
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            inputs["attention_mask"][0, :3] = 0
        captured = capture(model.forward, dynamic=dynamic, use_cache=False, **inputs)
        masks = attention_masks(captured.gm)
        assert masks
        forms = [MaskAnalysis().form(mask) for mask in masks]
        assert {form.window for form in forms} == windows
        assert all(form.causal and form.exact and len(form.keys) == padding for form in forms)
        values = values_of(captured.gm, masks, captured.inputs)
        for form, mask, value in zip(forms, masks, values, strict=True):
            assert_holds(form, value, conditions_of(form, mask, captured.inputs))


def test_the_form_of_masks_of_eager_gemma2_is_proved() -> None:
    """The model adds its mask to the scores itself."""
    model = tiny("Gemma2", sliding_window=5)
    captured = capture(model.forward, use_cache=False, input_ids=ids(1, 11))
    analysis = MaskAnalysis()
    claims = {}
    for node in captured.gm.graph.nodes:
        shape = getattr(node.meta.get("val"), "shape", ())
        if node.op == "call_function" and len(shape) == 4 and tuple(shape[-2:]) == (11, 11):
            form = analysis.form(node)
            if form is not None:
                claims[node] = form
    assert {(form.causal, form.window) for form in claims.values() if form.exact} >= {(True, None), (True, 5)}
    for form, value in zip(claims.values(), values_of(captured.gm, list(claims), captured.inputs), strict=True):
        assert_holds(form, value)


def values_of(gm: fx.GraphModule, nodes: list[fx.Node], inputs: list[Any]) -> list[torch.Tensor]:
    interpreter = fx.Interpreter(gm, garbage_collect_values=False)
    interpreter.run(*inputs)
    return [interpreter.env[node] for node in nodes]
