"""Every error deqcore raises on purpose; each text says what was given, what is allowed and what to do."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

__all__ = [
    "BrokenPluginError",
    "ConfigError",
    "ConfigTypeError",
    "ConvergenceError",
    "ConvergenceWarning",
    "DEQError",
    "DEQWarning",
    "FunctionError",
    "FunctionTypeError",
    "GradientModeError",
    "MissingExtraError",
    "NormError",
    "PluginAPIError",
    "PluginClashError",
    "PluginDisabledError",
    "PluginError",
    "PluginWarning",
    "StateError",
    "StateTypeError",
    "UnknownKeyError",
    "UnknownPluginError",
]


class DEQError(Exception):
    """Base of all deqcore errors: ``except DEQError`` catches whatever the library refuses."""


class DEQWarning(UserWarning):
    """Base of all deqcore warnings."""


class ConfigError(DEQError, ValueError):
    """A setting has a value that is not allowed, or two sources within one call disagree."""


class ConfigTypeError(ConfigError, TypeError):
    """A setting has a value of the wrong type."""


class UnknownKeyError(ConfigError):
    """A key that no setting has; the text names the nearest right key and where the wrong one was given."""


class PluginError(DEQError):
    """Something is wrong with an implementation, not with the call that named it."""


class UnknownPluginError(PluginError, ValueError):
    """No implementation of that kind has that name."""


class BrokenPluginError(PluginError, ImportError):
    """The named implementation is installed but can't be loaded."""


class PluginAPIError(BrokenPluginError):
    """The named implementation asks for a plugin API version that this deqcore doesn't offer."""


class PluginClashError(PluginError, ValueError):
    """Two implementations claim one name."""


class PluginDisabledError(PluginError, ValueError):
    """The named implementation is switched off by an environment variable."""


class PluginWarning(DEQWarning):
    """An implementation is shadowed, or was skipped where it wasn't asked for by name."""


class StateError(DEQError, ValueError):
    """The state (z0) can't be packed into one (batch, features) tensor."""


class StateTypeError(StateError, TypeError):
    """A part of the state is not a floating point or complex tensor."""


class FunctionError(DEQError, ValueError):
    """f did something a fixed-point map must not: another structure or shape, or it changed its input in place."""


class FunctionTypeError(FunctionError, TypeError):
    """f returned something that is not a tensor where the state has one."""


class NormError(DEQError, ValueError):
    """A weight normalisation can't be applied to what it was given."""


class GradientModeError(DEQError, RuntimeError):
    """A derivative was asked for that this gradient backend does not offer."""


class MissingExtraError(DEQError, ImportError):
    """An optional dependency is needed; the text names the extra that installs it."""

    def __init__(self, what: str, package: str, extra: str) -> None:
        super().__init__(f"{what} needs the package {package!r}; install it with: pip install 'deqcore[{extra}]'")


class ConvergenceWarning(DEQWarning):
    """A solve ended without reaching its tolerance."""


class ConvergenceError(DEQError, RuntimeError):
    """A solve ended without reaching its tolerance and ``on_failure="raise"``.

    Attributes:
        solution: the :class:`deqcore.Solution` that failed, with the best state found.
    """

    def __init__(self, message: str, solution: Any = None) -> None:
        super().__init__(message)
        self.solution = solution


def suggest(given: object, allowed: Iterable[object], cutoff: float = 0.6) -> str:
    """`` Did you mean 'x'?`` where something near `given` is allowed, otherwise an empty string."""
    close = get_close_matches(str(given), [str(name) for name in allowed], n=2, cutoff=cutoff)
    return f" Did you mean {' or '.join(repr(name) for name in close)}?" if close else ""
