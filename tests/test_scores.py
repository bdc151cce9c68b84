"""`token_log_probs`: each token's log-probability without logits, for any batch, padding and model."""

from __future__ import annotations

import functools
import gc
import weakref
from typing import Any

import pytest
import torch

import mom_compile
from mom_compile import TokenScores, backend, token_log_probs
from mom_compile.scores import _COMPILED
from tests.models import SMALL, TinyDecoder, ids, small_model, sweep

OPTIONS = {"strict": True, "mini_seq_len": 16}

pytestmark = pytest.mark.shared_graphs


@functools.cache
def shared_model() -> Any:
    """A Llama whose graphs tests share: with a mask and without, with entropies and without."""
    return small_model("Llama")


def text(batch: int, tokens: int, seed: int = 0) -> torch.Tensor:
    return ids(batch, tokens, seed, SMALL.vocabulary)


def wanted(model: Any, sequence: torch.Tensor, labels: torch.Tensor | None = None) -> TokenScores:
    """Scores of one sequence without padding, in float64 from eager mode's logits."""
    with torch.no_grad():
        logits = model.forward(input_ids=sequence[None]).logits[0, :-1].double()
    targets = (sequence if labels is None else labels)[1:]
    log_all = logits.log_softmax(-1)
    log_probs = log_all.gather(-1, targets[:, None])[:, 0]
    return TokenScores(log_probs, logits.argmax(-1) == targets, -(log_all.exp() * log_all).sum(-1))


def assert_scores(actual: TokenScores, row: int, at: slice, expected: TokenScores) -> None:
    torch.testing.assert_close(actual.log_probs[row, at].double(), expected.log_probs, rtol=0, atol=2e-5)
    assert torch.equal(actual.greedy[row, at], expected.greedy)
    if actual.entropy is not None:
        assert expected.entropy is not None
        torch.testing.assert_close(actual.entropy[row, at].double(), expected.entropy, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", sweep(["Llama", "GPT2", "Gemma3Text"], quick=["Llama"]))
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_sequences_are_scored_as_if_alone(family: str, side: str, eager_pieces: None) -> None:
    model = shared_model() if family == "Llama" else small_model(family)
    lengths = (60, 41, 2)
    batch, mask = torch.zeros(3, 60, dtype=torch.long), torch.zeros(3, 60, dtype=torch.long)
    for row, n in enumerate(lengths):
        at = slice(60 - n, 60) if side == "left" else slice(0, n)
        batch[row, at], mask[row, at] = text(1, n, row)[0], 1
    scores = token_log_probs(model, batch, mask, entropy=True, options=OPTIONS)
    assert scores.log_probs.shape == scores.greedy.shape == (3, 59) and scores.log_probs.dtype == torch.float32
    for row, n in enumerate(lengths):
        at = slice(60 - n, 59) if side == "left" else slice(0, n - 1)
        assert_scores(scores, row, at, wanted(model, batch[row][mask[row].bool()]))
        rest = torch.ones(59, dtype=torch.bool)
        rest[at] = False
        assert scores.entropy is not None
        for values in (scores.log_probs, scores.greedy, scores.entropy):
            assert not values[row][rest].any()
    assert all(report.stages and not report.left_out for report in mom_compile.reports())


def test_a_sequence_of_padding_only(eager_pieces: None) -> None:
    """It has no scores and does not affect the others."""
    model = shared_model()
    sequence, mask = text(2, 50), torch.ones(2, 50, dtype=torch.long)
    mask[0] = 0
    scores = token_log_probs(model, sequence, mask, entropy=True, options=OPTIONS)
    assert_scores(scores, 1, slice(None), wanted(model, sequence[1]))
    assert scores.entropy is not None
    for values in (scores.log_probs, scores.greedy, scores.entropy):
        assert not values[0].any()


def test_one_compilation_for_all_lengths(eager_pieces: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """One trace, too: compiled for all sizes, Dynamo would first take a model's floats as inputs, and then start again.
    And the graph has no logits at full length."""
    seen: list[int] = []
    capture = backend.capture

    def counting(gm: torch.fx.GraphModule, *given: Any, **named: Any) -> Any:
        seen.append(len(gm.graph.nodes))
        return capture(gm, *given, **named)

    monkeypatch.setattr(backend, "capture", counting)
    torch._dynamo.reset()
    model = shared_model()
    for tokens in (50, 33, 64, 90):
        sequence = text(2, tokens, tokens)
        scores = token_log_probs(model, sequence, options=OPTIONS)
        for row in range(2):
            assert_scores(scores, row, slice(None), wanted(model, sequence[row]))
    (report,) = mom_compile.reports()
    assert report.stages and not report.left_out and len(seen) == 1
    shapes = [stored.type.shape for stage in report.stages for stored in stage.crossing]
    assert shapes and not any(shape[-1] == SMALL.vocabulary for shape in shapes)


def test_custom_labels(eager_pieces: None) -> None:
    """Scored instead of the tokens, -100 for none; some of them as in Hugging Face's losses."""
    model = shared_model()
    sequence, labels = text(1, 40), text(1, 40, 7)
    labels[0, 5:9] = -100
    scores = token_log_probs(model, sequence, labels=labels, options=OPTIONS)
    with torch.no_grad():
        loss = model(input_ids=sequence, labels=labels).loss
    seen = labels[:, 1:] != -100
    torch.testing.assert_close(-scores.log_probs[seen].mean(), loss)
    assert not scores.log_probs[~seen].any() and not scores.greedy[~seen].any()


def test_compiled_code_and_half_precision() -> None:
    """Through Inductor; scores are computed in float32 from logits in bfloat16."""
    torch._dynamo.reset()
    model = small_model("Llama", torch.bfloat16)
    sequence = text(1, 70)
    scores = token_log_probs(model, sequence, entropy=True, options=OPTIONS)
    exact = wanted(small_model("Llama", torch.float64), sequence[0])
    off = (scores.log_probs[0].double() - exact.log_probs).abs().max()
    eagerly = (wanted(model, sequence[0]).log_probs - exact.log_probs).abs().max()
    assert off <= 2 * eagerly
    assert mom_compile.reports()[0].stages and not mom_compile.reports()[0].eager_pieces


def test_scoring_does_not_affect_a_compiled_model(eager_pieces: None, stock_is_eager: None) -> None:
    model = small_model("Llama", num_hidden_layers=1)
    model.compile(backend="mom", options=OPTIONS)
    sequence = text(2, 50)
    with torch.no_grad():
        before = model(sequence).logits
        scores = token_log_probs(model, sequence, options=OPTIONS)
        assert torch.equal(model(sequence).logits, before)
    assert_scores(scores, 1, slice(None), wanted(model, sequence[1]))


@pytest.mark.slow
def test_many_models_do_not_share_a_recompile_limit(eager_pieces: None) -> None:
    """Dynamo limits the compilations of a function; deleted models are not kept alive."""
    torch._dynamo.reset()
    gone = []
    for seed in range(12):
        model = small_model("Llama", num_hidden_layers=1, seed=seed)
        sequence = text(1, 40, seed)
        assert_scores(token_log_probs(model, sequence, options=OPTIONS), 0, slice(None), wanted(model, sequence[0]))
        gone.append(weakref.ref(model))
    reports = mom_compile.reports()
    assert len(reports) == 12 and all(report.stages for report in reports)
    del model
    gc.collect()
    torch._dynamo.reset()
    gc.collect()
    assert not any(reference() is not None for reference in gone)
    assert not _COMPILED


def test_a_plain_module_that_returns_logits(eager_pieces: None) -> None:
    class Plain(TinyDecoder):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return super().forward(input_ids)

    model = Plain().eval()
    sequence = ids(1, 40)
    scores = token_log_probs(model, sequence, options=OPTIONS)
    with torch.no_grad():
        expected = model(sequence)[0, :-1].log_softmax(-1).gather(-1, sequence[0, 1:, None])[:, 0]
    torch.testing.assert_close(scores.log_probs[0], expected, rtol=0, atol=2e-5)


def test_spans() -> None:
    scores = TokenScores(torch.tensor([[-1.0, -2.0, -4.0], [-8.0, 0.0, 0.0]]), torch.tensor([[True, True, False]] * 2))
    assert scores.sums([(1, 3), (1, 2)]).tolist() == [-3.0, -8.0]
    assert scores.all_greedy([(1, 3), (2, 4)]).tolist() == [True, False]
    for spans, message in (
        ([(1, 2)], "got 1 spans for 2 sequences"),
        ([(0, 2), (1, 2)], "the first scored token is token 1"),
        ([(1, 5), (1, 2)], "invalid for a text of 4 tokens"),
        ([(2, 2), (1, 2)], "2 to 2"),
    ):
        with pytest.raises(ValueError, match=message):
            scores.sums(spans)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"input_ids": torch.zeros(1, 1, dtype=torch.long)}, "two or more tokens"),
        ({"input_ids": torch.zeros(0, 9, dtype=torch.long)}, "two or more tokens"),
        ({"input_ids": torch.zeros(2, 0, dtype=torch.long)}, "two or more tokens"),
        ({"input_ids": [[1, 2, 3]]}, "expected a tensor of integers, .* got a list"),
        ({"input_ids": torch.zeros(9, dtype=torch.long)}, "expected integers"),
        ({"input_ids": torch.zeros(1, 9)}, "expected integers"),
        ({"input_ids": text(1, 9), "attention_mask": torch.ones(1, 8)}, r"attention_mask has shape \[1, 8\]"),
        ({"input_ids": text(1, 9), "labels": text(2, 9)}, r"labels has shape \[2, 9\]"),
        ({"input_ids": text(1, 9), "labels": text(1, 9) + 400}, "not in the vocabulary of 320"),
        ({"input_ids": text(1, 9), "labels": torch.full((1, 9), -7)}, "labels contain -7, which is not"),
        ({"input_ids": text(1, 9), "attention_mask": torch.ones(9)}, r"attention_mask has shape \[9\]"),
        ({"input_ids": text(1, 9) - 400}, "not in the vocabulary"),
    ],
)
def test_invalid_inputs_raise(given: dict[str, Any], message: str) -> None:
    model = small_model("Llama", num_hidden_layers=1)
    with pytest.raises(ValueError, match=message):
        token_log_probs(model, **given)


def test_an_invalid_option_raises_before_tracing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda *given, **named: pytest.fail("it was traced"))
    with pytest.raises(ValueError, match="did you mean 'scope'"):
        token_log_probs(small_model("Llama"), text(1, 9), options={"scop": "mlp"})


def test_models_in_training_or_without_logits_raise() -> None:
    model = small_model("Llama", num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"model\.eval"):
        token_log_probs(model.train(), text(1, 9))
    with pytest.raises(ValueError, match="LlamaModel returns no logits"):
        token_log_probs(model.eval().model, text(1, 9))


@pytest.mark.parametrize("kind", [tuple, dict])
def test_a_model_with_another_result_raises(kind: type, eager_pieces: None) -> None:
    class Hidden(TinyDecoder):
        def forward(self, input_ids: torch.Tensor) -> Any:  # type: ignore[override]
            hidden = super().forward(input_ids)
            return (hidden,) if kind is tuple else {"hidden": hidden}

    with pytest.raises(ValueError, match=f"returned a {kind.__name__} without logits"):
        token_log_probs(Hidden().eval(), ids(1, 40), options=OPTIONS)


def test_a_large_vocabulary_does_not_bias_scores() -> None:
    """In float32, a sum of this many terms has a biased error of 2e-5 or more."""

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(64, 16)
            self.head = torch.nn.Linear(16, 262_144, bias=False)
            self.head.weight.data.normal_(0, 0.75)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.table(input_ids))

    torch.manual_seed(0)
    torch._dynamo.reset()
    model, sequence = Logits().eval(), ids(1, 40, 0, 64)
    scores = token_log_probs(model, sequence)
    with torch.no_grad():
        exact = model(sequence)[0, :-1].double().log_softmax(-1).gather(-1, sequence[0, 1:, None])[:, 0]
    assert (scores.log_probs[0] - exact).abs().max() < 4e-6
