"""Warnings for the user while a model compiles: each one once, not for every graph of the model."""

from __future__ import annotations

import functools
import os
import sys
import sysconfig
import threading
import types
import warnings
from collections.abc import Mapping

from mom_compile.versions import running, untested

#: The number of names listed with a reason; a deep model has many.
_MOST_NAMES = 4


class MomWarning(UserWarning):
    """A `UserWarning`: a graph fell back to stock Inductor or to eager mode, or an option has no effect.

    Each reason is given once, with the line of the user's code that called the model.
    """


_said: set[str] = set()
_saying = threading.Lock()

#: Libraries whose frames may be on the stack between the user's code and this module.
_LIBRARIES = frozenset({"mom_compile", "mom_passes", "torch", "transformers", "accelerate", "peft"})
_STANDARD_LIBRARY, _PACKAGES = (sysconfig.get_path(name) + os.sep for name in ("stdlib", "purelib"))


def _warn(text: str) -> None:
    """Warn at the user's line: the innermost frame that is not in one of the libraries."""
    frame = sys._getframe(1)
    while _is_between(frame) and frame.f_back is not None:
        frame = frame.f_back
    seen = frame.f_globals.setdefault("__warningregistry__", {})
    name = frame.f_globals.get("__name__", "<unknown>")
    warnings.warn_explicit(text, MomWarning, frame.f_code.co_filename, frame.f_lineno, name, seen)


def _is_between(frame: types.FrameType) -> bool:
    name, file = frame.f_globals.get("__name__"), frame.f_code.co_filename
    if name is None or name.partition(".")[0] in _LIBRARIES:
        return True  # generated code has no name
    return file.startswith(("<frozen ", _STANDARD_LIBRARY)) and not file.startswith(_PACKAGES)


def warn_once(key: str, text: str) -> None:
    """Warn unless a warning with this key was given since the last `forget`."""
    with _saying:
        if key in _said:
            return
        _said.add(key)
    try:
        _warn(text)
    except BaseException:  # a filter turns warnings into errors: the next call raises again
        _said.discard(key)
        raise


def forget() -> None:
    """Repeat warnings, except for those about the whole process."""
    _said.clear()


@functools.cache
def warn_of_versions() -> None:
    """Warn once per process about versions outside the tested range."""
    text = untested(running())
    if text is not None:
        _warn(text)


def warn_of_gradients() -> None:
    text = "graphs that need gradients are compiled by stock Inductor; call the model under torch.no_grad() or "
    warn_once("gradients", f"backend 'mom' is for inference: {text}torch.inference_mode()")


def warn_of_hooks() -> None:
    """Warn that the hooks that accelerate installs on modules break the graph at each of them."""
    warn_once(
        "hooks",
        "the model is compiled in many small graphs, which saves little memory: accelerate's hooks (device_map, "
        "dispatch_model, cpu_offload) break the graph at every module that has one. Load the model without them with "
        "mom_compile.load_offloaded(path, device), or remove them with "
        "accelerate.hooks.remove_hook_from_module(model, recurse=True) and call mom_compile.offload_weights(model, "
        "device), before it is compiled. To use several devices, load it with tp_plan='auto' under torchrun",
    )


def warn_of_freezing() -> None:
    text = "it would copy the weights into every compiled graph; use backend='inductor' to compile with it"
    warn_once("freezing", f"backend 'mom' compiles without Inductor's freezing: {text}")


def warn_of_eager(what: str, reason: str) -> None:
    """Warn that Inductor could not compile something, which runs eagerly. Once per reason."""
    warn_once(f"eager: {reason}", f"Inductor could not compile {what}, which runs eagerly: {reason}")


def warn_of_device_kv(option: object, on_device: Mapping[str, str]) -> None:
    """Warn that `kv_offload` was requested, but these keys and values stay: name -> reason. Once per reason."""
    for reason in dict.fromkeys(on_device.values()):
        names = [name for name, why in on_device.items() if why == reason]
        shown = ", ".join(names[:_MOST_NAMES]) + (", ..." if len(names) > _MOST_NAMES else "")
        warn_once(
            f"kv: {reason}",
            f"kv_offload={option!r} is not honoured for {len(names)} keys or values, which stay on the device: "
            f"{reason} ({shown})",
        )


def warn_of_ignored_kv(option: object, reason: str) -> None:
    """Warn that `kv_offload` was requested, but stock Inductor compiles the whole graph."""
    warn_once(f"ignored: {reason}", f"kv_offload={option!r} is not honoured: {reason}")


_MORE_GRAPHS = (
    "mom_compile.compile(model) counts the graphs of each model separately and allows more of them, and so does a "
    "larger torch._dynamo.config.{limit}; docs/troubleshooting.md explains how to need fewer"
)


def warn_of_last_graph(code: object, limit: str, most: int) -> None:
    """Warn that Dynamo compiles the last graph that its limit allows for a code object."""
    warn_once(
        f"last graph: {code}",
        f"this is the last of the {most} graphs that torch._dynamo.config.{limit} allows: a call that needs another "
        f"one will run in eager mode, without the savings of backend 'mom'. {_MORE_GRAPHS.format(limit=limit)}",
    )


def warn_of_eager_calls(code: object, limit: str, most: int) -> None:
    """Warn that Dynamo runs a call in eager mode, and all later calls that need a new graph."""
    warn_once(
        f"eager calls: {code}",
        f"a call runs in eager mode, without the savings of backend 'mom': {most} graphs have been compiled, and "
        f"torch._dynamo.config.{limit} allows no more. So will every call that needs another graph, of any model that "
        f"shares this code. {_MORE_GRAPHS.format(limit=limit)}",
    )
