"""DEQConfig: the typed configuration of a DEQ, every way into it, and back out to TOML or JSON."""

from __future__ import annotations

import json
import os
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, Field, field_validator
from pydantic_core import PydanticSerializationError

from .choice import choice_of, default_of
from .errors import ConfigError, ConfigTypeError, PluginError
from .files import to_toml, write_text
from .flat import finish, spell_out
from .legacy import FLAT, GIVEN
from .merge import Notes, merge
from .registry import registry
from .settings import (
    BaseSettings,
    CoreChoice,
    GradientChoice,
    NormChoice,
    RegularizerChoice,
    RegularizerSettings,
    SolverChoice,
    SolverSettings,
)
from .solution import OnFailure
from .sources import SUFFIXES, Given, Layer, from_environment, from_file, from_mapping, from_object
from .validation import Finding, failure, unknown_key, validate

__all__ = ["SECTIONS", "Arguments", "DEQConfig"]

#: TorchDEQ's name for no norm; text has no None.
NO_NORM = "none"


class DEQConfig(BaseSettings):
    """Everything :func:`deqcore.get_deq` can be told.

    Build it with :meth:`load` from anything, or directly: ``DEQConfig(solver={"name": "anderson", "memory": 8})``.
    """

    aliases: ClassVar[dict[str, str]] = {"eval_f_max_iter": "eval_max_iter"}

    solver: SolverChoice = Field(default="fixed_point_iter", validate_default=True, description="forward solver")  # type: ignore[assignment]
    gradient: GradientChoice = Field(default="phantom", validate_default=True, description="gradient of the last state")  # type: ignore[assignment]
    core: CoreChoice = Field(default="sliced", validate_default=True, description="which states are returned")  # type: ignore[assignment]
    norm: NormChoice | None = Field(
        None, description="weight normalisation that deq.apply_norm(module) puts on; weight_norm if not given"
    )
    regularizers: tuple[RegularizerChoice, ...] = Field((), description="penalties for info['regularization']")
    on_failure: OnFailure = Field("warn", description="what a solve that misses its tolerance does")
    batch_dims: int = Field(1, ge=0, description="leading dimensions that count equilibria; 0: the whole state is one")
    compact: bool = Field(
        False, description="finished samples leave the batch: rows are independent, and args has f's batched tensors"
    )
    check_every: int = Field(1, ge=1, description="judge every k-th step; no device sync between")
    keep_trace: bool = Field(True, description="keep the residuals of all steps in info")
    keep_state: bool = Field(False, description="keep the solver's state in info, for warm starts")
    eval_factor: float = Field(1.0, ge=0, allow_inf_nan=False, description="factor on max_iter in eval mode")
    eval_max_iter: int = Field(0, ge=0, description="max_iter in eval mode; 0 leaves it to eval_factor")

    @field_validator("norm", mode="before")
    @classmethod
    def _none_is_a_name(cls, value: Any) -> Any:
        return None if value == NO_NORM or value == {"name": NO_NORM} else value

    @field_validator("regularizers", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str | Mapping | BaseSettings) else value

    @field_validator("regularizers")
    @classmethod
    def _each_once(cls, value: tuple[RegularizerSettings, ...]) -> tuple[RegularizerSettings, ...]:
        names = [choice.name for choice in value]
        if len(set(names)) < len(names):
            raise ValueError(f"each regularizer at most once (info['regularizers'] is by name), got {', '.join(names)}")
        return value

    @classmethod
    def load(cls, args: Any = None, **keywords: Any) -> DEQConfig:
        """The configuration that `args` and `keywords` mean.

        Later sources win: default < file < environment (``DEQCORE_SOLVER__MEMORY=8``) < `args` < `keywords`. Where a
        later source names another implementation, of the earlier ones' settings those are kept that all of its kind
        have (``max_iter``, not ``memory``).

        Args:
            args: a path to a TOML, JSON or YAML file, a solver's name, a dict, an argparse.Namespace, a DEQConfig, or
                any object with attributes; not changed. A Namespace or object may be a whole program's: names that are
                not ours are left alone. A DEQConfig is complete, and the environment doesn't change it.
            keywords: nested (``solver={"name": "anderson"}``), TorchDEQ's flat names (``f_solver="anderson"``), or
                dotted ones (``**{"solver.memory": 8}``). None means not given; norm=None means no norm.

        Raises:
            UnknownKeyError: a key in a file, a dict, a keyword or the environment that means nothing.
            ConfigError, ConfigTypeError: a wrong value, or one source that gives a thing twice with two values; the
                text has its path, where it was given, and what is allowed.
            UnknownPluginError: a name that nothing installed has.
        """
        if isinstance(args, DEQConfig) and not keywords:  # frozen, so that it can be handed on
            return args
        return cls._combine(_layers(args, keywords))

    @classmethod
    def _combine(cls, layers: Sequence[Layer]) -> DEQConfig:
        first = max((rank for rank, layer in enumerate(layers) if layer.whole), default=0)
        layers = layers[first:]
        spell_out(layers)
        notes = Notes()
        merged = merge(cls, [layer.entries for layer in layers], notes)
        _refuse_unknown(layers, notes)
        finish(merged, layers, notes)
        return validate(cls, merged, "", notes.origin)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DEQConfig:
        """The configuration with these nested values, defaults elsewhere; the inverse of :meth:`to_dict`."""
        return validate(cls, values)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> DEQConfig:
        """The configuration in a TOML, JSON or YAML file; the environment is not consulted."""
        return cls._combine([from_file(_layer(), Path(path))])

    @classmethod
    def known_keys(cls) -> list[str]:
        """Every key that :meth:`load` takes, flat names included."""
        return sorted({*super().known_keys(), *FLAT})

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as plain values: what is unpickled depends on the names in it, not on where their classes live."""
        return DEQConfig.from_dict, (self._plain(self.model_dump()),)

    def _plain(self, dumped: dict[str, Any]) -> dict[str, Any]:
        plain = _plain(self, dumped)
        if self.norm is None and "norm" in self.model_fields_set:  # no norm was asked for, which is not the default
            plain["norm"] = NO_NORM
        return plain

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values that JSON has, too; ``DEQConfig.from_dict`` makes an equal configuration of them.

        Raises:
            ConfigTypeError: a third-party setting holds what can't be written as text.
        """
        try:
            return self._plain(self.model_dump(mode="json"))
        except PydanticSerializationError as error:
            raise ConfigTypeError(f"this configuration can't be written as plain values: {error}.") from error

    def to_json(self) -> str:
        """As :meth:`to_dict`, as JSON text; infinity is written as Infinity, which Python's reader understands."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"

    def to_toml(self) -> str:
        """As :meth:`to_dict`, as TOML text.

        Raises:
            ConfigError: a value is None where that is not the default, which TOML can't say.
        """
        return to_toml(self.to_dict())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a .toml or .json file, whole or not at all."""
        target = Path(path)
        if target.suffix not in (".toml", ".json"):
            raise ConfigError(
                f"can't write a configuration to {target.name!r}: give a name that ends in .toml or .json."
            )
        write_text(target, self.to_json() if target.suffix == ".json" else self.to_toml())


def _plain(settings: BaseModel, dumped: dict[str, Any]) -> dict[str, Any]:
    """`dumped` without what reading it back supplies or stumbles over: a None by default, the tolerance not in use."""
    kept = dict(dumped)
    if isinstance(settings, SolverSettings) and (settings.rtol is not None or settings.atol is not None):
        del kept["tol"], kept["stop_mode"]
    for field, info in type(settings).model_fields.items():
        value = getattr(settings, field)
        if isinstance(value, BaseModel):
            kept[field] = _plain(value, kept[field])
        elif isinstance(value, list | tuple):
            pairs: Any = zip(value, kept[field], strict=True)  # pyright: ignore[reportUnknownArgumentType]
            kept[field] = [_plain(v, d) if isinstance(v, BaseModel) else d for v, d in pairs]
        elif value is None and info.default is None:
            kept.pop(field, None)
    return kept


class Arguments(Namespace):
    """What a factory given to :func:`deqcore.register_deq` is called with.

    Everything the program gave, its own options included, by the name it gave it, as attributes and by :meth:`get`;
    for names it did not give, those of the configuration.

    Attributes:
        config: the same, checked, as a :class:`DEQConfig`.
    """

    config: DEQConfig

    def __init__(self, config: DEQConfig, args: Any, keywords: Mapping[str, Any]) -> None:
        if isinstance(args, Mapping):
            given: dict[str, Any] = {str(key): value for key, value in args.items()}  # pyright: ignore
        else:
            given = dict(vars(args)) if hasattr(args, "__dict__") and not isinstance(args, DEQConfig) else {}
        super().__init__(**{**given, **keywords, "config": config})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "config":
            raise AttributeError(name)
        return getattr(self.config, name)

    def get(self, key: str, default: Any = None) -> Any:
        """The value given for `key`, a flat name also where a file or another name gave it; otherwise `default`."""
        if key in vars(self):
            return vars(self)[key]
        found: Any = self.config
        for part in FLAT[key].path if key in FLAT else (key,):
            if part not in getattr(found, "model_fields_set", ()):
                return default
            found = getattr(found, part)
        return default if key in FLAT and found == FLAT[key].default else found


# ---- sources


#: Settings that hold an implementation, with its kind.
SECTIONS = {name: kind for name, info in DEQConfig.model_fields.items() if (kind := choice_of(info)) is not None}


def _layer() -> Layer:
    return Layer(DEQConfig.model_fields, SECTIONS)


def _layers(args: Any, keywords: Mapping[str, Any]) -> list[Layer]:
    """Each source, weakest first."""
    layers: list[Layer] = []
    program: Layer | None = None
    if isinstance(args, str | os.PathLike):
        path = Path(args)  # pyright: ignore[reportUnknownArgumentType]
        if isinstance(args, str) and not _names_file(path, args):
            program = _layer()
            program.put("solver", args, "the first argument")
        else:
            layers.append(from_file(_layer(), path))
    elif isinstance(args, DEQConfig):
        program = _layer()
        program.whole = True
        program.entries = [((key,), Given(getattr(args, key), "DEQConfig")) for key in sorted(args.model_fields_set)]
    elif isinstance(args, Mapping) and GIVEN not in args:
        program = from_mapping(_layer(), args, "dict key {}".format)  # pyright: ignore[reportUnknownArgumentType]
    elif args is not None:
        given = (
            Namespace(**args) if isinstance(args, Mapping) else args
        )  # vars() of what our own flags were parsed into
        program = from_object(_layer(), given)
    layers.append(from_environment(_layer()))
    if program is not None:
        layers.append(program)
    return [*layers, from_mapping(_layer(), keywords, "keyword {}".format)]


def _names_file(path: Path, text: str) -> bool:
    """Whether `text` is a file's name rather than a solver's, which may have a dot and a slash in it."""
    return path.suffix in SUFFIXES or (bool(path.suffix) and text.rpartition("/")[2] not in registry.names("solvers"))


def _refuse_unknown(layers: Sequence[Layer], notes: Notes) -> None:
    """Raise the error for keys that mean nothing, with the nearest right one."""
    found: list[Finding] = []
    for layer in layers:
        for key, origin in layer.unknown:
            finding = unknown_key((), key, DEQConfig.known_keys(), "get_deq()", _section_with(key, notes))
            found.append(finding._replace(source=origin.removesuffix(f" {key}")))
    found += notes.unknown
    if found:
        raise failure(found, "", notes.origin)


def _section_with(key: str, notes: Notes) -> str:
    """A hint where the implementation chosen for some section has the setting that was given at the top."""
    for section, kind in SECTIONS.items():
        default = default_of(DEQConfig.model_fields[section])
        try:
            model = notes.models.get((section,)) or registry.get(kind, default["name"]).settings_type
        except (PluginError, KeyError):
            continue
        if key in model.known_keys():
            return f" Did you mean {section}={{'{key}': ...}}?"
    return ""
