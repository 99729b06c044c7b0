"""Times that can be compared on a busy machine: interleaved, paired with a reference, medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

__all__ = ["Spread", "paired_ratios", "per_call"]

#: A measurement shorter than this many seconds is repeated until it is as long: each case finds the caches as the one
#: before it left them.
SHORTEST = 2e-2

Case = Callable[[], Any]
Name = TypeVar("Name", bound=Hashable)


class Spread:
    """Several measurements of one thing: their median, and how far they reach."""

    def __init__(self, values: list[float]) -> None:
        self.values = values

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def times(self, factor: float) -> Spread:
        return Spread([factor * value for value in self.values])

    def __str__(self) -> str:
        return f"{_digits(self.median)} ({_digits(min(self.values))}..{_digits(max(self.values))})"


def _digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _seconds(case: Case, repeats: int) -> float:
    """Time of one call: that of this thread on its core, to which other processes add little."""
    start = time.thread_time()
    for _ in range(repeats):
        case()
    return (time.thread_time() - start) / repeats


def _repeats(case: Case) -> int:
    case()  # the first call fills caches
    return max(1, round(SHORTEST / max(_seconds(case, 1), 1e-6)))


def paired_ratios(reference: Case, cases: Mapping[Name, Case], rounds: int) -> tuple[Spread, dict[Name, Spread]]:
    """Seconds of `reference`, and each case's time over that of the reference run right before it.

    Each round visits all cases, so that what drifts over minutes meets all of them.
    """
    once = _repeats(reference)
    repeats = {name: _repeats(case) for name, case in cases.items()}
    seconds: list[float] = []
    ratios: dict[Name, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            base = _seconds(reference, once)
            seconds.append(base)
            ratios[name].append(_seconds(case, repeats[name]) / base)
    return Spread(seconds), {name: Spread(values) for name, values in ratios.items()}


def per_call(cases: Mapping[Name, Case], rounds: int) -> dict[Name, Spread]:
    """Seconds of one call of each case, interleaved."""
    repeats = {name: _repeats(case) for name, case in cases.items()}
    seconds: dict[Name, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            seconds[name].append(_seconds(case, repeats[name]))
    return {name: Spread(values) for name, values in seconds.items()}
