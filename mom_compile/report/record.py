"""What is reported on a graph: what was done, what was not, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import fx

from mom_compile.report.communication import Communication
from mom_compile.report.facts import Facts
from mom_compile.report.shares import Share
from mom_compile.report.stages import StageReport
from mom_compile.torch_compat.recompiles import GraphCount
from mom_passes.program.memory import Memory
from mom_passes.program.program import Call, Compute, LoopStep, Transfer
from mom_passes.program.traffic import WeightTraffic


@dataclass(frozen=True)
class Record(Facts):
    """What is reported on one captured graph: the facts, and more. Nothing is decided by it.

    Attributes
    ----------
    nodes : int
        Number of nodes of the captured graph.
    fallback : str or None
        Why the graph went to stock Inductor.
    failed : bool
        Whether `fallback` is an error of this package and not a decision.
    stages : sequence of StageReport
        The loops, in the order they run.
    no_loops : str or None
        Why nothing runs over mini-sequences although this package compiled the graph.
    refused : str
        Why the given `memory_budget` does not suffice, where `explain` found that; else empty.
    rows : str
        Why mini-sequences have their number of rows, where a rule for a GPU decided it; else empty.
    tokens : int
        Tokens of the longest loop at capture.
    peak_without_loops : int or None
        What `expected_peak_bytes` would be if each captured operator ran on all tokens, by the same memory
        model. Only `explain` computes it, and not for experts outside of a loop.
    peak : tuple of Share
        The parts of the expected peak, the largest first.
    memory : Memory or None
        What the program needs in each step, as expressions in the sizes of the graph.
    weights : WeightTraffic or None
        Copies of weights that are kept on the host.
    eager_pieces : dict of str to str
        Pieces that Inductor could not compile and that run eagerly, with the error.
    compiled_pieces : sequence of str
        Loop bodies and pieces that were compiled for this graph. It shares the others.
    bodies_shared : int
        Number of loop bodies that were not compiled because an identical one existed.
    layer_pieces : int
        Number of pieces into which a graph without loops was cut, so that layers share them; 0 if it was not
        cut.
    compile_seconds : float
        Seconds that compiling took.
    from_cache : bool
        Whether the graph was read from the compile cache. There is no code to show then.
    communication : Communication or None
        Collectives of the graph, if it has any.
    graphs : GraphCount or None
        The number of this graph among those of its code object, and Dynamo's limit. `None` for `explain`.
    exceeded : list
        Filled when Dynamo runs a call of this code in eager mode, because the limit was reached.
    graph : torch.fx.GraphModule or None
        The rewritten graph.
    """

    nodes: int = 0
    fallback: str | None = None
    failed: bool = False
    stages: tuple[StageReport, ...] = ()
    no_loops: str | None = None
    refused: str = ""
    rows: str = ""
    tokens: int = 0
    peak_without_loops: int | None = None
    peak: tuple[Share, ...] = ()
    memory: Memory | None = None
    weights: WeightTraffic | None = None
    compiled_pieces: Sequence[str] = ()
    bodies_shared: int = 0
    compile_seconds: float = 0.0
    eager_pieces: Mapping[str, str] = field(default_factory=dict)
    layer_pieces: int = 0
    from_cache: bool = False
    communication: Communication | None = None
    graphs: GraphCount | None = None
    exceeded: list[GraphCount] = field(default_factory=list, repr=False)
    graph: fx.GraphModule | None = None

    @property
    def limit_hit(self) -> bool:
        """Whether Dynamo has run a call of this code in eager mode since."""
        return bool(self.exceeded)

    @property
    def floor_bytes(self) -> int:
        """Bytes of the full-length values of the stage that has most of them: the least that a run needs."""
        return max((sum(value.bytes for value in stage.live) for stage in self.stages), default=0)

    @property
    def iteration_bytes(self) -> int:
        """Bytes that one mini-sequence is expected to hold in addition to full-length values."""
        return max((stage.iteration_bytes for stage in self.stages), default=0)

    @property
    def straight_bytes(self) -> int:
        """The most bytes that are live between loops."""
        return self.memory.most(Compute, Call, Transfer) if self.memory is not None else 0

    @property
    def expected_peak_bytes(self) -> int:
        """The expected peak of a run in bytes above its inputs, at the captured sizes.

        It is an estimate: kernels may need workspace in addition, and Inductor may need less.
        """
        return self.memory.most(LoopStep, Compute, Call, Transfer) if self.memory is not None else 0

    def exposed_seconds(self, bytes_per_second: float, flops_per_second: float) -> float:
        """Return how many seconds a run waits for weights, at the captured sizes: the part of their copies that the
        computation before them does not hide. 0 if no weights are on the host."""
        arrivals = self.weights.arrivals if self.weights is not None else ()
        return sum(arrival.exposed(bytes_per_second, flops_per_second) for arrival in arrivals)

    @property
    def floor_bytes_per_token(self) -> int:
        return max((sum(value.bytes_per_token for value in stage.live) for stage in self.stages), default=0)

    @property
    def full_length_values(self) -> list[str]:
        """Names of all values that live at full length, stage by stage."""
        return [output.name for stage in self.stages for output in stage.crossing]


def limit_in_words(record: Record) -> str | None:
    """Return what Dynamo's limit on the number of graphs means for further calls; None if it is not reached."""
    graphs = record.graphs
    if graphs is None or not (record.limit_hit or graphs.number >= graphs.most):
        return None
    to_come = "a call that needs another one runs in eager mode"
    now = "calls have run in eager mode since" if record.limit_hit else to_come
    return f"graph {graphs.number} of the {graphs.most} that {graphs.limit} allows for this code: {now}"


def host_share(record: Record) -> tuple[int, int] | None:
    """Return how many layers' keys and values leave for the host, and their bytes per token; None if none do."""
    if not record.on_host or record.fallback is not None:
        return None
    return len({value.layer for value in record.on_host}), sum(value.bytes_per_token for value in record.on_host)


def own_share(record: Record) -> tuple[int, int]:
    """Return the bytes of the rows that are copied out of larger values, and those of these values."""
    return sum(rows.bytes for rows in record.own_rows), sum(rows.base_bytes for rows in record.own_rows)


def moved_rows(record: Record) -> str:
    """Return what leaves for the host, in words."""
    rows = "new rows" if all(value.has_past for value in record.on_host) else "rows"
    return f"{rows} of {len(record.on_host)} keys and values"
