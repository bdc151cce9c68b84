"""`load_offloaded`: load a transformers checkpoint whose weights stay in its files until they are used."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from mom_compile.weights.checkpoint import Checkpoint
from mom_compile.weights.offload import offload_weights


def load_offloaded(
    path: str | Path,
    device: torch.device | str,
    *,
    memory_budget: int | str | None = None,
    dtype: torch.dtype | str = "auto",
    keep: Collection[str] = (),
    tp_plan: str | Mapping[str, str] | None = None,
    distributed_config: Any = None,
    **config: Any,
) -> Any:
    """Load a checkpoint of transformers whose weights stay in its files as far as they exceed `memory_budget`.

    Weights that stay are mapped from the safetensors files and read when they are used. Weights that transformers
    changes (another `dtype`, experts that it concatenates) are held in host memory. No code of the folder is run, and
    nothing is downloaded.

    Parameters
    ----------
    path : str or Path
        A local folder with `config.json` and safetensors files.
    device : torch.device or str
        Where the model computes, as in `offload_weights`.
    memory_budget : int or str, optional
        Bytes of the device for weights, as in `offload_weights`.
    dtype : torch.dtype or str
        The dtype of the weights; `"auto"` takes that of the checkpoint.
    keep : collection of str
        Names of modules or parameters that always go to the device.
    tp_plan, distributed_config
        Tensor or expert parallelism, as in transformers' `from_pretrained`. Each rank has its part of each weight on
        its host, and `memory_budget` is a rank's. Parts are held in host memory; they are not mapped.
    **config
        Values that replace those of the model's configuration, as in `AutoConfig.from_pretrained`.

    Returns
    -------
    torch.nn.Module
        The model, in evaluation mode, on `device`.

    Raises
    ------
    ValueError
        If a file is missing or truncated, if transformers does not have the architecture, or as in `offload_weights`.
    """
    import transformers

    folder = Path(path)
    files = Checkpoint.open(folder)
    try:
        settings = transformers.AutoConfig.from_pretrained(str(folder), trust_remote_code=False, **config)
    except (OSError, ValueError) as error:
        raise ValueError(f"{str(folder)!r} has no configuration that transformers can read: {error}") from error
    kind = _class_of(transformers, settings, folder)
    parallel = {"tp_plan": tp_plan, "distributed_config": distributed_config}
    given = {name: value for name, value in parallel.items() if value is not None}
    model, info = kind.from_pretrained(
        None, config=settings, state_dict=dict(files.tensors), dtype=dtype, output_loading_info=True, **given
    )
    missing = sorted(info["missing_keys"])
    if missing:
        # transformers would initialize them with random numbers.
        raise ValueError(f"{str(folder)!r} is incomplete: {missing[0]} is missing ({len(missing)} weights in all)")
    with contextlib.suppress(OSError):
        model.generation_config = transformers.GenerationConfig.from_pretrained(str(folder))
    model.eval()
    offload_weights(model, device, memory_budget=memory_budget, keep=keep)
    return model


def _class_of(transformers: Any, settings: Any, folder: Path) -> Any:
    names = settings.architectures or []
    found = [getattr(transformers, name, None) for name in names]
    if not found or found[0] is None:
        reason = f"transformers {transformers.__version__} does not have {names[0]!r}" if names else "it names none"
        raise ValueError(f"cannot load the architecture of {str(folder)!r}: {reason}, and no remote code is run")
    return found[0]
