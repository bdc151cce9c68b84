"""Models of many kinds compute the same with weights on the host, from memory and from a checkpoint."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mom_compile
from mom_compile import HostWeight, host_memory, load_offloaded, offload_weights, token_log_probs
from tests.models import ids, small_model, tiny
from tests.weights import CPU, bytes_arrived, compiled, decoder, least, offloaded, on_host, parts_of_one

pytestmark = [
    pytest.mark.usefixtures("eager_pieces", "stock_is_eager"),
    pytest.mark.filterwarnings("ignore:weights that are stored on the host are copied"),
]


# --- weights with readers other than a linear layer ---


class Fused(nn.Module):
    """One weight of which slices are read (`weight[a:b]`), and one that is read both plain and transposed."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.ParameterDict({
            "qkv": nn.Parameter(torch.randn(192, 64) * 0.1), "both": nn.Parameter(torch.randn(64, 64) * 0.1),
            "rest": nn.Parameter(torch.randn(4, 64, 64) * 0.1),
        }) for _ in range(3))  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            q, k = (F.linear(x, layer["qkv"][at : at + 64]) for at in (0, 64))
            v = x @ layer["qkv"][128:].T
            heads = [part.unflatten(-1, (4, 16)).transpose(1, 2) for part in (q, k, v)]
            seen = F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2)
            x = x + torch.tanh(seen @ layer["both"]) @ layer["both"].T
            first, second, *_ = layer["rest"].unbind(0)
            x = x + (x @ first) * (x @ second.t()) + x @ layer["rest"].sum(0)
        return x


def test_slices_of_a_weight_and_a_transposed_weight() -> None:
    x = torch.randn(1, 150, 64, generator=torch.Generator().manual_seed(1)).double()
    plain, model = Fused().double(), offloaded(Fused().double())
    with torch.no_grad():
        expected = plain(x)
        assert torch.equal(model(x), expected)
        torch.testing.assert_close(compiled(model)(x), expected, rtol=0, atol=1e-10)
    once = sum(value.nbytes for value in model.parameters())
    assert bytes_arrived(lambda: model(x)) == once


def test_weights_that_share_one_storage() -> None:
    x = ids(1, 150)
    with torch.no_grad():
        torch.testing.assert_close(compiled(offloaded(parts_of_one()))(x), parts_of_one()(x), rtol=0, atol=1e-5)


# --- quantised ---


class Int8(torch.Tensor):
    """A weight of int8 codes and a scale for each row, like those of torchao, with `__tensor_flatten__`."""

    codes: torch.Tensor
    scale: torch.Tensor

    @staticmethod
    def __new__(cls, codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> Int8:
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=dtype, device=codes.device)  # type: ignore[attr-defined, no-any-return]

    def __init__(self, codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> None:
        self.codes, self.scale = codes, scale

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Int8({list(self.shape)})"

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["codes", "scale"], self.dtype

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], dtype: Any, size: Any, stride: Any) -> Int8:
        return Int8(inner["codes"], inner["scale"], dtype)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        if func in (aten.detach.default, aten.clone.default, aten.alias.default):
            return Int8(func(args[0].codes), func(args[0].scale), args[0].dtype)
        if func is aten.copy_.default:
            args[0].codes.copy_(args[1].codes)
            args[0].scale.copy_(args[1].scale)
            return args[0]
        if func is aten.t.default:
            # Rows are columns: the scale is one of columns, as what multiplies with it expects.
            return Int8(func(args[0].codes), args[0].scale, args[0].dtype)
        if func is aten.mm.default:
            return (args[0] @ args[1].codes.to(args[0].dtype)) * args[1].scale
        raise NotImplementedError(func)


def quantised(model: Any) -> Any:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            weight = module.weight.data
            scale = weight.abs().amax(1) / 127
            codes = (weight / scale[:, None]).round().to(torch.int8)
            module.weight = nn.Parameter(Int8(codes, scale, weight.dtype), requires_grad=False)
    return model


def test_the_inner_tensors_of_a_quantised_weight_are_on_the_host() -> None:
    x = ids(1, 150)
    plain, model = quantised(decoder()), quantised(decoder())
    codes = sum(value.codes.nbytes for value in model.layers.parameters() if isinstance(value, Int8))
    made = offload_weights(model, CPU, memory_budget=least(model))
    weight = model.layers[0].up.weight
    assert isinstance(weight, Int8)
    assert isinstance(weight, nn.Parameter)
    assert type(weight.codes) is HostWeight
    # Counted at its stored size, and little of it stays on the device.
    assert codes <= made.on_host < 1.3 * codes
    with torch.no_grad():
        expected = plain(x)
        assert torch.equal(model(x), expected)
        torch.testing.assert_close(compiled(model)(x), expected, rtol=0, atol=1e-5)
        assert codes <= bytes_arrived(lambda: model(x)) < 2 * codes

    state = model.state_dict()
    assert type(state["layers.0.up.weight"].codes) is torch.Tensor
    copied = copy.deepcopy(state)
    with torch.no_grad():
        copied["layers.0.up.weight"].codes.zero_()
        plain.layers[0].up.weight.codes.zero_()
        for how in ({}, {"assign": True}):
            model.load_state_dict(copied, **how)
            assert type(model.layers[0].up.weight.codes) is HostWeight
            torch.testing.assert_close(model(x), plain(x), rtol=0, atol=1e-5)


# --- models of Hugging Face ---


def text(model: Any, x: torch.Tensor, tokens: int = 4) -> torch.Tensor:
    with torch.no_grad():
        return model.generate(x, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)


@pytest.mark.parametrize(
    "family",
    ["GPT2", *(pytest.param(name, marks=pytest.mark.slow)
               for name in ("Llama", "GPTNeoX", "Phi", "Gemma3Text", "Bamba", "Mixtral", "Qwen3Moe", "T5", "Bart"))],
)  # fmt: skip
def test_generated_tokens_are_equal(family: str) -> None:
    """Uncompiled and compiled, prefill and decode steps."""
    x = ids(1, 70)
    model = small_model(family, num_hidden_layers=3) if family == "Bamba" else tiny(family)
    expected = text(model, x)
    offloaded(model)
    assert torch.equal(text(model, x), expected)
    model.compile(backend="mom", options={"mini_seq_len": 64})
    assert torch.equal(text(model, x), expected)
    assert not any(report.failed for report in mom_compile.reports())


def test_scores_are_equal() -> None:
    x = ids(2, 70)
    model = tiny("Llama", tie_word_embeddings=True)
    with torch.no_grad():
        logits = model(x).logits[:, :-1]
    expected = logits.log_softmax(-1).gather(-1, x[:, 1:, None])[..., 0]
    got = token_log_probs(offloaded(model), x, options={"mini_seq_len": 64, "strict": True}).log_probs
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


# --- a checkpoint ---


def saved(folder: Path, family: str = "Llama", dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    model = small_model(family, dtype, num_hidden_layers=3, **settings)
    model.generation_config.max_length = 77
    model.save_pretrained(folder, max_shard_size="50KB")
    return type(model).from_pretrained(folder, dtype="auto").eval()


def half(model: nn.Module) -> int:
    """A budget that leaves some layers on the host."""
    return int(0.95 * sum(value.nbytes for value in model.parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_a_mapped_checkpoint_computes_the_same(tmp_path: Path, dtype: torch.dtype, tied: bool) -> None:
    plain = saved(tmp_path, dtype=dtype, tie_word_embeddings=tied)
    assert len(list(tmp_path.glob("*.safetensors"))) > 5
    before = host_memory().mapped
    model = load_offloaded(tmp_path, "cpu", memory_budget=half(plain))
    there = [value for value in model.parameters() if isinstance(value, HostWeight)]
    assert host_memory().mapped - before >= sum(value.nbytes for value in there) > 0
    assert not model.training
    assert model.dtype is dtype
    assert model.generation_config.max_length == 77
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    x = ids(1, 40)
    assert torch.equal(text(model, x), text(plain, x))


def test_saving_a_mapped_checkpoint_reproduces_it(tmp_path: Path) -> None:
    plain = saved(tmp_path / "first", tie_word_embeddings=True)
    model = load_offloaded(tmp_path / "first", "cpu", memory_budget=half(plain))
    model.save_pretrained(tmp_path / "second")
    again = type(plain).from_pretrained(tmp_path / "second")
    for name, value in plain.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    first, second = (
        sum(file.stat().st_size for file in (tmp_path / name).glob("*.safetensors")) for name in ("first", "second")
    )
    assert second <= first


def test_a_compiled_checkpoint_in_another_dtype(tmp_path: Path) -> None:
    plain = saved(tmp_path).bfloat16()
    model = load_offloaded(tmp_path, "cpu", memory_budget=half(plain), dtype=torch.bfloat16)
    assert model.dtype is torch.bfloat16
    assert on_host(model)
    x = ids(1, 40)
    assert torch.equal(text(model, x, 1), text(plain, x, 1))


def test_experts_that_transformers_merges_while_loading(tmp_path: Path) -> None:
    plain = saved(tmp_path, "Mixtral")
    model = load_offloaded(tmp_path, "cpu", memory_budget=half(plain))
    assert any("experts" in name for name in on_host(model))
    x = ids(1, 40)
    assert torch.equal(text(model, x), text(plain, x))


def test_a_compiled_checkpoint_computes_the_same(tmp_path: Path) -> None:
    """Many weights of one mapped file, at arbitrary offsets."""
    plain = saved(tmp_path)
    plain.save_pretrained(tmp_path / "one")
    model = load_offloaded(tmp_path / "one", "cpu", memory_budget=half(plain))
    x = ids(1, 70)
    assert torch.equal(text(compiled(model), x), text(plain, x))


@pytest.mark.slow
def test_adapters_of_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def adapted(model: Any) -> Any:
        torch.manual_seed(1)
        asked = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        return peft.get_peft_model(model, asked).eval()

    base = saved(tmp_path)
    x = ids(1, 70)
    model = adapted(load_offloaded(tmp_path, "cpu", memory_budget=half(base)))
    there = len(on_host(model))
    plain = adapted(base)
    with torch.no_grad():
        expected = plain(x).logits
        torch.testing.assert_close(compiled(model)(x).logits, expected, rtol=0, atol=1e-5)
        for change in (model.merge_adapter, model.unmerge_adapter, lambda: model.merge_adapter(safe_merge=True)):
            change()
            assert len(on_host(model)) == there
            torch.testing.assert_close(model(x).logits, expected, rtol=0, atol=1e-5)
        alone = model.merge_and_unload()
        torch.testing.assert_close(alone(x).logits, expected, rtol=0, atol=1e-5)
        assert len(on_host(alone)) == there


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_weights_quantised_by_torchao() -> None:
    torchao = pytest.importorskip("torchao.quantization")
    model = small_model("Llama", num_hidden_layers=3)
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    x = ids(1, 70)
    with torch.no_grad():
        expected = model(x).logits
        offload_weights(model, "cpu", memory_budget=least(model))
        assert type(model.model.layers[0].self_attn.q_proj.weight.qdata) is HostWeight
        assert torch.equal(model(x).logits, expected)
        torch.testing.assert_close(compiled(model)(x).logits, expected, rtol=0, atol=1e-5)
        model.load_state_dict(model.state_dict(), assign=True)
        assert type(model.model.layers[0].self_attn.q_proj.weight.qdata) is HostWeight
        torch.testing.assert_close(model(x).logits, expected, rtol=0, atol=1e-5)
