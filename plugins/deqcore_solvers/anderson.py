"""Anderson acceleration, type II, with one Gram row a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from deqcore import Problem, Solver, SolverSettings, Step, hookimpl

#: Default ridge, relative to the Gram matrix's diagonal: the smallest that keeps its Cholesky factor from breaking down.
RIDGE = {torch.float32: 3e-7, torch.float64: 1e-12}


class AndersonSettings(SolverSettings):
    """Settings of Anderson acceleration."""

    aliases: ClassVar[dict[str, str]] = {"m": "memory", "tau": "damping", "lam": "absolute_ridge"}

    memory: int = Field(10, ge=1, description="differences kept; more helps hard problems and costs 2 states each")
    damping: float = Field(1.0, gt=0, le=2, description="how far to go along the mixed residual; 1 needs no extra memory")
    ridge: float | None = Field(
        None, ge=0, description="added to the Gram matrix, relative to its diagonal; by dtype if None (3e-7, 1e-12)"
    )
    absolute_ridge: float = Field(
        0.0, ge=0, description="added to the Gram matrix as it is (TorchDEQ's lam); slows the last digits down"
    )


@dataclass
class AndersonState:
    """History of the last `count` (at most memory) differences, as ring buffers of shape (B, memory, F)."""

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
    to five times fewer. Prefer `broyden` where the spectral radius is very close to 1. It is not monotone: the residual may
    rise before it falls.

    A step costs one evaluation, three (B, 1, F) x (F, memory) products and a (memory, memory) Cholesky factor a sample;
    memory is 2 * memory + 2 states.

    Source: Anderson (1965); Walker and Ni, SIAM J. Numer. Anal. 49 (2011), eq. 2.3. The ridge is relative to the Gram
    matrix, so that it means the same at every residual.
    """

    def init(self, problem: Problem, z: Tensor, fz: Tensor) -> AndersonState:
        batch, features = z.shape
        memory = min(self.settings.memory, max(self.settings.max_iter - 1, 1))
        return AndersonState(
            residuals=z.new_empty(batch, memory, features),
            images=z.new_empty(batch, memory, features),
            gram=z.new_zeros(batch, memory, memory),
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
            self._remember(state, residual, state.residual, fz, state.image)
        state.residual, state.image = residual, fz
        if state.count == 0:
            damping = self.settings.damping
            return Step(fz if damping == 1.0 else torch.lerp(z, fz, damping), state)
        return Step(self._mix(state, residual, fz), state)

    def _remember(
        self, state: AndersonState, residual: Tensor, last_residual: Tensor, image: Tensor, last_image: Tensor
    ) -> None:
        """Put the newest differences, and their row of the Gram matrix, in place of the oldest."""
        memory = state.gram.shape[1]
        slot, count = state.count % memory, min(state.count + 1, memory)
        torch.sub(residual, last_residual, out=state.residuals.select(1, slot))
        torch.sub(image, last_image, out=state.images.select(1, slot))
        row = torch.bmm(state.residuals.narrow(1, slot, 1), state.residuals.narrow(1, 0, count).mT)
        ridge = self.settings.ridge
        diagonal = row.select(2, slot).mul_(1 + (RIDGE[row.dtype] if ridge is None else ridge))
        diagonal.add_(self.settings.absolute_ridge + torch.finfo(row.dtype).tiny)  # a sample at rest stays solvable
        gram = state.gram.narrow(1, 0, count).narrow(2, 0, count)
        gram.narrow(1, slot, 1).copy_(row)
        if slot < count - 1:  # the Cholesky factor reads the lower triangle only
            gram.narrow(2, slot, 1).copy_(row.mT)
        state.count += 1

    def _mix(self, state: AndersonState, residual: Tensor, fz: Tensor) -> Tensor:
        count = min(state.count, state.gram.shape[1])
        residuals, images = state.residuals.narrow(1, 0, count), state.images.narrow(1, 0, count)
        factor, info = torch.linalg.cholesky_ex(state.gram.narrow(1, 0, count).narrow(2, 0, count))
        weights = torch.cholesky_solve(torch.bmm(residual[:, None], residuals.mT).mT, factor).mT
        # A sample whose factor broke down takes a plain step.
        if info.is_cuda:  # asking would wait for the device
            weights = weights.masked_fill(info[:, None, None] != 0, 0.0)
        elif info.any():
            weights = torch.where(info[:, None, None] != 0, 0.0, weights)
        mixed = torch.baddbmm(fz[:, None], weights, images, alpha=-1)[:, 0]
        damping = self.settings.damping
        if damping == 1.0:
            return mixed
        left = torch.baddbmm(residual[:, None], weights, residuals, alpha=-1)[:, 0]
        return mixed - (1 - damping) * left


@hookimpl
def deqcore_solver() -> type[Anderson]:
    return Anderson
