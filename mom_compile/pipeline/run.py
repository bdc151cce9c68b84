"""Runs steps by name: each is timed, logged and followed by a check of the graph."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable
from typing import Any, ParamSpec, Protocol, TypeVar

from torch import fx

from mom_compile.report.facts import PassReport
from mom_passes.verify import Contract, verify

log = logging.getLogger("mom_compile.pipeline")


class HasGraph(Protocol):
    gm: fx.GraphModule


Given = ParamSpec("Given")
State = TypeVar("State", bound=HasGraph)
Found = TypeVar("Found")

#: Called after each step with its name and what it returned or edited.
Watch = Callable[[str, Any], None]


class Runner:
    """Runs the steps of one graph. `taken` has a record of each.

    `contract` is what every graph must keep to, `skip` names steps to leave out, `watch` sees each step's result.
    """

    def __init__(self, contract: Contract, skip: Collection[str] = (), watch: Watch | None = None) -> None:
        self.taken: list[PassReport] = []
        self._contract, self._skip, self._watch = contract, skip, watch
        #: Loop bodies that were verified: no pass changes one.
        self._sound: set[fx.GraphModule] = set()
        self._verified: fx.GraphModule | None = None

    def edit(self, steps: Iterable[Callable[[State], str]], state: State) -> None:
        """Run steps that edit the graph of a state. Each returns what has changed, in words."""
        for step in steps:
            if step.__name__ in self._skip:
                continue
            began = time.perf_counter()
            change = step(state)
            self._verified = None
            self._record(step.__name__, began, change, state)

    def take(self, step: Callable[Given, tuple[Found, str]], *given: Given.args, **named: Given.kwargs) -> Found:
        """Run a step that returns a fact and what it says, in words."""
        began = time.perf_counter()
        found, change = step(*given, **named)
        self._record(step.__name__, began, change, found)
        return found

    def _record(self, name: str, began: float, change: str, found: Any) -> None:
        gm = getattr(found, "gm", None)
        if gm is not None and gm is not self._verified:
            verify(gm, self._contract, known=self._sound)
            self._verified = gm
        seconds = time.perf_counter() - began
        self.taken.append(PassReport(name, seconds, change))
        log.debug("%s: %.0f ms: %s", name, seconds * 1e3, change)
        if self._watch is not None:
            self._watch(name, found)
