"""Entries of AOTAutogradCache and FxGraphCache.

bundled_autograd_cache      AOTAutogradCache stores what `inner_compile` returned. Without this setting it stores the
                            key of an entry of FxGraphCache.
cache_key_tag               a text in the keys of both caches
OutputCode                  what `inner_compile` returns. AOTAutogradCache calls `prepare_for_serialization` on a copy
                            before it pickles it, and `post_compile` after it has read an entry.
BypassAOTAutogradCache      raised while storing: the graph is not stored. Raised while loading: it is compiled anew.
CompiledFxGraph             what Inductor's back half returns. `_fx_graph_cache_key` is its key in FxGraphCache.
CompiledForward             refers to an entry of FxGraphCache by its key: `load` reads it
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch._functorch import config as functorch_config
from torch._functorch._aot_autograd.aot_autograd_result import CompiledForward
from torch._functorch._aot_autograd.autograd_cache import BypassAOTAutogradCache
from torch._inductor.output_code import CompiledFxGraph, OutputCode
from torch.compiler import config as compiler_config

#: The user's own `cache_key_tag`.
_users_tag: contextvars.ContextVar[str] = contextvars.ContextVar("_users_tag", default="")


@contextlib.contextmanager
def storing_programs(cache_tag: str) -> Iterator[None]:
    """Have AOTAutogradCache store the `Storable` that `inner_compile` returns, with `cache_tag` in its key."""
    users = compiler_config.cache_key_tag
    before = _users_tag.set(users)
    try:
        with _tagged(f"{users} {cache_tag}"), functorch_config.patch(bundled_autograd_cache=True):
            yield
    finally:
        _users_tag.reset(before)


def _tagged(tag: str) -> contextlib.AbstractContextManager[None]:
    patch: Any = compiler_config.patch  # type: ignore[attr-defined]
    return patch(cache_key_tag=tag)  # type: ignore[no-any-return]


def storing_pieces(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function with the user's tag and without bundling.

    Graphs with different tags share compiled pieces, and FxGraphCache stores no piece while bundling is on.
    """
    with _tagged(_users_tag.get()), functorch_config.patch(bundled_autograd_cache=False):
        return function(*args, **kwargs)


class NotStorable(BypassAOTAutogradCache):
    """Raised by `Storable.stored` and `Storable.load`. AOTAutogradCache logs the reason and does not use its entry."""


class Storable(OutputCode):
    """Compiled code that AOTAutogradCache stores. AOTAutograd calls it with one list, which it may empty.

    A subclass implements `__call__(inputs)`, `stored() -> bytes` and `load(data, example_inputs, settings)`. `stored`
    and `load` raise `NotStorable` if they cannot.
    """

    data: bytes | None = None

    def __init__(self) -> None:
        # AOTAutograd's wrappers copy attributes of the instance, not of the class.
        self._boxed_call = True

    def stored(self) -> bytes:
        raise NotImplementedError

    def load(self, data: bytes, example_inputs: Sequence[Any], settings: Mapping[str, Any]) -> None:
        raise NotImplementedError

    def prepare_for_serialization(self) -> None:
        """Replace all attributes by `stored()`. AOTAutogradCache calls this on a copy."""
        data = self.stored()
        self.__dict__.clear()
        self.data = data

    def post_compile(self, example_inputs: Sequence[Any], constants: Any, graph_kwargs: Any) -> None:
        """Call `load`. AOTAutogradCache calls this on an unpickled entry."""
        data, self.data = self.data, None
        assert data is not None
        self._boxed_call = True
        storing_pieces(self.load, data, example_inputs, graph_kwargs)

    def set_triton_bundle(self, triton_bundle: Any) -> None:
        """Do nothing: the entries of the pieces hold the kernels."""


def stored_stock(compiled: Any) -> Any:
    """Return a picklable reference to Inductor's code: its key in FxGraphCache. Raises `NotStorable`."""
    key = getattr(compiled, "_fx_graph_cache_key", None)
    if not isinstance(compiled, CompiledFxGraph) or key is None:
        raise NotStorable("Inductor's code has no entry in FxGraphCache")
    return CompiledForward((key, list(compiled._fx_graph_cache_debug_lines or ())), compiled.guards_expr)


def loaded_stock(stored: Any, example_inputs: Sequence[Any], settings: Any) -> Any:
    """Read Inductor's code by its key. Raises if FxGraphCache has no such entry; AOTAutogradCache then compiles anew.
    """
    return stored.post_compile(stored.load(example_inputs), settings)
