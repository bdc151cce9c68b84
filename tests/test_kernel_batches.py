"""Kernels that one run of the compiler makes are those that Inductor makes one by one."""

from __future__ import annotations

import pytest
import torch
from torch._inductor import config as inductor_config
from torch._inductor.async_compile import AsyncCompile

from tests import kernel_batches
from tests.kernel_batches import Kernel, compile_pending, not_installed

HEADER = "#include <torch/csrc/inductor/cpp_prefix.h>\n"
TYPES = ["const float*", "float*", "const int64_t"]


def source(body: str) -> str:
    return HEADER + f'extern "C" void kernel(const float* in_ptr0, float* out_ptr0, const int64_t ks0)\n{{ {body} }}\n'


def several_kernels(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Reductions, matrix products between kernels, a read at indices that are checked."""
    y = (x @ x.softmax(-1)).tanh()
    return (y @ y.cumsum(-1)).sum(-1) + y[index].sum()


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of kernels of each run of the compiler."""
    sizes: list[int] = []
    together = kernel_batches.compile_batch

    def counted(kernels: list[Kernel]) -> None:
        sizes.append(len(kernels))
        together(kernels)

    monkeypatch.setattr(kernel_batches, "compile_batch", counted)
    monkeypatch.setattr(kernel_batches, "_known", {})
    return sizes


def test_a_graph_computes_the_same_bits(batches: list[int]) -> None:
    x, index = torch.randn(24, 24), torch.tensor([3, 5])
    with inductor_config.patch(fx_graph_cache=False):
        together = torch.compile(several_kernels, fullgraph=True)(x, index)
        torch._dynamo.reset()
        with not_installed():
            one_by_one = torch.compile(several_kernels, fullgraph=True)(x, index)
    assert torch.equal(together, one_by_one)
    assert len(batches) == 1 and batches[0] >= 3


def test_exceptions_of_a_kernel_are_raised(batches: list[int]) -> None:
    compiled = torch.compile(several_kernels, fullgraph=True)
    with inductor_config.patch(fx_graph_cache=False), pytest.raises(RuntimeError, match="index out of bounds"):
        compiled(torch.randn(24, 24), torch.tensor([3, 50]))
    assert len(batches) == 1


def test_the_kernel_that_does_not_compile_raises_and_the_others_run(batches: list[int]) -> None:
    right, wrong = (AsyncCompile().cpp_pybinding(TYPES, source(body)) for body in ("*out_ptr0 = ks0;", "no code;"))
    compile_pending()
    right(torch.zeros(1), out := torch.zeros(1), 7)
    assert out.item() == 7
    with pytest.raises(Exception, match="C\\+\\+ compile error"):
        AsyncCompile().wait({"kernel": wrong})
    AsyncCompile().wait({"kernel": right})
    assert batches == [2]


def test_kernels_are_compiled_with_the_settings_of_their_request(batches: list[int]) -> None:
    code = source("*out_ptr0 = *in_ptr0 * *in_ptr0 + ks0;")
    plain = AsyncCompile().cpp_pybinding(TYPES, code)
    assert AsyncCompile().cpp_pybinding(TYPES, code) is plain
    with inductor_config.patch({"cpp.dynamic_threads": not inductor_config.cpp.dynamic_threads}):
        other = AsyncCompile().cpp_pybinding(TYPES, code)
    assert other is not plain
    compile_pending()
    assert batches == [1, 1]
