"""The tensor parallelism of transformers, planned for one rank: a model on the meta device is sharded as
`tp_plan="auto"` shards it, among ranks that do not exist.

Terms
-----
rank       A process with its own device. All ranks of a model hold parts of the same size, or rank 0 a larger one.
tp plan    transformers' table of a model's modules: `"layers.*.mlp.up_proj": "colwise"` is sharded by columns, and a
           module that the table lacks is whole on each rank.
group      The default process group. It exists only while a model is sharded or called.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from mom_compile.planning.configs import PlanError
from mom_compile.torch_compat.distributed import (
    has_default_group,
    is_sharded,
    local_part,
    mesh_of,
    stand_in_group,
)


class Ranks:
    """A number of ranks, and the process group that stands for them."""

    def __init__(self, count: int = 1) -> None:
        self.count = count
        self._within = False
        self._mesh: Any = None

    @contextlib.contextmanager
    def group(self) -> Iterator[None]:
        """The context in which sharded models are built and called. Nothing for a single rank.

        Raises `PlanError` if the process has a default group of its own.
        """
        if self.count == 1 or self._within:
            yield
            return
        if not torch.distributed.is_available():
            raise PlanError("tensor_parallel needs torch.distributed, which this build of PyTorch does not have")
        if has_default_group():
            raise PlanError(
                f"tensor_parallel={self.count} needs a process without a default process group, and this one has a "
                f"group of {torch.distributed.get_world_size()}; plan in a process of its own, or after "
                f"destroy_process_group()"
            )
        with stand_in_group(self.count):
            self._within = True
            try:
                yield
            finally:
                self._within = False

    def shard(self, model: nn.Module, *, callable: bool = True) -> nn.Module:
        """Shard a model on the meta device, in place and within the group, and return it.

        Parameters that a forward pass reads as local tensors become those, so that identical layers are traced once.
        Embeddings remain DTensors, unless the model need not be `callable`.
        """
        if self.count == 1:
            return model
        _untie(model)
        plan = self._plan(model)
        _check_heads(model, plan, self.count)
        styles, apply = _library()
        self._mesh = self._mesh or mesh_of(self.count)
        apply(model, self._mesh, plan)
        self._tie(model)
        with torch.no_grad():
            local = [
                module
                for name, module in model.named_modules()
                if not callable or (name in plan and styles[plan[name]].should_use_local_tensors(module))
            ]
        _make_local(local)
        return model

    def _tie(self, model: nn.Module) -> None:
        """Tie the weights of a sharded model. Raises `PlanError` if a sharded one is replaced by a whole one."""
        sharded = [name for name, parameter in model.named_parameters() if is_sharded(parameter)]
        model.tie_weights()  # type: ignore[operator]
        for name in sharded:
            if not is_sharded(model.get_parameter(name)):
                raise PlanError(
                    f"tensor_parallel={self.count}: transformers shards {name} of {_kind_of(model)} and ties it to a "
                    f"weight that it does not shard, which fails in a call; plan it without tensor_parallel"
                )

    def _plan(self, model: nn.Module) -> dict[str, str]:
        """Return the style of each module and parameter that transformers' plan has, by its full name."""
        if not getattr(model, "tp_plan", None):
            raise PlanError(
                f"tensor_parallel={self.count}: transformers has no tensor-parallel plan for {_kind_of(model)} (its "
                f"config class has no base_model_tp_plan); plan it without tensor_parallel"
            )
        from transformers.distributed.configuration_utils import DistributedConfig

        plan, *_ = model._resolve_parallel_plans(DistributedConfig(tp_size=self.count))  # type: ignore[operator]
        return dict(plan)


def checked_ranks(tensor_parallel: Any) -> Ranks:
    """Raises `PlanError` for a value that is not a number of ranks."""
    if isinstance(tensor_parallel, bool) or not isinstance(tensor_parallel, int) or tensor_parallel < 1:
        raise PlanError(
            f"tensor_parallel={tensor_parallel!r} is not valid; it is a number of ranks, 1 or more; 1 plans one device"
        )
    return Ranks(tensor_parallel)


def _kind_of(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))


def _make_local(modules: list[nn.Module]) -> None:
    """Replace DTensors among the modules' own parameters by this rank's parts, in place. Shared ones stay shared."""
    made: dict[int, nn.Parameter] = {}
    for module in modules:
        for name, parameter in module._parameters.items():
            if is_sharded(parameter):
                made.setdefault(id(parameter), nn.Parameter(local_part(parameter), requires_grad=False))
                module._parameters[name] = made[id(parameter)]


def _untie(model: nn.Module) -> None:
    """Give each module parameters of its own. transformers shards a model before it ties weights."""
    known: set[int] = set()
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in known:
                parameter = module._parameters[name] = nn.Parameter(torch.empty_like(parameter))
            known.add(id(parameter))


def _library() -> tuple[Any, Any]:
    try:
        from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES, apply_tensor_parallelism
    except ImportError as error:
        raise PlanError(f"tensor_parallel needs a newer transformers: {error}") from error
    return ALL_PARALLEL_STYLES, apply_tensor_parallelism


def _check_heads(model: nn.Module, plan: Mapping[str, str], ranks: int) -> None:
    """Raise `PlanError` if a rank would have part of a head: transformers replicates none and fails in the call."""
    modules = dict(model.named_modules())
    for name, style in plan.items():
        parent, _, own = name.rpartition(".")
        owner, module = modules.get(parent), modules.get(name)
        if style != "colwise" or not isinstance(module, nn.Linear) or "attention" not in type(owner).__name__.lower():
            continue
        what, heads = _heads(owner, module, own, model.config)
        if heads % ranks:
            valid = ", ".join(str(count) for count in range(1, heads + 1) if heads % count == 0)
            raise PlanError(
                f"tensor_parallel={ranks} does not divide the {heads} {what} of {name}, which transformers shards by "
                f"heads; numbers that divide them are {valid}"
            )


def _heads(owner: Any, module: nn.Linear, own: str, config: Any) -> tuple[str, int]:
    size = getattr(owner, "head_dim", None)
    if own in ("k_proj", "v_proj") and isinstance(size, int):
        return "key/value heads", module.out_features // size
    return "attention heads", int(config.num_attention_heads)
