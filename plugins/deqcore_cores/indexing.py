"""One solve, with gradients attached beside it at sampled steps."""

from __future__ import annotations

from deqcore import Core, CoreSettings, Stretch, hookimpl


class Indexing(Core[CoreSettings]):
    """Solve once without interruption; sampled states get their gradients beside the trajectory.

    Against `sliced`, the solver keeps its history throughout, and the gradient's steps don't move the solve.
    """

    def plan(self, max_steps: int) -> list[Stretch]:
        settings = self.settings
        states = settings.n_states
        if states > 1:
            gap = max_steps // min(max(max_steps, 1), states)
            stops = [max(max_steps - (states - 1 - k) * gap, 0) for k in range(states)]
        else:
            stops = [*(min(step, max_steps) for step in settings.indexing), max_steps]
        return [Stretch(stop, k, resume=False) for k, stop in enumerate(stops)]


@hookimpl
def deqcore_core() -> type[Indexing]:
    return Indexing
