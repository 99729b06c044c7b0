"""The DEQ module, and the factory that makes one from any configuration."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from .adjoint import TRANSFORMS
from .choice import overlay
from .config import Arguments, DEQConfig
from .errors import ConfigError, ConfigTypeError, FunctionTypeError, GradientModeError, StateError, StateTypeError
from .forward import Forward
from .functions import FactoryCore
from .interfaces import Core, GradientBackend, Regularizer, Solver
from .iterate import Callback, check_loop
from .legacy import torchdeq_order
from .problem import Problem
from .products import has_tangent, in_forward_mode, transforming
from .progress import progress_bar
from .registry import registry
from .scope import SolveScope
from .solution import Solution
from .state import StateSpec, finite
from .validation import rename, shown, validate

__all__ = ["DEQ", "get_deq", "reset_deq"]

#: TorchDEQ's names in `solver_kwargs` for what every solver has.
PER_CALL = {"f_max_iter": "max_iter", "f_tol": "tol", "f_stop_mode": "stop_mode"}
#: Sets of per-call options whose solvers are kept.
KEPT = 64


class DEQ(nn.Module):
    """A solver, a gradient backend and a core that together turn f into its equilibrium.

    It has no parameters of its own. Made by :func:`get_deq`.

    Args:
        config: the configuration; the names in it are resolved here.
    """

    def __init__(self, config: DEQConfig) -> None:
        super().__init__()
        self.config = config
        self._resolve()

    def _resolve(self) -> None:
        config = self.config
        self.solver: Solver[Any] = registry.create("solvers", config.solver)
        self.core: Core[Any] = registry.create("cores", config.core)
        last: GradientBackend[Any] = registry.create("gradients", config.gradient)
        self.gradients = [*self._before(last), last]
        self.regularizers: list[Regularizer[Any]] = [registry.create("regularizers", r) for r in config.regularizers]
        self._solvers: dict[str, Solver[Any]] = {}
        check_loop(type(self.solver), config.solver, config.compact, config.batch_dims)
        for gradient in self.gradients:
            gradient.check(self.solver, config.compact)

    def _before(self, last: GradientBackend[Any]) -> list[GradientBackend[Any]]:
        """Backends of the states before the last one."""
        count = len(self.core.plan(self.config.solver.max_iter)) - 1
        chosen = [registry.create("gradients", choice) for choice in self.config.core.intermediate]
        if not chosen:
            chosen = [registry.create("gradients", "phantom") if count and last.needs_equilibrium else last]
        return chosen * count if len(chosen) == 1 else chosen

    def __getstate__(self) -> dict[str, Any]:
        """Only the configuration travels in a pickle; names are resolved again where it arrives."""
        built = ("solver", "core", "gradients", "regularizers", "_solvers")
        return {key: value for key, value in self.__dict__.items() if key not in built}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._resolve()

    def extra_repr(self) -> str:
        config = self.config
        return f"solver={config.solver.name}, gradient={config.gradient.name}, core={config.core.name}"

    # ---- the call

    def forward(
        self,
        fn: Callable[..., Any],
        z0: Any,
        args: Any = (),
        solver_kwargs: Mapping[str, Any] | None = None,
        sradius_mode: bool = False,
        backward_writer: Callable[[Solution], Any] | None = None,
        *,
        warm_start: Solution | None = None,
        callback: Callback | None = None,
        progress: bool = False,
    ) -> tuple[list[Any], Solution]:
        """Find z = fn(z, *args) from `z0`.

        Args:
            fn: the map; called as ``fn(z, *args)`` for a tensor, ``fn(a, b, *args)`` for a tuple or list of states, and
                ``fn(state, *args)`` for any other pytree. Must return what it takes. Gradients flow to `args` and to
                whatever fn closes over.
            z0: the start, shape (B, ...) with the default ``batch_dims=1``; floating point or complex.
            args: further arguments of fn. (A mapping here is taken for `solver_kwargs`, as in TorchDEQ.)
            solver_kwargs: settings of the solver for this call: ``f_max_iter`` (0 hands z0 on), ``tol``, any of its
                own. Where they are given at get_deq too, these win.
            sradius_mode: in eval mode, estimate the spectral radius of df/dz at the result.
            backward_writer: called with the Solution of every backward solve.
            warm_start: an earlier call's info, to start from its state (and solver state, with ``keep_state=True``).
            callback: called as callback(step, z, residual) at every judged step, on packed states; `step` counts from
                the start of the call; ends it by returning True.
            progress: show a progress bar of the steps.

        Returns:
            (z_out, info). z_out is a list of the sampled states, in training as many as the core says, in eval one: the
            equilibrium. Each is a tensor, a list (for a tuple or list of states), or a pytree like z0. See
            :class:`deqcore.Solution` for info.

        Raises:
            StateError, StateTypeError: z0 can't be packed, or holds NaN or inf.
            FunctionError, FunctionTypeError: fn breaks the rules of a fixed-point map.
            ConvergenceError: ``on_failure="raise"`` and some sample missed its tolerance.
            UnknownKeyError, ConfigError: `solver_kwargs` has a wrong key or value.
        """
        if args is None or isinstance(args, Mapping):
            order = torchdeq_order(args, solver_kwargs, sradius_mode, backward_writer)
            args, (solver_kwargs, sradius_mode, backward_writer) = (), order
        if not callable(fn):
            raise FunctionTypeError(f"f must be callable, got {type(fn).__name__}: deq(fn, z0).")
        if torch.compiler.is_compiling():
            from . import compiled  # it imports dynamo

            return compiled.call(
                self,
                compiled.Call(
                    fn, z0, args, solver_kwargs, sradius_mode, backward_writer, warm_start, callback, progress
                ),
            )
        if transforming():
            raise GradientModeError(TRANSFORMS)
        solver = self.solver_for(solver_kwargs)
        bar = progress_bar(solver.settings.max_iter, callback) if progress else nullcontext(callback)
        with SolveScope(), bar as callback:
            problem, z, warm_state = self._pose(fn, z0, args, warm_start, solver)
            call = Forward(self, solver, problem, backward_writer, callback, warm_state)
            states, info = call.train(z) if self.training else call.evaluate(z, sradius_mode)
            self._regularize(problem, states, info)
            spec = cast(StateSpec, problem.spec)
            z_out = [spec.output(state) for state in states]
        info.update(problem.counts())
        return z_out, info

    def solver_for(self, options: Mapping[str, Any] | None) -> Solver[Any]:
        """The solver with this call's options and this mode's step limit; made once for each set of options."""
        if options is not None and not isinstance(options, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigTypeError(f"solver_kwargs must be a dict of settings for this call, got {shown(options)}.")
        try:
            key = json.dumps([self.training, dict(options or {})], sort_keys=True)
        except TypeError:  # an option that is no plain value, whose like can't be told from it
            return self._make_solver(options or {})
        solver = self._solvers.get(key)
        if solver is None:
            solver = self._make_solver(options or {})
            if len(self._solvers) >= KEPT:  # options that change with every call
                self._solvers.clear()
            self._solvers[key] = solver
        return solver

    def _make_solver(self, options: Mapping[str, Any]) -> Solver[Any]:
        settings = self.config.solver
        kind = type(settings)
        given = {
            PER_CALL.get(key, key): value for key, value in options.items() if not (key in PER_CALL and value is None)
        }
        for flat, key in PER_CALL.items():
            if None not in (options.get(flat), options.get(key)) and options[flat] != options[key]:
                raise ConfigError(
                    f"solver_kwargs: {flat}={options[flat]!r} and {key}={options[key]!r} differ; give one."
                )
        for key in ("name", "f_solver"):
            if key in given and given.pop(key) != settings.name:
                raise ConfigError(
                    f"solver_kwargs: {key} can't change from call to call; make another DEQ with get_deq."
                )
        base = {key: getattr(settings, key) for key in settings.model_fields_set}
        limit = {} if self.training else {"max_iter": self._eval_steps()}
        values = overlay({**base, **limit}, rename(kind, given, "solver_kwargs"))
        return type(self.solver)(validate(kind, values, "solver_kwargs", owner=f"solver {settings.name!r}"))

    def _eval_steps(self) -> int:
        config = self.config
        return config.eval_max_iter or int(config.solver.max_iter * config.eval_factor)

    def _pose(
        self, fn: Callable[..., Any], z0: Any, args: Any, warm_start: Solution | None, solver: Solver[Any]
    ) -> tuple[Problem, Tensor, Any]:
        """The problem, its packed start, and the solver state to resume from."""
        if not isinstance(args, tuple | list):
            raise FunctionTypeError(
                f"args must be a tuple of fn's further arguments, got {type(args).__name__}: args=(x,)."
            )
        spec = StateSpec.of(z0, self.config.batch_dims)
        problem = Problem.of(fn, spec, tuple(args))  # pyright: ignore[reportUnknownArgumentType]
        if in_forward_mode():
            problem.call = _without_tangents(problem.call)
        if warm_start is None:
            problem.start = spec.pack(z0)
            z = problem.start.detach()
            return problem, z if solver.settings.is_fixed else finite(z, "z0"), None
        if not isinstance(warm_start, Solution):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise StateTypeError(f"warm_start takes the info of an earlier call, got {type(warm_start).__name__}.")
        if warm_start.spec is not None and not spec.same_as(warm_start.spec):
            raise StateError(f"warm_start is for another state: {warm_start.spec}; this call's is {spec}.")
        z: Tensor = warm_start["z"]
        if tuple(z.shape) != (spec.batch, spec.features):  # its spec was lost in a pickle
            raise StateError(f"warm_start is for a packed state of shape {tuple(z.shape)}; this call's is {spec}.")
        made_by = type(warm_start.solver)
        z = z.to(spec.device, spec.dtype)
        if not solver.settings.is_fixed:  # to look would be to wait for the device
            finite(z, "warm_start")
        problem.start = z
        return problem, z, warm_start.solver_state if made_by is type(solver) else None

    def _regularize(self, problem: Problem, states: list[Tensor], info: Solution) -> None:
        if not self.regularizers:
            return
        total = states[-1].new_zeros(())
        parts: dict[str, Tensor] = {}
        if self.training and torch.is_grad_enabled():
            for regularizer in self.regularizers:
                penalty = regularizer.penalty(problem, states)
                parts[regularizer.settings.name] = penalty
                total = total + regularizer.settings.weight * penalty
        info["regularizers"], info["regularization"] = parts, total

    def apply_norm(self, module: nn.Module, **options: Any) -> nn.Module:
        """Put the configured weight normalisation on `module`'s layers: weight_norm, TorchDEQ's default, where the
        configuration says nothing; none where it says ``norm=None``."""
        from .norm import apply_norm

        return apply_norm(module, args=self.config, **options)


def _without_tangents(call: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`call`, where tangents of forward mode would go through the solver's steps, which are no equilibrium's."""

    def checked(z: Tensor) -> Tensor:
        fz = call(z)
        if has_tangent(fz):
            raise GradientModeError(TRANSFORMS)
        return fz

    return checked


def get_deq(args: Any = None, **keywords: Any) -> Any:
    """Make a DEQ from any configuration.

    Args:
        args: a solver's name, a path to a TOML, JSON or YAML file, a dict, an argparse.Namespace, a DEQConfig, or any
            object with attributes; not changed.
        keywords: settings by nested or TorchDEQ's flat names; these win.

    Returns:
        a :class:`DEQ` (or what the factory returns that :func:`deqcore.register_deq` was given for this core).

    Raises:
        ConfigError and its kin, UnknownPluginError, BrokenPluginError: see :meth:`DEQConfig.load`.

    Example:
        >>> deq = get_deq(solver={"name": "anderson", "memory": 8}, gradient="implicit")
        >>> z_out, info = deq(lambda z: 0.5 * z + 1, torch.zeros(4, 3))
        >>> bool(info.converged.all())
        True
    """
    config = DEQConfig.load(args, **keywords)
    core = registry.get("cores", config.core.name)
    if not issubclass(core, FactoryCore):
        return DEQ(config)
    return core.factory(args if isinstance(args, Mapping) and not keywords else Arguments(config, args, keywords))


def reset_deq(model: nn.Module) -> None:
    """Reset what is fixed from solve to solve in `model`: norms and dropout masks. Solves do it by themselves."""
    from .dropout import reset_dropout
    from .norm import reset_norm

    reset_norm(model)
    reset_dropout(model)
