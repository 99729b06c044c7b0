"""TorchDEQ's flat names: what each means here, and the command-line flags that carry them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .errors import ConfigError, ConfigTypeError

__all__ = ["FLAT", "GIVEN", "IGNORED", "LEGACY", "add_deq_args", "expand", "flag_default"]

#: Section of a configuration under construction that holds flat gradient options until all sources are merged.
LEGACY = "legacy"
#: Attribute of a Namespace that lists the flags its user wrote; what isn't listed is a default, not a choice.
GIVEN = "deq_given"


class Flat(NamedTuple):
    """A flat name: the path it means, and its command-line flag (type, TorchDEQ's default, help) where it has one."""

    path: tuple[str, ...]
    type: Any = None
    default: Any = None
    help: str = ""


FLAT: dict[str, Flat] = {
    "f_solver": Flat(("solver", "name"), str, "fixed_point_iter", "forward solver, by name"),
    "b_solver": Flat((LEGACY, "b", "name"), str, "fixed_point_iter", "solver of the backward, by name; ours if not given"),
    "f_max_iter": Flat(("solver", "max_iter"), int, 40, "largest number of forward steps"),
    "b_max_iter": Flat((LEGACY, "b", "max_iter"), int, 40, "largest number of backward steps"),
    "f_tol": Flat(("solver", "tol"), float, 1e-3, "tolerance of the forward solve"),
    "b_tol": Flat((LEGACY, "b", "tol"), float, 1e-6, "tolerance of the backward solve, relative to the cotangent"),
    "f_stop_mode": Flat(("solver", "stop_mode"), str, "abs", "forward residual: abs or rel"),
    "b_stop_mode": Flat((LEGACY, "b", "stop_mode"), str, "abs", "backward residual: abs or rel"),
    "eval_factor": Flat(("eval_factor",), float, 1.0, "factor on f_max_iter in eval mode"),
    "eval_f_max_iter": Flat(("eval_max_iter",), int, 0, "f_max_iter in eval mode; 0 leaves it to eval_factor"),
    "no_stat": Flat(("no_stat",)),
    "norm_type": Flat(("norm", "name"), str, "weight_norm", "weight normalisation, by name, or none"),
    "norm_no_scale": Flat(("norm", "no_scale"), bool, False, "don't learn the norm's scale"),
    "norm_clip": Flat(("norm", "clip"), bool, False, "clip the normalisation factor"),
    "norm_clip_value": Flat(("norm", "clip_value"), float, 1.0, "largest normalisation factor when clipping"),
    "norm_target_norm": Flat(("norm", "target_norm"), float, 1.0, "norm aimed at when the scale is not learned"),
    "sn_n_power_iters": Flat(("norm", "n_power_iterations"), int, 1, "power iterations a solve of spectral_norm"),
    "core": Flat(("core", "name"), str, "sliced", "which states are returned and how: sliced or indexing"),
    "ift": Flat((LEGACY, "ift"), bool, False, "exact gradient by the implicit function theorem"),
    "hook_ift": Flat((LEGACY, "hook_ift"), bool, False, "the same as ift"),
    "n_states": Flat(("core", "n_states"), int, 1, "states to return in training, evenly spaced"),
    "indexing": Flat(("core", "indexing"), [int], [], "steps whose states to return besides the last"),
    "gamma": Flat((), float, 0.8, "for the program's own fp_correction(gamma=...)"),
    "grad": Flat((LEGACY, "grad"), [int], [1], "steps of the phantom gradient; one, or one a state"),
    "tau": Flat((LEGACY, "tau"), float, 1.0, "damping of the phantom gradient"),
    "sup_gap": Flat((LEGACY, "sup_gap"), int, -1, "return every k-th state of the phantom gradient"),
    "sup_loc": Flat((LEGACY, "sup_loc"), [int], [], "return these states of the phantom gradient"),
    "jac_loss_weight": Flat((), float, 0.0, "for the program's own use of jac_reg: its weight"),
    "jac_loss_freq": Flat((), float, 0.0, "for the program's own use of jac_reg: how often"),
    "jac_incremental": Flat((), int, 0, "for the program's own use of jac_reg: steps between raises of the weight"),
    "sradius_mode": Flat((), bool, False, "for the program's own call: deq(..., sradius_mode=args.sradius_mode)"),
    # Solver options that TorchDEQ takes per call only; a Namespace's own `m` is not ours.
    "m": Flat(("solver", "m")),
    "lam": Flat(("solver", "lam")),
    "LBFGS_thres": Flat(("solver", "LBFGS_thres")),
    "ls": Flat(("solver", "ls")),
    "return_final": Flat(("solver", "return_final")),
}

#: Flat names that TorchDEQ's get_deq takes and leaves to the program.
IGNORED = frozenset(name for name, flat in FLAT.items() if not flat.path)
#: Flat names that mean nothing of ours in a Namespace, where a program keeps everything.
CALL_ONLY = frozenset(("m", "lam", "LBFGS_thres", "ls", "return_final"))


def flag_default(name: str) -> Any:
    """Default of the flag `name` (with deqcore's dotted flags: None)."""
    return FLAT[name].default if name in FLAT else None


class _Store(argparse.Action):
    """Stores the value, and notes in the Namespace that its user wrote this flag."""

    def __init__(self, *args: Any, constant: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.constant = constant

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        setattr(namespace, self.dest, values if self.nargs != 0 else True)
        setattr(namespace, GIVEN, [*getattr(namespace, GIVEN, []), self.dest])


def add_deq_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add TorchDEQ's flags to `parser`, with its defaults, and ``--solver.memory 8``-style flags for what is installed.

    A flag that nobody wrote does not count as given: files and the environment may still set it.

    Args:
        parser: the program's own parser; changed in place.

    Returns:
        the same parser.
    """
    parser.set_defaults(**{GIVEN: []})
    for name, flat in FLAT.items():
        if flat.type is bool:
            parser.add_argument(f"--{name}", action=_Store, nargs=0, default=flat.default, help=flat.help)
        elif isinstance(flat.type, list):
            parser.add_argument(f"--{name}", action=_Store, nargs="+", type=int, default=flat.default, help=flat.help)
        elif flat.type is not None:
            parser.add_argument(f"--{name}", action=_Store, type=flat.type, default=flat.default, help=flat.help)
    for dotted, description in _installed_flags().items():
        parser.add_argument(f"--{dotted}", dest=dotted, default=argparse.SUPPRESS, help=description.replace("%", "%%"))
    return parser


def _installed_flags() -> dict[str, str]:
    """``solver.memory`` -> help, for every setting of every installed implementation that can be loaded."""
    from .errors import PluginError
    from .registry import KINDS, registry

    flags: dict[str, str] = {}
    owners: dict[str, list[str]] = {}
    for section, kind in (("solver", "solvers"), ("gradient", "gradients"), ("core", "cores"), ("norm", "norms")):
        for name in registry.names(kind):
            try:
                fields = registry.get(kind, name).settings_type.model_fields
            except PluginError:
                continue  # an error when somebody picks it
            for field, info in fields.items():
                flags.setdefault(f"{section}.{field}", info.description or "")
                owners.setdefault(f"{section}.{field}", []).append(name)
        flags[f"{section}.name"] = f"{KINDS[kind].singular}, by name: {', '.join(registry.names(kind))}"
        owners.pop(f"{section}.name", None)
    return {
        dotted: f"{text} [{', '.join(owners[dotted])}]" if dotted in owners else text for dotted, text in flags.items()
    }


# ---- from flat options to sections


def expand(config: dict[str, Any]) -> dict[str, Any]:
    """`config`, all sources merged, with the flat gradient options moved to where they belong.

    Raises:
        ConfigError: `grad` has neither one value nor one a state.
    """
    config = dict(config)
    flat: dict[str, Any] = config.pop(LEGACY, {})
    no_stat = config.pop("no_stat", None)
    if no_stat is not None:
        config["keep_trace"] = not no_stat
    config = _norm(config)
    implicit = bool(flat.get("ift") or flat.get("hook_ift"))
    gradient = dict(config.get("gradient", {}))
    gradient.setdefault("name", "implicit" if implicit else "phantom")
    core = dict(config.get("core", {}))
    phantom = {key: flat[old] for old, key in _PHANTOM.items() if flat.get(old) is not None}
    steps = _steps(flat.get("grad"), core)
    before = [{"name": "phantom", **phantom, "steps": k} for k in (steps or [1])]
    if gradient["name"] == "phantom":
        own = {**phantom, "steps": steps[-1]} if steps else phantom
        gradient = {**own, **gradient}
        before = before[:-1]
    elif not (phantom or steps):
        before = []
    elif len(before) > 1:
        before = before[:-1]
    if before and "intermediate" not in core:
        core["intermediate"] = before
    _backward(gradient, flat.get("b", {}))
    config["gradient"] = gradient
    if core:
        config["core"] = core
    return config


_PHANTOM = {"tau": "damping", "sup_gap": "sup_gap", "sup_loc": "sup_loc"}


def _steps(grad: Any, core: Mapping[str, Any]) -> list[int] | None:
    if grad is None:
        return None
    steps: list[int] = [grad] if isinstance(grad, int) else list(grad) if isinstance(grad, Sequence) else []
    if not steps or isinstance(grad, str) or not all(isinstance(k, int) and not isinstance(k, bool) for k in steps):
        raise ConfigTypeError(f"grad: an int, or a list with one int a state, got {grad!r} ({type(grad).__name__}).")
    if min(steps) < 1:
        raise ConfigError(f"grad: at least one step each, got {grad!r}. Use ift=True for the exact gradient.")
    states = max(int(core.get("n_states", 1)), len(core.get("indexing", ())) + 1)
    if len(steps) not in (1, states):
        raise ConfigError(
            f"grad: {len(steps)} values for {states} state(s): give one, or one a state (n_states or indexing say how many)."
        )
    return steps


def _backward(gradient: dict[str, Any], flat: dict[str, Any]) -> None:
    """Hand b_solver and the like to a backend that has a solver; another one, as in TorchDEQ, has no use for them."""
    from .registry import registry

    if not flat:
        return
    if "name" in flat:
        registry.find("solvers", flat["name"])
    if "solver" in registry.get("gradients", gradient["name"]).settings_type.model_fields:
        nested = gradient.get("solver", {})
        gradient["solver"] = {**flat, **({"name": nested} if isinstance(nested, str) else nested)}


def _norm(config: dict[str, Any]) -> dict[str, Any]:
    """Flat norm options as settings of the norm named; options that only another norm has don't bother this one."""
    from .registry import registry

    norm = config.get("norm")
    if not isinstance(norm, Mapping):
        return config
    norm = dict(norm)
    if norm.get("name") == "none":
        return {**config, "norm": None}
    if "no_scale" in norm:
        norm["learn_scale"] = not norm.pop("no_scale")
    name = norm.setdefault("name", "weight_norm")
    if "n_power_iterations" in norm and "n_power_iterations" not in registry.get("norms", name).settings_type.model_fields:
        del norm["n_power_iterations"]
    return {**config, "norm": norm}
