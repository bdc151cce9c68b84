"""A wrapped model is scored and explained like the model inside it, or the error gives advice."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Iterator
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
import transformers
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn
from torch.nn.parallel import DataParallel

import mom_compile
from mom_compile import padding, token_log_probs, trial
from mom_compile.arguments import takes, unwrapped
from mom_compile.weights.offload import least_budget
from tests.models import SMALL, ids, small_model

#: Tokens of a row, and of the text at its end.
TOKENS, TEXT = 40, 23


class PassesAllOn(nn.Module):
    """A user's wrapper around a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


class Drops(PassesAllOn):
    def forward(self, input_ids: Any = None, attention_mask: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]
        return self.inner(input_ids=input_ids, attention_mask=attention_mask)


class Closed(PassesAllOn):
    def forward(self, input_ids: Any, attention_mask: Any = None) -> Any:  # type: ignore[override]
        return self.inner(input_ids=input_ids, attention_mask=attention_mask)


class Derives(PassesAllOn):
    def forward(self, input_ids: Any, attention_mask: Any = None) -> Any:  # type: ignore[override]
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        return self.inner(input_ids, attention_mask=attention_mask, position_ids=positions)


class AsksForAValue(PassesAllOn):
    def forward(self, input_ids: Any, attention_mask: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]
        assert int(input_ids.sum()) > 0
        return self.inner(input_ids=input_ids, attention_mask=attention_mask, **kwargs)


def hooked(model: nn.Module) -> nn.Module:
    """Like hooks of accelerate: the instance's `forward` takes any arguments and keeps the original one."""
    model._old_forward = model.forward  # type: ignore[assignment]
    model.forward = lambda *args, **kwargs: model._old_forward(*args, **kwargs)  # type: ignore[operator]
    return model


def hooked_by_accelerate(model: nn.Module) -> nn.Module:
    return add_hook_to_module(model, ModelHook())  # type: ignore[no-any-return]


def with_a_compiled_forward(model: nn.Module) -> nn.Module:
    model.forward = torch.compile(model.forward, backend="eager")  # type: ignore[method-assign]
    return model


#: Wrappers that are recognised by signatures, and one that must be tried.
WRAPPERS = {
    "torch.compile": functools.partial(torch.compile, backend="eager"),
    "DataParallel": DataParallel,
    "both": lambda model: DataParallel(torch.compile(model, backend="eager")),
    "a compiled forward": with_a_compiled_forward,
    "hooks": hooked,
    "accelerate": hooked_by_accelerate,
}


def padded(side: str = "left") -> tuple[torch.Tensor, torch.Tensor, slice]:
    """Ids, a mask, and the positions of the text's scores."""
    batch, mask = ids(1, TOKENS, 0, SMALL.vocabulary), torch.zeros(1, TOKENS, dtype=torch.long)
    text = slice(TOKENS - TEXT, TOKENS) if side == "left" else slice(0, TEXT)
    mask[:, text] = 1
    return batch, mask, slice(text.start, text.stop - 1)


def gpt2() -> Any:
    """With learned positions, so that a wrong one changes every score."""
    return small_model("GPT2", num_hidden_layers=1)


def alone(model: nn.Module, text: torch.Tensor) -> torch.Tensor:
    """Scores in eager mode, without padding. Rows of logits before the text's belong to virtual tokens."""
    with torch.no_grad():
        logits = model(input_ids=text).logits[:, -text.shape[1] : -1]
    return logits.log_softmax(-1).gather(-1, text[:, 1:, None])[0, :, 0]


def assert_scored_as_alone(model: nn.Module, side: str = "left", expected: nn.Module | None = None) -> None:
    batch, mask, at = padded(side)
    scores = token_log_probs(model, batch, mask, strict=True, mini_seq_len=16)
    text = batch[:, at.start : at.stop + 1]
    torch.testing.assert_close(scores.log_probs[0, at], alone(expected or model, text), rtol=0, atol=2e-5)


def assert_computed_as_alone(model: nn.Module, side: str = "left", expected: nn.Module | None = None) -> None:
    """Like `assert_scored_as_alone`, with the arguments of scoring, in eager mode."""
    batch, mask, at = padded(side)
    text = batch[:, at.start : at.stop + 1]
    with torch.no_grad():
        logits = model.forward(**padding.batch_arguments(model, batch, mask)).logits[0, at].log_softmax(-1)
    scores = logits.gather(-1, text[0, 1:, None])[:, 0]
    torch.testing.assert_close(scores, alone(expected or model, text), rtol=0, atol=2e-5)


# --- which arguments a model takes ---


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=list(WRAPPERS))
def test_signatures_are_read_through_wrappers(wrap: Any) -> None:
    model = wrap(gpt2())
    assert takes(model, "position_ids") is True and takes(model, "use_cache") is True
    assert isinstance(unwrapped(model), type(gpt2()))


def test_open_signatures_give_none() -> None:
    assert takes(PassesAllOn(gpt2()), "position_ids") is None
    assert takes(Closed(gpt2()), "position_ids") is False
    assert takes(lambda input_ids, /: input_ids, "input_ids") is False
    assert takes(torch.compile(lambda ids: ids), "ids") is True
    assert takes(print, "nothing") is not True


def test_a_wrapper_of_a_compiled_model_is_not_bypassed() -> None:
    class Delegates(PassesAllOn):
        """As in peft, it finds attributes of the inner model under its own name."""

        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(self.inner, name)

    model = Delegates(torch.compile(gpt2(), backend="eager"))
    assert unwrapped(model) is model


@pytest.fixture
def one_process() -> Iterator[None]:
    """A process group of this process only."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:FSDP is switching")  # a single process has no other to share with
@pytest.mark.skipif(not dist.is_available(), reason="this PyTorch has no torch.distributed")
def test_signatures_are_read_through_distributed_wrappers(one_process: None) -> None:
    """FSDP gathers weights, so its inner module cannot be called instead."""
    fsdp = importlib.import_module("torch.distributed.fsdp")
    replicated = nn.parallel.DistributedDataParallel(gpt2())
    sharded = fsdp.FullyShardedDataParallel(gpt2(), device_id=torch.device("cpu"))
    assert takes(replicated, "position_ids") is True and unwrapped(replicated) is replicated.module
    assert takes(sharded, "position_ids") is True and unwrapped(sharded) is sharded


# --- scores ---


@pytest.mark.parametrize("wrap", [WRAPPERS["both"], PassesAllOn])
def test_a_wrapped_model_is_scored_like_the_model(wrap: Any, eager_pieces: None) -> None:
    assert_scored_as_alone(wrap(gpt2()).eval(), expected=gpt2())


@pytest.mark.parametrize("wrap", [WRAPPERS["hooks"], WRAPPERS["accelerate"], PassesAllOn, Derives])
def test_a_wrapped_model_gets_the_arguments_of_its_inner_model(wrap: Any) -> None:
    assert_computed_as_alone(wrap(gpt2()).eval(), expected=gpt2())


@pytest.mark.parametrize(
    ("wrap", "reason"),
    [
        (Drops, "Drops.forward does not pass on position_ids"),
        (Closed, "Closed.forward does not pass on position_ids"),
        (AsksForAValue, "it is unknown whether AsksForAValue.forward"),
    ],
)
def test_errors_about_positions_give_advice(wrap: Any, reason: str) -> None:
    model = wrap(gpt2()).eval()
    batch, mask, _ = padded()
    with pytest.raises(ValueError, match=rf"{reason}.*pad on the right.*model\.inner, a GPT2LMHeadModel"):
        token_log_probs(model, batch, mask)
    if wrap is Closed:  # follow the error's advice
        assert_computed_as_alone(model, "right", gpt2())
        assert_computed_as_alone(model.inner, "left", gpt2())


def test_a_wrapped_model_whose_weights_are_on_the_host() -> None:
    """Such a weight has no storage; a trial replaces it by a plain tensor."""
    model = small_model("GPT2", num_hidden_layers=3)
    mom_compile.offload_weights(model, "cpu", memory_budget=least_budget(model))
    assert any(isinstance(parameter, mom_compile.HostWeight) for parameter in model.parameters())
    batch, mask, _ = padded()
    for wrapped in (PassesAllOn(model), Derives(model)):
        given = padding.batch_arguments(wrapped.eval(), batch, mask)
        assert ("position_ids" in given) == (type(wrapped) is PassesAllOn)


def test_a_model_without_position_ids_derives_them_from_the_mask() -> None:
    """No module of BLOOM takes position_ids."""
    assert_computed_as_alone(small_model("Bloom", num_hidden_layers=1))


@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_start_at_the_models_first(side: str) -> None:
    """RoBERTa's first position follows the padding row of its table."""
    assert_computed_as_alone(small_model("Roberta", is_decoder=True, pad_token_id=1), side)


def test_a_decoder_that_does_not_take_positions_raises() -> None:
    """BART's decoder counts positions from the start of the row, regardless of the mask."""
    model = transformers.BartForCausalLM(
        transformers.BartConfig(vocab_size=SMALL.vocabulary, d_model=32, decoder_layers=1, decoder_ffn_dim=32)
    )
    batch, mask, _ = padded()
    with pytest.raises(ValueError, match=r"BartForCausalLM\.forward does not pass on position_ids: pad on the right"):
        token_log_probs(model.eval(), batch, mask)


def test_a_model_without_a_mask_argument_raises_for_padding() -> None:
    class Maskless(PassesAllOn):
        def forward(self, input_ids: Any) -> Any:  # type: ignore[override]
            return self.inner(input_ids=input_ids)

    batch, mask, _ = padded()
    with pytest.raises(ValueError, match=r"Maskless\.forward takes no attention_mask"):
        token_log_probs(Maskless(gpt2()).eval(), batch, mask)


def test_a_model_is_tried_once_per_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial does not change the model."""
    trials: list[Any] = []

    def counting(*given: Any) -> Any:
        trials.append(trial.tried(*given))
        return trials[-1]

    monkeypatch.setattr(padding, "tried", counting)
    model = PassesAllOn(gpt2()).eval()
    before = dict(model.named_parameters())
    batch, mask, _ = padded()
    for adapter, count in (("default", 1), ("default", 1), ("another", 2)):
        model.active_adapter = adapter  # type: ignore[assignment]
        assert "position_ids" in padding.batch_arguments(model, batch, mask)
        assert len(trials) == count
    assert all(before[name] is parameter for name, parameter in model.named_parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


# --- peft ---


def tuned(kind: str) -> Any:
    configs = {
        "LoRA": lambda: peft.LoraConfig(r=4, target_modules=["c_attn"], init_lora_weights=False, task_type="CAUSAL_LM"),
        "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
        "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns about transposed weights
        torch.manual_seed(1)
        return peft.get_peft_model(gpt2(), configs[kind]()).eval()


def test_tuned_parameters_have_an_effect() -> None:
    text = padded()[0]
    for kind in ("LoRA", "prefix", "prompt"):
        assert (alone(tuned(kind), text) - alone(gpt2(), text)).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["LoRA", "prefix"])
def test_a_tuned_model_gets_positions(kind: str) -> None:
    """peft shifts positions after a prefix, which is a cache."""
    assert_computed_as_alone(tuned(kind))


def test_rows_of_virtual_tokens_are_not_scored(eager_pieces: None) -> None:
    """A tuned prompt adds rows before those of the text."""
    assert_scored_as_alone(tuned("prompt"), "right")


@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")
def test_a_tuned_prompt_before_padding_raises() -> None:
    batch, mask, _ = padded()
    with pytest.raises(ValueError, match=r"PeftModelForCausalLM\.forward does not pass .*: pad on the right"):
        token_log_probs(tuned("prompt"), batch, mask)


# --- explanations and plans ---


@pytest.mark.parametrize("wrap", [WRAPPERS["both"], WRAPPERS["hooks"], PassesAllOn])
def test_a_wrapped_model_is_explained_like_the_model(wrap: Any) -> None:
    x = {"input_ids": ids(1, TOKENS), "attention_mask": torch.ones(1, TOKENS, dtype=torch.long)}
    expected = str(mom_compile.explain(gpt2(), x, logits_to_keep=1, mini_seq_len=16))
    model = wrap(gpt2())
    found = mom_compile.explain(model, **x, logits_to_keep=1, mini_seq_len=16)
    assert str(found) == expected and found[0].stages
    if wrap is not PassesAllOn:
        assert str(mom_compile.explain(model, x, logits_to_keep=1, mini_seq_len=16)) == expected
        return
    with pytest.raises(TypeError, match=r"names none of 'input_ids', 'attention_mask'.*explain\(model, \*\*mapping\)"):
        mom_compile.explain(model, x, logits_to_keep=1)


def test_a_wrapped_model_is_planned_like_the_model() -> None:
    wrapped = PassesAllOn(WRAPPERS["both"](gpt2()))
    plans = [mom_compile.plan(model, seq_len=64, device="cpu") for model in (gpt2(), wrapped)]
    assert plans[0].subject == plans[1].subject
