"""What the registry lists: kinds, entries read from distributions' metadata, and the patterns that switch them off."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

from . import interfaces
from .errors import BrokenPluginError, ConfigError, ConfigTypeError, PluginWarning, UnknownPluginError, suggest

__all__ = [
    "ALLOW",
    "CHOICES",
    "DISABLE",
    "KINDS",
    "UNIONS",
    "Entry",
    "EntryPoint",
    "Kind",
    "canonical",
    "kind_of",
    "patterns",
    "read_points",
]

DISABLE = "DEQCORE_DISABLE_PLUGINS"
ALLOW = "DEQCORE_ALLOW_PLUGINS"
OWN_DISTRIBUTION = "deqcore"
THIRD_PARTY = "third-party"


class Kind(NamedTuple):
    """A kind of implementation: its plural name, entry-point group, hook, base class and default implementation."""

    name: str
    hook: str
    interface: type | None = None
    default: str | None = None

    @property
    def group(self) -> str:
        return f"deqcore.{self.name}"

    @property
    def singular(self) -> str:
        return self.name.removesuffix("s").replace("_", " ")


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("solvers", "deqcore_solver", interfaces.Solver, "fixed_point_iter"),
        Kind("linear_solvers", "deqcore_linear_solver", interfaces.LinearSolver),
        Kind("gradients", "deqcore_gradient", interfaces.GradientBackend, "phantom"),
        Kind("cores", "deqcore_core", interfaces.Core, "sliced"),
        Kind("norms", "deqcore_norm", interfaces.Norm, "weight_norm"),
        Kind("regularizers", "deqcore_regularizer", interfaces.Regularizer),
        Kind("models", "deqcore_model"),
        Kind("commands", "deqcore_command"),
    )
}

#: Settings that take an implementation of any of several kinds: these, in the order in which a name is looked up. What
#: this process registered comes first, then deqcore's own, then the others.
UNIONS: dict[str, tuple[str, ...]] = {"any_solvers": ("linear_solvers", "solvers")}

#: Everything that a setting can be a choice of. What the kinds of a union have in common is what Solver has.
CHOICES: dict[str, Kind] = {**KINDS, **{name: Kind("solvers", "", interfaces.Solver) for name in UNIONS}}


def kind_of(text: str) -> str:
    """The kind that `text` names, singular or plural, with dashes or underscores: ``linear-solver``.

    Raises:
        UnknownPluginError: there is no such kind.
        ConfigTypeError: `text` is not a str.
    """
    if not isinstance(text, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigTypeError(f"a kind of plugin is a str, got {text!r}; kinds: {', '.join(KINDS)}.")
    wanted = text.strip().lower().replace("-", "_").replace(" ", "_")
    for name in KINDS:
        if wanted in (name, name.removesuffix("s")):
            return name
    raise UnknownPluginError(f"{text!r} is no kind of plugin; kinds: {', '.join(KINDS)}.{suggest(wanted, KINDS)}")


def canonical(name: str) -> str:
    """A distribution's name as package indexes compare it: case, ``-``, ``_`` and ``.`` don't count."""
    return re.sub(r"[-_.]+", "-", name).lower()


class EntryPoint(Protocol):
    """The part of an importlib entry point that the index uses."""

    name: str
    value: str
    group: str

    @property
    def dist(self) -> Any: ...

    def load(self) -> Any: ...


@dataclass(eq=False)
class Entry:
    """One implementation in the index.

    Attributes:
        kind: plural kind.
        name: name it is picked by.
        value: the module that the entry point names; for a local one, module and class.
        point: its entry point; None for what this process registered.
        local: the class that this process registered.
        module: the module that registered it.
        found: what loading the entry point gave, once it was loaded; the registry's own.
    """

    kind: str
    name: str
    value: str
    point: EntryPoint | None = None
    local: type | None = None
    module: str = ""
    found: Any = field(default=None, repr=False)
    _identity: tuple[str, str] | None = field(default=None, repr=False)

    @property
    def identity(self) -> tuple[str, str]:
        """Name and version of the distribution that brings it; empty for local ones."""
        if self._identity is None:
            self._identity = _identify(self.point.dist if self.point is not None else None)
        return self._identity

    @property
    def dist(self) -> str:
        """Name of the distribution that brings it; empty for local ones."""
        return self.identity[0]

    @property
    def version(self) -> str:
        """Version of that distribution; empty for local ones."""
        return self.identity[1]

    @property
    def origin(self) -> str:
        """The distribution, or ``local:<module>`` for what this process registered."""
        return f"local:{self.module}" if self.point is None else self.dist

    @property
    def builtin(self) -> bool:
        """Whether it is deqcore's own."""
        return self.point is not None and canonical(self.dist) == OWN_DISTRIBUTION

    def broken(self, cause: str) -> BrokenPluginError:
        """The error that says why this entry can't be used, and how to be rid of it."""
        pattern = f"{self.dist}/{self.name}" if self.version else f"{self.kind}:{self.name}"
        return BrokenPluginError(
            f"{self} can't be used: {cause}. Repair or uninstall it, or switch it off with {DISABLE}={pattern}."
        )

    def __str__(self) -> str:
        where = f"entry point {self.value!r} of {' '.join(self.identity)}" if self.point is not None else self.origin
        return f"{KINDS[self.kind].singular} {self.name!r} ({where})"


def _identify(dist: Any) -> tuple[str, str]:
    if dist is None:
        return "", ""
    try:
        return str(dist.name), str(dist.version)
    except Exception:  # its METADATA is gone or unreadable; that must not keep the others from being listed
        return "unknown distribution", ""


# ---- the index


def read_points() -> list[EntryPoint]:
    """The entry points of everything installed, from metadata; imports none of it."""
    import importlib_metadata

    try:
        return list(importlib_metadata.entry_points())
    except Exception:  # one distribution's entry_points.txt can't be parsed: leave out that one
        return list(_read_carefully(importlib_metadata.distributions))


def _read_carefully(distributions: Callable[[], Iterable[Any]]) -> Iterator[EntryPoint]:
    seen: set[str] = set()
    for dist in distributions():
        name, _ = _identify(dist)
        if canonical(name) in seen:
            continue  # another copy of it comes earlier on sys.path
        seen.add(canonical(name))
        try:
            yield from dist.entry_points
        except Exception as error:
            warnings.warn(
                f"the entry points of {name} can't be read and were left out ({type(error).__name__}: {error}). "
                "Reinstall or uninstall it.",
                PluginWarning,
                stacklevel=2,
            )


# ---- patterns


class Pattern(NamedTuple):
    """One pattern of the disable and allow variables; each part may hold wildcards."""

    text: str
    kind: str = "*"
    dist: str = "*"
    name: str = "*"

    def matches(self, entry: Entry) -> bool:
        """Whether it means this entry."""
        if self.text == THIRD_PARTY:
            return entry.point is not None and not entry.builtin
        return (
            fnmatchcase(entry.kind, self.kind)
            and fnmatchcase(entry.name, self.name)
            and (self.dist == "*" or fnmatchcase(canonical(entry.origin), self.dist))
        )


def patterns(variable: str) -> tuple[Pattern, ...]:
    """The patterns in an environment variable: ``kind:name``, ``dist/name``, ``dist/*``, ``third-party``.

    Raises:
        ConfigError: one of them is none of these; ignored, it would leave on what it was to switch off.
    """
    return _parse(variable, os.environ.get(variable, ""))


@lru_cache(maxsize=32)
def _parse(variable: str, text: str) -> tuple[Pattern, ...]:
    return tuple(_pattern(variable, part.strip()) for part in text.split(",") if part.strip())


def _pattern(variable: str, text: str) -> Pattern:
    if text == THIRD_PARTY:
        return Pattern(text)
    dist, slash, bare = text.rpartition("/")
    if slash and dist and bare:
        return Pattern(text, dist=canonical(dist), name=bare)
    kind, colon, name = text.partition(":")
    if colon and kind and name and not slash:
        if "*" not in kind:
            try:
                return Pattern(text, kind=kind_of(kind), name=name)
            except UnknownPluginError as error:
                raise ConfigError(f"{variable} has {text!r}: {error}") from None
        if any(fnmatchcase(known, kind) for known in KINDS):
            return Pattern(text, kind=kind, name=name)
    raise ConfigError(
        f"{variable} has {text!r}, which means nothing: write kind:name (solvers:anderson), dist/name, dist/* or "
        f"{THIRD_PARTY}, separated by commas.{suggest(text, [THIRD_PARTY])}"
    )
