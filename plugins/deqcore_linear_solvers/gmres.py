"""GMRES with a bounded memory, in a form that has the solution and its residual at every step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from deqcore import ConfigError, ConfigTypeError, LinearProblem, LinearSolver, SolverSettings, Step, hookimpl

Preconditioner = Callable[[Tensor], Tensor]

#: A residual that a step left above this much of the last one spans badly with it: the next direction is then the last
#: image instead. Anything from 0.5 to 0.99 gave the same counts.
STAGNATED = 0.9
#: What is left of a direction's image beside the earlier ones is rounding error below this many spacings of its size.
DEPENDENT = 8.0
#: Rounding error of a step beside its length, in spacings: errors of many features are mostly averaged out.
ROUNDING = 0.5


class GmresSettings(SolverSettings):
    """Settings of GMRES."""

    restart: int = Field(
        50, ge=1, description="directions kept, 2 states each; when full they are cut to the half that matters most"
    )
    preconditioner: Literal["none", "neumann"] = Field(
        "none", description="M, near (I - A)^-1; neumann: d + A d + ... + A^terms d, as many products a step more"
    )
    terms: int | None = Field(None, ge=1, description="products of the neumann preconditioner, 1 if not given")

    @model_validator(mode="after")
    def _terms_are_used(self) -> GmresSettings:
        if self.terms is not None and self.preconditioner != "neumann":
            raise ValueError(f"terms={self.terms} is for preconditioner='neumann', got {self.preconditioner!r}")
        return self


@dataclass
class GmresState:
    """Directions and their images (I - A) direction, the latter orthonormal, zero where a sample's broke down.

    And what the last step left: its result, the residual there, that residual's norm (B, 1) and the norm before, inf
    where the last image kept is not that of the last step; and how far rounding errors may have taken the true
    residual from this one.
    """

    directions: Tensor
    images: Tensor
    count: int
    u: Tensor
    residual: Tensor
    norm: Tensor
    before: Tensor
    gap: Tensor


class Gmres(LinearSolver[GmresSettings]):
    """The smallest residual over the Krylov space b, A b, A^2 b, ..., sample by sample.

    Use it as the first choice for any linear system, symmetric or not, definite or not: no method gets to a tolerance
    with fewer products, one to confirm aside, while the directions fit into `restart`. Prefer `bicgstab` where that
    many states are too many, `cg` where I - A is symmetric positive definite, `dense` for a few dozen features. A
    singular system ends where no direction helps any more, and says so by its residual.

    A step costs one product and five (B, 1, F) x (F, directions) products; memory is 2 * restart + 5 states.

    Each direction is the last residual, or, where that has hardly changed, the last direction's image. Its image is
    made orthogonal to the earlier ones (twice, as once leaves rounding errors that delay convergence), and the step
    along it takes its share out of the residual. So there are a solution and a residual at every step, for no product;
    the residual is one of a recurrence, which the loop checks by a product before it calls a sample converged.

    A full memory is not emptied: of the space it spans, the half is kept whose directions are longest for images of
    norm 1, which is where I - A is smallest and a new start would have to find its way again. On the hardest of the
    maps of 64 features in benchmarks/maps.py, 46 products are needed with all directions kept, 53 with 20 kept so, and
    113 with 20 and new starts.

    Source: Saad and Schultz, SIAM J. Sci. Stat. Comput. 7 (1986); Jiranek and Rozloznik, Numer. Algorithms 53 (2010),
    the adaptive simpler GMRES, here with explicit directions as in GCR (Eisenstat, Elman and Schultz, 1983); what is
    kept of a full memory is chosen in the spirit of de Sturler, SIAM J. Numer. Anal. 36 (1999).

    Args:
        settings: the settings; made from `options` where not given.
        preconditioner: ``"none"``, ``"neumann"``, or any map of (B, F) tensors near (I - A)^-1, such as another
            solver's ``inverse(state)``; it may change from step to step. What is no name can't be part of a
            configuration and is handed over here.
        options: settings by name.

    Raises:
        ConfigTypeError: `preconditioner` is neither a name nor callable.
        ConfigError: it, or an option, is given beside complete settings that leave no room for it.
    """

    estimates = True

    def __init__(
        self,
        settings: GmresSettings | None = None,
        preconditioner: str | Preconditioner | None = None,
        **options: Any,
    ) -> None:
        if isinstance(preconditioner, str):
            options["preconditioner"] = preconditioner
        elif preconditioner is not None and not callable(preconditioner):
            raise ConfigTypeError(
                f"a preconditioner is 'none', 'neumann' or a map of (B, F) tensors, got {preconditioner!r}."
            )
        if settings is not None and preconditioner is not None and settings.preconditioner != "none":
            raise ConfigError(f"a preconditioner is given twice: {settings.preconditioner!r}, and {preconditioner!r}.")
        if settings is not None and options:
            raise ConfigError(f"the settings given are complete; give {', '.join(options)} there.")
        super().__init__(settings, **options)
        self._given = preconditioner if callable(preconditioner) else None

    def init(self, problem: LinearProblem, u: Tensor, fu: Tensor) -> GmresState:
        batch, features = u.shape
        room = (batch, max(1, min(self.settings.restart, self.settings.max_iter)), features)
        residual = fu - u
        norm = torch.linalg.vector_norm(residual, 2, 1, True)
        return GmresState(u.new_empty(room), u.new_empty(room), 0, u, residual, norm, norm, self._rounding(u))

    def step(self, problem: LinearProblem, u: Tensor, fu: Tensor, state: GmresState) -> Step:
        if u is not state.u:  # the loop has repaired a sample
            u = self._begin_anew((u != state.u).any(1, keepdim=True), u, fu, state)
        if state.count == state.images.shape[1]:
            self._reduce(state)
            stuck = state.norm <= state.gap
            if bool(stuck.any()):  # these can't go on without their true residual
                u = self._begin_anew(stuck, u, problem(u), state)
        count = state.count
        direction = self._precondition(problem, self._direction(state))
        direction, image = self._orthogonal(direction, problem.matvec(direction), state)
        residual = state.residual
        share = torch.linalg.vecdot(image, residual)[:, None]
        # A sample whose rounding errors would be as large as what is left to solve stays where it is.
        gap = torch.hypot(state.gap, self._rounding(share * direction))
        hurts = gap >= state.norm
        share = torch.where(hurts, 0.0, share)
        state.gap = torch.where(hurts, state.gap, gap)
        u = torch.addcmul(u, share, direction)
        residual = torch.addcmul(residual, share, image, value=-1)
        state.directions[:, count], state.images[:, count] = direction, image
        state.count = count + 1
        state.before, state.norm = state.norm, torch.linalg.vector_norm(residual, 2, 1, True)
        state.u, state.residual = u, residual
        return Step(u, state, u + residual)

    @staticmethod
    def _rounding(step: Tensor) -> Tensor:
        """(B, 1) errors that adding `step` to a state brings."""
        return ROUNDING * torch.finfo(step.dtype).eps * torch.linalg.vector_norm(step, 2, 1, True)

    @classmethod
    def _begin_anew(cls, rows: Tensor, u: Tensor, fu: Tensor, state: GmresState) -> Tensor:
        """Go on from the true residual in these samples, less what the directions kept can take out of it for no
        product. Returns the better state."""
        residual = fu - u
        if state.count:
            directions, images = state.directions[:, : state.count], state.images[:, : state.count]
            for kept in (directions, images):  # the last step's may not be finite there
                kept[:, -1] = kept[:, -1].nan_to_num(0.0, 0.0, 0.0)
            shares = torch.where(rows[..., None], torch.bmm(residual[:, None], images.mT), 0.0)
            u = torch.baddbmm(u[:, None], shares, directions)[:, 0]
            residual = torch.baddbmm(residual[:, None], shares, images, alpha=-1)[:, 0]
        state.residual = torch.where(rows, residual, state.residual)
        state.norm = torch.linalg.vector_norm(state.residual, 2, 1, True)
        state.before = torch.where(rows, torch.inf, state.before)
        state.gap = torch.where(rows, cls._rounding(u), state.gap)
        return u

    @staticmethod
    def _reduce(state: GmresState) -> None:
        """Keep, of the space spanned by the directions, the half whose images are smallest for their length."""
        keep = state.count // 2
        if keep:
            directions, images = state.directions, state.images
            gram = torch.bmm(directions, directions.mT).nan_to_num(0.0, 0.0, 0.0)  # its squares may overflow
            longest = torch.linalg.eigh(gram).eigenvectors[..., -keep:].mT
            directions[:, :keep] = torch.bmm(longest, directions)
            images[:, :keep] = torch.bmm(longest, images)
        state.count = keep
        state.before = torch.full_like(state.before, torch.inf)

    @staticmethod
    def _direction(state: GmresState) -> Tensor:
        """Per sample, the residual, or the last image where the residual has hardly changed, of norm 1."""
        unit = state.residual / state.norm.clamp_min(torch.finfo(state.norm.dtype).tiny)
        if state.count == 0:
            return unit
        return torch.where(state.norm <= STAGNATED * state.before, unit, state.images[:, state.count - 1])

    def _precondition(self, problem: LinearProblem, direction: Tensor) -> Tensor:
        if self._given is not None:
            return self._given(direction)
        if self.settings.preconditioner == "neumann":
            term = direction
            for _ in range(self.settings.terms or 1):
                term = term - problem.matvec(term)
                direction = direction + term
        return direction

    @staticmethod
    def _orthogonal(direction: Tensor, image: Tensor, state: GmresState) -> tuple[Tensor, Tensor]:
        """`image` without its parts along the earlier images, and the direction whose image that is, both so scaled
        that the image's norm is 1, or zero for a sample whose image is nothing new."""
        norm = torch.linalg.vector_norm
        least = norm(image, 2, 1, True) * (DEPENDENT * torch.finfo(image.dtype).eps)
        if state.count:
            directions, images = state.directions[:, : state.count], state.images[:, : state.count]
            image = image[:, None]
            first = torch.bmm(image, images.mT)
            image = torch.baddbmm(image, first, images, alpha=-1)
            second = torch.bmm(image, images.mT)
            image = torch.baddbmm(image, second, images, alpha=-1)[:, 0]
            direction = torch.baddbmm(direction[:, None], first + second, directions, alpha=-1)[:, 0]
        size = norm(image, 2, 1, True)
        factor = torch.where(size > least, size.reciprocal(), 0.0)
        return direction * factor, image * factor

    def inverse(self, state: GmresState) -> Callable[[Tensor], Tensor]:
        """(I - A)^-1 on the span of the images kept, the identity on the rest."""
        directions, images = state.directions[:, : state.count], state.images[:, : state.count]

        def apply(x: Tensor) -> Tensor:
            if not directions.shape[1]:
                return x
            shares = torch.bmm(x[:, None], images.mT)
            return torch.baddbmm(x[:, None], shares, directions - images)[:, 0]

        return apply


@hookimpl
def deqcore_linear_solver() -> type[Gmres]:
    return Gmres
