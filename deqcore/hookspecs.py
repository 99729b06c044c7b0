"""The hooks a plugin module may implement, one a kind; each docstring holds a worked example."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from .interfaces import Core, GradientBackend, LinearSolver, Norm, Regularizer, Solver

__all__ = ["API_VERSIONS", "hookimpl", "hookspec"]

hookspec = pluggy.HookspecMarker("deqcore")
hookimpl = pluggy.HookimplMarker("deqcore")

#: Plugin API versions that this deqcore offers, lowest and highest. A module that needs a later one than 1 says so
#: with ``DEQCORE_API_VERSION = 2``. Within a version changes only add; a removal or a new meaning is a new version.
API_VERSIONS = (1, 1)


@hookspec(firstresult=True)
def deqcore_solver() -> type[Solver[Any]]:
    """The solver of this module (entry-point group ``deqcore.solvers``).

    Example, a whole plugin::

        from deqcore import Solver, SolverSettings, Step, hookimpl

        class Halfway(Solver[SolverSettings]):
            def step(self, problem, z, fz, state):
                return Step((z + fz) / 2, state)

        @hookimpl
        def deqcore_solver():
            return Halfway
    """
    ...


@hookspec(firstresult=True)
def deqcore_linear_solver() -> type[LinearSolver[Any]]:
    """The linear solver of this module (entry-point group ``deqcore.linear_solvers``).

    Example::

        from deqcore import LinearSolver, SolverSettings, Step, hookimpl

        class Richardson(LinearSolver[SolverSettings]):
            def step(self, problem, u, fu, state):
                return Step(fu, state)

        @hookimpl
        def deqcore_linear_solver():
            return Richardson
    """
    ...


@hookspec(firstresult=True)
def deqcore_gradient() -> type[GradientBackend[Any]]:
    """The gradient backend of this module (entry-point group ``deqcore.gradients``).

    Example::

        from deqcore import GradientBackend, GradientSettings, hookimpl

        class LastStep(GradientBackend[GradientSettings]):
            def attach(self, problem, solution):
                return problem(solution["z"])

        @hookimpl
        def deqcore_gradient():
            return LastStep
    """
    ...


@hookspec(firstresult=True)
def deqcore_core() -> type[Core[Any]]:
    """The core of this module (entry-point group ``deqcore.cores``).

    Example::

        from deqcore import Core, CoreSettings, Stretch, hookimpl

        class LastOnly(Core[CoreSettings]):
            def plan(self, max_steps):
                return [Stretch(max_steps, -1, False)]

        @hookimpl
        def deqcore_core():
            return LastOnly
    """
    ...


@hookspec(firstresult=True)
def deqcore_norm() -> type[Norm[Any]]:
    """The weight normalisation of this module (entry-point group ``deqcore.norms``).

    Example::

        import torch
        from deqcore import Norm, NormSettings, hookimpl

        class Scale(torch.nn.Module):
            def forward(self, weight):
                return weight / (1 + weight.norm())

        class Bounded(Norm[NormSettings]):
            targets = {torch.nn.Linear: (("weight", 0),)}

            def parametrization(self, weight, dim):
                return Scale()

        @hookimpl
        def deqcore_norm():
            return Bounded
    """
    ...


@hookspec(firstresult=True)
def deqcore_regularizer() -> type[Regularizer[Any]]:
    """The regularizer of this module (entry-point group ``deqcore.regularizers``).

    Example::

        from deqcore import Regularizer, RegularizerSettings, hookimpl

        class Energy(Regularizer[RegularizerSettings]):
            def penalty(self, problem, states):
                return states[-1].square().mean()

        @hookimpl
        def deqcore_regularizer():
            return Energy
    """
    ...


@hookspec(firstresult=True)
def deqcore_model() -> Any:
    """The model of this module (entry-point group ``deqcore.models``): a callable that makes a ``torch.nn.Module``.

    Example::

        import torch
        from deqcore import hookimpl

        @hookimpl
        def deqcore_model():
            return torch.nn.Identity
    """
    ...


@hookspec(firstresult=True)
def deqcore_command() -> Any:
    """The command of this module (entry-point group ``deqcore.commands``): a ``typer.Typer`` app or a function.

    Example::

        from deqcore import hookimpl

        @hookimpl
        def deqcore_command():
            def hello(name: str = "world"):
                "Greet somebody."
                print(f"hello {name}")
            return hello
    """
    ...
