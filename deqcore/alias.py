"""``sys.modules["torchdeq"] = deqcore``: submodules imported by another name of the package are the same modules."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__all__ = ["install"]


class _Alias(MetaPathFinder, Loader):
    """Finds ``other.part`` as ``package.part`` wherever ``sys.modules["other"]`` is the package itself.

    Without it Python would run the file a second time, and there would be two registries and two sets of classes. A
    module whose name the package has given to something else (``registry``) is not to be had by another name.
    """

    def __init__(self, package: str) -> None:
        self.package = package
        self._specs: dict[str, ModuleSpec | None] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        root, _, rest = fullname.partition(".")
        if not rest or root == self.package or sys.modules.get(root) is not sys.modules.get(self.package):
            return None
        own = f"{self.package}.{rest}"
        if importlib.util.find_spec(own) is None:
            return None
        taken = getattr(sys.modules[self.package], rest, None)
        if taken is not None and taken is not sys.modules.get(own):  # Python would put the module in its place
            raise ModuleNotFoundError(f"{fullname} can't be imported by this name; import {own}", name=fullname)
        return ModuleSpec(fullname, self)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(f"{self.package}.{spec.name.partition('.')[2]}")
        self._specs[spec.name] = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        alias = module.__spec__
        if alias is not None:  # the machinery has just put the alias's spec there
            module.__spec__ = self._specs.pop(alias.name)


def install(package: str) -> None:
    """Let other names of `package` in ``sys.modules`` lead to its own submodules; once a process."""
    if not any(isinstance(finder, _Alias) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Alias(package))
