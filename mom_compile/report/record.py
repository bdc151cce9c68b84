"""What is reported on a graph: what was done, what was not, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import fx

from mom_compile.report.facts import Facts
from mom_compile.report.shares import Share
from mom_compile.report.stages import StageReport
from mom_compile.torch_compat import GraphCount
from mom_passes.program.memory import Memory
from mom_passes.program.program import Call, Compute, LoopStep, Transfer
from mom_passes.program.traffic import WeightTraffic


@dataclass(frozen=True)
class Record(Facts):
    """What is reported on one captured graph: the facts, and more. Nothing is decided by it.

    fallback       why the graph went to stock Inductor unchanged, or None
    failed         whether that reason was a failure rather than a decision
    stages         the loops, in the order they run
    no_loops       why a rewritten graph has no loops over mini-sequences, or None
    refused        why the user's `memory_budget` cannot be kept, if `explain` has found that; else empty
    rows           why mini-sequences have their rows, if the rule for GPUs decided them; else empty
    tokens         how many tokens the longest loop had when it was captured
    peak_without_loops  `expected_peak_bytes` by the same memory model if the captured operators ran one by one on all
                   tokens; None where the model cannot say (experts) and where `explain` did not ask
    peak           what the expected peak is made of, the largest first
    memory         what the program needs, step by step, as expressions in the sizes of the graph
    weights        what arrives of weights that are kept on the host, or None
    compiled_pieces  the loop bodies and straight pieces that were compiled for this graph
    bodies_shared  how many pieces it shares with other graphs
    eager_pieces   pieces that Inductor could not compile and that run eagerly, with its error
    layer_pieces   into how many pieces a graph without loops was cut, so that its layers share them; 0: not cut
    from_cache     whether this process read it from the compile cache: no pass has run, and there is no code to show
    graphs         which of the graphs that Dynamo makes of its code this is, and how many there may be; None where
                   Dynamo did not compile it (`explain`)
    exceeded       filled when Dynamo runs a call of this code in eager mode, because it has reached its limit
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
    graphs: GraphCount | None = None
    exceeded: list[GraphCount] = field(default_factory=list, repr=False)
    graph: fx.GraphModule | None = None

    @property
    def limit_hit(self) -> bool:
        """Whether Dynamo has run a call of this code in eager mode since."""
        return bool(self.exceeded)

    @property
    def floor_bytes(self) -> int:
        """Lower bound on a run's bytes, at the captured sizes: the most full-length values of a stage."""
        return max((sum(value.bytes for value in stage.live) for stage in self.stages), default=0)

    @property
    def iteration_bytes(self) -> int:
        """Expected bytes of one mini-sequence besides full-length values, at the captured sizes."""
        return max((stage.iteration_bytes for stage in self.stages), default=0)

    @property
    def straight_bytes(self) -> int:
        """Most bytes that are alive between loops, at the captured sizes."""
        return self.memory.most(Compute, Call, Transfer) if self.memory is not None else 0

    @property
    def expected_peak_bytes(self) -> int:
        """Expected bytes of a run above its inputs, at the captured sizes.

        An estimate: kernels need further memory of their own, and Inductor may need less.
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
