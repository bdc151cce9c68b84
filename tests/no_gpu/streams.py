"""CUDA's streams, events and pinned memory, simulated in a CPU build, for the real copy engine.

Terms
-----
clock     What an agent, a stream or a thread of the host, knows of the others (see `ledger.py`).
lazy      A stream of the engine. Its copies are queued and run when something waits for them (`latest`), or at any
          moment before that (`at_times`). Other streams compute immediately.

    compute:  a wait updates the clock; an operation is checked against all accesses to the same bytes
    event:    a copy of its stream's clock

Two accesses to the same bytes, one of them a write, are a problem if the later agent does not know of the earlier
access: the device may run them in the other order. Further problems: memory that is freed before a copy has run, a copy
across two pinned ranges or to memory that is not pinned yet, a range that is unpinned during a copy. Problems are
collected, since a finaliser cannot raise; the end of the simulation raises them.

    with Simulation(latest) as sim:           # the CPU's engine is a CudaEngine inside
        ...                                   # every operator is an operation of the current stream
        with torch.cuda.stream(sim.stream()): ...
        sim.thread(work).join()
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from mom_compile.runtime import copy_steps
from mom_compile.runtime.host import engines
from mom_compile.runtime.host.backings.pinned import Pinned
from mom_compile.runtime.host.engine_cuda import CudaEngine, pin_for
from mom_compile.runtime.host.placement import Placement
from mom_compile.runtime.host.store import store_of
from mom_compile.runtime.host.tensor import HostTensor
from mom_compile.runtime.host.write import mutated, returns_view
from mom_compile.runtime.program import Program
from mom_passes.ops.transfers import FETCH, FETCH_ROWS, FETCH_WEIGHT
from mom_passes.torch_compat import packet_of, schema_of
from tests.no_gpu.ledger import Clock, Ledger
from tests.no_gpu.tasks import SimErrands, seen_by

CPU = torch.device("cpu")
aten = torch.ops.aten
COPY = aten.copy_.default
#: Operators that allocate and write nothing. Their memory is poisoned, so that reads before a write are found.
EMPTY = (aten.empty.memory_format, aten.empty_like.default, aten.empty_strided.default, aten.empty_permuted.default)
#: Operators whose result the host waits for.
ASKED = (aten._local_scalar_dense.default, aten.equal.default)
POISON = 0xA5
#: The host's implementation of operators that fetch.
FETCHES = {
    FETCH: lambda *given: copy_steps._fetch(*given),
    FETCH_WEIGHT: lambda *given: copy_steps._fetch(*given),
    FETCH_ROWS: lambda *given: copy_steps._fetch_rows(*given),
}


class Found(AssertionError):
    """The simulation has found an access that a device may order differently than intended."""


@dataclass
class Queued:
    """A copy that has not run, and does not keep its operands alive."""

    target: Rows
    source: Rows

    def run(self, sim: Simulation) -> None:
        with _disable_current_modes(), torch.inference_mode():
            target, source = self.target.alive(), self.source.alive()
            for tensor, name in ((target, "target"), (source, "source")):
                if tensor is None:
                    sim.problem(f"the {name} of a copy was freed before it ran")
            if target is not None and source is not None:
                target.copy_(source)


class Rows:
    """The metadata of a tensor, without its memory."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.storage = weakref.ref(tensor.untyped_storage())
        self.dtype, self.shape = tensor.dtype, tensor.shape
        self.stride, self.offset = tensor.stride(), tensor.storage_offset()

    def alive(self) -> torch.Tensor | None:
        storage = self.storage()
        if storage is None:
            return None
        with torch.inference_mode(False):
            return torch.empty(0, dtype=self.dtype).set_(storage, self.offset, self.shape, self.stride)


#: Called at every call of the device; it may run queued copies.
Schedule = Callable[["Simulation"], None]


def latest(sim: Simulation) -> None:
    """Nothing runs before it is waited for."""


def at_times(pattern: Sequence[bool]) -> Schedule:
    """At each moment the next entry of the repeated pattern decides whether a queue runs a copy."""
    choices = itertools.cycle(pattern or [False])

    def some(sim: Simulation) -> None:
        for stream in sim.streams:
            if stream.queue and next(choices):
                stream.go_on()
        for tasks in sim.tasks if not sim.running else ():
            if tasks.queue and next(choices):
                tasks.go_on()

    return some


class SimStream:
    """Replaces `torch.cuda.Stream`."""

    def __init__(self, sim: Simulation, lazy: bool) -> None:
        self.sim, self.lazy = sim, lazy
        self.name = f"{'copies' if lazy else 'compute'} {len(sim.streams)}"
        self.clock = Clock()
        self.queue: collections.deque[Queued | SimEvent] = collections.deque()
        self.issued = self.done = 0
        sim.streams.append(self)

    def put(self, one: Queued | SimEvent) -> None:
        self.queue.append(one)
        self.issued += 1

    def go_on(self) -> None:
        one = self.queue.popleft()
        self.done += 1
        one.run() if isinstance(one, SimEvent) else one.run(self.sim)

    def run_to(self, at: int) -> None:
        while self.done < at:
            self.go_on()

    def wait_event(self, event: SimEvent) -> None:
        self.sim.moment()
        self.clock.learn(event.clock)
        # A queue that waits runs no further meanwhile; a stream that computes immediately has waited.
        self.put(event) if self.lazy else event.run()

    def wait_stream(self, other: SimStream) -> None:
        event = SimEvent(self.sim)
        event.record(other)
        self.wait_event(event)


class SimEvent:
    """Replaces `torch.cuda.Event`. An event that was not recorded is done, as on a device."""

    def __init__(self, sim: Simulation) -> None:
        self.sim = sim
        self.stream: SimStream | None = None
        self.at = 0
        self.clock = Clock()

    def record(self, stream: SimStream | None = None) -> None:
        self.sim.moment()
        self.stream = stream or self.sim.current
        self.stream.clock.learn(self.sim.thread_clock)
        self.at, self.clock = self.stream.issued, Clock(self.stream.clock)

    def run(self) -> None:
        if self.stream is not None:
            self.stream.run_to(self.at)

    def synchronize(self) -> None:
        self.sim.moment()
        self.run()
        self.sim.thread_clock.learn(self.clock)

    def query(self) -> bool:
        self.sim.moment()
        done = self.stream is None or self.stream.done >= self.at
        if done:
            self.sim.thread_clock.learn(self.clock)
        return done


class _Recording(TorchDispatchMode):
    def __init__(self, sim: Simulation) -> None:
        super().__init__()
        self.sim = sim

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, HostTensor) for kind in types):
            return NotImplemented  # the operators that it calls are seen then
        return self.sim.operate(func, args, kwargs or {})


class _Runtime:
    """Replaces `torch.cuda.cudart()`: the pinned ranges.

    `call` runs during each call, on the calling thread, and returns the driver's code.
    """

    def __init__(self, sim: Simulation) -> None:
        self.sim = sim
        self.ranges: dict[int, int] = {}
        self.call: Callable[[], int] = lambda: 0
        #: The thread of each call.
        self.threads: list[str] = []

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        self.threads.append(threading.current_thread().name)
        code = self.call()
        if code == 0:
            self.ranges[address] = size
        return code

    def cudaHostUnregister(self, address: int) -> int:
        self.sim.ledger.unpinned(address, self.ranges.pop(address))
        return 0


class Thread:
    """Work of another thread. It is done before `sim.thread` returns, but unordered with later work up to `join`: one
    thread does not know what another has waited for."""

    def __init__(self, sim: Simulation, work: Callable[[], None]) -> None:
        self.sim, self.errors = sim, list[BaseException]()
        self.clock = Clock(sim.thread_clock)
        thread = threading.Thread(target=self._run, args=(work,))
        thread.start()
        thread.join()

    def _run(self, work: Callable[[], None]) -> None:
        self.sim.local.clock = self.clock
        try:
            with self.sim.recording():
                work()
        except BaseException as error:
            self.errors.append(error)

    def join(self) -> None:
        if self.errors:
            raise self.errors[0]
        self.sim.thread_clock.learn(self.clock)


class Simulation:
    """In this context the CPU's copy engine is the one for CUDA, on simulated streams.

    With `everything=False` only operators in a program, or on a stream of the engine, are recorded: Dynamo cannot trace
    while operators are recorded.
    """

    def __init__(self, schedule: Schedule = latest, everything: bool = True) -> None:
        self.schedule, self.everything = schedule, everything
        self.problems: list[str] = []
        self.streams: list[SimStream] = []
        self.tasks: list[SimErrands] = []
        #: Number of tasks that are running, one nested in another that waits for it.
        self.running = 0
        self.local = threading.local()
        self.ledger = Ledger(self)
        self.runtime = _Runtime(self)
        self.default = SimStream(self, lazy=False)
        self._stack = contextlib.ExitStack()
        self._threads = itertools.count()
        self.active = False
        self._pinned: list[torch.Tensor] = []
        #: Where stories keep a cache, if not in pinned memory.
        self.placement: Placement | None = None

    # --- begin and end ---

    def __enter__(self) -> Simulation:
        for name, instead in (
            ("Stream", lambda device=None: SimStream(self, lazy=True)),
            ("Event", lambda **_: SimEvent(self)),
            ("current_stream", lambda device=None: self.current),
            ("stream", self.within),
            ("device", contextlib.nullcontext),
            ("synchronize", lambda device=None: self.synchronize()),
            ("cudart", lambda: self.runtime),
        ):
            self._stack.enter_context(mock.patch.object(torch.cuda, name, instead))
        self._pin = pin_for.__wrapped__(CPU)
        self.engine = CudaEngine(CPU, self.pin, lambda name: SimErrands(self, name))
        self._stack.enter_context(mock.patch.object(self.engine, "pinned", self.pinned))
        self._stack.enter_context(seen_by(self))
        self._stack.enter_context(mock.patch.dict(engines._ENGINES, {CPU: self.engine}))
        self.active = True
        if self.everything:
            self._stack.enter_context(self.recording())
        else:
            run = Program.__call__
            self._stack.enter_context(mock.patch.object(Program, "__call__", lambda *given: self._recorded(run, given)))
        return self

    def _recorded(self, run: Callable[..., Any], given: Any) -> Any:
        with self.recording():
            return run(*given)

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        for tasks in self.tasks:
            while tasks.queue:
                tasks.go_on()
        self._stack.close()
        self.active = False
        for stream in self.streams:
            stream.run_to(stream.issued)
        if kind is None and self.problems:
            raise Found("\n".join(dict.fromkeys(self.problems)))

    # --- for tests ---

    def stream(self) -> SimStream:
        """Another stream that computes."""
        return SimStream(self, lazy=False)

    def thread(self, work: Callable[[], None]) -> Thread:
        return Thread(self, work)

    def pin(self, address: int, size: int) -> Callable[[], None]:
        """Pins as for a device. Memory that outlives the simulation is not unpinned, since there is no device then."""
        undo = self._pin(address, size)
        return lambda: undo() if self.active else None

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Memory pinned by PyTorch, which records copies from it and reuses it when they are done: here, not before the
        end."""
        made = torch.empty(shape, dtype=dtype)
        self._pinned.append(made)
        if made.nbytes:
            self.runtime.ranges[made.data_ptr()] = made.nbytes
        return made

    def expect(self, actual: torch.Tensor, expected: torch.Tensor, by_host: bool = False) -> None:
        """Compare a value read now by the current stream or by the host, without a wait."""
        self.moment()
        self._touch([(actual, False)], "a look at a result", by_host)
        with _disable_current_modes():
            if not torch.equal(actual, expected):
                self.problem("a result is not what it should be")

    def recording(self) -> contextlib.AbstractContextManager[Any]:
        return _Recording(self)

    def synchronize(self) -> None:
        self.moment()
        for stream in self.streams:
            stream.run_to(stream.issued)
            self.thread_clock.learn(stream.clock)

    # --- agents ---

    @property
    def current(self) -> SimStream:
        return getattr(self.local, "stream", self.default)

    @property
    def thread_clock(self) -> Clock:
        if not hasattr(self.local, "clock"):
            self.local.clock = Clock()
        return self.local.clock

    @property
    def thread_name(self) -> str:
        if not hasattr(self.local, "name"):
            self.local.name = f"thread {next(self._threads)}"
        return self.local.name

    @contextlib.contextmanager
    def within(self, stream: SimStream) -> Iterator[None]:
        before, self.local.stream = self.current, stream
        try:
            with contextlib.nullcontext() if self.everything else self.recording():
                yield
        finally:
            self.local.stream = before

    @contextlib.contextmanager
    def acting_as(self, name: str, clock: Clock) -> Iterator[None]:
        """Act as a thread that does not compute."""
        before = dict(self.local.__dict__)
        self.local.__dict__.clear()
        self.local.name, self.local.clock = name, clock
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1
            self.local.__dict__.clear()
            self.local.__dict__.update(before)

    def host_moves(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Bytes moved by a system call."""
        self._touch([(target, True), (source, False)], "a file's copy", by_host=True)

    def moment(self) -> None:
        self.schedule(self)

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """The pinned ranges: addresses and sizes. Another thread may pin meanwhile."""
        return list(self.runtime.ranges.items())

    def problem(self, text: str) -> None:
        self.problems.append(text)

    # --- operations ---

    def operate(self, func: Any, args: Any, kwargs: Any) -> Any:
        schema = schema_of(func)
        if func in FETCHES:  # these consist of several operators, each of which is seen
            with self.recording():
                return FETCHES[func](*args, **kwargs)
        if schema is None or returns_view(schema) or packet_of(func) is aten.set_:
            return func(*args, **kwargs)
        self.moment()
        stream = self.current
        written = {id(tensor) for tensor in mutated(schema, args, kwargs)}
        given = () if func in EMPTY else tree_leaves((args, kwargs))
        touched = [(value, id(value) in written) for value in given if torch.is_tensor(value)]
        hosts = [self.ledger.memory(tensor).on_host for tensor, _ in touched]
        asynchronous = func is COPY and self._asynchronous(*args, **kwargs)
        if asynchronous and stream.lazy:
            self._touch(touched, "a copy")
            stream.put(Queued(Rows(args[0]), Rows(args[1])))
            return args[0]
        stream.run_to(stream.issued)
        result = func(*args, **kwargs)
        tensors = [value for value in tree_leaves(result) if torch.is_tensor(value)]
        made = [(value, True) for value in tensors if not self.ledger.knows(value)]
        if func in EMPTY:
            Rows(result).alive().untyped_storage().fill_(POISON)  # type: ignore[union-attr]
        by_host = bool(hosts) and all(hosts) and func is not aten._to_copy.default
        for tensor, _ in made:
            self.ledger.memory(tensor, by_host)
        self._touch([*touched, *made], str(func), by_host)
        if func in ASKED or (any(hosts) and not asynchronous):
            self.thread_clock.learn(stream.clock)
        return result

    def _asynchronous(self, target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> bool:
        """Whether a copy is asynchronous. A driver copies from or to memory that is not pinned before it returns."""
        hosts = [tensor for tensor in (target, source) if self.ledger.memory(tensor).on_host]
        pinned = [any(a <= host.data_ptr() < a + size for a, size in self.ranges) for host in hosts]
        for host, has_been in zip(hosts, pinned, strict=True):
            store = store_of(host)
            if store is not None and isinstance(store.region.backing, Pinned) and not has_been:
                self.problem("a copy does not wait until its memory is pinned")
        return non_blocking and all(pinned)

    def _touch(self, touched: Sequence[tuple[torch.Tensor, bool]], what: str, by_host: bool = False) -> None:
        """Record one operation of the current stream or of the host."""
        agent, clock = (self.thread_name, self.thread_clock) if by_host else (self.current.name, self.current.clock)
        clock.learn(self.thread_clock)
        self.ledger.touch(clock.step(agent), clock, touched, what, by_host)
