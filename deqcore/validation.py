"""pydantic's findings as deqcore's errors: the path, the value given, what is allowed, the nearest right key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from .errors import ConfigError, ConfigTypeError, DEQError, UnknownKeyError, suggest
from .settings import Settings

__all__ = ["rename_aliases", "validate"]

S = TypeVar("S", bound=Settings)


def rename_aliases(model: type[Settings], given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`given` under the fields' own names.

    Raises:
        ConfigError: a field is given by two of its names with different values.
    """
    renamed: dict[str, Any] = {}
    source: dict[str, str] = {}
    for key, value in given.items():
        field = model.aliases.get(key, key)
        if field in renamed and renamed[field] != value:
            raise ConfigError(f"{where}: {source[field]}={renamed[field]!r} and {key}={value!r} mean the same; give one.")
        renamed[field], source[field] = value, key
    return renamed


def validate(model: type[S], given: Mapping[str, Any], where: str = "") -> S:
    """`model` made from `given`.

    Args:
        model: a settings class.
        given: values by field name or alias.
        where: what the values are of, for error texts (``solver 'anderson'``).

    Raises:
        UnknownKeyError: a key that the model doesn't have.
        ConfigTypeError: a value of the wrong type.
        ConfigError: a value out of range, or values that contradict each other.
    """
    values = rename_aliases(model, given, where)
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise translate(error, model, where) from None


def translate(error: ValidationError, model: type[Settings], where: str) -> DEQError:
    """The typed error for what pydantic found."""
    lines: list[str] = []
    found: set[type[ConfigError]] = set()
    for item in error.errors():
        inner = item.get("ctx", {}).get("error")
        path = ".".join(str(part) for part in item["loc"])
        spot = f"{where}: {path}" if where and path else where or path
        if isinstance(inner, DEQError):
            if not isinstance(inner, ConfigError) or len(error.errors()) == 1:
                inner.args = (f"{spot}: {inner}",) if spot else inner.args
                return inner
            lines.append(f"{spot}: {inner}")
        elif item["type"] == "extra_forbidden":
            found.add(UnknownKeyError)
            key = str(item["loc"][-1])
            known = model.known_keys()
            lines.append(f"{where}: unknown key {key!r}.{suggest(key, known)} Allowed: {', '.join(sorted(known))}")
        else:
            found.add(ConfigTypeError if item["type"].endswith(("_type", "_parsing", "_from_float")) else ConfigError)
            message = item["msg"].removeprefix("Value error, ")
            given = f", got {item['input']!r} ({type(item['input']).__name__})" if item["loc"] else ""
            lines.append(f"{spot}: {message[0].lower() + message[1:]}{given}")
    kind = found.pop() if len(found) == 1 else ConfigError
    return kind("; ".join(lines))
