"""Small multimodal and encoder models, and a call of each without a processor: tensors of images or audio, and text
with as many placeholders as the model makes embeddings of them.

A type's `Recipe` has the settings that `small_configs` cannot know (the size of an image) and the inputs besides text.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto

from benchmarks.architectures_calls import Inputs, accepted, add_noise
from benchmarks.small_configs import Scale, small_config

SCALE = Scale(positions=16384, window=256, chunk=64)
#: Words before and after the placeholders; tokens of a decoder whose encoder reads the rest.
BEFORE, AFTER, DECODED = 200, 300, 300
PATCH = 8
MEL = 80
OPTIONS = {"mini_seq_len": 128}
NEW_TOKENS = 6


@dataclass(frozen=True)
class Recipe:
    """How to make a model and its call.

    settings    arguments of the configuration, given the number of patches of one side of a square image
    media       the inputs of images or audio, given the configuration and that number
    model_type  the type of the configuration, if it is not the recipe's name
    auto        the class that makes the model; by default the first mapping of transformers that has the type
    """

    settings: Callable[[int], Mapping[str, Any]] = lambda side: {}
    media: Callable[[Any, int], Inputs] = lambda config, side: {}
    model_type: str | None = None
    auto: str | None = None


@dataclass(frozen=True)
class Subject:
    """A model with its call. `decoder` is the name of the module that decodes text; None if there is none."""

    model: Any
    inputs: Inputs
    decoder: str | None = field(default=None)

    @property
    def generates(self) -> bool:
        return bool(self.model.can_generate())


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def _ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, SCALE.words, shape, generator=torch.Generator().manual_seed(seed))


def _image(side: int, **more: Any) -> dict[str, Any]:
    return {"vision_config": {"image_size": side * PATCH, "patch_size": PATCH, **more}}


def _square(config: Any, side: int) -> Inputs:
    return {"pixel_values": _random(1, 3, side * PATCH, side * PATCH)}


def _sized(config: Any, side: int) -> Inputs:
    return {**_square(config, side), "image_sizes": torch.tensor([[side * PATCH, side * PATCH]])}


def _of_a_prompt(config: Any, side: int) -> Inputs:
    """Images with a dimension for the prompt that they belong to."""
    return {"pixel_values": _random(1, 1, 3, side * PATCH, side * PATCH)}


def _tiles(config: Any, side: int) -> Inputs:
    """An image in two by two tiles, and once more as a whole in the size of a tile."""
    return {"pixel_values": _random(1, 5, 3, side // 2 * PATCH, side // 2 * PATCH),
            "image_sizes": torch.tensor([[side * PATCH, side * PATCH]])}  # fmt: skip


def _tiles_to_attend_to(config: Any, side: int) -> Inputs:
    """Four tiles that the text reads by cross-attention."""
    pixels = _random(1, 1, 4, 3, side // 2 * PATCH, side // 2 * PATCH)
    kind = torch.tensor([[config.vision_config.supported_aspect_ratios.index([2, 2]) + 1]])
    return {"pixel_values": pixels, "aspect_ratio_ids": kind, "aspect_ratio_mask": torch.ones(1, 1, 4).long(),
            "cross_attention_mask": torch.ones(1, BEFORE + AFTER, 1, 4).long()}  # fmt: skip


def _packed(config: Any, side: int) -> Inputs:
    """Patches of one image in rows, as Qwen2-VL has them."""
    vision = config.vision_config
    channels = 3 * vision.temporal_patch_size * vision.patch_size**2
    return {"pixel_values": _random(side * side, channels), "image_grid_thw": torch.tensor([[1, side, side]])}


def _placed(config: Any, side: int) -> Inputs:
    """Patches with a position each, as Gemma 4 has them."""
    x, y = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="xy")
    return {"pixel_values": _random(1, side * side, 3 * config.vision_config.patch_size**2),
            "image_position_ids": torch.stack([x, y], -1).reshape(1, -1, 2)}  # fmt: skip


def _audio(config: Any, side: int) -> Inputs:
    """Twice as many frames as an image has patches: a convolution with stride 2 halves them."""
    part = getattr(config, "audio_config", config)
    return {"input_features": _random(1, part.num_mel_bins, 2 * side * side)}


def _masked_audio(config: Any, side: int) -> Inputs:
    return {**_audio(config, side), "feature_attention_mask": torch.ones(1, 2 * side * side).long()}


def _frames(config: Any, side: int) -> Inputs:
    """Frames of a mel spectrogram, `[B, frames, mel]`."""
    return {"input_features": _random(1, side * side, config.encoder_config.input_dim)}


def _text(config: Any, side: int) -> Inputs:
    return {"input_ids": _ids(1, side * side)}


#: Sections of a head for time, height and width are as wide as half of it.
_SECTIONS = {
    "text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}
}
#: The sizes of a tower whose configuration has no defaults: another type's, or none.
_TOWER = {"hidden_size": 64, "intermediate_size": 224, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16}

TYPES: dict[str, Recipe] = {
    "llava": Recipe(_image, _square),
    "llava_next": Recipe(
        lambda side: {**_image(side // 2), "image_grid_pinpoints": [[side * PATCH, side * PATCH]]}, _tiles
    ),
    "gemma3": Recipe(lambda side: {**_image(side), "mm_tokens_per_image": (side // 2) ** 2}, _square),
    "qwen2_vl": Recipe(
        lambda side: {**_SECTIONS, "vision_config": {"embed_dim": SCALE.hidden, "patch_size": PATCH}}, _packed
    ),
    "qwen2_5_vl": Recipe(
        lambda side: {**_SECTIONS, **_image(side, window_size=8 * PATCH, fullatt_block_indexes=[1])}, _packed
    ),
    "qwen3_vl": Recipe(lambda side: {"vision_config": {"patch_size": PATCH, "deepstack_visual_indexes": [0]}}, _packed),
    "internvl": Recipe(
        lambda side: {"vision_config": {"image_size": [side * PATCH] * 2, "patch_size": [PATCH] * 2}}, _square
    ),
    "idefics2": Recipe(_image, _of_a_prompt),
    "idefics3": Recipe(_image, _of_a_prompt),
    "smolvlm": Recipe(_image, _of_a_prompt),
    "pixtral": Recipe(
        lambda side: {
            **_image(side, model_type="pixtral", **_TOWER),
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
        },
        _sized,
        "llava",
    ),
    "mistral3": Recipe(lambda side: {**_image(side), "image_token_index": SCALE.vocabulary - 1}, _sized),
    "paligemma": Recipe(
        lambda side: {
            **_image(side, projection_dim=SCALE.hidden),
            "projection_dim": SCALE.hidden,
            "text_config": {"num_image_tokens": side * side},
        },
        _square,
    ),
    "mllama": Recipe(
        lambda side: {
            **_image(side // 2, intermediate_layers_indices=[0], vision_output_dim=2 * SCALE.hidden),
            "text_config": {"num_hidden_layers": 3, "cross_attention_layers": [1]},
        },
        _tiles_to_attend_to,
    ),
    "gemma4": Recipe(
        lambda side: {
            "vision_config": {
                **_TOWER,
                "num_key_value_heads": 4,
                "patch_size": PATCH,
                "pooling_kernel_size": 2,
                "position_embedding_size": 256,
            }
        },
        _placed,
    ),
    "glm4v": Recipe(lambda side: {**_SECTIONS, **_image(side)}, _packed),
    "whisper": Recipe(lambda side: {"max_source_positions": side * side, "begin_suppress_tokens": None}, _audio),
    "qwen2_audio": Recipe(lambda side: {"audio_config": {"max_source_positions": side * side}}, _masked_audio),
    "voxtral": Recipe(
        lambda side: {
            "audio_token_id": SCALE.vocabulary - 1,
            "text_config": {"num_key_value_heads": 2, "head_dim": 16},
            "audio_config": {"max_source_positions": side * side, "intermediate_size": 4 * SCALE.hidden},
        },
        _audio,
    ),
    "granite_speech": Recipe(
        lambda side: {
            "has_lora_adapter": False,
            "encoder_config": {"hidden_dim": SCALE.hidden, "input_dim": MEL, "context_size": 64, "max_pos_emb": 64},
            "projector_config": {"encoder_hidden_size": SCALE.hidden},
        },
        _frames,
    ),
    "t5": Recipe(lambda side: {"decoder_start_token_id": 0}, _text),
    "bart": Recipe(media=_text),
    "qwen3 embedding": Recipe(media=_text, model_type="qwen3", auto="AutoModel"),
    "qwen3 reranker": Recipe(media=_text, model_type="qwen3", auto="AutoModelForSequenceClassification"),
    "modernbert": Recipe(media=_text, auto="AutoModel"),
}

_MAPPINGS = {
    "AutoModelForImageTextToText": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    "AutoModelForSpeechSeq2Seq": modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    "AutoModelForSeq2SeqLM": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
}


def build(name: str, side: int, dtype: torch.dtype = torch.float32) -> Subject:
    """Return a small model and its call with an image of `side` times `side` patches, or with as many tokens."""
    recipe = TYPES[name]
    model_type = recipe.model_type or name
    torch.manual_seed(0)
    auto = recipe.auto or next(auto for auto, names in _MAPPINGS.items() if model_type in names)
    config = small_config(model_type, SCALE, recipe.settings(side))
    model = add_noise(getattr(transformers, auto).from_config(config).eval().to(dtype))
    decoder = next((n for n, part in model.named_modules() if n and part is model.get_decoder()), None)
    return Subject(model, call(model, config, recipe.media(config, side)), decoder)


def call(model: Any, config: Any, media: Inputs) -> Inputs:
    """Return the inputs of a prefill: the media and text."""
    dtype = model.dtype
    media = {name: value.to(dtype) if value.is_floating_point() else value for name, value in media.items()}
    if getattr(config, "is_encoder_decoder", False):
        return {**media, **accepted(model, decoder_input_ids=_ids(1, DECODED, seed=1), use_cache=True)}
    if "input_ids" in media:
        return {**media, **accepted(model, attention_mask=torch.ones_like(media["input_ids"]))}
    token = placeholder(config)
    count = embeddings(model, media) if token is not None and "cross_attention_mask" not in media else 0
    ids = torch.cat([_ids(1, BEFORE), torch.full((1, count), token or 0), _ids(1, AFTER, seed=1)], 1)
    marked = torch.eq(ids, -1 if token is None else token).long()
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": marked,
            "token_type_ids": marked}  # fmt: skip
    return {**media, **accepted(model, **text, use_cache=True, logits_to_keep=1)}


def placeholder(config: Any) -> int | None:
    """Return the id of the token in place of which embeddings of media stand."""
    names = ("image_token_id", "image_token_index", "audio_token_id", "audio_token_index")
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


@torch.no_grad()
def embeddings(model: Any, media: Inputs) -> int:
    """Return the number of embeddings that a model makes of its media."""
    base = model.model if hasattr(model, "model") else model
    names = ("get_image_features", "get_audio_features")
    made = next((getattr(base, name) for name in names if hasattr(base, name)), None)
    if made is None:  # Qwen2-Audio: two strides of two
        return int(media["input_features"].shape[-1]) // 4
    taken = inspect.signature(made).parameters
    features = made(**{name: value for name, value in media.items() if name in taken})
    features = getattr(features, "pooler_output", features)
    parts = features if isinstance(features, (list, tuple)) else [features]
    return sum(part.numel() // part.shape[-1] for part in parts)


def generate(subject: Subject) -> tuple[list[int], Inputs]:
    """Return the new tokens of a greedy `generate()`, and the arguments of its first decode step.

    Since transformers 5.23, `generate()` calls the encoder of images, and any encoder of text, before it calls the
    model. A call of the whole model has to be made apart.
    """
    calls: list[Inputs] = []
    given = {name: value for name, value in subject.inputs.items() if isinstance(value, torch.Tensor)}
    hook = subject.model.register_forward_pre_hook(lambda model, args, given: calls.append(given), with_kwargs=True)
    try:
        ids = subject.model.generate(**given, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
    finally:
        hook.remove()
    return ids[0, -NEW_TOKENS:].tolist(), calls[1]
