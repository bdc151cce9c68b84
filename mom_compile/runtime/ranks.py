"""Ranks agree before each run of a graph with collectives, so that none waits for a collective that no other begins.

Ranks that run different loops, or mini-sequences of different lengths, call collectives a different number of times:
a rank without a partner waits until its process group's timeout. So each run begins with an exchange through the
group's store, which is no collective and waits for a key with a timeout of its own:

    rank 0:  set ".../7/0" = {graph, sizes, rows};  wait for ".../7/1"
    rank 1:  set ".../7/1" = {graph, sizes, rows};  wait for ".../7/0"
    both:    different graphs or sizes -> RanksDiffer;  rows -> the least of each loop

A rank that cannot run the graph says so in the same place, and the others raise with its reason.
"""

from __future__ import annotations

import json
import threading
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from mom_compile.torch_compat.errors import UserError
from mom_compile.torch_compat.groups import process_group, store_of, timeout_of


@dataclass(frozen=True)
class Exchange:
    """The next exchange of a group: how often a group of its name was made, and how many exchanges it has had."""

    made: int
    number: int

    def key(self, rank: int) -> str:
        return f"mom_compile/{self.made}/{self.number}/{rank}"


#: All ranks of a group take part in each of its exchanges.
_EXCHANGES: weakref.WeakKeyDictionary[Any, Exchange] = weakref.WeakKeyDictionary()
_LOCK = threading.Lock()


class RanksDiffer(UserError):
    """A `ValueError`: the ranks of a process group were about to run different collectives, or one of them failed.

    Every rank that has begun the graph raises it, before the first collective. The message names the ranks, what each
    of them runs, and what to do. The next call begins anew.
    """


@dataclass(frozen=True)
class Run:
    """What a rank is about to run.

    Parameters
    ----------
    graph
        The loops and collectives of the graph, as text.
    sizes
        The values of its symbols.
    rows
        The rows that this rank chooses for each loop; empty where rows do not depend on the rank.
    failure
        Why it cannot run; empty if it can.
    """

    graph: str
    sizes: tuple[int, ...] = ()
    rows: tuple[int, ...] = ()
    failure: str = ""


def agree(groups: Sequence[str], own: Run) -> Run:
    """Return what all ranks of the groups run: `own`, with the least rows of each loop.

    Raises
    ------
    RanksDiffer
        If another rank runs another graph, or other sizes, or failed, or does not begin within the group's timeout.
    """
    shared = [name for name in groups if process_group(name).size() > 1]
    for at, name in enumerate(shared):
        try:
            found = _exchange(name, own)
            _compare(name, found, own)
        except BaseException as error:
            announce_failure(shared[at + 1 :], error)  # ranks of the other groups must not wait for this one
            raise
        rows = [run.rows for run in found.values()]
        own = Run(own.graph, own.sizes, tuple(map(min, *rows)) if len(rows) > 1 else own.rows)
    return own


def announce_failure(groups: Iterable[str], error: BaseException) -> None:
    """Let ranks that wait for this one raise, with the reason. Does nothing where a group is gone."""
    for name in groups:
        try:
            _set(name, Run("", failure=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"))
        except Exception:  # the error itself is what the caller must see
            continue


def _set(name: str, own: Run) -> tuple[Any, Any, Exchange]:
    """Write this rank's side of the next exchange. Return the group, its store and the exchange."""
    group = process_group(name)
    store = store_of(group)
    with _LOCK:
        if group not in _EXCHANGES:
            # A group that is made again may have the store and the name of a destroyed one.
            made = store.add(f"mom_compile/made/{group.rank()}", 1)
            _EXCHANGES[group] = Exchange(made, 0)
        now = _EXCHANGES[group]
        _EXCHANGES[group] = replace(now, number=now.number + 1)
    store.set(now.key(group.rank()), json.dumps(asdict(own)))
    if now.number >= 2:  # every rank has begun the exchange before this one, so none still reads the one before that
        store.delete_key(replace(now, number=now.number - 2).key(group.rank()))
    return group, store, now


def _exchange(name: str, own: Run) -> dict[int, Run]:
    """Return what each rank of a group runs."""
    group, store, now = _set(name, own)
    others = [rank for rank in range(group.size()) if rank != group.rank()]
    keys, timeout = [now.key(rank) for rank in others], timeout_of(group)
    try:
        store.wait(keys, timeout)
    except BaseException as error:
        # As if this rank had not begun, since others may not begin either: the next call has the same number.
        with _LOCK:
            _EXCHANGES[group] = now
        store.delete_key(now.key(group.rank()))
        if not isinstance(error, Exception):
            raise
        late = [rank for rank, key in zip(others, keys, strict=True) if not store.check([key])]
        raise RanksDiffer(
            f"rank {', '.join(map(str, late)) or 'unknown'} of process group {name!r} did not begin within "
            f"{timeout.total_seconds():g} s the graph that rank {group.rank()} runs: it ended, waits in another "
            "collective, or still compiles. Every rank must call the model with inputs of the same sizes; a longer "
            "timeout is an argument of torch.distributed.init_process_group"
        ) from error
    found = {group.rank(): own}
    for rank, key in zip(others, keys, strict=True):
        read = json.loads(store.get(key))
        found[rank] = Run(read["graph"], tuple(read["sizes"]), tuple(read["rows"]), read["failure"])
    return found


def _compare(name: str, found: Mapping[int, Run], own: Run) -> None:
    failed = {rank: run.failure for rank, run in found.items() if run.failure}
    if failed:
        reasons = "; ".join(f"rank {rank}: {failure}" for rank, failure in sorted(failed.items()))
        raise RanksDiffer(f"this rank cannot run a graph that others of process group {name!r} do not run. {reasons}")
    if any((run.graph, run.sizes) != (own.graph, own.sizes) for run in found.values()):
        runs = "; ".join(f"rank {rank}: {run.graph}, sizes {list(run.sizes)}" for rank, run in sorted(found.items()))
        raise RanksDiffer(
            f"ranks of process group {name!r} are about to run different collectives. {runs}. Every rank must call the "
            "model with inputs of the same sizes and the same options mini_seq_len, loop_products, scope and "
            "overlap_collectives"
        )
