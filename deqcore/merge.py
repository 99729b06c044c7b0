"""Layers of settings into one table: the stronger source wins, aliases and sections inside sections included."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .choice import choice_of, default_of, overlay
from .errors import DEQError
from .settings import BaseSettings, Settings
from .sources import Entry, Given
from .validation import Finding, failure, same, shown, unknown_key

__all__ = ["Notes", "merge"]

Path = tuple[str | int, ...]


class Notes:
    """What is remembered of a merge, for error texts and for options that depend on its result.

    Attributes:
        given: path -> rank of the layer, and what it gave.
        models: path of a section -> settings class of what it holds.
        unknown: findings about keys that mean nothing.
    """

    def __init__(self) -> None:
        self.given: dict[Path, tuple[int, Given]] = {}
        self.models: dict[Path, type[BaseSettings]] = {}
        self.unknown: list[Finding] = []

    def origin(self, path: Path) -> str:
        """Where the value at `path`, or the section that it is in, was given."""
        for end in range(len(path), 0, -1):
            for spot in (path[:end], (*path[:end], "name")):
                if spot in self.given:
                    return self.given[spot][1].origin
        return ""

    def rank(self, path: Path) -> int:
        """Rank of the layer that gave the value at `path`; -1 for a default."""
        return self.given[path][0] if path in self.given else -1


class _Part(NamedTuple):
    """What one layer says about a section: values by key, or a value that is no table."""

    entries: list[Entry]
    fresh: bool = False
    value: Given | None = None


def merge(
    model: type[BaseSettings], layers: Sequence[Sequence[Entry]], notes: Notes, path: Path = (), owner: str = ""
) -> dict[str, Any]:
    """The table that `layers`, weakest first, make for `model`, still to be validated.

    Args:
        model: a settings class.
        layers: each a list of paths with the values given there.
        notes: takes note of where everything came from.
        path: where in the whole the table is.
        owner: what the table belongs to, for error texts (``solver 'anderson'``).

    Raises:
        ConfigError: one layer gives a thing twice with two values.
        UnknownPluginError and its kin: a section names what isn't there.
    """
    merged: dict[str, Any] = {}
    sections: dict[str, list[list[Entry]]] = {}
    for rank, layer in enumerate(layers):
        seen: dict[str, Given] = {}
        for (key, *rest), given in layer:
            field = _field(model, key, given)
            nested = choice_of(model.model_fields.get(field or ""))
            if field is None or (rest and not nested):
                if not given.flat:
                    found = unknown_key(path, ".".join([key, *rest]), model.known_keys(), owner)
                    notes.unknown.append(found._replace(source=given.origin))
            elif nested:
                sections.setdefault(field, [[] for _ in layers])[rank].append((tuple(rest), given))
            else:
                _take(seen, field, given, path)
        merged = overlay(merged, {field: given.value for field, given in seen.items()})
        notes.given.update({(*path, field): (rank, given) for field, given in seen.items()})
    for field, entries in sections.items():
        info = model.model_fields[field]
        merged[field] = _section(str(choice_of(info)), default_of(info), entries, notes, (*path, field))
    return merged


def _field(model: type[BaseSettings], key: str, given: Given) -> str | None:
    """The field that `key` means, or None where it means nothing."""
    if key in model.model_fields or key in model.aliases:
        return model.aliases.get(key, key)
    if given.origin.startswith("environment"):  # variables have no case
        return next((model.aliases.get(known, known) for known in model.known_keys() if known.lower() == key), None)
    return key if model.model_config.get("extra") == "allow" else None


def _take(seen: dict[str, Given], field: str, given: Given, path: Path) -> None:
    before = seen.get(field)
    if before is not None and not same(before.value, given.value):
        if given.soft:
            return
        if not before.soft:
            text = (
                f" is given twice: as {shown(before.value)} by {before.origin}, and as {shown(given.value)} by "
                f"{given.origin}. Give one."
            )
            raise failure([Finding((*path, field), text)])
    seen[field] = given


# ---- sections


def _section(kind: str, default: dict[str, Any], layers: Sequence[list[Entry]], notes: Notes, path: Path) -> Any:
    """The value of a field that holds an implementation of `kind`.

    Where a stronger layer names another implementation, only what all of the kind have is kept of the weaker ones, and
    flat options.
    """
    from .entries import CHOICES
    from .registry import registry

    base: Any = CHOICES[kind].interface
    parts = [_open(entries, path, base.settings_type) for entries in layers]
    name: Given | None = None
    oldest = full = 0  # layers from `oldest` on count for what is common, from `full` on altogether
    for rank, part in enumerate(parts):
        if part.fresh or part.value is not None:
            oldest = full = rank
            name = None
        asked = _name_in(part, path)
        if asked is not None:
            before = default.get("name") if name is None else name.value
            full = full if asked.value == before else rank
            name = asked
    said = [rank for rank, part in enumerate(parts) if part.entries or part.value is not None]
    last = parts[said[-1]]
    if last.value is not None:
        notes.given[path] = said[-1], last.value
        return last.value.value
    effective: Any = name.value if name is not None else default.get("name") or CHOICES[kind].default
    if kind == "norms" and effective == "none":
        notes.given[path] = said[-1], name or last.entries[0][1]
        return None
    try:
        model: type[Settings] = registry.get(kind, effective).settings_type
    except DEQError as error:
        spot = ".".join(map(str, path)) + (f" ({name.origin})" if name is not None else "")
        error.args = (f"{spot}: {error}",)
        raise
    notes.models[path] = model
    common = base.settings_type.model_fields.keys() - {"name"}
    kept = [
        []
        if rank < oldest
        else [e for e in part.entries if rank >= full or e[0][0] in common or (e[1].flat and e[0][0] != "name")]
        for rank, part in enumerate(parts)
    ]
    return merge(model, kept, notes, path, f"{CHOICES[kind].singular} {effective!r}")


def _open(entries: list[Entry], path: Path, base: type[Settings]) -> _Part:
    """A layer's entries for a section with names, dicts and settings opened into their parts."""
    opened: list[Entry] = []
    fresh = False
    value: Given | None = None
    for rest, given in entries:
        item = given.value
        if rest:
            opened.append((rest, given))
        elif isinstance(item, str):
            opened.append((("name",), given))
        elif isinstance(item, Mapping):
            table: Mapping[Any, Any] = item
            opened += [(tuple(str(key).split(".")), given._replace(value=inner)) for key, inner in table.items()]
        elif isinstance(item, base) and item.name:
            fresh = True
            keys = ["name", *sorted(item.model_fields_set - {"name"})]
            opened += [((key,), given._replace(value=getattr(item, key))) for key in keys]
        else:
            value = given
    if value is not None and opened:
        text = f" is given twice: as {shown(value.value)} by {value.origin}, and by {opened[0][1].origin}. Give one."
        raise failure([Finding(path, text)])
    return _Part(opened, fresh, value)


def _name_in(part: _Part, path: Path) -> Given | None:
    seen: dict[str, Given] = {}
    for key, given in part.entries:
        if key == ("name",):
            _take(seen, "name", given, path)
    return seen.get("name")
