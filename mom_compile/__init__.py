"""A `torch.compile` backend for the prefill and the scoring of long prompts in a fraction of the memory.

    mom_compile.compile(model)

`model.compile(backend="mom")` is the same without an import, but with PyTorch's own limit on the number of graphs.
"""

from mom_compile.backend import reports
from mom_compile.compile import compile
from mom_compile.explain import explain
from mom_compile.memory.refuse import MemoryBudgetError
from mom_compile.notices import MomWarning
from mom_compile.planning import DecodeEstimate, Estimate, Plan, PlanError, plan
from mom_compile.report import Report
from mom_compile.report.explanation import Explanation
from mom_compile.report.usage import HostMemory, host_memory
from mom_compile.runtime.host.limits import HostMemoryError
from mom_compile.runtime.host.store import empty_host_pool
from mom_compile.runtime.host.tensor import HostTensor
from mom_compile.runtime.host.weight import HostWeight
from mom_compile.runtime.ranks import RanksDiffer
from mom_compile.scores import TokenScores, token_log_probs
from mom_compile.substitutes import scan_operator
from mom_compile.timeline import measured_steps
from mom_compile.weights import OffloadedWeights, load_offloaded, offload_weights

#: The only place of the version: pyproject.toml reads it from here.
__version__ = "0.1.0"

__all__ = [
    "DecodeEstimate", "Estimate", "Explanation", "HostMemory", "HostMemoryError", "HostTensor", "HostWeight",
    "MemoryBudgetError", "MomWarning", "OffloadedWeights", "Plan", "PlanError", "RanksDiffer", "Report",
    "TokenScores", "compile", "empty_host_pool", "explain", "host_memory", "load_offloaded", "measured_steps",
    "offload_weights", "plan", "reports", "scan_operator", "token_log_probs",
]  # fmt: skip
