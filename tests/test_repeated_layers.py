"""Identical layers are traced once, and the graph equals, node for node, an ordinary trace by AOTAutograd.

Layers that write to their operands, and layers with other operators, are traced in place.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, assume, settings
from hypothesis import strategies as st
from torch import fx, nn

import mom_compile.capture as capturing
from mom_compile.torch_compat.aot_autograd import trace
from mom_compile.torch_compat.dynamo import floats_are_constants
from mom_compile.torch_compat.inductor import mark_boxed
from mom_passes.errors import PassError
from mom_passes.graph import repeated_layers
from mom_passes.graph.edit import attribute
from mom_passes.graph.effects import changes_state, written_by
from mom_passes.graph.structure import lines_of
from mom_passes.torch_compat import INVOKE_SUBGRAPH
from tests.models import TinyDecoder, prompt, small_model
from tests.programs import ATTENTION, HIDDEN, ROWWISE, STEPS, Weighted, Weights
from tests.shares import random_examples

LAYERS = 4


# --- what is traced, and how often ---


@dataclass
class Traced:
    """Graphs as the passes are given them, what they returned, and for each how many layers were called in how many
    graphs of their own when AOTAutograd was given it."""

    gms: list[fx.GraphModule] = field(default_factory=list)
    called: list[tuple[int, int]] = field(default_factory=list)
    result: Any = None

    @cached_property
    def texts(self) -> list[list[str]]:
        return [[*_constants(gm), *lines_of(gm.graph)] for gm in self.gms]

    @property
    def kinds(self) -> list[list[Any]]:
        """Dtypes, devices, sizes and strides of every value."""
        return [[_kind(node.meta.get("val")) for node in gm.graph.nodes] for gm in self.gms]


def _constants(gm: fx.GraphModule) -> list[str]:
    """The attributes of a graph in the order in which they are read, by value: layers may share one."""
    found = []
    for node in gm.graph.find_nodes(op="get_attr"):
        found.append(str(attribute(gm, str(node.target))))
        node.target = "a constant"
    return found


def _kind(value: Any) -> Any:
    return [_kind(one) for one in value] if isinstance(value, (tuple, list)) else str(repeated_layers._kind(value))


def traced(
    function: Callable[..., Any], *args: Any, once: bool = True, dynamic: bool | None = False, strict: bool = True,
    floats: bool = True, **kwargs: Any,
) -> Traced:  # fmt: skip
    """A call, whose graphs run as they are; `once`: as ours are captured, else as AOTAutograd does it.
    `floats` are constants."""
    found = Traced()

    def inner(gm: fx.GraphModule, inputs: Sequence[Any], **settings: Any) -> Callable[..., Any]:
        found.gms.append(gm)
        return mark_boxed(lambda values: gm(*values))

    def seen(gm: fx.GraphModule, inputs: Sequence[Any], inner_compile: Any, **settings: Any) -> Any:
        calls = gm.graph.find_nodes(op="call_function", target=INVOKE_SUBGRAPH)
        found.called.append((len(calls), len({call.args[1] for call in calls})))
        return trace(gm, inputs, inner_compile, **settings)

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        if not once:
            return trace(gm, inputs, inner, {})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(capturing, "trace", seen)
            return capturing.capture(gm, inputs, inner, {}, strict=strict)

    torch._dynamo.reset()
    with floats_are_constants() if floats else nullcontext():
        found.result = torch.compile(function, backend=backend, dynamic=dynamic, fullgraph=True)(*args, **kwargs)
    return found


@torch.no_grad()
def check(function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[tuple[int, int]]:
    """The same graph either way, and the same result. Returns the numbers of outlined layers and of graphs."""
    once, all_of_them = (traced(function, *args, once=way, **kwargs) for way in (True, False))
    assert once.texts == all_of_them.texts
    assert once.kinds == all_of_them.kinds
    _same(once.result, all_of_them.result)
    return once.called


def _same(a: Any, b: Any) -> None:
    a, b = (getattr(value, "logits", value) for value in (a, b))
    torch.testing.assert_close(a, b, rtol=0, atol=0)


class Stack(nn.Module):
    """`[B, S, HIDDEN]` through consecutive layers; `around` is applied to the result of each."""

    def __init__(self, layers: Sequence[nn.Module], around: Callable[[torch.Tensor], Any] | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.around = around

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + 1
        for layer in self.layers:
            x = layer(x)
            if self.around is not None:
                self.around(x)
        return x * 2


class Block(nn.Module):
    """A norm and an MLP with another operator between them."""

    def __init__(self, between: Callable[[torch.Tensor], torch.Tensor] | None = None, epsilon: float = 1e-3) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(HIDDEN, 24), nn.Linear(24, HIDDEN)
        self.between, self.epsilon = between, epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.epsilon)
        inner = F.silu(self.up(normed))
        if self.between is not None:
            inner = self.between(inner)
        return x + self.down(inner).tanh()


#: Tokens, and whether sizes are symbols. A single token is a constant there, too.
OTHER_LENGTHS = [(1, True), (2, False), (2, True)]


def values(batch: int = 2, tokens: int = 5) -> torch.Tensor:
    return torch.randn(batch, tokens, HIDDEN, generator=torch.Generator().manual_seed(tokens))


@pytest.mark.parametrize(
    ("tokens", "dynamic"),
    [(1, False), (37, False), (37, True), *(pytest.param(*case, marks=pytest.mark.slow) for case in OTHER_LENGTHS)],
)
def test_a_decoders_layers_are_traced_once(tokens: int, dynamic: bool) -> None:
    model = TinyDecoder(layers=LAYERS).eval()
    assert check(model, torch.arange(3 * tokens).view(3, -1) % 64, dynamic=dynamic) == [(LAYERS, 1)]


@pytest.mark.parametrize(
    ("family", "graphs", "changes"),
    [
        ("Llama", 1, {}),
        pytest.param("GPT2", 1, {"n_layer": LAYERS}, marks=pytest.mark.slow),
        pytest.param("Falcon", 1, {}, marks=pytest.mark.slow),
        pytest.param("Mixtral", 1, {}, marks=pytest.mark.slow),
        ("Gemma3Text", 2, {"num_hidden_layers": 6, "layer_types": ["sliding_attention", "full_attention"] * 3}),
    ],
)
def test_layers_of_transformers_models_are_traced_once(family: str, graphs: int, changes: dict[str, Any]) -> None:
    """Layers with a window differ from layers without."""
    model = small_model(family, **{"num_hidden_layers": LAYERS, **changes})
    inputs = prompt(2, 37, padded=True)
    layers = changes.get("num_hidden_layers", LAYERS)
    assert check(model, **inputs, logits_to_keep=1) == [(layers, graphs)]


RANDOM = settings(
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow],
)


@random_examples(
    3,
    60,
    RANDOM,
    names=st.lists(st.sampled_from(sorted({**ROWWISE, **ATTENTION})), min_size=3, max_size=6),
    tokens=st.integers(2, 19),
    batch=st.integers(1, 3),
    dynamic=st.booleans(),
)
def test_random_programs_equal_an_ordinary_trace(names: list[str], tokens: int, batch: int, dynamic: bool) -> None:
    assume(batch != tokens)  # else one symbol would stand for both, and sizes have many names

    def program(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        for name in ["linear", *names, "mlp"]:
            x = STEPS[name](x, Weights(*parameters))
        return x

    model = Stack([Weighted(program) for _ in range(LAYERS)])
    ((layers, graphs),) = check(model, values(batch, tokens), dynamic=dynamic)
    assert layers in (LAYERS - 1, LAYERS) and graphs == 1  # the first may have a size in another form


# --- different layers ---


def test_different_layers_have_separate_graphs() -> None:
    first, second = ([Block(epsilon=epsilon) for _ in range(3)] for epsilon in (1e-3, 1e-4))
    mixed = [layer for pair in zip(first, second, strict=True) for layer in pair]
    assert check(Stack(mixed), values()) == [(6, 2)]


def test_a_layer_of_another_dtype_is_traced_in_place() -> None:
    class Wide(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.double()).float()

    layers = [Block(), Block(), Wide().double(), Block()]
    assert check(Stack(layers), values()) == [(3, 1)]


def test_two_layers_are_not_outlined() -> None:
    assert check(Stack([Block(), Block()]), values()) == [(0, 0)]


def test_layers_may_return_several_values_and_read_those_of_others() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, x: torch.Tensor, sums: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            new = self.block(x)
            return new, sums + new.sum(-1)

    class Summing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Pair() for _ in range(LAYERS))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            sums, seen = x.sum(-1), []
            for layer in self.layers:
                x, sums = layer(x, sums)
                seen.append(x)
            return (sums, *seen)

    assert check(Summing(), values()) == [(LAYERS, 1)]


def test_a_value_that_a_layer_passes_on_keeps_its_storage() -> None:
    class Handing(Block):
        def forward(self, x: torch.Tensor) -> Any:
            return super().forward(x), x, x.transpose(0, 1)

    layers = nn.ModuleList(Handing() for _ in range(LAYERS))

    def all_of_them(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found: list[torch.Tensor] = []
        for layer in layers:
            x, *others = layer(x)
            found += others
        return (*found, x)

    assert check(all_of_them, values()) == [(LAYERS, 1)]
    given = values()
    with torch.no_grad():
        result = traced(all_of_them, given).result
    lies = [found.untyped_storage().data_ptr() == given.untyped_storage().data_ptr() for found in result]
    assert lies == [True, True, *(False for _ in result[2:])]


# --- layers that may not be outlined ---


@torch.library.custom_op("mom_tests::written_by_schema", mutates_args=("x",))
def written_by_schema(x: torch.Tensor) -> None:
    x.add_(1)


@written_by_schema.register_fake
def _(x: torch.Tensor) -> None:
    return None


def _by_an_operator(x: torch.Tensor) -> torch.Tensor:
    written_by_schema(x)
    return x


def _into_a_part(x: torch.Tensor) -> torch.Tensor:
    x[..., 0] = 0
    return x


def _augmented(x: torch.Tensor) -> torch.Tensor:
    x += 1
    return x


WRITES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "a method": lambda x: x.mul_(2),
    "a function": torch.relu_,
    "an argument": lambda x: F.relu(x, inplace=True),
    "an argument by its place": lambda x: F.hardtanh(x, -1.0, 1.0, True),
    "out": lambda x: torch.add(x, 1, out=x),
    "a part": _into_a_part,
    "an augmented assignment": _augmented,
    "an operator": _by_an_operator,
    "a view": lambda x: x.view(-1).clamp_(max=1).view(x.shape),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_layers_may_write_to_values_that_they_made(write: Callable[[torch.Tensor], torch.Tensor]) -> None:
    moved = (LAYERS, 1) if write is not WRITES["out"] else (0, 0)
    assert check(Stack([Block(write) for _ in range(LAYERS)]), values()) == [moved]


class Writing(nn.Module):
    """A layer that writes to its operand."""

    def __init__(self, write: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.write, self.block = write, Block()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.write(x)
        return self.block(x)


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_layers_that_write_to_an_operand_are_traced_in_place(
    write: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    assert check(Stack([Writing(write) for _ in range(LAYERS)]), values()) == [(0, 0)]


def test_a_layer_that_writes_to_an_operand_keeps_its_neighbours_in_place() -> None:
    """Their results are its operands; the other two layers are too few."""
    layers = [Block(), Block(), Writing(torch.relu_), Block(), Block(), Block()]
    assert check(Stack(layers), values()) == [(4, 1)]


def test_layers_whose_results_are_written_to_are_traced_in_place() -> None:
    """Other results may share their storage."""
    assert check(Stack([Block() for _ in range(LAYERS)], lambda x: x.mul_(2)), values()) == [(0, 0)]


def test_writes_ahead_of_all_layers_do_not_prevent_outlining() -> None:
    model = Stack([Block() for _ in range(LAYERS)])

    def written(x: torch.Tensor) -> torch.Tensor:
        return model(x.clone().mul_(2))

    assert check(written, values()) == [(LAYERS, 1)]


@pytest.mark.parametrize("strict", [False, True])
def test_an_undetected_write_is_found_when_layers_are_traced(strict: bool, monkeypatch) -> None:
    """Then all layers are traced in place, and the result is correct."""
    monkeypatch.setattr(repeated_layers, "written_by", lambda node: [])
    model = Stack([Writing(torch.relu_) for _ in range(LAYERS)])
    with torch.no_grad():
        if strict:
            with pytest.raises(PassError, match="writes to its operands"):
                _raised(model, values())
            return
        found = traced(model, values(), strict=False)
        assert found.called == [(LAYERS, 1), (0, 0)]
        assert found.texts == traced(model, values(), once=False).texts
        torch.testing.assert_close(found.result, model(values()))


def _raised(model: nn.Module, x: torch.Tensor) -> None:
    """The exception that a backend raises, without Dynamo's wrapper."""
    try:
        traced(model, x)
    except torch._dynamo.exc.BackendCompilerFailed as error:
        raise error.inner_exception from None


def test_a_layer_that_reads_a_number_off_a_tensor_is_traced_in_place() -> None:
    """With `dynamic=True`, Dynamo makes a layer's epsilon an input and reads it off a tensor."""
    layers = [Block(epsilon=1e-3 * (n + 1)) for n in range(LAYERS)]
    assert check(Stack(layers), values(), dynamic=True, floats=False)[-1] == (0, 0)


def test_a_layer_that_logs_the_use_of_an_api_is_traced_once() -> None:
    """Dynamo keeps such a call, which computes nothing, as a node. The linear attention of Qwen3.5 has two a layer."""

    class Logging(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            torch._C._log_api_usage_once("tests.repeated_layers")
            return super().forward(x)

    assert check(Stack([Logging() for _ in range(LAYERS)]), values()) == [(LAYERS, 1)]


def test_gradient_mode_and_autocast_apply_to_the_whole_graph() -> None:
    model = Stack([Block() for _ in range(LAYERS)])
    found = traced(model, values())
    assert found.called == [(0, 0)]
    found.result.sum().backward()
    assert model.layers[0].up.weight.grad is not None
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert check(model, values()) == [(0, 0)]


def test_a_layer_with_its_own_autocast_is_traced_in_place() -> None:
    class Narrow(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(x)

    assert check(Stack([Narrow() for _ in range(LAYERS)]), values()) == [(0, 0)]


def test_each_layer_draws_its_own_random_numbers() -> None:
    model = Stack([Block(torch.rand_like) for _ in range(LAYERS)])
    with torch.no_grad():
        found = traced(model, values())
    (gm,) = found.gms
    assert found.called == [(LAYERS, 1)]
    assert sum("rand" in str(node.target) for node in gm.graph.nodes) == LAYERS


# --- outlining and inlining alone ---


def calling(function: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
    graph = fx.Graph()
    nodes = fx.node.map_aggregate((args, kwargs), lambda arg: graph.placeholder("x") if arg == "x" else arg)
    return graph.call_function(function, *nodes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("function", "args"),
    [
        (torch.add, ("x", 1)), (operator.and_, ("x", "x")), (operator.add, ("x", 1)), (operator.invert, ("x",)),
        (operator.index, (1,)), (F.relu, ("x",)), (F.hardtanh, ("x", -1.0, 1.0, False)), (F.linear, ("x",)),
        (F.embedding, ("x", "x")), (torch.ops.aten.add.Tensor, ("x", "x")), (torch.ops.aten.relu, ("x",)),
    ],
)  # fmt: skip
def test_pure_functions_are_not_taken_for_writes(function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    node = calling(function, *args)
    assert not written_by(node) and not changes_state(node)


def test_inlining_untraced_layers_restores_the_graph() -> None:
    model = Stack([Block() for _ in range(LAYERS)]).eval()
    found: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        found.append(gm)
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True)(values())
    (gm,) = found
    before = lines_of(gm.graph)
    assert repeated_layers.outline_layers(gm) == 1
    assert len(lines_of(gm.graph)) < len(before)
    assert repeated_layers.inline_layers(gm)
    assert lines_of(gm.graph) == before


def test_a_layer_called_with_other_strides_gets_values_of_its_own() -> None:
    """Decomposition may change the strides of values ahead of the first layer."""
    body = fx.Graph()
    x = body.placeholder("x")
    body.output((body.call_function(torch.ops.aten.relu.default, (x,)),))
    (operand, result) = [node for node in body.nodes if node.op != "output"]
    operand.meta["val"], result.meta["val"] = torch.empty(3, 4), torch.empty(3, 4)
    graph = fx.Graph()
    across = graph.placeholder("across")
    across.meta["val"] = torch.empty(4, 3).T
    module = nn.Module()
    module.add_module("mom_layer_0", fx.GraphModule(module, body))
    call = graph.call_function(INVOKE_SUBGRAPH, (graph.get_attr("mom_layer_0"), "mom_layer_0", across))
    graph.output((graph.call_function(operator.getitem, (call, 0)),))
    gm = fx.GraphModule(module, graph)
    assert repeated_layers.inline_layers(gm)
    (relu,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default)
    assert relu.meta["val"].stride() == (1, 3)
