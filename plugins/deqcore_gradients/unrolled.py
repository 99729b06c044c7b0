"""The gradient of the solver's own steps, by running them once more with their graph."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
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
    current_scope,
    hookimpl,
)
from deqcore.captures import next_node

from .replay import Point, Replay, changed_since, checkpointed

#: Solvers whose steps can be differentiated; what the errors name.
REPLAYED = "'fixed_point_iter', 'simple_fixed_point_iter', 'damped', 'aitken' or 'anderson'"
INSTEAD = "gradient='implicit', which works with every solver"
#: A replay that ends so many residuals away from where the solve did is another solve.
RESIDUALS = 2.0


class UnrolledSettings(GradientSettings):
    """Settings of unrolling."""

    checkpoint: Literal["none", "every_k", "recursive"] = Field(
        "none",
        description="what the backward evaluates again instead of keeping it. every_k: segments of `every` steps; "
        "recursive: halves of halves",
    )
    every: int | None = Field(
        None,
        ge=1,
        description="steps of a segment. every_k: the root of the number of steps if not given; recursive: 1",
    )

    @model_validator(mode="after")
    def _every_is_used(self) -> UnrolledSettings:
        if self.every is not None and self.checkpoint == "none":
            raise ValueError(
                f"every={self.every} is the length of a checkpointed segment; set checkpoint='every_k' or 'recursive'"
            )
        return self


class Unrolled(GradientBackend[UnrolledSettings]):
    """Differentiates the steps that the forward solver took, from z0, as any other network of that depth.

    Drops nothing of the computation that was made. So it is not the gradient of the equilibrium where the solve stopped
    early: it lags behind the state by a few steps. Gradients flow to whatever f closes over, to args, and to z0.

    The steps are made a second time, with f's graph, up to the one whose state was returned (sample by sample, where
    they differ), and without judging. In training, the state of this replay is returned, equal to z* up to rounding.

    What can be differentiated so: `fixed_point_iter`, `simple_fixed_point_iter`, `damped`, `aitken`, `anderson`, and
    others' solvers whose steps are made of differentiable operations; these may write to their own state, if not to
    what autograd has saved in the same step. Other built-in solvers are refused: their steps use products with J that
    carry no graph, or buffers that autograd needs unchanged.

    Samples whose residual has come down to rounding error go on with the derivative of plain iteration: what the solver
    makes of differences that are rounding error, or zero, has none. Where NaN would come of the steps all the same, the
    backward raises an error.

    Costs as many evaluations as steps in the forward, and with checkpoints more in the backward. With N steps, and a
    segment of k of them, what is kept is

    =============  ===================================  ==========================================================
    ``none``       N graphs of f                        no further evaluation
    ``every_k``    k graphs, N / k states               N further evaluations; k = sqrt(N) if not given
    ``recursive``  k graphs, log2(N / k) states         about N log2(N / k) / 2 further evaluations
    =============  ===================================  ==========================================================

    where a state, and with ``none`` a graph, comes with all that the solver keeps (`anderson`: 2 * memory + 2 states,
    copied at every step for its derivative). f's norms and variational
    dropout masks are the same in all evaluations. In reverse mode the gradient can be differentiated again, any number
    of times, in all modes; forward mode and torch.func are refused. Nothing is solved, so there is no
    ``info["backward"]``.

    Source: Griewank and Walther, Evaluating Derivatives (2008), ch. 12, for checkpointing; Domke, Generic Methods for
    Optimization-Based Modeling (AISTATS 2012), for differentiating an optimizer's steps.

    Raises:
        ConfigError: the solver can't be replayed, or the state is one before the last.
        GradientModeError: the replay ended elsewhere than the solve did, or has no derivative.
    """

    #: States before the last one don't say after how many steps they were found.
    needs_equilibrium: ClassVar[bool] = True

    def __init__(self, settings: UnrolledSettings | None = None, **options: Any) -> None:
        super().__init__(settings, **options)
        self._checked: set[tuple[Any, ...]] = set()

    def check(self, solver: Solver[Any], compact: bool = False) -> None:
        """Refuse a solver whose steps have no graph.

        Raises:
            ConfigError: it is one.
        """
        if type(solver).solve is not Solver.solve:
            why = "it brings its own loop"
        elif any(_is_solver(value) for _, value in solver.settings):
            why = "it runs other solvers in its steps"
        elif not type(solver).traceable or solver.estimates:
            why = "its steps can't be followed by autograd"
        else:
            return
        raise ConfigError(
            f"gradient='unrolled' differentiates the solver's steps, and those of solver={_name(solver)!r} can't be: "
            f"{why}. Use solver={REPLAYED}, or {INSTEAD}."
        )

    def attach(self, problem: Problem, solution: Solution) -> Tensor:
        z: Tensor = solution["z"]
        solver = solution.solver
        if solver is None or "nstep" not in solution or problem.start is None:
            raise ConfigError(
                "gradient='unrolled' needs to know the steps that led to a state, which of states before the last one "
                "is not known. Give them another gradient: core={'intermediate': ['phantom']}."
            )
        self.check(solver)
        if not torch.is_grad_enabled():
            return z
        steps: Tensor = solution["nstep"].long()
        replay = Replay(problem, solver, steps, current_scope() or SolveScope())
        if replay.last == 0:  # z0 itself was handed on
            return problem.round(problem.start)
        begin = replay.begin(problem.start)
        if begin is None:
            return z
        end = self._follow(replay, begin)
        state = end.z if end.reached is None else end.reached
        finite = torch.isfinite(end.z.detach()).all(1)
        return _watched(_same_end(state, solution, solver.settings), begin.fz, finite)

    def _follow(self, replay: Replay, at: Point) -> Point:
        """The point after all steps. The last segment is not checkpointed: it is what the backward needs first."""
        mode, every, steps, first = self.settings.checkpoint, self.settings.every, replay.last, 0
        if mode == "every_k":
            length = every or max(1, round(steps**0.5))
            while first + length < steps:
                at = checkpointed(replay.run, at, first, first + length)
                first += length
        elif mode == "recursive":
            at, first = replay.halves(at, 0, steps, every or 1)
        at = replay.run(at, first, steps - 1)
        born = next_node()
        at = replay.run(at, max(first, steps - 1), steps)
        self._check_step(at.z, born, replay.solver)
        return at

    def _check_step(self, z: Tensor, born: int, solver: Solver[Any]) -> None:
        """Refuse a solver whose step changed what autograd had saved in it. Recorded again for a checkpoint, such a
        tensor would go into the gradient as it is now, without a word. Looked at once for each solver and shape.

        Raises:
            ConfigError: the step, whose nodes in the graph of `z` are those since `born`, did.
        """
        case = repr(solver), tuple(z.shape)
        if case in self._checked:
            return
        if changed_since(born, z):
            raise ConfigError(
                f"gradient='unrolled' differentiates the solver's steps, and those of solver={_name(solver)!r} change "
                f"tensors that autograd needs as they were, with these settings and a state of shape {tuple(z.shape)}. "
                f"Use others, solver={REPLAYED}, or {INSTEAD}."
            )
        self._checked.add(case)


def _name(solver: Solver[Any]) -> str:
    return solver.settings.name or type(solver).__name__


def _is_solver(value: Any) -> bool:
    items: tuple[Any, ...] = value if isinstance(value, tuple) else (value,)
    return any(isinstance(item, SolverSettings) for item in items)


# ---- what must not go unnoticed


def _same_end(z: Tensor, solution: Solution, settings: SolverSettings) -> Tensor:
    """`z`, where the replay ended near the solve's end; samples that are not finite keep the solve's own state.

    Raises:
        GradientModeError: it ended elsewhere.
    """
    norm, found = torch.linalg.vector_norm, solution["z"]
    finite = torch.isfinite(z.detach()).all(1)
    apart, size = norm(z.detach() - found, 2, 1), norm(found, 2, 1)
    residual = solution["abs_lowest"].to(size).nan_to_num(torch.inf)
    if settings.residual_norm != "l2":
        residual = residual * z.shape[1] ** 0.5
    other = finite & ~(apart <= torch.finfo(z.dtype).eps ** 0.5 * size + RESIDUALS * residual)
    if bool(other.any()):
        raise GradientModeError(
            f"gradient='unrolled' made the solver's steps once more, and {int(other.sum())} of {len(z)} samples ended "
            f"elsewhere than before, up to {float(apart[other].max()):.3g} away: f is not the same at every evaluation "
            "(random numbers, buffers that move), a sample that was not finite was tried again, or the solve went on "
            f"from another one (warm_start with keep_state=True; a core in stretches). Mend that, or use {INSTEAD}."
        )
    return z if bool(finite.all()) else torch.where(finite[:, None], z, found)


def _watched(z: Tensor, first: Tensor, finite: Tensor) -> Tensor:
    """`z`, whose backward raises an error instead of handing NaN on to `first`, f at the start, where none came in.

    Args:
        z: the state that is returned.
        first: shape (B, F).
        finite: (B,) bool, the samples this is about.

    Raises:
        GradientModeError: in the backward, it would.
    """
    came: list[bool] = []

    def enters(cotangent: Tensor | None) -> None:  # None stands for zeros
        came[:] = [cotangent is None or bool(torch.isfinite(cotangent).all())]

    def leaves(cotangent: Tensor | None) -> None:
        if cotangent is not None and came == [True] and not bool(torch.isfinite(cotangent[finite]).all()):
            raise GradientModeError(
                "the gradient of the solver's steps is not finite: its steps, or f, have no derivative somewhere on "
                "the way (a division 0 / 0, the root of 0), or it overflowed. Use solver='fixed_point_iter' or "
                f"'damped' with a fixed damping, fewer steps, or {INSTEAD}."
            )

    if first.requires_grad:
        z = z.view_as(z)  # the state itself may be f(z), which f may hold
        z.register_hook(enters)
        first.register_hook(leaves)
    return z


@hookimpl
def deqcore_gradient() -> type[Unrolled]:
    return Unrolled
