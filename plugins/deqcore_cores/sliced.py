"""The solve cut into slices, each going on from the state whose gradient was attached."""

from __future__ import annotations

from deqcore import Core, CoreSettings, Stretch, hookimpl


class Sliced(Core[CoreSettings]):
    """Solve up to a sampled step, attach the gradient there, and go on from what the gradient backend returned.

    The default. With one state it is a solve and its gradient. With several, a backend that moves the state (phantom)
    takes part in the solve, and every slice starts a new history.
    """

    def plan(self, max_steps: int) -> list[Stretch]:
        settings = self.settings
        if settings.n_states > 1:
            slice_ = max_steps // settings.n_states
            stops = [slice_ * (k + 1) for k in range(settings.n_states)]
        else:
            stops = [*(min(step, max_steps) for step in settings.indexing), max_steps]
        return [Stretch(stop, k, resume=True) for k, stop in enumerate(stops)]


@hookimpl
def deqcore_core() -> type[Sliced]:
    return Sliced
