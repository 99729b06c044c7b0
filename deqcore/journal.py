"""The states of a run that may still be the best, and what can be put together from them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .report import Best, Tolerance
from .rows import Rows

__all__ = ["Journal", "kept_states"]

#: States are kept by reference up to this many bytes, MOST at most; beyond, they are merged. A merge at every step
#: would cost a small state more than the step; many kept make every evaluation write to fresh memory.
KEPT_BYTES = 1 << 18
MOST = 32


def kept_states(z: Tensor) -> int:
    """How many states like `z` are kept by reference."""
    return max(1, min(MOST, KEPT_BYTES // max(z.numel() * z.element_size(), 1)))


class Journal:
    """Keeps judged states by reference, and merges them into the best of every sample only when somebody asks.

    Args:
        rows: form of one number a sample.
        tolerance: unit in which whole states are compared.
        start: the first state, about which nothing is known yet, or the best so far.
        keep_trace: whether to keep the residuals of all states, and not only of those that may be the best.

    Attributes:
        residuals, sizes, steps: what is known of every state judged, in order.
    """

    def __init__(self, rows: Rows, tolerance: Tolerance, start: Best, keep_trace: bool) -> None:
        self.rows = rows
        self.tolerance = tolerance
        self.keep_trace = keep_trace
        self.residuals: list[Any] = []
        self.sizes: list[Any] = []
        self.steps: list[int] = []
        self.limit = kept_states(start.z)
        self.aside: Tensor | None = None  # (B,) bool of samples that say nothing about a whole state any more
        self._head = start  # the best of what was merged
        self._states: list[Tensor] = []  # what came since
        self._common: Best | None = None  # best state of one step among those merged, where that is not the head
        self._merged: Best | None = None  # the best state, since it was last asked for

    def add(self, step: int, z: Tensor, residual: Any, size: Any) -> None:
        """Take note of a judged state."""
        self._states.append(z)
        self.residuals.append(residual)
        self.sizes.append(size)
        self.steps.append(step)
        self._merged = None
        if len(self._states) >= self.limit:
            self.settle()

    def settle(self) -> None:
        """Merge what came since into the head."""
        best = self.best()
        keeps = self.limit > 1 and not isinstance(best.step, int)  # of large states, none is kept besides the best
        self._common = self.common([]) if keeps else None
        self._head, self._states = best, []
        if not self.keep_trace:
            del self.residuals[:-1], self.sizes[:-1], self.steps[:-1]

    def retract(self) -> None:
        """Forget the last state, whose residual was an estimate, and the others of its kind."""
        del self.residuals[-1], self.sizes[-1], self.steps[-1]
        nothing = self.rows.full(torch.inf)
        self._head = Best(self._head.z, nothing, nothing, 0)
        self._states, self._common, self._merged = [], None, None

    def lowest(self) -> Tensor:
        """(B,) float64, every sample's lowest residual so far."""
        return self.rows.stack(self._since(self.residuals, self._head.residual)).nan_to_num(torch.inf).amin(1)

    def _since(self, values: list[Any], head: Any) -> list[Any]:
        count = len(self._states)
        return [head, *values[len(values) - count :]]

    def best(self) -> Best:
        """Every sample's best state, put together."""
        if self._merged is None:
            self._merged = self._merge() if self._states else self._head
        return self._merged

    def _entry(self, k: int) -> Best:
        """The head (0), or one of the states since (1, 2, ...)."""
        if k == 0:
            return self._head
        at = len(self.steps) - len(self._states) + k - 1
        return Best(self._states[k - 1], self.residuals[at], self.sizes[at], self.steps[at])

    def _merge(self) -> Best:
        residuals = self.rows.stack(self._since(self.residuals, self._head.residual))
        # The latest of equals, so that a run that only rounds to and fro at the end keeps one state.
        which = residuals.shape[1] - 1 - residuals.flip(1).nan_to_num(torch.inf, torch.inf).argmin(1)
        first = int(which[0])
        if bool((which == first).all()):
            return self._entry(first)
        sizes = self.rows.stack(self._since(self.sizes, self._head.size))
        residual, size = residuals.gather(1, which[:, None])[:, 0], sizes.gather(1, which[:, None])[:, 0]
        step = torch.tensor([0, *self._since(self.steps, 0)[1:]])[which]
        step = torch.where(which == 0, self._head.steps(len(which)), step)
        return Best(self._rows_of(which), self.rows.from64(residual), self.rows.from64(size), step)

    def _rows_of(self, which: Tensor) -> Tensor:
        """The packed state whose row i is that of entry which[i]."""
        states = [self._head.z, *self._states]
        if len(states) == 2:  # large ones
            return torch.where((which == 1).to(states[0].device)[:, None], states[1], states[0])
        rows = which * which.shape[0] + torch.arange(which.shape[0])
        return torch.cat(states).index_select(0, rows.to(states[0].device))

    def common(self, others: list[Best]) -> Best:
        """The best whole state, of one step or of `others`: the one whose worst sample is best in units of the
        tolerance."""
        entries = [self._common, *(self._entry(k) for k in range(len(self._states) + 1))]
        whole = [entry for entry in entries if entry is not None and isinstance(entry.step, int)] + others
        residuals, sizes = (self.rows.stack(part) for part in zip(*((e.residual, e.size) for e in whole), strict=True))
        limits = self.tolerance.target(sizes)
        ratios = residuals / torch.where(limits > 0, limits, 1.0)
        if self.aside is not None:
            ratios = torch.where(self.aside[:, None], 0.0, ratios)
        return whole[int(ratios.amax(0).nan_to_num(torch.inf).argmin())]
