"""A model with weights on the host can be saved, loaded, converted, copied and adapted like any other."""

from __future__ import annotations

import copy
import io
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mom_compile import HostWeight, MomWarning, host_memory, offload_weights
from mom_compile.notices import forget
from mom_compile.runtime.program import observing
from tests.models import TinyDecoder, ids
from tests.weights import CPU, bytes_arrived, compiled, decoder, least, offloaded, on_host, parts_of_one

pytestmark = pytest.mark.filterwarnings("ignore:weights that are stored on the host are copied")

PROMPT = ids(1, 150)


def run(model: Any, x: torch.Tensor = PROMPT) -> torch.Tensor:
    with torch.no_grad():
        return model(x, keep=4)


def others(model: nn.Module, seed: int = 7) -> dict[str, torch.Tensor]:
    """A state dict with other weights."""
    generator = torch.Generator().manual_seed(seed)
    return {name: value + 0.1 * torch.randn(value.shape, generator=generator)
            for name, value in model.state_dict().items()}  # fmt: skip


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


# --- saved ---


def test_a_state_dict_shares_the_weights_bytes() -> None:
    model = decoder()
    before = {name: (value.data_ptr(), value.clone()) for name, value in model.state_dict().items()}
    state = offloaded(model).state_dict()
    assert state.keys() == before.keys()
    for name, value in state.items():
        assert type(value) is torch.Tensor
        assert value.device == CPU
        address, expected = before[name]
        assert value.data_ptr() == address
        assert torch.equal(value, expected)
    state["layers.1.q.weight"].zero_()
    assert not model.layers[1].q.weight.fetch().any()


def test_a_submodules_state_dict_shares_them_and_keep_vars_returns_parameters() -> None:
    model = offloaded(decoder())
    part = model.layers[0].state_dict(prefix="here.")
    assert type(part["here.q.weight"]) is torch.Tensor
    kept = model.state_dict(keep_vars=True)
    assert kept["layers.0.q.weight"] is model.layers[0].q.weight


def test_offloading_keeps_the_parameters() -> None:
    model = decoder()
    count = sum(value.numel() for value in model.parameters())
    offloaded(model)
    assert all(isinstance(value, nn.Parameter) for value in model.parameters())
    assert all(isinstance(value, nn.Parameter) for _, value in model.named_parameters())
    assert sum(value.numel() for value in model.parameters()) == count
    assert {value.device for value in model.parameters()} == {CPU}


def test_a_saved_model_equals_that_of_a_plain_model() -> None:
    plain = decoder()
    plain.head.weight = plain.embed.weight
    model = offloaded(copy.deepcopy(plain))
    files = []
    for one in (plain, model):
        files.append(io.BytesIO())
        torch.save(one.state_dict(), files[-1])
    assert len(files[0].getvalue()) == len(files[1].getvalue())
    files[1].seek(0)
    loaded = torch.load(files[1])
    assert all(torch.equal(loaded[name], value) for name, value in plain.state_dict().items())
    assert loaded["head.weight"].data_ptr() == loaded["embed.weight"].data_ptr()


def test_an_unpickled_model_has_its_weights_on_the_host() -> None:
    model = decoder()
    model.head.weight = model.embed.weight
    expected = run(offloaded(model))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    other = torch.load(file, weights_only=False)
    assert on_host(other) == on_host(model)
    assert other.head.weight is other.embed.weight
    assert torch.equal(run(other), expected)
    other.load_state_dict(others(model), assign=True)
    assert on_host(other) == on_host(model)
    assert torch.equal(run(model), expected)


# --- loaded ---


@pytest.mark.usefixtures("eager_pieces")
def test_a_compiled_model_uses_loaded_assigned_and_written_weights() -> None:
    """One program suffices: weights are its inputs."""
    model, plain = offloaded(decoder()), decoder()
    there = on_host(model)
    compiled(model)
    close(run(model), run(plain))
    for i, how in enumerate(({}, {"assign": True}, {}), start=1):
        state = others(plain, seed=i)
        model.load_state_dict(state, **how)
        plain.load_state_dict(state)
        assert on_host(model) == there
        close(run(model), run(plain))
    for one in (model, plain):
        with torch.no_grad():
            one.layers[0].q.weight.data += 0.5
            one.layers[0].gate.weight[3:9] = 0.25
            one.layers[1].down.weight.data = torch.full_like(plain.layers[1].down.weight, 0.01)
    assert on_host(model) == there
    close(run(model), run(plain))


def test_an_assigned_tensor_is_not_copied() -> None:
    model = offloaded(decoder())
    state = others(model)
    model.load_state_dict(state, assign=True)
    assert model.state_dict()["layers.0.q.weight"].data_ptr() == state["layers.0.q.weight"].data_ptr()


def test_weights_of_another_shape_raise_as_in_a_plain_model() -> None:
    model = offloaded(decoder())
    expected = run(model)
    state = model.state_dict()
    state["layers.0.q.weight"] = torch.ones(3, 3)
    with pytest.raises(RuntimeError, match="size mismatch for layers"):
        model.load_state_dict(state)
    with pytest.raises(RuntimeError, match="weights that are stored on the host"):
        model.layers[0].q.weight.data = torch.ones(3, 3)
    assert torch.equal(run(model), expected)


@pytest.mark.parametrize("how", [{}, {"assign": True}])
def test_tied_weights_stay_tied(how: dict[str, Any]) -> None:
    model = decoder()
    model.head.weight = model.embed.weight
    offloaded(model)
    assert "head.weight" in on_host(model)
    assert model.head.weight is model.embed.weight
    plain = decoder()
    plain.head.weight = plain.embed.weight
    with torch.no_grad():
        plain.embed.weight.mul_(2)
    model.load_state_dict(plain.state_dict(), **how)
    assert model.head.weight is model.embed.weight
    assert "head.weight" in on_host(model)
    close(run(model), run(plain))


@pytest.mark.usefixtures("eager_pieces")
def test_a_tied_table_is_fetched_by_rows_for_the_embedding_and_once_for_the_head() -> None:
    model = decoder(vocabulary=512)
    model.head.weight = model.embed.weight
    compiled(offloaded(model))
    expected = run(model)
    there = {id(value): value.nbytes for value in model.parameters() if isinstance(value, HostWeight)}
    arrived = bytes_arrived(lambda: model(PROMPT, keep=4))
    rows = PROMPT.numel() * model.embed.weight[0].nbytes
    assert sum(there.values()) <= arrived <= sum(there.values()) + rows
    close(run(model), expected)


# --- from files ---


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    from safetensors.torch import save_file

    save_file({name: value.clone() for name, value in decoder().state_dict().items()}, tmp_path / "model.safetensors")
    return tmp_path


def test_a_mapped_weight_is_copied_on_write_for_all_views(folder: Path) -> None:
    file = folder / "model.safetensors"
    before = file.read_bytes()
    model, plain = offloaded(decoder(), directory=folder), decoder()
    assert host_memory().mapped >= len(before)
    for one in (model, plain):
        weight = one.layers[0].up.weight
        seen, transposed = weight.data, weight.data.t()
        with torch.no_grad():
            transposed[3:7].mul_(2)
            seen.add_(1)
            weight[5].zero_()
        assert torch.equal(transposed + 0, weight.t() + 0)
        assert torch.equal(seen + 0, weight + 0)
    assert torch.equal(run(model), run(plain))
    state = others(plain)
    model.load_state_dict(state)
    plain.load_state_dict(state)
    assert torch.equal(run(model), run(plain))
    assert file.read_bytes() == before


def test_a_model_of_mapped_weights_saves_no_more_than_its_weights(folder: Path) -> None:
    model = offloaded(decoder(), directory=folder)
    size = sum(value.nbytes for value in model.parameters())
    for what in (model.state_dict(), model, {"one": model.layers[0].q.weight}):
        file = io.BytesIO()
        torch.save(what, file)
        assert len(file.getvalue()) < size + 40_000
    assert len(file.getvalue()) < 40_000
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.layers[0].q.weight.zero_()
    assert torch.equal(run(model), run(decoder()))


# --- converted and copied ---


@pytest.mark.usefixtures("eager_pieces")
def test_another_dtype_stays_on_the_host() -> None:
    model, plain = offloaded(decoder()), decoder()
    there = on_host(model)
    compiled(model)
    for convert in (nn.Module.bfloat16, nn.Module.double, lambda one: one.to(torch.float32)):
        for one in (model, plain):
            convert(one)
        assert on_host(model) == there
        assert {value.dtype for value in model.parameters()} == {value.dtype for value in plain.parameters()}
        tolerance = 0.05 if model.head.weight.dtype is torch.bfloat16 else 1e-5
        torch.testing.assert_close(run(model), run(plain), rtol=0, atol=tolerance)


def test_calls_that_convert_nothing_move_no_weight() -> None:
    model = offloaded(decoder())
    expected, there = run(model), on_host(model)
    addresses = {name: value.data_ptr() for name, value in model.state_dict().items()}
    for call in (
        lambda: model.to("cpu"),
        lambda: model.to(torch.float32),
        lambda: model.cpu(),
        lambda: model.requires_grad_(True),
        lambda: model.requires_grad_(False),
        lambda: model.train(),
        lambda: model.eval(),
        lambda: model.zero_grad(),
        lambda: repr(model),
    ):
        call()
        assert on_host(model) == there
        assert {name: value.data_ptr() for name, value in model.state_dict().items()} == addresses
    assert torch.equal(run(model), expected)


def test_as_strided_offsets_are_relative_to_the_weight() -> None:
    for weight, plain in zip(offloaded(parts_of_one()).parameters(), parts_of_one().parameters(), strict=True):
        if plain.dim() == 2:
            first = weight.storage_offset()
            expected = plain.as_strided((3, 5), (2, 1), plain.storage_offset() + 7)
            assert torch.equal(weight.as_strided((3, 5), (2, 1), first + 7) + 0, expected + 0)
            assert torch.equal(weight[2:].t()[1:] + 0, plain[2:].t()[1:] + 0)


@pytest.mark.usefixtures("eager_pieces")
def test_a_deep_copied_model_is_independent() -> None:
    """Both models are compiled in one process."""
    model = offloaded(decoder())
    expected = run(model)
    other = copy.deepcopy(model)
    assert on_host(other) == on_host(model)
    state = others(model)
    for how in ({}, {"assign": True}):
        other.load_state_dict(state, **how)
        assert on_host(other) == on_host(model)
    plain = decoder()
    plain.load_state_dict(state)
    compiled(model), compiled(other)
    for _ in range(2):
        close(run(model), expected)
        close(run(other), run(plain))


def test_parameters_that_share_part_of_a_storage_still_do() -> None:
    model = offloaded(parts_of_one())
    assert torch.equal(run(model), run(parts_of_one()))
    layer = model.layers[0]
    with torch.no_grad():
        base = model.state_dict()["layers.0.gate.weight"]
        base.as_strided((192, 64), (64, 1), 192 * 64).zero_()
    assert not layer.up.weight.fetch().any()
    copied = copy.deepcopy(model).state_dict()
    first, second = copied["layers.1.gate.weight"], copied["layers.1.up.weight"]
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()


# --- uncompiled, with gradients ---


def test_an_uncompiled_model_warns_once() -> None:
    forget()
    model, expected = offloaded(decoder()), run(decoder())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            assert torch.equal(run(model), expected)
    said_once = [str(one.message)[:24] for one in said if issubclass(one.category, MomWarning)]
    assert said_once == ["weights that are stored "]


@pytest.mark.usefixtures("eager_pieces", "stock_is_eager")
def test_a_compiled_call_with_gradients_is_correct_and_warns() -> None:
    forget()
    model, plain = offloaded(decoder()).requires_grad_(True), decoder()
    compiled(model)
    with pytest.warns(MomWarning, match="graphs that need gradients are compiled by stock"):
        got = model(PROMPT, keep=4)
    close(got.detach(), run(plain))


# --- adapted ---


class Lora(nn.Module):
    """A linear layer with two small matrices in addition."""

    def __init__(self, base: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.base = base
        self.down = nn.Parameter(torch.randn(rank, base.in_features, generator=generator) * 0.1)
        self.up = nn.Parameter(torch.randn(base.out_features, rank, generator=generator) * 0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + x @ self.down.t() @ self.up.t()

    def merged(self) -> nn.Linear:
        self.base.weight.data += self.up @ self.down
        return self.base


def adapted(model: TinyDecoder) -> TinyDecoder:
    for layer in model.layers:
        layer.q, layer.down = Lora(layer.q), Lora(layer.down)
    return model


@pytest.mark.usefixtures("eager_pieces")
def test_adapters_on_top_stay_on_the_device_and_can_be_merged(folder: Path) -> None:
    """Also into weights in a file, which does not change."""
    before = (folder / "model.safetensors").read_bytes()
    expected = run(adapted(decoder()))
    model = adapted(offloaded(decoder(), directory=folder))
    there = on_host(model)
    assert "layers.0.q.base.weight" in there
    assert "layers.0.q.up" not in there
    close(run(compiled(model)), expected)
    with torch.no_grad():
        for layer in model.layers:
            layer.q, layer.down = layer.q.merged(), layer.down.merged()
    close(run(model), expected)
    assert {"layers.0.q.weight", "layers.0.down.weight"} <= on_host(model)
    assert (folder / "model.safetensors").read_bytes() == before


# --- writes while a program reads ---


@pytest.mark.usefixtures("eager_pieces")
def test_writing_a_weight_that_a_running_program_reads_raises() -> None:
    """Neither the first weight that it reads, nor the last, which it has not read yet."""
    model = compiled(offloaded(decoder()))
    expected = run(model)
    state, errors = others(model), []

    def write(call: Any) -> None:
        try:
            with torch.no_grad():
                call()
        except RuntimeError as error:
            errors.append(str(error))

    def meanwhile(*_: Any) -> None:
        if not errors:
            for call in (
                lambda: model.load_state_dict(state),
                lambda: model.layers[1].down.weight.zero_(),
                lambda: model.layers[0].q.weight.add_(1),
            ):
                thread = threading.Thread(target=write, args=(call,))
                thread.start()
                thread.join()

    with observing(meanwhile):
        close(run(model), expected)
    assert len(errors) == 3
    assert all("a running model reads" in error for error in errors)
    close(run(model), expected)
    model.load_state_dict(state)
    plain = decoder()
    plain.load_state_dict(state)
    close(run(model), run(plain))


def test_the_budget_named_in_the_error_is_the_smallest() -> None:
    model = decoder(layers=3)
    smallest = least(model)
    with pytest.raises(ValueError, match=str(smallest)):
        offload_weights(model, CPU, memory_budget=smallest - 1)
    assert not on_host(model)
    made = offload_weights(model, CPU, memory_budget=smallest)
    assert made.resident + made.under_way <= smallest
    assert len(on_host(model)) >= 3 * 6
