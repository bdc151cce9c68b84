"""`mom-compile doctor`: what works on this machine, what does not, and remedies."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import click
from rich.console import Console
from rich.text import Text

from mom_compile.cli.checks import Finding, State, findings
from mom_compile.cli.printing import results
from mom_compile.report.rendered import plain_table

_STYLES = {State.OK: "green", State.LIMITED: "yellow", State.BROKEN: "bold red"}


@dataclass(frozen=True)
class Ability:
    """A feature of the backend; `lacking` is why it does not work here, empty if it does."""

    what: str
    lacking: str = ""


@click.command()
@click.pass_context
def doctor(ctx: click.Context) -> None:
    """Show what works on this machine. The exit code is 1 if the backend cannot work at all."""
    found = findings()
    show(results(), found, abilities(found))
    if any(finding.state is State.BROKEN for finding in found):
        ctx.exit(1)


def abilities(found: Sequence[Finding]) -> list[Ability]:
    """Derive which features work from the findings."""
    by_name = {finding.name: finding for finding in found}
    basis = _first_lacking(by_name, "torch", "backend", "compile cache")
    on_gpu = _first_lacking(by_name, "GPU", "Triton")
    pinned = "" if by_name["pinned memory"].state is State.OK else by_name["pinned memory"].found
    return [
        Ability("plan, explain", "" if _installed("transformers") else "transformers is not installed"),
        Ability("plots (--plot, Report.plot)", "" if _installed("matplotlib") else "matplotlib is not installed"),
        Ability("prefill and decode on the CPU", basis or _lacking(by_name, "C++ compiler")),
        Ability("prefill and decode on the GPU", basis or on_gpu),
        Ability("cache and weights on the host, for a GPU", basis or on_gpu or pinned),
    ]


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _first_lacking(found: Mapping[str, Finding], *names: str) -> str:
    return next((lacking for name in names if (lacking := _lacking(found, name))), "")


def _lacking(found: Mapping[str, Finding], name: str) -> str:
    """A limited GPU or compiler does not suffice; untested versions do."""
    finding, strict = found[name], name in ("GPU", "C++ compiler")
    bad = finding.state is State.BROKEN or (strict and finding.state is State.LIMITED)
    return f"{name}: {finding.found}" if bad else ""


def show(console: Console, found: Sequence[Finding], able: Sequence[Ability]) -> None:
    """Print two tables: findings and abilities."""
    table = plain_table("", "", "found", "remedy", left=4)
    for finding in found:
        state = Text(finding.state.value, style=_STYLES[finding.state])
        table.add_row(Text(finding.name), state, Text(finding.found), Text(finding.remedy))
    console.print(table)
    works = plain_table("here", "", "", left=3)
    for ability in able:
        state = Text("no", style="yellow") if ability.lacking else Text("works", style="green")
        works.add_row(Text(ability.what), state, Text(ability.lacking))
    console.print(works)
