"""Broyden's method with a bounded memory that stays finite."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from pydantic import Field, field_validator
from torch import Tensor

from deqcore import Problem, Solver, SolverSettings, Step, hookimpl

#: Halvings of the step that a line search tries.
HALVINGS = 5
#: Residual decrease that a full step must bring to be taken as it is (Armijo's constant).
DECREASE = 1e-4
#: Where |y|^2 of a pair is more than this times |s|^2, which no contraction brings about, f turns steps round and
#: stretches them, and the good update learns more from the pair; elsewhere the bad one does. See the class.
STRETCH = 4.0
#: A sample that was moved by more than this share of its step was put elsewhere, and starts anew.
MOVED = 0.5
#: Ridge of the reduction's Gram matrix, relative to its diagonal: keeps its Cholesky factor from failing.
RIDGE = {torch.float32: 3e-7, torch.float64: 1e-12}
#: States of at least so many numbers are multiplied in PARTS, so that no state of products is made.
LARGE_STATE = 1 << 16
PARTS = 32


class BroydenSettings(SolverSettings):
    """Settings of Broyden's method."""

    aliases: ClassVar[dict[str, str]] = {"LBFGS_thres": "memory", "ls": "line_search"}

    memory: int = Field(50, ge=0, description="rank of the inverse Jacobian kept, 2 states each; 0 for max_iter")
    update: Literal["combined", "good", "bad"] = Field(
        "combined", description="Broyden's first update (good), his second (bad), or per pair the one that suits it"
    )
    line_search: bool = Field(False, description="halve a sample's step while its residual would not fall")

    @field_validator("memory", mode="before")
    @classmethod
    def _default(cls, value: Any) -> Any:
        """TorchDEQ's default for LBFGS_thres is None; a program that passes it on means the default."""
        return cls.model_fields["memory"].default if value is None else value


@dataclass
class BroydenState:
    """Inverse Jacobian H = -I + left^T right of f(z) - z, and the step before.

    Attributes:
        left, right: (B, memory, F), rows in use first.
        count: rows in use.
        residual: (B, F), the last one.
        direction: (B, F), -H residual by the H of then; the step, but for a line search.
        length: (B, 1), share of the direction that was gone, or None for all of it.
        z: (B, F), where the last step led to; another state there was repaired or rounded.
    """

    left: Tensor
    right: Tensor
    count: int = 0
    residual: Tensor | None = None
    direction: Tensor | None = None
    length: Tensor | None = None
    z: Tensor | None = None


class Broyden(Solver[BroydenSettings]):
    """Quasi-Newton steps on g(z) = f(z) - z with Broyden's rank-one update of the inverse Jacobian H, sample by sample.

    With s the last step and y the change of the residual, H becomes H + (s - H y) v^T / (v.y), v = H^T s (good) or y
    (bad). The bad update is nearly a Krylov method where f contracts, and the good one is better where f turns steps
    round and stretches them. By default each sample's pair is used for the one that it suits.

    Use it where the spectral radius of df/dz is near or above 1: it needs the fewest evaluations of the built-in
    solvers there. It starts as plain iteration (J0 = -I). Its steps are dearer than Anderson's once the rank is high.

    A step costs one evaluation and two (B, 1, F) x (F, rank) products, four with the good update; memory is 2 * memory
    + 4 states at most. When the memory is full, H is cut to what it does on the latest two thirds of its right-hand
    vectors, and is -I across them; overwriting the oldest pair instead would leave an inverse that belongs to nothing.

    Source: Broyden (1965), both updates; choosing between them: Martinez, Numer. Math. 38 (1982).
    """

    traceable: ClassVar[bool] = False

    def init(self, problem: Problem, z: Tensor, fz: Tensor) -> BroydenState:
        batch, features = z.shape
        rank = max(2, min(self.settings.memory or self.settings.max_iter, self.settings.max_iter))
        left = z.new_empty(batch, rank, features)
        return BroydenState(left, torch.empty_like(left))

    def resume(self, problem: Problem, z: Tensor, fz: Tensor, state: BroydenState) -> BroydenState:
        fresh = self.init(problem, z, fz)
        if (state.left.shape[0], state.left.shape[2]) != tuple(z.shape):
            return fresh
        if state.count >= fresh.left.shape[1]:
            _cut(state, fresh.left.shape[1] - 1)
        fresh.count = state.count
        fresh.left[:, : state.count] = state.left[:, : state.count]
        fresh.right[:, : state.count] = state.right[:, : state.count]
        return fresh

    def step(self, problem: Problem, z: Tensor, fz: Tensor, state: BroydenState) -> Step:
        residual = fz - z
        if state.z is not None and z is not state.z:
            _recover(state, z, residual)
        if state.count == state.left.shape[1]:
            _cut(state, 2 * state.count // 3)
            state.direction = None
        if state.residual is None or state.direction is None:
            direction = _product(state, residual).neg_()
        else:
            direction = self._learn(state, residual)
        state.residual, state.direction = residual, direction
        if self.settings.line_search:
            return self._search(problem, z, residual, direction, state)
        state.z = z + direction
        return Step(state.z, state)

    def _learn(self, state: BroydenState, residual: Tensor) -> Tensor:
        """Update H by the pair that ends at `residual`; the new -H residual.

        With s = -H (residual before), s - H y is -H residual by the old H: so the new vector and the new direction are
        both parallel to that, and neither s nor H y is needed.
        """
        count = state.count
        y = torch.sub(residual, cast(Tensor, state.residual), out=state.right.select(1, count))
        state.residual = None
        scale, share = _dot(y, y), _dot(y, residual)
        product = _product(state, residual)
        if self.settings.update != "bad":
            scale, share = self._good(state, y, product, scale, share)
        useless = ~(scale.abs() > 0)[:, None]  # did not move, or isn't finite: this sample keeps its H
        change = torch.div(product, scale.neg()[:, None], out=state.left.select(1, count))
        factor = (share / scale)[:, None].masked_fill_(useless, 0.0).sub_(1)
        rest = None
        if state.length is not None:  # s is a part of the direction only: s - H y = -product - (1 - length) direction
            rest = (1 - state.length) * state.direction
            change.sub_(rest / scale[:, None])
        if _some(useless):
            change.masked_fill_(useless, 0.0)
            y.masked_fill_(useless, 0.0)
        state.count = count + 1
        product.mul_(factor)
        return product if rest is None else product.add_(rest * (factor + 1))

    def _good(
        self, state: BroydenState, y: Tensor, product: Tensor, scale: Tensor, share: Tensor
    ) -> tuple[Tensor, Tensor]:
        """v.y and v.residual, with v = H^T s put in y's place, for the samples whose pair suits the good update."""
        direction = cast(Tensor, state.direction)
        step = direction if state.length is None else state.length * direction
        if self.settings.update == "good":
            chosen = torch.ones_like(scale, dtype=torch.bool)
        else:
            chosen = scale > STRETCH * _dot(step, step)
            if not _some(chosen):
                return scale, share
        count = state.count
        v, only = y.unsqueeze(1), chosen.to(y.dtype)[:, None]
        y.masked_fill_(chosen[:, None], 0.0).addcmul_(step, only, value=-1)
        if count:
            weights = torch.bmm(step.unsqueeze(1), state.left.narrow(1, 0, count).mT).mul_(only[:, :, None])
            v.baddbmm_(weights, state.right.narrow(1, 0, count))
        seen = _dot(step, product)
        return torch.where(chosen, seen + _dot(step, direction), scale), torch.where(chosen, seen, share)

    def _search(self, problem: Problem, z: Tensor, residual: Tensor, direction: Tensor, state: BroydenState) -> Step:
        """Per sample, the first of the steps 1, 1/2, 1/4 ... whose residual falls; otherwise the shortest."""
        norms = torch.linalg.vector_norm
        start = norms(residual, 2, 1, True)
        length = torch.ones_like(start)
        trial, fz = z, None
        for _ in range(HALVINGS):
            trial = z + length * direction
            fz = problem(trial)
            falls = norms(fz - trial, 2, 1, True) <= (1 - DECREASE * length) * start
            if bool(falls.all()):
                break
            length = torch.where(falls, length, length / 2)
            fz = None
        if fz is None:
            trial = z + length * direction
        state.length, state.z = length, trial
        return Step(trial, state, fz)

    def inverse(self, state: BroydenState) -> Callable[[Tensor], Tensor]:
        return lambda x: -_product(state, x)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """(B,) products of rows; of large states piece by piece, so that no state of products is made."""
    if a.numel() < LARGE_STATE:
        return torch.linalg.vecdot(a, b)
    size = -(-a.shape[1] // PARTS)
    pieces = zip(a.split(size, 1), b.split(size, 1), strict=True)
    return torch.stack([torch.linalg.vecdot(*pair) for pair in pieces]).sum(0)


def _some(rows: Tensor) -> bool:
    """Whether some are chosen; taken for granted where asking would wait for the device."""
    return rows.device.type != "cpu" or bool(rows.any())


def _product(state: BroydenState, x: Tensor) -> Tensor:
    """H x, a new tensor."""
    count = state.count
    if not count:
        return -x
    weights = torch.bmm(x[:, None], state.right.narrow(1, 0, count).mT)
    return torch.baddbmm(x[:, None], weights, state.left.narrow(1, 0, count), beta=-1)[:, 0]


def _recover(state: BroydenState, z: Tensor, residual: Tensor) -> None:
    """Samples whose state is not where the last step led to, by more than rounding, start anew from `residual`."""
    if state.z is None or state.direction is None or state.residual is None:
        return
    norm = torch.linalg.vector_norm
    anew = ~(norm(z - state.z, 2, 1) <= MOVED * norm(state.direction, 2, 1))
    state.left[:, : state.count].masked_fill_(anew[:, None, None], 0.0)
    state.right[:, : state.count].masked_fill_(anew[:, None, None], 0.0)
    state.direction = state.direction.masked_fill(anew[:, None], 0.0)
    state.residual = torch.where(anew[:, None], residual, state.residual)  # no change, and so nothing to learn from


def _cut(state: BroydenState, keep: int) -> None:
    """Cut H to what it does on the latest `keep` right-hand vectors; across them it is -I."""
    count = state.count
    known = state.right[:, :count]
    cross = torch.bmm(known[:, count - keep :], known.mT)
    size = cross.diagonal(count - keep, 1, 2).clamp_min(torch.finfo(cross.dtype).tiny).rsqrt()
    gram = cross[:, :, count - keep :] * size[:, :, None] * size[:, None]
    gram.diagonal(0, 1, 2).mul_(1 + RIDGE[gram.dtype])
    factor, info = torch.linalg.cholesky_ex(gram)
    turn = torch.cholesky_solve(cross * size[:, :, None], factor) * size[:, :, None]
    usable = (info == 0) & torch.isfinite(turn).all(-1).all(-1)
    turn = torch.where(usable[:, None, None], turn, 0.0)
    piece = -(-known.shape[2] // (PARTS * count)) if known[:, 0].numel() >= LARGE_STATE else known.shape[2]
    for left, right in zip(state.left[:, :count].split(piece, 2), known.split(piece, 2), strict=True):
        left[:, :keep] = torch.bmm(turn, left)
        right[:, :keep] = right[:, count - keep :].clone()
    state.count = keep


@hookimpl
def deqcore_solver() -> type[Broyden]:
    return Broyden
