"""Choice: the mark of a settings field whose value is an implementation of some kind, with its settings."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, GetCoreSchemaHandler
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, core_schema

__all__ = ["Choice", "choice_of", "default_of", "union_members"]

#: Settings that exclude each other: a tolerance of one sort replaces one of the other.
TOLERANCES = (frozenset(("tol", "stop_mode")), frozenset(("rtol", "atol")))


class Choice:
    """Makes a field take a name, a dict with a name and settings, or settings already made.

    Args:
        kind: plural kind, as in the registry.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(self._choose, handler(source))

    def _choose(self, value: Any) -> Any:
        from .registry import registry  # the registry needs the settings classes, and these this module

        return registry.settings(self.kind, value)


def union_members(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of a union; of anything else, itself."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def choice_of(field: FieldInfo | None) -> str | None:
    """The kind that `field` holds one implementation of, or None for other fields (a list of them included)."""
    if field is None:
        return None
    marks = list(field.metadata)
    for member in union_members(field.annotation):
        marks += getattr(member, "__metadata__", ())
    return next((mark.kind for mark in marks if isinstance(mark, Choice)), None)


def default_of(field: FieldInfo) -> dict[str, Any]:
    """The default of a choice field as a dict with a name; empty where it is None."""
    if field.default_factory_takes_validated_data:
        return {}
    default: Any = field.get_default(call_default_factory=True)
    if isinstance(default, str):
        return {"name": default}
    if isinstance(default, BaseModel):
        return {key: getattr(default, key) for key in default.model_fields_set} | {"name": getattr(default, "name", "")}
    return dict(default) if isinstance(default, Mapping) else {}  # pyright: ignore[reportUnknownArgumentType]


def overlay(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`below` with everything `above` gives; a tolerance in `above` takes the place of one of the other sort."""
    kept = dict(below)
    for mine, other in (TOLERANCES, TOLERANCES[::-1]):
        if above.keys() & mine:
            for key in other - above.keys():
                kept.pop(key, None)
    return {**kept, **above}
