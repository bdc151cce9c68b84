"""Recurrences of model code are traced as one operator each, and mini-sequences pass their states on."""

from __future__ import annotations

import copy
import importlib
import inspect
import subprocess
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import fx
from transformers.integrations import hub_kernels

import mom_compile
from benchmarks.architectures_worker import Subject, accepted, build, words
from benchmarks.small_configs import SMALL
from mom_compile.scans import SCANS
from mom_compile.substitutes import KNOWN
from mom_compile.substitution import traces_substitutes
from mom_compile.torch_compat.dynamo import is_substituted
from mom_passes.loops.loop import loop_nodes
from mom_passes.rules.scans import SCANS as RULES
from tests.models import sweep
from tests.programs import HIDDEN, STEPS, Weights, weights_of
from tests.rule_samples import floats
from tests.shares import random_examples
from tests.test_properties import RANDOM_PROGRAMS, parameter_names
from tests.tracing import rewrite, trace

mom = torch.ops.mom
B, H, G, D, V = 2, 4, 2, 16, 24
#: Types of transformers with a recurrence, one of each kind.
HYBRIDS = ["qwen3_5_text", "kimi_linear", "bamba", "jamba", "mamba2", "recurrent_gemma", "falcon_h1"]
#: Of each recurrence; the others have Mamba-2, as Bamba has.
ONE_OF_EACH = {"qwen3_5_text", "kimi_linear", "bamba", "jamba", "recurrent_gemma"}


def original(model: str, name: str) -> Callable[..., Any]:
    return getattr(importlib.import_module(f"transformers.models.{model}.modeling_{model}"), name)  # type: ignore[no-any-return]


def delta_operands(rows: int, heads: int, *, per_channel: bool = False) -> tuple[torch.Tensor, ...]:
    query, key = floats(B, rows, heads, D), F.normalize(floats(B, rows, heads, D, seed=1), dim=-1)
    decay = -floats(B, rows, H, D, seed=3).abs() if per_channel else -floats(B, rows, H, seed=3).abs()
    operands = (query, key, floats(B, rows, H, V, seed=2), decay, floats(B, rows, H, seed=4).sigmoid())
    return tuple(one.float() for one in operands)


def mamba2_operands(rows: int) -> tuple[torch.Tensor, ...]:
    steps, decay = floats(B, rows, H, seed=1).sigmoid() / 10, -floats(H, seed=2).exp()
    operands = (floats(B, rows, H, V), steps, decay, floats(B, rows, G, D, seed=3), floats(B, rows, G, D, seed=4))
    return tuple(one.float() for one in operands)


def mamba_operands(rows: int) -> tuple[torch.Tensor, ...]:
    wide = floats(B, H, rows).float(), floats(B, H, rows, seed=1).float().sigmoid()
    return (*wide, -floats(H, D, seed=2).float().exp(), *(floats(B, D, rows, seed=s).float() for s in (3, 4)))


def close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 2, 63, 64, 65, 203])
@pytest.mark.parametrize("normalised", [False, True])
def test_delta_rules_are_those_of_transformers(rows: int, normalised: bool) -> None:
    state = floats(B, H, D, V, seed=9).float()
    options = {"initial_state": state, "output_final_state": True, "use_qk_l2norm_in_kernel": normalised}
    pairs = [
        ("qwen3_5", "torch_chunk_gated_delta_rule", "gated_delta_rule", delta_operands(rows, H)),
        ("qwen3_5", "torch_recurrent_gated_delta_rule", "gated_delta_rule", delta_operands(rows, H)),
        ("kimi_linear", "chunk_kimi_delta_attention", "kda", delta_operands(rows, H, per_channel=True)),
        ("kimi_linear", "recurrent_kimi_delta_attention", "kda", delta_operands(rows, H, per_channel=True)),
    ]
    for model, name, own, operands in pairs:
        close(SCANS[own](*operands, **options), original(model, name)(*operands, **options))


def test_grouped_heads_are_repeated() -> None:
    query, key, *others = delta_operands(70, G)
    repeated = [one.repeat_interleave(H // G, 2) for one in (query, key)]
    close(mom.gated_delta_rule(query, key, *others), mom.gated_delta_rule(*repeated, *others))


@pytest.mark.parametrize("rows", [1, 2, 63, 64, 65, 203])
def test_state_space_models_are_those_of_transformers(rows: int) -> None:
    x, dt, A, B_, C = mamba2_operands(rows)
    options = {"D": floats(H).float(), "dt_bias": floats(H, seed=7).float(), "dt_softplus": True}
    options |= {"initial_states": floats(B, H, V, D, seed=9).float(), "return_final_states": True}
    expected = original("mamba2", "mamba2_chunk_scan")(x, dt, A, B_, C, chunk_size=32, **options)
    close(SCANS["mamba2_scan"](x, dt, A, B_, C, **options), expected)
    more = {"D": floats(H).float(), "z": floats(B, H, rows, seed=6).float(), "delta_softplus": True}
    more |= {"delta_bias": floats(H, seed=7).float(), "return_last_state": True}
    operands = mamba_operands(rows)
    close(SCANS["selective_scan"](*operands, **more), original("mamba", "mamba_selective_scan")(*operands, **more))


def test_operands_of_another_shape_are_named() -> None:
    query, key, value, decay, beta = delta_operands(10, H)
    a = torch.rand(2, 9, 4)
    with pytest.raises(ValueError, match=r"delta_rule: value has shape \[2, 7, 4, 24\], expected \[2, 10, h, v\]"):
        mom.gated_delta_rule(query, key, value[:, :7], decay, beta)
    with pytest.raises(ValueError, match=r"kda: decay has shape \[2, 10, 4\], expected \[2, 10, 4, 16\]"):
        mom.kda(query, key, value, decay, beta)
    with pytest.raises(ValueError, match="4 heads are no multiple of 3 groups"):
        mom.gated_delta_rule(query[:, :, :3], key[:, :, :3], value, decay, beta)
    with pytest.raises(ValueError, match="state has shape"):
        mom.linear_recurrence(a, a, a[:1, 0])
    with pytest.raises(TypeError, match=r"b is torch.int64, expected floating-point"):
        mom.linear_recurrence(a, a.long())
    with pytest.raises(RuntimeError, match="has no derivative"):
        mom.linear_recurrence(a.requires_grad_(), a.detach())


def test_a_state_continues_where_it_was_left() -> None:
    """Rows of half precision, and a state in float32."""
    query, key, value, decay, beta = (one.bfloat16() for one in delta_operands(100, H))
    rows, state = mom.gated_delta_rule(query, key, value, decay, beta)
    first, middle = mom.gated_delta_rule(*(one[:, :37] for one in (query, key, value, decay, beta)))
    second, last = mom.gated_delta_rule(*(one[:, 37:] for one in (query, key, value, decay, beta)), middle)
    assert rows.dtype is torch.bfloat16 and state.dtype is torch.float32
    close(last, state)
    torch.testing.assert_close(torch.cat([first, second], 1), rows, rtol=0.02, atol=0.02)


class Layer(torch.nn.Module):
    """A linear attention layer whose recurrence is a function of a library."""

    def __init__(self, rule: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rule, self.mixed = rule, torch.nn.Linear(32, 96)
        self.out = torch.nn.Linear(32, 32)

    def forward(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        query, key, value = self.mixed(x).view(*x.shape[:2], 4, 24).chunk(3, -1)
        gate = F.logsigmoid(x[..., :4])
        rows, _ = self.rule(query, F.normalize(key, dim=-1), value, g=gate, beta=gate.exp(), **kwargs)
        return self.out(rows.flatten(2))


def targets_traced(model: Any, backend: Any, *args: Any, **kwargs: Any) -> set[str]:
    """Names of the operators in Dynamo's graph for a backend."""
    found: set[str] = set()

    def spy(gm: fx.GraphModule, inputs: Any) -> Any:
        found.update(str(node.target) for node in gm.graph.nodes)
        return gm

    if backend == "mom":
        traces_substitutes(spy)
    torch._dynamo.reset()
    torch.compile(model, backend=spy)(*args, **kwargs)
    return found


def test_only_graphs_for_this_backend_have_the_operators() -> None:
    layer, x = Layer(original("qwen3_5", "torch_chunk_gated_delta_rule")), torch.randn(1, 70, 32)
    with torch.no_grad():
        assert "mom.gated_delta_rule" in str(targets_traced(layer, "mom", x))
        assert "mom." not in str(targets_traced(layer, "another", x))
    assert "mom." not in str(targets_traced(layer, "mom", x)), "gradients are needed: the code itself is traced"


def test_packed_sequences_are_refused_as_in_eager_mode() -> None:
    layer, x = Layer(original("qwen3_5", "torch_chunk_gated_delta_rule")), torch.randn(1, 70, 32)
    packed = {"cu_seqlens": torch.tensor([0, 30, 70])}
    with torch.no_grad():
        if "can't keep packed sequences apart" in inspect.getsource(hub_kernels):
            with pytest.raises(ValueError, match="packed"):
                layer(x, **packed)
            with pytest.raises(Exception, match="packed"):
                torch.compile(layer, backend="mom")(x, **packed)
        else:  # older versions ignore them
            close(torch.compile(layer, backend="mom")(x, **packed), layer(x, **packed))


def test_model_files_that_are_imported_later_take_part() -> None:
    code = (
        "import mom_compile.backend, torch\n"
        "from mom_compile.torch_compat.dynamo import is_substituted\n"
        "from transformers.models.olmo_hybrid import modeling_olmo_hybrid as later\n"
        "assert is_substituted(later.torch_chunk_gated_delta_rule)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_known_name_is_a_function_of_transformers() -> None:
    files = {"gated_delta_rule": "qwen3_5", "kda": "kimi_linear", "mamba2_scan": "mamba2", "selective_scan": "mamba"}
    files["linear_recurrence"] = "recurrent_gemma"
    for path, like in KNOWN.items():
        found: Any = importlib.import_module(f"transformers.models.{files[like]}.modeling_{files[like]}")
        for name in path.split("."):
            found = getattr(found, name)
        function = found.__wrapped__ if "." in path else found
        assert is_substituted(function), path


def my_rule(
    query: Any, key: Any, value: Any, g: Any, beta: Any, initial_state: Any = None, output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
) -> Any:  # fmt: skip
    """A user's own delta rule, token by token."""
    state = value.new_zeros(*value.shape[:1], value.shape[2], key.shape[-1], value.shape[-1])
    rows = []
    for t in range(value.shape[1]):
        state = state * g[:, t, :, None, None].exp()
        delta = (value[:, t] - (state * key[:, t, :, :, None]).sum(-2)) * beta[:, t, :, None]
        state = state + key[:, t, :, :, None] * delta.unsqueeze(-2)
        rows.append((state * query[:, t, :, :, None]).sum(-2) * key.shape[-1] ** -0.5)
    return torch.stack(rows, 1), state if output_final_state else None


def test_a_users_function_takes_part(eager_pieces: None) -> None:
    rule = types.FunctionType(my_rule.__code__, my_rule.__globals__, "rule", my_rule.__defaults__)
    mom_compile.scan_operator(rule, like="gated_delta_rule")
    layer, x = Layer(rule), torch.randn(1, 70, 32)
    compiled = torch.compile(layer, backend="mom", options={"mini_seq_len": 16, "strict": True})
    with torch.no_grad():
        close(compiled(x), layer(x))
    report = mom_compile.reports()[-1]
    assert len(report.stages) == 1 and not report.left_out
    with pytest.raises(ValueError, match="already"):
        mom_compile.scan_operator(rule, like="kda")


def other_order(
    query: Any, key: Any, value: Any, beta: Any, g: Any, scale: Any = None, initial_state: Any = None,
    output_final_state: bool = False, use_qk_l2norm_in_kernel: bool = True,
) -> Any:  # fmt: skip
    """The same rule with its own order of parameters, its own defaults and one more parameter."""
    key = F.normalize(key, dim=-1) if use_qk_l2norm_in_kernel else key
    query = F.normalize(query, dim=-1) if use_qk_l2norm_in_kernel else query
    rows, state = my_rule(query, key, value, g, beta, None, output_final_state)
    return rows * (1 if scale is None else scale), state


@pytest.mark.parametrize(("scale", "operator"), [(None, True), (3.0, False)])
def test_order_and_defaults_are_the_functions_own(scale: float | None, operator: bool, eager_pieces: None) -> None:
    rule = types.FunctionType(other_order.__code__, other_order.__globals__, "rule", other_order.__defaults__)
    mom_compile.scan_operator(rule, like="gated_delta_rule")

    def run(x: torch.Tensor) -> torch.Tensor:
        heads = x.unflatten(-1, (4, 8))
        gate = F.logsigmoid(x[..., :4])
        return rule(heads * 3, heads * 2, heads, gate.exp(), gate, scale)[0]

    x = torch.randn(1, 18, 32)
    with torch.no_grad():
        assert ("mom.gated_delta_rule" in str(targets_traced(run, "mom", x))) == operator
        close(torch.compile(run, backend="mom", options={"mini_seq_len": 8, "strict": True})(x), run(x))


def test_a_state_of_half_precision_is_computed_with_in_float32(eager_pieces: None) -> None:
    layer, x = Layer(original("qwen3_5", "torch_chunk_gated_delta_rule")), torch.randn(1, 70, 32)
    state = torch.randn(1, 4, 8, 8).bfloat16()
    with torch.no_grad():
        compiled = torch.compile(layer, backend="mom", options={"mini_seq_len": 16, "strict": True})
        close(compiled(x, initial_state=state), layer(x, initial_state=state))
    assert mom_compile.reports()[-1].stages


def my_recurrence(hidden_states: Any, recurrent_gate: Any, reset: Any, recurrent_states: Any, acc_dtype: Any) -> Any:
    rows = []
    state = torch.zeros_like(hidden_states[:, 0], dtype=acc_dtype)
    for row, gate in zip(hidden_states.unbind(1), (recurrent_gate * ~reset).unbind(1), strict=True):
        state = gate * state + row
        rows.append(state)
    return torch.stack(rows, 1), state


def test_a_linear_recurrence_need_not_be_a_method(eager_pieces: None) -> None:
    mom_compile.scan_operator(my_recurrence, like="linear_recurrence")

    def run(x: torch.Tensor) -> torch.Tensor:
        y = x @ x.new_ones(32, 32)
        return my_recurrence(y, x.sigmoid(), x[..., :1] > 1, None, torch.float32)[0] @ x.new_ones(32, 8)

    x = torch.randn(1, 30, 32)
    with torch.no_grad():
        assert "mom.linear_recurrence" in str(targets_traced(run, "mom", x))
        close(torch.compile(run, backend="mom", options={"mini_seq_len": 8, "strict": True})(x) / 100, run(x) / 100)


class Method:
    def rule(self, query: Any, key: Any, value: Any, g: Any, beta: Any, initial_state: Any = None,
             output_final_state: bool = False, use_qk_l2norm_in_kernel: bool = False) -> Any:  # fmt: skip
        return my_rule(query, key, value, g, beta)


def test_functions_that_cannot_be_recurrences_are_named() -> None:
    with pytest.raises(ValueError, match="expected one of gated_delta_rule"):
        mom_compile.scan_operator(my_rule, like=["kda"])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="is a method"):
        mom_compile.scan_operator(Method.rule, like="gated_delta_rule")
    with pytest.raises(TypeError, match="needs lengths"):
        mom_compile.scan_operator(
            lambda query, key, value, g, beta, lengths, initial_state, output_final_state, use_qk_l2norm_in_kernel: 0,
            like="gated_delta_rule",
        )
    with pytest.raises(ValueError, match="expected one of gated_delta_rule"):
        mom_compile.scan_operator(my_rule, like="delta")
    with pytest.raises(TypeError, match="Python function, got builtin"):
        mom_compile.scan_operator(len, like="kda")
    with pytest.raises(TypeError, match="no parameter hidden_states, dt"):
        mom_compile.scan_operator(my_rule, like="mamba2_scan")


def model_of(name: str) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    model = build(Subject(name), SMALL, torch.float32)
    # RecurrentGemma returns no cache, and its own code for one breaks Dynamo of torch 2.11.
    return model, accepted(model, **words(model, 1, 203, SMALL), use_cache=name != "recurrent_gemma")


def tensors_of(value: Any) -> list[torch.Tensor]:
    """All tensors of an output: logits, and keys, values and states of its cache."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [one for part in value.values() for one in tensors_of(part)]
    if isinstance(value, (list, tuple)):
        return [one for part in value for one in tensors_of(part)]
    held = vars(value) if hasattr(value, "__dict__") and not isinstance(value, (torch.nn.Module, type)) else {}
    names = ("layers", "keys", "values", "conv_states", "recurrent_states")
    return [one for name in names if name in held for one in tensors_of(held[name])]


@pytest.mark.parametrize("name", sweep(HYBRIDS, quick=ONE_OF_EACH))
def test_hybrids_are_equal_and_whole_layers_are_in_loops(name: str, eager_pieces: None) -> None:
    model, inputs = model_of(name)
    with torch.no_grad():
        expected = model(**inputs)
        model.compile(backend="mom", options={"mini_seq_len": 48, "strict": True})
        actual = model(**inputs)
    wanted, got = tensors_of(dict(expected)), tensors_of(dict(actual))
    assert len(wanted) == len(got) > (name != "recurrent_gemma")
    for one, other in zip(got, wanted, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    (report,) = mom_compile.reports()
    assert set(report.left_out) <= {name for name in report.left_out if "attention" in name}
    assert not [name for name in report.work_outside if "attention" not in name]


def test_a_graph_does_not_grow_with_the_prompt(eager_pieces: None, stock_is_eager: None) -> None:
    model, _ = model_of("qwen3_5_text")
    found = [
        mom_compile.explain(model, {"input_ids": torch.zeros(1, tokens, dtype=torch.int64)}, mini_seq_len=48)
        for tokens in (300, 1100)
    ]
    assert len({one.reports[0].nodes for one in found}) == 1


@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["qwen3_5_text", "lfm2"])
def test_a_prompt_that_follows_a_cache_continues_from_its_states(name: str, eager_pieces: None) -> None:
    model, inputs = model_of(name)
    ids = inputs["input_ids"]
    with torch.no_grad():
        cache = model(input_ids=ids[:, :60], use_cache=True).past_key_values
        own = copy.deepcopy(cache)
        expected = model(input_ids=ids[:, 60:], past_key_values=cache, use_cache=True)
        model.compile(backend="mom", options={"mini_seq_len": 48, "strict": True})
        actual = model(input_ids=ids[:, 60:], past_key_values=own, use_cache=True)
    for one, other in zip(tensors_of(dict(actual)), tensors_of(dict(expected)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    (report,) = mom_compile.reports()
    assert not [name for name in report.work_outside if "attention" not in name]
    assert not [name for name in report.left_out if "attention" not in name and "cat" not in name]


def recurrence(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    def run(x: torch.Tensor) -> torch.Tensor:
        heads = x.unflatten(-1, (2, HIDDEN // 2))
        key = F.normalize(heads, dim=-1)
        gates = -x[..., :2].square()
        if name == "gated_delta_rule":
            return mom.gated_delta_rule(heads, key, heads, gates, gates.exp())[0].flatten(2)
        if name == "kda":
            return mom.kda(heads, key, heads, -heads.square(), gates.exp())[0].flatten(2)
        if name == "mamba2_scan":
            return mom.mamba2_scan(heads, gates.exp(), -x.new_ones(2), key, heads)[0].flatten(2)
        if name == "selective_scan":
            wide = x.mT
            return mom.selective_scan(wide, wide.sigmoid(), -x.new_ones(HIDDEN, 3), wide[:, :3], wide[:, 3:6])[0].mT
        return mom.linear_recurrence(x.sigmoid(), x)[0]

    return run


@random_examples(
    8,
    100,
    RANDOM_PROGRAMS,
    st.lists(st.sampled_from([*SCANS, *SCANS, "linear", "mlp", "causal", "rope"]), min_size=1, max_size=4),
    st.sampled_from(sorted(SCANS)),
    st.integers(8, 150),
    st.integers(2, 70),
    st.booleans(),
)
def test_programs_with_recurrences_are_equal(
    names: list[str], last: str, tokens: int, mini: int, dynamic: bool
) -> None:
    """Every recurrence is in a loop, for any operators before and after it."""

    def program(x: torch.Tensor, *parameters: torch.Tensor) -> tuple[torch.Tensor]:
        w = Weights(*parameters)
        for name in ["mlp", *names, "mlp", last]:
            x = x + (recurrence(name)(x) / 8 if name in SCANS else STEPS[name](x, w))
        return (torch.tanh(x),)

    weights = weights_of(torch.float64)
    x = torch.randn(2, tokens, HIDDEN, generator=torch.Generator().manual_seed(tokens), dtype=torch.float64)
    gm = trace(program, x, *weights, dynamic=dynamic)
    rewritten, report = rewrite(gm, min(mini, tokens - 1), parameter_names(gm))
    assert not any("mom" in name and "attention" not in name for name in report.left_out), report.left_out
    assert not any(node.target in RULES for node in rewritten.graph.nodes)
    assert any(module.loop.carries for _, module in loop_nodes(rewritten))
    torch.testing.assert_close(rewritten(x, *weights)[0], gm(x, *weights)[0], rtol=0, atol=1e-9)


def test_a_plan_extrapolates_eager_mode_where_it_loops_over_tokens() -> None:
    model = build(Subject("qwen3_5_text"), SMALL, torch.float32)
    planner = mom_compile.plan(model.config, seq_len=6000, dtype="float32")._planner
    assert planner._loops_over_tokens
    assert planner._eager_peak(6000) == pytest.approx(planner._counted_peak(6000), rel=0.02)


def test_the_scope_of_the_paper_leaves_recurrences_alone(eager_pieces: None) -> None:
    model, inputs = model_of("qwen3_5_text")
    with torch.no_grad():
        expected = model(**inputs).logits
        model.compile(backend="mom", options={"mini_seq_len": 48, "strict": True, "scope": "mlp"})
        close(model(**inputs).logits, expected)
