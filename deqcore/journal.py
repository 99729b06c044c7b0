"""The states of a run that may still be the best, and what can be put together from them."""

from __future__ import annotations

import torch
from torch import Tensor

from .report import Best, Tolerance
from .rows import Rows

__all__ = ["Journal"]

#: States are kept by reference up to this many bytes; beyond, they are merged, which costs a copy. For small states the
#: bookkeeping of a merge at every step would cost more than the step.
KEPT_BYTES = 1 << 20


class Journal:
    """Keeps judged states by reference, and merges them into the best of every sample only when somebody asks.

    Args:
        rows: form of one number a sample.
        tolerance: unit in which whole states are compared.
        start: the first state, about which nothing is known yet.
    """

    def __init__(self, rows: Rows, tolerance: Tolerance, start: Best) -> None:
        self.rows = rows
        self.tolerance = tolerance
        self.entries = [start]
        self.limit = max(2, KEPT_BYTES // max(start.z.numel() * start.z.element_size(), 1))
        self.aside: Tensor | None = None  # (B,) bool of samples that say nothing about a whole state any more
        self._common: Best | None = None  # best state of one step among those merged already
        self._merged: tuple[Best, Best] | None = None  # the last entry when the best state was last asked for, and it

    def add(self, state: Best) -> None:
        """Take note of a judged state."""
        self.entries.append(state)
        if len(self.entries) > self.limit:
            common, best = self.common(), self.best()
            self.entries = [best]
            self._common = None if best is common else common

    def retract(self) -> None:
        """Forget the last state, and with it all that its claim may have hidden: estimates only get better."""
        self.entries, self._common, self._merged = self.entries[:1], None, None

    def best(self) -> Best:
        """Every sample's best state, put together."""
        if self._merged is not None and self._merged[0] is self.entries[-1]:
            return self._merged[1]
        best = self._merge() if len(self.entries) > 1 else self.entries[0]
        self._merged = (self.entries[-1], best)
        return best

    def _merge(self) -> Best:
        residuals, sizes = self._stacked(self.entries)
        # The latest of equals, so that a run that only rounds to and fro at the end keeps one state.
        which = residuals.shape[1] - 1 - residuals.flip(1).nan_to_num(torch.inf, torch.inf).argmin(1)
        first = int(which[0])
        if bool((which == first).all()):
            return self.entries[first]
        residual, size = residuals.gather(1, which[:, None])[:, 0], sizes.gather(1, which[:, None])[:, 0]
        merged = self.entries[0].step
        steps = [-1 if isinstance(entry.step, Tensor) else entry.step for entry in self.entries]
        step = torch.tensor(steps)[which]
        if isinstance(merged, Tensor):
            step = torch.where(which == 0, merged, step)
        return Best(self._rows_of(which), self.rows.from64(residual), self.rows.from64(size), step)

    def _stacked(self, entries: list[Best]) -> tuple[Tensor, Tensor]:
        stack = self.rows.stack
        return stack([entry.residual for entry in entries]), stack([entry.size for entry in entries])

    def _rows_of(self, which: Tensor) -> Tensor:
        """The packed state whose row i is that of entry which[i]."""
        used, place = which.unique(return_inverse=True)
        rows = place * which.shape[0] + torch.arange(which.shape[0])
        states = torch.cat([self.entries[k].z for k in used.tolist()])
        return states.index_select(0, rows.to(states.device))

    def common(self) -> Best:
        """The best state of one step: the one whose worst sample is best, in units of the tolerance."""
        whole = [entry for entry in (self._common, *self.entries) if entry is not None and isinstance(entry.step, int)]
        residuals, sizes = self._stacked(whole)
        limits = self.tolerance.target(sizes)
        ratios = residuals / torch.where(limits > 0, limits, 1.0)
        if self.aside is not None:
            ratios = torch.where(self.aside[:, None], 0.0, ratios)
        return whole[int(ratios.amax(0).nan_to_num(torch.inf).argmin())]
