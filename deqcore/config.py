"""DEQConfig: the typed configuration of a DEQ, every way into it, and back out to TOML or JSON."""

from __future__ import annotations

import json
import os
import tomllib
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from .errors import ConfigError, ConfigTypeError, DEQWarning, MissingExtraError, UnknownKeyError, suggest
from .files import to_toml, write_text
from .legacy import CALL_ONLY, FLAT, GIVEN, LEGACY, expand, flag_default
from .settings import (
    CoreChoice,
    GradientChoice,
    NormChoice,
    RegularizerChoice,
    Settings,
    SolverChoice,
    SolverSettings,
)
from .solution import OnFailure
from .validation import validate

__all__ = ["DEQConfig"]

SUFFIXES = (".toml", ".json", ".yaml", ".yml")
PREFIX = "DEQCORE_"
#: Sections that name an implementation, with its kind.
SECTIONS = {"solver": "solvers", "gradient": "gradients", "core": "cores", "norm": "norms"}


class DEQConfig(Settings):
    """Everything :func:`deqcore.get_deq` can be told.

    Build it with :meth:`load` from anything, or directly: ``DEQConfig(solver={"name": "anderson", "memory": 8})``.
    """

    aliases: ClassVar[dict[str, str]] = {"eval_f_max_iter": "eval_max_iter"}

    name: Literal[""] = Field("", exclude=True, description="unused")
    solver: SolverChoice = Field(default="fixed_point_iter", validate_default=True, description="forward solver")  # type: ignore[assignment]
    gradient: GradientChoice = Field(default="phantom", validate_default=True, description="gradient of the last state")  # type: ignore[assignment]
    core: CoreChoice = Field(default="sliced", validate_default=True, description="which states are returned")  # type: ignore[assignment]
    norm: NormChoice | None = Field(None, description="weight normalisation that deq.apply_norm(module) puts on")
    regularizers: tuple[RegularizerChoice, ...] = Field((), description="penalties for info['regularization']")
    on_failure: OnFailure = Field("warn", description="what a solve that misses its tolerance does")
    batch_dims: int = Field(1, ge=0, description="leading dimensions that count equilibria; 0: the whole state is one")
    check_every: int = Field(1, ge=1, description="judge every k-th step; no device sync between")
    keep_trace: bool = Field(True, description="keep the residuals of all steps in info")
    keep_state: bool = Field(False, description="keep the solver's state in info, for warm starts")
    eval_factor: float = Field(1.0, ge=0, description="factor on max_iter in eval mode")
    eval_max_iter: int = Field(0, ge=0, description="max_iter in eval mode; 0 leaves it to eval_factor")

    @classmethod
    def load(cls, args: Any = None, **keywords: Any) -> DEQConfig:
        """The configuration that `args` and `keywords` mean.

        Later sources win: default < file < environment (``DEQCORE_SOLVER__MEMORY=8``) < `args` < `keywords`.

        Args:
            args: a path to a TOML, JSON or YAML file, a solver's name, a dict, an argparse.Namespace, a DEQConfig, or any
                object with attributes; not changed.
            keywords: nested (``solver={"name": "anderson"}``) or TorchDEQ's flat names (``f_solver="anderson"``).

        Raises:
            UnknownKeyError: a key in a file, a dict or a keyword that means nothing.
            ConfigError, ConfigTypeError: a wrong value; the text has its path and what is allowed.
            UnknownPluginError: a name that nothing installed has.
        """
        if isinstance(args, DEQConfig) and not keywords and not any(_environment()):
            return args
        merged: dict[str, Any] = {}
        for layer in _layers(args, keywords):
            merged = _merge(merged, layer)
        return cls.from_dict(expand(merged))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DEQConfig:
        """The configuration with these nested values, defaults elsewhere; the inverse of :meth:`to_dict`."""
        return validate(cls, values, "configuration")

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> DEQConfig:
        """The configuration in a TOML, JSON or YAML file; the environment is not consulted."""
        return cls.from_dict(expand(_normalize(_read(Path(path)), f"file {path}")))

    @classmethod
    def known_keys(cls) -> list[str]:
        return [key for key in [*cls.model_fields, *FLAT] if key != "name"]

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values; ``DEQConfig.from_dict`` makes an equal configuration of them."""
        return self.model_dump(mode="json", exclude_none=True)

    def to_json(self) -> str:
        """As :meth:`to_dict`, as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    def to_toml(self) -> str:
        """As :meth:`to_dict`, as TOML text."""
        return to_toml(self.to_dict())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a .toml or .json file, whole or not at all."""
        target = Path(path)
        if target.suffix not in (".toml", ".json"):
            raise ConfigError(f"can't write a configuration to {target.name!r}: give a name that ends in .toml or .json.")
        write_text(target, self.to_json() if target.suffix == ".json" else self.to_toml())


# ---- sources


def _layers(args: Any, keywords: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Each source as nested values, weakest first."""
    source: dict[str, Any] | None = None
    if isinstance(args, str | os.PathLike):
        path = Path(args)
        if path.suffix in SUFFIXES or not isinstance(args, str):
            yield _normalize(_read(path), f"file {path}")
        else:
            source = {"solver": {"name": args}}
    elif isinstance(args, DEQConfig):
        source = args.to_dict()
    elif isinstance(args, Mapping):
        source = _normalize(args, "dict")
    elif args is not None:
        source = _from_object(args)
    yield _normalize(dict(_environment()), "environment")
    if source is not None:
        yield source
    yield _normalize(keywords, "keywords")


def _normalize(given: Mapping[Any, Any], where: str) -> dict[str, Any]:
    """One source as nested values, flat and dotted names moved to their places.

    Raises:
        UnknownKeyError: a key that means nothing.
        ConfigError: one thing given twice with two values.
    """
    nested: dict[str, Any] = {}
    for key, value in given.items():
        path = _path(str(key), where)
        if path is None or (value is None and len(path) > 1):
            continue
        if path[0] in SECTIONS and len(path) == 1 and isinstance(value, str):
            path, value = (path[0], "name"), value
        _put(nested, path, value, f"{where}: {key}")
    flat = nested.get(LEGACY, {})
    asked = nested.get("gradient", {})
    implied = "implicit" if flat.get("ift") or flat.get("hook_ift") else None
    if isinstance(asked, Mapping) and implied and asked.get("name", implied) != implied:
        raise ConfigError(f"{where}: ift=True and gradient={asked['name']!r} contradict each other; give one.")
    return nested


def _path(key: str, where: str) -> tuple[str, ...] | None:
    """Where `key` belongs; None for names that are the program's own affair."""
    if key in FLAT:
        return FLAT[key].path or None
    if key in DEQConfig.model_fields and key != "name":
        return (key,)
    head, *rest = key.split(".")
    if rest and head in SECTIONS:
        return (head, *rest)
    known = DEQConfig.known_keys()
    raise UnknownKeyError(f"{where}: unknown key {key!r}.{suggest(key, known)} Allowed: {', '.join(sorted(known))}.")


def _put(nested: dict[str, Any], path: tuple[str, ...], value: Any, where: str) -> None:
    if isinstance(value, Settings):
        value = value.model_dump(mode="json", exclude_unset=True) | {"name": value.name}
    if isinstance(value, Mapping) and path[0] in SECTIONS:
        for key, item in value.items():
            _put(nested, (*path, *str(key).split(".")), item, f"{where}.{key}")
        nested.setdefault(path[0], {})
        return
    *parents, leaf = path
    for parent in parents:
        inner = nested.setdefault(parent, {})
        if not isinstance(inner, dict):
            inner = nested[parent] = {"name": inner}
        nested = inner
    if leaf in nested and nested[leaf] != value:
        if isinstance(nested[leaf], dict) and isinstance(value, str):  # gradient.solver: a section already begun
            nested, leaf = nested[leaf], "name"
        if leaf in nested and nested[leaf] != value:
            raise ConfigError(f"{where} is {value!r}, but the same source also says {nested[leaf]!r} for it; give one.")
    nested[leaf] = value


def _environment() -> Iterator[tuple[str, Any]]:
    """``DEQCORE_SOLVER__MEMORY=8`` as ("solver.memory", 8), for variables that begin like a key."""
    for variable, text in os.environ.items():
        if not variable.startswith(PREFIX):
            continue
        head, *rest = variable.removeprefix(PREFIX).lower().split("__")
        if head in SECTIONS or head in DEQConfig.model_fields or head in FLAT:
            yield ".".join([head, *rest]), _literal(text)


def _literal(text: str) -> Any:
    """`text` as TOML reads it (8, 1e-4, true, [1, 2]), or as it stands."""
    try:
        return tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        return text


def _read(path: Path) -> dict[str, Any]:
    """The mapping in a configuration file."""
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"{path}: a configuration file ends in {', '.join(SUFFIXES)}.")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"can't read the configuration file {path}: {error.strerror}.") from error
    try:
        if path.suffix == ".toml":
            found: Any = tomllib.loads(text)
        elif path.suffix == ".json":
            found = json.loads(text)
        else:
            found = _yaml(text)
    except ValueError as error:
        raise ConfigError(f"{path} is not valid {path.suffix[1:].upper()}: {error}.") from error
    if not isinstance(found, dict):
        raise ConfigTypeError(f"{path} must hold a table of settings, it holds {type(found).__name__}.")
    return found  # pyright: ignore[reportUnknownVariableType]


def _yaml(text: str) -> Any:
    try:
        import yaml
    except ImportError as error:
        raise MissingExtraError("reading a YAML configuration", "pyyaml", "yaml") from error
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error).replace("\n", " ")) from error


def _from_object(args: Any) -> dict[str, Any]:
    """What of a Namespace, or any object with attributes, is meant for us; the rest is the program's own."""
    if isinstance(args, int | float | list | tuple | set | bytes):
        raise ConfigTypeError(
            f"a configuration is a file's path, a solver's name, a dict, a Namespace or an object with attributes; got "
            f"{args!r} ({type(args).__name__})."
        )
    names = [name for name in dir(args) if not name.startswith("_")]
    given: set[str] | None = set(getattr(args, GIVEN)) if hasattr(args, GIVEN) else None
    picked: dict[str, Any] = {}
    for name in names:
        value = getattr(args, name)
        if name == GIVEN or callable(value) or name in CALL_ONLY or name in ("name", "aliases"):
            continue
        ours = name in FLAT or name in DEQConfig.model_fields or ("." in name and name.split(".")[0] in SECTIONS)
        if not ours:
            _warn_of_near_miss(name)
        elif _is_choice(name, value, given):
            picked[name] = _literal(value) if "." in name and isinstance(value, str) else value
    return _normalize(picked, type(args).__name__)


def _is_choice(name: str, value: Any, given: set[str] | None) -> bool:
    """Whether a Namespace's entry was chosen, rather than left at its flag's default or meant for somebody else."""
    from .registry import registry

    if name in ("ift", "hook_ift") and not value:
        return False
    if name in FLAT and given is not None and name not in given and value == flag_default(name):
        return False
    if name in SECTIONS and name not in FLAT and isinstance(value, str) and value not in registry.names(SECTIONS[name]):
        warnings.warn(
            f"the Namespace's {name}={value!r} names nothing installed and was taken for the program's own."
            f"{suggest(value, registry.names(SECTIONS[name]))}",
            DEQWarning,
            stacklevel=6,
        )
        return False
    return True


def _warn_of_near_miss(name: str) -> None:
    close = suggest(name, FLAT, cutoff=0.85)
    if close:
        warnings.warn(f"the Namespace's {name!r} is not a setting of deqcore.{close}", DEQWarning, stacklevel=6)


# ---- merging


def _merge(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """`lower` with everything that `upper` gives. A section that names another implementation keeps from the lower one
    only what all of its kind have."""
    merged = dict(lower)
    if "name" in _mapping(upper.get("gradient")):
        merged[LEGACY] = {k: v for k, v in _mapping(merged.get(LEGACY)).items() if k not in ("ift", "hook_ift")}
    elif {"ift", "hook_ift"} & _mapping(upper.get(LEGACY)).keys():
        merged.pop("gradient", None)
        merged[LEGACY] = {k: v for k, v in _mapping(merged.get(LEGACY)).items() if k not in ("ift", "hook_ift")}
    for key, value in upper.items():
        below = merged.get(key)
        merged[key] = _merge_section(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged


def _merge_section(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    kept = dict(below)
    if "name" in above and above["name"] != below.get("name", above["name"]):
        kept = {key: value for key, value in below.items() if key in SolverSettings.model_fields}
    if above.keys() & {"rtol", "atol"}:
        kept.pop("tol", None)
        kept.pop("stop_mode", None)
    elif "tol" in above:
        kept.pop("rtol", None)
        kept.pop("atol", None)
    for key, value in above.items():
        inner = kept.get(key)
        kept[key] = _merge_section(inner, value) if isinstance(inner, Mapping) and isinstance(value, Mapping) else value
    return kept


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


