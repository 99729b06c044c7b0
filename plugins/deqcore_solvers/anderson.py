"""Anderson acceleration, types I and II, with one Gram row a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from deqcore import Problem, Solver, SolverSettings, Step, hookimpl

#: States of at least so many numbers wait in their slot until they become a difference, which costs a copy; smaller
#: ones are kept by reference, which costs memory.
LARGE_STATE = 1 << 16
#: Default ridge, relative to the Gram matrix's diagonal: the smallest that keeps its Cholesky factor from failing.
RIDGE = {torch.float32: 3e-7, torch.float64: 1e-12}


class AndersonSettings(SolverSettings):
    """Settings of Anderson acceleration."""

    aliases: ClassVar[dict[str, str]] = {"m": "memory", "tau": "damping", "lam": "absolute_ridge"}

    memory: int = Field(14, ge=1, description="differences kept; more helps hard problems and costs 2 states each")
    type: Literal["I", "II"] = Field(
        "II", description="II: least residual. I: quasi-Newton on the steps; a wilder one, to be used with safeguard"
    )
    damping: float = Field(
        1.0, gt=0, le=2, description="how far to go along the mixed residual; 1 needs no extra memory"
    )
    ridge: float | None = Field(
        None, ge=0, description="added to the Gram matrix, relative to its diagonal; by dtype if None (3e-7, 1e-12)"
    )
    absolute_ridge: float = Field(
        0.0, ge=0, description="added to the Gram matrix as it is (TorchDEQ's lam); slows the last digits down"
    )
    safeguard: float | None = Field(
        None,
        ge=1,
        description="a sample whose residual exceeds its last accepted one by this goes back to f of that "
        "state and forgets its history; None never, as a residual that rises for a few steps is the usual way",
    )
    restart: int | None = Field(None, ge=2, description="forget all history after so many steps; None never")
    weight_cap: float | None = Field(
        None, gt=0, description="a sample whose weights have a larger norm takes a plain step; None: no cap"
    )


@dataclass
class AndersonState:
    """History of a run.

    Attributes:
        residuals, images: (B, memory, F), differences of successive residuals f(z) - z and images f(z), zero until
            filled; the slot that comes next may hold the last residual and image themselves.
        gram: (B, memory, memory), products of the differences (type I: of steps with residuals), the identity until
            filled: so every step works on whole, contiguous buffers.
        count: differences ever stored.
        last: (B, F), the last residual and image, or None before the first step.
        accepted: (B, 1), residual norm of the last accepted state; where a safeguard is on.
        image: (B, F), f of that state.
    """

    residuals: Tensor
    images: Tensor
    gram: Tensor
    count: int = 0
    last: tuple[Tensor, Tensor] | None = None
    accepted: Tensor | None = None
    image: Tensor | None = None


class Anderson(Solver[AndersonSettings]):
    """Mixes the last states so that their residuals cancel in the least-squares sense, sample by sample.

    With D_r and D_f the differences of successive residuals r = f(z) - z and of successive f(z), the step is

        z <- f(z) - D_f g  (- (1 - damping) (r - D_r g)),   g = argmin ||r - D_r g||.

    Type I takes g from D_z^T (r - D_r g) = 0 instead, D_z = D_f - D_r, which is a multisecant form of Broyden's good
    update.

    Use it as the first choice where plain iteration is slow: it needs one evaluation a step like it, and typically two
    to five times fewer. Prefer `broyden` where the spectral radius is very close to 1. It is not monotone: the residual
    may rise before it falls.

    A step costs one evaluation, three (B, 1, F) x (F, memory) products and a (memory, memory) Cholesky factor a sample
    (type I: five products, and an LU factor); memory is 2 * memory + 2 states, one more with a safeguard.

    Source: Anderson (1965); Walker and Ni, SIAM J. Numer. Anal. 49 (2011), eq. 2.3. Type I and its safeguard: Fang and
    Saad, Numer. Linear Algebra Appl. 16 (2009); Zhang, O'Donoghue and Boyd, SIAM J. Optim. 30 (2020). The ridge is
    relative to the Gram matrix, so that it means the same at every residual.
    """

    def init(self, problem: Problem, z: Tensor, fz: Tensor) -> AndersonState:
        batch, features = z.shape
        memory = min(self.settings.memory, max(self.settings.max_iter - 1, 1))
        differences = z.new_zeros(2, batch, memory, features)
        gram = torch.eye(memory, dtype=z.dtype, device=z.device).repeat(batch, 1, 1)
        return AndersonState(differences[0], differences[1], gram)

    def resume(self, problem: Problem, z: Tensor, fz: Tensor, state: AndersonState) -> AndersonState:
        if (state.residuals.shape[0], state.residuals.shape[2]) != tuple(z.shape):
            return self.init(problem, z, fz)
        if state.last is not None:  # the last pair belongs to another problem: its slot is empty
            _forget(state, [state.count % state.gram.shape[1]])
        state.last = state.accepted = None
        return state

    def step(self, problem: Problem, z: Tensor, fz: Tensor, state: AndersonState) -> Step:
        settings = self.settings
        memory = state.gram.shape[1]
        residual = fz - z
        large = fz.numel() >= LARGE_STATE and not torch.is_grad_enabled()
        if settings.restart is not None and state.count >= settings.restart:
            _forget(state, list(range(memory)))
            state.count, state.last = 0, None
        if state.last is not None:
            slot = state.count % memory
            newest = _put(residual, state.last[0], state.residuals.select(1, slot))
            _put(fz, state.last[1], state.images.select(1, slot))
            state.last = None
            state.count += 1
            self._enter(state, slot, newest)
            target = torch.bmm(residual.unsqueeze(1), state.residuals.mT)
            if settings.type == "I":
                target = torch.bmm(residual.unsqueeze(1), state.images.mT).sub_(target)
            if large:
                del residual  # made again below, where the mixed state has been paid for
            mixed = self._mix(state, target, z, fz)
        else:
            mixed = fz if settings.damping == 1.0 else torch.lerp(z, fz, settings.damping)
        if large:
            slot = state.count % memory
            residual = torch.sub(fz, z, out=state.residuals.select(1, slot))
            state.last = residual, state.images.select(1, slot).copy_(fz)
        else:
            state.last = residual, fz
        return Step(mixed if settings.safeguard is None else self._guard(state, residual, fz, mixed), state)

    def _enter(self, state: AndersonState, slot: int, newest: Tensor) -> None:
        """Put the newest difference's products with all of them in the Gram matrix."""
        gram, settings = state.gram, self.settings
        row = torch.bmm(newest.unsqueeze(1), state.residuals.mT)
        column = row
        if settings.type == "I":
            step = state.images.select(1, slot) - newest
            column = torch.bmm(newest.unsqueeze(1), state.images.mT) - row
            row = torch.bmm(step[:, None], state.residuals.mT)
        diagonal = row.select(2, slot)
        diagonal.mul_(1 + (RIDGE[row.dtype] if settings.ridge is None else settings.ridge))
        if settings.absolute_ridge:
            diagonal.add_(settings.absolute_ridge)
        gram.select(2, slot).copy_(column[:, 0])
        gram.select(1, slot).copy_(row[:, 0])

    def _mix(self, state: AndersonState, target: Tensor, z: Tensor, fz: Tensor) -> Tensor:
        residuals, images, settings = state.residuals, state.images, self.settings
        if settings.type == "I":
            weights, info = torch.linalg.solve_ex(state.gram, target.mT)
        else:
            factor, info = torch.linalg.cholesky_ex(state.gram)
            weights = torch.cholesky_solve(target.mT, factor)
        weights = weights.mT
        # A sample whose factor broke down (it stopped moving, or its differences are parallel) takes a plain step.
        # To ask another device would be to wait for it, and a compiler can't be asked at all.
        if info.device.type != "cpu" or torch.compiler.is_compiling() or any(info.tolist()):
            weights.masked_fill_((info != 0)[:, None, None], 0.0)
        if settings.weight_cap is not None:
            plain = ~(torch.linalg.vector_norm(weights, dim=(1, 2)) <= settings.weight_cap)
            weights.masked_fill_(plain[:, None, None], 0.0)
        mixed = torch.baddbmm(fz.unsqueeze(1), weights, images, alpha=-1)[:, 0]
        if settings.damping == 1.0:
            return mixed
        left = torch.baddbmm((fz - z).unsqueeze(1), weights, residuals, alpha=-1)[:, 0]
        return mixed.sub(left, alpha=1 - settings.damping)

    def _guard(self, state: AndersonState, residual: Tensor, fz: Tensor, mixed: Tensor) -> Tensor:
        """Take samples whose residual rose too far back to the image of the last state that was accepted."""
        norm = torch.linalg.vector_norm(residual, 2, 1, True)
        if state.accepted is None or state.image is None:
            state.accepted, state.image = norm, fz
            return mixed
        rose = ~(norm <= (self.settings.safeguard or 1.0) * state.accepted)
        back = state.image
        rows = rose[:, :, None]
        state.residuals = state.residuals.masked_fill(rows, 0.0)  # not in place: steps may be differentiated
        state.images = state.images.masked_fill(rows, 0.0)
        state.gram = torch.where(rows, _identity(state.gram), state.gram)
        # What comes next is a plain step from an accepted state: it is accepted whatever its residual is.
        state.accepted = torch.where(rose, torch.inf, norm)
        state.image = torch.where(rose, back, fz)
        return torch.where(rose, back, mixed)


def _put(a: Tensor, b: Tensor, place: Tensor) -> Tensor:
    """Write a - b to `place`, part of a buffer, which torch.compile takes no ``out=`` for."""
    return place.copy_(a - b) if torch.compiler.is_compiling() else torch.sub(a, b, out=place)


def _identity(gram: Tensor) -> Tensor:
    return torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)


def _forget(state: AndersonState, slots: list[int]) -> None:
    """Make these slots as they were before they were filled."""
    identity = _identity(state.gram)
    state.residuals[:, slots] = 0.0
    state.images[:, slots] = 0.0
    state.gram[:, slots] = identity[slots]
    state.gram[:, :, slots] = identity[:, slots]


@hookimpl
def deqcore_solver() -> type[Anderson]:
    return Anderson
