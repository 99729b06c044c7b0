"""What a polyalgorithm keeps of its stages, and the problem as the samples of one stage see it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor

from deqcore import LinearProblem, Problem

__all__ = [
    "RESTING",
    "AutoState",
    "Evaluates",
    "Group",
    "Visit",
    "Why",
    "subset",
    "turned",
    "without_evaluations",
]

#: Residuals of two plain steps whose cosine is below this say that J has large negative eigenvalues. For 0.99 times a
#: random matrix it is above -0.41 at 64 features, for eigenvalues down to -3 below -0.57.
TURNED = -0.5
#: The stage of samples that stay where they are: done, or frozen.
RESTING = -1


class Why(StrEnum):
    """Why samples go to a stage."""

    FIRST = "first"
    WARM = "warm start"
    SLOW = "contracts slowly"
    TURNED_ROUND = "turns round"
    STALLED = "stalled"
    DIVERGED = "diverged"
    NOT_FINITE = "not finite"
    NO_DERIVATIVE = "no derivative"
    ROSE = "rose again"
    DONE = "done"


@dataclass
class Visit:
    """What a stage was called for, and what it took: an entry of `info`."""

    reasons: Counter[Why]
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
        returning: (n,) bool, those that go back to their best states before that; None for nobody.
        follows: the step before was a plain one, which the solver may learn from.
    """

    stage: int
    rows: Tensor | None
    state: Any = None
    returning: Tensor | None = None
    follows: bool = False

    @property
    def index(self) -> Tensor | slice:
        """What picks them out of the batch."""
        return slice(None) if self.rows is None else self.rows

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

    @classmethod
    def fresh(cls, groups: list[Group], z: Tensor) -> AutoState:
        """The state before the first step from `z`."""
        never = z.new_full((z.shape[0],), math.inf)
        none = torch.zeros(z.shape[0], dtype=torch.int64, device=z.device)
        return cls(groups, none.clone(), z, never, never, never, none, none.clone(), none.bool(), none, none)

    def visit(self, stage: int) -> Visit:
        """What is written down of this stage."""
        return self.log.setdefault(stage, Visit(Counter()))


class Evaluates(Exception):  # no RuntimeError: those are taken for missing derivatives
    """A method asked for f where it was to do without."""


def subset(problem: Problem, z: Tensor, rows: Tensor) -> Problem:
    """`problem` for the samples `rows` (int64) of the state `z`: f is called for the whole batch, and counted there.

    Unlike :meth:`deqcore.Problem.narrow`, this asks nothing of f: samples may depend on each other.
    """

    def among(others: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda u: others.index_copy(0, rows, u)

    def on_rows(apply: Callable[[Tensor], Tensor], others: Tensor) -> Callable[[Tensor], Tensor]:
        whole = among(others)
        return lambda u: apply(whole(u))[rows]

    part: Any = copy(problem)  # counts for itself: see _advance() in auto.py
    part.spec = None
    part.call = on_rows(problem.call, z)
    part.eps = problem.eps
    part.round = on_rows(problem.round, z)
    if isinstance(problem, LinearProblem):
        products: Any = problem
        still = torch.zeros_like(z)
        part.b = problem.b[rows]
        part._product = on_rows(products._product, still)
        part._rproduct = products._rproduct and on_rows(products._rproduct, still)
    return part


def without_evaluations(problem: Problem) -> Problem:
    """`problem`, which raises :class:`Evaluates` instead of evaluating f."""

    def refuse(*given: Any) -> Any:
        raise Evaluates

    silent: Any = copy(problem)
    silent.call = silent._product = silent._rproduct = refuse
    return silent


def turned(state: AutoState, residual: Tensor) -> Tensor:
    """(B,) bool, samples whose residual points against that of the step before."""
    if state.last is None:
        return torch.zeros_like(state.done)
    return torch.cosine_similarity(residual, state.last[1] - state.last[0], 1) < TURNED
