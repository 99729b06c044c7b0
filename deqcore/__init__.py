"""deqcore: deep equilibrium models in PyTorch, with solvers, gradients, norms and regularizers picked by name."""

from __future__ import annotations

from . import alias as _alias
from . import startup as _startup
from .adjoint import attach_adjoint
from .config import DEQConfig
from .deq import DEQ, get_deq, reset_deq
from .dropout import (
    VariationalDropout,
    VariationalDropout1d,
    VariationalDropout2d,
    VariationalDropout3d,
    VariationalDropToken1d,
    VariationalDropToken2d,
    VariationalDropToken3d,
    reset_dropout,
)
from .errors import (
    BrokenPluginError,
    ConfigError,
    ConfigTypeError,
    ConvergenceError,
    ConvergenceWarning,
    DEQError,
    DEQWarning,
    FunctionError,
    FunctionTypeError,
    GradientModeError,
    MissingExtraError,
    NormError,
    PluginAPIError,
    PluginClashError,
    PluginDisabledError,
    PluginError,
    PluginWarning,
    StateError,
    StateTypeError,
    UnknownKeyError,
    UnknownPluginError,
)
from .functional import fixed_point
from .functions import register_deq, register_solver
from .hookspecs import hookimpl
from .interfaces import Core, GradientBackend, LinearSolver, Norm, Plugin, Regularizer, Solver, Step, Stretch
from .iterate import Run, iterate
from .legacy import add_deq_args
from .linear import linear_solve
from .loss import fp_correction, jac_reg, power_method, register_weight_func
from .norm import apply_norm, register_norm, register_norm_module, remove_norm, reset_norm
from .problem import Linearization, LinearProblem, Problem
from .registry import Registry, registry
from .scope import SolveScope, current_scope, once
from .settings import (
    AnySolverChoice,
    CoreSettings,
    GradientChoice,
    GradientSettings,
    LinearSolverChoice,
    NormSettings,
    RegularizerSettings,
    Settings,
    SolverChoice,
    SolverSettings,
)
from .solution import Solution, Stats, Status
from .solver import get_solver, solver_stat_from_final_step
from .state import StateSpec
from .utils import mem_gc, mixed_init

__all__ = [
    "DEQ",
    "AnySolverChoice",
    "BrokenPluginError",
    "ConfigError",
    "ConfigTypeError",
    "ConvergenceError",
    "ConvergenceWarning",
    "Core",
    "CoreSettings",
    "DEQConfig",
    "DEQError",
    "DEQWarning",
    "FunctionError",
    "FunctionTypeError",
    "GradientBackend",
    "GradientChoice",
    "GradientModeError",
    "GradientSettings",
    "LinearProblem",
    "LinearSolver",
    "LinearSolverChoice",
    "Linearization",
    "MissingExtraError",
    "Norm",
    "NormError",
    "NormSettings",
    "Plugin",
    "PluginAPIError",
    "PluginClashError",
    "PluginDisabledError",
    "PluginError",
    "PluginWarning",
    "Problem",
    "Registry",
    "Regularizer",
    "RegularizerSettings",
    "Run",
    "Settings",
    "Solution",
    "SolveScope",
    "Solver",
    "SolverChoice",
    "SolverSettings",
    "StateError",
    "StateSpec",
    "StateTypeError",
    "Stats",
    "Status",
    "Step",
    "Stretch",
    "UnknownKeyError",
    "UnknownPluginError",
    "VariationalDropToken1d",
    "VariationalDropToken2d",
    "VariationalDropToken3d",
    "VariationalDropout",
    "VariationalDropout1d",
    "VariationalDropout2d",
    "VariationalDropout3d",
    "add_deq_args",
    "apply_norm",
    "attach_adjoint",
    "current_scope",
    "fixed_point",
    "fp_correction",
    "get_deq",
    "get_solver",
    "hookimpl",
    "iterate",
    "jac_reg",
    "linear_solve",
    "mem_gc",
    "mixed_init",
    "once",
    "power_method",
    "register_deq",
    "register_norm",
    "register_norm_module",
    "register_solver",
    "register_weight_func",
    "registry",
    "remove_norm",
    "reset_deq",
    "reset_dropout",
    "reset_norm",
    "solver_stat_from_final_step",
]

__version__ = "0.1.0"

_alias.install(__name__)
_startup.done()
