"""Real decoder families: prefill and decode equal eager, static and dynamic lengths, batches and padding.

The quick tests run everything but Inductor's code generation, in float64, where only rounding may differ.
The slow ones (`make sweep`) compile for real and hold float32 to the numerics contract.
"""

from __future__ import annotations

import pytest
import torch
import transformers
from torch.torch_version import TorchVersion

from benchmarks.models import keeping
from mom_compile import reports
from tests.models import FAMILIES, next_token, prompt, small_model, sweep

OPTIONS = {"mini_seq_len": 8, "strict": True}
BATCHES = {"one": (1, False), "two": (2, False), "padded": (2, True)}

#: These compute their softmax in float32 whatever the model's dtype, so float64 is exact to float32 only.
SOFTMAX_IN_FLOAT32 = {"Gemma2", "Bloom"}


def compile_for_test(model, backend="mom", **options):
    torch._dynamo.reset()
    model._compiled_call_impl = None
    model.compile(backend=backend, options={**OPTIONS, **options} if backend == "mom" else None)


def run(model, inputs, compiled, cache):
    """Logits of the whole prompt, and of one decode step after it where a cache is kept."""
    call = model if compiled else model.forward
    with torch.no_grad():
        out = call(**inputs, use_cache=cache)
        if not cache:
            return [out.logits]
        step = call(**next_token(inputs), **keeping(out.past_key_values, model), use_cache=True)
    return [out.logits, step.logits]


def kept(logits, inputs):
    """Logits of real tokens: what padding computes is nobody's business."""
    mask = inputs.get("attention_mask")
    return logits if mask is None or mask.shape[1] != logits.shape[1] else logits[mask.bool()]


#: Without a cache Hugging Face builds its masks by other code, the same for all families: one is a quick test.
#: With one, what is quick are those that differ in kind: windows, biases, norms, a float32 softmax.
QUICK = {
    ("one", False): {"Llama"},
    ("padded", True): {"Gemma3Text", "GPT2", "Bloom"},
}
CASES = [
    pytest.param(name, *case, marks=[] if name in quick else [pytest.mark.slow])
    for case, quick in QUICK.items()
    for name in FAMILIES
]


@pytest.mark.usefixtures("eager_pieces")
@pytest.mark.parametrize(("name", "batch", "cache"), CASES)
def test_a_family_is_exact_in_float64(name, batch, cache):
    model = small_model(name, torch.float64)
    compile_for_test(model)
    rows, padded = BATCHES[batch]
    # The first length is compiled as fixed, the second makes it dynamic.
    for tokens in (37, 50):
        inputs = prompt(rows, tokens, padded)
        before = len(reports())
        with torch.no_grad():
            expected = model.forward(**inputs, use_cache=cache)
            out = model(**inputs, use_cache=cache)
        report = reports()[before]
        assert report.fallback is None, report.fallback
        # Two layers are three loops. Layers with a sliding window share one.
        assert len(report.stages) >= (2 if getattr(model.config, "sliding_window", None) else 3)
        assert not [product for product in report.work_outside if "attention" not in product]
        actual, wanted = kept(out.logits, inputs), kept(expected.logits, inputs)
        bound = 1e-6 if name in SOFTMAX_IN_FLOAT32 else 1e-10
        # Bloom itself gives NaN for a padded sequence in float64: then so must we, and nowhere else.
        scale = float(wanted.nan_to_num().abs().max())
        torch.testing.assert_close(actual, wanted, rtol=0, atol=bound * scale, equal_nan=True)


@pytest.mark.usefixtures("eager_pieces")
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        pytest.param("Llama", {}, marks=pytest.mark.slow),
        ("Gemma3Text", {}),
    ],
)
def test_a_static_cache_is_filled_as_eager_fills_it(name, changes):
    """Its keys and values are graph inputs that the graph writes to: in their place, after everybody has read them."""
    model = small_model(name, torch.float64, **changes)
    compile_for_test(model)
    for tokens in (37, 45):
        inputs = prompt(2, tokens, padded=True)
        caches, logits = [], []
        for call in (model.forward, model):
            caches.append(transformers.StaticCache(config=model.config, max_cache_len=80))
            with torch.no_grad():
                kept = keeping(caches[-1], model)
                logits.append(call(**inputs, **kept, use_cache=True, logits_to_keep=1).logits)
        torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=1e-12)
        for ours, eager in zip(caches[1].layers, caches[0].layers, strict=True):
            torch.testing.assert_close(ours.keys, eager.keys, rtol=0, atol=1e-12)
            torch.testing.assert_close(ours.values, eager.values, rtol=0, atol=1e-12)
    assert [report.fallback for report in reports()] == [None, None]


@pytest.mark.usefixtures("eager_pieces")
@pytest.mark.parametrize("name", sweep(["Llama", "Gemma2", "GPT2"], quick={"GPT2"}))
def test_a_loss_of_hugging_face_is_right_and_holds_no_logits(name):
    """With labels to ignore; the loss is computed from float32 logits, whatever the model's dtype."""
    model = small_model(name, torch.float64)
    model.loss_type = "ForCausalLM"  # unset, Hugging Face warns, which breaks the graph in two

    def loss(input_ids, labels):
        return model(input_ids=input_ids, labels=labels, use_cache=False).loss

    compiled = torch.compile(loss, backend="mom", options=OPTIONS)
    for tokens in (37, 50):
        inputs = prompt(2, tokens)["input_ids"]
        labels = inputs.clone()
        labels[0, :11] = -100
        with torch.no_grad():
            torch.testing.assert_close(compiled(inputs, labels), loss(inputs, labels), rtol=1e-5, atol=1e-6)
        report = reports()[-1]
        assert report.stages[-1].folds
        logits = 2 * 320 * 4
        assert all(value.bytes_per_token < logits for stage in report.stages for value in stage.live)


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "cache"), [("one", False), ("two", True), ("padded", True)])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_keeps_the_numerics_contract_in_float32(name, batch, cache):
    """No further from float64 than 1.5 times stock Inductor's own distance."""
    model, exact = (small_model(name, dtype, num_hidden_layers=3) for dtype in (torch.float32, torch.float64))
    rows, padded = BATCHES[batch]
    lengths = (37, 50, 45)
    results = {}
    for backend in ("inductor", "mom"):
        compile_for_test(model, backend)
        results[backend] = [run(model, prompt(rows, tokens, padded), True, cache) for tokens in lengths]
    alone = padded and name in SOFTMAX_IN_FLOAT32
    for tokens, stock, ours in zip(lengths, results["inductor"], results["mom"], strict=True):
        inputs = prompt(rows, tokens, padded)
        references = run_alone(exact, inputs, cache) if alone else run(exact, inputs, False, cache)
        for reference, a, b in zip(references, stock, ours, strict=True):
            assert kept(reference, inputs).isfinite().all()
            assert distance(b, reference, inputs) <= 1.5 * distance(a, reference, inputs) + 1e-9


def run_alone(exact, inputs, cache):
    """The same, each sequence by itself and without its padding.

    In float64 these families' masks overflow in their float32 softmax: a padded batch is NaN in the original itself.
    Their positions are relative, so that padding changes nothing for real tokens.
    """
    mask = inputs["attention_mask"]
    padded = [torch.zeros(*mask.shape, exact.config.vocab_size, dtype=torch.float64)]
    steps = []
    for i, real in enumerate(mask.bool()):
        sequence = {"input_ids": inputs["input_ids"][i : i + 1, real]}
        with torch.no_grad():
            out = exact(**sequence, use_cache=cache)
            padded[0][i, real] = out.logits[0]
            if cache:
                token = next_token(inputs)["input_ids"][i : i + 1]
                kept = keeping(out.past_key_values, exact)
                steps.append(exact(input_ids=token, **kept, use_cache=True).logits)
    return padded + ([torch.cat(steps)] if cache else [])


def distance(logits, reference, inputs):
    return float((kept(logits.double(), inputs) - kept(reference, inputs)).norm())


#: What stock Inductor 2.11 writes for a decode step on the CPU is no C++; the step then runs eagerly, with a warning.
STEPS_RUN_EAGERLY = TorchVersion(torch.__version__) < (2, 12)


@pytest.mark.filterwarnings(*["ignore:Inductor could not compile a graph"] * STEPS_RUN_EAGERLY)
@pytest.mark.parametrize("name", sweep(["Llama", "Gemma3Text", "GPT2"], quick=()))
def test_a_compiled_family_generates_what_eager_generates(name):
    model = small_model(name, num_hidden_layers=3)
    inputs = prompt(2, 37, padded=True)
    settings = {"max_new_tokens": 6, "do_sample": False}
    expected = model.generate(**inputs, **settings)
    compile_for_test(model)
    assert torch.equal(model.generate(**inputs, **settings), expected)
    assert reports()[0].stages
