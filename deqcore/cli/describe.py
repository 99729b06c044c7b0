"""What can be said about a plugin: where it is from, whether it works, what it does and what can be set."""

from __future__ import annotations

import inspect
import math
import types
import typing
from typing import Any, Literal

from pydantic.fields import FieldInfo

from ..registry import KINDS, Entry, registry
from ..settings import Settings

__all__ = ["details", "settings_of", "summary", "text_of", "type_text"]

BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<", "min_length": "length >=", "max_length": "length <="}


def summary(entry: Entry) -> dict[str, str]:
    """One row of the list: kind, name, origin, version, module, status, cause of a bad status, one-line meaning."""
    status, cause = registry.state_of(entry)
    loaded = registry.load(entry) if status not in ("broken", "disabled") else None
    return {
        "kind": entry.kind,
        "name": entry.name,
        "origin": entry.origin,
        "version": entry.version,
        "module": entry.value,
        "status": status,
        "cause": cause,
        "meaning": _first_paragraph(docstring(loaded)),
    }


def details(entry: Entry) -> dict[str, Any]:
    """Everything about one plugin, its settings included; imports it.

    Raises:
        BrokenPluginError: it can't be imported.
    """
    loaded = registry.load(entry)
    return {
        "kind": entry.kind,
        "name": entry.name,
        "origin": entry.origin,
        "version": entry.version,
        "module": entry.value,
        "docstring": docstring(loaded),
        "settings": settings_of(getattr(loaded, "settings_type", None)),
    }


def docstring(loaded: Any) -> str:
    """The docstring of what a plugin provides: a class, a function, or a Typer app with its own help."""
    if loaded is None:
        return ""
    text = getattr(getattr(loaded, "info", None), "help", None)
    if not isinstance(text, str):
        text = loaded.__doc__ if isinstance(loaded, type) or inspect.isroutine(loaded) else None
    return inspect.cleandoc(text or "")


def _first_paragraph(text: str) -> str:
    return " ".join(text.split("\n\n")[0].split())


def settings_of(settings: type[Settings] | None) -> list[dict[str, Any]]:
    """The fields of a settings class, its own before those that all of its kind have; no `name`."""
    if settings is None:
        return []
    own = set(settings.own_fields())
    names = [name for name in settings.model_fields if name != "name"]
    return [
        {
            "name": name,
            "type": type_text(field),
            "required": field.is_required(),
            "default": None if field.is_required() else _plain(field.get_default(call_default_factory=True)),  # pyright: ignore
            "aliases": [alias for alias, meant in settings.aliases.items() if meant == name],
            "meaning": field.description or "",
            "own": name in own,
        }
        for name in sorted(names, key=lambda name: name not in own)
        for field in [settings.model_fields[name]]
    ]


def _plain(value: Any) -> Any:
    """`value` in JSON's types."""
    if isinstance(value, Settings):
        return {"name": value.name, **value.model_dump(mode="json", exclude_unset=True)}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}  # pyright: ignore
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def text_of(value: Any) -> str:
    """A default as a user would write it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict) and "name" in value:
        return str(value["name"])  # pyright: ignore[reportUnknownArgumentType]
    if isinstance(value, float):
        return f"{value:g}"
    return str(value) if value != "" else '""'


def type_text(field: FieldInfo) -> str:
    """A field's type and bounds as a reader would say them: ``int >= 1``, ``abs | rel``, ``list of int``."""
    text = _type(field.annotation)
    bounds = [
        f"{sign} {bound:g}" if isinstance(bound, float) else f"{sign} {bound}"
        for item in field.metadata
        for attribute, sign in BOUNDS.items()
        if (bound := getattr(item, attribute, None)) is not None
    ]
    if not bounds:
        return text
    value, none, _ = text.partition(" | none")
    return f"{value} {', '.join(bounds)}{none}"


def _type(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is None or annotation is types.NoneType:
        return "none"
    if origin is typing.Annotated:
        return _type(arguments[0])
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin in (typing.Union, types.UnionType):
        return " | ".join(map(_type, arguments))
    if origin in (list, tuple, set, frozenset) and arguments:
        return f"list of {_type(arguments[0])}"
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return _choice(annotation)
    return str(getattr(annotation, "__name__", annotation))


def _choice(settings: type[Settings]) -> str:
    """Settings inside settings: an implementation of some kind, by its name or as a table with a name."""
    for kind in KINDS.values():
        if kind.interface is not None and getattr(kind.interface, "settings_type", None) is settings:
            return f"{kind.singular} (a name, or a table with one)"
    return settings.__name__
