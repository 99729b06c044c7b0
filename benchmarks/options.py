"""What a run of the benchmarks is asked for."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from .maps import SIX

__all__ = ["Options", "parse_seeds"]


@dataclass(frozen=True)
class Options:
    """Options of the command line.

    Attributes:
        quick: few rounds and seeds, no largest state.
        seeds: of the six maps; None for 0-3, and 0 alone for the largest.
        cases: of the random test.
    """

    quick: bool = False
    seeds: tuple[int, ...] | None = None
    cases: int = 10_000

    def of(self, name: str) -> tuple[int, ...]:
        """The seeds of one of the six maps."""
        seeds = tuple(range(SIX[name].seeds)) if self.seeds is None else self.seeds
        return seeds[:1] if self.quick else seeds

    def maps(self) -> list[str]:
        """The maps to solve."""
        return [name for name in SIX if not (self.quick and name == "G512")]


def parse_seeds(text: str) -> tuple[int, ...]:
    """``4``, ``4,9`` or ``4-7``."""
    seeds: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        if not (first.isdigit() and (last or first).isdigit()):
            raise argparse.ArgumentTypeError(f"seeds are numbers or ranges like 0-3, separated by commas; got {text!r}")
        seeds += range(int(first), int(last or first) + 1)
    return tuple(seeds)
