"""Names to implementations: an index read from entry points, one plugin loaded at a time, and what was registered here.

Reading the index imports nothing. Naming an implementation imports its module, registers it with pluggy, checks its
hooks and asks for its class. Built-ins come through the same index as everybody else's.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import pluggy

from . import hookspecs, interfaces
from .errors import (
    BrokenPluginError,
    ConfigError,
    ConfigTypeError,
    DEQError,
    PluginAPIError,
    PluginClashError,
    PluginDisabledError,
    PluginError,
    PluginWarning,
    UnknownPluginError,
    suggest,
)
from .hookspecs import API_VERSIONS
from .settings import Settings
from .validation import validate

__all__ = ["KINDS", "Entry", "Kind", "Registry", "kind_of", "registry"]

DISABLE = "DEQCORE_DISABLE_PLUGINS"
ALLOW = "DEQCORE_ALLOW_PLUGINS"
OWN_DISTRIBUTION = "deqcore"


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


def kind_of(text: str) -> str:
    """The kind that `text` names, singular or plural, with dashes or underscores: ``linear-solver``.

    Raises:
        UnknownPluginError: there is no such kind.
    """
    wanted = text.strip().lower().replace("-", "_").replace(" ", "_")
    for name in KINDS:
        if wanted in (name, name.removesuffix("s")):
            return name
    raise UnknownPluginError(f"{text!r} is no kind of plugin; kinds: {', '.join(KINDS)}.{suggest(wanted, KINDS)}")


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
        origin: distribution, or ``local:<module>`` for what this process registered.
        value: the module that the entry point names.
    """

    kind: str
    name: str
    value: str
    point: EntryPoint | None = None
    local: type | None = None
    module: str = ""
    _dist: str | None = field(default=None, repr=False)

    @property
    def dist(self) -> str:
        """Name of the distribution that brings it; empty for local ones."""
        if self._dist is None:
            dist = self.point.dist if self.point is not None else None
            self._dist = str(dist.name) if dist is not None else ""
        return self._dist

    @property
    def version(self) -> str:
        """Version of that distribution; empty for local ones."""
        return str(self.point.dist.version) if self.point is not None and self.point.dist is not None else ""

    @property
    def origin(self) -> str:
        return f"local:{self.module}" if self.point is None else self.dist

    @property
    def builtin(self) -> bool:
        return self.point is not None and self.dist == OWN_DISTRIBUTION

    def matches(self, pattern: str) -> bool:
        """Whether a pattern of the disable and allow variables means this entry."""
        if pattern == "third-party":
            return self.point is not None and not self.builtin
        if ":" in pattern:
            kind, _, name = pattern.partition(":")
            return fnmatchcase(self.kind, kind) and fnmatchcase(self.name, name)
        dist, _, name = pattern.partition("/")
        return fnmatchcase(self.origin, dist) and fnmatchcase(self.name, name or "*")

    def __str__(self) -> str:
        where = f"entry point {self.value!r} of {self.dist} {self.version}" if self.point is not None else self.origin
        return f"{KINDS[self.kind].singular} {self.name!r} ({where})"


def _patterns(variable: str) -> list[str]:
    """The patterns in an environment variable; kinds in `kind:name` may be singular."""
    found: list[str] = []
    for text in os.environ.get(variable, "").split(","):
        pattern = text.strip()
        if ":" in pattern:
            kind, _, name = pattern.partition(":")
            pattern = f"{kind if '*' in kind else kind_of(kind)}:{name}"
        if pattern:
            found.append(pattern)
    return found


class Registry:
    """The implementations of every kind. There is one, :data:`deqcore.registry`."""

    def __init__(self) -> None:
        self._points: Iterable[EntryPoint] | None = None
        self._index: dict[str, dict[str, list[Entry]]] | None = None
        self._local: dict[str, dict[str, Entry]] = {}
        self._loaded: dict[tuple[str, str, str], Any] = {}
        self._manager: pluggy.PluginManager | None = None

    # ---- the index

    @property
    def manager(self) -> pluggy.PluginManager:
        """The pluggy manager that loaded modules are registered with, as ``kind:name@dist``."""
        if self._manager is None:
            self._manager = pluggy.PluginManager("deqcore")
            self._manager.add_hookspecs(hookspecs)
        return self._manager

    def index(self, kind: str) -> dict[str, list[Entry]]:
        """Name -> entries, one list item a distribution, for one kind. Read once from metadata; imports nothing."""
        if self._index is None:
            points = self._points
            if points is None:
                import importlib_metadata

                points = importlib_metadata.entry_points()
            index: dict[str, dict[str, list[Entry]]] = {name: {} for name in KINDS}
            for point in points:
                if point.group.startswith("deqcore.") and (name := point.group.removeprefix("deqcore.")) in KINDS:
                    index[name].setdefault(point.name, []).append(Entry(name, point.name, point.value, point))
            self._index = index
        return self._index[kind]

    def names(self, kind: str) -> list[str]:
        """Every name of this kind, sorted; imports nothing."""
        return sorted({*self.index(kind), *self._local.get(kind, {})})

    def entries(self, kind: str | None = None) -> list[Entry]:
        """Every entry of one kind, or of all; imports nothing."""
        found: list[Entry] = []
        for name in [kind] if kind else KINDS:
            local = self._local.get(name, {})
            for key in self.names(name):
                found += [*self.index(name).get(key, []), *([local[key]] if key in local else [])]
        return found

    def disabled(self, entry: Entry) -> str:
        """Why `entry` is switched off, or an empty string. Looks at the environment each time."""
        for pattern in _patterns(DISABLE):
            if entry.matches(pattern):
                return f"{DISABLE} has {pattern!r}"
        allowed = _patterns(ALLOW)
        if allowed and entry.point is not None and not entry.builtin and not any(map(entry.matches, allowed)):
            return f"{ALLOW} does not have it"
        return ""

    def find(self, kind: str, name: str) -> Entry:
        """The one entry that `name` (``anderson``, or ``dist/anderson``) means.

        Raises:
            UnknownPluginError: nothing of this kind has that name.
            PluginClashError: two third-party distributions have it and `name` doesn't say which.
            PluginDisabledError: an environment variable switches it off.
        """
        if not isinstance(name, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigTypeError(f"a {KINDS[kind].singular} is picked by its name, a str; got {name!r}.")
        dist, _, bare = name.rpartition("/")
        if dist:
            found = [entry for entry in self.entries(kind) if entry.name == bare and entry.origin == dist]
        else:
            found = list(self.index(kind).get(name, []))
            if name in self._local.get(kind, {}):
                found = [self._local[kind][name]]
        if not found:
            raise self._unknown(kind, name)
        enabled = [entry for entry in found if not self.disabled(entry)]
        if not enabled:
            raise PluginDisabledError(
                f"{found[0]} is disabled: {self.disabled(found[0])}. Change that variable, or pick another name."
            )
        return enabled[0] if len(enabled) == 1 else self._settle(enabled)

    def _unknown(self, kind: str, name: str) -> UnknownPluginError:
        names = self.names(kind)
        elsewhere = [other.singular for key, other in KINDS.items() if key != kind and name in self.names(key)]
        hint = f" ({name!r} is a {elsewhere[0]}.)" if elsewhere else ""
        return UnknownPluginError(
            f"no {KINDS[kind].singular} named {name!r}.{suggest(name, names)}{hint} "
            f"Installed: {', '.join(names) or 'none'}. Install the distribution that brings it, or register it."
        )

    @staticmethod
    def _settle(entries: list[Entry]) -> Entry:
        """Two distributions, one name: a built-in keeps it, two third parties don't."""
        builtin = [entry for entry in entries if entry.builtin]
        others = [entry for entry in entries if not entry.builtin]
        spelled = ", ".join(f"{entry.dist}/{entry.name}" for entry in others)
        if builtin:
            warnings.warn(
                f"{builtin[0].name!r} means deqcore's own {KINDS[builtin[0].kind].singular}; {spelled} has that name too "
                "and was not imported. Write it in full to use it.",
                PluginWarning,
                stacklevel=4,
            )
            return builtin[0]
        raise PluginClashError(
            f"{KINDS[entries[0].kind].singular} {entries[0].name!r} is claimed by "
            f"{' and '.join(f'{entry.dist} {entry.version}' for entry in others)}. "
            f"Write one in full ({spelled}), uninstall one, or list one in {DISABLE}."
        )

    # ---- loading

    def get(self, kind: str, name: str) -> Any:
        """The class (for commands and models: the object) that `name` means; imports its module only.

        Raises:
            BrokenPluginError: it can't be imported, has no matching hook, or gives the wrong thing.
            PluginAPIError: it needs a plugin API version that this deqcore doesn't offer.
        """
        return self.load(self.find(kind, name))

    def load(self, entry: Entry) -> Any:
        """As :meth:`get`, for an entry of the index."""
        if entry.local is not None:
            return entry.local
        key = (entry.kind, entry.name, entry.dist)
        if key not in self._loaded:
            self._loaded[key] = self._ask(entry, self._import(entry))
        return self._loaded[key]

    def _import(self, entry: Entry) -> ModuleType:
        point = entry.point
        if point is None:
            raise PluginError(f"{entry} has no entry point")
        try:
            module = point.load()
        except DEQError:
            raise
        except Exception as error:
            raise self._broken(entry, f"importing it raised {type(error).__name__}: {error}") from error
        if not isinstance(module, ModuleType):
            raise self._broken(entry, f"its entry point must name a module, it names {type(module).__name__} {point.value!r}")
        return module

    def _ask(self, entry: Entry, module: ModuleType) -> Any:
        lowest, highest = API_VERSIONS
        version = getattr(module, "DEQCORE_API_VERSION", 1)
        if not isinstance(version, int) or not lowest <= version <= highest:
            raise PluginAPIError(
                f"{entry} asks for plugin API version {version!r}; this deqcore offers {lowest} to {highest}. "
                "Install a deqcore or a release of the plugin that fit each other."
            )
        kind = KINDS[entry.kind]
        hook = self._hook(entry, module)
        if hook is None:
            raise self._broken(entry, f"its module defines no hook {kind.hook}() marked with @hookimpl")
        try:
            answer = hook()
        except Exception as error:
            raise self._broken(entry, f"{kind.hook}() raised {type(error).__name__}: {error}") from error
        if kind.interface is not None and not (isinstance(answer, type) and issubclass(answer, kind.interface)):
            raise self._broken(entry, f"{kind.hook}() must return a subclass of {kind.interface.__name__}, got {answer!r}")
        return answer

    def _hook(self, entry: Entry, module: ModuleType) -> Any:
        """Register the module with pluggy, which checks its hooks, and find its own implementation of this kind's."""
        registered = f"{entry.kind}:{entry.name}@{entry.dist}"
        hook_name = KINDS[entry.kind].hook
        already = self.manager.get_name(module)
        try:
            if already is None:
                self.manager.register(module, registered)
            unknown = self._misspelt(module)
            if unknown:
                raise self._broken(
                    entry, f"it implements hooks that don't exist: {', '.join(unknown)}.{suggest(unknown[0], dir_hooks())}"
                )
        except pluggy.PluginValidationError as error:
            raise self._broken(entry, f"a hook of its does not fit: {error}") from error
        except BrokenPluginError:
            self.manager.unregister(module)
            raise
        for implementation in getattr(self.manager.hook, hook_name).get_hookimpls():
            if implementation.plugin is module:
                return implementation.function
        return None

    def _misspelt(self, module: ModuleType) -> list[str]:
        callers = self.manager.get_hookcallers(module) or []
        return sorted(
            caller.name
            for caller in callers
            if not caller.has_spec() and not any(impl.optionalhook for impl in caller.get_hookimpls() if impl.plugin is module)
        )

    @staticmethod
    def _broken(entry: Entry, cause: str) -> BrokenPluginError:
        return BrokenPluginError(
            f"{entry} can't be used: {cause}. Repair or uninstall it, or switch it off with "
            f"{DISABLE}={KINDS[entry.kind].name}:{entry.name}."
        )

    def state_of(self, entry: Entry) -> tuple[str, str]:
        """(``ok`` | ``broken`` | ``disabled`` | ``clash`` | ``shadowed``, cause). Imports the plugin, unless disabled."""
        cause = self.disabled(entry)
        if cause:
            return "disabled", cause
        rivals = [e for e in self.index(entry.kind).get(entry.name, []) if e is not entry and not self.disabled(e)]
        try:
            self.load(entry)
        except PluginError as error:
            return "broken", str(error)
        if entry.point is not None and any(rival.builtin for rival in rivals):
            return "shadowed", f"deqcore has that name too; write {entry.dist}/{entry.name}"
        if entry.point is not None and not entry.builtin and rivals:
            return "clash", f"{rivals[0].dist} has that name too; write {entry.dist}/{entry.name}"
        return "ok", ""

    # ---- making things

    def settings(self, kind: str, value: Any) -> Settings:
        """The settings that `value` means: a name, a mapping with a ``name``, or settings, which are returned as is."""
        info = KINDS[kind]
        base: Any = info.interface
        if isinstance(value, Settings):
            if not isinstance(value, base.settings_type):
                raise ConfigTypeError(f"{type(value).__name__} are not settings of a {info.singular}.")
            if not value.name:
                raise ConfigError(f"settings without a name don't say which {info.singular} is meant; set name=...")
            return value
        if isinstance(value, str):
            value = {"name": value}
        if not isinstance(value, Mapping):
            raise ConfigTypeError(
                f"a {info.singular} is given as a name or as a dict with a 'name' and settings; got {value!r} "
                f"({type(value).__name__})."
            )
        given: dict[str, Any] = {str(key): item for key, item in value.items()}  # pyright: ignore[reportUnknownVariableType]
        name = given.setdefault("name", info.default)
        if name is None:
            raise ConfigError(f"a {info.singular} needs a 'name'; installed: {', '.join(self.names(kind))}.")
        return validate(self.get(kind, name).settings_type, given, info.singular + f" {name!r}")

    def create(self, kind: str, value: Any) -> Any:
        """An implementation made with the settings that `value` means; see :meth:`settings`."""
        settings = self.settings(kind, value)
        return self.get(kind, settings.name)(settings)

    # ---- in-process registration

    def register(self, kind: str, name: str, obj: Any, *, replace: bool = False, module: str | None = None) -> Any:
        """Register `obj`, a class of this kind, under `name` for this process; returns it.

        Raises:
            PluginClashError: the name is taken by something else and `replace` is False.
            BrokenPluginError: `obj` is not an implementation of this kind.
        """
        kind = kind_of(kind)
        info = KINDS[kind]
        module = module or str(getattr(obj, "__module__", "?"))
        entry = Entry(kind, name, f"{module}:{getattr(obj, '__qualname__', name)}", local=obj, module=module)
        if not name or "/" in name or ":" in name:
            raise ConfigError(f"{name!r} can't be a name: give a non-empty one without '/' and ':'.")
        if info.interface is not None and not (isinstance(obj, type) and issubclass(obj, info.interface)):
            raise self._broken(entry, f"it must be a subclass of deqcore.{info.interface.__name__}, got {obj!r}")
        before = self._local.get(kind, {}).get(name)
        again = before is not None and before.value == entry.value  # a notebook cell run twice
        installed = [str(other) for other in self.index(kind).get(name, [])]
        if not replace and (installed or (before is not None and not again)):
            taken = installed[0] if installed else str(before)
            raise PluginClashError(
                f"the name {name!r} is taken by {taken}. Choose another name, or pass replace=True to mean yours in this "
                "process."
            )
        self._local.setdefault(kind, {})[name] = entry
        return obj

    @contextmanager
    def scope(self, entry_points: Iterable[EntryPoint] | None = None) -> Iterator[Registry]:
        """Undo, on exit, every registration made inside; with `entry_points`, these replace what is installed."""
        saved = (self._points, self._index, self._local, self._loaded, self._manager)
        self._local = {kind: dict(entries) for kind, entries in self._local.items()}
        if entry_points is not None:
            self._points, self._index, self._loaded, self._manager = list(entry_points), None, {}, None
        try:
            yield self
        finally:
            self._points, self._index, self._local, self._loaded, self._manager = saved

    def refresh(self) -> None:
        """Read the index again, after something was installed or removed in this process."""
        sys.path_importer_cache.clear()
        self._index, self._loaded, self._manager = None, {}, None


def dir_hooks() -> list[str]:
    """Names of all hooks."""
    return [kind.hook for kind in KINDS.values()]


#: The registry of this process.
registry = Registry()
