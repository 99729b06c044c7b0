"""What an implementation of each kind must, and may, provide."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar, cast

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .problem import LinearProblem, Problem
from .settings import CoreSettings, GradientSettings, NormSettings, RegularizerSettings, Settings, SolverSettings
from .solution import Solution

__all__ = [
    "Core",
    "GradientBackend",
    "LinearSolver",
    "Norm",
    "Plugin",
    "Regularizer",
    "Solver",
    "Step",
    "Stretch",
]

S = TypeVar("S", bound=Settings)
SolverS = TypeVar("SolverS", bound=SolverSettings)
GradientS = TypeVar("GradientS", bound=GradientSettings)
CoreS = TypeVar("CoreS", bound=CoreSettings)
NormS = TypeVar("NormS", bound=NormSettings)
RegularizerS = TypeVar("RegularizerS", bound=RegularizerSettings)


class Plugin(Generic[S]):
    """Base of all implementations: an object that holds its settings.

    ``class Newton(Solver[NewtonSettings])`` is all it takes to say which settings it has.

    Args:
        settings: the settings; made from `options` where not given.
        options: settings by name, for use without the registry: ``Anderson(memory=8)``.
    """

    #: The settings class, read off the square brackets of the base class.
    settings_type: ClassVar[type[Settings]] = Settings

    def __init__(self, settings: S | None = None, **options: Any) -> None:
        self.settings: S = cast(S, self.settings_type(**options)) if settings is None else settings

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "settings_type" in cls.__dict__:
            return
        for base in cls.__dict__.get("__orig_bases__", ()):
            for argument in typing.get_args(base):
                if isinstance(argument, type) and issubclass(argument, Settings):
                    cls.settings_type = argument

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.settings!r})"


class Step(NamedTuple):
    """One update: the next state, the solver's own state, and f there where the solver already has it."""

    z: Tensor
    state: Any
    fz: Tensor | None = None


def _select(state: Any, rows: Tensor) -> Any:
    if dataclasses.is_dataclass(state) and not isinstance(state, type):
        parts = {field.name: _select(getattr(state, field.name), rows) for field in dataclasses.fields(state)}
        chosen = object.__new__(type(state))  # a state's __init__ may take something else
        for name, part in parts.items():
            object.__setattr__(chosen, name, part)
        return chosen
    return pytree.tree_map_only(Tensor, lambda t: t[rows] if t.dim() else t, state)


class Solver(Plugin[SolverS]):
    """A fixed-point method: how to get from one state to the next. Loop, stop test and counts are the kernel's.

    All tensors are packed: shape (batch, features), at least float32, without grad.
    """

    settings_type: ClassVar[type[Settings]] = SolverSettings
    #: False for a method that never looks at residuals before its last step (no statistics, no early stop).
    monitored: ClassVar[bool] = True
    estimates: ClassVar[bool] = False  # see LinearSolver
    #: False for a method whose step torch.compile can't trace; its solves are run beside the caller's graph.
    traceable: ClassVar[bool] = True

    def init(self, problem: Problem, z: Tensor, fz: Tensor) -> Any:
        """The solver's state before the first step. Default: none."""
        return None

    def step(self, problem: Problem, z: Tensor, fz: Tensor, state: Any) -> Step:
        """One update from `z`, where f(z) is `fz`. `z` and `fz` must not be changed in place; `state` may be.

        Calls of `problem` inside are counted. Return `fz` of the new state only if it was evaluated on the way.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no step()")

    def resume(self, problem: Problem, z: Tensor, fz: Tensor, state: Any) -> Any:
        """The state to start from when `state` was left by an earlier, similar solve. Default: a new one."""
        return self.init(problem, z, fz)

    def select(self, state: Any, rows: Tensor) -> Any:
        """`state` for the given rows of the batch. Default: index dimension 0 of every tensor in it, which may be any
        pytree, or a dataclass of pytrees; tensors without dimensions stay."""
        return _select(state, rows)

    def notes(self, state: Any) -> Mapping[str, Any]:
        """What the method has to say of a finished solve, as further entries of ``info``. Default: nothing."""
        return {}

    def inverse(self, state: Any) -> Callable[[Tensor], Tensor] | None:
        """The method's estimate of (I - J)^-1 as a map of (batch, features) tensors, or None where it has none."""
        return None

    def solve(self, problem: Problem, z: Tensor, sample_at: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        """For a method that needs its own loop: the final state, and those at the steps `sample_at`.

        Overriding it makes it the method instead of :meth:`step`. The kernel evaluates f once more at the final state
        and reports that residual; without a state for each of `sample_at`, the final one stands in.
        """
        raise NotImplementedError(f"{type(self).__name__} leaves the loop to the kernel")


class LinearSolver(Plugin[SolverS]):
    """A method for (I - A) u = b on a :class:`deqcore.LinearProblem`, of the same shape as :class:`Solver`."""

    settings_type: ClassVar[type[Settings]] = SolverSettings
    monitored: ClassVar[bool] = True
    #: True where the A u + b that `step` returns comes from a recurrence and not from a product. The loop then makes
    #: one product before it calls anything converged; where that finds otherwise, it goes on from a new state.
    estimates: ClassVar[bool] = False

    def init(self, problem: LinearProblem, u: Tensor, fu: Tensor) -> Any:
        """The solver's state before the first step. Default: none."""
        return None

    def step(self, problem: LinearProblem, u: Tensor, fu: Tensor, state: Any) -> Step:
        """One update from `u`, where A u + b is `fu`."""
        raise NotImplementedError(f"{type(self).__name__} defines no step()")

    resume = Solver.resume
    select = Solver.select
    notes = Solver.notes
    inverse = Solver.inverse
    solve = Solver.solve


class GradientBackend(Plugin[GradientS]):
    """How the returned state gets its gradient. Define `attach`, or `adjoint` for a method that solves the adjoint."""

    settings_type: ClassVar[type[Settings]] = GradientSettings
    #: True where the method is only right at an equilibrium, so that earlier states of a trajectory need another.
    needs_equilibrium: ClassVar[bool] = False
    #: True where :meth:`adjoint` solves its equation to a tolerance: every derivative can be made of such solves.
    exact: ClassVar[bool] = False
    #: True where :meth:`attach` evaluates f and combines tensors, no more: torch.func can transform that.
    transforms: ClassVar[bool] = False
    #: True where :meth:`attach` looks at the solver's state: ``solution.solver_state``, ``solution.inverse()``.
    needs_state: ClassVar[bool] = False

    def check(self, solver: Solver[Any], compact: bool) -> None:
        """Raise a ConfigError where the method can't work with what this solver leaves. Default: all will do.

        Args:
            solver: what solves forward.
            compact: whether finished samples leave the batch, in which case no solver state is kept.
        """

    def attach(self, problem: Problem, solution: Solution) -> Tensor | list[Tensor]:
        """A state (or several, the last being the one to go on from) that carries a gradient.

        Args:
            problem: calling it with grad enabled records f's graph.
            solution: ``solution["z"]`` is the packed state found, detached, shape (batch, features). ``.solver`` found
                it, from ``problem.start``.
        """
        from .adjoint import attach_adjoint

        return attach_adjoint(problem, solution, self.adjoint, self.exact)

    def adjoint(self, problem: LinearProblem) -> Solution:
        """Solve u = J^T u + b, with ``problem.b`` the cotangent that came in; ``["z"]`` of the result is u."""
        raise NotImplementedError(f"{type(self).__name__} defines neither attach() nor adjoint()")


class Stretch(NamedTuple):
    """One stretch of a core's plan.

    Attributes:
        stop: the step, counted from the start of the call, at which the stretch ends and a state is returned.
        gradient: index into the call's gradient backends (0 is the first state's, -1 the last's).
        resume: True to go on from what the backend returned, with a new solver state; False to go on as if the
            gradient had been attached beside the solve.
    """

    stop: int
    gradient: int
    resume: bool


class Core(Plugin[CoreS]):
    """Which stretches are solved in training, and where gradients attach."""

    settings_type: ClassVar[type[Settings]] = CoreSettings

    def plan(self, max_steps: int) -> list[Stretch]:
        """Stretches in order; as many, whatever `max_steps` is, as states are to be returned."""
        raise NotImplementedError(f"{type(self).__name__} defines no plan()")


class Norm(Plugin[NormS]):
    """A weight normalisation, put on a module's tensor as a torch parametrization."""

    settings_type: ClassVar[type[Settings]] = NormSettings
    #: Module class -> ((tensor name, output dimension), ...): where the norm goes.
    targets: ClassVar[dict[type[nn.Module], tuple[tuple[str, int | None], ...]]] = {}

    def parametrization(self, weight: Tensor, dim: int | None) -> nn.Module:
        """The module whose forward makes the weight, for torch's ``register_parametrization``."""
        raise NotImplementedError(f"{type(self).__name__} defines no parametrization()")


class Regularizer(Plugin[RegularizerS]):
    """A penalty on the map or the trajectory, added to the training loss."""

    settings_type: ClassVar[type[Settings]] = RegularizerSettings

    def penalty(self, problem: Problem, states: Sequence[Tensor]) -> Tensor:
        """A scalar with a gradient to f's parameters, not yet weighted.

        Args:
            problem: f on packed states; evaluate it with grad enabled.
            states: packed states returned by this call, in order, with their gradients; the last is the equilibrium.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no penalty()")
