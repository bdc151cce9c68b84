"""`offload_weights` and `load_offloaded` raise with the cause for unsupported input, and leave the model unchanged."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mom_compile import HostWeight, load_offloaded, offload_weights
from tests.models import TinyDecoder, ids, tiny
from tests.weights import CPU, decoder, least, offloaded, on_host

pytestmark = pytest.mark.filterwarnings("ignore:weights that are stored on the host are copied")

PROMPT = ids(1, 20)


@pytest.fixture
def model() -> Iterator[TinyDecoder]:
    """A model that must be unchanged after the test: same objects, same bytes, and it can be offloaded."""
    made = decoder()
    parameters = dict(made.named_parameters(remove_duplicate=False))
    expected = {name: value.clone() for name, value in made.state_dict().items()}
    yield made
    found = dict(made.named_parameters(remove_duplicate=False))
    assert all(found[name] is value and value.requires_grad for name, value in parameters.items())
    assert found.keys() == parameters.keys()
    assert all(torch.equal(value, expected[name]) for name, value in made.state_dict().items())
    offloaded(made)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"device": "cuda"}, "device='cuda' does not exist: this machine has 0 CUDA devices"),
        ({"device": "cuda:7"}, "device='cuda:7' does not exist"),
        ({"device": "tpu"}, "device='tpu' is not valid"),
        ({"device": None}, "device=None is not valid"),
        ({"device": "mps"}, "device='mps': weights can be offloaded for a CUDA device, or for 'cpu'"),
        ({"device": "meta"}, "device='meta': weights can be offloaded"),
        ({"memory_budget": None}, "memory_budget must be a number of bytes for device='cpu'"),
        ({"memory_budget": "plenty"}, "plenty"),
        ({"memory_budget": -1}, "-1"),
        ({"memory_budget": 5}, "cannot hold two layers of this model .* the smallest budget is"),
        ({"keep": "layers.0"}, "keep='layers.0' is not valid; it is a list of names"),
        ({"keep": ["layers.9"]}, "keep contains 'layers.9', but the model has no such module or parameter"),
        ({"directory": "/nowhere/at/all"}, "'/nowhere/at/all' is not a folder"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_invalid_arguments_raise(model: TinyDecoder, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        offload_weights(model, **{"device": "cpu", "memory_budget": "1GiB", **asked})


def test_offloading_a_model_twice_raises() -> None:
    model = offloaded(decoder())
    before = dict(model.named_parameters())
    with pytest.raises(ValueError, match=r"is already stored on the host: offload_weights was called on this model"):
        offload_weights(model, CPU, memory_budget="1GiB")
    assert all(value is before[name] for name, value in model.named_parameters())


def test_kept_parameters_are_on_the_device_and_count_towards_the_budget() -> None:
    model = decoder(layers=3)
    smallest = least(model)
    kept = ["layers.1", "layers.2.q.weight"]
    assert least(model, keep=kept) > smallest
    found = on_host(offloaded(model, keep=kept))
    assert not any(name.startswith("layers.1.") for name in found)
    assert {name for name in found if name.startswith("layers.2.q")} == set()
    assert "layers.2.o.weight" in found


def test_weights_on_meta_without_files_raise() -> None:
    with torch.device("meta"):
        model = decoder()
    with pytest.raises(ValueError, match=r"embed\.weight is on the meta device, but not in any file of `directory`"):
        offload_weights(model, CPU, memory_budget="1GiB")
    assert all(value.device.type == "meta" for value in model.parameters())


def test_weights_on_another_device_raise() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    model = nn.Linear(8, 8)
    with FakeTensorMode():
        model.weight = nn.Parameter(torch.empty(8, 8, device="cuda"))
    with pytest.raises(ValueError, match="weight is on cuda:0: load the model on the CPU, then call offload_weights"):
        offload_weights(model, CPU, memory_budget="1GiB")


def test_a_lazy_layer_raises() -> None:
    model = nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 8))
    with pytest.raises(ValueError, match=r"0\.weight has no size yet: call the model once before"):
        offload_weights(model, CPU, memory_budget="1GiB")


class Opaque(torch.Tensor):
    """A parameter of a class that does not expose its inner tensors."""


def test_an_opaque_parameter_raises() -> None:
    other = decoder(layers=3)
    data = other.layers[1].up.weight.data
    other.layers[1].up.weight = nn.Parameter(data.as_subclass(Opaque), requires_grad=False)
    with pytest.raises(ValueError, match=r"layers\.1\.up\.weight cannot be stored on the host: it is a .*\.Opaque"):
        offload_weights(other, CPU, memory_budget=least(other))
    assert not on_host(other)
    assert "layers.1.gate.weight" in on_host(offloaded(other, keep=["layers.1.up"]))
    with torch.no_grad():
        assert torch.equal(other(PROMPT), decoder(layers=3)(PROMPT))


# --- files ---


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    from safetensors.torch import save_file

    state = {name: value.clone() for name, value in decoder().state_dict().items()}
    halves = [{name: value for name, value in state.items() if ("layers.1" in name) is second}
              for second in (False, True)]  # fmt: skip
    for i, half in enumerate(halves):
        save_file(half, tmp_path / f"part{i}.safetensors")
    where = {name: f"part{i}.safetensors" for i, half in enumerate(halves) for name in half}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return tmp_path


def header_with(**entry: Any) -> bytes:
    text = json.dumps({"embed.weight": {"dtype": "F32", "shape": [64, 64], "data_offsets": [0, 64 * 64 * 4], **entry}})
    return len(text).to_bytes(8, "little") + text.encode() + bytes(64 * 64 * 4)


BAD_FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (Path.unlink, "names 'part1.safetensors', which is missing: download the checkpoint again"),
    "cut short": (lambda p: p.write_bytes(p.read_bytes()[:-100]), r"part1\.safetensors' ends at byte .* truncated"),
    "cut in its header": (lambda p: p.write_bytes(p.read_bytes()[:50]), "not a safetensors file or is truncated"),
    "empty": (lambda p: p.write_bytes(b""), "not a safetensors file or is truncated"),
    "garbage": (lambda p: p.write_bytes(bytes(range(256)) * 40), "not a safetensors file or is truncated"),
    "a list": (lambda p: p.write_bytes((2).to_bytes(8, "little") + b"[]"), "not a safetensors file or is truncated"),
    "a negative size": (lambda p: p.write_bytes(header_with(shape=[-64, -64])), "not a safetensors file"),
    "another size": (lambda p: p.write_bytes(header_with(shape=[65, 64])), r"F32 \[65, 64\], but has 16384 bytes"),
    "a shorter one": (lambda p: p.write_bytes(header_with(shape=[4, 64])), r"F32 \[4, 64\], but has 16384 bytes"),
    "another type": (lambda p: p.write_bytes(header_with(dtype="F4")), "has type F4, which this PyTorch does not"),
    "another shape": (lambda p: p.write_bytes(header_with(shape=[32, 128])), r"\[64, 64\] in the model.*\[32, 128\]"),
    "another dtype": (lambda p: p.write_bytes(header_with(dtype="I32")), r"torch\.float32 .* model, and torch\.int"),
}


@pytest.mark.parametrize("how", BAD_FILES)
def test_a_checkpoint_with_a_bad_file_raises(model: TinyDecoder, folder: Path, how: str) -> None:
    spoil, message = BAD_FILES[how]
    spoil(folder / "part1.safetensors")
    with pytest.raises(ValueError, match=message):
        offload_weights(model, CPU, memory_budget="1GiB", directory=folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', "\x00"])
def test_an_invalid_index_raises(model: TinyDecoder, folder: Path, text: str) -> None:
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match="is not an index of safetensors files"):
        offload_weights(model, CPU, memory_budget="1GiB", directory=folder)


def test_a_folder_without_safetensors_raises(model: TinyDecoder, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no safetensors files: save the model with save_pretrained first"):
        offload_weights(model, CPU, memory_budget="1GiB", directory=tmp_path)


def test_a_meta_model_with_a_weight_in_no_file_raises(folder: Path) -> None:
    with torch.device("meta"):
        model = decoder(layers=3)
    with pytest.raises(ValueError, match=r"layers\.2\.norm1\.weight is on the meta device, but not in any file"):
        offload_weights(model, CPU, memory_budget="1GiB", directory=folder)
    assert not any(isinstance(value, HostWeight) for value in model.parameters())


def test_a_meta_model_is_filled_from_its_files(folder: Path) -> None:
    with torch.device("meta"):
        model = decoder()
    offloaded(model, directory=folder)
    with torch.no_grad():
        assert torch.equal(model(PROMPT), decoder()(PROMPT))


def test_a_full_device_leaves_the_model_unchanged(model: TinyDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure while weights are moved leaves the model unchanged."""
    from mom_compile.weights import offload

    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("no more")

    monkeypatch.setattr(offload, "like", full)
    monkeypatch.setattr(offload, "hosted", full)
    with pytest.raises(torch.OutOfMemoryError):
        offload_weights(model, CPU, memory_budget=least(model))
    monkeypatch.undo()


# --- load_offloaded ---


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    tiny("Llama").save_pretrained(folder)
    return folder


def changed(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


BAD_FOLDERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no configuration": (lambda p: (p / "config.json").unlink(), "has no configuration that transformers can read"),
    "no weights": (lambda p: (p / "model.safetensors").unlink(), "has no safetensors files"),
    "more layers": (lambda p: changed(p, num_hidden_layers=3), r"incomplete: model\.layers\.2\..* \(9 weights"),
    "another class": (lambda p: changed(p, architectures=["Owner"]), "does not have 'Owner'"),
    "no class": (lambda p: changed(p, architectures=None), "it names none, and no remote code is run"),
    "other sizes": (lambda p: changed(p, intermediate_size=52), "ignore_mismatched_sizes"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", BAD_FOLDERS)
def test_an_incomplete_folder_is_not_loaded(saved: Path, tmp_path: Path, how: str) -> None:
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    spoil, message = BAD_FOLDERS[how]
    spoil(tmp_path)
    with pytest.raises((ValueError, RuntimeError), match=message):
        load_offloaded(tmp_path, CPU, memory_budget="1GiB")
