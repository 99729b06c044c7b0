"""What a solver says of its result, checked, and counts of several seeds as one cell of a table."""

from __future__ import annotations

from typing import Any

from deqcore import Solution, Status

__all__ = ["LEGEND", "Tally", "says"]

LEGEND = (
    "n F: n of the seeds ended without it; n !: says it got there, what it returned did not; n P: n of those counted "
    "stopped at the rounding error of the dtype, above the tolerance, and say so; n -: it refused the map."
)


def says(info: Any, key: str, tolerance: float) -> str:
    """``reached``, ``precision`` or ``failed``, by the solver's own account."""
    if not isinstance(info, Solution):
        return "reached" if float(info[key].max()) < tolerance else "failed"
    statuses = info.counts()
    if set(statuses) == {Status.CONVERGED}:
        return "reached"
    return "precision" if all(status.ok for status in statuses) else "failed"


class Tally:
    """The counts of one cell: solves of one map from several seeds."""

    def __init__(self) -> None:
        self.counts: list[int] = []
        self.failed = self.precision = self.wrong = self.refused = 0

    def add(self, calls: int, claim: str, true: bool) -> None:
        """One solve: its evaluations, what it says, and whether that is so."""
        if claim == "failed":
            self.failed += 1
        elif claim == "refused":
            self.refused += 1
        elif claim == "reached" and not true:
            self.wrong += 1
        else:
            self.counts.append(calls)
            self.precision += claim == "precision"

    @property
    def whole(self) -> bool:
        """Whether all seeds got there, or to the dtype's rounding error."""
        return not (self.failed or self.wrong or self.refused)

    def __str__(self) -> str:
        low, high = (min(self.counts), max(self.counts)) if self.counts else (0, 0)
        parts = [f"{low}" if low == high else f"{low}-{high}"] if self.counts else []
        for number, mark in ((self.failed, "F"), (self.wrong, "!"), (self.precision, "P"), (self.refused, "-")):
            parts += [f"{number} {mark}"] if number else []
        return ", ".join(parts)
