"""pydantic's findings as deqcore's errors: the path, the value given, what is allowed, the nearest right key."""

from __future__ import annotations

import reprlib
import types
import typing
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

import annotated_types
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from .choice import Choice, choice_of, default_of, overlay, union_members
from .errors import ConfigError, ConfigTypeError, DEQError, UnknownKeyError, suggest

if TYPE_CHECKING:
    from .settings import BaseSettings

__all__ = [
    "Finding",
    "allowed",
    "failure",
    "prepare",
    "rename",
    "same",
    "shown",
    "translated",
    "unknown_key",
    "validate",
]

S = TypeVar("S", bound="BaseSettings")
Path = tuple[str | int, ...]
#: Where the value at a path was given, as text; empty where nobody knows.
Origin = Callable[[Path], str]

NAMES: dict[Any, str] = {int: "an int", float: "a number", str: "a str", bool: "true or false", types.NoneType: "None"}
BOUNDS = (
    (annotated_types.Gt, "gt", "greater than"),
    (annotated_types.Ge, "ge", "at least"),
    (annotated_types.Lt, "lt", "less than"),
    (annotated_types.Le, "le", "at most"),
)


_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80
_short.maxlist = _short.maxtuple = _short.maxdict = 12


class Finding(NamedTuple):
    """One thing wrong: where, what (the sentence after the path), its error, and where it was given if known."""

    path: Path
    text: str
    error: type[ConfigError] = ConfigError
    source: str = ""


def failure(findings: Iterable[Finding], where: str = "", origin: Origin | None = None) -> ConfigError:
    """The typed error for `findings`; its text has each with its path and where it was given."""
    found = list(findings)
    kinds = {finding.error for finding in found}
    lines: list[str] = []
    for path, text, _, source in found:
        source = source or (origin(path) if origin is not None else "")
        spot = ".".join(map(str, path))
        spot = f"{spot} ({source})" if spot and source else spot or source
        lines.append(f"{spot}{text}" if spot else text.removeprefix(": "))
    error = (kinds.pop() if len(kinds) == 1 else ConfigError)((f"{where}: " if where else "") + "; ".join(lines))
    error.__dict__["findings"] = found
    return error


def shown(value: Any) -> str:
    """`value` and its type, shortened, for an error text."""
    return f"{_short.repr(value)} ({type(value).__name__})"


def same(a: Any, b: Any) -> bool:
    """Whether two values say the same, a list and a tuple of the same items included."""
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))  # pyright: ignore[reportUnknownArgumentType]
    try:
        return a is b or bool(a == b)
    except Exception:  # an array's comparison is no yes or no
        return False


def unknown_key(path: Path, key: str, known: Iterable[str], owner: str, hint: str = "") -> Finding:
    """The finding for a key that `owner`, at `path`, doesn't have."""
    names = sorted(set(known))
    if key in names:
        hint = " DEQConfig.load() and get_deq() take that name."
    text = f": unknown key {key!r}.{hint or suggest(key, names)} {owner} takes: {', '.join(names)}"
    return Finding(path, text, UnknownKeyError)


# ---- before pydantic looks


def prepare(model: type[BaseSettings], given: Mapping[Any, Any]) -> dict[str, Any]:
    """`given` under the fields' own names, choices without a name completed by the field's default.

    Raises:
        ConfigError: a field is given by two of its names with different values.
        ConfigTypeError: a bool where a number is wanted; Python, and so pydantic, would take True for 1.
    """
    values = rename(model, given)
    wrong: list[Finding] = []
    for key, value in values.items():
        field = model.model_fields.get(key)
        if field is None:
            continue
        if isinstance(value, Mapping) and "name" not in value and choice_of(field):
            values[key] = overlay(default_of(field), value)  # pyright: ignore[reportUnknownArgumentType]
        elif _bool_misplaced(field.annotation, value):
            wrong.append(
                Finding((key,), f" must be {allowed(field) or 'a number'}, got {shown(value)}", ConfigTypeError)
            )
    if wrong:
        raise failure(wrong)
    return values


def rename(model: type[BaseSettings], given: Mapping[Any, Any], where: str = "") -> dict[str, Any]:
    """`given`, of which error texts say that it is `where`, under the fields' own names.

    Raises:
        ConfigError: a field is given by two of its names with different values.
    """
    renamed: dict[str, Any] = {}
    source: dict[str, str] = {}
    for key, value in given.items():
        key = str(key)
        field = model.aliases.get(key, key)
        if field in renamed and not same(renamed[field], value):
            text = f" is given twice: {source[field]}={shown(renamed[field])} and {key}={shown(value)}. Give one."
            raise failure([Finding((field,), text)], where)
        renamed[field], source[field] = value, key
    return renamed


def _bool_misplaced(annotation: Any, value: Any) -> bool:
    """Whether `value` is, or holds, a bool that pydantic would turn into a number."""
    members = [_bare(member) for member in union_members(_bare(annotation))]
    if type(value).__name__ in ("bool", "bool_"):  # numpy's too
        return any(member in (int, float) for member in members) and not any(map(_takes_bool, members))
    if isinstance(value, list | tuple):
        inner = [
            args[0]
            for member in members
            if typing.get_origin(member) in (list, tuple) and (args := typing.get_args(member))
        ]
        return bool(inner) and all(any(_bool_misplaced(kind, item) for item in value) for kind in inner)  # pyright: ignore
    return False


def _takes_bool(annotation: Any) -> bool:
    if typing.get_origin(annotation) is Literal:
        return any(isinstance(option, bool) for option in typing.get_args(annotation))
    return annotation not in (int, float, str, types.NoneType)


def _bare(annotation: Any) -> Any:
    return annotation.__origin__ if hasattr(annotation, "__metadata__") else annotation


# ---- what is allowed, in words


def allowed(field: FieldInfo) -> str:
    """What a field takes: ``an int, at least 1``; empty where its type says nothing."""
    return _describe(field.annotation, field.metadata)


def _describe(annotation: Any, marks: Iterable[Any] = ()) -> str:
    marks = [*marks, *getattr(annotation, "__metadata__", ())]
    annotation = _bare(annotation)
    for mark in marks:
        if isinstance(mark, Choice):
            singular = mark.kind.removesuffix("s").replace("_", " ")
            article = "" if singular.startswith("any") else "a "
            text = f"{article}{singular}: its name, or a dict with a 'name' and settings"
            return text + (", or None" if types.NoneType in union_members(annotation) else "")
    members = union_members(annotation)
    if len(members) > 1:
        parts = [_describe(member, marks if member is not types.NoneType else ()) for member in members]
        return ", or ".join(parts) if all(parts) else ""
    if typing.get_origin(annotation) is Literal:
        options = [repr(option) for option in typing.get_args(annotation)]
        return " or ".join(([", ".join(options[:-1])] if options[1:] else []) + options[-1:])
    if typing.get_origin(annotation) in (tuple, list):
        inner = _describe(typing.get_args(annotation)[0]) if typing.get_args(annotation) else ""
        return f"a list, each {inner}" if inner else "a list"
    if annotation not in NAMES:
        return ""
    finite = any(getattr(mark, "allow_inf_nan", None) is False for mark in marks)
    bounds = [
        f"{word} {getattr(mark, key):g}" for mark in marks for kind, key, word in BOUNDS if isinstance(mark, kind)
    ]
    return ", ".join([f"a finite {NAMES[annotation][2:]}" if finite else NAMES[annotation], *bounds])


# ---- after it has looked


def validate(
    model: type[S], given: Mapping[str, Any], where: str = "", origin: Origin | None = None, owner: str = ""
) -> S:
    """`model` made from `given`.

    Args:
        model: a settings class.
        given: values by field name or alias.
        where: what the values are of, for error texts (``solver 'anderson'``).
        origin: tells where the value at a path was given.
        owner: what has the settings, if not `where`.

    Raises:
        UnknownKeyError: a key that the model doesn't have.
        ConfigTypeError: a value of the wrong type.
        ConfigError: a value out of range, or values that contradict each other.
    """
    with translated(model, where, origin, owner):
        return model.model_validate(given)


@contextmanager
def translated(
    model: type[BaseSettings], where: str = "", origin: Origin | None = None, owner: str = ""
) -> Generator[None]:
    """Raises the typed error for what pydantic finds inside."""
    try:
        yield
    except ValidationError as error:
        raise _translate(error, model, where, origin, owner or where or model.__name__) from None


def _translate(
    error: ValidationError, model: type[BaseSettings], where: str, origin: Origin | None, owner: str
) -> DEQError:
    findings: list[Finding] = []
    for item in error.errors(include_url=False):
        path: Path = tuple(part for part in item["loc"] if not str(part).startswith("function-"))
        inner = item.get("ctx", {}).get("error")
        if isinstance(inner, DEQError):
            noted = inner.__dict__.get("findings") or [Finding((), f": {inner}", _kind(inner))]
            noted = [finding._replace(path=(*path, *finding.path)) for finding in noted]
            if not isinstance(inner, ConfigError):  # a plugin's trouble keeps its type
                inner.args = (str(failure(noted, where, origin)),)
                inner.__dict__["findings"] = noted
                return inner
            findings += noted
        elif item["type"] == "extra_forbidden":
            findings.append(unknown_key(path[:-1], str(path[-1]), model.known_keys(), owner))
        else:
            findings.append(_finding(item, path, model))
    return failure(findings, where, origin)


def _kind(error: DEQError) -> type[ConfigError]:
    return type(error) if isinstance(error, ConfigError) else ConfigError


def _finding(item: Mapping[str, Any], path: Path, model: type[BaseSettings]) -> Finding:
    """A pydantic error as a sentence of ours: what the field takes, if its type says so, and what it got."""
    if item["type"] == "missing":
        field = model.model_fields.get(str(path[-1])) if path else None
        rule = allowed(field) if field is not None else ""
        return Finding(path, " is required" + (f": {rule}" if rule else ""))
    message = str(item["msg"]).removeprefix("Value error, ")
    if item["type"] == "value_error" or not path:
        return Finding(path, f": {message}" + (f", got {shown(item['input'])}" if path else ""))
    field = model.model_fields.get(str(path[0]))
    rule = allowed(field) if field is not None and len(path) == 1 else ""
    text = f" must be {rule}" if rule else f": {message[:1].lower()}{message[1:]}"
    wrong_type = str(item["type"]).endswith(("_type", "_parsing", "_from_float"))
    return Finding(path, f"{text}, got {shown(item['input'])}", ConfigTypeError if wrong_type else ConfigError)
