"""Writing files so that a failure loses nothing, and TOML text, which Python reads but doesn't write."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import ConfigError

__all__ = ["to_toml", "write_atomic", "write_text"]


def write_atomic(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it: readers see the old file or the new one.

    Raises:
        OSError: the directory does not exist, is full, or can't be written to.
    """
    path = Path(os.path.realpath(path))  # of a link, the file that it names is replaced
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path`, whole or not at all."""
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def to_toml(values: Mapping[str, Any]) -> str:
    """Nested mappings of str, bool, int, float and lists as TOML.

    Raises:
        ConfigError: a value is None, which TOML can't say.
    """
    lines: list[str] = []
    _table(values, "", lines)
    return "\n".join(lines).strip() + "\n"


def _table(values: Mapping[str, Any], path: str, lines: list[str]) -> None:
    tables: dict[str, Mapping[str, Any]] = {key: value for key, value in values.items() if isinstance(value, Mapping)}
    for key, value in values.items():
        if key not in tables:
            lines.append(f"{_key(key)} = {_value(value, _join(path, key))}")
    for key, table in tables.items():
        inner = _join(path, key)
        lines.extend(("", f"[{inner}]"))
        _table(table, inner, lines)


def _join(path: str, key: str) -> str:
    return f"{path}.{_key(key)}" if path else _key(key)


def _key(key: str) -> str:
    bare = key.replace("_", "").replace("-", "")
    return key if bare.isascii() and bare.isalnum() else _text(key)


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _value(value: Any, path: str) -> str:
    if value is None:
        raise ConfigError(f"{path} is None where that is not the default, which TOML can't say; write JSON instead.")
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, Mapping):
        table: Mapping[str, Any] = value
        return "{ " + ", ".join(f"{_key(key)} = {_value(item, _join(path, key))}" for key, item in table.items()) + " }"
    if isinstance(value, list | tuple):
        items: Sequence[Any] = value
        return "[" + ", ".join(_value(item, f"{path}.{k}") for k, item in enumerate(items)) + "]"
    return _text(str(value))
