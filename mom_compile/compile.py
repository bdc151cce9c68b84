"""`mom_compile.compile(model)`: `model.compile(backend="mom")` with a limit on graphs for each model.

Dynamo makes at most 8 graphs of one code object (`torch._dynamo.config.recompile_limit`). A call that needs another
graph runs in eager mode. All models of transformers share the code object of their `forward`: two models in a process,
or prompts of a few kinds, reach the limit soon.

`generate()` of transformers calls the encoder of an encoder-decoder model, and since 5.23 that of images, before it
calls the model. These modules are compiled as well: `model.compile` leaves them in eager mode there.

This function also needs fewer graphs. The first graph of a kind is for any number of tokens and of sequences. Dynamo
alone takes both numbers for constants until a call has other numbers.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any, TypeVar

import torch

from mom_compile.config import joined_options, parse_options
from mom_compile.divided import check_heads, is_fully_sharded
from mom_compile.torch_compat.dynamo import expect_other_sizes
from mom_compile.torch_compat.errors import UserError
from mom_compile.torch_compat.recompiles import compile_apart

Compilable = TypeVar("Compilable", bound=Callable[..., Any])

#: The default limit on the graphs of one model (docs/graphs.md has how many a session needs).
MOST_GRAPHS = 32


def compile(
    model: Compilable,
    *,
    dynamic: bool | None = None,
    fullgraph: bool = False,
    mode: str | None = None,
    recompile_limit: int = MOST_GRAPHS,
    options: Mapping[str, Any] | None = None,
    **named: Any,
) -> Compilable:
    """Compile a model or a function with backend "mom".

    Parameters
    ----------
    model : torch.nn.Module or callable
        A module, which is compiled in place as by `model.compile`, or a function.
    dynamic : bool, optional
        As in `torch.compile`, except that `None` makes graphs for any number of sequences and tokens. Other sizes are
        constants at first.
    fullgraph : bool
        As in `torch.compile`: a graph break is an error.
    mode : str, optional
        A mode of Inductor, such as `"max-autotune"`. `torch.compile` refuses a mode together with options; here both
        may be given, and `options["inductor"]` overrides the mode.
    recompile_limit : int
        The largest number of graphs of this model; under FSDP, of each module that it shards. Graphs of other models
        do not count. Before PyTorch 2.13 they do: the limit is raised to this number while the model is called.
    options : mapping, optional
        Options of the backend, listed in docs/options.md.
    **named
        Options of the backend by name: `kv_offload=True`.

    Returns
    -------
    torch.nn.Module or callable
        The same model, or the compiled function.

    Raises
    ------
    ValueError
        If an option, a value or a mode is not valid, or if a tensor-parallel model has heads that the ranks cannot
        divide. It is raised here and not at the first call.
    TypeError
        If `model` is a class or neither a module nor a function, if `options` is not a mapping, or if an option is
        given both ways.
    """
    if isinstance(model, type):
        name = model.__name__
        raise TypeError(f"compile() takes a module or a function, not the class {name}: make a model of it first")
    if not callable(model):
        raise TypeError(f"compile() takes a module or a function, not a {type(model).__name__}")
    if isinstance(recompile_limit, bool) or not isinstance(recompile_limit, int) or recompile_limit < 1:
        raise UserError(f"recompile_limit={recompile_limit!r} is not valid; it is a whole number of graphs, at least 1")
    backend = named.pop("backend", "mom")  # as in the call of `torch.compile` that this one replaces
    if backend != "mom":
        raise UserError(f"backend={backend!r}: mom_compile.compile compiles with 'mom'; others are for torch.compile")
    check_heads(model)
    given = joined_options(options, named)
    parsed = parse_options(given, mode)
    if parsed.inductor:
        given["inductor"] = dict(parsed.inductor)
    settings: dict[str, Any] = {"backend": "mom", "dynamic": dynamic, "fullgraph": fullgraph, "options": given}
    for part in _called_alone(model):
        compile_apart(part, recompile_limit, functools.partial(_prepare, part, dynamic is None), **settings)
    before = functools.partial(_prepare, model, dynamic is None)
    compiled: Compilable = compile_apart(model, recompile_limit * _graphs_of_a_kind(model), before, **settings)
    return compiled


_OF_TRANSFORMERS = ("generate", "get_decoder", "get_input_embeddings", "get_output_embeddings")


def _called_alone(model: Callable[..., Any]) -> list[torch.nn.Module]:
    """Return the modules of a model of transformers that `generate()` may call before the model: those besides its
    decoder and its embeddings, such as an encoder and a projector. Graphs of the model have them inlined."""
    if not isinstance(model, torch.nn.Module) or not all(hasattr(model, name) for name in _OF_TRANSFORMERS):
        return []
    base: Any = getattr(model, "base_model", model)
    decoder = model.get_decoder()  # type: ignore[operator]
    if decoder in (base, model):
        return []
    others = [model.get_input_embeddings(), model.get_output_embeddings()]  # type: ignore[operator]
    return [part for part in base.children() if decoder not in part.modules() and part not in others]


def _graphs_of_a_kind(model: Callable[..., Any]) -> int:
    """Return how many graphs of one code object a call needs: FSDP breaks the graph at each module that it shards."""
    modules = model.modules() if isinstance(model, torch.nn.Module) else ()
    return max(1, sum(map(is_fully_sharded, modules)))


def _prepare(
    model: Callable[..., Any], any_lengths: bool, named: MutableMapping[str, Any], unnamed: Sequence[Any]
) -> None:
    """Make equivalent calls identical before Dynamo looks for the graph of a call."""
    _leave_out_default(model, named)
    if any_lengths:
        _expect_other_lengths(named, unnamed)


def _leave_out_default(model: Callable[..., Any], named: MutableMapping[str, Any]) -> None:
    """Remove a `return_dict` that equals the default of a model of transformers.

    Dynamo guards on the names of a call's arguments. `generate` passes `return_dict=True`, but not where it verifies
    drafted tokens.
    """
    given = named.get("return_dict")
    if not isinstance(given, bool) or not isinstance(model, torch.nn.Module):
        return
    default = getattr(getattr(model, "config", None), "return_dict", None)
    if given is default and _asks_its_config(type(model).forward):
        del named["return_dict"]


@functools.cache
def _asks_its_config(forward: Callable[..., Any]) -> bool:
    """Return whether `forward` has no default for `return_dict` other than None."""
    parameter = inspect.signature(forward).parameters.get("return_dict")
    return parameter is None or parameter.default is None


#: Arguments that are `[sequences, tokens, width]`.
_EMBEDDED = ("inputs_embeds",)


def _expect_other_lengths(named: Mapping[str, Any], unnamed: Sequence[Any]) -> None:
    """Mark the sizes of ids, masks and positions, `[sequences, tokens]` or `[tokens]`, as different in the next call.
    A size of 1 stays a constant: Dynamo always specialises on it."""
    for name, value in (*named.items(), *(("", value) for value in unnamed)):
        if isinstance(value, torch.Tensor):
            counted = value.dim() <= 2 and not (value.is_floating_point() or value.is_complex())
            for dim in range(value.dim() if counted else 2 if name in _EMBEDDED else 0):
                expect_other_sizes(value, dim)
