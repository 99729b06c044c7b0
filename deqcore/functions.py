"""Plain functions and classes as implementations: what TorchDEQ's register_* functions take."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import ConfigDict, create_model
from torch import Tensor

from .errors import BrokenPluginError, ConfigError, ConfigTypeError
from .interfaces import Core, LinearSolver, Norm, Solver
from .iterate import iterate
from .problem import Problem
from .registry import registry
from .scope import SolveScope
from .settings import CoreSettings, SolverSettings
from .state import StateSpec

__all__ = ["adapt_solver", "register_deq", "register_norm", "register_solver", "solver_function"]

SolverFunction = Callable[..., Any]

#: Arguments of TorchDEQ's solver functions that the kernel gives; the rest are the function's own settings.
GIVEN_BY_KERNEL = ("max_iter", "tol", "stop_mode", "indexing", "return_final")
#: Solvers that a solver function keeps, one for each set of options it was called with.
CACHED = 16
#: Annotations that become the setting's type; any other is left to the function.
CHECKED_TYPES = (bool, int, float, str)


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
        ConfigError: it can't be a name.
        ConfigTypeError: `solver` is neither, or a function that can't be called so.

    Example:
        >>> def picard(func, x0, max_iter=50, tol=1e-3, stop_mode="abs", indexing=None, weight=1.0):
        ...     for _ in range(max_iter):
        ...         x0 = torch.lerp(x0, func(x0), weight)
        ...     return x0, [], {}
        >>> _ = register_solver("picard", picard)
        >>> deq = get_deq(solver={"name": "picard", "weight": 0.5})
    """
    adapted = solver if isinstance(solver, type) else adapt_solver(solver_type, solver)
    kind = "linear_solvers" if isinstance(solver, type) and issubclass(solver, LinearSolver) else "solvers"
    registry.register(kind, solver_type, adapted, replace=replace, module=getattr(solver, "__module__", None))
    return solver


def adapt_solver(name: str, function: SolverFunction) -> type[Solver[Any]]:
    """A Solver class around a function of TorchDEQ's signature; its keyword arguments become settings."""
    if not callable(function):  # pyright: ignore[reportUnnecessaryComparison]
        raise ConfigTypeError(f"a solver is a Solver class or a function, got {type(function).__name__}.")
    parameters = _parameters(function)
    namespace = {
        "function": staticmethod(function),
        "takes": frozenset(parameters),
        "takes_anything": _takes_anything(parameters),
        "__doc__": function.__doc__,
        "__module__": getattr(function, "__module__", __name__),
        "__qualname__": getattr(function, "__qualname__", name),
    }
    adapted = type(name, (FunctionSolver,), namespace)
    adapted.settings_type = _settings_of(name, function, parameters)
    return adapted


def _parameters(function: SolverFunction) -> dict[str, inspect.Parameter]:
    """Parameters after (func, x0); none where Python can't tell (functions written in C)."""
    try:
        found = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return {}
    positional = [p for p in found if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][:2]
    return {p.name: p for p in found if p not in positional}


def _takes_anything(parameters: Mapping[str, inspect.Parameter]) -> bool:
    return not parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


class _FunctionSettings(SolverSettings):
    """Settings of a function; found again by the function's name, as their class exists in this process only."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _settings_again, ({key: getattr(self, key) for key in self.model_fields_set},)


class _OpenSettings(_FunctionSettings):
    """Settings of a function with ``**kwargs``, which gets every key that is not the kernel's."""

    model_config = ConfigDict(extra="allow")


def _settings_again(values: Mapping[str, Any]) -> Any:
    return registry.settings("solvers", values)


def _settings_of(
    name: str, function: SolverFunction, parameters: Mapping[str, inspect.Parameter]
) -> type[SolverSettings]:
    anything = _takes_anything(parameters)
    if not anything and "max_iter" not in parameters:
        raise ConfigTypeError(
            f"a solver function is called as solver(func, x0, max_iter=..., tol=..., stop_mode=..., indexing=...); "
            f"{name!r} does not take max_iter. Add it, or **kwargs."
        )
    try:
        hints = typing.get_type_hints(function)
    except Exception:  # an annotation that can't be resolved says nothing about the value
        hints = {}
    fields: dict[str, Any] = {}
    for key, parameter in parameters.items():
        named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if not named or key in SolverSettings.model_fields or key == "indexing":
            if key == "name":
                raise ConfigTypeError(
                    f"solver function {name!r} has an option called 'name', which settings need; rename it."
                )
            continue
        if key.startswith("_") or hasattr(SolverSettings, key):
            raise ConfigTypeError(
                f"solver function {name!r} has an option called {key!r}, which can't be a setting; rename it."
            )
        hint = hints.get(key)
        default = ... if parameter.default is parameter.empty else parameter.default
        fields[key] = (hint if hint in CHECKED_TYPES and default is not None else Any, default)
    base = _OpenSettings if anything else _FunctionSettings
    made: Any = create_model(f"{name}_settings", __base__=base, **fields)
    return made


class FunctionSolver(Solver[SolverSettings]):
    """A function with a loop of its own, in TorchDEQ's signature."""

    function: ClassVar[SolverFunction]
    #: Names of its parameters after (func, x0), and whether it takes any other.
    takes: ClassVar[frozenset[str]] = frozenset()
    takes_anything: ClassVar[bool] = True

    def solve(self, problem: Problem, z: Tensor, sample_at: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        spec = problem.spec
        if spec is None or not spec.single or spec.rounds:  # several states, or a narrow one, are solved packed
            spec = StateSpec(z)
        x0 = spec.unpack(z)

        def func(x: Tensor, tau: float = 1.0) -> Tensor:
            fx = spec.unpack(problem(spec.pack(x))).reshape(x.shape)
            return fx if tau == 1.0 else tau * fx + (1 - tau) * x

        returned = self.function(func, x0, **self._arguments(sample_at))
        parts: tuple[Any, ...] = tuple(returned) if isinstance(returned, tuple | list) else (returned, [])  # pyright: ignore
        final, trajectory = (*parts, None, None)[:2]
        states: list[Any] = [final, *trajectory] if isinstance(trajectory, tuple | list) else [final]
        for state in states:
            self._check(state, x0)
        packed = [spec.pack(state.detach().reshape(x0.shape)) for state in states]
        return packed[0], packed[1:]

    def _arguments(self, sample_at: Sequence[int]) -> dict[str, Any]:
        """What the function is called with: the kernel's arguments as far as it takes them, and its own options."""
        settings = self.settings
        tol, stop_mode = self._tolerance()
        common: dict[str, Any] = {"max_iter": settings.max_iter, "tol": tol, "stop_mode": stop_mode}
        if sample_at:
            common["indexing"] = [*sample_at, settings.max_iter]
        if settings.return_final:
            common["return_final"] = True
        given = {key: value for key, value in common.items() if self.takes_anything or key in self.takes}
        shared = (settings.model_fields_set & self.takes) - given.keys()  # options of its own that all solvers have
        own = {key for key, _ in settings if key not in SolverSettings.model_fields}
        return given | {key: getattr(settings, key) for key in own | shared}

    def _tolerance(self) -> tuple[float, str]:
        """(tol, stop_mode), the only form in which a function can be told."""
        settings = self.settings
        if settings.rtol is None and settings.atol is None:
            return settings.tol, settings.stop_mode
        if settings.rtol and settings.atol:
            raise ConfigError(
                f"solver function {settings.name!r} can't stop at atol + rtol * ||f(z)||, got atol={settings.atol} and "
                f"rtol={settings.rtol}: give one of them, or tol with stop_mode."
            )
        return (settings.rtol, "rel") if settings.rtol else (settings.atol or 0.0, "abs")

    def _check(self, state: Any, x0: Tensor) -> None:
        def sizes(tensor: Tensor) -> list[int]:
            return [size for size in tensor.shape if size != 1]

        if isinstance(state, Tensor) and sizes(state) == sizes(x0) and state.is_complex() == x0.is_complex():
            return
        what = f"a {state.dtype} tensor of shape {tuple(state.shape)}" if isinstance(state, Tensor) else repr(state)
        raise BrokenPluginError(
            f"solver function {type(self).__name__!r} must return (z, trajectory, info), z and the states in "
            f"trajectory like x0: a {x0.dtype} tensor of shape {tuple(x0.shape)}; got {what}."
        )


def solver_function(name: str) -> SolverFunction:
    """The solver `name` as a function of TorchDEQ's signature, on plain tensors.

    Returns:
        ``solver(func, x0, max_iter=50, tol=1e-3, stop_mode="abs", indexing=None, **options)``, which returns
        (state, states at the steps in `indexing`, info).
    """
    solver_class = registry.get("solvers", name)
    made: dict[str, Any] = {}  # solvers by their options: validating them costs more than ten steps on a small state

    def solver(
        func: Callable[..., Any],
        x0: Any,
        max_iter: int = 50,
        tol: float = 1e-3,
        stop_mode: str = "abs",
        indexing: Sequence[int] | None = None,
        **options: Any,
    ) -> tuple[Any, list[Any], Any]:
        if torch.compiler.is_compiling():
            from . import compiled  # it imports dynamo

            return compiled.beside(solver, func, x0, max_iter, tol, stop_mode, indexing, **options)
        spec = StateSpec.of(x0)
        given = {"name": name, "max_iter": max_iter, "tol": tol, "stop_mode": stop_mode, **options}
        if options.keys() & {"rtol", "atol"} and (tol, stop_mode) == (1e-3, "abs"):
            del given["tol"], given["stop_mode"]  # left at their defaults, they are no second tolerance
        key = repr(given)  # tells True from 1, as == does not
        if key not in made:
            if len(made) >= CACHED:
                made.clear()
            made[key] = registry.create("solvers", given)
        chosen = made[key]
        with SolveScope(), torch.no_grad():
            run = iterate(chosen, Problem.of(func, spec), spec.pack(x0).detach(), sample_at=indexing or ())
        states = [spec.output(state) for state in run.samples]
        return spec.output(run.solution["z"]), states, run.solution

    solver.__name__ = solver.__qualname__ = name
    solver.__doc__ = solver_class.__doc__
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
