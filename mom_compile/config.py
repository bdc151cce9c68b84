"""Options of the backend: frozen, validated, with all defaults in one place."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from mom_compile.quantities import parse_bytes
from mom_compile.runtime.host.placement import MEMORY, TIERS
from mom_compile.torch_compat.errors import UserError
from mom_compile.torch_compat.inductor import inductor_option_names, mode_options
from mom_passes.loops.loop import FEWEST_ROWS, RowLimit
from mom_passes.loops.stages import MOST_PRODUCTS

#: No model has more tokens; a larger number is a typing error.
MAX_MINI_SEQ_LEN = 1 << 30

#: The similarity from which a name counts as a misspelt option. `max_seq_len`, a usual model argument, is below it.
_SLIP = 0.9

SCOPES = ("layer", "mlp", "none")

KV_OFFLOAD = (True, False, "auto", *(name for name in TIERS if name != MEMORY))


@dataclass(frozen=True)
class Options:
    """Options of the backend, as in `torch.compile(..., backend="mom", options={...})`.

    `torch.compile` takes `mode=` or `options=`, not both. With options, write what the mode stands for:
    `options={"kv_offload": True, "inductor": torch._inductor.list_mode_options("max-autotune")}`.

    Attributes
    ----------
    mini_seq_len : int or "auto"
        Tokens per mini-sequence, at least 2. `"auto"`: a mini-sequence holds at most a tenth of what exists at full
        length, between the fewest rows that are efficient on a device and the most that help; on a GPU the most.
    scope : str
        `"layer"`: loops over everything between two attentions' keys and values. `"mlp"`: loops over MLPs and the LM
        head alone, as in the MOM paper, for comparison. `"none"`: stock Inductor.
    loop_products : int
        Matrix products, attentions and recurrences in the body of one loop. Where layers follow each other without an
        attention to all tokens, a loop has several of them; a larger one is cut between layers.
    kv_offload : bool or str
        `True`: the KV cache is kept in host memory. `"disk"`: in a file in `kv_dir`. `"auto"`: only the layers that do
        not fit into `memory_budget`. `False`: none.
    kv_dir : str, optional
        An existing, writable folder for `kv_offload="disk"`.
    memory_budget : int or str, optional
        Bytes of device memory for everything, weights included, as a number or a text such as `"24GiB"`. `None`: what
        the device has free; on a CPU, whose memory is the host's, all layers stay. A budget is kept by fewer rows
        first, then by moving layers; one that does not suffice is a `MemoryBudgetError`.
    decode_cuda_graphs : bool
        Whether pieces of a decode step between two attentions are recorded as CUDA graphs, if their shapes are the same
        in every step and their weights are on the device. Never run on a GPU.
    overlap_collectives : bool
        Whether a second mini-sequence of a loop computes while a collective of the first, such as the all-reduce of
        tensor parallelism, is under way.
    strict : bool
        Whether an error of this package raises instead of falling back to stock Inductor, and a piece that Inductor
        cannot compile raises instead of running eagerly.
    inductor : mapping
        Inductor options, passed through. A `mode` adds to them.
    progress : bool
        Whether compilations longer than a second are shown on standard error.
    """

    mini_seq_len: int | str = "auto"
    scope: str = "layer"
    loop_products: int = MOST_PRODUCTS
    kv_offload: bool | str = "auto"
    kv_dir: str | None = None
    memory_budget: int | str | None = None
    decode_cuda_graphs: bool = False
    overlap_collectives: bool = True
    strict: bool = False
    inductor: Mapping[str, Any] = field(default_factory=dict)
    #: Not in `repr`, which is part of the compile cache's keys.
    progress: bool = field(default=True, repr=False)

    def limit(self, device: str) -> RowLimit:
        """Return the row limit of a mini-sequence on a device type (`"cpu"`, `"cuda"`).

        With "auto" the number of rows is decided when the bytes per row are known: `memory/choose_rows.py`.
        """
        if self.mini_seq_len == "auto":
            return RowLimit(FEWEST_ROWS, fewest=True)
        return RowLimit(int(self.mini_seq_len))

    @property
    def budget_bytes(self) -> int | None:
        """The memory budget in bytes."""
        return None if self.memory_budget is None else parse_bytes(self.memory_budget)


def option_names() -> tuple[str, ...]:
    """Names of all options of the backend."""
    return tuple(f.name for f in fields(Options))


def meant_as_option(name: str) -> bool:
    """Whether a name looks like an option: a misspelt option of the backend, or an option of Inductor."""
    near = difflib.get_close_matches(name.lower(), option_names(), n=1, cutoff=_SLIP)
    return bool(near) or name in inductor_option_names()


def joined_options(options: object, named: Mapping[str, Any]) -> dict[str, Any]:
    """Merge the options of a mapping and those given by name. `parse_options` validates them.

    Raises `TypeError` for `options` that are not a mapping, and for an option that is given both ways.
    """
    given: dict[str, Any] = {}
    if isinstance(options, Mapping):
        given.update(options)
    elif options is not None:
        example = "write options={'kv_offload': True} or kv_offload=True"
        raise TypeError(f"options={options!r} is not a mapping; {example}")
    twice = sorted(given.keys() & named.keys(), key=str)
    if twice:
        raise TypeError(f"{_listed(twice)} given twice: in options={{...}} and by name; give each option once")
    return {**given, **named}


def parse_options(options: Mapping[str, Any] | None, mode: str | None = None) -> Options:
    """Validate the user's options. Raises `ValueError` with the valid values and the closest match."""
    given = dict(options or {})
    names = option_names()
    unknown = sorted(set(given) - set(names), key=str)
    if unknown:
        raise UserError(
            f"unknown option {_listed(unknown)} for backend 'mom'{_meant(unknown[0], names)}; "
            f"valid options are {_listed(names)}"
        )
    inductor = _inductor_options(given.get("inductor", {}), mode)
    parsed = Options(**{**given, "inductor": inductor})
    _check_mini_seq_len(parsed.mini_seq_len)
    if parsed.scope not in SCOPES:
        raise UserError(
            f"scope={parsed.scope!r} is not valid{_meant(parsed.scope, SCOPES)}; it is one of {_listed(SCOPES)}"
        )
    _check_loop_products(parsed.loop_products)
    _check_kv(parsed)
    for name in ("decode_cuda_graphs", "overlap_collectives", "strict", "progress"):
        value = getattr(parsed, name)
        if not isinstance(value, bool):
            raise UserError(f"{name}={value!r} is not valid; it is True or False")
    return parsed


def _check_mini_seq_len(value: Any) -> None:
    if value == "auto":
        return
    if isinstance(value, bool) or not isinstance(value, int) or not 2 <= value <= MAX_MINI_SEQ_LEN:
        raise UserError(
            f"mini_seq_len={value!r} is not valid; it is 'auto' or a whole number of tokens "
            f"from 2 to {MAX_MINI_SEQ_LEN} (Dynamo would specialise on a mini-sequence of one row)"
        )


def _check_loop_products(value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"loop_products={value!r} is not valid; it is a whole number of products, at least 1")


def _check_kv(options: Options) -> None:
    if options.kv_offload not in KV_OFFLOAD or isinstance(options.kv_offload, int) != isinstance(
        options.kv_offload, bool
    ):
        raise UserError(
            f"kv_offload={options.kv_offload!r} is not valid{_meant(options.kv_offload, KV_OFFLOAD)}; "
            f"it is one of {_listed(KV_OFFLOAD)}"
        )
    if options.memory_budget is not None:
        parse_bytes(options.memory_budget)
    in_a_folder = [name for name, tier in TIERS.items() if tier.needs_directory]
    if options.kv_offload in in_a_folder:
        if options.kv_dir is None:
            raise UserError(f"kv_offload={options.kv_offload!r} needs kv_dir, the folder for the files")
        if not os.path.isdir(options.kv_dir):
            raise UserError(f"kv_dir={options.kv_dir!r} is not a folder; it must exist")
        if not os.access(options.kv_dir, os.W_OK | os.X_OK):
            raise UserError(f"kv_dir={options.kv_dir!r} is not writable")
    elif options.kv_dir is not None:
        raise UserError(
            f"kv_dir requires kv_offload={' or '.join(map(repr, in_a_folder))}, but it is {options.kv_offload!r}"
        )


def _inductor_options(given: Any, mode: str | None) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise UserError(f"inductor={given!r} is not valid; it is a dictionary of Inductor options")
    merged = _options_of_mode(mode)
    known = inductor_option_names()
    for name, value in given.items():
        key = str(name).replace("-", "_")
        if key not in known:
            raise UserError(
                f"unknown Inductor option {name!r}{_meant(key, known)}; torch._inductor.list_options() lists them"
            )
        merged[key] = value
    return merged


def _options_of_mode(mode: str | None) -> dict[str, Any]:
    if mode in (None, "default"):
        return {}
    try:
        return mode_options(str(mode))
    except RuntimeError as error:
        raise UserError(f"mode={mode!r} is not valid: {error}") from None


def _meant(given: Any, valid: Iterable[Any]) -> str:
    """Suggest the closest valid value; or, for an Inductor option among ours, where it belongs."""
    if not isinstance(given, str):
        return ""
    names = [name for name in valid if isinstance(name, str)]
    near = difflib.get_close_matches(given.lower(), names, n=1)
    if near:
        return f" (did you mean {near[0]!r}?)"
    if "inductor" in names and given in inductor_option_names():
        return f" (it is an Inductor option: options={{'inductor': {{{given!r}: ...}}}})"
    return ""


def _listed(names: Any) -> str:
    return ", ".join(repr(name) for name in names)
