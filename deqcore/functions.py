"""Plain functions and classes as implementations: what TorchDEQ's register_* functions take."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from pydantic import ConfigDict, create_model
from torch import Tensor

from .errors import BrokenPluginError, ConfigTypeError
from .interfaces import Core, LinearSolver, Norm, Solver
from .problem import Problem
from .registry import registry
from .settings import CoreSettings, SolverSettings

__all__ = ["adapt_solver", "register_deq", "register_norm", "register_solver", "solver_function"]

SolverFunction = Callable[..., Any]

#: Arguments of TorchDEQ's solver functions that the kernel gives; the rest are the function's own settings.
GIVEN_BY_KERNEL = ("max_iter", "tol", "stop_mode", "indexing", "return_final")


def register_solver(solver_type: str, solver: Any, *, replace: bool = False) -> Any:
    """Register a solver under a name for this process.

    Args:
        solver_type: the name.
        solver: a :class:`deqcore.Solver` class, or a function of TorchDEQ's signature
            ``solver(func, x0, max_iter, tol, stop_mode, indexing, **options) -> (z, trajectory, info)``.
        replace: take the name over if it is taken; without it that is an error.

    Returns:
        `solver`.

    Raises:
        PluginClashError: the name is taken.
        ConfigTypeError: `solver` is neither.
    """
    adapted = solver if isinstance(solver, type) else adapt_solver(solver_type, solver)
    kind = "linear_solvers" if isinstance(solver, type) and issubclass(solver, LinearSolver) else "solvers"
    registry.register(kind, solver_type, adapted, replace=replace, module=getattr(solver, "__module__", None))
    return solver


def adapt_solver(name: str, function: SolverFunction) -> type[Solver[Any]]:
    """A Solver class around a function of TorchDEQ's signature; its keyword arguments become settings."""
    if not callable(function):  # pyright: ignore[reportUnnecessaryComparison]
        raise ConfigTypeError(f"a solver is a Solver class or a function, got {type(function).__name__}.")
    settings = _settings_of(name, function)
    namespace = {
        "function": staticmethod(function),
        "settings_type": settings,
        "__doc__": function.__doc__,
        "__module__": getattr(function, "__module__", __name__),
        "__qualname__": getattr(function, "__qualname__", name),
    }
    return type(name, (FunctionSolver,), namespace)


def _settings_of(name: str, function: SolverFunction) -> type[SolverSettings]:
    try:
        parameters = list(inspect.signature(function).parameters.values())[2:]
    except (TypeError, ValueError):
        parameters = []
    fields: dict[str, Any] = {}
    extra = "forbid"
    for parameter in parameters:
        if parameter.kind is parameter.VAR_KEYWORD:
            extra = "allow"  # what is given goes to the function's own **kwargs
        elif parameter.name not in GIVEN_BY_KERNEL and parameter.kind is not parameter.VAR_POSITIONAL:
            default = ... if parameter.default is parameter.empty else parameter.default
            fields[parameter.name] = (Any, default)
    made: Any = create_model(f"{name}_settings", __base__=SolverSettings, **fields)
    made.model_config = ConfigDict(**{**made.model_config, "extra": extra})
    made.model_rebuild(force=True)
    return made


class FunctionSolver(Solver[SolverSettings]):
    """A function with a loop of its own, in TorchDEQ's signature."""

    function: ClassVar[SolverFunction]

    def solve(self, problem: Problem, z: Tensor, sample_at: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        settings = self.settings
        spec = problem.spec
        shape = spec.shapes[0] if spec is not None and spec.single and not spec.rounds else z.shape

        def func(x: Tensor, tau: float = 1.0) -> Tensor:
            fx = problem(x.reshape(z.shape)).reshape(x.shape)
            return fx if tau == 1.0 else tau * fx + (1 - tau) * x

        common = SolverSettings.model_fields
        own = {key: value for key, value in settings if key not in common}
        indexing = [*sample_at, settings.max_iter] if sample_at else None
        returned = self.function(
            func, z.reshape(shape), max_iter=settings.max_iter, tol=settings.tol, stop_mode=settings.stop_mode,
            **({"indexing": indexing} if indexing else {}), **({"return_final": True} if settings.return_final else {}), **own,
        )
        final, trajectory = (returned[0], returned[1]) if isinstance(returned, tuple) else (returned, [])
        if not isinstance(final, Tensor) or final.numel() != z.numel():
            raise BrokenPluginError(
                f"solver function {type(self).__name__!r} must return (z, trajectory, info) with z shaped like x0 "
                f"{tuple(shape)}, got {type(final).__name__}"
                + (f" of shape {tuple(final.shape)}" if isinstance(final, Tensor) else "")
            )
        return final.detach().reshape(z.shape), [state.detach().reshape(z.shape) for state in trajectory or []]


def solver_function(name: str) -> SolverFunction:
    """The solver `name` as a function of TorchDEQ's signature, on plain tensors.

    Returns:
        ``solver(func, x0, max_iter=50, tol=1e-3, stop_mode="abs", indexing=None, **options)``, which returns
        (state, states at the steps in `indexing`, info).
    """
    registry.find("solvers", name)

    def solver(
        func: Callable[..., Any],
        x0: Any,
        max_iter: int = 50,
        tol: float = 1e-3,
        stop_mode: str = "abs",
        indexing: Sequence[int] | None = None,
        **options: Any,
    ) -> tuple[Any, list[Any], Any]:
        from .iterate import iterate
        from .state import StateSpec

        spec = StateSpec(x0)
        given = {"name": name, "max_iter": max_iter, "tol": tol, "stop_mode": stop_mode, **options}
        with torch.no_grad():
            run = iterate(
                registry.create("solvers", given), Problem.of(func, spec), spec.pack(x0).detach(), sample_at=indexing or ()
            )
        states = [spec.output(state) for state in run.samples]
        return spec.output(run.solution["z"]), states, run.solution

    solver.__name__ = solver.__qualname__ = name
    solver.__doc__ = registry.get("solvers", name).__doc__
    return solver


class FactoryCore(Core[CoreSettings]):
    """A class registered with :func:`register_deq` that is a whole DEQ of its own; get_deq returns what it makes."""

    factory: ClassVar[Callable[[Any], Any]]


def register_deq(deq_type: str, core: Any, *, replace: bool = False) -> Any:
    """Register a core, or a whole DEQ class of one's own, for ``get_deq(core=deq_type)``.

    Args:
        deq_type: the name.
        core: a :class:`deqcore.Core` class; or any callable, which get_deq then calls with its configuration and whose
            result it returns, as TorchDEQ does.
        replace: take the name over if it is taken.
    """
    adapted = core
    if not (isinstance(core, type) and issubclass(core, Core)):
        if not callable(core):
            raise ConfigTypeError(f"a core is a class or a callable, got {type(core).__name__}.")
        names = {"factory": staticmethod(core), "__module__": getattr(core, "__module__", __name__)}
        adapted = type(deq_type, (FactoryCore,), {**names, "__qualname__": getattr(core, "__qualname__", deq_type)})
    registry.register("cores", deq_type, adapted, replace=replace, module=getattr(core, "__module__", None))
    return core


def register_norm(norm_type: str, norm_class: type[Norm[Any]], *, replace: bool = False) -> type[Norm[Any]]:
    """Register a :class:`deqcore.Norm` class under a name for this process."""
    registry.register("norms", norm_type, norm_class, replace=replace)
    return norm_class


