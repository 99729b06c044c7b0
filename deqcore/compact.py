"""A run whose finished samples leave the batch: what they were when they left, and the whole put together again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .monitor import Monitor
from .report import Best, Pieces, Trace
from .solution import Solution

__all__ = ["Compaction"]

#: Samples leave when they are at least this share of those present: each time, the solver's state is copied.
SHARE = 1 / 16


class Compaction:
    """The books of such a run.

    Args:
        monitor: the judge of the whole batch.
        z: packed states of the whole batch.
    """

    def __init__(self, monitor: Monitor, z: Tensor) -> None:
        self.first = monitor
        batch = z.shape[0]
        self.rows = torch.arange(batch)  # those still present, of the whole batch
        self.z = z.clone()
        self.residual, self.size, self.last = torch.zeros(3, batch, dtype=torch.float64)
        self.step = torch.zeros(batch, dtype=torch.int64)
        self.failed = torch.zeros(batch, dtype=torch.bool)
        self.pieces: list[tuple[Tensor, Trace]] = []

    def worth(self, leave: Tensor) -> bool:
        """Whether it is time for these to leave."""
        return int(leave.sum()) >= SHARE * len(leave)

    def drop(self, monitor: Monitor, leave: Tensor, keep: Tensor) -> None:
        """Write down the samples `leave` (B bool) at their best; go on with the others, `keep` (int64)."""
        self._write(monitor, monitor.journal.best(), leave)
        self.pieces.append((self.rows, monitor.trace()))
        self.rows = self.rows[keep]

    def whole(self, z: Tensor) -> Tensor:
        """The state of all samples, `z` being that of those present."""
        full = self.z.clone()
        full[self.rows.to(z.device)] = z
        return full

    def residuals(self, monitor: Monitor) -> Tensor:
        """(B,) float64, the last residuals of all samples."""
        full = self.last.clone()
        full[self.rows] = monitor.residual()
        return full

    def _write(self, monitor: Monitor, best: Best, which: Tensor) -> None:
        rows, here = self.rows[which], which.to(self.z.device)
        residual, size = best.to64(monitor.rows)
        self.z[rows.to(self.z.device)] = best.z[here]
        self.residual[rows], self.size[rows] = residual[which], size[which]
        self.last[rows] = monitor.residual()[which]
        self.step[rows] = best.steps(len(which))[which]
        failed = monitor.failed()
        if failed is not None:
            self.failed[rows] = failed[which]

    def finish(self, monitor: Monitor, z: Tensor, steps: int, keep_last: bool) -> Solution:
        """The solution of the whole batch; `monitor` judged those present, `z` is their last state."""
        final = monitor.settle(z, keep_last)
        self._write(monitor, final, torch.ones(len(self.rows), dtype=torch.bool))
        self.pieces.append((self.rows, monitor.trace()))
        numbers: Any = self.first.rows.from64
        best = Best(self.z, numbers(self.residual), numbers(self.size), self.step)
        trace = Pieces(self.first.rows, self.pieces)
        return self.first.report(
            best, numbers(self.last), steps, trace, self.failed if bool(self.failed.any()) else None
        )
