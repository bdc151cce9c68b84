"""Find the config of a model: from a folder, a config.json or the name of a shipped shape.

Nothing is downloaded, and no code shipped with a model is run: plans use transformers' own class of the model type.

    name or path -> JSON -> fields -> config of transformers -> its text part -> (config, name, notes)
"""

from __future__ import annotations

import copy
import difflib
import importlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from mom_compile.planning.shapes import find_shape, nearest_shape, shapes

CONFIG_NAME = "config.json"


class PlanError(ValueError):
    """A `ValueError`: a model, a device or a budget cannot be planned. The message says why and what to do."""


@dataclass(frozen=True)
class Found:
    """A transformers `config` (of the text model, without `quantization_config`), its name, and notes for the user."""

    config: Any
    name: str
    notes: tuple[str, ...] = ()
    quantization: Mapping[str, Any] | None = None


def find_config(model: str | Path) -> Found:
    """Return the config of a path or of a shipped shape's name. An existing path takes precedence.

    Raises `PlanError` if it does not exist, is not JSON, or is not of a model that transformers can build itself.
    """
    path = Path(model)
    if os.path.exists(path):
        file = _file_of(path)
        return of_fields(_read(file), file.resolve().parent.name or str(file), str(file))
    shape = find_shape(str(model))
    if shape is not None:
        return of_fields(dict(shape.config), shape.name, shape.name)
    raise PlanError(_not_there(str(model)))


def _file_of(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise PlanError(f"{path} is neither a folder nor a file")
    file = path / CONFIG_NAME
    if not file.is_file():
        others = sorted(entry.name for entry in path.glob("*.json"))
        there = f"; its JSON files are {', '.join(others[:4])}" if others else ""
        raise PlanError(
            f"the folder {path} has no {CONFIG_NAME}{there}; give the folder of a download or of save_pretrained, or "
            f"the file itself"
        )
    return file


def _not_there(model: str) -> str:
    near = nearest_shape(model)
    meant = "" if near is None else f" (did you mean {near!r}?)"
    known = f"shipped shapes are {', '.join(shapes())}"
    if model.count("/") == 1 and not model.startswith((".", "/", "~")) and not model.endswith(".json"):
        return (
            f"the folder {model!r} does not exist{meant}, and nothing is downloaded; `hf download {model} "
            f"{CONFIG_NAME} --local-dir FOLDER` fetches its config.json, and {known}"
        )
    return f"{model!r} is not a folder, a file or a shipped shape{meant}; {known}"


def _read(file: Path) -> dict[str, Any]:
    try:
        fields = json.loads(file.read_text("utf-8"))
    except OSError as error:
        raise PlanError(f"{file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise PlanError(f"{file} is not a config: it is not UTF-8 ({error.reason} at byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise PlanError(f"{file} is not JSON: {error.msg} in line {error.lineno}, column {error.colno}") from error
    except RecursionError:
        raise PlanError(f"{file} is not a config: it is nested too deeply") from None
    if not isinstance(fields, dict):
        raise PlanError(f"{file} is not a config: expected an object with named fields, got {_kind(fields)}")
    return fields


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def of_fields(fields: dict[str, Any], name: str, where: str) -> Found:
    """Return the config of a config.json's fields. `where` is its location, for messages."""
    library = _transformers()
    model_type = fields.get("model_type")
    if not isinstance(model_type, str):
        hint = "" if model_type is None else f" {model_type!r}, which is not a name"
        raise PlanError(f"{where} is not a transformers config: {_lacking(hint)}; every model's config.json has one")
    if model_type not in library.CONFIG_MAPPING:
        raise PlanError(_unknown_type(library, model_type, fields, where))
    notes = []
    if "auto_map" in fields:
        notes.append(f"the model's own code (auto_map) is not run: the plan uses transformers' {model_type}")
    given = {key: value for key, value in fields.items() if key not in ("auto_map", "quantization_config")}
    config = _built(library, model_type, given, where)
    whole, config = config, _text_part(config, where)
    if config is not whole:
        notes.append(f"{model_type} has parts other than its text model; the plan is for {config.model_type} only")
    nested = _quantization(config) if config is not whole else None
    if nested is not None:
        del config.quantization_config
    _check_decoder(library, config, where, whole)
    return Found(config, name, tuple(notes), fields.get("quantization_config") or nested)


def of_config(config: Any, name: str) -> Found:
    """Return the config for an existing transformers config. Raises `PlanError` unless it is of a decoder."""
    library = _transformers()
    if not isinstance(config, library.PretrainedConfig):
        raise PlanError(
            f"cannot plan a value of type {type(config).__name__}: give a folder, a config.json, the name of a shipped "
            "shape, a transformers config or a model that has one"
        )
    text = _text_part(config, name)
    notes = [] if text is config else [f"the plan is for its text model only, {text.model_type}"]
    given = _quantization(config) or _quantization(text)
    if _quantization(text) is not None:
        text = copy.deepcopy(text)
        del text.quantization_config
    _check_decoder(library, text, name, config)
    return Found(text, name, tuple(notes), given)


def _lacking(hint: str) -> str:
    return f"its model_type is{hint}" if hint else "it has no model_type"


def _unknown_type(library: ModuleType, model_type: str, fields: dict[str, Any], where: str) -> str:
    near = difflib.get_close_matches(model_type, list(library.CONFIG_MAPPING), n=3)
    meant = f"; the closest known types are {', '.join(near)}" if near else ""
    if "auto_map" in fields:
        return (
            f"{where}: transformers {library.__version__} has no model type {model_type!r}; the model ships its code "
            f"(auto_map), which is not run here. Install a version of transformers that has it{meant}"
        )
    return f"{where}: transformers {library.__version__} has no model type {model_type!r}{meant}"


def _built(library: ModuleType, model_type: str, fields: dict[str, Any], where: str) -> Any:
    try:
        return library.AutoConfig.for_model(**{**fields, "model_type": model_type})
    except Exception as error:  # config classes raise various errors for invalid values
        reason = " ".join(str(error).split()) or type(error).__name__
        raise PlanError(f"{where} is not a valid {model_type} config: {reason}") from error


def _text_part(config: Any, where: str) -> Any:
    try:
        return config.get_text_config(decoder=True)
    except ValueError as error:
        kind = config.model_type
        raise PlanError(f"{where}: {kind} has several text models; give the config of one: {error}") from error


def _quantization(config: Any) -> Mapping[str, Any] | None:
    """Return the fields of a config's `quantization_config`, which is a dictionary or an object in transformers."""
    given = getattr(config, "quantization_config", None)
    if given is None or isinstance(given, Mapping):
        return given
    return dict(given.to_dict())


#: Transformers' mappings of models with a text decoder besides other parts.
_MULTIMODAL = ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING", "MODEL_FOR_MULTIMODAL_LM_MAPPING")


def _check_decoder(library: ModuleType, config: Any, where: str, whole: Any) -> None:
    if config.is_encoder_decoder:
        raise PlanError(f"{where}: {config.model_type} is an encoder with a decoder; plans support only decoders")
    multimodal = any(type(whole) in getattr(library, name, ()) for name in _MULTIMODAL)
    if multimodal and config is not whole and type(config) in library.MODEL_MAPPING:  # see `planning.text_part`
        return
    if type(config) not in library.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise PlanError(f"{where}: transformers has no AutoModelForCausalLM for {config.model_type}")
    if type(config) in library.MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", True):
        raise PlanError(
            f"{where}: {config.model_type} is an encoder without a KV cache, and plans support only decoders; the "
            f"config of a model trained as a decoder has is_decoder=true"
        )


def _transformers() -> ModuleType:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise PlanError("configs are read with transformers: pip install transformers") from error
