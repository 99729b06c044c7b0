"""One call of a DEQ: stretches solved, gradients attached."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from .interfaces import GradientBackend, Solver, Stretch
from .iterate import Callback, Run, iterate
from .problem import Problem
from .settings import SolverSettings
from .solution import OnFailure, Solution
from .spectrum import spectral_radius
from .state import with_gradient_of

if TYPE_CHECKING:
    from .deq import DEQ

__all__ = ["Forward", "hearing"]


class Forward:
    """One call of a DEQ: stretches solved, gradients attached."""

    def __init__(
        self,
        deq: DEQ,
        solver: Solver[Any],
        problem: Problem,
        writer: Callable[[Solution], Any] | None,
        callback: Callback | None,
        warm_state: Any,
    ) -> None:
        self.config = deq.config
        self.core = deq.core
        self.gradients = deq.gradients
        self.solver = solver
        self.problem = problem
        self.writer = writer
        self.callback = callback
        self.warm_state = warm_state
        self.keeps_state = self.config.keep_state or any(gradient.needs_state for gradient in self.gradients)

    def solve(self, z: Tensor, steps: int, sample_at: list[int], start: int = 0) -> Run:
        """Solve for `steps` steps from `z`, which earlier stretches reached at step `start`."""
        solver = self.solver
        settings = cast(SolverSettings, solver.settings)
        if steps != settings.max_iter:
            solver = type(solver)(settings.model_copy(update={"max_iter": steps}))
        config = self.config
        with torch.no_grad():
            run = iterate(
                solver,
                self.problem,
                z,
                sample_at=sample_at,
                check_every=config.check_every,
                compact=config.compact,
                keep_trace=config.keep_trace,
                keep_state=self.keeps_state,
                warm_state=self.warm_state,
                callback=self.callback if start == 0 else _counting_from(start, self.callback),
            )
        solution = run.solution
        self.warm_state = None
        solution.solver = self.solver
        if solution["z"] is z:
            solution["z"] = z.clone()  # the caller's own z0 is not handed out
        return run

    def judge(self, solution: Solution, what: str = "forward solve") -> None:
        """Ignore, warn of or raise what failed, in the name of the user's own line."""
        solution.judged(self.config.on_failure, what)

    def train(self, z: Tensor) -> tuple[list[Tensor], Solution]:
        """Solve stretch by stretch as the core plans, and attach each one's gradient."""
        plan = self.core.plan(self.solver.settings.max_iter)
        states: list[Tensor] = []
        start = first = 0
        run = Run(Solution({}), [])
        while first < len(plan):
            last = next((k for k in range(first, len(plan)) if plan[k].resume), len(plan) - 1)
            stretches = plan[first : last + 1]
            if not run.ended:  # otherwise the states that are left are the one where a callback ended it
                run = self.solve(z, stretches[-1].stop - start, [s.stop - start for s in stretches[:-1]], start)
            elif len(stretches) > 1:
                run = run._replace(samples=[run.solution["z"]] * (len(stretches) - 1))
            states += self._attach_all(stretches, run)
            if last == len(plan) - 1:  # a backend may have solved on, and said how that went
                self.judge(run.solution)
            z, start, first = states[-1].detach(), stretches[-1].stop, last + 1
            self.problem.start = z
        return states, self.told(run.solution)

    def _attach_all(self, stretches: list[Stretch], run: Run) -> list[Tensor]:
        states: list[Tensor] = []
        for stretch, sample in zip(stretches, [*run.samples, None], strict=True):
            solution = run.solution if sample is None else Solution({"z": sample}, run.solution.spec)
            states += self.attach(self.gradients[stretch.gradient], solution)
        return states

    def attach(self, gradient: GradientBackend[Any], solution: Solution) -> list[Tensor]:
        solution.on_backward = hearing(self.writer, self.config.on_failure)
        found = gradient.attach(self.problem, solution)
        return [found] if isinstance(found, Tensor) else list(found)

    def evaluate(self, z: Tensor, sradius_mode: bool) -> tuple[list[Tensor], Solution]:
        """Solve, and give the state its gradient, where autograd is on, without moving it."""
        solution = self.solve(z, self.solver.settings.max_iter, []).solution
        self.judge(solution)
        state: Tensor = solution["z"]
        if torch.is_grad_enabled():
            attached = self.attach(self.gradients[-1], solution)[-1]
            if attached is not state and attached.requires_grad:
                state = with_gradient_of(attached, state)
        sradius = torch.zeros(1, device=state.device)
        if sradius_mode:
            sradius = spectral_radius(self.problem, solution["z"])
        solution["sradius"] = sradius
        return [state], self.told(solution)

    def told(self, solution: Solution) -> Solution:
        """`solution` as the caller gets it: with the solver's state only where that was asked for."""
        self.problem.start = None
        if not self.config.keep_state:
            solution.solver_state = None
        return solution


def hearing(writer: Callable[[Solution], Any] | None, on_failure: OnFailure) -> Callable[[Solution], Any]:
    """What is done with a backward's solution. It lives as long as the forward's, and must not hold f or a graph."""

    def on_backward(found: Solution) -> None:
        if writer is not None:
            writer(found)
        found.judged(on_failure, "backward solve")

    return on_backward


def _counting_from(start: int, callback: Callback | None) -> Callback | None:
    return None if callback is None else lambda step, z, residual: callback(start + step, z, residual)
