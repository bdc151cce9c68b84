"""Why the passes skip a graph, which then goes to stock Inductor as it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from mom_compile.config import Options
from mom_compile.report.reasons import Reason
from mom_passes.attention.flex import is_read_by_flex_alone
from mom_passes.graph.data_dependent import origin_of_unknown_number
from mom_passes.graph.edit import attribute, copy_graph
from mom_passes.graph.values import tensors_of
from mom_passes.rules.work import products
from mom_passes.source_lines import with_source_line
from mom_passes.tokens.masked_rows import masked_rows
from mom_passes.torch_compat import collective


def why_stock(gm: fx.GraphModule, options: Options, kwargs: Mapping[str, Any]) -> str | None:
    """Return why the passes skip a graph, or None."""
    if options.scope == "none":
        return Reason.ASKED_FOR
    if not kwargs.get("is_inference"):
        return Reason.NEEDS_GRADIENTS
    if kwargs.get("cpp_wrapper") or kwargs.get("aot_mode"):
        return Reason.AHEAD_OF_TIME
    return _unsupported(gm)


def _unsupported(gm: fx.GraphModule) -> str | None:
    """Return what the passes do not support in a graph, by name, or None."""
    devices: dict[torch.device, None] = {}
    exchange = collective("all_to_all_single")
    for node in gm.graph.nodes:
        if node.op == "call_module" or (
            node.op == "get_attr"
            and isinstance(attribute(gm, str(node.target)), torch.nn.Module)
            and not is_read_by_flex_alone(gm, node)
        ):
            users = ", ".join(f"{user.name} ({user.target})" for user in node.users) or node.name
            return with_source_line(f"{users} calls a graph of its own, {node.target}", next(iter(node.users), node))
        if node.op == "call_function" and node.target is exchange:
            return with_source_line(
                f"{node.name} exchanges rows between ranks, and how many may depend on data (expert parallelism of "
                "transformers does without: ep_implementation='all_reduce')", node
            )  # fmt: skip
        devices.update(dict.fromkeys(value.device for value in tensors_of(node)))
    unknown = _origin_of_unknown_number(gm)
    if unknown is not None:
        return with_source_line(_depends_on_data(unknown), unknown)
    if torch.device("meta") in devices:
        return "tensors on the meta device have no data: nothing to run (`explain(model, ...)` plans such a model)"
    accelerators = sorted(str(device) for device in devices if device.type != "cpu")
    if len(accelerators) > 1:
        return f"the graph computes on several accelerators: {', '.join(accelerators)}"
    return None


def _origin_of_unknown_number(gm: fx.GraphModule) -> fx.Node | None:
    """Return the first source of an unknown number that matrix products depend on, also after masked writes became
    gathers."""
    found = origin_of_unknown_number(gm.graph, products(gm.graph))
    if found is None:
        return None
    rewritten = copy_graph(gm)
    masked_rows(rewritten)
    return found if origin_of_unknown_number(rewritten.graph, products(rewritten.graph)) is not None else None


def _depends_on_data(node: fx.Node) -> str:
    """Name a number that matrix products depend on and that is unknown at capture, and say what to do."""
    if node.op == "placeholder":
        return f"a size of {node.name} is marked as unbacked; mark it with torch._dynamo.mark_dynamic in place of that"
    if node.target is torch.ops.aten._local_scalar_dense.default:
        return (
            f"{node.name} reads a number off a tensor (.item()), and matrix products depend on it; read it outside of "
            "the compiled function and pass it, compute with the tensor in place of the number, or set "
            "torch._dynamo.config.capture_scalar_outputs = False, which breaks the graph there"
        )
    return (
        f"{node.name} ({node.target}) makes sizes depend on data, and matrix products depend on these; call it outside "
        "of the compiled function"
    )
