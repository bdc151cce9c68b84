"""Scenarios of weights on the host, on simulated streams: see `stories.py`.

prefill   layer:  ... start(next, over the one before) | wait(own) | compute with it | offload its result ...
decode    layer:  ... start(next, over ...), start(next's rows) | wait both | compute | append ...
"""

from __future__ import annotations

import contextlib
import errno
import gc
import mmap
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from unittest import mock

import torch

from mom_compile.runtime.copy_steps import (
    Append,
    Arriving,
    FetchChosen,
    FetchRows,
    FetchStart,
    FetchWait,
    Offload,
    Settle,
)
from mom_compile.runtime.host import weight_bytes
from mom_compile.runtime.host.file import Extent
from mom_compile.runtime.host.limits import HostMemoryError
from mom_compile.runtime.host.weight import HostWeight, host_weight
from mom_compile.runtime.host.weight_bytes import PAGE, map_file, pin_in_place
from mom_compile.runtime.program import Program, Slot, Step
from tests.no_gpu.stories import Story, error_of, in_files, place, values
from tests.no_gpu.streams import CPU, Simulation

LAYERS = 7


def model(sim: Simulation, layers: int = LAYERS) -> list[HostWeight]:
    """Weights like keys or values of 20 tokens: in pinned memory, two per storage, or in a file in stories of files."""
    if sim.placement is not None:
        assert sim.placement.directory is not None
        path = sim.placement.directory / "model.safetensors"
        path.write_bytes(torch.cat([plain(layer).flatten() for layer in range(layers)]).numpy().tobytes())
        holder = map_file(path)
        parts = holder.region.bytes.view(torch.float32).split(20 * 128)
        assert holder.in_file
        return [host_weight(part.view(20, 128), CPU) for part in parts]
    storages = [on_own_pages(torch.stack([plain(layer), plain(layer + 1)])) for layer in range(0, layers, 2)]
    parts = [part for storage in storages for part in storage][:layers]
    pin_in_place(parts, sim.pin)
    sim.synchronize()  # they were written long before
    return [host_weight(part, CPU) for part in parts]


def on_own_pages(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on pages of its own: other memory on its pages would count as pinned, and so as host memory."""
    memory = mmap.mmap(-1, tensor.nbytes)
    return torch.frombuffer(memory, dtype=tensor.dtype).view(tensor.shape).copy_(tensor)


def plain(layer: int) -> torch.Tensor:
    return torch.arange(20 * 128, dtype=torch.float32).add(7 * layer).remainder(251).view(20, 128)


def start(weight: HostWeight, over: Arriving | None = None) -> Arriving:
    (arriving,) = FetchStart(0, CPU)([weight.host, 0, *([] if over is None else [over])])
    return arriving


def wait(arriving: Arriving) -> torch.Tensor:
    (buffer,) = FetchWait(0)([arriving, None])
    return buffer


def uncompiled(weight: HostWeight) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="weights that are stored on the host are copied")
        return weight.fetch()


@dataclass
class Builder:
    """A program as lowering makes it: each value dies at its last use."""

    inputs: int
    calls: list[tuple[str, Callable[..., object], tuple[object, ...], int | None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.slots = self.inputs

    def add(self, name: str, run: Callable[..., object], *arguments: object, result: bool = True) -> Slot:
        self.calls.append((name, run, arguments, self.slots if result else None))
        self.slots += 1
        return Slot(self.slots - 1)

    def program(self, outputs: Sequence[Slot]) -> Program:
        last = {slot.index: i for i, call in enumerate(self.calls) for slot in call[2] if isinstance(slot, Slot)}
        kept = {slot.index for slot in outputs}
        steps = []
        for i, (name, run, arguments, made) in enumerate(self.calls):
            dying = tuple(index for index, at in last.items() if at == i and index not in kept)
            steps.append(Step(name, run, arguments, (made,), dying))  # type: ignore[arg-type]
        return Program(tuple(steps), self.slots, (), tuple(outputs), Settle(CPU))


def add(arguments: list[torch.Tensor]) -> tuple[torch.Tensor]:
    """A layer on its input, its weight and the keys that it reads. Sums stay exact."""
    x, *others = arguments
    arguments.clear()
    made = x + 1
    for other in others:
        made = (made + other.sum()).remainder(251)
    return (made,)


def fail(arguments: list[object]) -> tuple[object, ...]:
    arguments.clear()
    raise ZeroDivisionError


def prefill(sim: Simulation, layers: int = LAYERS, fails: bool = False) -> Program:
    """`[x, *weights]` to x and, for each layer, the keys that it leaves on the host."""
    build, arriving, hosts = Builder(1 + layers), list[Slot](), list[Slot]()
    x = Slot(0)
    arriving.append(build.add("start", FetchStart(0, CPU), Slot(1), 0))
    for layer in range(layers):
        if layer + 1 < layers:
            over = arriving[layer - 1 : layer]
            arriving.append(build.add("start", FetchStart(0, CPU), Slot(layer + 2), 0, *over))
        if fails and layer == 3:
            build.add("fail", fail, arriving[layer])
        arrived = build.add("wait", FetchWait(0), arriving[layer], None)
        x = build.add("layer", add, x, arrived)
        hosts.append(build.add("leave", Offload(2, CPU, place(sim)), x, 0))
    return build.program([x, *hosts])


def decode(sim: Simulation, layers: int = LAYERS) -> Program:
    """`[x, *weights, *hosts]` to x and, for each layer, its rows on the host followed by those of x."""
    build = Builder(1 + 2 * layers)
    x, arriving, rows, hosts = Slot(0), list[Slot](), list[Slot](), list[Slot]()

    def begin(layer: int) -> None:
        arriving.append(build.add("start", FetchStart(0, CPU), Slot(1 + layer), 0, *arriving[-2:-1]))
        rows.append(build.add("start rows", FetchStart(2, CPU), Slot(1 + layers + layer), 1))

    begin(0)
    for layer in range(layers):
        if layer + 1 < layers:
            begin(layer + 1)
        arrived = build.add("wait", FetchWait(0), arriving[layer], None)
        seen = build.add("wait rows", FetchWait(2), rows[layer], x)
        hosts.append(build.add("append", Append(2, CPU, place(sim)), Slot(1 + layers + layer), x, 0))
        x = build.add("layer", add, x, arrived, seen)
    return build.program([x, *hosts])


def after_prefill(x: torch.Tensor, weights: Sequence[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    rows = []
    for weight in weights:
        (x,) = add([x, weight])
        rows.append(x)
    return x, rows


def after_decode(
    x: torch.Tensor, weights: Sequence[torch.Tensor], rows: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    longer = []
    for weight, old in zip(weights, rows, strict=True):
        longer.append(torch.cat([old, x], 2))
        (x,) = add([x, weight, longer[-1]])
    return x, longer


PLAIN = [plain(layer) for layer in range(LAYERS)]


def layers_take_turns_in_two_slots(sim: Simulation) -> None:
    """A prompt, then tokens: weights in one queue, copies to the host in the other."""
    weights = model(sim)
    inner = [weight.host for weight in weights]
    x, *hosts = prefill(sim)([values(3), *inner])
    expected, rows = after_prefill(values(3), PLAIN)
    sim.expect(x, expected)
    step = decode(sim)
    for token in range(2):
        x, *hosts = step([values(1, token), *inner, *(host.host for host in hosts)])
        expected, rows = after_decode(values(1, token), PLAIN, rows)
        sim.expect(x, expected)
    for host, of_layer in zip(hosts, rows, strict=True):
        sim.expect(host.settled(), of_layer, by_host=True)


def two_slots_are_all_that_is_had(sim: Simulation) -> None:
    """For any number of layers, and none of them stays allocated."""
    weights, had = model(sim), set()
    slots: list[Arriving] = [start(weights[0])]
    for layer, weight in enumerate([*weights[1:], weights[0]]):
        slots.append(start(weight, slots[layer - 1] if layer else None))
        arrived = wait(slots[layer])
        had.add(arrived.data_ptr())
        sim.expect(arrived * 2, PLAIN[layer] * 2)
    assert len(had) == 2
    alive = weakref.ref(slots[-1].buffer.untyped_storage())
    wait(slots[-1])
    slots.clear()
    del arrived
    assert alive() is None


def a_program_with_weights_fails(sim: Simulation) -> None:
    """Between a start and its wait, with reused slots: no copy stays queued, and the memory of unfinished copies is not
    reused too early."""
    weights = model(sim)
    inner = [weight.host for weight in weights]
    with contextlib.suppress(ZeroDivisionError):
        prefill(sim, fails=True)([values(3), *inner])
        sim.problem("an exception is lost")
    assert not sim.engine.abandoned
    assert not any(stream.queue for stream in sim.streams)
    assert not any(tasks.queue for tasks in sim.tasks)
    x, *_ = prefill(sim)([values(3), *inner])
    sim.expect(x, after_prefill(values(3), PLAIN)[0])


def a_weight_is_written(sim: Simulation) -> None:
    """The host writes while a copy reads. The next copy has the new values."""
    weight = model(sim)[1]
    arriving = start(weight)
    other = start(weight)  # two copies read it at once
    weight.mul_(2)
    sim.expect(wait(other), PLAIN[1])
    sim.expect(wait(arriving), PLAIN[1])
    sim.expect(wait(start(weight)), PLAIN[1] * 2)


def rows_of_a_table_are_brought(sim: Simulation) -> None:
    """While layers arrive, for which the copy does not wait."""
    table, other = model(sim, 2)
    arriving = start(other)
    for rows in (torch.tensor([[3, 19], [3, 0]]), torch.tensor([-1])):
        (got,) = FetchRows(CPU)([table.host, rows])
        sim.expect(got + 0, PLAIN[0][rows])
    sim.expect(wait(arriving), PLAIN[1])


def matrices_of_chosen_experts_are_brought(sim: Simulation) -> None:
    """Each once, while layers arrive. Other matrices are left unset."""
    bank, other = model(sim, 2)
    arriving = start(other)
    keys = torch.tensor([7, 2, 7, 19])
    for _ in range(2):
        (got,) = FetchChosen(CPU)([bank.host, keys])
        sim.expect(got[keys] + 0, PLAIN[0][keys])
    sim.expect(wait(arriving), PLAIN[1])


def a_weight_across_seams_is_brought(sim: Simulation) -> None:
    with small_pieces():
        weights = model(sim)
    assert len(sim.runtime.ranges) > len(weights)
    for layer, weight in enumerate(weights):
        sim.expect(uncompiled(weight.t()), PLAIN[layer].t())
        sim.expect(uncompiled(weight[3:17, 5:]), PLAIN[layer][3:17, 5:])
        sim.expect(wait(start(weight)), PLAIN[layer])


def weights_that_cannot_be_pinned_are_brought(sim: Simulation) -> None:
    """Pinning fails after the first page of a weight: the weight is partly pinned, the other one is not."""
    answers = iter((0, 2))
    sim.runtime.call = lambda: next(answers, 0)
    parts = [on_own_pages(plain(layer)) for layer in range(2)]
    with small_pieces():
        try:
            pin_in_place(parts, sim.pin)
            sim.problem("a refusal is lost")
        except HostMemoryError:
            pass
    assert len(sim.runtime.ranges) == 1
    weights = [host_weight(part, CPU) for part in parts]
    del parts
    first = start(weights[0])
    second = start(weights[1])
    sim.expect(wait(first), PLAIN[0])
    sim.expect(wait(second), PLAIN[1])


def a_model_dies_while_its_weights_arrive(sim: Simulation) -> None:
    """Their memory is kept, and stays pinned, until they have arrived."""
    weights = model(sim)
    arriving = [start(weight) for weight in weights[:2]]
    weights.clear()
    gc.collect()
    assert sim.runtime.ranges or sim.placement is not None
    for layer, one in enumerate(arriving):
        sim.expect(wait(one), PLAIN[layer])
    arriving.clear()
    del one
    gc.collect()
    assert not sim.runtime.ranges or sim.placement is not None


def two_threads_run_one_model(sim: Simulation) -> None:
    """Each on its own stream, with its own cache."""
    weights = model(sim, 3)
    inner = [weight.host for weight in weights]

    def run(seed: int) -> None:
        with torch.cuda.stream(sim.stream()):
            x, *hosts = prefill(sim, 3)([values(3, seed), *inner])
            expected, rows = after_prefill(values(3, seed), PLAIN[:3])
            sim.expect(x, expected)
            x, *_ = decode(sim, 3)([values(1, seed), *inner, *(host.host for host in hosts)])
            sim.expect(x, after_decode(values(1, seed), PLAIN[:3], rows)[0])

    threads = [sim.thread(lambda seed=seed: run(seed)) for seed in range(2)]
    weights[0].settled()  # one of them has begun to read
    for thread in threads:
        thread.join()


def two_models_share_a_storage(sim: Simulation) -> None:
    """One thread drops its model while the other's weights arrive."""
    block = on_own_pages(torch.stack([plain(0), plain(1)]))
    models = []
    for _ in range(2):
        parts = list(block.unbind())
        pin_in_place(parts, sim.pin)
        models.append([host_weight(part, CPU) for part in parts])
        del parts
    assert len(sim.runtime.ranges) == 1
    arriving = start(models[1][1])
    first = sim.thread(lambda: sim.expect(wait(start(models[0][0])), PLAIN[0]))
    first.join()
    models.pop(0)
    gc.collect()
    assert sim.runtime.ranges
    sim.expect(wait(arriving), PLAIN[1])


def a_checkpoint_cannot_be_read(sim: Simulation) -> None:
    """In the middle of a program: the error names the file, and the next run is correct."""
    weights = model(sim)
    inner = [weight.host for weight in weights]
    calls, read = iter((False,) * 5 + (True,)), Extent.read

    def broken(extent: Extent, view: memoryview) -> None:
        if next(calls, False):
            raise OSError(errno.EIO, "Input/output error")
        read(extent, view)

    with mock.patch.object(Extent, "read", broken):
        said = error_of(lambda: prefill(sim)([values(3), *inner]))
        if "model.safetensors': [Errno 5] Input/output error" not in said:
            sim.problem("a weight that is not there is read")
    assert not sim.engine.abandoned
    assert not any(tasks.queue for tasks in sim.tasks)
    x, *_ = prefill(sim)([values(3), *inner])
    sim.expect(x, after_prefill(values(3), PLAIN)[0])


@contextlib.contextmanager
def small_pieces() -> Iterator[None]:
    """Treats a page as the unit that a driver pins."""
    with mock.patch.object(weight_bytes, "PIECE", PAGE):
        yield


IN_FILES: tuple[Story, ...] = (
    layers_take_turns_in_two_slots,
    two_slots_are_all_that_is_had,
    a_program_with_weights_fails,
    rows_of_a_table_are_brought,
    matrices_of_chosen_experts_are_brought,
    a_model_dies_while_its_weights_arrive,
    two_threads_run_one_model,
    a_checkpoint_cannot_be_read,
)

WEIGHT_STORIES: tuple[Story, ...] = (
    layers_take_turns_in_two_slots,
    two_slots_are_all_that_is_had,
    a_program_with_weights_fails,
    a_weight_is_written,
    rows_of_a_table_are_brought,
    matrices_of_chosen_experts_are_brought,
    a_weight_across_seams_is_brought,
    weights_that_cannot_be_pinned_are_brought,
    a_model_dies_while_its_weights_arrive,
    two_threads_run_one_model,
    two_models_share_a_storage,
    *map(in_files, IN_FILES),
)


# --- errors that the simulation must find ---


def a_slot_is_taken_too_early(sim: Simulation) -> None:
    """By the copy after the next, although its weight has not been read."""
    weights = model(sim)
    slots = [start(weights[0]), start(weights[1])]
    arrived = wait(slots[0])
    slots.append(start(weights[2], slots[0]))
    sim.expect(arrived * 2, PLAIN[0] * 2)


def a_slot_is_read_before_its_copy_is_done(sim: Simulation) -> None:
    weights = model(sim)
    slots = [start(weights[0]), start(weights[1])]
    wait(slots[0])
    sim.expect(slots[1].buffer * 2, PLAIN[1] * 2)


def a_slot_is_taken_while_another_stream_reads_it(sim: Simulation) -> None:
    weights, other = model(sim), sim.stream()
    slot = start(weights[0])
    arrived = wait(slot)
    other.wait_stream(sim.default)
    with torch.cuda.stream(other):
        read = arrived * 2
    wait(start(weights[1], slot))
    sim.default.wait_stream(other)
    sim.expect(read, PLAIN[0] * 2)
