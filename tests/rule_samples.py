"""Calls of every registered operator: PyTorch's own operator samples, and a few written by hand.

`from_op_db()` runs PyTorch's samples and notes the registered operators that each of them calls, before
and after the decompositions that Inductor applies. What it does not reach is in `BY_HAND`.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable
from functools import cache
from itertools import islice
from typing import Any

import torch
from torch._inductor.decomposition import select_decomp_table
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from mom_passes.rules import registered
from mom_passes.rules.attention import SDPA
from mom_passes.rules.pointwise import PRIMITIVES
from tests.quantised_operators import NF4, packed
from tests.rule_law import Call

aten, prims, mom = torch.ops.aten, torch.ops.prims, torch.ops.mom

PER_OPERATOR = 16
PER_OP_INFO = 12
LARGEST = 4096
"""Elements of a tensor in a sample; larger ones say nothing new and take long."""


class _Recorder(TorchDispatchMode):
    """Notes calls of registered operators, and of those that they decompose into."""

    def __init__(self, found: dict[Any, dict[str, Call]]) -> None:
        super().__init__()
        self.found = found
        self.rules = registered()
        self.decompositions = select_decomp_table()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self.rules and len(self.found[func]) < PER_OPERATOR:
            call = Call(func, args, kwargs)
            if str(call) not in self.found[func] and _is_small((args, kwargs)):
                self.found[func][str(call)] = Call(func, tree_map(_copied, args), tree_map(_copied, kwargs))
        if func in self.decompositions:
            with self:
                result = self.decompositions[func](*args, **kwargs)
            if result is not NotImplemented:
                return result
        return func(*args, **kwargs)


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def _is_small(tree: Any) -> bool:
    sizes: list[int] = []
    tree_map(lambda value: sizes.append(value.numel()) if isinstance(value, torch.Tensor) else None, tree)
    return max(sizes, default=0) <= LARGEST


@cache
def from_op_db() -> dict[Any, list[Call]]:
    found: dict[Any, dict[str, Call]] = defaultdict(dict)
    recorder = _Recorder(found)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for info in op_db:
            torch.manual_seed(0)
            # Double precision: rows may be summed in another order than the whole, which must not show.
            for dtype in (torch.float64, torch.int64):
                if dtype in info.dtypes:
                    _record(info, dtype, recorder)
    return {target: list(calls.values()) for target, calls in found.items()}


def _record(info: Any, dtype: torch.dtype, recorder: _Recorder) -> None:
    # Not `info.sample_inputs`: it seeds and inspects the call stack for each sample, which takes
    # longer than everything else here together.
    samples = info.sample_inputs_func(info, "cpu", dtype, requires_grad=False)
    for sample in islice(samples, PER_OP_INFO):
        try:
            with recorder:
                info.op(sample.input, *sample.args, **sample.kwargs)
        except Exception:
            # A sample that this build or a decomposition cannot run. That an operator is left
            # without samples is what the law test reports; which of PyTorch's own fail is not our matter.
            continue


# Written by hand: operators that PyTorch's samples do not reach


def floats(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator, dtype=torch.float64) * 0.8 + 0.1


def integers(*shape: int, below: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, below, shape, generator=torch.Generator().manual_seed(seed))


#: Primitives of whole numbers. All others get fractions between 0 and 1, where nearly every function is defined.
_WHOLE = ("bitwise_and", "bitwise_not", "bitwise_or", "bitwise_xor")
#: Primitives that take more than tensors.
_SPECIAL = ("convert_element_type", "device_put", "where", "clone", "acosh")


def _primitives() -> list[Call]:
    calls = []
    for name in PRIMITIVES.split():
        if name in _SPECIAL:
            continue
        target = getattr(prims, name).default
        values = integers if name in _WHOLE else floats
        arity = len(target._schema.arguments)
        calls.append(Call(target, tuple(values(2, 6, 5, seed=seed) for seed in range(arity))))
    x, y = floats(2, 6, 5), floats(2, 6, 5, seed=1)
    return [
        *calls,
        Call(prims.acosh.default, (x + 1,)),
        Call(prims.clone.default, (x,)),
        Call(prims.rev.default, (x, [1])),
        Call(prims.convert_element_type.default, (x, torch.float32)),
        Call(prims.device_put.default, (x, torch.device("cpu"))),
        Call(prims.where.default, (x > y, x, y)),
        Call(prims.reshape.default, (x, [12, 5])),
    ]


def _pointwise() -> list[Call]:
    x, n = floats(2, 6, 5), integers(2, 6, 5)
    return [
        *(Call(getattr(aten, name).default, (x,)) for name in ("conj_physical", "positive", "square", "relu6", "selu")),
        Call(aten.lift_fresh_copy.default, (x,)),
        Call(aten.copysign.Scalar, (x, -1.0)),
        Call(aten.div.Scalar_mode, (x, 0.3), {"rounding_mode": "floor"}),
        Call(aten.fill.Tensor, (x, torch.tensor(2.0))),
        Call(aten.floor_divide.Scalar, (x, 0.3)),
        Call(aten.remainder.Scalar_Tensor, (2, x)),
        Call(aten.view.dtype, (x, torch.int32)),
        Call(aten.view.dtype, (x, torch.int16)),
        Call(aten.xlogy.Scalar_Other, (x, 0.7)),
        Call(aten.xlogy.Scalar_Self, (0.7, x)),
        *(Call(getattr(aten, f"bitwise_{name}").Scalar, (n, 3)) for name in ("or", "xor")),
        *(Call(getattr(aten, f"bitwise_{name}").Scalar_Tensor, (3, n)) for name in ("and", "or", "xor")),
        *(Call(getattr(aten, f"bitwise_{side}_shift").Tensor_Scalar, (n, 1)) for side in ("left", "right")),
        Call(aten.true_divide.Tensor, (x, floats(6, 1, seed=1))),
        Call(aten.where.self, (x > 0.5, x, floats(6, 1))),
    ]


def _reductions() -> list[Call]:
    x = floats(2, 6, 5)
    return [
        Call(aten.all.dims, (x > 0.2, [0, -1])),
        Call(aten.all.dims, (x > 0.2, [1], True)),
        Call(aten.any.dims, (x > 0.9, [0])),
        Call(aten.count_nonzero.dim_IntList, (x, [1])),
        Call(aten.nansum.default, (x, [1])),
        Call(aten.std.dim, (x, [-1])),
        Call(aten.var.dim, (x, [1]), {"keepdim": True}),
        Call(aten.log_softmax.int, (x, -1)),
        Call(aten._fused_rms_norm.default, (x, [5], floats(5), 1e-6)),
        Call(aten._fused_rms_norm.default, (x, [6, 5], None, None)),
    ]


def _views() -> list[Call]:
    x = floats(2, 6, 5)
    return [
        Call(aten.view.default, (x, [12, 5])),
        Call(aten.view.default, (x.reshape(12, 5), [2, 6, 5])),
        Call(aten.view.default, (x.reshape(12, 5), [2, -1, 5])),
        Call(aten.view.default, (x, [60])),
        Call(aten.view.default, (x, [2, 30])),
        Call(aten.reshape.default, (x.transpose(0, 1), [6, 10])),
        Call(aten.reshape.default, (x.transpose(1, 2), [-1])),
        # Rows of a single token: squeezing must not remove them.
        Call(aten.squeeze.default, (floats(1, 6, 1),)),
        Call(aten.squeeze.dim, (floats(4, 6, 1), 0)),
        Call(aten.slice.Tensor, (x, 1, 0, 2**63 - 1)),
        Call(aten.constant_pad_nd.default, (x, [0, 0, 1, 2], 0.5)),
        Call(aten.expand.default, (floats(2, 1, 5), [3, 2, 6, -1])),
        Call(aten.repeat.default, (floats(1, 5), [2, 6, 1])),
        Call(aten.repeat.default, (floats(6, 5), [3, 1])),
        Call(aten.view_as_complex.default, (floats(2, 6, 2),)),
        Call(aten.view_as_real.default, (torch.view_as_complex(floats(2, 6, 2)),)),
        Call(aten.cat.default, ([floats(0), x, x], 2)),
    ]


def _sources() -> list[Call]:
    cpu = torch.device("cpu")
    x = floats(4, 6, 5)

    def iota(start: int, step: int) -> Call:
        known = {"dtype": torch.int64, "device": cpu, "requires_grad": False}
        return Call(prims.iota.default, (7,), {"start": start, "step": step, **known})

    return [
        iota(0, 1),
        iota(-3, 2),
        Call(aten.arange.start_step, (9, 0, -2)),
        Call(aten.full.default, ([6, 5], 3)),
        Call(aten.tril.default, (x, 1)),
        Call(aten.triu.default, (x, -1)),
    ]


def _indexing() -> list[Call]:
    x, rows, columns = floats(4, 6, 5), integers(3, 7), integers(7)
    return [
        Call(aten.index.Tensor, (x, [None, rows])),
        Call(aten.index.Tensor, (x, [rows, None, columns])),  # not neighbours: the index dimensions go first
        Call(aten.index.Tensor, (floats(2, 4, 3, 5), [None, integers(7), None, columns])),
        Call(aten.index.Tensor, (x, [None, rows, columns])),
        Call(aten.index.Tensor, (x, [rows[:, :1], columns])),
        Call(aten._unsafe_index.Tensor, (x, [None, rows, columns])),
        Call(aten.gather.default, (x, 1, integers(3, 2, 5))),
        Call(aten.scatter.value, (x, 1, integers(4, 2, 5), 9.0)),
        Call(aten.scatter.value, (x, 1, integers(3, 2, 5), 9.0)),
        Call(aten.slice_scatter.default, (x, floats(4, 2, 5, seed=1), 1, 3, 5)),
        Call(aten.isin.Tensor_Tensor, (rows, columns)),
    ]


def _matmuls() -> list[Call]:
    n = integers(32, 16).to(torch.int8)
    return [
        Call(aten._int_mm.default, (n, n.t().contiguous())),
        Call(aten.addmm.default, (floats(5), floats(6, 4), floats(4, 5))),
        Call(aten.baddbmm.default, (floats(6, 1), floats(4, 6, 3), floats(4, 3, 5)), {"beta": 0.5, "alpha": 2}),
    ]


def _packed_products() -> list[Call]:
    """Products with quantised weights: those of PyTorch, and those of a package."""
    x, codes = floats(6, 64).float(), integers(32, 64, below=16).int()
    scales, rows = floats(2, 32, 2, seed=1).float(), integers(32, 64, below=100).to(torch.int8)
    fours = aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    return [
        Call(aten._weight_int4pack_mm_for_cpu.default, (x, fours, 32, scales)),
        Call(aten._weight_int8pack_mm.default, (x.bfloat16(), rows, floats(32, seed=2).bfloat16())),
    ]


def _bitsandbytes() -> list[Call]:
    ops, x = torch.ops.bitsandbytes, floats(2, 6, 64).float()
    weights, scales = packed(floats(32, 64, seed=1) - 0.5)
    bias, code, half = floats(32, seed=2).float(), torch.tensor(NF4), x[0].half()
    rows, of_rows, _ = ops.int8_vectorwise_quant(half)
    others, of_others, _ = ops.int8_vectorwise_quant(floats(32, 64, seed=3).half())
    product = ops.int8_linear_matmul(rows, others)
    return [
        Call(ops.gemm_4bit.default, (x, weights, [32, 64], scales, 32, "nf4")),
        Call(ops.gemm_4bit.default, (x[0], weights, [32, 64], scales, 32, "nf4"), {"bias": bias}),
        Call(ops.gemv_4bit.default, (x.bfloat16(), weights, [32, 64], scales, code, 32)),
        Call(ops.int8_linear_matmul.default, (rows, others)),
        Call(ops.int8_vectorwise_quant.default, (half,)),
        Call(ops.int8_mm_dequant.default, (product, of_rows, of_others)),
        Call(ops.int8_mm_dequant.default, (product, of_rows, of_others, torch.float32, bias)),
        Call(ops.int8_scaled_mm.default, (rows, others, of_rows, of_others)),
        Call(ops.int8_scaled_mm.default, (rows, others, of_rows, of_others, bias), {"dtype": torch.float32}),
    ]


def _attentions(device: str = "cpu", dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    def heads(count: int, rows: int, seed: int, batch: int = 2) -> torch.Tensor:
        return floats(batch, count, rows, 8, seed=seed).to(device, dtype)

    return {"query": heads(4, 6, 0), "key": heads(4, 9, 1), "value": heads(4, 9, 2), "grouped": heads(2, 9, 3)}


def _of_keys() -> list[tuple[torch.Tensor | None, ...]]:
    """What is said of each of nine keys: padding, holes, segments; for each entry or for all."""
    padding, holes = torch.arange(9) >= torch.tensor([[4], [1]]), floats(2, 9, seed=7) > -0.5
    segments, positions = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 2, 2]]), torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1]])
    said = [(padding, None, None), (padding[:1], None, None), (holes, None, None), (None, segments, positions)]
    return [(*vectors, mom.spans.default(*vectors)) for vectors in said] + [(padding, None, None, None)]


def _copied_rows() -> list[Call]:
    return [Call(mom.copy_rows.default, (floats(2, 3, 7, 4), order)) for order in ([2, 0, 1, 3], [0, 1, 2, 3])]


def _convolutions() -> list[Call]:
    x, depthwise, state = floats(2, 4, 7), floats(4, 1, 3, seed=1), floats(2, 4, 3, seed=2)
    return [
        Call(mom.causal_conv1d.default, (x, depthwise, floats(4), 1, 4)),
        Call(mom.causal_conv1d.default, (x, depthwise, None, 2, 4)),
        Call(mom.causal_conv1d.default, (x, floats(6, 4, 3), None, 2)),
        Call(mom.causal_conv1d.default, (x, floats(4, 2, 1), None, 1, 2)),
        Call(mom.continued_conv1d.default, (x, depthwise, floats(4), 1, 4, state[:, :, 1:].contiguous())),
        Call(mom.continued_conv1d.default, (x, floats(6, 4, 3), None, 2, 1, floats(2, 4, 4, seed=3))),
        Call(mom.last_rows.default, (state, x, 2)),
        Call(mom.last_rows.default, (floats(2, 9, 7), x.repeat(1, 3, 1), 1)),
    ]


def _mom_attention() -> list[Call]:
    made = _attentions()
    query, key, value, grouped = made["query"], made["key"], made["value"], made["grouped"]
    per_row, broadcast = floats(2, 1, 6, 9, seed=5) > 0.3, floats(2, 1, 1, 9, seed=6)
    arguments = [
        (query, key, value, None, 3, True, 0.3),
        (query, key, value, None, 3, True, 0.3, 4),
        (query, grouped, grouped, None, 0, False, 0.3),
        (query, grouped, grouped, per_row, 3, True, 0.3),
        (query, key, value, per_row[:1], 0, False, 0.3),
        (query, key, value, broadcast, 0, False, 0.3),
        (query, key, value, floats(6, 9), 0, False, 0.3),
        *((query, key, value, None, 3, True, 0.3, 4, *vectors) for vectors in _of_keys()),
        *((query, grouped, grouped, None, 3, False, 0.3, None, *vectors) for vectors in _of_keys()),
    ]
    sinks = [(query, key, value, None, 3, True, 0.3, 4), (query, grouped, grouped, per_row, 3, True, 0.3)]
    more: list[dict[str, Any]] = [{"sinks": floats(4, seed=8)}, {"softcap": 0.5}]
    with_sinks = [Call(mom.attention.default, one, {**named}) for one in sinks for named in more]
    return [*(Call(mom.attention.default, one) for one in arguments), *with_sinks, *_window_layers()]


def _window_layers() -> list[Call]:
    """Calls whose rows need the keys in their windows, and one whose keys begin within the sequence."""
    query, key, value = (floats(2, heads, 9, 8, seed=seed) for seed, heads in enumerate((4, 2, 2)))
    late = (query[:, :, :2], key[:, :, 3:], value[:, :, 3:], None, 7, True, 0.3, 4, *_of_keys()[0])
    plain, more = (query, key, value, None, 0, True, 0.3), [{}, {"sinks": floats(4, seed=8)}, {"softcap": 0.5}]
    sizes = (1, 3, 20)
    alone = [Call(mom.attention.default, (*plain, window), {"first": 0, **one}) for window in sizes for one in more]
    return [
        *alone,
        *(Call(mom.attention.default, (*plain, 4, *vectors), {"first": 0}) for vectors in _of_keys()),
        Call(mom.attention.default, (*plain[:3], floats(2, 1, 9, 9) > 0.3, *plain[4:], 4), {"first": 0}),
        Call(mom.attention.default, late, {"first": 3}),
    ]


def _scored() -> list[Call]:
    hidden, matrix, targets = floats(2, 6, 8), floats(33, 8, seed=1).t(), integers(2, 6, 2, below=33)
    capped, wants = [["mul", "tanh", "mul"], [0.1, 0.0, 10.0]], ["total", "weighted", "greedy"]
    return [
        Call(mom.scored.default, (hidden, matrix, None, targets, [], [], wants)),
        Call(mom.scored.default, (hidden, matrix, floats(33), targets, *capped, ["total", "likely"])),
        Call(mom.scored.default, (hidden[0], matrix, None, None, ["float32"], [0.0], [])),
    ]


def _sdpa_for_cpu() -> list[Call]:
    made = _attentions()
    target = aten._scaled_dot_product_flash_attention_for_cpu.default
    operands = (made["query"], made["key"], made["value"])
    masks = [floats(2, 1, 6, 9), floats(1, 1, 6, 9), floats(2, 4, 6, 9), floats(6, 9)]
    square = (made["query"], made["query"], made["query"])
    return [
        Call(target, operands),
        Call(target, operands, {"scale": 0.5}),
        *(Call(target, operands, {"attn_mask": mask}) for mask in masks),
        Call(target, (*square, 0.0, True)),
    ]


def sdpa_for_cuda(target: Any) -> list[Call]:
    """Samples of the fused kernels, which exist on a CUDA device only."""
    made = _attentions("cuda", torch.bfloat16)
    operands = (made["query"], made["key"], made["value"])
    mask = floats(2, 4, 8, 16).to("cuda", torch.bfloat16)[:, :, :6, :9]
    if SDPA[target] is None:
        return [Call(target, operands)]
    return [Call(target, (*operands, bias, True)) for bias in (None, mask)]


CUDA_ONLY = {
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
}

def _scans() -> list[Call]:
    query, key, value = floats(2, 7, 2, 3), floats(2, 7, 2, 3, seed=1), floats(2, 7, 4, 5, seed=2)
    decay, beta, state = -floats(2, 7, 4).abs(), floats(2, 7, 4, seed=3).sigmoid(), floats(2, 4, 3, 5, seed=4)
    each = query.repeat_interleave(2, 2), key.repeat_interleave(2, 2)
    channels, steps, mom = -floats(2, 7, 4, 3).abs(), floats(2, 7, 4, seed=5).abs(), torch.ops.mom
    narrow, wide, matrix = floats(2, 3, 7, seed=6), floats(2, 4, 7, seed=7), -floats(4, 3, seed=8).abs()
    return [
        Call(mom.gated_delta_rule.default, (query, key, value, decay, beta)),
        Call(mom.gated_delta_rule.default, (query, key, value, decay, beta, state)),
        Call(mom.kda.default, (*each, value, channels, beta)),
        Call(mom.kda.default, (*each, value, channels, beta, state)),
        Call(mom.mamba2_scan.default, (value, steps, -floats(4).abs(), query, key)),
        Call(mom.mamba2_scan.default, (value, steps, -floats(4).abs(), query, key, state.mT.contiguous())),
        Call(mom.selective_scan.default, (wide, wide.abs(), matrix, narrow, narrow + 1)),
        Call(mom.selective_scan.default, (wide, wide.abs(), matrix, narrow, narrow + 1, floats(2, 4, 3))),
        Call(mom.linear_recurrence.default, (beta, steps)),
        Call(mom.linear_recurrence.default, (beta, steps, floats(2, 4))),
    ]


BY_HAND: list[Callable[[], list[Call]]] = [
    _primitives, _pointwise, _reductions, _views, _sources, _indexing, _matmuls, _packed_products,
    _bitsandbytes, _copied_rows, _convolutions, _scans, _mom_attention, _scored, _sdpa_for_cpu,
]  # fmt: skip


@cache
def all_samples() -> dict[Any, list[Call]]:
    """Operator overload -> calls of it."""
    samples: dict[Any, list[Call]] = defaultdict(list)
    for target, calls in from_op_db().items():
        samples[target] += calls
    for make in BY_HAND:
        for call in make():
            samples[call.target].append(call)
    return dict(samples)
