"""Small configurations of any decoder of transformers, made by one function.

Terms
    scale      the sizes: widths, heads, experts, windows, in proportion to each other
    kind       the type of a layer: its entries in all lists that have one for each layer (attention, MLP, ...)
    exception  what field names do not show, with its reason (`small_configs.toml`)

    defaults of the type -> every number whose name shows what it counts, by SIZES
                         -> one layer of each kind
                         -> exceptions

No type is known by name: what a field counts follows from the field's name.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

_EXCEPTIONS = Path(__file__).with_suffix(".toml")


@dataclass(frozen=True)
class Scale:
    """Sizes of a small model.

    Ids of prompts are below `words`; those of images and other media are above. A model whose layers are of one kind
    has `layers` of them.
    """

    hidden: int = 64
    heads: int = 4
    vocabulary: int = 320
    words: int = 280
    positions: int = 256
    window: int = 16
    chunk: int = 16
    experts: int = 4
    chosen: int = 2
    layers: int = 2
    most_layers: int = 4

    @property
    def inner(self) -> int:
        return self.hidden * 7 // 2

    @property
    def head(self) -> int:
        return self.hidden // self.heads


#: Scale of tests: the minimum, so that 50 tokens cross windows and chunks.
SMALL = Scale()
#: Scale of memory measurements: proportions of real models, and windows shorter than the prompt.
REALISTIC = Scale(hidden=256, vocabulary=4096, words=4000, positions=4096, window=512, chunk=64, experts=8)

#: Given the scale, the default of the field and the defaults of its neighbours: the small value.
Rule = Callable[[Scale, int, Mapping[str, Any]], int]


def _of(size: Callable[[Scale], int]) -> Rule:
    return lambda scale, default, fields: size(scale)


def _at_most(size: Callable[[Scale], int]) -> Rule:
    return lambda scale, default, fields: min(default, size(scale))


def _width(scale: Scale, default: int, fields: Mapping[str, Any]) -> int:
    """Keep the ratio to the hidden size: twice the hidden size stays twice."""
    hidden = fields.get("hidden_size")
    return 2 * scale.hidden if isinstance(hidden, int) and default == 2 * hidden else scale.hidden


def _heads(scale: Scale, default: int, fields: Mapping[str, Any]) -> int:
    """Return the number of heads; of a state-space model that expands its width, the heads of the expanded width."""
    return 2 * scale.heads if "expand" in fields and "num_attention_heads" not in fields else scale.heads


def _key_heads(scale: Scale, default: int, fields: Mapping[str, Any]) -> int:
    """Return as many as query heads, one, or a number in between, as the type has it."""
    names = ("num_attention_heads", "n_heads", "linear_num_value_heads")
    if default in [fields.get(name) for name in names]:
        return scale.heads
    return 1 if default == 1 else scale.heads // 2


#: The first pattern that matches the whole field name sets its value. Zero and None stay: they mean "none".
SIZES: tuple[tuple[str, Rule], ...] = tuple(
    (re.sub(r"\s+", "", names), rule)
    for names, rule in (
        (r"type_vocab_size|task_type_vocab_size|.*hash.*", lambda scale, default, fields: default),
        (r"(?:.*_)?vocab_size(?:_.*)?", _of(lambda s: s.vocabulary)),
        (r"hidden_size_per_layer_input", _of(lambda s: s.head)),
        (r"""hidden_size|d_model|n_embd|emb_dim|embedding_dim|embedding_size|word_embed_proj_dim|hidden_size_global
             |input_embedding_size|output_embedding_size|lru_width|attention_hidden_size|backbone_hidden_size
             |out_hidden_size|projector_(?:in|out)put_dim|ple_embed_dim|.*_embed_dim|adapter_out_dim""", _width),
        (r"embed_dim", _at_most(lambda s: s.hidden)),  # of a decoder, or of something narrower
        (r"""moe_.*intermediate_size|expert_ffn_hidden_size""", _of(lambda s: s.inner // 2)),
        (r""".*intermediate_size.*|.*ffn_dim|dim_ff|d_ff|dff|d_inner|ffn_hidden_size|feed_forward_size|mlp_dim""",
         _of(lambda s: s.inner)),
        (r"num_key_value_heads|num_kv_heads|kv_n_heads|swa_num_key_value_heads|linear_num_key_heads|num_query_groups",
         _key_heads),
        (r"mamba_n_heads|mamba_num_heads|n_mamba_heads", _of(lambda s: 2 * s.heads)),
        (r"attention_head_dim", _of(lambda s: 2 * s.head)),
        (r"""(?:.*_)?num_attention_heads|num_(?:en|de)coder_attention_heads|(?:en|de)coder_attention_heads|n_heads?
             |num_heads|attention_heads|linear_num_heads|linear_num_value_heads|index_n_heads""", _heads),
        (r"qk_rope_head_dim|rotary_dim", _of(lambda s: s.head // 2)),
        (r"""head_dim|swa_head_dim|d_head|dim_head|d_kv|attention_head_size|kv_channels|linear_.*head_dim
             |index_head_dim|v_head_dim|qk_nope_head_dim|mamba_(?:d_head|head_dim|headdim)|global_head_dim""",
         _of(lambda s: s.head)),
        (r"mamba_d_ssm", _of(lambda s: 2 * s.hidden)),
        (r"mamba_d_state|state_size|ssm_state_size", _of(lambda s: 16)),
        (r"time_step_rank|mamba_dt_rank", _of(lambda s: 4)),
        (r"n_groups|mamba_n_?groups", _at_most(lambda s: 2)),
        (r"(?:.*_)?(?:lora_rank|lowrank|_rank|adapter_rank)|laurel_rank", _of(lambda s: s.head)),
        (r"(?:mamba_)?chunk_size|(?:lsh|local)_attn_chunk_length|block_size", _of(lambda s: s.chunk)),
        (r"""num_hidden_layers|n_layers?|num_layers|layers|(?:en|de)coder_layers|num_(?:en|de)coder_layers|depth|num_blocks
             |num_global_layers""", _of(lambda s: s.layers)),
        (r"first_k_dense_replace|num_dense_layers|max_window_layers|.*attn_layer_offset", _at_most(lambda s: 1)),
        (r"""attn_layer_period|layer_group_size|global_attn_every_n_layers|no_rope_layer_interval
             |sliding_window_pattern|num_layers_per_stack|n_layers_per_attn_res_block""", _at_most(lambda s: 2)),
        (r"sliding_window|sliding_window_size|attention_window_size|window_size|local_attention|attention_chunk_size"
         r"|keep_window_size|local_attention_window_len", _of(lambda s: s.window)),
        (r"index_topk", _of(lambda s: s.window // 2)),
        (r"index_block_size", _of(lambda s: s.window // 4)),
        (r"index_topk_blocks", _of(lambda s: 2)),
        (r"num_experts_per_tok(?:en)?|moe_k|moe_top_?k|top_k_experts", _at_most(lambda s: s.chosen)),
        (r"n_shared_experts|(?:moe_)?num_shared_experts", _at_most(lambda s: 1)),
        (r"(?:.*_)?num_(?:local_)?experts|n_routed_experts|zero_expert_num", _at_most(lambda s: s.experts)),
        (r"n_group|num_expert_group", _at_most(lambda s: 2)),
        (r"topk_group", _at_most(lambda s: 1)),
        (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_(?:source|target)_positions|context_length"
         r"|model_max_length", _of(lambda s: s.positions)),
    )
)  # fmt: skip
#: Fields that models read although their default is None.
_NEEDED = frozenset({"head_dim", "num_experts_per_tok", "num_key_value_heads", "n_routed_experts", "n_shared_experts"})
_MANY = 1 << 20
#: Ids of tokens that are no words.
_TOKEN_ID = re.compile(r".*token_(?:id|index)|.*_start_n_top")
_OWN_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def exceptional_types() -> list[str]:
    """Return the types that have exceptions."""
    return list(tomllib.loads(_EXCEPTIONS.read_text()))


def exceptions(model_type: str) -> dict[str, Any]:
    """Return the exceptions of a type, with `why`, and `skip` if it is not run at all."""
    return dict(tomllib.loads(_EXCEPTIONS.read_text()).get(model_type, {}))


def small_config(model_type: str, scale: Scale = SMALL, more: Mapping[str, Any] | None = None) -> PretrainedConfig:
    """Return a configuration of this type at this scale, with a layer of each kind. `more` are other arguments.

    Raises whatever the type's own class raises.
    """
    config_class = CONFIG_MAPPING[model_type]
    own = exceptions(model_type)
    start = own.get("start", {})  # some have no default that they accept themselves
    settings = small_settings(config_class(**start), scale)
    return config_class(**_merged(_merged({**start, **settings}, own.get("set", {})), more or {}))


def small_settings(config: PretrainedConfig, scale: Scale) -> dict[str, Any]:
    """Return the arguments of a small configuration and of its parts. What the class computes itself is left out."""
    fields = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    parts = {name: value for name, value in fields.items() if isinstance(value, PretrainedConfig)}
    settings: dict[str, Any] = {name: small_settings(part, scale) for name, part in parts.items()}
    declared = _declared(type(config))
    for name, value in fields.items():
        known = declared.get(name) is not None or (value is None and name in _NEEDED and name in declared)
        if known and (value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0)):
            small = _small(name, value or _MANY, fields, scale)
            if small is not None:
                settings[name] = small
    settings.update(_layers_of_each_kind(fields, scale))
    settings.update(_token_ids(fields, scale))
    if "is_decoder" in fields:
        settings["is_decoder"] = True
    return settings


def _declared(config_class: type[PretrainedConfig]) -> dict[str, Any]:
    """Return the arguments of a class with their defaults."""
    if not dataclasses.is_dataclass(config_class):  # before transformers made them dataclasses
        return {p.name: p.default for p in inspect.signature(config_class.__init__).parameters.values()}
    return {field.name: field.default for field in dataclasses.fields(config_class)}  # type: ignore[arg-type]


def _small(name: str, value: int, fields: Mapping[str, Any], scale: Scale) -> int | None:
    for names, rule in SIZES:
        if re.fullmatch(names, name):
            return rule(scale, value, fields)
    return None


def _layers_of_each_kind(fields: Mapping[str, Any], scale: Scale) -> dict[str, Any]:
    """Return the number of layers, and the entries of lists that have one for each: the first layer of each kind.

    Layers that share the keys of others need these others, so every kind is there twice then.
    """
    name = next((name for name in _LAYERS if isinstance(fields.get(name), int)), None)
    if name is None:
        return {}
    count = fields[name]
    lists = {k: v for k, v in fields.items() if isinstance(v, (list, tuple)) and len(v) == count and count > 1}
    if not lists:
        return {}
    kinds: dict[str, int] = {}
    for layer in range(count):
        kinds.setdefault(repr([values[layer] for values in lists.values()]), layer)
    chosen = list(kinds.values())[: scale.most_layers]
    chosen *= scale.layers if len(chosen) == 1 else 1
    settings: dict[str, Any] = {}
    if fields.get("num_kv_shared_layers"):
        settings["num_kv_shared_layers"] = len(chosen)
        chosen = chosen * 2
    settings[name] = len(chosen)
    for key, values in lists.items():
        settings[key] = [_entry(key, values[layer], scale, fields) for layer in chosen]
    return settings


def _entry(name: str, value: Any, scale: Scale, fields: Mapping[str, Any]) -> Any:
    """Return a layer's entry, which may itself be a size."""
    if isinstance(value, int) and not isinstance(value, bool) and value > 1:
        small = _small(name.removesuffix("_per_layer"), value, fields, scale)
        return value if small is None else small
    return value


def _token_ids(fields: Mapping[str, Any], scale: Scale) -> dict[str, Any]:
    """Set padding, beginning and end to the first ids, and all other special tokens to ids that no prompt has."""
    settings: dict[str, Any] = {}
    last = scale.vocabulary - 1
    for name, value in fields.items():
        if name in _OWN_IDS:
            settings[name] = _OWN_IDS[name]
        elif _TOKEN_ID.fullmatch(name) and isinstance(value, int) and value >= scale.words:
            settings[name] = last
            last -= 1
    return settings


def _merged(settings: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    for name, value in changes.items():
        nested = isinstance(value, Mapping) and isinstance(settings.get(name), dict)
        settings[name] = _merged(settings[name], value) if nested else value
    return settings
