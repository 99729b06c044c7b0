"""Judges the states of one run: residuals, the best so far, who is finished, who must be retried or frozen."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .journal import Journal
from .problem import Problem
from .report import Best, Report, Tolerance, Trace, worst
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
        self.measure = self.rows.measure
        self.never_stops = settings.return_final
        self.keep_trace = keep_trace
        nothing = self.rows.full(math.inf)
        self.journal = Journal(self.rows, self.tolerance, Best(z, nothing, nothing, 0), keep_trace)
        self.first: Any = None  # residuals at the first evaluation
        self.start = math.inf  # the worst of them
        self.checks = 0
        self.near = math.inf  # worst residual above its tolerance from which on a closer look is worth it
        self.low: Any = None  # lowest residuals, kept from where it came near
        self.improved: tuple[Tensor, Tensor] | None = None  # lowest residuals, and the steps of the last improvements
        self.apart = False  # samples are known not to depend on each other
        self.coupled = False  # rows of a composed state turned out to depend on each other
        self.strikes: Tensor | None = None
        self.frozen: Tensor | None = None
        self.final: Best | None = None
        self.composed: list[Best] = []  # a state composed at the end that was not what its rows were
        #: False for a run that is judged at its end only: what replaces a state that isn't finite there is the start.
        self.recovers = True

    # ---- during the run

    def judge(self, step: int, z: Tensor, fz: Tensor) -> tuple[Tensor, Tensor, bool]:
        """Take in f(z) at this step. Returns z and f(z), repaired where they were not finite, and whether to stop."""
        tolerance = self.tolerance
        residual, size = self.measure(z, fz)
        excess = self.rows.excess(residual, size, tolerance.atol, tolerance.rtol)
        if self.frozen is not None or not -math.inf < excess < math.inf:
            z, fz, residual, size = self._repair(z, fz, residual, size)
            excess = self._excess(residual, size)
        self.journal.add(step, z, residual, size)
        self.checks = checks = self.checks + 1
        if excess > self.near and checks % LOOK_EVERY:
            return z, fz, False
        if self.first is None:
            self.begin(residual)
        if excess <= 0 and not self.never_stops:
            self.final = Best(z, residual, size, step)
            return z, fz, True
        return z, fz, self._worth_a_look(residual, size, excess) and self._look(Best(z, residual, size, step))

    def _worth_a_look(self, residual: Any, size: Any, excess: float) -> bool:
        """Whether a closer look may end the run, by numbers that cost next to nothing and may say yes in vain."""
        rows, tolerance = self.rows, self.tolerance
        slope = max(tolerance.rtol, tolerance.floor)
        if self.near == math.inf or not self.checks % LOOK_EVERY:
            self.near = math.inf if self._careful else NEAR * (tolerance.peak + slope * rows.largest(size))
        if self.never_stops:
            return False
        if self._careful or rows.largest(residual) > self.settings.divergence_factor * self.start:
            return True
        if excess > self.near:
            return False
        self.low = rows.lower(rows.from64(self.journal.lowest()) if self.low is None else self.low, residual)
        return rows.excess(residual if self.coupled else self.low, size, tolerance.atol, slope) <= 0

    @property
    def _careful(self) -> bool:
        return self.settings.patience is not None or self.frozen is not None

    def judge_again(self, step: int, z: Tensor, fz: Tensor) -> tuple[Tensor, Tensor, bool]:
        """As :meth:`judge`, where what was said of this step came from an estimate of f(z)."""
        self.journal.retract()
        self.final = self.low = None
        return self.judge(step, z, fz)

    def begin(self, residual: Any) -> None:
        """Take note of the first evaluation's residuals."""
        self.first = residual
        largest = self.rows.largest(residual)
        self.start = largest if 0 < largest < math.inf else worst(self.rows.to64(residual))

    def _excess(self, residual: Any, size: Any) -> float:
        """Largest residual above its tolerance, frozen samples aside."""
        if self.frozen is not None:
            residual = self.rows.from64(torch.where(self.frozen, 0.0, self.rows.to64(residual)))
        return self.rows.excess(residual, size, self.tolerance.atol, self.tolerance.rtol)

    def _look(self, now: Best) -> bool:
        """Whether all samples are at rounding error, or each is done at its own best step, or nobody gets further."""
        residual, size = now.to64(self.rows)
        limit, target = self.tolerance.limits(size)
        done = residual <= limit
        if self.frozen is not None:
            done = done | self.frozen
        if bool(done.all()):
            self.final = now
            return True
        lowest = self.journal.lowest()
        if not self.coupled and bool((done | (lowest <= limit)).all()) and bool((done | self._was_done()).all()):
            if self.apart:
                self.final = self.journal.best()
                return True
            if self._confirm(self.journal.best()):
                return True
            self.coupled, self.composed = True, []
        if self.settings.patience is not None and bool((done | self._stale(now.step, lowest)).all()):
            return True
        gone = self._diverged(residual, lowest, target)
        return bool(gone.any()) and bool((gone | done).all())

    def _was_done(self) -> Tensor:
        """(B,) bool of samples whose best state is done by its own size, which the last one's may exceed by far."""
        residual, size = self.journal.best().to64(self.rows)
        return residual <= self.tolerance.limit(size)

    def _diverged(self, residual: Tensor, lowest: Tensor, target: Tensor) -> Tensor:
        # Against the start of all: where f couples rows, one may be still until the others' news arrive.
        return residual > self.settings.divergence_factor * torch.maximum(lowest, target).clamp_min(self.start)

    def _stale(self, step: int, lowest: Tensor) -> Tensor:
        """(B,) bool of samples whose lowest residual is `patience` steps old; all False without a patience."""
        if self.settings.patience is None:
            return torch.zeros_like(lowest, dtype=torch.bool)
        at = torch.full(lowest.shape, step)
        if self.improved is not None:
            at = torch.where(lowest < self.improved[0], step, self.improved[1])
        self.improved = lowest, at
        return step - at >= self.settings.patience

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
        measured = Best(best.z, residual, size, best.step)
        if not bool(holds.all()):
            self.composed = [measured]
            return False
        self.final = measured
        return True

    # ---- samples that leave

    def leavers(self, step: int) -> Tensor | None:
        """(B,) bool, on the CPU, of the samples that are finished one way or the other; None where none is.

        For samples that don't depend on each other only.
        """
        residual, size = (self.rows.to64(part[-1]) for part in (self.journal.residuals, self.journal.sizes))
        limit, target = self.tolerance.limits(size)
        lowest = self.journal.lowest()
        leave = residual <= limit
        if bool(((lowest <= limit) & ~leave).any()):
            leave = leave | self._was_done()
        leave = leave | self._diverged(residual, lowest, target) | self._stale(step, lowest)
        if self.frozen is not None:
            leave = leave | self.frozen
        return leave if bool(leave.any()) else None

    def narrowed(self, keep: Tensor) -> Monitor:
        """The judge of the samples `keep` (int64, on the CPU) alone, which knows what this one knows of them."""
        best = self.journal.best()
        z = best.z[keep.to(best.z.device)]
        left = Monitor(self.problem, z, self.settings, None, self.keep_trace)
        left.tolerance = tolerance = self.tolerance.select(left.rows, keep)
        residual, size = (left.rows.from64(part[keep]) for part in best.to64(self.rows))
        head = Best(z, residual, size, best.steps(best.z.shape[0])[keep])
        left.journal = Journal(left.rows, tolerance, head, self.keep_trace)
        left.first, left.start, left.recovers, left.apart = self.first, self.start, self.recovers, self.apart
        if self.improved is not None:
            left.improved = self.improved[0][keep], self.improved[1][keep]
        if self.strikes is not None:
            left.strikes = self.strikes[keep]
        return left

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
            fz = self.problem.again(bad.nonzero()[:, 0], z, fz) if self.apart else self.problem(z)
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

    def settle(self, z: Tensor, keep_last: bool = False) -> Best:
        """The state to return: the one that ended the run, or the best; `z`, the one judged last, with `keep_last`."""
        if self.final is not None:
            return self.final
        journal = self.journal
        last = Best(z, journal.residuals[-1], journal.sizes[-1], journal.steps[-1])
        if keep_last or self.settings.return_final:
            return last
        best = journal.best()
        if isinstance(best.step, int) or self.apart:
            return best
        if self.coupled:
            return journal.common([last])
        if self._confirm(best):
            return self.final or best
        return journal.common([last, *self.composed])

    def failed(self) -> Tensor | None:
        """(B,) bool of samples whose values can't be had, or None."""
        return self.strikes > 0 if not self.recovers and self.strikes is not None else self.frozen

    def trace(self) -> Trace:
        """Residuals of all checks."""
        journal = self.journal
        kept = (journal.residuals, journal.sizes, journal.steps) if self.keep_trace else ()
        return Trace(self.rows, *kept)

    def skipped(self) -> Solution:
        """The solution of a run of no steps: the start, of which nothing is known."""
        unknown = self.rows.full(math.nan)
        return self.report(Best(self.journal.best().z, unknown, unknown, 0), unknown, 0, Trace(self.rows), None)

    def finish(self, z: Tensor, steps: int, keep_last: bool = False) -> Solution:
        """The solution after `steps` steps, with the state returned, and the residual that it has.

        Args:
            z: the state judged last.
            steps: solver updates made.
            keep_last: return `z`, whatever the best was.
        """
        final = self.settle(z, keep_last)
        return self.report(final, self.journal.residuals[-1], steps, self.trace(), self.failed())

    def best(self) -> Tensor:
        """Every sample's best state so far."""
        return self.journal.best().z

    def residual(self) -> Tensor:
        """(B,) float64 residuals of the last check, on the CPU."""
        return self.rows.to64(self.journal.residuals[-1])

    def report(self, final: Best, last: Any, steps: int, trace: Trace, failed: Tensor | None) -> Solution:
        """The solution that says so."""
        problem = self.problem
        start = math.nan if self.first is None else self.start
        report = Report(final, (start, last), steps, self.settings.patience, self.tolerance, trace, failed)
        solution = report.solution(problem)
        if self.never_stops:
            solution.accepted = (Status.MAX_STEPS, Status.STALLED)
        return solution
