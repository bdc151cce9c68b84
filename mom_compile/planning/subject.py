"""The model of a plan, on the meta device: without weights or memory, and with only the layers that must be traced.

Terms
-----
kind       What distinguishes layers: their modules, parameter shapes and settings.
period     From some layer on, the kinds of layers repeat with this period: usually 1; 6 in Gemma 3, with five windowed
           layers and one without. Two shorter models are traced that differ by one period. Their difference is what
           each further period adds.
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
from mom_compile.planning.ranks import Ranks
from mom_compile.planning.text_part import TextPart
from mom_compile.planning.weights import Weights, weights_of

#: The fewest layers of the shorter model, and the fewest periods after the layers that do not repeat: its first and
#: last layers are unlike others, and the weights of a layer are prefetched while the previous one computes.
FEWEST_LAYERS, FEWEST_PERIODS = 4, 2

#: Settings that count layers from the first, or give a period. The kinds of layers reflect them.
_VISIBLE_IN_LAYERS = frozenset(
    {"num_hidden_layers", "max_window_layers", "n_layer", "num_layers", "n_layers", "num_dense_layers",
     "global_attn_every_n_layers"}
)  # fmt: skip
#: Settings that count layers transformers does not build: those that predict further tokens, e.g. in DeepSeek-V3.
_NOT_BUILT = frozenset({"num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers"})


@dataclass(frozen=True)
class Subject:
    """`parameters` counts each parameter of the model once. `own_parameters` and `weight_bytes`, which includes
    buffers, are those of one of the `ranks` that share the model by tensor parallelism. `longest` is the number of
    positions of the model, None if the config has none. `dtype` is that of unquantised weights; `stored` also names the
    format of quantised ones. `counts` are the numbers of layers of the traced models.
    """

    name: str
    model_type: str
    layers: int
    parameters: int
    own_parameters: int
    weight_bytes: int
    longest: int | None
    dtype: str
    stored: str
    counts: tuple[int, ...]
    build: Callable[[int], nn.Module] = field(repr=False, compare=False)
    ranks: Ranks = field(default_factory=Ranks, repr=False, compare=False)

    @property
    def periods(self) -> int:
        """The number of periods that the model has more than the shorter traced model."""
        return 0 if len(self.counts) == 1 else (self.layers - self.counts[0]) // (self.counts[1] - self.counts[0])


def subject_of(
    config: Any, name: str, dtype: torch.dtype | None, model_class: Any = None, scheme: Scheme | None = None,
    ranks: Ranks | None = None,
) -> tuple[Subject, Weights]:  # fmt: skip
    """Return the model of a transformers config and its weights, in `dtype`, else the config's dtype, else bfloat16.

    `scheme` determines the bytes of quantised weights, `ranks` share the model.

    Raises `PlanError` if transformers cannot build or shard the model.
    """
    chosen = dtype or getattr(config, "dtype", None) or torch.bfloat16
    config, ranks = copy.deepcopy(config), ranks or Ranks()

    def whole_on_each_rank(layers: int) -> nn.Module:
        return build_on_meta(_shortened(config, layers), model_class, dtype=chosen)

    def build(layers: int) -> nn.Module:
        with ranks.group():
            return ranks.shard(whole_on_each_rank(layers))

    whole = whole_on_each_rank(_layers_of(config))
    parameters, kinds = sum(map(torch.numel, whole.parameters())), _kinds(whole, _layers_of(config))
    with ranks.group():
        ranks.shard(whole, callable=False)
    weights = weights_of(whole, config, scheme)
    subject = Subject(
        name,
        str(config.model_type),
        _layers_of(config),
        parameters,
        sum(map(torch.numel, whole.parameters())),
        weights.all,
        getattr(config, "max_position_embeddings", None),
        str(chosen).removeprefix("torch."),
        f"{scheme.method} and {chosen}".replace("torch.", "") if weights.stored and scheme else str(chosen)[6:],
        _counts(kinds, config, whole_on_each_rank),
        build,
        ranks,
    )
    return subject, weights


def _layers_of(config: Any) -> int:
    return int(config.num_hidden_layers)


def build_on_meta(config: Any, model_class: Any = None, **settings: Any) -> nn.Module:
    """Build a model without weights. Raises `PlanError` if transformers cannot build it."""
    import transformers

    known = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    make: Any = transformers.AutoModelForCausalLM.from_config if known else TextPart
    make = make if model_class is None else model_class._from_config
    try:
        with torch.device("meta"):
            return make(config, **settings).eval()  # type: ignore[no-any-return]
    except Exception as error:  # models raise various errors for inconsistent values
        reason = " ".join(str(error).split()) or type(error).__name__
        raise PlanError(f"transformers cannot build this {config.model_type}: {reason}") from error


def _shortened(config: Any, layers: int) -> Any:
    """Return a config of the first layers; lists with one entry per layer are cut too."""
    whole = _layers_of(config)
    if layers == whole:
        return copy.deepcopy(config)
    shorter = copy.deepcopy(config)
    for key, value in vars(shorter).items():
        if isinstance(value, list) and len(value) == whole:
            setattr(shorter, key, value[:layers])
    shorter.num_hidden_layers = layers
    return shorter


# --- repeating layers ---


def _counts(kinds: Sequence[object] | None, config: Any, build: Callable[[int], nn.Module]) -> tuple[int, ...]:
    """Return the layer counts of the models to trace: two if they have fewer layers together than the whole model, and
    the same kinds of layers."""
    layers = _layers_of(config)
    found = None if kinds is None or _counts_layers(config) else _period(kinds)
    if kinds is None or found is None:
        return (layers,)
    first, period = found
    rest = (layers - first) % period
    short = first + rest
    while short < max(FEWEST_LAYERS, first + FEWEST_PERIODS * period):
        short += period
    if 2 * short + period > layers:
        return (layers,)
    try:
        same = all(_kinds(build(n), n) == list(kinds[:n]) for n in (short, short + period))
    except PlanError:
        return (layers,)
    return (short, short + period) if same else (layers,)


def _counts_layers(config: Any) -> bool:
    """Whether a setting counts layers, e.g. from the end: a shorter model could then have other layers."""
    settings = {key: value for key, value in vars(config).items() if key.endswith("layers")}
    known = _VISIBLE_IN_LAYERS | _NOT_BUILT
    return any(isinstance(value, int) and value and key not in known for key, value in settings.items())


def _period(kinds: Sequence[object]) -> tuple[int, int] | None:
    """Return the first repeating layer and the period, with the smallest sum; None if layers do not repeat."""
    count = len(kinds)
    for total in range(1, count):
        for period in range(1, total + 1):
            first = total - period
            if all(kinds[i] == kinds[i + period] for i in range(first, count - period)):
                return first, period
    return None


def _kinds(model: nn.Module, layers: int) -> list[object] | None:
    """Return the kind of each layer; None if the layers cannot be identified."""
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
