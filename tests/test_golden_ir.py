"""A small model before and after every pass that changes it. `EXPECTTEST_ACCEPT=1 pytest tests/test_golden_ir.py`
writes the new texts into this file.

The graph is printed by `tests/graph_text.py`. The text of a pass has the lines that it removes (-) and adds (+).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import fx, nn

from mom_compile.backend import static_input_names
from mom_compile.capture import capture
from mom_compile.pipeline import run_pipeline
from mom_compile.torch_compat.inductor import mark_boxed
from mom_passes.loops.loop import RowLimit
from tests.graph_text import Printer, changed

HIDDEN, HEADS, CHANNELS, WIDE, VOCABULARY, LAYERS = 8, 2, 4, 16, 32, 2

#: Cosines and sines of the positions.
Rope = tuple[torch.Tensor, torch.Tensor]


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(HIDDEN))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * self.scale


class Attention(nn.Module):
    """Two query heads share one key head."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = (nn.Linear(HIDDEN, HIDDEN, bias=False) for _ in range(2))
        self.k, self.v = (nn.Linear(HIDDEN, CHANNELS, bias=False) for _ in range(2))

    def forward(self, x: torch.Tensor, rope: Rope) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = (p(x).unflatten(-1, (-1, CHANNELS)).transpose(1, 2) for p in (self.q, self.k, self.v))
        q, k = rotated(q, rope), rotated(k, rope)
        keys, values = (t.expand(-1, HEADS, -1, -1) for t in (k, v))
        out = F.scaled_dot_product_attention(q, keys, values, is_causal=True)
        return self.o(out.transpose(1, 2).flatten(-2)), k, v


def rotated(x: torch.Tensor, rope: Rope) -> torch.Tensor:
    cos, sin = rope
    return x * cos + x.flip(-1) * sin


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2, self.attention = Norm(), Norm(), Attention()
        self.gate, self.up = (nn.Linear(HIDDEN, WIDE, bias=False) for _ in range(2))
        self.down = nn.Linear(WIDE, HIDDEN, bias=False)

    def forward(self, x: torch.Tensor, rope: Rope) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        out, k, v = self.attention(self.norm1(x), rope)
        x = x + out
        y = self.norm2(x)
        return x + self.down(torch.relu(self.gate(y)) * self.up(y)), k, v


class Decoder(nn.Module):
    """Like Llama, with relu in place of silu: the logits of the last token, and keys and values of each layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm = Norm()
        self.register_buffer("frequencies", torch.tensor([1.0, 0.5, 1.0, 0.5]))
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = self.embed(ids)
        angles = torch.arange(ids.shape[1])[:, None] * self.frequencies
        rope = angles.cos(), angles.sin()
        cache: list[torch.Tensor] = []
        for layer in self.layers:
            x, k, v = layer(x, rope)
            cache += [k, v]
        return self.head(self.norm(x)[:, -1:]), *cache


class Passes:
    """Runs the passes on a captured graph and prints it before them and after each."""

    def __init__(self, **options: Any) -> None:
        self.options = options
        #: The graph before the passes, and after each that changes it, by the name of the pass.
        self.graphs: dict[str, list[str]] = {}

    def backend(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        self.inputs = [_short(node.name) for node in gm.graph.nodes if node.op == "placeholder"]
        return capture(gm, example_inputs, self.graph, {})

    def graph(self, gm: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Callable[..., Any]:
        printer = Printer(self.inputs)
        last = self.graphs["captured"] = printer.lines(gm)

        def watch(step: str, found: Any) -> None:
            nonlocal last
            rewritten = getattr(found, "gm", None)
            if isinstance(rewritten, fx.GraphModule) and (text := printer.lines(rewritten)) != last:
                last = self.graphs[step] = text

        static = static_input_names(gm, kwargs)
        run_pipeline(gm, static_inputs=static, limit=RowLimit(4), watch=watch, **self.options)
        return mark_boxed(lambda inputs: gm(*inputs))

    def after(self, name: str) -> str:
        """The whole graph after a pass."""
        return "\n".join(self.graphs[name]) + "\n"

    def change(self, name: str) -> str:
        """The lines that a pass removes and adds."""
        names = list(self.graphs)
        return "\n".join(changed(self.graphs[names[names.index(name) - 1]], self.graphs[name])) + "\n"


def _short(name: str) -> str:
    """`layers.0.norm1.scale` of Dynamo's `l_self_modules_layers_modules_0_modules_norm1_parameters_scale_`."""
    if name.startswith("s") and name[1:].isdigit():
        return "S"
    for part in ("self_", "modules_", "parameters_", "buffers_"):
        name = name.replace(part, ".")
    return name.removeprefix("l_").strip("._").replace("_.", ".").replace("..", ".")


@functools.cache
def passes(kv_on_host: bool = False) -> Passes:
    found = Passes(kv_on_host=kv_on_host)
    ids = torch.zeros(1, 12, dtype=torch.int64)
    torch._dynamo.mark_dynamic(ids, 1)
    with torch.no_grad():
        torch.compile(Decoder().eval(), backend=found.backend)(ids)
    return found


def test_these_passes_change_the_graph() -> None:
    """Each of them has a test below."""
    changing = ["captured", "canonical_attention", "rows_on_demand", "loops_over_mini_sequences", "residual_in_place"]
    assert list(passes().graphs) == changing
    offloading = set(passes(kv_on_host=True).graphs) - {*changing}
    assert offloading == {"keys_and_values_to_host"}


def test_the_captured_graph() -> None:
    assert_expected_inline(passes().after("captured"), """\
embed.weight -> [32, 8]
S -> S
ids -> int64[1, S]
frequencies -> [4]
layers.0.norm1.scale -> [8]
layers.0.attention.q.weight -> [8, 8]
layers.0.attention.k.weight -> [4, 8]
layers.0.attention.v.weight -> [4, 8]
layers.0.attention.o.weight -> [8, 8]
layers.0.norm2.scale -> [8]
layers.0.gate.weight -> [16, 8]
layers.0.up.weight -> [16, 8]
layers.0.down.weight -> [8, 16]
layers.1.norm1.scale -> [8]
layers.1.attention.q.weight -> [8, 8]
layers.1.attention.k.weight -> [4, 8]
layers.1.attention.v.weight -> [4, 8]
layers.1.attention.o.weight -> [8, 8]
layers.1.norm2.scale -> [8]
layers.1.gate.weight -> [16, 8]
layers.1.up.weight -> [16, 8]
layers.1.down.weight -> [8, 16]
norm.scale -> [8]
head.weight -> [32, 8]
embedding = embedding(embed.weight, ids) -> [1, S, 8]
iota = prims.iota(S, start=0, step=1, dtype=int64, device=cpu, requires_grad=False) -> int64[S]
unsqueeze = unsqueeze(iota, 1) -> int64[S, 1]
mul = mul(unsqueeze, frequencies) -> [S, 4]
cos = cos(mul) -> [S, 4]
sin = sin(mul) -> [S, 4]
pow = pow(embedding, 2) -> [1, S, 8]
mean = mean(pow, [-1], True) -> [1, S, 1]
add = add(mean, 1e-05) -> [1, S, 1]
rsqrt = rsqrt(add) -> [1, S, 1]
mul_1 = mul(embedding, rsqrt) -> [1, S, 8]
mul_2 = mul(mul_1, layers.0.norm1.scale) -> [1, S, 8]
permute = permute(layers.0.attention.q.weight, [1, 0]) -> [8, 8]
view = view(mul_2, [S, 8]) -> [S, 8]
mm = mm(view, permute) -> [S, 8]
view_1 = view(mm, [1, S, 8]) -> [1, S, 8]
view_2 = view(view_1, [1, S, 2, 4]) -> [1, S, 2, 4]
permute_1 = permute(view_2, [0, 2, 1, 3]) -> [1, 2, S, 4]
permute_2 = permute(layers.0.attention.k.weight, [1, 0]) -> [8, 4]
view_3 = view(mul_2, [S, 8]) -> [S, 8]
mm_1 = mm(view_3, permute_2) -> [S, 4]
view_4 = view(mm_1, [1, S, 4]) -> [1, S, 4]
view_5 = view(view_4, [1, S, 1, 4]) -> [1, S, 1, 4]
permute_3 = permute(view_5, [0, 2, 1, 3]) -> [1, 1, S, 4]
permute_4 = permute(layers.0.attention.v.weight, [1, 0]) -> [8, 4]
view_6 = view(mul_2, [S, 8]) -> [S, 8]
mm_2 = mm(view_6, permute_4) -> [S, 4]
view_7 = view(mm_2, [1, S, 4]) -> [1, S, 4]
view_8 = view(view_7, [1, S, 1, 4]) -> [1, S, 1, 4]
permute_5 = permute(view_8, [0, 2, 1, 3]) -> [1, 1, S, 4]
mul_3 = mul(permute_1, cos) -> [1, 2, S, 4]
rev = prims.rev(permute_1, [3]) -> [1, 2, S, 4]
mul_4 = mul(rev, sin) -> [1, 2, S, 4]
add_1 = add(mul_3, mul_4) -> [1, 2, S, 4]
mul_5 = mul(permute_3, cos) -> [1, 1, S, 4]
rev_1 = prims.rev(permute_3, [3]) -> [1, 1, S, 4]
mul_6 = mul(rev_1, sin) -> [1, 1, S, 4]
add_2 = add(mul_5, mul_6) -> [1, 1, S, 4]
expand = expand(add_2, [-1, 2, -1, -1]) -> [1, 2, S, 4]
expand_1 = expand(permute_5, [-1, 2, -1, -1]) -> [1, 2, S, 4]
_scaled_dot_product_flash_attention_for_cpu = _scaled_dot_product_flash_attention_for_cpu(add_1, expand, expand_1, 0.0, True) -> [1, 2, S, 4], [1, 2, S]
getitem = getitem(_scaled_dot_product_flash_attention_for_cpu, 0) -> [1, 2, S, 4]
permute_6 = permute(getitem, [0, 2, 1, 3]) -> [1, S, 2, 4]
view_9 = view(permute_6, [1, S, 8]) -> [1, S, 8]
permute_7 = permute(layers.0.attention.o.weight, [1, 0]) -> [8, 8]
view_10 = view(view_9, [S, 8]) -> [S, 8]
mm_3 = mm(view_10, permute_7) -> [S, 8]
view_11 = view(mm_3, [1, S, 8]) -> [1, S, 8]
add_3 = add(embedding, view_11) -> [1, S, 8]
pow_1 = pow(add_3, 2) -> [1, S, 8]
mean_1 = mean(pow_1, [-1], True) -> [1, S, 1]
add_4 = add(mean_1, 1e-05) -> [1, S, 1]
rsqrt_1 = rsqrt(add_4) -> [1, S, 1]
mul_7 = mul(add_3, rsqrt_1) -> [1, S, 8]
mul_8 = mul(mul_7, layers.0.norm2.scale) -> [1, S, 8]
permute_8 = permute(layers.0.gate.weight, [1, 0]) -> [8, 16]
view_12 = view(mul_8, [S, 8]) -> [S, 8]
mm_4 = mm(view_12, permute_8) -> [S, 16]
view_13 = view(mm_4, [1, S, 16]) -> [1, S, 16]
relu = relu(view_13) -> [1, S, 16]
permute_9 = permute(layers.0.up.weight, [1, 0]) -> [8, 16]
view_14 = view(mul_8, [S, 8]) -> [S, 8]
mm_5 = mm(view_14, permute_9) -> [S, 16]
view_15 = view(mm_5, [1, S, 16]) -> [1, S, 16]
mul_9 = mul(relu, view_15) -> [1, S, 16]
permute_10 = permute(layers.0.down.weight, [1, 0]) -> [16, 8]
view_16 = view(mul_9, [S, 16]) -> [S, 16]
mm_6 = mm(view_16, permute_10) -> [S, 8]
view_17 = view(mm_6, [1, S, 8]) -> [1, S, 8]
add_5 = add(add_3, view_17) -> [1, S, 8]
pow_2 = pow(add_5, 2) -> [1, S, 8]
mean_2 = mean(pow_2, [-1], True) -> [1, S, 1]
add_6 = add(mean_2, 1e-05) -> [1, S, 1]
rsqrt_2 = rsqrt(add_6) -> [1, S, 1]
mul_10 = mul(add_5, rsqrt_2) -> [1, S, 8]
mul_11 = mul(mul_10, layers.1.norm1.scale) -> [1, S, 8]
permute_11 = permute(layers.1.attention.q.weight, [1, 0]) -> [8, 8]
view_18 = view(mul_11, [S, 8]) -> [S, 8]
mm_7 = mm(view_18, permute_11) -> [S, 8]
view_19 = view(mm_7, [1, S, 8]) -> [1, S, 8]
view_20 = view(view_19, [1, S, 2, 4]) -> [1, S, 2, 4]
permute_12 = permute(view_20, [0, 2, 1, 3]) -> [1, 2, S, 4]
permute_13 = permute(layers.1.attention.k.weight, [1, 0]) -> [8, 4]
view_21 = view(mul_11, [S, 8]) -> [S, 8]
mm_8 = mm(view_21, permute_13) -> [S, 4]
view_22 = view(mm_8, [1, S, 4]) -> [1, S, 4]
view_23 = view(view_22, [1, S, 1, 4]) -> [1, S, 1, 4]
permute_14 = permute(view_23, [0, 2, 1, 3]) -> [1, 1, S, 4]
permute_15 = permute(layers.1.attention.v.weight, [1, 0]) -> [8, 4]
view_24 = view(mul_11, [S, 8]) -> [S, 8]
mm_9 = mm(view_24, permute_15) -> [S, 4]
view_25 = view(mm_9, [1, S, 4]) -> [1, S, 4]
view_26 = view(view_25, [1, S, 1, 4]) -> [1, S, 1, 4]
permute_16 = permute(view_26, [0, 2, 1, 3]) -> [1, 1, S, 4]
mul_12 = mul(permute_12, cos) -> [1, 2, S, 4]
rev_2 = prims.rev(permute_12, [3]) -> [1, 2, S, 4]
mul_13 = mul(rev_2, sin) -> [1, 2, S, 4]
add_7 = add(mul_12, mul_13) -> [1, 2, S, 4]
mul_14 = mul(permute_14, cos) -> [1, 1, S, 4]
rev_3 = prims.rev(permute_14, [3]) -> [1, 1, S, 4]
mul_15 = mul(rev_3, sin) -> [1, 1, S, 4]
add_8 = add(mul_14, mul_15) -> [1, 1, S, 4]
expand_2 = expand(add_8, [-1, 2, -1, -1]) -> [1, 2, S, 4]
expand_3 = expand(permute_16, [-1, 2, -1, -1]) -> [1, 2, S, 4]
_scaled_dot_product_flash_attention_for_cpu_1 = _scaled_dot_product_flash_attention_for_cpu(add_7, expand_2, expand_3, 0.0, True) -> [1, 2, S, 4], [1, 2, S]
getitem_1 = getitem(_scaled_dot_product_flash_attention_for_cpu_1, 0) -> [1, 2, S, 4]
permute_17 = permute(getitem_1, [0, 2, 1, 3]) -> [1, S, 2, 4]
view_27 = view(permute_17, [1, S, 8]) -> [1, S, 8]
permute_18 = permute(layers.1.attention.o.weight, [1, 0]) -> [8, 8]
view_28 = view(view_27, [S, 8]) -> [S, 8]
mm_10 = mm(view_28, permute_18) -> [S, 8]
view_29 = view(mm_10, [1, S, 8]) -> [1, S, 8]
add_9 = add(add_5, view_29) -> [1, S, 8]
pow_3 = pow(add_9, 2) -> [1, S, 8]
mean_3 = mean(pow_3, [-1], True) -> [1, S, 1]
add_10 = add(mean_3, 1e-05) -> [1, S, 1]
rsqrt_3 = rsqrt(add_10) -> [1, S, 1]
mul_16 = mul(add_9, rsqrt_3) -> [1, S, 8]
mul_17 = mul(mul_16, layers.1.norm2.scale) -> [1, S, 8]
permute_19 = permute(layers.1.gate.weight, [1, 0]) -> [8, 16]
view_30 = view(mul_17, [S, 8]) -> [S, 8]
mm_11 = mm(view_30, permute_19) -> [S, 16]
view_31 = view(mm_11, [1, S, 16]) -> [1, S, 16]
relu_1 = relu(view_31) -> [1, S, 16]
permute_20 = permute(layers.1.up.weight, [1, 0]) -> [8, 16]
view_32 = view(mul_17, [S, 8]) -> [S, 8]
mm_12 = mm(view_32, permute_20) -> [S, 16]
view_33 = view(mm_12, [1, S, 16]) -> [1, S, 16]
mul_18 = mul(relu_1, view_33) -> [1, S, 16]
permute_21 = permute(layers.1.down.weight, [1, 0]) -> [16, 8]
view_34 = view(mul_18, [S, 16]) -> [S, 16]
mm_13 = mm(view_34, permute_21) -> [S, 8]
view_35 = view(mm_13, [1, S, 8]) -> [1, S, 8]
add_11 = add(add_9, view_35) -> [1, S, 8]
pow_4 = pow(add_11, 2) -> [1, S, 8]
mean_4 = mean(pow_4, [-1], True) -> [1, S, 1]
add_12 = add(mean_4, 1e-05) -> [1, S, 1]
rsqrt_4 = rsqrt(add_12) -> [1, S, 1]
mul_19 = mul(add_11, rsqrt_4) -> [1, S, 8]
mul_20 = mul(mul_19, norm.scale) -> [1, S, 8]
slice = slice(mul_20, 1, -1, 9223372036854775807) -> [1, 1, 8]
permute_22 = permute(head.weight, [1, 0]) -> [8, 32]
view_36 = view(slice, [1, 8]) -> [1, 8]
mm_14 = mm(view_36, permute_22) -> [1, 32]
view_37 = view(mm_14, [1, 1, 32]) -> [1, 1, 32]
return [view_37, add_2, permute_5, add_8, permute_16]
""")


def test_attention_becomes_one_operator() -> None:
    assert_expected_inline(passes().change("canonical_attention"), """\
- expand = expand(add_2, [-1, 2, -1, -1]) -> [1, 2, S, 4]
- expand_1 = expand(permute_5, [-1, 2, -1, -1]) -> [1, 2, S, 4]
- _scaled_dot_product_flash_attention_for_cpu = _scaled_dot_product_flash_attention_for_cpu(add_1, expand, expand_1, 0.0, True) -> [1, 2, S, 4], [1, 2, S]
- getitem = getitem(_scaled_dot_product_flash_attention_for_cpu, 0) -> [1, 2, S, 4]
- permute_6 = permute(getitem, [0, 2, 1, 3]) -> [1, S, 2, 4]
+ attention = mom.attention(add_1, add_2, permute_5, None, 0, True, 0.5) -> [1, 2, S, 4]
+ permute_6 = permute(attention, [0, 2, 1, 3]) -> [1, S, 2, 4]
- expand_2 = expand(add_8, [-1, 2, -1, -1]) -> [1, 2, S, 4]
- expand_3 = expand(permute_16, [-1, 2, -1, -1]) -> [1, 2, S, 4]
- _scaled_dot_product_flash_attention_for_cpu_1 = _scaled_dot_product_flash_attention_for_cpu(add_7, expand_2, expand_3, 0.0, True) -> [1, 2, S, 4], [1, 2, S]
- getitem_1 = getitem(_scaled_dot_product_flash_attention_for_cpu_1, 0) -> [1, 2, S, 4]
- permute_17 = permute(getitem_1, [0, 2, 1, 3]) -> [1, S, 2, 4]
+ attention_1 = mom.attention(add_7, add_8, permute_16, None, 0, True, 0.5) -> [1, 2, S, 4]
+ permute_17 = permute(attention_1, [0, 2, 1, 3]) -> [1, S, 2, 4]
""")


def test_the_last_layer_runs_on_the_last_token() -> None:
    assert_expected_inline(passes().change("rows_on_demand"), """\
- view_18 = view(mul_11, [S, 8]) -> [S, 8]
- mm_7 = mm(view_18, permute_11) -> [S, 8]
- view_19 = view(mm_7, [1, S, 8]) -> [1, S, 8]
- view_20 = view(view_19, [1, S, 2, 4]) -> [1, S, 2, 4]
- permute_12 = permute(view_20, [0, 2, 1, 3]) -> [1, 2, S, 4]
- mul_12 = mul(permute_12, cos) -> [1, 2, S, 4]
- rev_2 = prims.rev(permute_12, [3]) -> [1, 2, S, 4]
- mul_13 = mul(rev_2, sin) -> [1, 2, S, 4]
- add_7 = add(mul_12, mul_13) -> [1, 2, S, 4]
- attention_1 = mom.attention(add_7, add_8, permute_16, None, 0, True, 0.5) -> [1, 2, S, 4]
- permute_17 = permute(attention_1, [0, 2, 1, 3]) -> [1, S, 2, 4]
- view_27 = view(permute_17, [1, S, 8]) -> [1, S, 8]
- view_28 = view(view_27, [S, 8]) -> [S, 8]
- mm_10 = mm(view_28, permute_18) -> [S, 8]
- view_29 = view(mm_10, [1, S, 8]) -> [1, S, 8]
- add_9 = add(add_5, view_29) -> [1, S, 8]
- pow_3 = pow(add_9, 2) -> [1, S, 8]
- mean_3 = mean(pow_3, [-1], True) -> [1, S, 1]
- add_10 = add(mean_3, 1e-05) -> [1, S, 1]
- rsqrt_3 = rsqrt(add_10) -> [1, S, 1]
- mul_16 = mul(add_9, rsqrt_3) -> [1, S, 8]
- mul_17 = mul(mul_16, layers.1.norm2.scale) -> [1, S, 8]
- view_30 = view(mul_17, [S, 8]) -> [S, 8]
- mm_11 = mm(view_30, permute_19) -> [S, 16]
- view_31 = view(mm_11, [1, S, 16]) -> [1, S, 16]
- relu_1 = relu(view_31) -> [1, S, 16]
- view_32 = view(mul_17, [S, 8]) -> [S, 8]
- mm_12 = mm(view_32, permute_20) -> [S, 16]
- view_33 = view(mm_12, [1, S, 16]) -> [1, S, 16]
- mul_18 = mul(relu_1, view_33) -> [1, S, 16]
- view_34 = view(mul_18, [S, 16]) -> [S, 16]
- mm_13 = mm(view_34, permute_21) -> [S, 8]
- view_35 = view(mm_13, [1, S, 8]) -> [1, S, 8]
- add_11 = add(add_9, view_35) -> [1, S, 8]
- pow_4 = pow(add_11, 2) -> [1, S, 8]
- mean_4 = mean(pow_4, [-1], True) -> [1, S, 1]
- add_12 = add(mean_4, 1e-05) -> [1, S, 1]
- rsqrt_4 = rsqrt(add_12) -> [1, S, 1]
- mul_19 = mul(add_11, rsqrt_4) -> [1, S, 8]
- mul_20 = mul(mul_19, norm.scale) -> [1, S, 8]
- slice = slice(mul_20, 1, -1, 9223372036854775807) -> [1, 1, 8]
+ add_13 = add(-1, S) -> S - 1
+ slice_1 = slice(add_5, 1, add_13, S) -> [1, 1, 8]
+ pow_5 = pow(slice_1, 2) -> [1, 1, 8]
+ mean_5 = mean(pow_5, [-1], True) -> [1, 1, 1]
+ add_14 = add(mean_5, 1e-05) -> [1, 1, 1]
+ rsqrt_5 = rsqrt(add_14) -> [1, 1, 1]
+ mul_21 = mul(slice_1, rsqrt_5) -> [1, 1, 8]
+ mul_22 = mul(mul_21, layers.1.norm1.scale) -> [1, 1, 8]
+ reshape = reshape(mul_22, [-1, 8]) -> [1, 8]
+ mm_15 = mm(reshape, permute_11) -> [1, 8]
+ reshape_1 = reshape(mm_15, [1, -1, 8]) -> [1, 1, 8]
+ reshape_2 = reshape(reshape_1, [1, -1, 2, 4]) -> [1, 1, 2, 4]
+ permute_23 = permute(reshape_2, [0, 2, 1, 3]) -> [1, 2, 1, 4]
+ iota_1 = prims.iota(1, start=add_13, step=1, dtype=int64, device=cpu, requires_grad=False) -> int64[1]
+ unsqueeze_1 = unsqueeze(iota_1, 1) -> int64[1, 1]
+ mul_23 = mul(unsqueeze_1, frequencies) -> [1, 4]
+ cos_1 = cos(mul_23) -> [1, 4]
+ mul_24 = mul(permute_23, cos_1) -> [1, 2, 1, 4]
+ rev_4 = prims.rev(permute_23, [3]) -> [1, 2, 1, 4]
+ sin_1 = sin(mul_23) -> [1, 4]
+ mul_25 = mul(rev_4, sin_1) -> [1, 2, 1, 4]
+ add_15 = add(mul_24, mul_25) -> [1, 2, 1, 4]
+ attention_2 = mom.attention(add_15, add_8, permute_16, None, add_13, True, 0.5) -> [1, 2, 1, 4]
+ permute_24 = permute(attention_2, [0, 2, 1, 3]) -> [1, 1, 2, 4]
+ reshape_3 = reshape(permute_24, [1, -1, 8]) -> [1, 1, 8]
+ reshape_4 = reshape(reshape_3, [-1, 8]) -> [1, 8]
+ mm_16 = mm(reshape_4, permute_18) -> [1, 8]
+ reshape_5 = reshape(mm_16, [1, -1, 8]) -> [1, 1, 8]
+ add_16 = add(slice_1, reshape_5) -> [1, 1, 8]
+ pow_6 = pow(add_16, 2) -> [1, 1, 8]
+ mean_6 = mean(pow_6, [-1], True) -> [1, 1, 1]
+ add_17 = add(mean_6, 1e-05) -> [1, 1, 1]
+ rsqrt_6 = rsqrt(add_17) -> [1, 1, 1]
+ mul_26 = mul(add_16, rsqrt_6) -> [1, 1, 8]
+ mul_27 = mul(mul_26, layers.1.norm2.scale) -> [1, 1, 8]
+ reshape_6 = reshape(mul_27, [-1, 8]) -> [1, 8]
+ mm_17 = mm(reshape_6, permute_19) -> [1, 16]
+ reshape_7 = reshape(mm_17, [1, -1, 16]) -> [1, 1, 16]
+ relu_2 = relu(reshape_7) -> [1, 1, 16]
+ reshape_8 = reshape(mul_27, [-1, 8]) -> [1, 8]
+ mm_18 = mm(reshape_8, permute_20) -> [1, 16]
+ reshape_9 = reshape(mm_18, [1, -1, 16]) -> [1, 1, 16]
+ mul_28 = mul(relu_2, reshape_9) -> [1, 1, 16]
+ reshape_10 = reshape(mul_28, [-1, 16]) -> [1, 16]
+ mm_19 = mm(reshape_10, permute_21) -> [1, 8]
+ reshape_11 = reshape(mm_19, [1, -1, 8]) -> [1, 1, 8]
+ add_18 = add(add_16, reshape_11) -> [1, 1, 8]
+ pow_7 = pow(add_18, 2) -> [1, 1, 8]
+ mean_7 = mean(pow_7, [-1], True) -> [1, 1, 1]
+ add_19 = add(mean_7, 1e-05) -> [1, 1, 1]
+ rsqrt_7 = rsqrt(add_19) -> [1, 1, 1]
+ mul_29 = mul(add_18, rsqrt_7) -> [1, 1, 8]
+ mul_30 = mul(mul_29, norm.scale) -> [1, 1, 8]
- view_36 = view(slice, [1, 8]) -> [1, 8]
+ view_36 = view(mul_30, [1, 8]) -> [1, 8]
""")


def test_stages_become_loops() -> None:
    assert_expected_inline(passes().after("loops_over_mini_sequences"), """\
embed.weight -> [32, 8]
S -> S
ids -> int64[1, S]
frequencies -> [4]
layers.0.norm1.scale -> [8]
layers.0.attention.q.weight -> [8, 8]
layers.0.attention.k.weight -> [4, 8]
layers.0.attention.v.weight -> [4, 8]
layers.0.attention.o.weight -> [8, 8]
layers.0.norm2.scale -> [8]
layers.0.gate.weight -> [16, 8]
layers.0.up.weight -> [16, 8]
layers.0.down.weight -> [8, 16]
layers.1.norm1.scale -> [8]
layers.1.attention.q.weight -> [8, 8]
layers.1.attention.k.weight -> [4, 8]
layers.1.attention.v.weight -> [4, 8]
layers.1.attention.o.weight -> [8, 8]
layers.1.norm2.scale -> [8]
layers.1.gate.weight -> [16, 8]
layers.1.up.weight -> [16, 8]
layers.1.down.weight -> [8, 16]
norm.scale -> [8]
head.weight -> [32, 8]
loop = loop over S:
    ids' = RowsIn(int64[1, S], dim 1)
    embed.weight' = WholeIn([32, 8])
    frequencies' = WholeIn([4])
    layers.0.norm1.scale' = WholeIn([8])
    layers.0.attention.k.weight' = WholeIn([4, 8])
    layers.0.attention.v.weight' = WholeIn([4, 8])
    embedding = embedding(embed.weight', ids') -> [1, count, 8]
    iota = prims.iota(count, start=start, step=1, dtype=int64, device=cpu, requires_grad=False) -> int64[count]
    unsqueeze = unsqueeze(iota, 1) -> int64[count, 1]
    mul = mul(unsqueeze, frequencies') -> [count, 4]
    cos = cos(mul) -> [count, 4]
    sin = sin(mul) -> [count, 4]
    pow = pow(embedding, 2) -> [1, count, 8]
    mean = mean(pow, [-1], True) -> [1, count, 1]
    add = add(mean, 1e-05) -> [1, count, 1]
    rsqrt = rsqrt(add) -> [1, count, 1]
    mul_1 = mul(embedding, rsqrt) -> [1, count, 8]
    mul_2 = mul(mul_1, layers.0.norm1.scale') -> [1, count, 8]
    permute = permute(layers.0.attention.k.weight', [1, 0]) -> [8, 4]
    reshape = reshape(mul_2, [-1, 8]) -> [count, 8]
    mm = mm(reshape, permute) -> [count, 4]
    reshape_1 = reshape(mm, [1, -1, 4]) -> [1, count, 4]
    reshape_2 = reshape(reshape_1, [1, -1, 1, 4]) -> [1, count, 1, 4]
    permute_1 = permute(reshape_2, [0, 2, 1, 3]) -> [1, 1, count, 4]
    permute_2 = permute(layers.0.attention.v.weight', [1, 0]) -> [8, 4]
    reshape_3 = reshape(mul_2, [-1, 8]) -> [count, 8]
    mm_1 = mm(reshape_3, permute_2) -> [count, 4]
    mul_3 = mul(permute_1, cos) -> [1, 1, count, 4]
    rev = prims.rev(permute_1, [3]) -> [1, 1, count, 4]
    mul_4 = mul(rev, sin) -> [1, 1, count, 4]
    add_1 = add(mul_3, mul_4) -> [1, 1, count, 4]
    return [embedding, mm_1, add_1]
    [0] Stored([1, S, 8], dim 1, over None)
    [1] Stored([S, 4], dim 0, over None)
    [2] Stored([1, 1, S, 4], dim 2, over None)
getitem = getitem(loop, 0) -> [1, S, 8]
getitem_2 = getitem(loop, 1) -> [S, 4]
getitem_1 = getitem(loop, 2) -> [1, 1, S, 4]
loop_1 = loop over S:
    S' = SizeIn(value S)
    getitem' = RowsIn([1, S, 8], dim 1)
    frequencies' = WholeIn([4])
    layers.0.norm1.scale' = WholeIn([8])
    layers.0.attention.q.weight' = WholeIn([8, 8])
    getitem_2' = WholeIn([S, 4])
    getitem_1' = WholeIn([1, 1, S, 4])
    layers.0.attention.o.weight' = WholeIn([8, 8])
    layers.0.norm2.scale' = WholeIn([8])
    layers.0.gate.weight' = WholeIn([16, 8])
    layers.0.up.weight' = WholeIn([16, 8])
    layers.0.down.weight' = WholeIn([8, 16])
    layers.1.norm1.scale' = WholeIn([8])
    layers.1.attention.k.weight' = WholeIn([4, 8])
    layers.1.attention.v.weight' = WholeIn([4, 8])
    iota = prims.iota(count, start=start, step=1, dtype=int64, device=cpu, requires_grad=False) -> int64[count]
    unsqueeze = unsqueeze(iota, 1) -> int64[count, 1]
    mul = mul(unsqueeze, frequencies') -> [count, 4]
    cos = cos(mul) -> [count, 4]
    sin = sin(mul) -> [count, 4]
    pow = pow(getitem', 2) -> [1, count, 8]
    mean = mean(pow, [-1], True) -> [1, count, 1]
    add = add(mean, 1e-05) -> [1, count, 1]
    rsqrt = rsqrt(add) -> [1, count, 1]
    mul_1 = mul(getitem', rsqrt) -> [1, count, 8]
    mul_2 = mul(mul_1, layers.0.norm1.scale') -> [1, count, 8]
    permute = permute(layers.0.attention.q.weight', [1, 0]) -> [8, 8]
    reshape = reshape(mul_2, [-1, 8]) -> [count, 8]
    mm = mm(reshape, permute) -> [count, 8]
    reshape_1 = reshape(mm, [1, -1, 8]) -> [1, count, 8]
    reshape_2 = reshape(reshape_1, [1, -1, 2, 4]) -> [1, count, 2, 4]
    permute_1 = permute(reshape_2, [0, 2, 1, 3]) -> [1, 2, count, 4]
    view = view(getitem_2', [1, S', 4]) -> [1, S, 4]
    view_1 = view(view, [1, S', 1, 4]) -> [1, S, 1, 4]
    permute_2 = permute(view_1, [0, 2, 1, 3]) -> [1, 1, S, 4]
    mul_3 = mul(permute_1, cos) -> [1, 2, count, 4]
    rev = prims.rev(permute_1, [3]) -> [1, 2, count, 4]
    mul_4 = mul(rev, sin) -> [1, 2, count, 4]
    add_1 = add(mul_3, mul_4) -> [1, 2, count, 4]
    attention = mom.attention(add_1, getitem_1', permute_2, None, start, True, 0.5) -> [1, 2, count, 4]
    permute_3 = permute(attention, [0, 2, 1, 3]) -> [1, count, 2, 4]
    reshape_3 = reshape(permute_3, [1, -1, 8]) -> [1, count, 8]
    permute_4 = permute(layers.0.attention.o.weight', [1, 0]) -> [8, 8]
    reshape_4 = reshape(reshape_3, [-1, 8]) -> [count, 8]
    mm_1 = mm(reshape_4, permute_4) -> [count, 8]
    reshape_5 = reshape(mm_1, [1, -1, 8]) -> [1, count, 8]
    add_2 = add(getitem', reshape_5) -> [1, count, 8]
    pow_1 = pow(add_2, 2) -> [1, count, 8]
    mean_1 = mean(pow_1, [-1], True) -> [1, count, 1]
    add_3 = add(mean_1, 1e-05) -> [1, count, 1]
    rsqrt_1 = rsqrt(add_3) -> [1, count, 1]
    mul_5 = mul(add_2, rsqrt_1) -> [1, count, 8]
    mul_6 = mul(mul_5, layers.0.norm2.scale') -> [1, count, 8]
    permute_5 = permute(layers.0.gate.weight', [1, 0]) -> [8, 16]
    reshape_6 = reshape(mul_6, [-1, 8]) -> [count, 8]
    mm_2 = mm(reshape_6, permute_5) -> [count, 16]
    reshape_7 = reshape(mm_2, [1, -1, 16]) -> [1, count, 16]
    relu = relu(reshape_7) -> [1, count, 16]
    permute_6 = permute(layers.0.up.weight', [1, 0]) -> [8, 16]
    reshape_8 = reshape(mul_6, [-1, 8]) -> [count, 8]
    mm_3 = mm(reshape_8, permute_6) -> [count, 16]
    reshape_9 = reshape(mm_3, [1, -1, 16]) -> [1, count, 16]
    mul_7 = mul(relu, reshape_9) -> [1, count, 16]
    permute_7 = permute(layers.0.down.weight', [1, 0]) -> [16, 8]
    reshape_10 = reshape(mul_7, [-1, 16]) -> [count, 16]
    mm_4 = mm(reshape_10, permute_7) -> [count, 8]
    reshape_11 = reshape(mm_4, [1, -1, 8]) -> [1, count, 8]
    add_4 = add(add_2, reshape_11) -> [1, count, 8]
    pow_2 = pow(add_4, 2) -> [1, count, 8]
    mean_2 = mean(pow_2, [-1], True) -> [1, count, 1]
    add_5 = add(mean_2, 1e-05) -> [1, count, 1]
    rsqrt_2 = rsqrt(add_5) -> [1, count, 1]
    mul_8 = mul(add_4, rsqrt_2) -> [1, count, 8]
    mul_9 = mul(mul_8, layers.1.norm1.scale') -> [1, count, 8]
    permute_8 = permute(layers.1.attention.k.weight', [1, 0]) -> [8, 4]
    reshape_12 = reshape(mul_9, [-1, 8]) -> [count, 8]
    mm_5 = mm(reshape_12, permute_8) -> [count, 4]
    reshape_13 = reshape(mm_5, [1, -1, 4]) -> [1, count, 4]
    reshape_14 = reshape(reshape_13, [1, -1, 1, 4]) -> [1, count, 1, 4]
    permute_9 = permute(reshape_14, [0, 2, 1, 3]) -> [1, 1, count, 4]
    permute_10 = permute(layers.1.attention.v.weight', [1, 0]) -> [8, 4]
    reshape_15 = reshape(mul_9, [-1, 8]) -> [count, 8]
    mm_6 = mm(reshape_15, permute_10) -> [count, 4]
    mul_10 = mul(permute_9, cos) -> [1, 1, count, 4]
    rev_1 = prims.rev(permute_9, [3]) -> [1, 1, count, 4]
    mul_11 = mul(rev_1, sin) -> [1, 1, count, 4]
    add_6 = add(mul_10, mul_11) -> [1, 1, count, 4]
    return [add_4, mm_6, add_6]
    [0] Stored([1, S, 8], dim 1, over None)
    [1] Stored([S, 4], dim 0, over None)
    [2] Stored([1, 1, S, 4], dim 2, over None)
getitem_3 = getitem(loop_1, 0) -> [1, S, 8]
getitem_4 = getitem(loop_1, 1) -> [S, 4]
getitem_5 = getitem(loop_1, 2) -> [1, 1, S, 4]
add_13 = add(-1, S) -> S - 1
slice_1 = slice(getitem_3, 1, add_13, S) -> [1, 1, 8]
pow_5 = pow(slice_1, 2) -> [1, 1, 8]
mean_5 = mean(pow_5, [-1], True) -> [1, 1, 1]
add_14 = add(mean_5, 1e-05) -> [1, 1, 1]
rsqrt_5 = rsqrt(add_14) -> [1, 1, 1]
mul_21 = mul(slice_1, rsqrt_5) -> [1, 1, 8]
mul_22 = mul(mul_21, layers.1.norm1.scale) -> [1, 1, 8]
reshape = reshape(mul_22, [-1, 8]) -> [1, 8]
permute_11 = permute(layers.1.attention.q.weight, [1, 0]) -> [8, 8]
mm_15 = mm(reshape, permute_11) -> [1, 8]
reshape_1 = reshape(mm_15, [1, -1, 8]) -> [1, 1, 8]
reshape_2 = reshape(reshape_1, [1, -1, 2, 4]) -> [1, 1, 2, 4]
iota_1 = prims.iota(1, start=add_13, step=1, dtype=int64, device=cpu, requires_grad=False) -> int64[1]
unsqueeze_1 = unsqueeze(iota_1, 1) -> int64[1, 1]
mul_23 = mul(unsqueeze_1, frequencies) -> [1, 4]
cos_1 = cos(mul_23) -> [1, 4]
permute_23 = permute(reshape_2, [0, 2, 1, 3]) -> [1, 2, 1, 4]
mul_24 = mul(permute_23, cos_1) -> [1, 2, 1, 4]
rev_4 = prims.rev(permute_23, [3]) -> [1, 2, 1, 4]
sin_1 = sin(mul_23) -> [1, 4]
mul_25 = mul(rev_4, sin_1) -> [1, 2, 1, 4]
add_15 = add(mul_24, mul_25) -> [1, 2, 1, 4]
view_25 = view(getitem_4, [1, S, 4]) -> [1, S, 4]
view_26 = view(view_25, [1, S, 1, 4]) -> [1, S, 1, 4]
permute_16 = permute(view_26, [0, 2, 1, 3]) -> [1, 1, S, 4]
attention_2 = mom.attention(add_15, getitem_5, permute_16, None, add_13, True, 0.5) -> [1, 2, 1, 4]
permute_24 = permute(attention_2, [0, 2, 1, 3]) -> [1, 1, 2, 4]
reshape_3 = reshape(permute_24, [1, -1, 8]) -> [1, 1, 8]
reshape_4 = reshape(reshape_3, [-1, 8]) -> [1, 8]
permute_18 = permute(layers.1.attention.o.weight, [1, 0]) -> [8, 8]
mm_16 = mm(reshape_4, permute_18) -> [1, 8]
reshape_5 = reshape(mm_16, [1, -1, 8]) -> [1, 1, 8]
add_16 = add(slice_1, reshape_5) -> [1, 1, 8]
pow_6 = pow(add_16, 2) -> [1, 1, 8]
mean_6 = mean(pow_6, [-1], True) -> [1, 1, 1]
add_17 = add(mean_6, 1e-05) -> [1, 1, 1]
rsqrt_6 = rsqrt(add_17) -> [1, 1, 1]
mul_26 = mul(add_16, rsqrt_6) -> [1, 1, 8]
mul_27 = mul(mul_26, layers.1.norm2.scale) -> [1, 1, 8]
reshape_6 = reshape(mul_27, [-1, 8]) -> [1, 8]
permute_19 = permute(layers.1.gate.weight, [1, 0]) -> [8, 16]
mm_17 = mm(reshape_6, permute_19) -> [1, 16]
reshape_7 = reshape(mm_17, [1, -1, 16]) -> [1, 1, 16]
relu_2 = relu(reshape_7) -> [1, 1, 16]
reshape_8 = reshape(mul_27, [-1, 8]) -> [1, 8]
permute_20 = permute(layers.1.up.weight, [1, 0]) -> [8, 16]
mm_18 = mm(reshape_8, permute_20) -> [1, 16]
reshape_9 = reshape(mm_18, [1, -1, 16]) -> [1, 1, 16]
mul_28 = mul(relu_2, reshape_9) -> [1, 1, 16]
reshape_10 = reshape(mul_28, [-1, 16]) -> [1, 16]
permute_21 = permute(layers.1.down.weight, [1, 0]) -> [16, 8]
mm_19 = mm(reshape_10, permute_21) -> [1, 8]
reshape_11 = reshape(mm_19, [1, -1, 8]) -> [1, 1, 8]
add_18 = add(add_16, reshape_11) -> [1, 1, 8]
pow_7 = pow(add_18, 2) -> [1, 1, 8]
mean_7 = mean(pow_7, [-1], True) -> [1, 1, 1]
add_19 = add(mean_7, 1e-05) -> [1, 1, 1]
rsqrt_7 = rsqrt(add_19) -> [1, 1, 1]
mul_29 = mul(add_18, rsqrt_7) -> [1, 1, 8]
mul_30 = mul(mul_29, norm.scale) -> [1, 1, 8]
view_36 = view(mul_30, [1, 8]) -> [1, 8]
permute_22 = permute(head.weight, [1, 0]) -> [8, 32]
mm_14 = mm(view_36, permute_22) -> [1, 32]
view_37 = view(mm_14, [1, 1, 32]) -> [1, 1, 32]
view_7 = view(getitem_2, [1, S, 4]) -> [1, S, 4]
view_8 = view(view_7, [1, S, 1, 4]) -> [1, S, 1, 4]
permute_5 = permute(view_8, [0, 2, 1, 3]) -> [1, 1, S, 4]
return [view_37, getitem_1, permute_5, getitem_5, permute_16]
""")


def test_the_residual_stream_takes_over_its_storage() -> None:
    assert_expected_inline(passes().change("residual_in_place"), """\
-     [0] Stored([1, S, 8], dim 1, over None)
+     [0] Stored([1, S, 8], dim 1, over 1)
""")


def test_keys_and_values_leave_for_the_host() -> None:
    assert_expected_inline(passes(kv_on_host=True).change("keys_and_values_to_host"), """\
+ view_7 = view(getitem_2, [1, S, 4]) -> [1, S, 4]
+ view_8 = view(view_7, [1, S, 1, 4]) -> [1, S, 1, 4]
+ permute_5 = permute(view_8, [0, 2, 1, 3]) -> [1, 1, S, 4]
+ offload = mom.offload(getitem_1, 2, 0, 0) -> [1, 1, S, 4]
+ offload_1 = mom.offload(permute_5, 2, 0, 0) -> [1, 1, S, 4]
+ view_25 = view(getitem_4, [1, S, 4]) -> [1, S, 4]
+ view_26 = view(view_25, [1, S, 1, 4]) -> [1, S, 1, 4]
+ permute_16 = permute(view_26, [0, 2, 1, 3]) -> [1, 1, S, 4]
+ offload_2 = mom.offload(getitem_5, 2, 0, 1) -> [1, 1, S, 4]
+ offload_3 = mom.offload(permute_16, 2, 0, 1) -> [1, 1, S, 4]
- view_25 = view(getitem_4, [1, S, 4]) -> [1, S, 4]
- view_26 = view(view_25, [1, S, 1, 4]) -> [1, S, 1, 4]
- permute_16 = permute(view_26, [0, 2, 1, 3]) -> [1, 1, S, 4]
- view_7 = view(getitem_2, [1, S, 4]) -> [1, S, 4]
- view_8 = view(view_7, [1, S, 1, 4]) -> [1, S, 1, 4]
- permute_5 = permute(view_8, [0, 2, 1, 3]) -> [1, 1, S, 4]
- return [view_37, getitem_1, permute_5, getitem_5, permute_16]
+ return [view_37, offload, offload_1, offload_2, offload_3]
""")
