"""A polyalgorithm: the cheapest method first, and another one for each sample that it doesn't bring further."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from deqcore import LinearProblem, Problem, Solver, SolverChoice, SolverSettings, Step, hookimpl, registry

from .auto_part import part_of
from .shared import FLOOR_SPACINGS

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
#: Why samples leave a stage.
SLOW, STALLED, DIVERGED, BACK, FAILED, TURNS, ROSE = (
    "contracts too slowly",
    "stalled",
    "diverged",
    "not finite",
    "no derivative",
    "turns round",
    "rose again",
)


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
    """What a stage was called for and what it took, for `info`."""

    stage: int
    reasons: Counter[str]
    samples: int
    steps: int = 0
    nfe: int = 0
    products: int = 0


@dataclass
class Group:
    """Samples that are in one stage together.

    Attributes:
        stage: which one; -1 for samples that rest where they are.
        rows: their indices in the batch, or None for all.
        state: the stage's solver's own, None before its first step.
        visit: where its work is written down.
        returning: its samples go back to their best states before the first step.
        dear: its solver was seen to evaluate f by itself.
    """

    stage: int
    rows: Tensor | None
    state: Any
    visit: Visit
    returning: bool = False
    dear: bool = False

    def of(self, tensor: Tensor) -> Tensor:
        """The part of `tensor` that belongs to these samples."""
        return tensor if self.rows is None else tensor[self.rows]


@dataclass
class AutoState:
    """Where each sample is, and what is known of it.

    Attributes:
        groups: each sample is in one.
        best: (B, F), state of the lowest residual.
        lowest, before, mark: (B,), the lowest residual, the last one, and the last that was progress.
        age, patience: (B,) int64, steps since then, and how many there may be.
        done: (B,) bool, was within its tolerance once.
        entered, setbacks: (B,) int64, stages gone through after the first; times put back to the best state.
        last: z and f(z) of the step before, while some sample is in the plain stage.
        log: what was done, in order.
        failed: stages that can't be used for this f.
    """

    groups: list[Group]
    best: Tensor
    lowest: Tensor
    before: Tensor
    mark: Tensor
    age: Tensor
    patience: Tensor
    done: Tensor
    entered: Tensor
    setbacks: Tensor
    last: tuple[Tensor, Tensor] | None = None
    log: list[Visit] = field(default_factory=list)
    failed: dict[int, str] = field(default_factory=dict)


class Auto(Solver[AutoSettings]):
    """Plain iteration while it contracts fast, then the method that suits the map, then ever more robust ones."""

    def __init__(self, settings: AutoSettings | None = None, **options: Any) -> None:
        super().__init__(settings, **options)
        common = {key: getattr(self.settings, key) for key in OURS if key not in ("max_nfe", "divergence_factor")}
        chosen = self.settings.stages
        self.solvers: list[Solver[Any]] = [
            registry.get("solvers", stage.name)(stage.model_copy(update=common)) for stage in chosen
        ]
        self.names = [stage.name for stage in chosen]
        self.plain = 0 if self.names[0] == PLAIN and len(chosen) > 1 else None
        self.turning = self.names.index(self.settings.turning) if self.settings.turning in self.names else None

    # ---- the solver's interface

    def init(self, problem: Problem, z: Tensor, fz: Tensor) -> AutoState:
        visit = Visit(0, Counter(), z.shape[0])
        return self._fresh(z, [Group(0, None, None, visit)], [visit])

    def _fresh(self, z: Tensor, groups: list[Group], log: list[Visit]) -> AutoState:
        batch = z.shape[0]
        never = z.new_full((batch,), math.inf)
        none = torch.zeros(batch, dtype=torch.int64, device=z.device)
        patience = none + self._patience(0)
        return AutoState(groups, z, never, never, never, none, patience, none.bool(), none, none, log=log)

    def resume(self, problem: Problem, z: Tensor, fz: Tensor, state: AutoState) -> AutoState:
        if state.best.shape != z.shape:
            return self.init(problem, z, fz)
        log: list[Visit] = []
        for group in state.groups:
            group.stage, group.returning = max(group.stage, 0), False
            group.visit = Visit(group.stage, Counter({"warm start": self._size(group, z)}), self._size(group, z))
            log.append(group.visit)
            if group.state is not None:
                part = problem if group.rows is None else part_of(problem, z, group.rows)
                group.state = self.solvers[group.stage].resume(part, group.of(z), group.of(fz), group.state)
        fresh = self._fresh(z, state.groups, log)
        fresh.failed = state.failed
        for group in state.groups:
            self._set(fresh.patience, group.rows, self._patience(group.stage))
        return fresh

    def select(self, state: AutoState, rows: Tensor) -> AutoState:
        batch = state.best.shape[0]
        groups: list[Group] = []
        place = torch.full((batch,), -1, dtype=torch.int64, device=rows.device)
        place[rows] = torch.arange(len(rows), device=rows.device)
        for group in state.groups:
            if group.rows is None:
                groups.append(self._with(group, None, rows))
                continue
            there = (place[group.rows] >= 0).nonzero()[:, 0]
            if len(there):
                new = place[group.rows[there]]
                order = new.argsort()
                groups.append(self._with(group, new[order], there[order]))
        parts = {
            f.name: part[rows]
            for f in dataclasses.fields(state)
            if isinstance(part := getattr(state, f.name), Tensor)
        }
        last = None if state.last is None else (state.last[0][rows], state.last[1][rows])
        return dataclasses.replace(state, groups=groups, last=last, **parts)

    def _with(self, group: Group, rows: Tensor | None, chosen: Tensor) -> Group:
        """The group of the samples `chosen` of it, which are the `rows` of the batch."""
        state = None if group.state is None else self.solvers[group.stage].select(group.state, chosen)
        return dataclasses.replace(group, rows=rows, state=state)

    def inverse(self, state: AutoState) -> Callable[[Tensor], Tensor] | None:
        parts = [
            (group, self.solvers[group.stage].inverse(group.state))
            for group in state.groups
            if group.stage >= 0 and group.state is not None
        ]
        if len(parts) < len(state.groups) or any(inverse is None for _, inverse in parts):
            return None
        if len(parts) == 1 and parts[0][0].rows is None:
            return parts[0][1]

        def apply(x: Tensor) -> Tensor:
            out = torch.empty_like(x)
            for group, inverse in parts:
                out[group.rows] = inverse(x[group.rows])  # type: ignore[misc]
            return out

        return apply

    def notes(self, state: AutoState) -> Mapping[str, Any]:
        for group in state.groups:
            if group.state is not None:
                self.solvers[group.stage].notes(group.state)  # some let go of what a solution must not hold
        stages = [
            {
                "solver": self.names[visit.stage],
                "samples": visit.samples,
                "steps": visit.steps,
                "nfe": visit.nfe,
                "products": visit.products,
                "reason": ", ".join(f"{why}: {count}" for why, count in sorted(visit.reasons.items())) or "first",
            }
            for visit in state.log
            if visit.steps
        ]
        return {"stages": stages}

    def step(self, problem: Problem, z: Tensor, fz: Tensor, state: AutoState) -> Step:
        self._judge(problem, z, fz, state)
        if len(state.groups) == 1 and state.groups[0].rows is None and state.groups[0].stage >= 0:
            group = state.groups[0]
            found, image = self._advance(problem, z, fz, group, state)
        else:
            found, image = z.clone(), None
            for group in list(state.groups):
                if group.stage < 0:
                    continue
                part = part_of(problem, z, group.rows) if group.rows is not None else problem
                found[group.rows], _ = self._advance(part, group.of(z), group.of(fz), group, state)
        for visit in {id(group.visit): group.visit for group in state.groups if group.stage >= 0}.values():
            visit.steps += 1
            visit.nfe += image is None
        state.last = (z, fz) if self.plain is not None and any(g.stage == self.plain for g in state.groups) else None
        return Step(found, state, image)

    # ---- one group

    def _advance(
        self, problem: Problem, z: Tensor, fz: Tensor, group: Group, state: AutoState
    ) -> tuple[Tensor, Tensor | None]:
        """A step of this group's solver."""
        if group.returning:
            group.returning = False
            return group.of(state.best), None
        solver, visit = self.solvers[group.stage], group.visit
        nfe, products = problem.nfe, problem.njvp + problem.nvjp
        try:
            if group.state is None:
                group.state = self._begin(solver, problem, z, fz, group, state)
            found, group.state, image = solver.step(problem, z, fz, group.state)
        except (NotImplementedError, RuntimeError) as error:
            self._give_up(group, state, error)
            found, image = z, None
        group.dear = group.dear or problem.work > nfe + products
        visit.nfe += problem.nfe - nfe
        visit.products += problem.njvp + problem.nvjp - products
        return found, image
