"""Names to implementations: an index read from entry points, one plugin loaded at a time, and what was registered here.

Reading the index imports nothing. Naming an implementation imports its module, registers it with pluggy, checks its
hooks and asks for its class. Built-ins come through the same index as everybody else's.
"""

from __future__ import annotations

import importlib
import threading
import warnings
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from typing import Any

import pluggy

from .entries import (
    ALLOW,
    CHOICES,
    DISABLE,
    KINDS,
    UNIONS,
    Entry,
    EntryPoint,
    Kind,
    canonical,
    kind_of,
    patterns,
    read_points,
)
from .errors import (
    ConfigError,
    ConfigTypeError,
    PluginClashError,
    PluginDisabledError,
    PluginError,
    PluginWarning,
    UnknownPluginError,
    suggest,
)
from .loading import Loader
from .settings import Settings
from .validation import validate

__all__ = ["KINDS", "Entry", "Kind", "Registry", "kind_of", "registry"]

#: Groups that begin like ours and hold no implementations picked by name.
OTHER_GROUPS = ("deqcore.plugins",)
#: What a name can't hold: these mean something in patterns, in dist/name and in comma-separated lists.
RESERVED = "/:,*"


class Registry:
    """The implementations of every kind. There is one, :data:`deqcore.registry`.

    Kinds may be given singular or plural: ``registry.get("solver", "anderson")``. Loading is safe from several threads;
    :meth:`scope` and :meth:`refresh` change what all threads see.
    """

    def __init__(self) -> None:
        self._points: Iterable[EntryPoint] | None = None
        self._index: dict[str, dict[str, list[Entry]]] | None = None
        self._strays: list[EntryPoint] = []
        self._local: dict[str, dict[str, Entry]] = {}
        self._warned: set[tuple[str, str]] = set()
        self._loader = Loader()
        self._lock = threading.RLock()
        #: Another object after every change of what a name may mean.
        self.version = object()

    # ---- the index

    @property
    def manager(self) -> pluggy.PluginManager:
        """The pluggy manager that loaded modules are registered with, as ``kind:name@dist``."""
        return self._loader.manager

    def index(self, kind: str) -> dict[str, list[Entry]]:
        """Name -> entries, one list item a distribution, for one kind. Read once from metadata; imports nothing."""
        with self._lock:
            if self._index is None:
                self._index = self._read()
            return self._index[_kind(kind)]

    def _read(self) -> dict[str, dict[str, list[Entry]]]:
        index: dict[str, dict[str, list[Entry]]] = {name: {} for name in KINDS}
        strays: list[EntryPoint] = []
        for point in read_points() if self._points is None else self._points:
            prefix, _, name = point.group.partition(".")
            if prefix != "deqcore":
                continue
            if name in KINDS:
                index[name].setdefault(point.name, []).append(Entry(name, point.name, point.value, point))
            elif point.group not in OTHER_GROUPS:
                strays.append(point)
        self._strays = strays
        return index

    def names(self, kind: str) -> list[str]:
        """Every name of this kind, sorted; imports nothing."""
        return sorted({name for one in _kinds(kind) for name in (*self.index(one), *self._local.get(one, {}))})

    def entries(self, kind: str | None = None) -> list[Entry]:
        """Every entry of one kind, or of all; imports nothing."""
        found: list[Entry] = []
        for name in KINDS if kind is None else _kinds(kind):
            local = self._local.get(name, {})
            for key in self.names(name):
                found += [*self.index(name).get(key, []), *([local[key]] if key in local else [])]
        return found

    def disabled(self, entry: Entry) -> str:
        """Why `entry` is switched off, or an empty string. Looks at the environment each time.

        Raises:
            ConfigError: one of the two variables holds something that is no pattern.
        """
        for pattern in patterns(DISABLE):
            if pattern.matches(entry):
                return f"{DISABLE} has {pattern.text!r}"
        allowed = patterns(ALLOW)
        if not allowed or entry.point is None or entry.builtin or any(pattern.matches(entry) for pattern in allowed):
            return ""
        return f"{ALLOW} does not have it"

    def find(self, kind: str, name: str) -> Entry:
        """The one entry that `name` (``anderson``, or ``dist/anderson``) means; imports nothing.

        Raises:
            UnknownPluginError: nothing of this kind has that name.
            PluginClashError: two third-party distributions have it and `name` doesn't say which.
            PluginDisabledError: an environment variable switches it off.
        """
        kind = kind if kind in UNIONS else _kind(kind)
        if not isinstance(name, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigTypeError(f"a {CHOICES[kind].singular} is picked by its name, a str; got {name!r}.")
        kind = self._home(kind, name)
        found = self._named(kind, name)
        if not found:
            raise self._unknown(kind, name)
        enabled = [entry for entry in found if not self.disabled(entry)]
        if not enabled:
            raise PluginDisabledError(
                f"{found[0]} is disabled: {self.disabled(found[0])}. Change that variable, or pick another name."
            )
        return enabled[0] if len(enabled) == 1 else self._settle(enabled)

    def _named(self, kind: str, name: str) -> list[Entry]:
        """The entries of one kind that `name` may mean, disabled ones included."""
        dist, _, bare = name.rpartition("/")
        local = self._local.get(kind, {})
        if dist:
            return [e for e in self.entries(kind) if e.name == bare and canonical(e.origin) == canonical(dist)]
        return [local[name]] if name in local else [e for e in self.entries(kind) if e.name == name and e.point]

    def _home(self, kind: str, name: str) -> str:
        """The one kind that is meant: of a union, that of the entry which comes first, see :data:`UNIONS`."""
        if kind not in UNIONS:
            return kind
        found = [entry for member in UNIONS[kind] for entry in self._named(member, name)]
        enabled = [entry for entry in found if not self.disabled(entry)]
        best = min(enabled or found, key=lambda e: (e.point is not None, not e.builtin), default=None)
        return kind if best is None else best.kind

    def _unknown(self, kind: str, name: str) -> UnknownPluginError:
        names = self.names(kind)
        dist, _, bare = name.rpartition("/")
        hints = [suggest(name, names)]
        if dist and bare in names:
            spelled = [f"{entry.origin}/{bare}" for entry in self.entries(kind) if entry.name == bare]
            hints = [f" {dist!r} has none of that name; {' and '.join(spelled)} exist."]
        hints += [f" {name!r} is a {other.singular}." for other in KINDS.values() if name in self.names(other.name)]
        for point in self._strays:
            if point.name == bare:
                near = suggest(point.group, [other.group for other in KINDS.values()])
                hints.append(
                    f" {point.value!r} offers it in the entry-point group {point.group!r}, which is none.{near}"
                )
        return UnknownPluginError(
            f"no {CHOICES[kind].singular} named {name!r}.{''.join(hints)} "
            f"Installed: {', '.join(names) or 'none'}. Install the distribution that brings it, or register it."
        )

    def _settle(self, entries: list[Entry]) -> Entry:
        """Two distributions, one name: a built-in keeps it, two third parties don't."""
        builtin = [entry for entry in entries if entry.builtin]
        others = [entry for entry in entries if not entry.builtin]
        spelled = ", ".join(f"{entry.dist}/{entry.name}" for entry in others)
        kind, name = entries[0].kind, entries[0].name
        if not builtin:
            raise PluginClashError(
                f"{CHOICES[kind].singular} {name!r} is claimed by "
                f"{' and '.join(' '.join(entry.identity) for entry in others)}. "
                f"Write one in full ({spelled}), uninstall one, or list one in {DISABLE}."
            )
        if (kind, name) not in self._warned:
            self._warned.add((kind, name))
            warnings.warn(
                f"{name!r} means deqcore's own {CHOICES[kind].singular}; {spelled} has that name too and was not "
                "imported. Write it in full to use it.",
                PluginWarning,
                stacklevel=4,
            )
        return builtin[0]

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
        return self._loader.load(entry)

    def state_of(self, entry: Entry) -> tuple[str, str]:
        """(state, cause), the state ``ok``, ``broken``, ``disabled``, ``clash`` or ``shadowed``.

        Imports the plugin, unless it is disabled.
        """
        cause = self.disabled(entry)
        if cause:
            return "disabled", cause
        try:
            self.load(entry)
        except PluginError as error:
            return "broken", str(error)
        if entry.point is None:
            return "ok", ""
        full = f"write {entry.dist}/{entry.name}"
        local = self._local.get(entry.kind, {}).get(entry.name)
        if local is not None and not self.disabled(local):
            return "shadowed", f"{local.origin} has taken the name in this process; {full}"
        rivals = [e for e in self.index(entry.kind).get(entry.name, []) if e is not entry and not self.disabled(e)]
        if entry.builtin or not rivals:
            return "ok", ""
        if any(rival.builtin for rival in rivals):
            return "shadowed", f"deqcore has that name too; {full}"
        return "clash", f"{rivals[0].dist} has that name too; {full}"

    # ---- making things

    def settings(self, kind: str, value: Any) -> Settings:
        """The settings that `value` means: a name, a mapping with a ``name``, or settings that have one.

        Raises:
            ConfigError and its kin: a wrong key or value, or no name where the kind has no default.
            UnknownPluginError, BrokenPluginError: see :meth:`get`.
        """
        info = CHOICES[kind] if kind in UNIONS else KINDS[_kind(kind)]
        base: Any = info.interface
        if base is None:
            raise ConfigError(f"a {info.singular} has no settings; use registry.get({info.name!r}, name).")
        if isinstance(value, Settings):
            if not isinstance(value, base.settings_type):
                raise ConfigTypeError(f"{type(value).__name__} are not settings of a {info.singular}.")
            if not value.name:
                raise ConfigError(f"settings without a name don't say which {info.singular} is meant; set name=...")
            if isinstance(value, self.get(kind, value.name).settings_type):
                return value
            # settings of the base class, or of a class that has since been defined again
            value = {key: getattr(value, key) for key in value.model_fields_set}
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

        The same class again, or a later definition of it under the same name and module (a notebook cell run twice),
        takes the place of the first.

        Raises:
            PluginClashError: the name is taken by something else and `replace` is False.
            ConfigError: it can't be a name.
            ConfigTypeError: `name` is not a str, or `obj` is not an implementation of this kind.
        """
        kind = _kind(kind)
        _check_name(name)
        _check_object(KINDS[kind], obj)
        module = module or str(getattr(obj, "__module__", "?"))
        entry = Entry(kind, name, f"{module}:{getattr(obj, '__qualname__', name)}", local=obj, module=module)
        before = self._local.get(kind, {}).get(name)
        again = before is not None and before.value == entry.value
        installed = [str(other) for other in self.index(kind).get(name, [])]
        if not replace and (installed or (before is not None and not again)):
            taken = installed[0] if installed else str(before)
            raise PluginClashError(
                f"the name {name!r} is taken by {taken}. Choose another name, or pass replace=True to mean yours in "
                "this process."
            )
        self._local.setdefault(kind, {})[name] = entry
        self.version = object()
        return obj

    @contextmanager
    def scope(self, entry_points: Iterable[EntryPoint] | None = None) -> Generator[Registry]:
        """Undo, on exit, every registration made inside; with `entry_points`, these replace what is installed."""
        saved = dict(self.__dict__)
        self._local = {kind: dict(entries) for kind, entries in self._local.items()}
        self._warned = set(self._warned)
        self.version = object()
        if entry_points is not None:
            self._points = list(entry_points)
            self._forget()
        try:
            yield self
        finally:
            self.__dict__.update(saved)

    def refresh(self) -> None:
        """Read the index again, after something was installed or removed in this process.

        A module that was imported already stays as it is: an upgraded plugin needs a new process.
        """
        importlib.invalidate_caches()
        self._forget()

    def _forget(self) -> None:
        with self._lock:
            self._index, self._strays, self._warned, self._loader = None, [], set(), Loader()
            self.version = object()


def _kinds(text: str) -> tuple[str, ...]:
    """The kinds that `text` names: one, or those of a union."""
    return UNIONS.get(text) or (_kind(text),)


def _kind(text: str) -> str:
    return text if text in KINDS else kind_of(text)


def _check_name(name: Any) -> None:
    if not isinstance(name, str):
        raise ConfigTypeError(f"a name is a str, got {name!r} ({type(name).__name__}).")
    if not name or name != name.strip() or any(mark in name for mark in RESERVED):
        raise ConfigError(
            f"{name!r} can't be a name: give a non-empty one without {' '.join(RESERVED)} and without blanks at its "
            "ends."
        )


def _check_object(kind: Kind, obj: Any) -> None:
    interface = kind.interface
    if interface is None:
        if not callable(obj):
            raise ConfigTypeError(f"a {kind.singular} is something to call, got {obj!r}.")
    elif not (isinstance(obj, type) and issubclass(obj, interface)):
        raise ConfigTypeError(f"a {kind.singular} is a subclass of deqcore.{interface.__name__}, got {obj!r}.")


#: The registry of this process.
registry = Registry()
