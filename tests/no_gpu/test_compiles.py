"""Graphs of large models, compiled for a simulated GPU: everything that a first call on a real one would compile.

Shapes of Llama-3-8B, Gemma-3-12B and Mixtral-8x7B with few layers and without weights, in bfloat16. Every kernel is
compiled to a binary for sm_80 or sm_90. None is run (`test_interpreted` runs the same source).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import sympy
import torch
from packaging.version import Version

from mom_compile.backend import _reset as forget_pieces
from mom_compile.backend import compile_graph, reports
from mom_compile.config import parse_options
from mom_compile.torch_compat.symbolic_sizes import SymbolicSizes
from tests.no_gpu.graphs import graph_of
from tests.no_gpu.target import A100, H100, Gpu, Made, pretended

transformers = pytest.importorskip("transformers")
triton = pytest.importorskip("triton")

PLACES = {"max_position_embeddings": 1 << 20}
SHAPES: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8, vocab_size=128256,
        num_hidden_layers=6, **PLACES,
    ),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        hidden_size=3840, intermediate_size=15360, num_attention_heads=16, num_key_value_heads=8, head_dim=256,
        vocab_size=262208, num_hidden_layers=7, sliding_window=1024, **PLACES,
    ),
    "mixtral": lambda: transformers.MixtralConfig(
        hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8, vocab_size=32000,
        num_local_experts=8, num_experts_per_tok=2, num_hidden_layers=6, sliding_window=None, **PLACES,
    ),
}  # fmt: skip

#: Registers that a thread of a full block of 512 may have; more would leave multiprocessors half empty.
MOST_REGISTERS = 128
#: Bytes of a thread's stack. Sine and cosine keep 32 there, for angles so large that their reduction needs a table.
#: Inductor's autotuner runs no configuration with more if another has less: that is 16 registers, spilled.
MOST_STACK = 64
#: The share of configurations that may have more: Triton 3.6 spills in one of six of a rotary embedding's.
MOST_SPILLED = 0.05 if Version(triton.__version__) < Version("3.7") else 0.0

#: Before transformers 5.23 the angles of positions are a product, computed once, with tokens as its last dimension.
ANGLES_ARE_A_PRODUCT = STEPS_HAVE_MASKS = Version(transformers.__version__) < Version("5.23")

#: A product that writes into the storage of its result.
INTO_ITS_PLACE = "torch.ops.mom.product_into.default"
PRODUCTS = {"extern_kernels.mm", "extern_kernels.addmm", "extern_kernels.bmm", "extern_kernels._grouped_mm"}
PRODUCTS |= {INTO_ITS_PLACE}
ATTENTION = "torch.ops.mom.attention.default"
#: Of a decode step, which goes as it is to stock Inductor's kernels: which of them, the GPU says.
STOCKS = {f"torch.ops.aten._scaled_dot_product_{kind}_attention.default" for kind in ("flash", "efficient", "cudnn")}
ATTENTIONS = {ATTENTION} | STOCKS
STOCK = "an attention of PyTorch"
#: Routing of tokens to experts, for which PyTorch has its own kernels.
SORTING = {f"torch.ops.aten.{name}" for name in ("topk.default", "sort.stable", "histc.default")}


@dataclass(frozen=True)
class Case:
    shape: str
    tokens: int
    gpu: Gpu
    #: "prefill", "offload": prefill with keys and values to the host, or "decode".
    kind: str

    def __str__(self) -> str:
        return f"{self.shape}-{self.tokens}-sm{self.gpu.capability}-{self.kind}"


@dataclass(frozen=True)
class Compiled:
    report: Any
    made: Made
    #: The guards of each piece: its symbols by name, and the conditions.
    assumed: list[tuple[dict[str, sympy.Symbol], list[sympy.Basic]]]

    @property
    def launches(self) -> dict[str, Counter[str]]:
        """By piece, how often its wrapper launches Triton kernels and calls other operators."""
        return dict(zip(self.report.compiled_pieces, map(launches_of, self.made.wrappers), strict=True))


def launches_of(wrapper: str) -> Counter[str]:
    code = "\n".join(line for line in wrapper.splitlines() if not line.lstrip().startswith("#"))
    calls = Counter(re.findall(r"((?:extern_kernels|torch\.ops)\.[\w.]+)\(", code))
    return calls + Counter(triton=len(re.findall(r"\btriton_\w+\.run\(", code)))


def compiled(case: Case, monkeypatch: pytest.MonkeyPatch) -> Compiled:
    assumed = []
    assumptions = SymbolicSizes.assumptions

    def seen(sizes: SymbolicSizes) -> list[sympy.Basic]:
        conditions = assumptions(sizes)
        assumed.append((dict(sizes.symbols), conditions))
        return conditions

    monkeypatch.setattr(SymbolicSizes, "assumptions", seen)
    forget_pieces()  # the keys of pieces do not contain the device, since a process has only one
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(SHAPES[case.shape](), dtype=torch.bfloat16).eval()
    graph = graph_of(model, lambda: inputs_of(case, model)).on_cuda(case.gpu)
    options = parse_options({"strict": True, "kv_offload": case.kind == "offload"})
    with pretended(case.gpu) as made:
        compile_graph(graph.gm, graph.example_inputs, options=options, **graph.more)
    report = reports()[-1]
    forget_pieces()  # none of them can be launched
    return Compiled(report, made, assumed)


def inputs_of(case: Case, model: Any) -> dict[str, Any]:
    from benchmarks.models import keeping

    inputs = {"use_cache": True, "logits_to_keep": 1}
    if case.kind != "decode":
        return {"input_ids": torch.empty(1, case.tokens, dtype=torch.long), **inputs}
    config, cache = model.config, transformers.DynamicCache(config=model.config)
    channels = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for layer in range(config.num_hidden_layers):
        shape = (1, config.num_key_value_heads, case.tokens, channels)
        cache.update(*(torch.empty(shape, dtype=torch.bfloat16) for _ in range(2)), layer)
    return {"input_ids": torch.empty(1, 1, dtype=torch.long), **inputs, **keeping(cache, model)}


CASES = [
    Case(shape, tokens, gpu, kind)
    for kind in ("prefill", "offload", "decode")
    for gpu in (H100, A100)
    for tokens in (147_456, 600_000)
    for shape in SHAPES
]
QUICK = Case("llama", 147_456, H100, "prefill")


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case == QUICK else [pytest.mark.slow]) for case in CASES], ids=str
)
def test_a_graph_compiles_for_a_gpu(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    found = compiled(case, monkeypatch)
    every_piece_is_compiled(found)
    every_kernel_is_a_binary_that_keeps_to_its_registers(found)
    no_index_is_wider_than_it_need_be(found, case)
    pieces_hold_for_other_lengths(found, case)
    nothing_runs_beside_kernels_but_attention_and_products(found, case)
    alike_layers_share_a_body(found, case)
    if case.kind != "decode":
        positions_have_a_sine_once_and_not_for_each_head(found)
        bodies_launch_no_more_than_they_need(found, case)
    llama_launches_as_documented(found, case)


def every_piece_is_compiled(found: Compiled) -> None:
    assert found.made.kernels
    assert not found.report.eager_pieces
    assert not found.report.failed


def every_kernel_is_a_binary_that_keeps_to_its_registers(found: Compiled) -> None:
    """All configurations of all kernels; few may spill more than the autotuner accepts."""
    kernels = found.made.kernels
    for kernel in kernels:
        assert kernel.cubin[:4] == b"\x7fELF", kernel.name
        assert 0 < kernel.registers <= MOST_REGISTERS, f"{kernel.name}: {kernel.registers} registers"
    spilled = [kernel for kernel in kernels if kernel.stack > MOST_STACK]
    kept = {(kernel.wrapper, kernel.name) for kernel in kernels if kernel.stack <= MOST_STACK}
    for kernel in spilled:
        assert (kernel.wrapper, kernel.name) in kept, f"{kernel.name}: {kernel.stack} bytes of stack"
    assert len(spilled) <= MOST_SPILLED * len(kernels), [(kernel.name, kernel.stack) for kernel in spilled]


def no_index_is_wider_than_it_need_be(found: Compiled, case: Case) -> None:
    """A mini-sequence has fewer than 2^31 values, and so has a layer's past at these lengths. What runs once behind the
    loops may reach into more: the last row of 600,000 of the residual stream. (A position may be 64 bits wide: that is
    a value. Where a decode step has a mask, its model repeats keys for all heads, and those may be more than 2^31.)"""
    pieces = found.report.compiled_pieces
    for kernel in found.made.kernels:
        if found.report.stages and not pieces[kernel.wrapper].startswith("stage"):
            continue
        repeats_keys = case.kind == "decode" and STEPS_HAVE_MASKS and "_clone_expand_" in kernel.name
        if repeats_keys and case.tokens * 4096 >= 2**31:
            continue
        assert not re.search(r"program_id\(\d\)\.to\(tl\.int64\)", kernel.source), kernel.name
        sizes = [name for name, type in kernel.signature.items() if name.endswith("numel") and type == "i64"]
        assert not sizes, f"{kernel.name}: {sizes}"


def positions_have_a_sine_once_and_not_for_each_head(found: Compiled) -> None:
    """One kernel of a body computes them, and it reads no product: queries and keys are products."""
    pieces = found.report.compiled_pieces
    dear = {(k.wrapper, k.name): k for k in found.made.kernels if re.search(r"\b(sin|cos)\(", k.source)}
    of_bodies = [key for key in dear if pieces[key[0]].startswith("stage")]
    bodies = {i for i, name in enumerate(pieces) if name.startswith("stage")}
    assert {wrapper for wrapper, _ in of_bodies} == bodies
    assert len(of_bodies) == len(bodies), [name for _, name in of_bodies]
    for key in of_bodies:
        assert "mm" not in key[1] and "_unsafe_view" not in key[1], f"{key[1]} reads a product of all heads"


def pieces_hold_for_other_lengths(found: Compiled, case: Case) -> None:
    """Code compiled for one length depends on no size, except that indices fit in 32 bits."""
    assert found.assumed
    for symbols, conditions in found.assumed:
        for count in (2, 517, 4096):
            given = {"count": count, "start": 3 * count}
            known = {symbol: given.get(name, case.tokens - 1) for name, symbol in symbols.items()}
            assert all(condition.xreplace(known) == sympy.true for condition in conditions), conditions


def nothing_runs_beside_kernels_but_attention_and_products(found: Compiled, case: Case) -> None:
    known = {"triton"} | PRODUCTS | ATTENTIONS | (SORTING if case.shape == "mixtral" else set())
    for piece, launches in found.launches.items():
        assert launches.keys() <= known, f"{piece}: {launches.keys() - known}"


#: Loop bodies of a prefill. The first has no attention. Where layers see a window or everything, a body is of two
#: layers: window and window, window and all, all and window.
BODIES = {"llama": 2, "gemma3": 4, "mixtral": 2}


def alike_layers_share_a_body(found: Compiled, case: Case) -> None:
    pieces, layers = found.report.compiled_pieces, SHAPES[case.shape]().num_hidden_layers
    assert len(set(pieces)) == len(pieces)
    if case.kind == "decode":
        assert found.report.layer_pieces == layers + 1 and found.report.bodies_shared >= layers // 2
        return
    assert len(found.report.stages) == layers
    assert sum(name.startswith("stage") for name in pieces) == BODIES[case.shape]


#: A layer's body: its attention and everything up to the next layer's keys and values.
LAUNCHES = {
    "llama": Counter({"triton": 7, "extern_kernels.mm": 6, INTO_ITS_PLACE: 1, ATTENTION: 1}),
    # One more where queries are of a window and the next layer's keys are not: their positions have other angles.
    "gemma3": Counter({"triton": 8, "extern_kernels.mm": 6, INTO_ITS_PLACE: 1, ATTENTION: 1}),
    "mixtral": Counter(
        {
            "triton": 12,
            "extern_kernels.mm": 4,
            INTO_ITS_PLACE: 1,
            "extern_kernels._grouped_mm": 2,
            **dict.fromkeys({ATTENTION, *SORTING}, 1),
        }
    ),
}

if ANGLES_ARE_A_PRODUCT:
    # Gemma-3's norms of heads do not fuse with a rotation that reads them so. One of its layers makes another's angles.
    LAUNCHES["gemma3"] += Counter({"triton": 4, "extern_kernels.bmm": 1})


def bodies_launch_no_more_than_they_need(found: Compiled, case: Case) -> None:
    bodies = {name: launches for name, launches in found.launches.items() if name.startswith("stage_")}
    assert bodies.pop("stage_0")[ATTENTION] == 0
    for name, launches in bodies.items():
        assert launches[ATTENTION] == 1, name
        assert not launches - LAUNCHES[case.shape], f"{name}: {launches}"


#: A product that is written to its rows among those of all tokens.
INTO = "torch.ops.mom.product_into.default"


def launched(products: int, kernels: int, *others: str) -> Counter[str]:
    return Counter({"extern_kernels.mm": products, "triton": kernels}) + Counter(others)


#: Llama's pieces: up to the first attention's keys and values, a layer, from the last attention on.
#:
#:     products    Query, key, value, output, gate, up, down: seven to a layer. The head is one more. Of a prefill's
#:                 last layer one row is computed, apart from its keys and values.
#:     prefill     Before the first attention: embedding and norm; sine and cosine; rotated keys into their place.
#:                 Values are a product that goes into theirs. A layer: the norm once more, which is cheaper than to
#:                 keep it for all tokens; sine and cosine; rotated queries; sum and norm; silu and product; sum and
#:                 norm; keys.
#:     decode      Before the first: embedding and norm, angles, rotated query and key. A layer: sum and norm; silu and
#:                 product; sum and norm; query and key as before. Between pieces a cache is extended.
LLAMA = {
    "prefill": [launched(1, 3, INTO), launched(6, 7, ATTENTION, INTO), launched(6, 5, ATTENTION)],
    "decode": [launched(3, 4), launched(7, 5, ATTENTION), launched(5, 3, ATTENTION)],
}


def llama_launches_as_documented(found: Compiled, case: Case) -> None:
    """Copies to the host launch nothing. (Where angles are a product, a decode step has a mask, too.)"""
    if case.shape == "llama" and not ANGLES_ARE_A_PRODUCT:
        said = LLAMA["decode" if case.kind == "decode" else "prefill"]
        launches = [Counter({STOCK if name in STOCKS else name: n for name, n in one.items()})
                    for one in found.launches.values()]  # fmt: skip
        assert launches == said, found.launches
