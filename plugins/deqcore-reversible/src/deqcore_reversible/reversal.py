"""The backward: steps undone one by one, each state checked, and the gradient of each step added up."""

from __future__ import annotations

import torch
from torch import Tensor

from deqcore import Solution, Status

from .inputs import Evaluation
from .solver import Pair
from .tape import MIX, Tape, growth

__all__ = ["Reversal"]

#: An error of this many spacings is rounding error, whatever the tolerance.
FLOOR_SPACINGS = 4.0


class Reversal:
    """One backward over the steps of a tape.

    Args:
        tape: the notes of the forward.
        known: pairs of states by step; see :class:`deqcore_reversible.tape.Tape`.
        evaluation: f, and where the gradients in its inputs are summed.
        last: (B,) int64, the step whose state each sample returned.
    """

    def __init__(self, tape: Tape, known: dict[int, Pair], evaluation: Evaluation, last: Tensor) -> None:
        self.tape = tape
        self.known = dict(known)
        self.evaluation = evaluation
        self.last = last
        end = known[tape.steps].z
        self.end_size = _norm(end)
        self.worst = torch.zeros_like(self.end_size)
        self.worst_relative = torch.zeros_like(self.end_size)
        self.trace: list[tuple[Tensor, Tensor]] = []
        self.since = 0  # steps undone since a state that is known
        self.kept = len(known)
        self.repeats = True  # f gives again what it gave in the forward, as far as is known
        self._ratio = tape.damping / (1.0 - tape.damping)

    # ---- the gradient

    def run(self, cotangent: Tensor) -> Tensor:
        """The gradient in the start, from the one in the state returned; those in f's inputs are in the evaluation."""
        steps = self.tape.steps
        stops = set(self.last.unique().tolist())
        pair = self.known[steps]
        cz: Tensor | None = None
        cy: Tensor | None = None
        for step in range(steps, 0, -1):
            if step in stops:
                cz = self._given(cotangent, step, cz)
            pair, cy, cz = self._undo(step, pair, cy, cz)
        if 0 in stops:
            cz = self._given(cotangent, 0, cz)
        if cz is None:
            return torch.zeros_like(cotangent)
        return cz if cy is None else cz + cy

    def _given(self, cotangent: Tensor, step: int, cz: Tensor | None) -> Tensor:
        """`cz` with the cotangents of the samples that returned the state after this step."""
        here = self.last == step
        if self.tape.born is not None:
            here = here & (self.tape.born <= step)
        part = cotangent if bool(here.all()) else torch.where(here[:, None], cotangent, 0.0)
        return part if cz is None else cz + part

    def _undo(
        self, step: int, pair: Pair, cy: Tensor | None, cz: Tensor | None
    ) -> tuple[Pair, Tensor | None, Tensor | None]:
        """The pair before the step, and the cotangents there."""
        if cz is None:  # no sample has returned a state this late
            return self._before(step, pair, record=False)[0], None, None
        damping, evaluation = self.tape.damping, self.evaluation
        fy, y, graph = evaluation.recorded(pair.y)
        z = self._back(pair.z, fy)
        cy = _plus(evaluation.pull(y, graph, damping * cz), cy)
        del y, graph, fy  # one graph at a time
        pair, point = self._before(step, pair, record=True, z=z)
        cz = (1.0 - damping) * cz + evaluation.pull(*point, damping * cy)
        cy = (1.0 - damping) * cy
        held = self._held(step - 1)
        if held is not None:
            cy, cz = torch.where(held, 0.0, cy), torch.where(held, 0.0, cz)
        return pair, cy, cz

    # ---- states

    def _back(self, after: Tensor, f: Tensor) -> Tensor:
        """What was damped towards `f`: (after - damping f) / (1 - damping)."""
        return torch.add(after, after - f, alpha=self._ratio)

    def _before(
        self, step: int, pair: Pair, record: bool, z: Tensor | None = None
    ) -> tuple[Pair, tuple[Tensor, Tensor]]:
        """The pair before the step, checked; and z there and f(z) with its graph where that is to be recorded."""
        evaluate = self.evaluation.recorded if record else self._unrecorded
        if z is None:
            z = self._back(pair.z, self.evaluation.plain(pair.y))
        held, true = self._held(step - 1), self.known.pop(step - 1, None)
        z = _kept(held, pair.z, z)
        if true is not None:
            true = Pair(_kept(held, pair.y, true.y), _kept(held, pair.z, true.z))
        fz, *point = evaluate(z if true is None else true.z)
        found = Pair(_kept(held, pair.y, self._back(pair.y, fz)), z)
        del fz, z
        if true is not None:
            self._measure(found, true)
            self.since = 0
            return true, (point[0], point[1])
        if self._passes(found, step - 1):
            self.since += 1
            return found, (point[0], point[1])
        del point
        found = self._replayed(step - 1)
        found = Pair(_kept(held, pair.y, found.y), _kept(held, pair.z, found.z))
        _, *point = evaluate(found.z)
        return found, (point[0], point[1])

    def _unrecorded(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        fz = self.evaluation.plain(z)
        return fz, z, fz

    def _replayed(self, step: int) -> Pair:
        """The pair after this step, by steps made once more from the last one known; some between are kept."""
        first = max(known for known in self.known if known < step)
        every, self.since = max(1, self.since), 0
        pair = self.known[first]
        for k in range(first + 1, step + 1):
            y = torch.lerp(pair.y, self.evaluation.plain(pair.z), self.tape.damping)
            pair = Pair(y, torch.lerp(pair.z, self.evaluation.plain(y), self.tape.damping))
            if (step - k) % every == 0 and k < step:
                self.known[k] = pair
                self.kept += 1
        self.repeats = self._passes(pair, step)
        if not self.repeats:
            self._passes(pair, step)
        return pair

    def _held(self, step: int) -> Tensor | None:
        """(B, 1) bool of samples that began anew after this step: what they were before has no part in the result."""
        return None if self.tape.born is None else (self.tape.born > step)[:, None]

    # ---- errors

    def _passes(self, pair: Pair, step: int) -> bool:
        """Whether the mark of a pair says that it is what it was after this step, as well as is asked for.

        Always true where making the steps again gives no better one.
        """
        marking = self.tape.marking
        if marking is None:
            return True
        off = marking.of(pair) - self.tape.marks[step - 1]
        error = off.square().mean(0).sqrt()
        relative = error / self._size(pair)
        if self.tape.born is not None:
            error, relative = (torch.where(self.tape.born > step, 0.0, part) for part in (error, relative))
        if self.repeats and not bool((relative <= self.tape.tolerance).all()):
            return False
        self._used(error, relative)
        return True

    def _measure(self, found: Pair, true: Pair) -> None:
        """Take note of the error where the true state is known, which takes the place of the one found."""
        error = torch.hypot(_norm(found.z - true.z), MIX * _norm(found.y - true.y))
        relative = error / self._size(true)
        self.trace.append((error, relative))
        if self.since:  # the states used before were off by less, by what one step does
            rate = growth(self.tape.damping)
            self._used(error / rate, relative / rate)

    def _size(self, pair: Pair) -> Tensor:
        size = torch.maximum(torch.maximum(_norm(pair.z), _norm(pair.y)), self.end_size)
        return size.clamp_min(torch.finfo(size.dtype).tiny)

    def _used(self, error: Tensor, relative: Tensor) -> None:
        self.worst = torch.maximum(self.worst, error)
        self.worst_relative = torch.maximum(self.worst_relative, relative)

    def solution(self, start: Tensor) -> Solution:
        """What is known of this backward: the residual is the reconstruction error."""
        relative, tape = self.worst_relative, self.tape
        eps = torch.finfo(relative.dtype).eps
        status = torch.full_like(relative, int(Status.STALLED), dtype=torch.int64)
        status[relative <= FLOOR_SPACINGS * eps] = int(Status.AT_PRECISION)
        status[relative <= tape.tolerance] = int(Status.CONVERGED)
        status[~torch.isfinite(relative)] = int(Status.NON_FINITE)
        trace = self.trace or [(self.worst, relative)]
        steps = torch.full_like(status, tape.steps)
        evaluation = self.evaluation
        return Solution(
            {
                "abs_lowest": self.worst,
                "rel_lowest": relative,
                "abs_trace": torch.stack([error for error, _ in trace], 1),
                "rel_trace": torch.stack([share for _, share in trace], 1),
                "nstep": steps.float(),
                "sradius": relative.new_full((1,), -1.0),
                "status": status,
                "steps": steps,
                "nfe": evaluation.nfe,
                "sample_nfe": torch.full_like(status, evaluation.nfe),
                "nvjp": evaluation.nvjp,
                "njvp": 0,
                "z": start,
                "kept": self.kept,
                "repeats": self.repeats,
            }
        )


def _norm(z: Tensor) -> Tensor:
    return torch.linalg.vector_norm(z, dim=1)


def _kept(held: Tensor | None, after: Tensor, before: Tensor) -> Tensor:
    """`before`, with the samples that are held as they were after."""
    return before if held is None else torch.where(held, after, before)


def _plus(part: Tensor, total: Tensor | None) -> Tensor:
    return part if total is None else total + part
