"""Bytes of quantised weights, from the `quantization_config` of a checkpoint's config.json, or from a number of bits.

Terms
-----
format   How one matrix is stored: bits per value, and the size of scales and zeros.
scheme   The format of each matrix of a model. By default products with weights and banks of experts are quantised;
         embeddings, norms, routers and the head are not. Exclusions of the config are respected.
group    Values along a row that share a scale, and a zero if the format has zeros.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from typing import Any

#: Valid `weight_bits`; 16 and more would not be quantised.
BITS = (2, 3, 4, 5, 6, 8)
_GROUP = 128
#: Rows and columns of a block that covers a whole matrix.
_WHOLE = 1 << 30


class Role(Enum):
    """The kind of a parameter."""

    LINEAR = auto()
    BANK = auto()
    HEAD = auto()
    EMBEDDING = auto()
    OTHER = auto()


@dataclass(frozen=True)
class Format:
    """Bits per value, with a scale of `scale_bytes` and a zero of `zero_bits` for each `group` of a row's values (None:
    the row) or each `block` of rows and columns, and `index_bytes` for each column. `dequantised`: a product needs a
    dequantised copy of the matrix."""

    bits: int
    group: int | None = None
    scale_bytes: float = 2
    zero_bits: int = 0
    block: tuple[int, int] | None = None
    index_bytes: int = 0
    dequantised: bool = True

    def bytes(self, shape: Sequence[int]) -> int:
        """Return the bytes of a matrix `[..., rows, columns]`."""
        count, columns = math.prod(shape), shape[-1]
        matrices, rows = math.prod(shape[:-2]), shape[-2]
        if self.block is not None:
            scales = matrices * math.ceil(rows / self.block[0]) * math.ceil(columns / self.block[1])
        else:
            scales = matrices * rows * math.ceil(columns / (self.group or columns))
        bits = count * self.bits + scales * self.zero_bits
        return math.ceil(bits / 8 + scales * self.scale_bytes) + matrices * columns * self.index_bytes

    def __str__(self) -> str:
        per = "row" if self.group is None else f"{self.group} values"
        if self.block is not None:
            per = "matrix" if self.block[0] == _WHOLE else f"{self.block[0]} x {self.block[1]} block"
        zero = f" and a zero of {self.zero_bits} bits" if self.zero_bits else ""
        return f"{self.bits} bits, a scale of {8 * self.scale_bytes:g} bits{zero} for each {per}"


@dataclass(frozen=True)
class Scheme:
    """`targets` are patterns of module names and their formats, of which the first match counts; `skips` are patterns
    of modules that are not quantised. `method` is the name for reports."""

    method: str
    targets: tuple[tuple[str, Format], ...]
    skips: tuple[str, ...] = ()
    roles: frozenset[Role] = field(default=frozenset({Role.LINEAR, Role.BANK}))

    def format_of(self, name: str, role: Role) -> Format | None:
        """Return the format of a parameter; None if it is not quantised."""
        names = _modules(name, role)
        if role not in self.roles or any(_matches(skip, one) for skip in self.skips for one in names):
            return None
        return next((fmt for target, fmt in self.targets for one in names if _matches(target, one)), None)


class UnreadableError(ValueError):
    """A quantization_config does not determine the bytes of weights."""


def scheme_of(given: Mapping[str, Any]) -> Scheme:
    """Return the scheme of a `quantization_config`. Raises `UnreadableError` for an unknown one."""
    method = str(given.get("quant_method") or ("bitsandbytes" if _is_bitsandbytes(given) else "")).lower()
    method = method.replace("-", "_")
    if method not in _READERS:
        raise UnreadableError(f"the method {method!r} is not known" if method else "no method is named")
    try:
        return _READERS[method](given)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UnreadableError(f"the fields of {method} are not readable: {error}") from error


def scheme_of_bits(bits: int) -> Scheme:
    """Return a scheme with this number of bits for all products and experts.

    8 bits have a 16-bit scale for each row; fewer bits have a 16-bit scale and a zero for each 128 values.
    """
    if bits not in BITS:
        raise ValueError(f"weight_bits={bits!r} is not valid; it is one of {', '.join(map(str, BITS))}")
    fmt = Format(8) if bits == 8 else Format(bits, _GROUP, zero_bits=bits)
    return Scheme(f"weight_bits={bits}", ((_ALL, fmt),))


# --- names ---

_ALL = "re:.*"
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")


def _modules(name: str, role: Role) -> list[str]:
    """Return the names that a config may use for a parameter's module; for a bank, its experts' projections."""
    if role is not Role.BANK:
        return [name.rpartition(".")[0]]
    owner, _, own = name.rpartition(".")
    parts = [part for part in _PROJECTIONS if part in own] or [p for p in _PROJECTIONS if p != "down_proj"]
    parts = ["gate_proj", "up_proj"] if own.startswith("gate_up") else parts
    return [name, *(f"{owner}.0.{part}" for part in parts)]


def _matches(pattern: str, module: str) -> bool:
    """Whether a pattern names a module or one that contains it. `re:` starts an expression, `*` matches anything.

    `language_model` is ignored: it is the prefix of the text model within a multimodal model.
    """
    if pattern.startswith("re:"):
        return re.match(pattern[3:].replace("language_model\\.", ""), module) is not None
    plain = re.escape(pattern.replace("language_model.", "").removesuffix(".")).replace(r"\*", ".*")
    return re.search(rf"(?:^|\.)(?:{plain})(?:\.|$)", module) is not None


# --- methods ---


def _is_bitsandbytes(given: Mapping[str, Any]) -> bool:
    return bool(given.get("load_in_4bit") or given.get("load_in_8bit"))


def _bitsandbytes(given: Mapping[str, Any]) -> Scheme:
    """4 bits: a float32 maximum for each 64 values or, with double quantisation, a byte and a float32 for each 256 of
    these. 8 bits: a float32 for each row, and int8 products."""
    skips = tuple(given.get("llm_int8_skip_modules") or ())
    if given.get("load_in_8bit"):
        return Scheme("bitsandbytes", ((_ALL, Format(8, scale_bytes=4, dequantised=False)),), skips)
    if not given.get("load_in_4bit"):
        raise ValueError("neither load_in_4bit nor load_in_8bit")
    twice = given.get("bnb_4bit_use_double_quant")
    return Scheme("bitsandbytes", ((_ALL, Format(4, 64, scale_bytes=1 + 4 / 256 if twice else 4)),), skips)


def _gptq(given: Mapping[str, Any]) -> Scheme:
    """A float16 scale and a zero for each group, and an int32 group index for each column."""
    bits, group = _bits(given, "bits"), _group(given.get("group_size", _GROUP))
    inside = given.get("modules_in_block_to_quantize")
    fmt = Format(bits, group, zero_bits=bits, index_bytes=4)
    targets = tuple((part, fmt) for part in _flat(inside)) if inside else ((_ALL, fmt),)
    head = {Role.HEAD} if given.get("lm_head") else set()
    return Scheme("gptq", targets, _skips(given), frozenset({Role.LINEAR, Role.BANK, *head}))


def _awq(given: Mapping[str, Any]) -> Scheme:
    bits = _bits(given, "bits", "w_bit")
    group = _group(given.get("group_size", given.get("q_group_size", _GROUP)))
    zero = bits if given.get("zero_point", True) else 0
    return Scheme("awq", ((_ALL, Format(bits, group, zero_bits=zero)),), _skips(given))


def _fp8(given: Mapping[str, Any]) -> Scheme:
    """A float32 scale for each block, or for the whole matrix."""
    rows, columns = given.get("weight_block_size") or (_WHOLE, _WHOLE)
    fmt = Format(8, scale_bytes=4, block=(int(rows), int(columns)), dequantised=False)
    return Scheme("fp8", ((_ALL, fmt),), _skips(given))


def _fbgemm_fp8(given: Mapping[str, Any]) -> Scheme:
    return Scheme("fbgemm_fp8", ((_ALL, Format(8, scale_bytes=4, dequantised=False)),), _skips(given))


def _mxfp4(given: Mapping[str, Any]) -> Scheme:
    """Only banks of experts: one byte of scale for each 32 values."""
    fmt = Format(4, 32, scale_bytes=1, dequantised=False)
    return Scheme("mxfp4", ((_ALL, fmt),), _skips(given), frozenset({Role.BANK}))


def _compressed_tensors(given: Mapping[str, Any]) -> Scheme:
    """One format per group of modules. A target is a module name, or the class Linear for all products."""
    targets = []
    for group in given["config_groups"].values():
        weights = group["weights"]
        bits = int(weights["num_bits"])
        zero = 0 if weights.get("symmetric", True) else bits
        strategy, size = weights.get("strategy") or "channel", _group(weights.get("group_size"))
        # NVFP4 scales have one byte each.
        small = size == 16 and bits == 4 and weights.get("type") == "float"
        fmt = Format(bits, scale_bytes=1 if small else 2, zero_bits=zero, dequantised=bits < 8)
        if strategy in ("group", "tensor_group"):
            fmt = replace(fmt, group=size)
        elif strategy in ("block", "tensor"):
            rows, columns = weights.get("block_structure") or (_WHOLE, _WHOLE)
            fmt = replace(fmt, block=(int(rows), int(columns)))
        targets += [(_ALL if target == "Linear" else target, fmt) for target in group["targets"]]
    targets.sort(key=lambda item: item[0] == _ALL)  # names before the class
    roles = frozenset({Role.LINEAR, Role.BANK, Role.HEAD})  # an unquantised head is named in `ignore`
    return Scheme("compressed-tensors", tuple(targets), tuple(given.get("ignore") or ()), roles)


def _modelopt(given: Mapping[str, Any]) -> Scheme:
    algorithm = str(given["quant_algo"]).upper()
    formats = {
        "FP8": Format(8, scale_bytes=4, block=(_WHOLE, _WHOLE), dequantised=False),
        "NVFP4": Format(4, 16, scale_bytes=1, dequantised=False),
    }
    return Scheme(f"modelopt {algorithm}", ((_ALL, formats[algorithm]),), tuple(given.get("ignore") or ()))


#: Bits of each torchao configuration, and its group size if it has groups.
_TORCHAO = {
    "int4weightonly": (4, _GROUP), "int8dynamicactivationint4weight": (4, 32), "int8weightonly": (8, None),
    "int8dynamicactivationint8weight": (8, None), "float8weightonly": (8, None),
    "float8dynamicactivationfloat8weight": (8, None), "float8dynamicactivationint4weight": (4, _GROUP),
}  # fmt: skip


def _torchao(given: Mapping[str, Any]) -> Scheme:
    """A name such as "int4_weight_only", or a configuration as serialised by torchao."""
    kind, settings = given["quant_type"], given.get("quant_type_kwargs") or {}
    if isinstance(kind, Mapping):
        inner = kind.get("default", kind)
        kind, settings = inner["_type"], inner.get("_data") or {}
    plain = re.sub("[^a-z0-9]", "", kind.lower()).removesuffix("config")
    bits, group = _TORCHAO[plain]
    group = _group(settings.get("group_size", group))
    # Scale and zero of 4 bits are bfloat16. Products of two 8-bit operands need no copy.
    fmt = Format(bits, group, zero_bits=16 if bits == 4 else 0, dequantised="dynamic" not in plain)
    both = {Role.HEAD, Role.EMBEDDING} if given.get("include_input_output_embeddings") else set()
    return Scheme(f"torchao {kind}", ((_ALL, fmt),), _skips(given), frozenset({Role.LINEAR, Role.BANK, *both}))


def _quanto(given: Mapping[str, Any]) -> Scheme:
    bits = {"int2": 2, "int4": 4, "int8": 8, "float8": 8}[str(given["weights"])]
    fmt = Format(bits, None if bits == 8 else _GROUP, zero_bits=0 if bits == 8 else bits)
    return Scheme("quanto", ((_ALL, fmt),), _skips(given))


def _hqq(given: Mapping[str, Any]) -> Scheme:
    inner = given["quant_config"]["weight_quant_params"]
    fmt = Format(int(inner["nbits"]), _group(inner.get("group_size")), zero_bits=16)
    return Scheme("hqq", ((_ALL, fmt),), _skips(given))


_READERS: dict[str, Callable[[Mapping[str, Any]], Scheme]] = {
    "bitsandbytes": _bitsandbytes, "gptq": _gptq, "awq": _awq, "fp8": _fp8, "fbgemm_fp8": _fbgemm_fp8,
    "mxfp4": _mxfp4, "compressed_tensors": _compressed_tensors, "modelopt": _modelopt, "torchao": _torchao,
    "quanto": _quanto, "hqq": _hqq,
}  # fmt: skip


def _bits(given: Mapping[str, Any], *names: str) -> int:
    bits = next((given[name] for name in names if name in given), None)
    if not isinstance(bits, int) or not 1 <= bits <= 8:
        raise ValueError(f"bits are {bits!r}")
    return bits


def _group(size: Any) -> int | None:
    """Return the group size; -1 and null mean a row."""
    return None if size is None or int(size) < 1 else int(size)


def _skips(given: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(given.get("modules_to_not_convert") or ())


def _flat(names: Any) -> list[str]:
    return [one for name in names for one in (name if isinstance(name, list) else [name])]

