"""Newton's method with a Jacobian that serves many steps."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from deqcore import hookimpl

from .newton import DenseNewton, NewtonSettings, NewtonState


class ChordSettings(NewtonSettings):
    """Settings of the chord method."""

    refresh: int = Field(20, ge=1, description="steps that one Jacobian serves at most; 1 is Newton's method")
    contraction: float = Field(
        0.5,
        gt=0,
        le=1,
        description="make the Jacobian anew when an unfinished sample's residual falls by less than this a step; a "
        "step that halves it costs less than a new Jacobian",
    )


class Chord(DenseNewton[ChordSettings]):
    """z <- z + (I - J)^-1 (f(z) - z) with the Jacobian of an earlier step, factored once for many steps.

    Use it for small states near the solution, or where f is close to linear: it needs a few more steps than `newton`
    and far fewer products with J. Far from the solution it makes a Jacobian nearly every step, as `newton` does. It
    takes the rows to be independent; where f couples them, use ``batch_dims=0``.

    A step costs one evaluation and two triangular solves a sample; a new Jacobian costs as many products with J as
    there are features. It is made for all samples when `refresh` steps have passed or some unfinished sample's residual
    falls too slowly; memory is features states.

    Source: Kelley, Iterative Methods for Linear and Nonlinear Equations (1995), section 5.4.

    Raises:
        ConfigError: the state has more than `max_features` features a sample.
    """

    def is_stale(self, state: NewtonState, norm: Tensor, limit: Tensor) -> bool:
        if state.age >= self.settings.refresh or state.norm is None:
            return True
        slow = norm > self.settings.contraction * state.norm  # never true of a sample that is not finite
        return bool((slow & (norm > limit)).any())


@hookimpl
def deqcore_solver() -> type[Chord]:
    return Chord
