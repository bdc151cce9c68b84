"""Plans: whether a model fits and how long its context can be, without a GPU and without weights."""

from mom_compile.planning.configs import PlanError
from mom_compile.planning.estimate import DecodeEstimate, Estimate
from mom_compile.planning.plan import plan
from mom_compile.planning.planned import Plan

__all__ = ["DecodeEstimate", "Estimate", "Plan", "PlanError", "plan"]
