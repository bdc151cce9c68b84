"""The model that a plan is of, on the meta device: no weights, no memory, and no more layers than have to be traced.

Terms
-----
kind       What tells a layer from others: its modules, the shapes of its parameters, its settings.
period     Layers repeat themselves, from some layer on, every so many: one by one mostly, 5 with a window and one
           without in Gemma 3. Of such a model two shorter ones are traced, one a period longer than the other: what a
           period adds to one it adds to all.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from mom_compile.planning.configs import PlanError
from mom_compile.planning.quantised import Scheme
from mom_compile.planning.weights import Weights, weights_of

#: Layers that the shorter one has at least, and periods behind the layers that do not repeat: its first and its last
#: layer are like no other, and what arrives for a layer does so while the one before computes.
FEWEST_LAYERS, FEWEST_PERIODS = 4, 2

#: Settings that count layers from the first one, or name a period: each layer has what follows from them.
_TOLD_BY_LAYERS = frozenset(
    {"num_hidden_layers", "max_window_layers", "n_layer", "num_layers", "n_layers", "num_dense_layers",
     "global_attn_every_n_layers"}
)  # fmt: skip
#: Settings that count layers which transformers does not build: those that predict further tokens, of DeepSeek-V3 say.
_NOT_BUILT = frozenset({"num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers"})


@dataclass(frozen=True)
class Subject:
    """`parameters` are counted once, `weight_bytes` with buffers; `longest` is how many positions the model was made
    for, None where it says nothing. `dtype` is that of what is not quantised, `stored` names both. `counts` are the
    layers of the models that are traced, `period` what lies between.
    """

    name: str
    model_type: str
    layers: int
    parameters: int
    weight_bytes: int
    longest: int | None
    dtype: str
    stored: str
    counts: tuple[int, ...]
    build: Callable[[int], nn.Module] = field(repr=False, compare=False)

    @property
    def periods(self) -> int:
        """By how many periods the model is longer than the shorter one that is traced."""
        return 0 if len(self.counts) == 1 else (self.layers - self.counts[0]) // (self.counts[1] - self.counts[0])


def subject_of(
    config: Any, name: str, dtype: torch.dtype | None, model_class: Any = None, scheme: Scheme | None = None
) -> tuple[Subject, Weights]:
    """The model of a config of transformers, in `dtype`, that of the config, or bfloat16; with a `scheme`, what that
    quantises takes the bytes that it says.

    Raises `PlanError` where transformers cannot build it.
    """
    chosen = dtype or getattr(config, "dtype", None) or torch.bfloat16
    config = copy.deepcopy(config)

    def build(layers: int) -> nn.Module:
        return _on_meta(_shortened(config, layers), chosen, model_class)

    whole = build(_layers_of(config))
    kinds, weights = _kinds(whole, _layers_of(config)), weights_of(whole, config, scheme)
    subject = Subject(
        name,
        str(config.model_type),
        _layers_of(config),
        sum(parameter.numel() for parameter in whole.parameters()),
        weights.all,
        getattr(config, "max_position_embeddings", None),
        str(chosen).removeprefix("torch."),
        f"{scheme.method} and {chosen}".replace("torch.", "") if weights.stored and scheme else str(chosen)[6:],
        _counts(kinds, config, build),
        build,
    )
    return subject, weights


def _layers_of(config: Any) -> int:
    return int(config.num_hidden_layers)


def _on_meta(config: Any, dtype: torch.dtype, model_class: Any) -> nn.Module:
    import transformers

    try:
        with torch.device("meta"):
            if model_class is not None:
                return model_class._from_config(config, dtype=dtype).eval()  # type: ignore[no-any-return]
            return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()  # type: ignore[no-any-return]
    except Exception as error:  # whatever a model raises for values that do not go together
        reason = " ".join(str(error).split()) or type(error).__name__
        raise PlanError(f"transformers cannot build this {config.model_type}: {reason}") from error


def _shortened(config: Any, layers: int) -> Any:
    """A config of the first layers; what it lists layer by layer is cut, too."""
    whole = _layers_of(config)
    if layers == whole:
        return copy.deepcopy(config)
    shorter = copy.deepcopy(config)
    for key, value in vars(shorter).items():
        if isinstance(value, list) and len(value) == whole:
            setattr(shorter, key, value[:layers])
    shorter.num_hidden_layers = layers
    return shorter


# --- which layers are alike ---


def _counts(kinds: Sequence[object] | None, config: Any, build: Callable[[int], nn.Module]) -> tuple[int, ...]:
    """The layers of the models to be traced: two, where that is shorter and they are as the whole one's."""
    layers = _layers_of(config)
    found = None if kinds is None or _counts_layers(config) else _period(kinds)
    if kinds is None or found is None:
        return (layers,)
    first, period = found
    rest = (layers - first) % period
    short = first + rest
    while short < max(FEWEST_LAYERS, first + FEWEST_PERIODS * period):
        short += period
    if short + period >= layers:
        return (layers,)
    try:
        alike = all(_kinds(build(n), n) == list(kinds[:n]) for n in (short, short + period))
    except PlanError:
        return (layers,)
    return (short, short + period) if alike else (layers,)


def _counts_layers(config: Any) -> bool:
    """Whether some setting counts layers from the end, say: those of a shorter model would then be others."""
    settings = {key: value for key, value in vars(config).items() if key.endswith("layers")}
    known = _TOLD_BY_LAYERS | _NOT_BUILT
    return any(isinstance(value, int) and value and key not in known for key, value in settings.items())


def _period(kinds: Sequence[object]) -> tuple[int, int] | None:
    """From which layer on they repeat themselves, and every how many: the pair with the smallest sum."""
    count = len(kinds)
    for total in range(1, count):
        for period in range(1, total + 1):
            first = total - period
            if all(kinds[i] == kinds[i + period] for i in range(first, count - period)):
                return first, period
    return None


def _kinds(model: nn.Module, layers: int) -> list[object] | None:
    """Of each layer, in order; None where it is not told which modules are layers."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == layers]
    return [_kind(layer) for layer in lists[0]] if lists else None


def _kind(layer: nn.Module) -> object:
    parameters = tuple((name, tuple(parameter.shape)) for name, parameter in layer.named_parameters())
    return parameters, tuple((name, type(module), _settings(module)) for name, module in layer.named_modules())


def _settings(module: nn.Module) -> tuple[tuple[str, object], ...]:
    plain = (str, int, float, bool, type(None))
    return tuple(
        (key, value)
        for key, value in sorted(vars(module).items())
        if isinstance(value, plain) and not key.startswith("_") and key not in ("layer_idx", "layer_id")
    )
