"""The gradient of the coupled iteration's own steps, undone one by one in the backward."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from deqcore import (
    ConfigError,
    GradientBackend,
    GradientModeError,
    GradientSettings,
    Problem,
    Solution,
    Solver,
    SolverSettings,
    SolveScope,
    Status,
    current_scope,
    hookimpl,
    iterate,
)
from deqcore.captures import substituted
from deqcore.products import is_batched_cotangent

from .inputs import Evaluation, Inputs, Watched
from .reversal import Reversal
from .solver import DAMPING, Pair, Reversible, ReversibleSettings
from .tape import Recording, Tape, spacing

__all__ = ["ReversibleGradient", "ReversibleGradientSettings", "deqcore_gradient"]


class ReversibleGradientSettings(GradientSettings):
    """Settings of the reversible gradient."""

    aliases: ClassVar[dict[str, str]] = {"beta": "damping"}

    damping: float | None = Field(
        None, gt=0, lt=1, description="beta. None: that of the solver 'reversible', 0.5 with another solver"
    )
    steps: int = Field(
        8,
        ge=1,
        description="steps to differentiate from a state that a solver found; and the fewest from z0 with "
        "core='reversible', where a start within the tolerance would get no gradient",
    )
    tolerance: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="largest relative error of a state reconstructed. None: the root of the dtype's spacing, 1.5e-8 in "
        "float64 and 3.5e-4 in float32; smaller keeps more states",
    )
    keep: int | None = Field(
        1,
        ge=0,
        description="most pairs of states to keep in the forward, besides the first and the last. Where that is too "
        "few, steps are made once more in the backward. None: as many as the tolerance needs",
    )


class ReversibleGradient(GradientBackend[ReversibleGradientSettings]):
    """Runs the coupled iteration without a graph, and undoes its steps in the backward to differentiate each.

    With ``core="reversible"`` the steps from z0 are the forward pass: as many as the solver's max_iter allows, or until
    its tolerance is met. With another core (and in eval mode), `steps` of them are made from the state found, which
    tends to the gradient of the equilibrium as the iteration contracts; in training, the state that they end at is
    returned.

    Exact for the steps made, up to the error of the states reconstructed. An undone step multiplies rounding errors by
    up to 1 / (1 - damping)^2, so states are kept as often as it takes to stay within `tolerance`. Each state is checked
    against a random projection that was kept in its place; where one is off by more, steps are made once more from
    the last state known, and more are kept. ``info["backward"]`` has the largest error of a state that was used as its
    residual, and in its trace those found wherever the true state is known. What f can't repeat (another random number
    at every evaluation) ends as STALLED. A sample that the loop had to put back, as it wasn't finite, has the gradient
    of its steps since then; one that ended non-finite has none.

    Gradients flow to z0, args, and whatever f closes over. First derivatives only, in reverse mode.

    Costs two evaluations a step and one more in the forward; two, and two products with J^T, a step in the backward.
    Memory is one evaluation's graph, some states, and two for each one kept: one in every
    log(tolerance / eps) / -2 log(1 - damping) steps or so.

    Source: McCallum, Arora and Foster, Reversible Deep Equilibrium Models (arXiv 2509.12917).

    Raises:
        ConfigError: both the solver and the gradient say another damping.
        GradientModeError: f uses a tensor in a way that can't be followed; a second derivative.
    """

    def attach(self, problem: Problem, solution: Solution) -> Tensor:
        start, settings, is_whole = self._task(problem, solution)
        if settings.max_iter == 0:
            return start
        inputs = Inputs(problem)
        tape = self._tape(start, settings)
        found = self._forward(Watched(problem, inputs), start.detach(), settings, tape)
        if is_whole:
            _tell(solution, found, problem)
        if not torch.is_grad_enabled():
            return problem.round(found["z"])
        replaceable, leaves = inputs.found(found["z"])
        values = [*replaceable, *leaves]
        if not (start.requires_grad or values):
            return problem.round(found["z"])
        run = _Run(problem, tape, replaceable, len(leaves), solution, found)
        return problem.round(_Undone.apply(run, substituted(start), *map(substituted, values)))

    def _task(self, problem: Problem, solution: Solution) -> tuple[Tensor, ReversibleSettings, bool]:
        """Where to start, how to go on from there, and whether that is the whole forward pass."""
        solver = solution.solver
        damping = self._damping(solver)
        if "status" in solution and bool((solution["status"] == Status.SKIPPED).all()):
            start = solution["z"] if problem.start is None else problem.start
            return start, ReversibleSettings(**_common(solver), damping=damping), True
        settings = ReversibleSettings(max_iter=self.settings.steps, tol=0.0, return_final=True, damping=damping)
        return solution["z"], settings, False

    def _damping(self, solver: Solver[Any] | None) -> float:
        mine = self.settings.damping
        if not isinstance(solver, Reversible):
            return mine or DAMPING
        theirs = solver.settings.damping
        if mine is not None and mine != theirs:
            raise ConfigError(
                f"gradient.damping={mine} and solver.damping={theirs} differ, and both are for the same iteration. "
                "Give one of them."
            )
        return theirs

    def _tape(self, z: Tensor, settings: ReversibleSettings) -> Tape:
        eps, keep = torch.finfo(z.dtype).eps, self.settings.keep
        tolerance = self.settings.tolerance or eps**0.5
        every = spacing(settings.damping, tolerance, eps)
        if keep is not None:
            every = max(every, math.ceil(settings.max_iter / (keep + 1)))
        return Tape(settings.damping, tolerance, every)

    def _forward(self, problem: Watched, z: Tensor, settings: ReversibleSettings, tape: Tape) -> Solution:
        """Make the steps; at least as many as are to be differentiated."""
        least = min(self.settings.steps, settings.max_iter)
        with torch.no_grad():
            found = iterate(Recording(settings, tape), problem, z).solution
            if tape.steps < least:
                settings = settings.model_copy(update={"max_iter": least, "return_final": True})
                found = iterate(Recording(settings, tape), problem, z).solution
        tape.finish(found["z"])
        problem.problem.nfe = problem.nfe
        return found


def _common(solver: Solver[Any] | None) -> dict[str, Any]:
    """The settings that every solver has, as this one has them."""
    settings = None if solver is None else solver.settings
    if not isinstance(settings, SolverSettings):
        return {}
    mixed = settings.rtol is not None or settings.atol is not None
    left_out = {"name", *(("tol", "stop_mode") if mixed else ("rtol", "atol"))}
    return {key: getattr(settings, key) for key in SolverSettings.model_fields if key not in left_out}


def _tell(solution: Solution, found: Solution, problem: Problem) -> None:
    """Have the call's solution be that of the iteration."""
    solution.update(found.items())
    solution["z"] = problem.round(found["z"])
    solution.accepted, solution.waits = found.accepted, found.waits


class _Run:
    """What the backward needs to know of a forward, besides the tensors that autograd keeps for it.

    Args:
        problem: f on packed states.
        tape: the notes of the forward.
        replaceable: the tensors that f uses; further values are leaves that stay where they are.
        leaves: how many of these there are.
        solution: the call's; told of the backward.
        found: the iteration's.
    """

    def __init__(
        self,
        problem: Problem,
        tape: Tape,
        replaceable: Sequence[Tensor],
        leaves: int,
        solution: Solution,
        found: Solution,
    ) -> None:
        self.problem = problem
        self.tape = tape
        self.replaceable = list(replaceable)  # f's own, by whose ids they are replaced
        self.count = len(self.replaceable) + leaves
        self.solution = solution
        self.scope = current_scope() or SolveScope()
        self.z: Tensor = found["z"]
        self.last: Tensor = found["nstep"].long()
        self.steps = sorted(tape.known)

    def release(self) -> tuple[Tensor, list[Tensor]]:
        """The state, and those on the tape; this object forgets them."""
        z, states = self.z.clone(), [part for step in self.steps for part in self.tape.release(step)]
        del self.z
        return z, states

    def backward(self, cotangent: Tensor, saved: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor | None]:
        """The gradients in the start and in the values."""
        values, states = saved[: self.count], saved[self.count :]
        pairs = zip(states[::2], states[1::2], strict=True)
        known = {step: Pair(y, z) for step, (y, z) in zip(self.steps, pairs, strict=True)}
        evaluation = Evaluation(self.problem, self.replaceable, values, wanted, self.scope)
        device = cotangent.device.type
        off = torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
        with torch.no_grad(), off:
            reversal = Reversal(self.tape, known, evaluation, self.last)
            start = reversal.run(cotangent.detach())
        self.solution.report(reversal.solution(start))
        return [start, *evaluation.sums]


class _Undone(torch.autograd.Function):
    """(run, start, *values) -> the state that the run ended at.

    The states on the tape are autograd's to keep, and so the hooks' for saved tensors.
    """

    @staticmethod
    def forward(ctx: Any, run: _Run, start: Tensor, *values: Tensor) -> Tensor:
        z, states = run.release()
        ctx.run = run
        ctx.save_for_backward(*values, *states)
        return z

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        (cotangent,) = cotangents
        if is_batched_cotangent(cotangent):
            raise GradientModeError(
                "gradient='reversible' undoes its steps for one cotangent at a time (is_grads_batched=True was given). "
                "Go through the cotangents one by one, or use torch.func.jacrev with deqcore.fixed_point and "
                "gradient='implicit'."
            )
        run: _Run = ctx.run
        saved = ctx.saved_tensors
        found = run.backward(cotangent, saved, ctx.needs_input_grad[2:])
        if torch.is_grad_enabled():
            anchors = (cotangent, *saved[: run.count])
            found = [None if part is None else _FirstOrderOnly.apply(part, *anchors) for part in found]
        return None, *found


class _FirstOrderOnly(torch.autograd.Function):
    """Lets a gradient through, and refuses to be differentiated in what it depends on."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *anchors: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        raise GradientModeError(
            "gradient='reversible' gives first derivatives only, and a second one was asked for. Use "
            "gradient='implicit', which is exact at every order, or 'unrolled', whose graph has further derivatives."
        )


@hookimpl
def deqcore_gradient() -> type[ReversibleGradient]:
    return ReversibleGradient
