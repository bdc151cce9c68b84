"""Messages while a model compiles: one line per graph in the log, and a warning for each request not honoured."""

from __future__ import annotations

import logging
import threading
import warnings

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from transformers import StaticCache

import mom_compile.notices as notices
from benchmarks.models import keeping
from mom_compile import MomWarning, reports
from mom_compile.report.units import in_units
from tests.models import TinyDecoder, ids, prompt, small_model

pytestmark = pytest.mark.usefixtures("eager_pieces")


@pytest.fixture
def lines(caplog, stock_is_eager):
    """Lines of the log at level INFO; stock Inductor compiles nothing."""
    caplog.set_level(logging.INFO, logger="mom_compile")
    return lambda: [record.getMessage() for record in caplog.records if record.name.startswith("mom_compile")]


def compiled(model, **options):
    model.compile(backend="mom", options={"mini_seq_len": 16, "strict": True, **options})
    return model


def decode(model, steps=2, tokens=41, **more):
    settings = {"max_new_tokens": 1 + steps, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    return model.generate(**prompt(1, tokens), **settings, **more)


def only_ours(caught):
    """The number of our warnings: `pytest.warns` also records ignored ones."""
    return sum(warning.category is MomWarning for warning in caught)


# --- hooks of accelerate ---


@pytest.mark.usefixtures("stock_is_eager")
def test_a_model_with_hooks_on_every_module_warns_once() -> None:
    model = compiled(cpu_offload(TinyDecoder(layers=1).eval(), execution_device="cpu"))
    with torch.no_grad(), pytest.warns(MomWarning, match="load_offloaded.*remove_hook_from_module") as caught:
        model(ids(1, 41))
    assert len(reports()) > 3
    assert only_ours(caught) == 1


@pytest.mark.usefixtures("stock_is_eager")
def test_one_hook_with_later_breaks_does_not_warn() -> None:
    """Dynamo continues within the hook after each break, but compiles no inner module separately."""

    class Broken(TinyDecoder):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            first = super().forward(tokens)
            torch._dynamo.graph_break()
            second = super().forward(tokens)
            torch._dynamo.graph_break()
            return super().forward(tokens) + first + second

    model = add_hook_to_module(Broken(layers=1).eval(), AlignDevicesHook(execution_device="cpu", io_same_device=True))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", MomWarning)
        compiled(model)(ids(1, 41))
    assert len(reports()) >= 3


# --- freezing ---


@pytest.mark.parametrize("how", ["option", "configuration"])
def test_freezing_is_skipped_with_a_warning(how: str) -> None:
    """Freezing makes weights constants, whose values a graph would not have."""
    as_option = {"inductor": {"freezing": True}} if how == "option" else {}
    model = compiled(TinyDecoder(layers=1).eval(), **as_option)
    configured = torch._inductor.config.patch(freezing=how == "configuration")
    with configured, torch.no_grad(), pytest.warns(MomWarning, match="without Inductor's freezing") as caught:
        found = [model(ids(1, tokens)) for tokens in (41, 50)]
    assert only_ours(caught) == 1
    for logits, tokens in zip(found, (41, 50), strict=True):
        torch.testing.assert_close(logits, model.forward(ids(1, tokens)), rtol=1e-4, atol=1e-4)
    assert len(reports()) == 2 and all(report.stages for report in reports())


# --- the log ---


def test_each_graph_is_one_line_in_the_log(lines):
    decode(compiled(small_model("Llama")))
    prefill, *steps = lines()
    report, *counted = reports()
    assert prefill == f"prefill, {len(report.stages)} loops, expected peak {in_units(report.expected_peak_bytes)}"
    assert len(steps) == len(counted) > 0
    for line, step in zip(steps, counted, strict=True):
        peak = in_units(step.expected_peak_bytes)
        assert line == f"decode step: one token, nothing to cut; in 3 pieces by layers, expected peak {peak}"


def test_a_step_with_eager_attention_is_logged_as_a_decode_step(lines):
    model = small_model("Llama")
    model.set_attn_implementation("eager")
    decode(compiled(model), steps=1)
    (line,) = lines()[1:]
    assert line.startswith("decode step: one token, nothing to cut; in 3 pieces by layers, expected peak ")


def test_a_prompt_too_short_to_cut_is_logged(lines):
    with torch.no_grad():
        compiled(TinyDecoder(layers=1).eval())(ids(1, 12))
    (line,) = lines()
    assert line.startswith("its 12 tokens fit in one mini-sequence of 16; in 2 pieces by layers, expected peak ")


def test_the_log_shows_what_is_offloaded(lines):
    decode(compiled(small_model("Llama"), kv_offload=True), steps=1)
    prefill, step = lines()
    assert "loops, rows of 4 keys and values to the host, expected peak" in prefill
    assert step.startswith("decode step: one token, nothing to cut; new rows of 4 keys and values to the host, ")


# --- gradients ---


@pytest.mark.slow
def test_a_call_with_gradients_warns_once_with_advice(lines):
    def train():
        model = compiled(TinyDecoder(layers=1))
        for tokens in (20, 25):
            model(ids(1, tokens)).sum().backward()
        compiled(TinyDecoder(layers=2))(ids(1, 20))

    with pytest.warns(MomWarning, match=r"is for inference.*torch\.no_grad\(\) or torch\.inference_mode\(\)") as caught:
        train()
    assert only_ours(caught) == 1
    assert set(lines()) == {
        "stock Inductor: the graph needs gradients (call it under torch.no_grad() or torch.inference_mode())"
    }


def test_requested_stock_inductor_does_not_warn(lines):
    compiled(TinyDecoder(layers=1), scope="none")(ids(1, 20))
    assert lines() == ["stock Inductor: scope='none' asks for stock Inductor"]


# --- keys and values that stay despite kv_offload ---


def static(model, *lengths):
    for tokens in lengths or (41,):
        cache = StaticCache(config=model.config, max_cache_len=64)
        with torch.no_grad():
            model(**prompt(1, tokens), **keeping(cache, model), use_cache=True)


def test_a_static_cache_warns_once_with_the_reason(lines):
    model = compiled(small_model("Llama", num_hidden_layers=1), kv_offload=True)
    asked = r"kv_offload=True is not honoured for \d+ keys or values, which stay on the device: .*static cache.*\("
    with pytest.warns(MomWarning, match=asked) as caught:
        static(model, 41, 1)
    assert only_ours(caught) == 1
    assert all(report.on_device for report in reports())


def test_after_a_reset_warnings_are_repeated(lines):
    for _ in range(2):
        torch._dynamo.reset()
        with pytest.warns(MomWarning, match="static cache"):
            static(compiled(small_model("Llama", num_hidden_layers=1), kv_offload=True))


@pytest.mark.parametrize("option", ["auto", False])
def test_options_that_were_not_given_do_not_warn(lines, option):
    static(compiled(small_model("Llama", num_hidden_layers=1), kv_offload=option))
    assert reports()[0].stages


def test_kv_offload_disabled_by_another_option_warns(lines):
    model = compiled(small_model("Llama", num_hidden_layers=1), kv_offload=True, scope="none", strict=False)
    with pytest.warns(MomWarning, match=r"kv_offload=True is not honoured: scope='none' asks for stock Inductor"):
        decode(model, steps=0)


def test_a_warning_counts_values_with_one_reason_and_names_some():
    with pytest.warns(MomWarning, match="kv_offload='disk' is not honoured for ") as caught:
        notices.warn_of_device_kv("disk", {**{f"k{i}": "why" for i in range(9)}, "other": "because"})
    assert [str(warning.message).partition(" for ")[2] for warning in caught] == [
        "9 keys or values, which stay on the device: why (k0, k1, k2, k3, ...)",
        "1 keys or values, which stay on the device: because (other)",
    ]


def test_a_warning_raised_as_an_error_is_repeated():
    warnings.simplefilter("error", MomWarning)
    for _ in range(2):
        with pytest.raises(MomWarning, match="twice"):
            notices.warn_once("twice", "twice")


# --- locations of warnings ---


def test_a_warning_points_at_the_users_line(lines):
    """Not at a line of PyTorch, transformers or mom_compile, whose frames are in between."""
    model, x = compiled(small_model("Llama", num_hidden_layers=1), kv_offload=True), prompt(1, 40)
    cache = StaticCache(model.config, max_cache_len=64)
    with torch.no_grad(), pytest.warns(MomWarning, match="not honoured") as caught:
        model(**x, past_key_values=cache)
    call = test_a_warning_points_at_the_users_line.__code__.co_firstlineno + 5
    ours = [(warning.filename, warning.lineno) for warning in caught if warning.category is MomWarning]
    assert set(ours) == {(__file__, call)}


def test_a_warning_from_generate_points_at_its_call(lines):
    model = compiled(small_model("Llama", num_hidden_layers=1), kv_offload=True)
    settings = {"max_new_tokens": 2, "pad_token_id": 0, "eos_token_id": None, "cache_implementation": "static"}
    with pytest.warns(MomWarning, match="not honoured") as caught:
        model.generate(**prompt(1, 41), **settings, disable_compile=True)
    call = test_a_warning_from_generate_points_at_its_call.__code__.co_firstlineno + 4
    ours = [(warning.filename, warning.lineno) for warning in caught if warning.category is MomWarning]
    assert set(ours) == {(__file__, call)}


def test_a_warning_in_a_library_thread_is_shown():
    """The stack has no frame of the user."""

    def in_a_thread():
        thread = threading.Thread(target=notices.warn_once, args=("in a thread", "in a thread"))
        thread.start()
        thread.join()

    with pytest.warns(MomWarning, match="in a thread"):
        in_a_thread()
