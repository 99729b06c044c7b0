"""Anderson acceleration, type II, with one Gram row a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from deqcore import Problem, Solver, SolverSettings, Step, hookimpl

#: Default ridge, relative to the Gram matrix's diagonal: the smallest that keeps its Cholesky factor from failing.
RIDGE = {torch.float32: 3e-7, torch.float64: 1e-12}


class AndersonSettings(SolverSettings):
    """Settings of Anderson acceleration."""

    aliases: ClassVar[dict[str, str]] = {"m": "memory", "tau": "damping", "lam": "absolute_ridge"}

    memory: int = Field(10, ge=1, description="differences kept; more helps hard problems and costs 2 states each")
    damping: float = Field(
        1.0, gt=0, le=2, description="how far to go along the mixed residual; 1 needs no extra memory"
    )
    ridge: float | None = Field(
        None, ge=0, description="added to the Gram matrix, relative to its diagonal; by dtype if None (3e-7, 1e-12)"
    )
    absolute_ridge: float = Field(
        0.0, ge=0, description="added to the Gram matrix as it is (TorchDEQ's lam); slows the last digits down"
    )


@dataclass
class AndersonState:
    """The last differences as ring buffers of shape (B, memory, F), zero until filled, and their Gram matrix, the
    identity until filled: so every step works on whole, contiguous buffers. `count` differences were ever stored."""

    residuals: Tensor
    images: Tensor
    gram: Tensor
    count: int
    residual: Tensor | None
    image: Tensor | None


class Anderson(Solver[AndersonSettings]):
    """Mixes the last states so that their residuals cancel in the least-squares sense, sample by sample.

    With D_r and D_f the differences of successive residuals r = f(z) - z and of successive f(z), the step is

        z <- f(z) - D_f g  (- (1 - damping) (r - D_r g)),   g = argmin ||r - D_r g||.

    Use it as the first choice where plain iteration is slow: it needs one evaluation a step like it, and typically two
    to five times fewer. Prefer `broyden` where the spectral radius is very close to 1. It is not monotone: the residual
    may rise before it falls.

    A step costs one evaluation, three (B, 1, F) x (F, memory) products and a (memory, memory) Cholesky factor a sample;
    memory is 2 * memory + 2 states.

    Source: Anderson (1965); Walker and Ni, SIAM J. Numer. Anal. 49 (2011), eq. 2.3. The ridge is relative to the Gram
    matrix, so that it means the same at every residual.
    """

    def init(self, problem: Problem, z: Tensor, fz: Tensor) -> AndersonState:
        batch, features = z.shape
        memory = min(self.settings.memory, max(self.settings.max_iter - 1, 1))
        return AndersonState(
            residuals=z.new_zeros(batch, memory, features),
            images=z.new_zeros(batch, memory, features),
            gram=torch.eye(memory, dtype=z.dtype, device=z.device).repeat(batch, 1, 1),
            count=0,
            residual=None,
            image=None,
        )

    def resume(self, problem: Problem, z: Tensor, fz: Tensor, state: AndersonState) -> AndersonState:
        if (state.residuals.shape[0], state.residuals.shape[2]) != tuple(z.shape):
            return self.init(problem, z, fz)
        state.residual = state.image = None  # the first difference would be between two problems
        return state

    def step(self, problem: Problem, z: Tensor, fz: Tensor, state: AndersonState) -> Step:
        residual = fz - z
        if state.residual is not None and state.image is not None:
            self._remember(state, residual - state.residual, fz - state.image)
        state.residual, state.image = residual, fz
        if state.count == 0:
            damping = self.settings.damping
            return Step(fz if damping == 1.0 else torch.lerp(z, fz, damping), state)
        return Step(self._mix(state, residual, fz), state)

    def _remember(self, state: AndersonState, d_residual: Tensor, d_image: Tensor) -> None:
        """Put the newest differences, and their row of the Gram matrix, in place of the oldest."""
        gram, settings = state.gram, self.settings
        slot = state.count % gram.shape[1]
        state.residuals[:, slot] = d_residual
        state.images[:, slot] = d_image
        row = torch.bmm(d_residual[:, None], state.residuals.mT)
        diagonal = row[:, :, slot]
        diagonal.mul_(1 + (RIDGE[row.dtype] if settings.ridge is None else settings.ridge))
        if settings.absolute_ridge:
            diagonal.add_(settings.absolute_ridge)
        row = row[:, 0]
        gram[:, slot] = row
        gram[:, :, slot] = row
        state.count += 1

    def _mix(self, state: AndersonState, residual: Tensor, fz: Tensor) -> Tensor:
        residuals = state.residuals
        factor, info = torch.linalg.cholesky_ex(state.gram)
        weights = torch.cholesky_solve(torch.bmm(residual[:, None], residuals.mT).mT, factor).mT
        # A sample whose factor broke down (it stopped moving, or its differences are parallel) takes a plain step.
        if info.is_cuda:  # asking whether there is one would wait for the device
            weights = weights.masked_fill(info[:, None, None] != 0, 0.0)
        elif info.any():
            weights = torch.where(info[:, None, None] != 0, 0.0, weights)
        mixed = torch.baddbmm(fz[:, None], weights, state.images, alpha=-1)[:, 0]
        damping = self.settings.damping
        if damping == 1.0:
            return mixed
        left = torch.baddbmm(residual[:, None], weights, residuals, alpha=-1)[:, 0]
        return mixed - (1 - damping) * left


@hookimpl
def deqcore_solver() -> type[Anderson]:
    return Anderson
