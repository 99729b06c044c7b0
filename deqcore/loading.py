"""Importing the one plugin that was named, and asking it for what it brings."""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pluggy

from . import hookspecs
from .entries import KINDS, Entry
from .errors import BrokenPluginError, PluginAPIError, suggest
from .hookspecs import API_VERSIONS

__all__ = ["Loader"]


class Loader:
    """Imports plugins one at a time, has pluggy check their hooks, and asks for their classes.

    Only registration with pluggy is under a lock. Imports have their own, and holding ours meanwhile could lock up with
    a plugin module that uses the registry while another thread imports it.
    """

    def __init__(self) -> None:
        self.manager = pluggy.PluginManager("deqcore")
        self.manager.add_hookspecs(hookspecs)
        self._lock = threading.RLock()

    def load(self, entry: Entry) -> Any:
        """What `entry` brings: a class; for commands and models the object.

        Raises:
            BrokenPluginError: it can't be imported, has no matching hook, or gives the wrong thing.
            PluginAPIError: it needs a plugin API version that this deqcore doesn't offer.
        """
        if entry.local is not None:
            return entry.local
        if entry.found is None:
            answer = self._ask(entry, self._import(entry))
            with self._lock:  # a hook may make a new class each time; all threads get the first
                if entry.found is None:
                    entry.found = answer
        return entry.found

    def _import(self, entry: Entry) -> ModuleType:
        point = entry.point
        if point is None:
            raise entry.broken("it has neither an entry point nor a class")
        with _blaming(entry, "importing it"):
            module = point.load()
        if not isinstance(module, ModuleType):
            raise entry.broken(
                f"its entry point must name a module, and {point.value!r} is of type {type(module).__name__}: leave "
                "out the ':' and what follows"
            )
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
        with _blaming(entry, f"{kind.hook}()"):
            answer = hook()
        if kind.interface is None:
            if not callable(answer):
                raise entry.broken(f"{kind.hook}() must return something to call, got {answer!r}")
        elif not (isinstance(answer, type) and issubclass(answer, kind.interface) and answer is not kind.interface):
            raise entry.broken(
                f"{kind.hook}() must return a subclass of deqcore.{kind.interface.__name__}, got {answer!r}"
            )
        return answer

    def _hook(self, entry: Entry, module: ModuleType) -> Any:
        """The module's own implementation of its kind's hook, once pluggy has checked all its hooks."""
        with self._lock:
            try:
                self._register(entry, module)
            except BrokenPluginError:
                if self.manager.get_name(module) is not None:
                    self.manager.unregister(module)
                raise
            implemented = self._implementations(module)
        hook = KINDS[entry.kind].hook
        if hook not in implemented:
            raise entry.broken(f"its module has no hook {hook}(){_hint(hook, module, implemented)}")
        return implemented[hook]

    def _register(self, entry: Entry, module: ModuleType) -> None:
        if self.manager.get_name(module) is not None:
            return  # one module may bring several kinds
        with _blaming(entry, "registering its hooks"):  # pluggy's own error names hook, signature and mismatch
            self.manager.register(module, f"{entry.kind}:{entry.name}@{entry.dist}")
        unknown = sorted(
            caller.name
            for caller in self.manager.get_hookcallers(module) or []
            if not caller.has_spec()
            and not any(impl.optionalhook for impl in caller.get_hookimpls() if impl.plugin is module)
        )
        if unknown:
            near = suggest(unknown[0], [kind.hook for kind in KINDS.values()])
            raise entry.broken(f"it implements hooks that don't exist: {', '.join(unknown)}.{near}")

    def _implementations(self, module: ModuleType) -> dict[str, Any]:
        """Hook name -> the function in `module` that implements it."""
        return {
            caller.name: implementation.function
            for caller in self.manager.get_hookcallers(module) or []
            for implementation in caller.get_hookimpls()
            if implementation.plugin is module
        }


def _hint(hook: str, module: ModuleType, implemented: dict[str, Any]) -> str:
    """What is probably meant where a module lacks the hook that its entry point's group promises."""
    if callable(getattr(module, hook, None)):
        return ": that function lacks the mark @hookimpl"
    for kind in KINDS.values():
        if kind.hook in implemented:
            return f", it has {kind.hook}(): its entry point belongs in the group {kind.group}"
    return " marked with @hookimpl"


@contextmanager
def _blaming(entry: Entry, action: str) -> Generator[None]:
    """Whatever a plugin's own code raises, a SystemExit included, becomes an error that names the plugin."""
    try:
        yield
    except (KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:
        raise entry.broken(f"{action} raised {type(error).__name__}: {error}") from error
