"""TorchDEQ's flat names: what each means here, and the command-line flags that carry them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any, NamedTuple

from .choice import choice_of
from .errors import ConfigError
from .validation import shown

__all__ = [
    "CALL_ONLY",
    "FLAT",
    "GIVEN",
    "IGNORED",
    "LEGACY",
    "NEGATED",
    "add_deq_args",
    "flag_default",
    "torchdeq_order",
]

#: Path of options that mean nothing until all sources are known; see deqcore.merge.
LEGACY = "legacy"
#: Attribute of a Namespace that lists the flags its user wrote; what isn't listed is a default, not a choice.
GIVEN = "deq_given"


class Flat(NamedTuple):
    """A flat name: the path it means, its type, and TorchDEQ's default and a help text where there is a flag for it."""

    path: tuple[str, ...]
    type: Any = None
    default: Any = None
    help: str = ""


FLAT: dict[str, Flat] = {
    "f_solver": Flat(("solver", "name"), str, "fixed_point_iter", "forward solver, by name"),
    "b_solver": Flat(
        ("gradient", "solver", "name"), str, "fixed_point_iter", "solver of the backward, by name; ours if not given"
    ),
    "f_max_iter": Flat(("solver", "max_iter"), int, 40, "largest number of forward steps"),
    "b_max_iter": Flat(("gradient", "solver", "max_iter"), int, 40, "largest number of backward steps"),
    "f_tol": Flat(("solver", "tol"), float, 1e-3, "tolerance of the forward solve"),
    "b_tol": Flat(
        ("gradient", "solver", "tol"), float, 1e-6, "tolerance of the backward solve, relative to the cotangent"
    ),
    "f_stop_mode": Flat(("solver", "stop_mode"), str, "abs", "forward residual: abs or rel"),
    "b_stop_mode": Flat(("gradient", "solver", "stop_mode"), str, "abs", "backward residual: abs or rel"),
    "eval_factor": Flat(("eval_factor",), float, 1.0, "factor on f_max_iter in eval mode"),
    "eval_f_max_iter": Flat(("eval_max_iter",), int, 0, "f_max_iter in eval mode; 0 leaves it to eval_factor"),
    "no_stat": Flat(("no_stat",), bool, None),
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
#: Flat names that say the opposite of a setting, with the path of that one.
NEGATED = {"no_stat": ("keep_trace",), "norm_no_scale": ("norm", "learn_scale")}


def flag_default(name: str) -> Any:
    """Default of the flag `name` (with deqcore's dotted flags: None)."""
    return FLAT[name].default if name in FLAT else None


class _Store(argparse.Action):
    """Stores the value, and notes in the Namespace that its user wrote this flag."""

    def __init__(self, *args: Any, constant: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.constant = constant

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
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
        if flat.default is None:
            continue
        if flat.type is bool:
            parser.add_argument(f"--{name}", action=_Store, nargs=0, default=flat.default, help=flat.help)
        elif isinstance(flat.type, list):
            parser.add_argument(
                f"--{name}", action=_Store, nargs="+", type=int, default=[*flat.default], help=flat.help
            )
        else:
            parser.add_argument(f"--{name}", action=_Store, type=flat.type, default=flat.default, help=flat.help)
    for dotted, description in _installed_flags().items():
        parser.add_argument(f"--{dotted}", dest=dotted, default=argparse.SUPPRESS, help=description.replace("%", "%%"))
    return parser


def _installed_flags() -> dict[str, str]:
    """``solver.memory`` -> help, for every setting of every installed implementation that can be loaded."""
    flags: dict[str, str] = {}
    for section, kind in (("solver", "solvers"), ("gradient", "gradients"), ("core", "cores"), ("norm", "norms")):
        _flags_of(section, kind, flags)
    return flags


def _flags_of(path: str, kind: str, flags: dict[str, str]) -> None:
    """Add the flags of one section, and of the sections inside (``gradient.solver.memory``)."""
    from .entries import CHOICES
    from .errors import PluginError
    from .registry import registry

    owners: dict[str, list[str]] = {}
    inner: dict[str, str] = {}
    for entry in registry.entries(kind):
        try:
            fields = {} if registry.disabled(entry) else registry.load(entry).settings_type.model_fields
        except PluginError:
            continue  # an error when somebody picks it
        for field, info in fields.items():
            nested = choice_of(info)
            if nested is not None:
                inner[field] = nested
            elif field != "name":
                flags.setdefault(f"{path}.{field}", info.description or "")
                owners.setdefault(f"{path}.{field}", []).append(entry.name)
    for flag, names in owners.items():
        flags[flag] += f" [{', '.join(names)}]"
    flags[f"{path}.name"] = f"{CHOICES[kind].singular}, by name: {', '.join(registry.names(kind))}"
    for field, nested in inner.items():
        if path.count(".") == 0:  # a solver may have a solver of its own: stop somewhere
            _flags_of(f"{path}.{field}", nested, flags)


def torchdeq_order(
    options: Mapping[str, Any] | None, second: Any, third: Any, writer: Any
) -> tuple[Mapping[str, Any] | None, bool, Any]:
    """What TorchDEQ's order of arguments means: solver_kwargs, sradius_mode, backward_writer after (fn, z0)."""
    if isinstance(second, Mapping):
        if options is not None:
            raise ConfigError(f"solver_kwargs is given twice: {shown(options)} and {shown(second)}. Give one.")
        return second, third, writer  # pyright: ignore[reportUnknownVariableType]
    sradius_mode = third if second is None and not callable(third) else bool(second)
    return options, sradius_mode, third if callable(third) else writer
