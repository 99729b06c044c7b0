"""The core that leaves the whole forward pass to the gradient backend."""

from __future__ import annotations

from deqcore import ConfigError, Core, CoreSettings, Stretch, hookimpl

__all__ = ["ReversibleCore", "deqcore_core"]


class ReversibleCore(Core[CoreSettings]):
    """In training, solve nothing before the gradient backend: its own iteration from z0 is the forward pass.

    For ``gradient="reversible"``, which takes the number of steps and the tolerance from the solver's settings. In
    eval mode the solver solves as ever. One state is returned.

    Raises:
        ConfigError: several states are asked for (``n_states``, ``indexing``).
    """

    def plan(self, max_steps: int) -> list[Stretch]:
        settings = self.settings
        if settings.n_states > 1 or settings.indexing:
            raise ConfigError(
                f"core='reversible' returns one state, got n_states={settings.n_states}, "
                f"indexing={list(settings.indexing)}. Leave them out, or use core='sliced'."
            )
        return [Stretch(0, -1, resume=True)]


@hookimpl
def deqcore_core() -> type[ReversibleCore]:
    return ReversibleCore
