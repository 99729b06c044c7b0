"""Where settings come from: keywords, dicts, Namespaces, files and the environment, each read into a layer."""

from __future__ import annotations

import json
import os
import tomllib
import types
import warnings
from argparse import Namespace
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import TypeAdapter, ValidationError

from .errors import ConfigError, ConfigTypeError, DEQWarning, MissingExtraError, suggest
from .frames import caller
from .legacy import CALL_ONLY, FLAT, GIVEN, LEGACY, NEGATED, flag_default
from .settings import BaseSettings
from .validation import same, shown

__all__ = ["SUFFIXES", "Given", "Layer", "from_environment", "from_file", "from_mapping", "from_object"]

SUFFIXES = (".toml", ".json", ".yaml", ".yml")
PREFIX = "DEQCORE_"


class Given(NamedTuple):
    """A value and where it was given.

    Attributes:
        origin: for error texts: ``keyword f_max_iter``.
        flat: given by a flat name that means nothing to implementations without such a setting (``b_tol``).
        soft: a flag at its default in a whole program's Namespace; another name for the same thing wins.
    """

    value: Any
    origin: str
    flat: bool = False
    soft: bool = False


Entry = tuple[tuple[str, ...], Given]


class Layer:
    """What one source says.

    Attributes:
        entries: path and value, in the order given; a value may still be a dict, a name or settings.
        flags: flat gradient options (``ift``, ``grad``, ``tau``, ...), which mean nothing by themselves.
        unknown: keys that mean nothing, with their origins.
        fields: names of the settings at the top.
        sections: those of them that hold an implementation, with its kind.
        whole: whether weaker layers are replaced altogether.
    """

    def __init__(self, fields: Collection[str], sections: Mapping[str, str]) -> None:
        self.fields = fields
        self.sections = sections
        self.entries: list[Entry] = []
        self.flags: dict[str, Given] = {}
        self.unknown: list[tuple[str, str]] = []
        self.whole = False

    def ours(self, key: str) -> bool:
        """Whether `key` is a name of a setting, nested, dotted or flat."""
        return key in self.fields or key in FLAT or (key.partition(".")[0] in self.sections and "." in key)

    def put(self, key: str, value: Any, origin: str, soft: bool = False) -> None:
        """Take in `value`, which the source gave under `key`."""
        if key in self.fields:
            if value is not None or key not in self.sections or key == "norm":
                self.entries.append(((key,), Given(value, origin, soft=soft)))
        elif key in FLAT:
            if value is not None:  # TorchDEQ's default for what was not given
                self._put_flat(key, Given(value, origin, True, soft))
        elif self.ours(key):
            self.entries.append((tuple(key.split(".")), Given(value, origin)))
        else:
            self.unknown.append((key, origin))

    def _put_flat(self, key: str, given: Given) -> None:
        path = FLAT[key].path
        if not path:
            return  # the program's own affair
        if FLAT[key].type is bool:
            value = as_bool(key, given)
            given = given._replace(value=not value if key in NEGATED else value)
            path = NEGATED.get(key, path)
        if path[0] == LEGACY:
            self.flags[key] = given
        else:
            self.entries.append((path, given._replace(flat=path[0] in ("gradient", "norm"))))


def as_bool(key: str, given: Given) -> bool:
    """A flat flag's value as a bool: True, false, 0, "yes".

    Raises:
        ConfigTypeError: it is none of these.
    """
    try:
        return TypeAdapter(bool).validate_python(given.value)
    except ValidationError:
        text = f"{key} ({given.origin}) must be true or false, got {shown(given.value)}"
        raise ConfigTypeError(text) from None


def from_mapping(layer: Layer, given: Mapping[Any, Any], origin: Callable[[str], str]) -> Layer:
    """Read keywords, a dict or a file's table: every key must be ours."""
    for key, value in given.items():
        layer.put(str(key), value, origin(str(key)))
    return layer


# ---- a whole program's settings


def from_object(layer: Layer, args: Any) -> Layer:
    """Read what of a Namespace, or any object with attributes, is meant for us; the rest is the program's own."""
    if isinstance(args, int | float | list | tuple | set | bytes | types.FunctionType | types.BuiltinFunctionType):
        raise ConfigTypeError(
            f"a configuration is a file's path, a solver's name, a dict, a Namespace or an object with attributes; got "
            f"{shown(args)}."
        )
    kind = type(args).__name__
    values: dict[str, Any] | None = dict(vars(args)) if isinstance(args, Namespace | types.SimpleNamespace) else None
    names: Iterable[str] = values if values is not None else [name for name in dir(args) if not name.startswith("_")]
    written: Collection[str] | None = getattr(args, GIVEN, None)
    for name in names:
        if name in CALL_ONLY or name == GIVEN:
            continue
        if not layer.ours(name):
            _warn_of_near_miss(layer, name, kind)
            continue
        value = values[name] if values is not None else getattr(args, name)
        if isinstance(value, Namespace | types.SimpleNamespace) and name in layer.sections:
            value = vars(value)
        default = name in FLAT and same(value, flag_default(name))
        if value is None or (default and written is not None and name not in written):
            continue
        if "." in name:
            layer.put(name, literal(value) if isinstance(value, str) else value, f"flag --{name}")
        elif name in FLAT or _fits(layer, name, value, kind):
            layer.put(name, value, f"{kind} attribute {name}", soft=default)
    return layer


def _fits(layer: Layer, name: str, value: Any, kind: str) -> bool:
    """Whether a value under a name that is ours, but not TorchDEQ's, is meant for us: programs have norms, too."""
    from .registry import registry

    if name not in layer.sections and name != "regularizers":
        return True
    known = registry.names(layer.sections.get(name, name))
    items: list[Any] = list(value) if name == "regularizers" and isinstance(value, list | tuple) else [value]  # pyright: ignore
    named = [item.rpartition("/")[2] for item in items if isinstance(item, str)]
    if all(isinstance(item, str | Mapping | BaseSettings) for item in items) and all(
        item in known or (name == "norm" and item == "none") for item in named
    ):
        return True
    close = "".join(suggest(item, known, cutoff=0.7) for item in named)  # a program may have a solver="adam"
    if close:
        warnings.warn(
            f"the {kind}'s {name}={value!r} names nothing installed and was taken for the program's own.{close}",
            DEQWarning,
            stacklevel=caller(),
        )
    return False


def _warn_of_near_miss(layer: Layer, name: str, kind: str) -> None:
    ours = [key for key in (*FLAT, *layer.fields) if key not in CALL_ONLY and _slip(name, key)]
    if ours:
        warnings.warn(
            f"the {kind}'s {name!r} is not a setting of deqcore and was left alone. Did you mean {ours[0]!r}?",
            DEQWarning,
            stacklevel=caller(),
        )


def _slip(a: str, b: str) -> bool:
    """Whether `a` is `b` but for one missing, added, wrong or swapped character, or for its underscores."""
    if len(a) < 6:  # short names are a slip away from everything
        return False
    if a.replace("_", "").lower() == b.replace("_", "").lower():
        return True
    while a and b and a[0] == b[0]:
        a, b = a[1:], b[1:]
    while a and b and a[-1] == b[-1]:
        a, b = a[:-1], b[:-1]
    return max(len(a), len(b)) <= 1 or (len(a) == len(b) == 2 and a == b[::-1])


# ---- the environment


def from_environment(layer: Layer) -> Layer:
    """Read ``DEQCORE_SOLVER__MEMORY=8`` as ("solver.memory", 8); an empty variable is none.

    Variables that begin alike and resemble no setting are left alone.
    """
    known = {key.lower(): key for key in (*FLAT, *layer.fields)}
    for variable, text in os.environ.items():
        if not variable.startswith(PREFIX) or not text:
            continue
        head, *rest = variable.removeprefix(PREFIX).lower().split("__")
        key = ".".join([known.get(head, head), *rest])
        origin = f"environment variable {variable}"
        if layer.ours(key):
            layer.put(key, literal(text), origin)
        elif rest or suggest(head, known, cutoff=0.8):
            layer.unknown.append((key, origin))
    return layer


def literal(text: str) -> Any:
    """`text` as TOML reads it (8, 1e-4, true, [1, 2]), or as it stands."""
    if "\n" in text:
        return text
    try:
        value = tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        return text
    return value if isinstance(value, int | float | str | list | dict) else text  # a date is a name of some sort


# ---- files


def from_file(layer: Layer, path: Path) -> Layer:
    """Read a TOML, JSON or YAML file."""
    return from_mapping(layer, _read(path), lambda key: f"file {path}")


def _read(path: Path) -> dict[Any, Any]:
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"{path}: a configuration file ends in {', '.join(SUFFIXES)}.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"can't read the configuration file {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"can't read the configuration file {path}: it is not UTF-8 text ({error}).") from error
    try:
        if path.suffix == ".toml":
            found: Any = tomllib.loads(text)
        elif path.suffix == ".json":
            found = json.loads(text, object_pairs_hook=_once)
        else:
            found = _yaml(text)
    except (ValueError, TypeError) as error:  # a YAML key may be a list
        raise ConfigError(f"{path} is not a valid {path.suffix[1:].upper()} file: {error}.") from error
    if found is None:  # an empty YAML file
        return {}
    if not isinstance(found, dict):
        raise ConfigTypeError(f"{path} must hold a table of settings, it holds {shown(found)}.")
    return found  # pyright: ignore[reportUnknownVariableType]


def _once(pairs: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
    """A dict of `pairs`, none of whose keys may come twice with two values."""
    found: dict[Any, Any] = {}
    for key, value in pairs:
        if key in found and found[key] != value:
            raise ValueError(f"{key!r} is given twice, as {shown(found[key])} and as {shown(value)}")
        found[key] = value
    return found


def _yaml(text: str) -> Any:
    try:
        import yaml
    except ImportError as error:
        raise MissingExtraError("reading a YAML configuration", "pyyaml", "yaml") from error

    class Loader(yaml.SafeLoader):
        pass

    def table(loader: Any, node: Any) -> dict[Any, Any]:
        loader.flatten_mapping(node)
        return _once(
            (loader.construct_object(k, deep=True), loader.construct_object(v, deep=True)) for k, v in node.value
        )

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, table)
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(str(error).replace("\n", " ")) from error
