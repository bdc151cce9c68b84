"""Roles of the values of a mixture of experts that sorts its rows: see `tokens.sorted_rows` for their meaning."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Role(enum.Enum):
    SORTED = enum.auto()
    UNSORTED = enum.auto()
    SLOTS = enum.auto()
    TOKENS = enum.auto()
    KEYS = enum.auto()
    PLACED = enum.auto()
    COUNTS = enum.auto()
    ENDS = enum.auto()
    PLACES = enum.auto()
    RESULT = enum.auto()


class Use(enum.Enum):
    """What a member needs of a value from outside of the region."""

    ALL = enum.auto()
    OF_SLOTS = enum.auto()
    OF_TOKENS = enum.auto()
    #: A constant with one element per slot, created again for any number of slots.
    CONSTANT = enum.auto()


class NotSeparable(Exception):
    """Why the rows of a sort are not proved to be independent."""


@dataclass(frozen=True)
class Member:
    """A node of the region: its role, and the use of each operand (None: the operand is a member, too)."""

    role: Role
    uses: tuple[Use | None, ...]
