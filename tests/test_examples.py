"""The examples run, small, and their numbers are right: scores for a harness, a reranker, a policy's loss."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import mom_compile
from examples import beside, evaluate, grpo_loss, rerank
from examples import larger_than_the_device as larger
from examples.scored_requests import answers, padded
from mom_compile.scores import token_log_probs
from tests.models import SMALL, ids, small_model

HARNESS = importlib.util.find_spec("lm_eval") is not None


def request(number: int, context: int, continuation: int) -> tuple[str, list[int], list[int]]:
    text = ids(1, context + continuation, number, SMALL.vocabulary)[0].tolist()
    return (f"request {number}", text[:context], text[context:])


def harness_answer(model: Any, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """As the harness computes it: logits of all but the last token, those of the continuation."""
    tokens = torch.tensor([[*context, *continuation]])
    with torch.no_grad():
        logits = model(tokens[:, :-1]).logits[0, -len(continuation) :].double()
    own = torch.tensor(continuation)
    chosen = logits.log_softmax(-1).gather(-1, own[:, None]).sum()
    return float(chosen), bool((logits.argmax(-1) == own).all())


# ------------------------------------------------------------------------------------------------ the harness


@pytest.mark.parametrize("batch_size", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_requests_are_answered_as_the_harness_answers_them(batch_size: int, eager_pieces: None) -> None:
    model = small_model("Llama", num_hidden_layers=1)
    asked = [request(n, *sizes) for n, sizes in enumerate([(1, 30), (20, 1), (7, 40), (30, 2), (5, 5)])]
    # What greedy decoding says is greedy, and only that.
    asked.append(("greedy", asked[2][1], model.generate(torch.tensor([asked[2][1]]), max_new_tokens=6)[0, 7:].tolist()))
    found = list(answers(model, asked, batch_size=batch_size, longest=128))
    lengths = [len(asked[number][1]) + len(asked[number][2]) for number, _ in found]
    assert sorted(number for number, _ in found) == list(range(len(asked)))
    assert lengths == sorted(lengths, reverse=True)
    for number, (log_prob, greedy) in found:
        expected = harness_answer(model, *asked[number][1:])
        assert log_prob == pytest.approx(expected[0], abs=1e-4)
        assert greedy == expected[1] == (number == len(asked) - 1)


@pytest.mark.slow
def test_a_text_that_is_too_long_is_cut_on_the_left(eager_pieces: None) -> None:
    model = small_model("Llama")
    asked = request(0, 50, 10)
    ((_, (log_prob, _)),) = answers(model, [asked], batch_size=1, longest=40)
    assert log_prob == pytest.approx(harness_answer(model, asked[1][-31:], asked[2])[0], abs=1e-4)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (("", [], [4, 5]), "request 1 has a context of 0"),
        (("", [4, 5], []), "a continuation of 0 tokens"),
        (("", [4], [5] * 60), "continues for 60 tokens, and the model takes 40"),
    ],
)
def test_requests_that_cannot_be_answered(asked: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(answers(small_model("Llama", num_hidden_layers=1), [request(0, 3, 3), asked], batch_size=1, longest=40))


def test_padding() -> None:
    batch, mask = padded([[5, 6, 7], [8]])
    assert batch.tolist() == [[5, 6, 7], [8, 0, 0]] and mask.tolist() == [[1, 1, 1], [1, 0, 0]]


def test_the_report_of_the_harness() -> None:
    metrics = dict.fromkeys(evaluate.METRICS, 2.5)
    rows = [
        {"peak": 1000 << 20, "seconds": 10.0, "first": 9.0, "metrics": metrics, "documents": [-100.0, -50.0]},
        {"peak": 50 << 20, "seconds": 8.0, "first": 30.0, "metrics": metrics, "documents": [-100.0, -50.25]},
    ]
    exact = {"off": {"harness": 1e-4, "harness with mom": 2e-6}, "documents": [-100.5]}
    lines = "\n".join(evaluate.report(rows, exact))
    assert "0.050x" in lines and lines.count("x\n") == 1 and "at most 2.5e-01 apart" in lines and "mom 2.0e-06" in lines
    assert "log-likelihood of a document, in the same way: harness 5.0e-01" in lines


@pytest.mark.skipif(HARNESS, reason="lm-evaluation-harness is installed")
def test_without_the_harness_it_is_said_how_to_get_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main(["--documents", "1"]) == 2
    assert "pip install 'mom_compile[examples]'" in capsys.readouterr().err


@pytest.mark.skipif(not HARNESS, reason="lm-evaluation-harness is not installed")
@pytest.mark.filterwarnings("ignore")
def test_the_harness_itself(eager_pieces: None) -> None:
    """Its metrics are the same, by its own class and by ours."""
    model = small_model("Llama", max_position_embeddings=512)
    tokenizer = words_tokenizer()
    documents = evaluate.english(tokenizer, 3, 40)
    found = [
        evaluate.evaluate(evaluate.harness_model(with_mom, model, tokenizer, 2), documents)
        for with_mom in (False, True)
    ]
    assert found[0]["documents"] == pytest.approx(found[1]["documents"], abs=1e-3)
    assert found[0]["metrics"] == pytest.approx(found[1]["metrics"], rel=1e-5)
    assert any(report.stages for report in mom_compile.reports())


def words_tokenizer() -> Any:
    """Of a few words that English has, and one for all others."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = ["[PAD]", "[BOS]", "[EOS]", "[UNK]", "the", "a", "of", "is", "and", "to", "object", "in", "that", "if"]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(known)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "[PAD]", "bos_token": "[BOS]", "eos_token": "[EOS]", "unk_token": "[UNK]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


# ----------------------------------------------------------------------------------------- reranker and loss


def test_relevance_is_of_each_documents_last_token(eager_pieces: None) -> None:
    model = small_model("Qwen3")
    lengths = rerank.lengths_between(3, 20, 60)
    assert lengths == [20, 40, 60]
    batch, mask = rerank.random_documents(lengths, SMALL.vocabulary)
    chosen = torch.tensor(rerank.ANSWERS)
    compiled = torch.compile(rerank.relevance, backend="mom", options={"strict": True, "mini_seq_len": 16})
    with torch.no_grad():
        found = compiled(model, batch, mask, chosen)
        for row, length in enumerate(lengths):
            logits = model(batch[row : row + 1, :length]).logits[0, -1]
            torch.testing.assert_close(found[row], logits[1] - logits[2], rtol=0, atol=1e-5)
    (report,) = mom_compile.reports()
    # Behind the last layer's keys and values nothing is in a loop.
    assert len(report.stages) == model.config.num_hidden_layers


def test_the_term_of_grpo_is_the_plain_ways(eager_pieces: None) -> None:
    reference = small_model("Llama", num_hidden_layers=1)
    policy = grpo_loss.after_a_step(reference)
    batch, mask = grpo_loss.samples(3, 24, 30, SMALL.vocabulary)
    assert mask.sum(1).unique().numel() == 3
    advantages = torch.linspace(-1, 1, 3)
    terms = []
    with torch.no_grad():
        for log_probs in (grpo_loss.plain_log_probs, grpo_loss.mom_log_probs):
            ours, theirs = (log_probs(model, batch, mask, 30) for model in (policy, reference))
            assert ours.shape == (3, 30) and not torch.equal(ours, theirs)
            terms.append(grpo_loss.per_token_term(ours, theirs, theirs, advantages))
    torch.testing.assert_close(terms[1], terms[0], rtol=0, atol=2e-5)
    assert token_log_probs(policy, batch, mask).log_probs.shape == (3, 53)


def test_the_term_of_grpo_is_clipped() -> None:
    zero = torch.zeros(1, 1)
    for advantage, expected in ((1.0, -1.2), (-1.0, 2.0)):
        log_probs = torch.full((1, 1), 2.0).log()
        term = grpo_loss.per_token_term(log_probs, zero, log_probs, torch.tensor([advantage]))
        torch.testing.assert_close(term, torch.full((1, 1), expected))
    away = grpo_loss.per_token_term(zero, zero, torch.full((1, 1), 0.5), torch.zeros(1))
    assert away.item() == pytest.approx(grpo_loss.BETA * (torch.tensor(0.5).exp().item() - 1.5))


SMALL_RUNS = {
    rerank: ["--documents", "2", "--shortest", "20", "--longest", "600", "--layers", "1"],
    grpo_loss: ["--batch", "1", "--prompt", "20", "--completion", "8"],
}


@pytest.mark.parametrize("module", SMALL_RUNS, ids=lambda module: module.__name__)
@pytest.mark.slow
def test_an_example_runs(module: Any, monkeypatch: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From its command line, in workers of its own."""
    monkeypatch.setattr(beside, "OUTPUT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["example"])
    assert module.main(SMALL_RUNS[module]) == 0
    printed = capsys.readouterr().out
    assert "eager" in printed and "mom" in printed and "…" not in printed


@pytest.mark.parametrize("module", SMALL_RUNS, ids=lambda module: module.__name__)
def test_what_cannot_be_run_is_said(module: Any, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = {rerank: ["--shortest", "9", "--longest", "8"], grpo_loss: ["--completion", "0"]}[module]
    with pytest.raises(SystemExit):
        module.main(wrong)
    assert "at least" in capsys.readouterr().err


def test_rows_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = []
    for name, value in (("eager", 1.0), ("mom", 1.25)):
        torch.save(torch.tensor([value, 3.0]), tmp_path / name)
        rows.append({"backend": name, "peak": 100 << 20, "seconds": 2.0, "first": 1, "result": str(tmp_path / name)})
    rows[1]["peak"] = 25 << 20
    beside.add_differences(rows)
    beside.print_rows("a title", rows)
    printed = capsys.readouterr().out
    assert "25.0 MiB" in printed and "0.250x" in printed and "2.5e-01" in printed and "…" not in printed
    assert printed.count("x │") == 2, "the ratios are of peaks alone"


# ------------------------------------------------------------------------------- larger than the device


def test_a_checkpoint_of_random_weights_is_written_file_by_file(tmp_path: Path) -> None:
    import transformers

    size = 4 << 20
    larger.write_checkpoint(tmp_path, size)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert len(files) == model.config.num_hidden_layers + 1 >= 4
    assert 0.7 * size < larger.weights(model) < 1.3 * size


def test_tokens_that_differ_are_told(tmp_path: Path) -> None:
    row = {"allocated": 0, "prefill": 1.0, "per_token": 0.1, "moved": 7 << 20, "moved_per_token": 0, "weights": 9 << 20}
    rows = [{**row, "run": run, "text": [4, 5]} for run in larger.RUNS]
    spec = {"device": "cpu", "limit": 3 << 20}
    text = "\n".join(larger.report(rows, spec))
    assert "the tokens are the same" in text and "may allocate 3 MiB" in text and "7 MiB" in text
    rows[1]["text"] = [4, 6]
    assert "NOT the same" in "\n".join(larger.report(rows, spec))


@pytest.mark.slow
def test_a_model_of_3_gib_answers_in_half_of_that(capsys: pytest.CaptureFixture[str]) -> None:
    """Its process may not allocate more, and says the same as one that holds all of it."""
    assert larger.main(["--gib", "3", "--tokens", "300", "--new-tokens", "3"]) == 0
    text = capsys.readouterr().out
    assert "the tokens are the same" in text and "may allocate 1,5" in text


def test_the_standard_library_has_english_for_a_hundred_documents() -> None:
    from pydoc_data.topics import topics

    texts = list(evaluate.english_texts())
    assert len(texts) > len(topics) + 1000
    assert sum(map(len, texts)) > 1_000_000
