"""Broyden's method with a bounded memory that stays finite."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import Field, field_validator
from torch import Tensor

from deqcore import Problem, Solver, SolverSettings, Step, hookimpl

#: Halvings of the step that a line search tries.
HALVINGS = 5
#: Residual decrease that a full step must bring to be taken as it is (Armijo's constant).
DECREASE = 1e-4


class BroydenSettings(SolverSettings):
    """Settings of Broyden's method."""

    aliases: ClassVar[dict[str, str]] = {"LBFGS_thres": "memory", "ls": "line_search"}

    memory: int = Field(50, ge=0, description="rank of the inverse Jacobian kept, 2 states each; 0 for max_iter")
    line_search: bool = Field(False, description="halve a sample's step while its residual would not fall")

    @field_validator("memory", mode="before")
    @classmethod
    def _default(cls, value: Any) -> Any:
        """TorchDEQ's default for LBFGS_thres is None; a program that passes it on means the default."""
        return cls.model_fields["memory"].default if value is None else value


@dataclass
class BroydenState:
    """Inverse Jacobian of f(z) - z as -I + left^T right, of rank `count`; and the pair before, with the step taken."""

    left: Tensor
    right: Tensor
    count: int
    z: Tensor | None
    residual: Tensor | None
    direction: Tensor | None


class Broyden(Solver[BroydenSettings]):
    """Quasi-Newton steps on g(z) = f(z) - z with Broyden's rank-one update of the inverse Jacobian, sample by sample.

    Use it where the spectral radius of df/dz is near or above 1: it needs the fewest evaluations of the built-in
    solvers there. It starts as plain iteration (J0 = -I). Its steps are dearer than Anderson's once the rank is high.

    A step costs one evaluation and four (B, 1, F) x (F, rank) products; memory is 2 * memory + 4 states. When the
    memory is full, the inverse is cut to its best two thirds by a singular value decomposition; overwriting the oldest
    pair instead would leave an inverse that belongs to nothing.

    Source: Broyden (1965), the "good" update; Kelley, Iterative Methods (1995), ch. 7; rank reduction after van de
    Rotten and Verduyn Lunel (2005).
    """

    def init(self, problem: Problem, z: Tensor, fz: Tensor) -> BroydenState:
        batch, features = z.shape
        memory = self.settings.memory or self.settings.max_iter
        rank = max(1, min(memory, self.settings.max_iter))
        return BroydenState(
            left=z.new_empty(batch, rank, features),
            right=z.new_empty(batch, rank, features),
            count=0,
            z=None,
            residual=None,
            direction=None,
        )

    def resume(self, problem: Problem, z: Tensor, fz: Tensor, state: BroydenState) -> BroydenState:
        if (state.left.shape[0], state.left.shape[2]) != tuple(z.shape):
            return self.init(problem, z, fz)
        state.z = state.residual = state.direction = None  # the first secant pair would be between two problems
        return state

    def step(self, problem: Problem, z: Tensor, fz: Tensor, state: BroydenState) -> Step:
        residual = fz - z
        product = self._product(state, residual)
        if state.z is not None and state.residual is not None and state.direction is not None:
            product = self._update(state, z - state.z, residual, residual - state.residual, product, state.direction)
        direction = -product
        state.z, state.residual, state.direction = z, residual, direction
        if self.settings.line_search:
            return self._search(problem, z, residual, direction, state)
        return Step(z + direction, state)

    @staticmethod
    def _product(state: BroydenState, x: Tensor) -> Tensor:
        """H x, H the inverse Jacobian."""
        if state.count == 0:
            return -x
        left, right = state.left[:, : state.count], state.right[:, : state.count]
        return torch.baddbmm(x[:, None], torch.bmm(x[:, None], right.mT), left, beta=-1)[:, 0]

    def _update(
        self, state: BroydenState, dz: Tensor, residual: Tensor, d_residual: Tensor, product: Tensor, direction: Tensor
    ) -> Tensor:
        """Make H map d_residual to dz by a rank-one change; returns the new H @ residual."""
        if state.count == state.left.shape[1]:
            self._reduce(state)
            product = self._product(state, residual)
            mapped = self._product(state, d_residual)
        else:
            mapped = product + direction  # H r_old = -direction
        if state.count == 0:
            row = -dz
        else:
            left, right = state.left[:, : state.count], state.right[:, : state.count]
            row = torch.baddbmm(dz[:, None], torch.bmm(dz[:, None], left.mT), right, beta=-1)[:, 0]
        norms = torch.linalg.vector_norm
        along = (row * d_residual).sum(1, keepdim=True)
        least = torch.finfo(dz.dtype).eps * norms(row, 2, 1, True) * norms(d_residual, 2, 1, True)
        usable = along.abs() > least  # a sample that did not move, or whose pair says nothing, keeps its H
        column = torch.where(usable, (dz - mapped) / torch.where(usable, along, 1.0), 0.0)
        state.left[:, state.count] = column
        state.right[:, state.count] = row
        state.count += 1
        return product + column * (row * residual).sum(1, keepdim=True)

    @staticmethod
    def _reduce(state: BroydenState) -> None:
        """Cut left^T right to its largest two thirds of singular directions (to all that there can be, if fewer)."""
        keep = min(state.count * 2 // 3, state.left.shape[2])
        if keep:
            # A sample whose f gives NaN has it here too, and must not make the others' decomposition fail.
            left_q, left_r = torch.linalg.qr(state.left.nan_to_num(0.0, 0.0, 0.0).mT)
            right_q, right_r = torch.linalg.qr(state.right.nan_to_num(0.0, 0.0, 0.0).mT)
            u, s, vh = torch.linalg.svd(left_r @ right_r.mT, full_matrices=False)
            state.left[:, :keep] = ((left_q @ u[..., :keep]) * s[:, None, :keep]).mT
            state.right[:, :keep] = (right_q @ vh[:, :keep].mT).mT
        state.count = keep

    @staticmethod
    def _search(problem: Problem, z: Tensor, residual: Tensor, direction: Tensor, state: BroydenState) -> Step:
        """Per sample, the first of the steps 1, 1/2, 1/4 ... whose residual falls; otherwise the shortest."""
        norms = torch.linalg.vector_norm
        start = norms(residual, 2, 1, True)
        length = torch.ones_like(start)
        for _ in range(HALVINGS):
            trial = z + length * direction
            fz = problem(trial)
            falls = norms(fz - trial, 2, 1, True) <= (1 - DECREASE * length) * start
            if bool(falls.all()):
                return Step(trial, state, fz)
            length = torch.where(falls, length, length / 2)
        return Step(z + length * direction, state)

    def inverse(self, state: BroydenState) -> Callable[[Tensor], Tensor]:
        return lambda x: -self._product(state, x)


@hookimpl
def deqcore_solver() -> type[Broyden]:
    return Broyden
