"""The backend as a user meets it, compiled for real on a tiny decoder."""

from __future__ import annotations

import functools
import subprocess
import sys
import traceback
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mom_compile.backend as backend_module
from benchmarks.measure import peak_bytes, watch_cpu
from mom_compile import MomWarning, reports
from mom_compile.config import parse_options
from mom_compile.rules import All, CannotChunk, Claim, Rows, chunk_rule
from mom_compile.runtime.loop import CompiledLoop
from mom_compile.runtime.program import observing
from mom_compile.torch_compat.symbolic_sizes import SymbolicSizes
from tests.models import TinyDecoder, ids

MINI = {"mini_seq_len": 8, "strict": True}



def compiled(model, **options):
    return torch.compile(model, backend="mom", options={**MINI, **options})


def assert_same(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("batch", "lengths"), [(1, (37, 61, 9, 2, 1)), pytest.param(2, (37, 61), marks=pytest.mark.slow)]
)
def test_compiled_prefill_equals_eager_for_every_length(batch, lengths):
    model = TinyDecoder().eval()
    fast = compiled(model)
    with torch.no_grad():
        for tokens in lengths:
            x = ids(batch, tokens)
            assert_same(fast(x, 1), model(x, 1))
    assert not any(report.failed for report in reports())


def test_layers_share_their_body_and_a_new_length_compiles_none():
    model = TinyDecoder(layers=4).eval()
    fast = compiled(model)
    with torch.no_grad():
        fast(ids(1, 37), 1)
        first = reports()[-1]
        fast(ids(1, 61), 1)
        second = reports()[-1]
        fast(ids(1, 75), 1)
    # The fourth layer runs on one row, between loops.
    assert len(first.stages) == 4
    assert first.bodies_shared >= 2
    assert second is not first and len(reports()) == 2
    assert second.bodies_shared >= len(second.stages)
    assert not [p for p in second.compiled_pieces if p.startswith("stage")]


def test_keys_values_and_the_residual_stream_are_all_that_lives_at_full_length():
    report = mom_report(TinyDecoder(layers=4).eval(), ids(1, 37), 1)
    per_stage = [sorted(stage.bytes_per_token) for stage in report.stages]
    residual, heads = 32 * 4, 2 * 8 * 4
    assert per_stage[:4] == [[heads, heads, residual]] * 4


def mom_report(model, *args):
    with torch.no_grad():
        compiled(model)(*args)
    return reports()[-1]


def test_float64_is_exact_to_rounding():
    model = TinyDecoder().double().eval()
    with torch.no_grad():
        x = ids(2, 37)
        expected = model(x)
        assert (compiled(model)(x) - expected).abs().max() <= 1e-10 * expected.abs().max()


def test_the_entry_point_needs_no_import():
    code = (
        "import torch, sys\n"
        "f = torch.compile(lambda x, w: torch.relu(x @ w), backend='mom', options={'mini_seq_len': 4})\n"
        "with torch.no_grad():\n"
        "    x, w = torch.randn(33, 8), torch.randn(8, 8)\n"
        "    assert torch.allclose(f(x, w), torch.relu(x @ w), atol=1e-6)\n"
        "assert 'mom_compile' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=250)


def test_a_folder_of_the_users_does_not_hide_ours(tmp_path):
    """Compiler people have folders called `passes`, and everybody has `tests`."""
    for name in ("passes", "tests", "graph", "rules"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('this is the user\'s own')")
    program = "import mom_compile, mom_passes.ops, mom_passes.program; print(mom_compile.__name__, mom_passes.__name__)"
    ran = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.stdout.split() == ["mom_compile", "mom_passes"], ran.stderr


# --- what is not for us goes to stock Inductor, with the reason ---


def test_gradients_go_to_stock_inductor_and_are_right():
    model, reference = TinyDecoder(layers=1), TinyDecoder(layers=1)
    x = ids(1, 20)
    with pytest.warns(MomWarning, match=r"torch\.no_grad\(\)"):
        compiled(model)(x).square().mean().backward()
    reference(x).square().mean().backward()
    assert_same(model.head.weight.grad, reference.head.weight.grad, 1e-4)
    assert "gradients" in reports()[0].fallback


def test_short_inputs_have_no_loops_with_the_reason():
    report = mom_report(TinyDecoder(layers=1).eval(), ids(1, 6))
    assert "6 tokens fit in one mini-sequence of 8" in report.no_loops and report.layer_pieces
    assert report.fallback is None and not report.failed


def test_short_inputs_without_attention_go_to_stock_inductor_with_the_reason():
    report = mom_report(nn.Sequential(nn.Linear(8, 32), nn.SiLU(), nn.Linear(32, 8)), torch.randn(1, 6, 8))
    assert "6 tokens fit in one mini-sequence of 8" in report.fallback and not report.layer_pieces
    assert not report.failed


def test_an_empty_batch_works():
    model = nn.Sequential(nn.Linear(8, 32), nn.SiLU(), nn.Linear(32, 8))
    with torch.no_grad():
        assert compiled(model)(torch.randn(0, 20, 8)).shape == (0, 20, 8)
    assert "empty" in reports()[-1].fallback


def test_a_graph_without_tokens_works():
    with torch.no_grad():
        x = torch.randn(20, 20) + 30 * torch.eye(20)
        assert_same(compiled(torch.linalg.inv)(x), torch.linalg.inv(x))
    assert reports()[-1].fallback == "it has no matrix product or attention"


def test_an_unknown_operator_runs_on_the_full_sequence():
    @torch.library.custom_op("mom_tests::reverse", mutates_args=())
    def reverse(x: torch.Tensor) -> torch.Tensor:
        return x.flip(1).contiguous()

    reverse.register_fake(torch.empty_like)
    inner = TinyDecoder(layers=1).eval()

    class Model(nn.Module):
        def forward(self, x):
            return inner.head(inner.layers[0](reverse(inner.layers[0](inner.embed(x)))))

    model = Model()
    with torch.no_grad():
        x = ids(2, 29)
        assert_same(compiled(model)(x), model(x))
    assert any("mom_tests.reverse" in name for name in reports()[-1].left_out)
    assert "no chunk rule" in " ".join(reports()[-1].left_out.values())


def test_an_operator_with_a_rule_of_the_users_own_runs_inside_the_loops():
    @torch.library.custom_op("mom_tests::scale_rows", mutates_args=())
    def scale_rows(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return x * scale

    scale_rows.register_fake(lambda x, scale: torch.empty_like(x))

    @chunk_rule(torch.ops.mom_tests.scale_rows.default)
    def rule(node, dim):
        if dim.index == 2:
            raise CannotChunk(node, dim, "the scale runs along it")
        return Claim((Rows(dim), All()))

    inner = TinyDecoder(layers=1).eval()

    class Model(nn.Module):
        def forward(self, x):
            return inner.head(scale_rows(inner.layers[0](inner.embed(x)), inner.norm.weight * 2))

    model = Model()
    with torch.no_grad():
        x = ids(2, 29)
        assert_same(compiled(model)(x), model(x))
    assert not reports()[-1].left_out
    assert any("mom_tests.scale_rows" in stage.operators for stage in reports()[-1].stages)


def test_scope_none_is_stock_inductor():
    model = TinyDecoder(layers=1).eval()
    with torch.no_grad():
        assert_same(compiled(model, scope="none")(ids(1, 20)), model(ids(1, 20)))
    assert "scope" in reports()[-1].fallback


# --- failures of our own ---


@pytest.fixture
def broken_pass(monkeypatch):
    def cut_stages(demands, loop_products):
        raise RuntimeError("a bug of ours")

    monkeypatch.setattr("mom_compile.pipeline.to_loops.cut_stages", cut_stages)


@pytest.mark.usefixtures("broken_pass")
def test_a_failing_pass_falls_back_with_one_warning():
    model = TinyDecoder(layers=1).eval()
    with torch.no_grad(), pytest.warns(MomWarning, match="a bug of ours") as caught:
        assert_same(compiled(model, strict=False)(ids(1, 20)), model(ids(1, 20)))
    assert len([w for w in caught if w.category is MomWarning]) == 1
    assert reports()[-1].failed and "a bug of ours" in reports()[-1].fallback


@pytest.mark.usefixtures("broken_pass")
def test_a_failing_pass_raises_under_strict():
    with torch.no_grad(), pytest.raises(Exception, match="a bug of ours"):
        compiled(TinyDecoder(layers=1).eval())(ids(1, 20))


def test_a_piece_that_inductor_cannot_compile_runs_eagerly_with_the_reason(monkeypatch):
    original = SymbolicSizes.compile
    seen = []

    def fails_once(self, gm, inputs, patches):
        seen.append(gm)
        if len(seen) == 2:
            raise RuntimeError("undeclared temporary")
        return original(self, gm, inputs, patches)

    monkeypatch.setattr(SymbolicSizes, "compile", fails_once)
    model = TinyDecoder(layers=2).eval()
    with torch.no_grad(), pytest.warns(MomWarning, match="runs eagerly: RuntimeError: undeclared temporary"):
        assert_same(compiled(model, strict=False)(ids(2, 29)), model(ids(2, 29)))
    assert list(reports()[-1].eager_pieces.values()) == ["RuntimeError: undeclared temporary"]
    assert "undeclared temporary" in str(reports()[-1])


def test_a_graph_that_stock_inductor_cannot_compile_runs_eagerly_with_a_warning(monkeypatch):
    def fails(gm, example_inputs, **kwargs):
        gm.graph.erase_node(gm.graph.output_node())  # Inductor rewrites what it compiles
        raise RuntimeError("undeclared temporary")

    patched = functools.partial(backend_module.compile_graph, stock=fails)
    monkeypatch.setattr(backend_module, "compile_graph", patched)
    model, x = nn.Sequential(nn.Linear(8, 32), nn.SiLU(), nn.Linear(32, 8)), torch.randn(2, 5, 8)
    with torch.no_grad(), pytest.warns(MomWarning, match="undeclared temporary"):
        assert_same(compiled(model)(x), model(x))
    assert reports()[-1].fallback is not None
    assert "the graph runs eagerly" in str(reports()[-1])


# --- options ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"mini_seq_length": 8},
            r"unknown option 'mini_seq_length'.*'mini_seq_len', 'scope', 'loop_products', 'kv_offload', .*'strict'",
        ),
        ({"mini_seq_len": 0}, "mini_seq_len=0 is not valid.*2"),
        ({"mini_seq_len": -5}, "mini_seq_len=-5 is not valid"),
        ({"mini_seq_len": 1}, "mini_seq_len=1 is not valid"),
        ({"mini_seq_len": 1 << 40}, "is not valid"),
        ({"mini_seq_len": 8.5}, "mini_seq_len=8.5 is not valid"),
        ({"mini_seq_len": True}, "mini_seq_len=True is not valid"),
        ({"scope": "everything"}, "scope='everything' is not valid.*'layer'"),
        ({"strict": "yes"}, "strict='yes' is not valid"),
        ({"inductor": {"max_autotun": True}}, "unknown Inductor option 'max_autotun'"),
        ({"inductor": 3}, "inductor=3 is not valid"),
        ({"kv_ofload": True}, r"unknown option 'kv_ofload' .*\(did you mean 'kv_offload'\?\)"),
        ({"Scope": "mlp"}, r"did you mean 'scope'\?"),
        ({"scope": "layers"}, r"scope='layers' is not valid \(did you mean 'layer'\?\)"),
        ({"scope": ["layer"]}, r"scope=\['layer'\] is not valid; it is one of"),
        ({"kv_offload": "Disk"}, r"kv_offload='Disk' is not valid \(did you mean 'disk'\?\)"),
        ({"inductor": {"max_autotun": True}}, r"did you mean 'max_autotune'\?"),
        ({"max_autotune": True}, r"an Inductor option: options=\{'inductor': \{'max_autotune': \.\.\.\}\}"),
        ({"something else": True}, "unknown option 'something else' for backend 'mom'; valid options"),
    ],
)
def test_a_wrong_option_is_a_value_error_that_says_what_is_valid(options, message):
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        torch.compile(TinyDecoder(layers=1), backend="mom", options=options)(ids(1, 20))


def test_the_error_of_a_wrong_option_is_short_and_ends_with_what_to_do():
    """Frames of Dynamo and its advice on reporting bugs would bury it: of ours there is the one that found it."""
    with torch.no_grad(), pytest.raises(ValueError, match="kv_ofload") as caught:
        torch.compile(TinyDecoder(layers=1), backend="mom", options={"kv_ofload": True})(ids(1, 20))
    lines = "".join(traceback.format_exception(caught.value)).splitlines()
    assert lines[-1].endswith("'inductor', 'progress'")
    assert len(lines) < 25 and not any("convert_frame" in line for line in lines)


def test_a_mode_goes_beside_options_as_inductors_own():
    """What the docstring of `Options` says to write where `torch.compile` refuses both together."""
    with pytest.raises(RuntimeError, match="mode or options"):
        torch.compile(TinyDecoder(layers=1), backend="mom", mode="max-autotune", options={"strict": True})
    inductor = torch._inductor.list_mode_options("max-autotune")
    parsed = parse_options({"strict": True, "inductor": inductor})
    assert parsed.inductor == parse_options(None, "max-autotune").inductor and parsed.inductor["max_autotune"]


def test_modes_are_those_of_inductor():
    with torch.no_grad(), pytest.raises(ValueError, match="mode='fastest' is not valid"):
        torch.compile(TinyDecoder(layers=1), backend="mom", mode="fastest")(ids(1, 20))
    gm = torch.fx.symbolic_trace(lambda x: (x + 1,))
    with pytest.raises(ValueError, match="valid options"):
        backend_module.mom(gm, [torch.ones(2)], mode="max-autotune", options={"x": 1})


def test_nothing_is_printed_and_nothing_warned(capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error", MomWarning)
        mom_report(TinyDecoder(layers=1).eval(), ids(1, 20))
    assert capsys.readouterr().out == ""


# --- rows, reductions and references ---


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_loss_holds_no_logits_and_equals_eager(reduction):
    model = TinyDecoder(layers=2).eval()

    def loss(x, labels):
        return F.cross_entropy(model(x)[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction=reduction)

    with torch.no_grad():
        fast = compiled(loss)
        for tokens in (37, 61):
            x = ids(2, tokens)
            for ignored in (0, 3, tokens):
                labels = x.clone()
                labels[:, :ignored] = -100
                torch.testing.assert_close(fast(x, labels), loss(x, labels), equal_nan=True)
    logits = 2 * 64 * 4
    for report in reports():
        # The labels' own small work needs no loop.
        assert len(report.stages) == 3
        assert all(value.bytes_per_token < logits for stage in report.stages for value in stage.live)


def test_labels_out_of_range_are_an_error_and_leave_the_function_usable():
    model = TinyDecoder(layers=1).eval()

    def loss(x, labels):
        return F.cross_entropy(model(x).flatten(0, 1), labels.flatten())

    fast = compiled(loss)
    with torch.no_grad():
        x = ids(1, 37)
        expected = loss(x, x)
        assert_same(fast(x, x), expected)
        with pytest.raises(Exception, match=r"out of bounds|index"):
            fast(x, torch.full_like(x, 64))
        assert_same(fast(x, x), expected)


def test_intermediate_outputs_the_user_keeps_stay_as_they_are():
    inner = TinyDecoder(layers=3).eval()

    def hidden_states(x):
        states = [inner.embed(x)]
        for layer in inner.layers:
            states.append(layer(states[-1]))
        return states

    with torch.no_grad():
        fast = compiled(hidden_states)
        x = ids(2, 37)
        kept = fast(x)
        copies = [state.clone() for state in kept]
        fast(ids(2, 37, seed=5))
        for state, copy, expected in zip(kept, copies, hidden_states(x), strict=True):
            assert torch.equal(state, copy)
            assert_same(state, expected)


def test_the_measured_peak_is_what_the_report_says_lives_at_full_length():
    """Keys and values of two layers and the residual stream, and little else: what one mini-sequence needs."""
    watch_cpu()
    model = TinyDecoder(layers=4).eval()
    fast = compiled(model)
    with torch.no_grad():
        for tokens in (256, 512):
            x = ids(1, tokens)
            fast(x, 1)
            peak = peak_bytes(functools.partial(fast, x, 1)).peak
            floor = tokens * reports()[-1].floor_bytes_per_token
            assert floor == tokens * (32 * 4 + 4 * 2 * 8 * 4)
            # Eight rows of everything a layer makes are less than 8 KiB; PyTorch's flash kernel has buffers of its own.
            assert floor <= peak <= floor + 96 * 1024


def test_every_full_length_value_that_is_alive_when_a_loop_ends_is_one_the_report_lists():
    stored: list[weakref.ref] = []
    alive: list[list[int]] = []

    def watch(step, results):
        if isinstance(step.run, CompiledLoop):
            stored.extend(weakref.ref(result.untyped_storage()) for result in results)
            storages = {s.data_ptr(): s.nbytes() for s in (ref() for ref in stored) if s is not None}
            alive.append(sorted(storages.values()))

    with torch.no_grad(), observing(watch):
        compiled(TinyDecoder(layers=4).eval())(ids(1, 64), 1)
    first, *others = [sorted(value.bytes for value in stage.live) for stage in reports()[-1].stages]
    residual, keys = 64 * 32 * 4, 64 * 2 * 8 * 4
    assert first == sorted([residual, keys, keys])
    assert others == [sorted([residual, keys, keys, keys, keys])] * 3
    assert alive == [first, *([first] * 3)]  # when a loop has ended, the keys it read are gone
