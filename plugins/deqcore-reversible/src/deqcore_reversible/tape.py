"""What the forward notes, so that its steps can be undone: few states, and a number or so a step to check others by."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from deqcore import Problem, Step

from .solver import Pair, Reversible, ReversibleSettings

__all__ = ["Marks", "Recording", "Tape", "growth", "spacing"]

#: Rounding error that undoing a step adds, in spacings of the dtype.
ROUNDING = 1.0
#: The weight of y in a mark, beside z. Errors of the two are related; no method relates them by just this number.
MIX = 1.37
#: A sample put back this often by the loop is frozen: it has no gradient, and needs no states.
FROZEN_AFTER = 3


def growth(damping: float) -> float:
    """What undoing a step multiplies an error by, at most, where the iteration converges.

    For an eigenvalue of df/dz, the step's two eigenvalues have the product (1 - damping)^2. If the larger is at most
    1, the smaller is at least that, and undoing divides by it.
    """
    return (1.0 - damping) ** -2


def spacing(damping: float, tolerance: float, eps: float) -> int:
    """Steps that can be undone from a state that is known before the error passes the tolerance."""
    room = tolerance / (ROUNDING * eps)
    return max(1, int(math.log(room) / math.log(growth(damping)))) if room > 1 else 1


class Marks:
    """Random projections of states, one sum or a few for each sample, by which a reconstructed state is checked.

    Signs are drawn at random, so the root mean square of a difference's projections is its norm, on average, whatever
    its direction.

    Args:
        z: a state like those to mark, shape (B, F).
    """

    def __init__(self, z: Tensor) -> None:
        batch, features = z.shape
        count = max(1, min(4, batch // 8, features // 256))
        random = torch.Generator(device=z.device).manual_seed(0)
        draw = torch.randint(0, 2, (count, features), generator=random, device=z.device)
        self.signs = draw.to(z.dtype).mul_(2).sub_(1)

    def of(self, pair: Pair) -> Tensor:
        """(K, B)."""
        # Products with single vectors: matrix products may be rounded to fewer bits.
        return torch.stack([pair.z @ sign + MIX * (pair.y @ sign) for sign in self.signs])


class Tape:
    """Notes of one run of the coupled iteration.

    Args:
        damping: the step's.
        tolerance: largest relative error that a reconstructed state may have.
        every: steps between the states kept.

    Attributes:
        known: pairs of states by step; at least the first and the last.
        marks: of the pairs after each step; empty where all pairs are kept.
        steps: how many were made.
        born: (B,) int64, the step at which a sample began anew because it wasn't finite; None where none did.
    """

    def __init__(self, damping: float, tolerance: float, every: int) -> None:
        self.damping = damping
        self.tolerance = tolerance
        self.every = every
        self.known: dict[int, Pair] = {}
        self.marks: list[Tensor] = []
        self.steps = 0
        self.born: Tensor | None = None
        self.marking: Marks | None = None
        self._last: Pair | None = None
        self._events: Tensor | None = None

    def begin(self, z: Tensor) -> None:
        """Start anew at `z`."""
        self.known, self.marks, self.steps, self.born = {0: Pair(z, z)}, [], 0, None
        self._last, self._events = self.known[0], None
        self.marking = Marks(z) if self.every > 1 else None

    def note(self, pair: Pair) -> None:
        """Take note of the pair after one more step."""
        self.steps += 1
        self._last = pair
        if self.marking is not None:
            self.marks.append(self.marking.of(pair))
        if self.steps % self.every == 0:
            self.known[self.steps] = pair

    def replace(self, pair: Pair, before: Pair) -> None:
        """Take note that the loop has put samples of the last pair somewhere else."""
        other = (pair.z != before.z).any(1)
        born = torch.zeros_like(other, dtype=torch.int64) if self.born is None else self.born
        events = torch.zeros_like(born) if self._events is None else self._events
        self.born = torch.where(other, self.steps, born)
        self._events = events + other
        self._last = pair
        if self.marking is not None and self.marks:
            self.marks[-1] = self.marking.of(pair)
        if self.steps in self.known or bool((other & (self._events < FROZEN_AFTER)).any()):
            self.known[self.steps] = pair

    def finish(self, z: Tensor) -> None:
        """Keep the last pair; samples that ended non-finite, or frozen, are taken to have begun at `z`, the result."""
        if self._last is None:
            return
        pair, self._last = self._last, None
        gone = ~(torch.isfinite(pair.y) & torch.isfinite(pair.z)).all(1)
        if self._events is not None:
            gone = gone | (self._events >= FROZEN_AFTER)
        if bool(gone.any()):
            born = torch.zeros_like(gone, dtype=torch.int64) if self.born is None else self.born
            self.born = torch.where(gone, self.steps, born)
            pair = Pair(torch.where(gone[:, None], z, pair.y), torch.where(gone[:, None], z, pair.z))
        self.known[self.steps] = pair

    def release(self, step: int) -> tuple[Tensor, Tensor]:
        """y and z after this step, for somebody else to keep."""
        pair = self.known.pop(step)
        return pair.y, pair.z


class Recording(Reversible):
    """The coupled iteration with a tape.

    Args:
        settings: the solver's.
        tape: takes the notes.
    """

    def __init__(self, settings: ReversibleSettings, tape: Tape) -> None:
        super().__init__(settings)
        self.tape = tape

    def init(self, problem: Problem, z: Tensor, fz: Tensor) -> Pair:
        self.tape.begin(z)
        return super().init(problem, z, fz)

    def step(self, problem: Problem, z: Tensor, fz: Tensor, state: Pair) -> Step:
        if z is not state.z:
            before, state = state, self.paired(problem, z, state)
            self.tape.replace(state, before)
        made = super().step(problem, z, fz, state)
        self.tape.note(made.state)
        return made
