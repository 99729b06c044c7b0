"""A polyalgorithm: the cheapest method first, and another one for each sample that it doesn't bring further."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from deqcore import Problem, Solver, SolverChoice, SolverSettings, Step, hookimpl, registry

from .shared import FLOOR_SPACINGS
from .subset import Evaluates, subset, without_evaluations

#: The stage that is left as soon as a step contracts too little.
PLAIN = "fixed_point_iter"
#: A residual is progress when it is this share of the last one that was. On maps that Broyden's method and Anderson
#: acceleration solve, they go without for 7 steps at most.
PROGRESS = 0.9
#: A residual of so many times the lowest one is divergence. Runs that recovered rose up to 1e3-fold.
FAR = 1e4
#: Residuals of two plain steps whose cosine is below this say that J has large negative eigenvalues. For 0.99 times a
#: random matrix it is above -0.41 at 64 features, for eigenvalues down to -3 below -0.57.
TURNED = -0.5
#: A sample put back to its best state so often is taken to be frozen by the loop.
SETBACKS = 3
#: Settings of a stage that the whole solve sets.
OURS = (
    *("max_iter", "tol", "stop_mode", "rtol", "atol"),
    *("residual_norm", "return_final", "max_nfe", "divergence_factor"),
)
#: Why samples go to a stage.
SLOW, TURNED_ROUND, STALLED, DIVERGED, NOT_FINITE, NO_DERIVATIVE, ROSE, WARM = (
    *("contracts slowly", "turns round", "stalled", "diverged", "not finite", "no derivative"),
    *("rose again", "warm start"),
)
#: The stage of samples that stay where they are: done, or frozen.
RESTING = -1
#: Times that patience is doubled at most.
DOUBLINGS = 20


class AutoSettings(SolverSettings):
    """Settings of the polyalgorithm."""

    stages: tuple[SolverChoice, ...] = Field(
        default_factory=lambda: ("fixed_point_iter", "broyden", "anderson", "newton_krylov", "pseudo_transient"),  # type: ignore[arg-type]
        validate_default=True,
        min_length=1,
        description="solvers by name, in the order they are tried; after the last comes the first again, plain "
        "iteration aside",
    )
    contraction: float = Field(
        0.2,
        ge=0,
        le=1,
        description="fixed_point_iter is left by a sample whose residual isn't below this share of the one before; "
        "where it is, no method needs fewer evaluations",
    )
    turning: str = Field(
        "anderson",
        description="the stage to go to from fixed_point_iter where the residual turns round from one step to the "
        "next, as with large negative eigenvalues; it makes no difference where that isn't among the stages",
    )
    stall_after: int = Field(
        10,
        ge=1,
        description="steps without progress until a sample goes on to the next stage, twice as many each time round; "
        "a stage's own patience comes before it",
    )

    @field_validator("stages", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str | Mapping | SolverSettings) else value

    @field_validator("stages", mode="after")
    @classmethod
    def _leave_the_end_to_us(cls, value: tuple[SolverSettings, ...]) -> tuple[SolverSettings, ...]:
        for stage in value:
            usual = {key: type(stage).model_fields[key].default for key in OURS}
            given = [f"{key}={getattr(stage, key)!r}" for key in OURS if getattr(stage, key) != usual[key]]
            if given:
                raise ValueError(
                    f"{', '.join(given)} can't be set for stage {stage.name!r}: it ends with the whole solve. Set it "
                    "beside stages; a stage's own patience says when to go on to the next one"
                )
            if registry.get("solvers", stage.name).solve is not Solver.solve:
                raise ValueError(f"{stage.name!r} brings its own loop and can't be a stage; use it by itself")
        return value

    @model_validator(mode="after")
    def _turning_is_a_stage(self) -> AutoSettings:
        usual = type(self).model_fields["turning"].default
        names = [stage.name for stage in self.stages]
        if self.turning not in names and self.turning != usual:
            raise ValueError(f"turning={self.turning!r} is not among the stages: {', '.join(names)}")
        return self


@dataclass
class Visit:
    """What a stage was called for, and what it took: an entry of `info`."""

    reasons: Counter[str]
    steps: int = 0
    nfe: int = 0
    products: int = 0


@dataclass
class Group:
    """Samples that are in one stage together.

    Attributes:
        stage: which one, or RESTING.
        rows: their indices in the batch, increasing, or None for all.
        state: the stage's solver's own, None before its first step.
        returning: they go back to their best states before that.
        follows: the step before was a plain one, which the solver may learn from.
    """

    stage: int
    rows: Tensor | None
    state: Any = None
    returning: bool = False
    follows: bool = False

    def of(self, tensor: Tensor) -> Tensor:
        """The part of `tensor` that belongs to these samples."""
        return tensor if self.rows is None else tensor[self.rows]


@dataclass
class AutoState:
    """Where each sample is, and what is known of it.

    Attributes:
        groups: every sample is in one of them.
        stage: (B,) int64, and in which stage.
        best: (B, F), its state of the lowest residual.
        lowest, before, mark: (B,), the lowest residual, the last one, and the last one that was progress.
        age, patience: (B,) int64, steps since then, and how many there may be.
        done: (B,) bool, it was within its tolerance once.
        moves, setbacks: (B,) int64, how often it changed its stage, and was put back to its best state by the loop.
        log: stage -> what was done there, in the order of first use.
        dear: stages whose solvers were seen to evaluate f by themselves.
        failed: stages that can't be used for this f.
        last: z and f(z) of the step before, while some sample is in the plain stage.
    """

    groups: list[Group]
    stage: Tensor
    best: Tensor
    lowest: Tensor
    before: Tensor
    mark: Tensor
    age: Tensor
    patience: Tensor
    done: Tensor
    moves: Tensor
    setbacks: Tensor
    log: dict[int, Visit] = field(default_factory=dict)
    dear: set[int] = field(default_factory=set)
    failed: set[int] = field(default_factory=set)
    last: tuple[Tensor, Tensor] | None = None


class Auto(Solver[AutoSettings]):
    """DOC"""

    def __init__(self, settings: AutoSettings | None = None, **options: Any) -> None:
        super().__init__(settings, **options)
        chosen = self.settings.stages
        common = {key: getattr(self.settings, key) for key in OURS if key not in ("max_nfe", "divergence_factor")}
        self.names = [stage.name for stage in chosen]
        self._solvers: list[Solver[Any]] = [
            registry.get("solvers", stage.name)(stage.model_copy(update=common)) for stage in chosen
        ]
        self._plain = 0 if self.names[0] == PLAIN and len(chosen) > 1 else None
        self._patience = [stage.patience or self.settings.stall_after for stage in chosen]

    # ---- what the loop calls

    def init(self, problem: Problem, z: Tensor, fz: Tensor) -> AutoState:
        return self._fresh(z, [Group(0, None)], "first")

    def resume(self, problem: Problem, z: Tensor, fz: Tensor, state: AutoState) -> AutoState:
        if state.best.shape != z.shape:
            return self.init(problem, z, fz)
        for group in state.groups:
            group.returning = group.follows = False
            if group.stage == RESTING:
                group.stage = self._after(0 if self._plain is None else self._plain, state)
            elif group.state is not None:
                part = problem if group.rows is None else subset(problem, z, group.rows)
                group.state = self._solvers[group.stage].resume(part, group.of(z), group.of(fz), group.state)
        return self._fresh(z, state.groups, WARM)

    def _fresh(self, z: Tensor, groups: list[Group], reason: str) -> AutoState:
        never = z.new_full((z.shape[0],), math.inf)
        none = torch.zeros(z.shape[0], dtype=torch.int64, device=z.device)
        state = AutoState(groups, none.clone(), z, never, never, never, none, none.clone(), none.bool(), none, none)
        for group in groups:
            rows = slice(None) if group.rows is None else group.rows
            state.stage[rows], state.patience[rows] = group.stage, self._patience[group.stage]
            self._visit(state, group.stage, reason, len(group.of(z)))
        return state

    def step(self, problem: Problem, z: Tensor, fz: Tensor, state: AutoState) -> Step:
        self._judge(problem, z, fz, state)
        image = None
        if len(state.groups) == 1 and state.groups[0].rows is None:
            found, image = self._advance(problem, z, fz, state.groups[0], state)
        else:
            found = z.clone()
            for group in state.groups:
                rows = slice(None) if group.rows is None else group.rows
                found[rows] = self._advance(problem, z, fz, group, state)[0]
        for stage in {group.stage for group in state.groups} - {RESTING}:
            visit = state.log[stage]
            visit.steps += 1
            visit.nfe += image is None  # the loop's evaluation, which all stages at work share
        plain = self._plain is not None and any(group.stage == self._plain for group in state.groups)
        state.last = (z, fz) if plain else None
        return Step(found, state, image)

    def select(self, state: AutoState, rows: Tensor) -> AutoState:
        place = torch.full_like(state.stage, -1)
        place[rows] = torch.arange(len(rows), device=rows.device)
        groups: list[Group] = []
        for group in state.groups:
            if group.rows is None:
                groups.append(self._part(group, None, rows))
                continue
            there = (place[group.rows] >= 0).nonzero()[:, 0]
            if len(there):
                new = place[group.rows[there]]
                groups.append(self._part(group, *((new, there) if len(there) < len(rows) else (None, there))))
        parts = {key: part[rows] for key, part in vars(state).items() if isinstance(part, Tensor)}
        last = None if state.last is None else (state.last[0][rows], state.last[1][rows])
        return dataclasses.replace(state, groups=groups, last=last, **parts)

    def inverse(self, state: AutoState) -> Callable[[Tensor], Tensor] | None:
        inverses: list[tuple[Group, Callable[[Tensor], Tensor]]] = []
        for group in state.groups:
            none = group.stage == RESTING or group.state is None
            inverse = None if none else self._solvers[group.stage].inverse(group.state)
            if inverse is None:
                return None
            inverses.append((group, inverse))

        def apply(x: Tensor) -> Tensor:
            out = torch.empty_like(x)
            for group, inverse in inverses:
                out[slice(None) if group.rows is None else group.rows] = inverse(group.of(x))
            return out

        return apply

    def notes(self, state: AutoState) -> Mapping[str, Any]:
        for group in state.groups:
            if group.state is not None and group.stage != RESTING:
                self._solvers[group.stage].notes(group.state)  # some let go of what a solution must not hold
        return {
            "stages": [
                {
                    "solver": self.names[stage],
                    "samples": sum(visit.reasons.values()),
                    "steps": visit.steps,
                    "nfe": visit.nfe,
                    "products": visit.products,
                    "reason": ", ".join(f"{reason} ({count})" for reason, count in visit.reasons.items()),
                }
                for stage, visit in state.log.items()
            ]
        }

    # ---- one group's step

    def _advance(
        self, problem: Problem, z: Tensor, fz: Tensor, group: Group, state: AutoState
    ) -> tuple[Tensor, Tensor | None]:
        """The next states of this group, and f there if its solver has it."""
        z, fz, whole = group.of(z), group.of(fz), z
        if group.stage == RESTING:
            return z, None
        if group.returning:
            group.returning = False
            return group.of(state.best), None
        part = problem if group.rows is None else subset(problem, whole, group.rows)
        nfe, products = part.nfe, part.njvp + part.nvjp
        while True:
            try:
                if group.state is None:
                    group.state = self._begin(part, z, fz, group, state)
                found, group.state, image = self._solvers[group.stage].step(part, z, fz, group.state)
                break
            except (NotImplementedError, RuntimeError) as error:
                self._give_up(group, state, error)
        visit, made, products = state.log[group.stage], part.nfe - nfe, part.njvp + part.nvjp - products
        if made + products:
            state.dear.add(group.stage)
            visit.nfe, visit.products = visit.nfe + made, visit.products + products
        if part is not problem:
            problem.nfe, problem.njvp, problem.nvjp = part.nfe, part.njvp, part.nvjp
            image = None
        return found, image

    def _begin(self, problem: Problem, z: Tensor, fz: Tensor, group: Group, state: AutoState) -> Any:
        """The state of this group's solver, which is told of the last plain step where that costs nothing."""
        solver = self._solvers[group.stage]
        if group.follows and state.last is not None:
            silent, before = without_evaluations(problem), [group.of(part) for part in state.last]
            try:
                return solver.step(silent, *before, solver.init(silent, *before)).state
            except Evaluates:
                pass
        return solver.init(problem, z, fz)

    def _give_up(self, group: Group, state: AutoState, error: Exception) -> None:
        """Have the next stage take the place of one that can't be used, which is nearly always for want of a derivative.

        Raises:
            NotImplementedError, RuntimeError: no other is left.
        """
        state.failed.add(group.stage)
        if isinstance(error, torch.OutOfMemoryError) or len(state.failed) == len(self._solvers):
            raise error
        group.state, group.stage = None, self._after(group.stage, state)
        rows = slice(None) if group.rows is None else group.rows
        state.stage[rows], state.patience[rows] = group.stage, self._patience[group.stage]
        self._visit(state, group.stage, NO_DERIVATIVE, len(group.of(state.stage)))

    # ---- who goes on to another stage

    def _after(self, stage: int, state: AutoState) -> int:
        """The next stage that can be used; the plain one is never come back to."""
        order = [*range(stage + 1, len(self._solvers)), *range(stage + 1)]
        return next((k for k in order if k != self._plain and k not in state.failed), stage)

    def _visit(self, state: AutoState, stage: int, reason: str, samples: int) -> None:
        state.log.setdefault(stage, Visit(Counter())).reasons[reason] += samples

    def _measure(self, problem: Problem, z: Tensor, fz: Tensor) -> tuple[Tensor, Tensor]:
        """Residual norms, and what they must come down to, (B,) each."""
        settings = self.settings
        order = math.inf if settings.residual_norm == "max" else 2
        residual = torch.linalg.vector_norm(fz - z, order, 1)
        size = torch.linalg.vector_norm(fz, order, 1)
        if settings.residual_norm == "rms":
            residual, size = residual / z.shape[1] ** 0.5, size / z.shape[1] ** 0.5
        atol, rtol = settings.thresholds()
        return residual, torch.maximum(atol + rtol * size, FLOOR_SPACINGS * problem.eps(fz) * size)

    def _judge(self, problem: Problem, z: Tensor, fz: Tensor, state: AutoState) -> None:
        """Take in the residuals, and find out who goes to another stage."""
        norm, limit = self._measure(problem, z, fz)
        improved = norm < state.lowest
        still = (norm == state.lowest) | ~torch.isfinite(norm)
        state.best = torch.where(improved[:, None], z, state.best)
        state.lowest = torch.where(improved, norm, state.lowest)
        within = norm <= limit
        state.done = state.done | within
        progress = norm < PROGRESS * state.mark
        state.mark = torch.where(progress, norm, state.mark)
        state.age = torch.where(progress, 0, state.age + 1)
        leaving = ((state.age >= state.patience) | (norm > FAR * state.lowest) | still) & ~state.done
        if state.last is not None:
            leaving = leaving | (state.stage == self._plain) & (norm > self.settings.contraction * state.before)
        for group in state.groups:
            if group.stage in state.dear:
                leaving = leaving | (state.stage == group.stage) & state.done
            elif group.stage == RESTING:
                leaving = leaving | (state.stage == RESTING) & ~within & (state.setbacks < SETBACKS)
        if bool(leaving.any()):
            self._move(state, z, fz, norm, still)
        state.before = norm
