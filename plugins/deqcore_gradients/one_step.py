"""The one-step gradient: f's own derivative at the state found, without what z* answers to it."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from deqcore import GradientBackend, GradientSettings, Problem, Solution, hookimpl
from deqcore.state import with_gradient_of


class OneStepSettings(GradientSettings):
    """Settings of the one-step gradient: it has none."""


class OneStep(GradientBackend[OneStepSettings]):
    """dz*/dx is taken to be df/dx at z*: the Jacobian-free backward.

    Drops J (I - J)^-1 df/dx, all that goes through z*. The direction is one of descent where f contracts strongly
    enough (theorem 3.1 of the paper); the length is too small by a factor of up to 1 / (1 - rho), rho the spectral
    radius of J = df/dz. Its cosine with the exact gradient on the digits model is in docs/gradients.md.

    Differs from `phantom` with ``steps=1`` in the value: that returns f(z*), and this z* itself, in training too. The
    gradients are the same.

    Costs one evaluation of f with its graph, and the backward through it; memory is that graph. Can be differentiated
    any number of times, in reverse and in forward mode, and by torch.func through :func:`deqcore.fixed_point`, always
    as what it is: f's derivative, z* held still. Nothing is solved, so there is no ``info["backward"]``. A sample whose
    f is not finite keeps its value and gets no gradient.

    Source: Fung et al., JFB: Jacobian-Free Backpropagation for Implicit Networks (AAAI 2022), eq. 9.
    """

    transforms: ClassVar[bool] = True

    def attach(self, problem: Problem, solution: Solution) -> Tensor:
        z: Tensor = solution["z"]
        return with_gradient_of(problem(z), z)


@hookimpl
def deqcore_gradient() -> type[OneStep]:
    return OneStep
