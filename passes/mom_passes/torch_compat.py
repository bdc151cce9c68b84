"""All private PyTorch APIs that read graphs, sizes and operators.

schema          An operator's signature: names, defaults, which arguments it writes to, which results may be views.
symbolic number A `SymInt`, `SymFloat` or `SymBool`: an expression, and its value at capture, the hint.
shape env       Owns the symbols of a captured graph. Comparing sizes through it adds guards.

Private APIs of Dynamo, AOTAutograd and Inductor are in `mom_compile.torch_compat`.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import sympy
import torch
from torch import fx, nn
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.utils._python_dispatch import _disable_current_modes, is_traceable_wrapper_subclass

#: FlexAttention: a higher-order operator; a captured graph passes its graphs as attributes.
FLEX_ATTENTION: Any = torch.ops.higher_order.flex_attention

#: `(graph, identifier, *operands) -> tuple`: calls a graph, which is traced once for all calls with an identifier.
INVOKE_SUBGRAPH: Any = torch.ops.higher_order.invoke_subgraph

#: `(event)`: counts the use of an API. In a graph it computes nothing and has no effect on other nodes.
LOGS_USAGE: Any = torch._C._log_api_usage_once

#: A context in which operators compute real tensors although a graph is being captured with fake ones.
without_modes: Any = _disable_current_modes

#: Numbers that depend on sizes.
SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


def graph_module(root: nn.Module, graph: fx.Graph, name: str = "GraphModule") -> fx.GraphModule:
    """Return a module of a graph that generates its Python code when it is first called or printed.

    Inductor's own graphs are of the same class (`_LazyGraphModule`). A `fx.GraphModule` generates the code of all its
    nodes when it is made and after each `recompile()`, and most graphs of the passes are never called.
    """
    return _LazyGraphModule(root, graph, name)


def schema_of(target: Any) -> Any:
    """The schema of an operator overload (`arguments`, `returns`, `is_mutable`); None for any other callable."""
    return getattr(target, "_schema", None)


def schemas_of(target: Any) -> list[Any]:
    """The schemas of an operator overload, or of all overloads of a packet; none for any other callable."""
    if isinstance(target, OpOverloadPacket):
        packet: Any = target  # `overloads` is not typed
        return [getattr(packet, name)._schema for name in packet.overloads()]
    schema = schema_of(target)
    return [] if schema is None else [schema]


def is_higher_order(target: Any) -> bool:
    """Whether an operator takes graphs."""
    return isinstance(target, HigherOrderOperator)


def is_from_elsewhere(target: Any) -> bool:
    """Whether an operator overload is neither PyTorch's nor this project's."""
    return isinstance(target, OpOverload) and target.namespace not in ("aten", "prims", "prim", "mom")


def is_wrapper(tensor: torch.Tensor) -> bool:
    """Whether a tensor is of a wrapper subclass, which AOTAutograd replaces by the tensors it wraps."""
    return bool(is_traceable_wrapper_subclass(tensor))


def storage_of(tensor: torch.Tensor) -> int:
    """The identity of a tensor's storage, also of a fake tensor, as long as the storage is alive."""
    return int(tensor.untyped_storage()._cdata)


def takes_sizes(argument: Any) -> bool:
    """Whether an argument of a schema accepts symbolic numbers, or lists of them."""
    kind = argument.real_type
    while isinstance(kind, (torch._C.OptionalType, torch._C.ListType)):
        kind = kind.getElementType()
    return isinstance(kind, (torch._C.SymIntType, torch._C.NumberType))


def packet_of(target: Any) -> Any:
    """The packet of an overload, `aten.add` for `aten.add.Tensor`; None for any other callable."""
    return getattr(target, "overloadpacket", None)


def expression_of(number: Any) -> sympy.Expr:
    """The expression of a symbolic number."""
    return number.node.expr


def hint_of(number: Any) -> Any:
    """The value of a symbolic number at capture; None if it depends on data."""
    return number.node.hint


def has_hint(number: Any) -> bool:
    return bool(number.node.has_hint())


def shape_env_of(number: Any) -> Any:
    return number.node.shape_env


def equalities_of(env: Any) -> list[tuple[sympy.Expr, sympy.Expr]]:
    """The equalities among the graph's guards, which are checked before the graph runs."""
    return [(guard.expr.lhs, guard.expr.rhs) for guard in env.guards if isinstance(guard.expr, sympy.Eq)]


def new_number(env: Any, value: sympy.Basic, kind: type, hint: Any) -> Any:
    """A symbolic number of `kind` (`bool`, `float` or `int`) for an expression in known symbols."""
    if kind is bool:
        return env.create_symboolnode(value)
    make = env.create_symfloatnode if kind is float else env.create_symintnode
    return make(value, hint=hint)


def fake_mode_of(value: Any) -> Any:
    """The mode of a fake tensor, None for anything else."""
    return getattr(value, "fake_mode", None)


def new_fake_mode() -> Any:
    """A mode in which operators compute only shapes and dtypes."""
    return FakeTensorMode()


def without_guards(mode: Any) -> AbstractContextManager[Any]:
    """A context in which comparisons of a fake mode's symbols add no guards."""
    return contextlib.nullcontext() if mode.shape_env is None else mode.shape_env.suppress_guards()


def collective(name: str) -> Any:
    """The operator of PyTorch's functional collectives with this name, `all_reduce` or `wait_tensor`; None if PyTorch
    was built without `torch.distributed`."""
    packet = getattr(torch.ops._c10d_functional, name, None)
    return None if packet is None else packet.default


def begin_collective(name: str, rows: torch.Tensor, *others: Any) -> torch.Tensor:
    """Begin a functional collective. Its result has no defined content before `wait_for_collective`.

    PyTorch 2.11 requires contiguous operands.
    """
    return collective(name)(rows.contiguous(), *others)  # type: ignore[no-any-return]


def wait_for_collective(result: torch.Tensor) -> torch.Tensor:
    """Wait for a functional collective; on a GPU, its stream waits."""
    return collective("wait_tensor")(result)  # type: ignore[no-any-return]


def rank_in(group: str) -> int:
    """The rank of this process in the process group with this name."""
    return int(torch._C._distributed_c10d._resolve_process_group(group).rank())  # type: ignore[arg-type]
