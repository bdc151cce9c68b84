"""Inductor's options, back half and marks on nodes.

save_config_portable           Inductor's configuration as a dictionary
list_options                   the options of `torch.compile`; `list_mode_options`: those that a mode sets
compile_fx_inner               Inductor's back half, from an ATen graph to compiled code
lowerings, fallbacks           the operators that Inductor has code for; those of them that it calls as they are
_boxed_call                    tells AOTAutograd that a callable takes one list and may empty it
user_visible_output_idxs       outputs that Inductor returns with the strides of their fake values
inductor_realize_to_strides    makes Inductor store the value of a node (`fx_passes/decompose_mem_bound_mm.py`)
LoopBody.get_read_expr         the index expression with which a kernel reads a buffer
cache_dir                      the folder of Inductor's caches
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._inductor import config as inductor_config
from torch._inductor import list_mode_options, list_options
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.loop_body import LoopBody
from torch._inductor.lowering import fallbacks, lowerings
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch._ops import OpOverload

from mom_compile.torch_compat.scoped import replaced

# --- options ---

#: Inductor options of code whose inputs are checked elsewhere.
NO_SIZE_ASSERTS: Mapping[str, Any] = {"size_asserts": False}


def mode_options(mode: str) -> dict[str, Any]:
    """Return Inductor's options for a `torch.compile` mode. Raises `RuntimeError` for an unknown mode."""
    return dict(list_mode_options(mode))


def inductor_option_names() -> set[str]:
    return set(list_options())


def asks_for_freezing(patches: Mapping[str, Any]) -> bool:
    """Return whether `patches`, Inductor's configuration or the environment turn freezing on."""
    return bool(patches.get("freezing", inductor_config.freezing))


def compile_cache_folder() -> str:
    """Return the folder of Inductor's caches, and create it if needed. Raises `OSError`."""
    return cache_dir()


@dataclass(frozen=True)
class CodegenSettings:
    """All settings that decide which code Inductor generates for a graph.

    key       equal for settings that give the same code
    config    Inductor's configuration
    """

    key: str
    config: Mapping[str, Any]


#: Passes that a user gives Inductor, by name: `save_config_portable` leaves them out.
_CUSTOM_PASSES = (
    "post_grad_custom_pre_pass",
    "post_grad_custom_post_pass",
    "_pre_fusion_custom_pass",
    "_post_fusion_custom_pass",
    "_fuse_ddp_communication_passes",
)
#: Passes whose address is in a key. They are kept alive, so that no other object gets the address.
_seen_passes: dict[int, Any] = {}


def codegen_settings() -> CodegenSettings:
    """Return the current settings: what FxGraphCache has in its keys, without the graph and the machine."""
    config: dict[str, Any] = inductor_config.save_config_portable(ignore_private_configs=False)
    passes = {name: getattr(inductor_config, name, None) for name in _CUSTOM_PASSES}
    _seen_passes.update({id(value): value for value in passes.values()})
    switches = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
        torch.get_default_dtype(),
        torch.get_float32_matmul_precision(),
        torch.backends.cuda.matmul.fp32_precision,
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction,
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        torch.backends.mkldnn.enabled,
        # Generated C++ contains the number of threads.
        torch.get_num_threads(),
        torch.cuda.current_device() if torch.cuda.is_initialized() else None,
    )
    identities = {name: id(value) for name, value in passes.items() if value is not None}
    return CodegenSettings(repr((sorted(config.items()), identities, switches)), config)


@contextlib.contextmanager
def inductor_configured(settings: CodegenSettings) -> Iterator[None]:
    """Set Inductor's configuration to `settings.config` in the block.

    A piece that is compiled in a later run gets the configuration of the graph that it belongs to.
    """
    now = inductor_config.save_config_portable(ignore_private_configs=False)
    with inductor_config.patch({name: value for name, value in settings.config.items() if now.get(name) != value}):
        yield


# --- the back half ---


def compile_inner(gm: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Any:
    """Call Inductor's back half, with a correction to its C++ code generation.

    For a buffer that may become a local array, the C++ code generation calls `get_read_expr` on every user of the
    buffer. The users include kernels that only have to run later, for instance a write to an input that the buffer was
    computed from. Such a kernel does not read the buffer, and `get_read_expr` raises `KeyError`. The body of a loop
    writes to its inputs if the residual stream is updated in place. With None as the expression, the buffer gets
    storage.
    """
    read_expression = LoopBody.get_read_expr

    def read_expression_or_none(body: LoopBody, name: str) -> Any:
        try:
            return read_expression(body, name)
        except KeyError:
            return None

    with replaced(LoopBody, "get_read_expr", read_expression_or_none):
        return compile_fx_inner(gm, example_inputs, **kwargs)


def stock_inner_compile(gm: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Any:
    """Compile a graph as `backend="inductor"` does."""
    return compile_inner(gm, example_inputs, **kwargs)


def is_called(target: Any) -> bool:
    """Return whether Inductor has no code of its own for an operator and calls it as it is."""
    return isinstance(target, OpOverload) and (target not in lowerings or target in fallbacks)


# --- marks ---


def mark_boxed(fn: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
    """Tell AOTAutograd that `fn` takes one list and may empty it, so that inputs can be freed early."""
    fn._boxed_call = True  # type: ignore[attr-defined]
    return fn


def keep_output_strides(graph: fx.Graph) -> None:
    """Make Inductor return every output with the strides of its fake value, as it does for a user's outputs."""
    output = next(iter(reversed(graph.nodes)))
    output.meta["user_visible_output_idxs"] = list(range(len(output.args[0])))


def mark_stored(node: fx.Node) -> None:
    """Make Inductor store the value of a node, which each of its readers would otherwise recompute.

    FxGraphCache does not have the mark in its keys: an entry of an earlier version has the same results and is slower.
    """
    node.meta["inductor_realize_to_strides"] = True
