"""Access to a host tensor that is not an operator works or raises with advice."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings

import pytest
import torch

from mom_compile import HostTensor
from mom_compile.runtime.host.tensor import on_host
from tests.tensor_points import CPU, POINTS, outcome, tensor

aten = torch.ops.aten


@pytest.fixture(scope="module")
def walked() -> dict[str, object]:
    """Return the outcome of each point, tried in one process, which any of them may crash."""
    ran = subprocess.run([sys.executable, "-m", "tests.tensor_points"], capture_output=True, text=True, check=False)
    lines = [json.loads(line) for line in ran.stdout.splitlines()]
    return {**dict(lines), "": (ran.returncode, ran.stderr[-2000:])}


@pytest.mark.parametrize("name", POINTS)
def test_direct_access_works_or_raises_with_its_name(walked, name):
    point = POINTS[name]
    assert name in walked, walked[""]
    if point.error is None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert walked[name] == outcome(point, tensor())
    else:
        assert re.search(f"(RuntimeError|BufferError): .*{point.error}", str(walked[name])), walked[name]


def test_the_process_that_tries_all_access_exits_normally(walked):
    assert walked[""][0] == 0, walked[""]


def in_place_shape_operators() -> list[torch._ops.OpOverload]:
    found = []
    neither = {"detach_", "rename_"}  # tagged so, although they change neither storage nor shape
    for name in dir(aten):
        packet = None if name in neither else getattr(aten, name)
        for one in packet.overloads() if isinstance(packet, torch._ops.OpOverloadPacket) else ():
            operator = getattr(packet, one)
            if torch.Tag.inplace_view in operator.tags and one != "dimname":
                found.append(operator)
    return found


def test_operators_that_change_shape_or_storage_in_place_raise():
    """Found by PyTorch's tag, so that future operators are covered."""
    samples = {"Tensor": torch.zeros(2), "int": 0, "List[int]": [1], "Storage": torch.zeros(1).untyped_storage()}
    operators = in_place_shape_operators()
    assert len(operators) >= 12
    for operator in operators:
        host = on_host(tensor(), CPU)
        others = [a for a in operator._schema.arguments[1:] if not a.has_default_value()]
        with pytest.raises(RuntimeError, match=r"stored on the host \(HostTensor\)"):
            operator(host, *(samples[str(a.type)] for a in others))
        assert host.shape == host.host.shape == (2, 3, 5, 4)


def test_the_dlpack_exchange_api_is_hidden():
    assert not hasattr(HostTensor, "__dlpack_c_exchange_api__")
    assert not hasattr(on_host(tensor(), CPU), "__dlpack_c_exchange_api__")


def test_torch_load_with_weights_only_restores_a_host_tensor(tmp_path):
    torch.save({"keys": on_host(tensor(), CPU)}, tmp_path / "cache.pt")
    loaded = torch.load(tmp_path / "cache.pt", weights_only=True)["keys"]
    assert isinstance(loaded, HostTensor)
    assert torch.equal(loaded.fetch(), tensor())
    loaded.zero_()
    assert loaded.fetch().sum() == 0


def test_a_foreach_operator_also_writes_to_plain_tensors():
    host, plain = on_host(tensor(), CPU), torch.ones(3)
    torch._foreach_mul_([host, plain], 3)
    assert torch.equal(host.fetch(), 3 * tensor())
    assert plain.tolist() == [3.0] * 3


def test_an_out_argument_is_returned_or_unchanged_if_its_size_differs():
    host = on_host(tensor(), CPU)
    assert torch.mul(tensor(), 2, out=host) is host
    small = on_host(tensor()[:, :, :1], CPU)
    with pytest.raises(RuntimeError, match="result of shape"):
        torch.mul(tensor(), 2, out=small)
    assert torch.equal(small.fetch(), tensor()[:, :, :1])
    values, indices = torch.max(host, 2, out=(on_host(torch.zeros(2, 3, 4), CPU), torch.empty(0, dtype=torch.long)))
    assert torch.equal(values.fetch(), (2 * tensor()).max(2).values)
    assert torch.equal(indices, tensor().max(2).indices)
