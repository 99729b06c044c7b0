"""Judges the states of one run: residuals, the best so far, who is finished, who must be retried or frozen."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .journal import Journal
from .problem import Problem
from .report import Best, Report, Tolerance
from .rows import Rows, rows_for
from .settings import SolverSettings
from .solution import Solution, Status

__all__ = ["Monitor"]

#: A closer look (rounding error, samples done at different steps, divergence) is taken at every so many checks, and at
#: each one whose worst residual is at most NEAR times its tolerance: only there can it end the run in the next steps.
LOOK_EVERY = 8
NEAR = 50.0
#: Failures after which a sample with a non-finite residual is frozen at its best state.
STRIKES = 3
#: How much larger the residual of a state put together from several steps may be than its parts' were.
COUPLED_BY = 2.0


class Monitor:
    """One run's judge.

    In the usual case it compares one number and keeps references. A sample that is not finite takes the careful path.

    Args:
        problem: f on packed states; evaluated again only to retry samples and to check a composed state.
        z: the packed start.
        settings: tolerances and limits.
        scale: (B,) factor of each sample's absolute tolerance, or None.
        keep_trace: whether to keep the residuals of all checks.
    """

    def __init__(
        self, problem: Problem, z: Tensor, settings: SolverSettings, scale: Tensor | None, keep_trace: bool
    ) -> None:
        self.problem = problem
        self.settings = settings
        self.rows: Rows = rows_for(z, settings)
        self.tolerance = Tolerance(settings, self.rows, scale, problem.eps(z))
        self.never_stops = self.tolerance.fixed or settings.return_final
        self.keep_trace = keep_trace
        self.trace: list[tuple[Any, Any]] = []
        self.checked: list[int] = []
        nothing = self.rows.full(math.inf)
        self.now = Best(z, nothing, nothing, 0)
        self.journal = Journal(self.rows, self.tolerance, self.now)
        self.lowest: Any = nothing  # every sample's lowest residual so far
        self.start = math.nan  # worst residual at the first evaluation
        self.unit = math.inf  # size of the tolerance and the rounding error, to know when a closer look is worth it
        self.improved_at = 0
        self.coupled = False  # rows of a composed state turned out to depend on each other
        self.strikes: Tensor | None = None
        self.frozen: Tensor | None = None
        self.final: Best | None = None
        #: False for a run that is judged at its end only: what replaces a state that isn't finite there is the start.
        self.recovers = True

    # ---- during the run

    def judge(self, step: int, z: Tensor, fz: Tensor, again: bool = False) -> tuple[Tensor, Tensor, bool]:
        """Take in f(z) at this step. Returns z and f(z), repaired where they were not finite, and whether to stop.

        `again` takes back what was said of this step before, from an f(z) that was an estimate.
        """
        rows, tolerance = self.rows, self.tolerance
        if again:
            self._retract()
        residual, size = rows.measure(z, fz)
        excess = rows.excess(residual, size, tolerance.atol, tolerance.rtol)
        if self.frozen is not None or not -math.inf < excess < math.inf:
            z, fz, residual, size = self._repair(z, fz, residual, size)
            excess = self._excess(residual, size)
        self.now = Best(z, residual, size, step)
        self.journal.add(self.now)
        if math.isnan(self.start):
            self.begin(residual)
        self.checked.append(step)
        if self.keep_trace:
            self.trace.append((residual, size))
        if self.never_stops:
            return z, fz, False
        if excess <= 0:
            self.final = self.now
            return z, fz, True
        before, self.lowest = self.lowest, rows.lower(self.lowest, residual)
        if self.settings.patience is not None and bool((rows.to64(self.lowest) < rows.to64(before)).any()):
            self.improved_at = step
        return z, fz, self._worth_a_look(residual, size, excess) and self._look_closer(step)

    def _retract(self) -> None:
        self.final = None
        self.journal.retract()
        self.checked.pop()
        if self.keep_trace:
            self.trace.pop()

    def begin(self, residual: Any) -> None:
        """Take note of the first evaluation's residuals; a run that was not monitored is compared with these."""
        worst = self.rows.to64(residual).nan_to_num(0.0, 0.0, 0.0).max()
        self.start = float(worst) or math.inf  # nothing to go by where none was finite

    def _worth_a_look(self, residual: Any, size: Any, excess: float) -> bool:
        """Whether a closer look may end the run: by numbers that cost next to nothing, and may say yes in vain."""
        if self.settings.patience is not None or self.frozen is not None:
            return True
        if excess > NEAR * self.unit and len(self.checked) % LOOK_EVERY:
            return False
        rows, tolerance = self.rows, self.tolerance
        slope = max(tolerance.rtol, tolerance.floor)
        self.unit = tolerance.peak + slope * rows.excess(size, size, 0.0, 0.0)
        best = residual if self.coupled else self.lowest
        grown = rows.excess(residual, size, 0.0, 0.0) > self.start
        return grown or rows.excess(best, size, tolerance.atol, slope) <= 0

    def _excess(self, residual: Any, size: Any) -> float:
        """Largest residual above its tolerance, frozen samples aside."""
        if self.frozen is not None:
            residual = self.rows.from64(torch.where(self.frozen, 0.0, self.rows.to64(residual)))
        return self.rows.excess(residual, size, self.tolerance.atol, self.tolerance.rtol)

    def _look_closer(self, step: int) -> bool:
        """Whether all samples are at rounding error, or each is done at its own best step, or nobody gets further."""
        rows, tolerance, settings, now = self.rows, self.tolerance, self.settings, self.now
        residual, size = now.to64(rows)
        limit = tolerance.limit(size)
        done = residual <= limit
        if self.frozen is not None:
            done = done | self.frozen
        if bool(done.all()):
            self.final = now
            return True
        if not self.coupled and bool((done | (rows.to64(self.lowest) <= limit)).all()):
            if self._confirm(self.journal.best()):
                return True
            self.coupled = True
        if settings.patience is not None and step - self.improved_at >= settings.patience:
            return True
        # Against the start of all: where f couples rows, one may be still until the others' news arrive.
        least = torch.maximum(rows.to64(self.lowest), tolerance.target(size)).clamp_min(self.start)
        gone = residual > settings.divergence_factor * least
        return bool(gone.any()) and bool((gone | done).all())

    def _confirm(self, best: Best) -> bool:
        """Evaluate f at a state composed of several steps' best rows; take it as final if it is what its rows were."""
        rows, limit = self.rows, self.tolerance.limit
        residual, size = rows.measure(best.z, self.problem(best.z))
        now, claimed = rows.to64(residual), rows.to64(best.residual)
        was_done = claimed <= limit(rows.to64(best.size))
        holds = (now <= COUPLED_BY * claimed) & (~was_done | (now <= limit(rows.to64(size))))
        if self.frozen is not None:
            holds = holds | self.frozen
            residual = rows.from64(torch.where(self.frozen, claimed, now))
        if not bool(holds.all()):
            return False
        self.final = Best(best.z, residual, size, best.step)
        return True

    # ---- samples that are not finite

    def _repair(self, z: Tensor, fz: Tensor, residual: Any, size: Any) -> tuple[Tensor, Tensor, Any, Any]:
        """Retry samples whose residual is not finite from their best state; freeze them there after three failures."""
        rows, best = self.rows, self.journal.best()
        r, n = rows.to64(residual), rows.to64(size)
        frozen = self.frozen if self.frozen is not None else torch.zeros_like(r, dtype=torch.bool)
        strikes = self.strikes if self.strikes is not None else torch.zeros_like(r, dtype=torch.int64)
        bad = ~torch.isfinite(r) & ~frozen
        while bool(bad.any()):
            strikes = strikes + bad
            frozen = frozen | (strikes >= STRIKES)
            z = torch.where(bad.to(z.device)[:, None], best.z, z)
            fz = self.problem(z)
            r, n = map(rows.to64, rows.measure(z, fz))
            bad = ~torch.isfinite(r) & ~frozen
        self.strikes = strikes
        if bool(frozen.any()):
            self.frozen = self.journal.aside = frozen
            fz = torch.where(frozen.to(z.device)[:, None], z, fz)
            r = torch.where(frozen, rows.to64(best.residual), r)
            n = torch.where(frozen, rows.to64(best.size), n)
        return z, fz, rows.from64(r), rows.from64(n)

    def hold(self, z: Tensor) -> Tensor:
        """`z` with frozen samples put back to their best state."""
        if self.frozen is None:
            return z
        return torch.where(self.frozen.to(z.device)[:, None], self.journal.best().z, z)

    # ---- the result

    def finish(self, steps: int, keep_last: bool = False) -> Solution:
        """The solution after `steps` steps: the state returned, and the residual that it has.

        Args:
            steps: solver updates made.
            keep_last: return the last state judged, whatever the best was.
        """
        if self.final is None:
            if keep_last or self.settings.return_final:
                self.final = self.now
            elif self.tolerance.fixed:  # a run of a fixed number of steps has no evaluation to spare
                self.final = self.journal.common()
            elif isinstance((best := self.journal.best()).step, int):
                self.final = best
            elif self.coupled or not self._confirm(best):
                self.final = self.journal.common()
        return self._report(self.final or self.now, steps)

    def skipped(self) -> Solution:
        """The solution of a run of no steps: z0, of which nothing is known."""
        unknown = self.rows.full(math.nan)
        return self._report(Best(self.now.z, unknown, unknown, 0), 0)

    def _report(self, final: Best, steps: int) -> Solution:
        settings, problem = self.settings, self.problem
        frozen = self.frozen
        if not self.recovers and self.strikes is not None:
            frozen = self.strikes > 0
        ends = (self.start, self.now.residual)
        report = Report(final, ends, steps, settings.patience, self.tolerance, self.trace, self.checked, frozen)
        solution = report.solution(problem.nfe, problem.nvjp, problem.njvp)
        solution.spec = problem.spec
        if self.never_stops:
            solution.accepted = (Status.MAX_STEPS, Status.STALLED)
        return solution
