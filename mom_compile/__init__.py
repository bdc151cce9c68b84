"""mom_compile: exact long-context inference in a fraction of the memory, as a `torch.compile` backend.

    mom_compile.compile(model)

`model.compile(backend="mom")` is the same without an import, and with PyTorch's own limit on the number of graphs.
"""

from mom_compile.backend import reports
from mom_compile.compile import compile
from mom_compile.explain import explain
from mom_compile.memory.refusal import MemoryBudgetError
from mom_compile.notices import MomWarning
from mom_compile.planning import Plan, PlanError, plan
from mom_compile.report import Report
from mom_compile.runtime.host.limits import HostMemoryError
from mom_compile.runtime.host.store import empty_host_pool
from mom_compile.runtime.host.tensor import HostTensor
from mom_compile.runtime.host.usage import HostMemory, host_memory
from mom_compile.runtime.host.weight import HostWeight
from mom_compile.scores import TokenScores, token_log_probs
from mom_compile.timeline import measured_steps
from mom_compile.weights import OffloadedWeights, load_offloaded, offload_weights
from mom_passes.errors import CannotChunk
from mom_passes.rules import All, Claim, Dim, Past, Rows
from mom_passes.rules import register as chunk_rule

__version__ = "0.1.0"

__all__ = [
    "All", "CannotChunk", "Claim", "Dim", "HostMemory", "HostMemoryError", "HostTensor", "HostWeight",
    "MemoryBudgetError", "MomWarning", "OffloadedWeights", "Past", "Plan", "PlanError", "Report", "Rows", "TokenScores",
    "chunk_rule", "compile", "empty_host_pool", "explain", "host_memory", "load_offloaded", "measured_steps",
    "offload_weights", "plan", "reports", "token_log_probs",
]  # fmt: skip
