"""A polyalgorithm: the cheapest method first, and another one for each sample that it doesn't bring further."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from deqcore import GradientModeError, Problem, Solver, SolverChoice, SolverSettings, Step, hookimpl, registry

from .shared import FLOOR_SPACINGS, set_otherwise
from .stages import RESTING, AutoState, Evaluates, Group, Why, subset, turned, without_evaluations

#: The stage that is left as soon as a step contracts too little.
PLAIN = "fixed_point_iter"
#: A residual is progress when it is this share of the last one that was. On contractive maps Broyden's method and
#: Anderson acceleration go without for 12 steps at most.
PROGRESS = 0.5
#: A residual of so many times the lowest one is divergence. Runs that recovered rose up to 1e3-fold.
FAR = 1e4
#: A sample goes on from its best state where its residual is so many times the lowest one; else from where it is. To
#: start at the best state each time solved fewer of 200 random problems (168 for 181).
LOST = 100.0
#: A sample put back to its best state so often is taken to be frozen by the loop.
SETBACKS = 3
#: The default stages. Damped iteration may crawl for ever; Newton steps are dear, and soon known to be in vain.
STAGES = (
    *("fixed_point_iter", "broyden", "anderson", {"name": "damped", "patience": 8}),
    *({"name": "newton_krylov", "patience": 4}, {"name": "pseudo_transient", "patience": 10}),
)
#: Settings of a stage that the whole solve sets.
OURS = (
    *("max_iter", "tol", "stop_mode", "rtol", "atol"),
    *("residual_norm", "return_final", "max_nfe", "divergence_factor"),
)
#: Times that patience is doubled at most.
DOUBLINGS = 20


class AutoSettings(SolverSettings):
    """Settings of the polyalgorithm."""

    stages: tuple[SolverChoice, ...] = Field(
        default=STAGES,  # type: ignore[assignment]
        validate_default=True,
        description="solvers by name, in the order they are tried; after the last comes the first again, plain "
        "iteration aside",
    )
    contraction: float = Field(
        0.02,
        ge=0,
        le=1,
        description="fixed_point_iter is left unless every step brings the residual below this share of what it was; "
        "at 0.2 it took twice the evaluations of broyden on some maps, for tolerances of 1e-12",
    )
    turning: str = Field(
        "anderson",
        description="the stage to go to from fixed_point_iter where the residual turns round from one step to the "
        "next, as with large negative eigenvalues; it makes no difference where that isn't among the stages",
    )
    stall_after: int = Field(
        20,
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
        if not value:  # min_length would speak up about bad items as well
            raise ValueError("give one stage at least")
        for stage in value:
            given = set_otherwise(stage, OURS)
            if given:
                raise ValueError(
                    f"{given} can't be set for stage {stage.name!r}: it ends with the whole solve. Set it "
                    "beside stages; a stage's own patience says when to go on to the next one"
                )
            if registry.get("solvers", stage.name).solve is not Solver.solve:
                raise ValueError(f"{stage.name!r} brings its own loop and can't be a stage; use it by itself")
        return value

    @model_validator(mode="after")
    def _turning_is_a_stage(self) -> AutoSettings:
        names = [stage.name for stage in self.stages]
        if self.turning not in (*names, type(self).model_fields["turning"].default):
            raise ValueError(f"turning={self.turning!r} is not among the stages: {', '.join(names)}")
        return self


class Auto(Solver[AutoSettings]):
    """Plain iteration while it contracts fast, then the method that suits the map, then ever more robust ones.

    Every sample goes its own way through the stages: on to the next one when its residual has made no progress for a
    while, has grown far above its lowest, or was not finite; from where it is, or from its best state if that is far
    better. It stays in a stage that works. After plain iteration, samples whose residual turned round go to `turning`
    first. A stage that evaluates f by itself (Newton's methods) is told to leave samples alone once they are done.

    Use it when the map isn't known, or isn't the same all through training: it needs about as many evaluations as the
    better one of `broyden` and `anderson`, and solves more maps than any single method. Prefer the method itself where
    it is known which one is best: `auto` spends 20 steps and more on one that fails, and its choice is by residuals
    only. It is no cure for a map without a fixed point.

    A step costs what the stages at work cost, one state more in memory, some reductions, and one wait for the device;
    evaluations of f are shared by all stages at work, products with J are not. f is always called for the whole batch.
    Samples that don't depend on each other have the same stages in any batch, but for two things: they leave the plain
    stage together, and a stage of Newton's kind begins anew when others join it. Where f couples samples, say so by
    batch_dims=0; it goes on otherwise too, each stage seeing the others' samples as they were, but solves fewer maps.
    A stage that needs derivatives that f doesn't have is left out, unless no other is left.

    ``info["stages"]`` has a dict for each stage used: ``solver``; ``samples`` that came to it, each time counted;
    ``steps``; ``nfe`` and ``products`` in these steps, the loop's own evaluations included; ``reason``, why they came.

    Source: the idea is Rice's (1968), and NonlinearSolve.jl (Pal et al., arXiv:2403.16341) is the model of one as the
    default for maps that aren't known. The stages and the rules for leaving them were found by measurements.
    """

    def __init__(self, settings: AutoSettings | None = None, **options: Any) -> None:
        super().__init__(settings, **options)
        chosen = self.settings.stages
        common = {key: getattr(self.settings, key) for key in OURS if key not in ("max_nfe", "divergence_factor")}
        self.names = [stage.name for stage in chosen]
        self._solvers = [registry.get("solvers", stage.name)(stage.model_copy(update=common)) for stage in chosen]
        self._plain = 0 if self.names[0] == PLAIN and len(chosen) > 1 else None
        turning = self.settings.turning
        self._turning = self.names.index(turning) if turning in self.names else None
        self._patience = [stage.patience or self.settings.stall_after for stage in chosen]

    def init(self, problem: Problem, z: Tensor, fz: Tensor) -> AutoState:
        return self._fresh(z, [Group(0, None)], Why.FIRST)

    def resume(self, problem: Problem, z: Tensor, fz: Tensor, state: AutoState) -> AutoState:
        if state.best.shape != z.shape:
            return self.init(problem, z, fz)
        for group in state.groups:
            group.returning, group.follows = None, False
            if group.stage == RESTING:
                group.stage = self._after(0 if self._plain is None else self._plain, state)
            elif group.state is not None:
                part = problem if group.rows is None else subset(problem, z, group.rows)
                group.state = self._solvers[group.stage].resume(part, group.of(z), group.of(fz), group.state)
        return self._fresh(z, state.groups, Why.WARM)

    def _fresh(self, z: Tensor, groups: list[Group], reason: Why) -> AutoState:
        state = AutoState.fresh(groups, z)
        for group in groups:
            state.stage[group.index], state.patience[group.index] = group.stage, self._patience[group.stage]
            state.visit(group.stage).reasons[reason] += len(group.of(z))
        return state

    def step(self, problem: Problem, z: Tensor, fz: Tensor, state: AutoState) -> Step:
        self._judge(problem, z, fz, state)
        image = None
        if len(state.groups) == 1 and state.groups[0].rows is None:
            found, image = self._advance(problem, z, fz, state.groups[0], state)
        else:
            found = z.clone()
            for group in state.groups:
                found[group.index] = self._advance(problem, z, fz, group, state)[0]
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
                new, order = place[group.rows[there]].sort()
                groups.append(self._part(group, new if len(new) < len(rows) else None, there[order]))
        parts = {key: part[rows] for key, part in vars(state).items() if isinstance(part, Tensor)}
        last = None if state.last is None else (state.last[0][rows], state.last[1][rows])
        return dataclasses.replace(state, groups=groups, last=last, **parts)

    def inverse(self, state: AutoState) -> Callable[[Tensor], Tensor] | None:
        inverses: list[tuple[Group, Callable[[Tensor], Tensor]]] = []
        for group in state.groups:
            ready = group.stage != RESTING and group.state is not None
            inverse = self._solvers[group.stage].inverse(group.state) if ready else None
            if inverse is None:
                return None
            inverses.append((group, inverse))

        def apply(x: Tensor) -> Tensor:
            out = torch.empty_like(x)
            for group, inverse in inverses:
                out[group.index] = inverse(group.of(x))
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

    def _advance(
        self, problem: Problem, z: Tensor, fz: Tensor, group: Group, state: AutoState
    ) -> tuple[Tensor, Tensor | None]:
        """The next states of this group, and f there if its solver has it."""
        z, fz, whole = group.of(z), group.of(fz), z
        if group.stage == RESTING:
            return z, None
        if group.returning is not None:
            back, group.returning = group.returning, None
            return torch.where(back[:, None], group.of(state.best), z), None
        part = problem if group.rows is None else subset(problem, whole, group.rows)
        nfe, products = part.nfe, part.njvp + part.nvjp
        while True:
            try:
                if group.state is None:
                    group.state = self._begin(part, z, fz, group, state)
                found, group.state, image = self._solvers[group.stage].step(part, z, fz, group.state)
                break
            except (NotImplementedError, RuntimeError) as error:
                if part.work == nfe + products and not isinstance(error, GradientModeError):
                    raise
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
        """Have the next stage take the place of one that can't be used, mostly for want of a derivative.

        Raises:
            NotImplementedError, RuntimeError: no other is left.
        """
        state.failed.add(group.stage)
        if isinstance(error, torch.OutOfMemoryError) or len(state.failed) == len(self._solvers):
            raise error
        group.state, group.stage = None, self._after(group.stage, state)
        state.stage[group.index], state.patience[group.index] = group.stage, self._patience[group.stage]
        state.visit(group.stage).reasons[Why.NO_DERIVATIVE] += len(group.of(state.stage))

    # ---- who goes on to another stage

    def _after(self, stage: int, state: AutoState) -> int:
        """The next stage that can be used; the plain one is never come back to."""
        order = [*range(stage + 1, len(self._solvers)), *range(stage + 1)]
        return next((k for k in order if k != self._plain and k not in state.failed), stage)

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
        # Put back by the loop, and not by this solver, whose stages begin with no mark.
        still = (norm == state.lowest) & torch.isfinite(state.mark) | ~torch.isfinite(norm)
        state.best = torch.where(improved[:, None], z, state.best)
        state.lowest = torch.where(improved, norm, state.lowest)
        within = norm <= limit
        state.done = state.done | within
        progress = norm < PROGRESS * state.mark
        state.mark = torch.where(progress, norm, state.mark)
        state.age = torch.where(progress, 0, state.age + 1)
        stalled, far = state.age >= state.patience, norm > FAR * state.lowest
        open_ = ~state.done & (state.stage != RESTING)
        slow = finished = rose = torch.zeros_like(within)
        if state.last is not None:
            slow = (state.stage == self._plain) & (norm > self.settings.contraction * state.before)
        for group in state.groups:
            if group.stage in state.dear:
                finished = finished | (state.stage == group.stage) & state.done
            elif group.stage == RESTING:
                rose = (state.stage == RESTING) & ~within & (state.setbacks < SETBACKS)
        if bool(((stalled | far | still) & open_ | slow | finished | rose).any()):
            held = still & open_ & (~torch.isfinite(norm) | (z == state.best).all(1))
            state.setbacks = state.setbacks + held
            rests = finished | open_ & (state.setbacks >= SETBACKS)
            # Samples leave the plain stage together: steps of several small groups take longer than those of one.
            slow = (state.stage == self._plain) & slow.any()
            turns = slow & turned(state, fz - z) if self._turning is not None else torch.zeros_like(slow)
            reasons = {
                Why.DONE: rests,
                Why.ROSE: rose,
                Why.NOT_FINITE: held,
                Why.DIVERGED: far & open_,
                Why.STALLED: stalled & open_,
            }
            self._move(state, norm, {**reasons, Why.TURNED_ROUND: turns, Why.SLOW: slow})
        state.before = norm

    def _move(self, state: AutoState, norm: Tensor, reasons: Mapping[Why, Tensor]) -> None:
        """Have samples go to another stage, each for the first of these reasons that it has."""
        target, going = state.stage.clone(), torch.zeros_like(state.done)
        follows = torch.zeros_like(going)
        for reason, rows in reasons.items():
            rows = rows & ~going
            for stage in set(state.stage[rows].tolist()):
                to = self._after(self._plain or 0 if reason == Why.ROSE else stage, state)
                to = {Why.DONE: RESTING, Why.TURNED_ROUND: cast(int, self._turning)}.get(reason, to)
                here = rows & (state.stage == stage)
                target[here] = to
                if to != RESTING:
                    state.visit(to).reasons[reason] += int(here.sum())
            going = going | rows
            follows = follows | (rows if reason in (Why.SLOW, Why.TURNED_ROUND) else False)
        self._regroup(state, target, going, follows, norm)
        working = going & (target != RESTING)
        state.stage, state.moves = target, state.moves + working
        state.age, state.mark = state.age.masked_fill(going, 0), state.mark.masked_fill(going, math.inf)
        first = int(self._plain is not None)
        rounds = ((state.moves - first) // (len(self._solvers) - first)).clamp(0, DOUBLINGS)
        patience = torch.tensor([*self._patience, 0]).to(target)[target] << rounds
        state.patience = torch.where(going, patience, state.patience)

    def _regroup(self, state: AutoState, target: Tensor, going: Tensor, follows: Tensor, norm: Tensor) -> None:
        """Form the groups anew, now that the samples `going` go to their targets."""
        groups: list[Group] = []
        merged, lost = going.clone(), ~(norm <= LOST * state.lowest)
        for group in state.groups:
            stays = ~group.of(going)
            joined = group.stage == RESTING or group.stage in state.dear
            if joined and bool((target[going] == group.stage).any()):  # begins anew, with who comes
                merged = merged | ((state.stage == group.stage) & ~going)
            elif bool(stays.all()):
                groups.append(group)
            elif bool(stays.any()):
                there = stays.nonzero()[:, 0]
                groups.append(self._part(group, there if group.rows is None else group.rows[there], there))
        for stage in sorted(set(target[merged].tolist())):
            chosen = merged & (target == stage)
            rows = None if bool(chosen.all()) else chosen.nonzero()[:, 0]
            group = Group(stage, rows, follows=bool((follows | ~chosen).all()))
            if not group.follows and bool((chosen & lost).any()):
                group.returning = group.of(lost)
            groups.append(group)
        state.groups = groups

    def _part(self, group: Group, rows: Tensor | None, chosen: Tensor) -> Group:
        """The group of the samples `chosen` of this one, which are the `rows` of the batch."""
        state = None if group.state is None else self._solvers[group.stage].select(group.state, chosen)
        return dataclasses.replace(group, rows=rows, state=state)


@hookimpl
def deqcore_solver() -> type[Auto]:
    return Auto
