"""C++ compilers work beside our passes: nobody waits for a kernel before everything is made that can be."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from typing import Any

import pytest
import torch
from torch._inductor import codecache
from torch._inductor import config as inductor_config
from torch._inductor.loop_body import LoopBody

import mom_compile.backend as backend_module
from mom_compile import MomWarning, reports
from mom_compile.lowering.piece_cache import PieceCache
from mom_compile.torch_compat import cpp_kernels
from mom_compile.torch_compat.cpp_kernels import AsyncCompile, defer_kernel_waits
from tests.kernel_batches import not_installed
from tests.programs import ATTENTION, HIDDEN, ROWWISE, weights_of

W = weights_of(torch.float64)
MINI = {"mini_seq_len": 8}
TOKENS = 40


def block(x: torch.Tensor) -> torch.Tensor:
    x = ROWWISE["mlp"](ATTENTION["causal"](x, W), W)
    # Between loops, and with a number in it that the sequence's length decides.
    return x.cumsum(1).flip(1) / x.shape[1] if x.shape[1] > 1 else x


def sequence() -> torch.Tensor:
    return torch.randn(2, TOKENS, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def one_compiler_per_kernel() -> Iterator[None]:
    with not_installed():
        yield


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Pieces that were begun, and waits for kernels, in order."""
    seen: list[str] = []
    begin, now = PieceCache.begin, AsyncCompile.wait

    def begun(cache: PieceCache, *given: Any) -> Any:
        seen.append("piece")
        return begin(cache, *given)

    def waited(*given: Any) -> None:
        seen.append("wait")
        now(*given)

    monkeypatch.setattr(PieceCache, "begin", begun)
    monkeypatch.setattr(AsyncCompile, "wait", waited)
    return seen


def test_every_piece_is_made_before_the_first_kernel_is_waited_for(waits: list[str]) -> None:
    x = sequence()
    # With two threads kernels are compiled in the background. One that nobody waited for cannot be called.
    with torch.no_grad(), inductor_config.patch(compile_threads=2, fx_graph_cache=False):
        found = torch.compile(block, backend="mom", options={**MINI, "strict": True})(x)
    torch.testing.assert_close(found, block(x))
    pieces = waits.index("wait")
    assert waits == ["piece"] * pieces + ["wait"] * (len(waits) - pieces)
    assert pieces >= 3 and len(waits) - pieces == len(reports()[-1].compiled_pieces)


def test_what_is_compiled_elsewhere_meanwhile_waits_as_ever(waits: list[str]) -> None:
    with defer_kernel_waits([torch.device("cpu")]) as left:
        elsewhere = threading.Thread(target=lambda: AsyncCompile().wait({}))
        elsewhere.start()
        elsewhere.join()
    assert waits == ["wait"] and not left
    waits.clear()
    torch.compile(torch.sin, backend="inductor", dynamic=False)(torch.randn(7, 3))
    assert waits == ["wait"] and not left


def test_pytorch_is_patched_while_we_compile_alone() -> None:
    """What another backend compiles in this process runs PyTorch's own code."""
    wait, read = AsyncCompile.wait, LoopBody.get_read_expr
    assert wait.__module__ == AsyncCompile.__module__ and read.__module__ == LoopBody.__module__
    with contextlib.suppress(ValueError), defer_kernel_waits([torch.device("cpu")]):
        assert AsyncCompile.wait is not wait
        raise ValueError("an error")
    assert AsyncCompile.wait is wait
    with torch.no_grad():
        torch.compile(block, backend="mom", options={**MINI, "strict": True})(sequence())
    assert AsyncCompile.wait is wait and LoopBody.get_read_expr is read


def test_the_kernels_of_other_devices_are_waited_for_at_once(waits: list[str]) -> None:
    for devices, later in ((["cpu"], True), (["cpu", "cuda"], False), (["cuda"], False)):
        waits.clear()
        with defer_kernel_waits([torch.device(name) for name in devices]) as left:
            AsyncCompile().wait({})
        assert (len(left), len(waits)) == ((1, 0) if later else (0, 1))


def _failing(monkeypatch: pytest.MonkeyPatch, fails: Callable[[int], bool]) -> None:
    """The compiler fails at some kernels, by their numbers."""
    now, numbers = AsyncCompile.wait, iter(range(1000))

    def wait(*given: Any) -> None:
        if fails(next(numbers)):
            raise RuntimeError("the compiler is out of order")
        now(*given)

    monkeypatch.setattr(AsyncCompile, "wait", wait)


def test_what_does_not_compile_runs_eagerly_and_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    _failing(monkeypatch, lambda number: True)
    x, lenient = sequence(), {**MINI, "strict": False}
    with torch.no_grad(), pytest.warns(MomWarning, match="the compiler is out of order"):
        torch.testing.assert_close(torch.compile(block, backend="mom", options=lenient)(x), block(x))
    report = reports()[-1]
    assert len(report.eager_pieces) == len(report.stages) + 1
    assert set(report.eager_pieces.values()) == {"RuntimeError: the compiler is out of order"}


def test_what_does_not_compile_for_any_length_is_compiled_for_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    x, made = sequence(), []
    begin = PieceCache.begin

    def begun(cache: PieceCache, piece: Any, settings: Any, report: Any, name: str) -> Any:
        made.append((name, len(piece.symbols)))
        return begin(cache, piece, settings, report, name)

    monkeypatch.setattr(PieceCache, "begin", begun)
    with torch.no_grad():
        torch.compile(block, backend="mom", options=MINI)(x)
        straight = [number for number, (name, _) in enumerate(made) if not name.startswith("stage")]
        assert straight and all(made[number][1] for number in straight)
        first = len(made)
        torch._dynamo.reset()
        _failing(monkeypatch, lambda number: number in straight)
        torch.testing.assert_close(torch.compile(block, backend="mom", options=MINI)(x), block(x))
    assert [name for name, _ in made[first:]] == [name for name, _ in made[:first]] + [made[n][0] for n in straight]
    assert not any(symbols for _, symbols in made[2 * first :])
    assert not reports()[-1].eager_pieces


# --- the first kernel ---


def test_pytorch_finds_the_backend_where_the_compiler_is_started() -> None:
    (found,) = entry_points(group="torch_dynamo_backends", name="mom")
    assert found.value == "mom_compile.entry:mom"
    assert found.load() is backend_module.mom
    assert cpp_kernels._compiler_started.is_set() or torch.accelerator.device_count()


def test_what_the_first_kernel_makes_is_what_kernels_want() -> None:
    cpp_kernels._compile_first_kernel()
    kernel = codecache.CppPythonBindingsCodeCache.load_pybinding(["float*"], cpp_kernels._FIRST_KERNEL)
    assert callable(kernel)
    headers = codecache._precompile_header.cache_info()
    with inductor_config.patch(fx_graph_cache=False):
        torch.compile(lambda x: x.sin() + 3, backend="inductor", dynamic=False)(torch.randn(11, 5))
    assert codecache._precompile_header.cache_info().misses == headers.misses
    assert codecache._precompile_header.cache_info().hits > headers.hits
