"""How a solve ended: a status a sample, with its remedy, and the numbers behind it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from .errors import ConvergenceError, ConvergenceWarning
from .frames import caller

if TYPE_CHECKING:
    from .interfaces import Solver
    from .state import StateSpec

__all__ = ["OnFailure", "Solution", "Stats", "Status"]

OnFailure = Literal["ignore", "warn", "raise"]


class Status(IntEnum):
    """How the solve of one sample ended. `text` says what it means, `remedy` what to try next."""

    CONVERGED = 0, "the residual is within the tolerance", "nothing to do"
    MAX_STEPS = (
        1,
        "the step limit came before the tolerance",
        "raise max_iter, loosen the tolerance, or pick a solver that needs fewer steps (anderson, broyden)",
    )
    DIVERGED = (
        2,
        "the residual grew far above its lowest value",
        "make f contractive (apply_norm, a jacobian regularizer), use damping below 1, or solver='broyden'",
    )
    NON_FINITE = (
        3,
        "f returned NaN or inf again and again, also from the best state found",
        "look for overflow or a division by zero in f, use a wider dtype, damping, or a norm",
    )
    STALLED = (
        4,
        "the residual has stopped falling",
        "use damping below 1, another solver, a looser tolerance, or batch_dims=0 if f couples samples",
    )
    AT_PRECISION = (
        5,
        "the residual is at the rounding error of the state's dtype, above the tolerance",
        "nothing more is to be had in this dtype: loosen the tolerance or use a wider dtype",
    )
    SKIPPED = 6, "no step was asked for (max_iter=0), z0 was handed on", "raise max_iter to solve"

    text: str
    remedy: str

    def __new__(cls, value: int, text: str, remedy: str) -> Status:
        member = int.__new__(cls, value)
        member._value_ = value
        member.text = text
        member.remedy = remedy
        return member

    @property
    def ok(self) -> bool:
        """Whether the sample is as good as asked for, as its dtype allows, or wasn't to be solved."""
        return self in (Status.CONVERGED, Status.AT_PRECISION, Status.SKIPPED)


class Solution(MutableMapping[str, Any]):
    """What is known about a finished solve. A mapping with TorchDEQ's keys and more; detached, holding no graph.

    ====================  ==========================================================================
    ``abs_lowest`` (B,)   residual norm ||f(z) - z|| of the state that was returned
    ``rel_lowest`` (B,)   the same over ||f(z)||
    ``abs_trace`` (B, N)  residual norms at the N evaluations that were judged
    ``rel_trace`` (B, N)  the same over ||f(z)||
    ``nstep`` (B,)        step at which the returned state was found (float, as in TorchDEQ)
    ``sradius`` (B,)      spectral radius of df/dz, where it was asked for; otherwise one 0 (eval) or -1 (train)
    ``status`` (B,)       int64, a :class:`Status` a sample
    ``steps`` (B,)        int64, solver updates until the sample was within tolerance, or all of them
    ``nfe``               int, calls of f in this forward, those of the gradient backend included
    ``sample_nfe`` (B,)   int64, evaluations of f in which the sample took part
    ``nvjp``, ``njvp``    int, products with the transposed Jacobian and with the Jacobian
    ``z``                 the packed state, shape (B, features), for warm starts
    ``backward``          the Solution of the last backward solve, once there was one
    ====================  ==========================================================================

    Attributes:
        spec: how packed states relate to the user's.
        solver: the solver that found it.
        solver_state: the solver's own state, kept with ``keep_state=True``.
    """

    def __init__(self, values: Mapping[str, Any], spec: StateSpec | None = None, solver_state: Any = None) -> None:
        self._values: dict[str, Any] = dict(values)
        self._pending = {key for key, value in values.items() if callable(value)}
        self.spec = spec
        self.solver: Solver[Any] | None = None
        self.solver_state = solver_state
        #: Statuses that are no failure of this solve besides those that never are: a run of a fixed number of steps
        #: was not asked to reach a tolerance.
        self.accepted: tuple[Status, ...] = ()

        #: False for a run that never waited for its device; the failure policy then looks only where it is to raise.
        self.waits = True

        #: Called with the Solution of a backward solve as soon as there is one.
        self.on_backward: Callable[[Solution], Any] | None = None

    def inverse(self) -> Callable[[Tensor], Tensor] | None:
        """The solver's estimate of (I - J)^-1 as a map of (batch, features) tensors; None where it has none, or where
        its state was not kept."""
        if self.solver is None or self.solver_state is None:
            return None
        return self.solver.inverse(self.solver_state)

    def report(self, backward: Solution) -> None:
        """Take note of a backward solve: it becomes ``["backward"]``, writers and the failure policy hear of it."""
        self._values["backward"] = backward
        if self.on_backward is not None:
            self.on_backward(backward)

    def __getitem__(self, key: str) -> Any:
        value = self._values[key]
        if key in self._pending and callable(value):  # traces are stacked when somebody looks
            self[key] = value = value()
        return value

    def __setitem__(self, key: str, value: Any) -> None:
        """Programs written for TorchDEQ add their own entries to `info`."""
        self._pending.discard(key)
        self._values[key] = value

    def __delitem__(self, key: str) -> None:
        del self._values[key]
        self._pending.discard(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __getstate__(self) -> dict[str, Any]:
        return {
            "_values": dict(self.items()),
            "_pending": set(),
            "spec": None,
            "solver": None,
            "solver_state": None,
            "accepted": self.accepted,
            "waits": self.waits,
            "on_backward": None,
        }

    @property
    def converged(self) -> Tensor:
        """(B,) bool: the sample's residual is within its tolerance."""
        return self["status"] == Status.CONVERGED

    def counts(self) -> dict[Status, int]:
        """How many samples ended with each status that occurs."""
        found = torch.bincount(self["status"].flatten().cpu(), minlength=len(Status)).tolist()
        return {status: found[status] for status in Status if found[status]}

    def failed(self) -> bool:
        """Whether some sample ended without what was asked for."""
        return any(self._is_failure(status) for status in self.counts())

    def _is_failure(self, status: Status) -> bool:
        return not (status.ok or status in self.accepted)

    def summary(self, what: str = "forward solve") -> str:
        """One sentence a failing status: how many samples, what happened, the residual reached, what to try."""
        counts = self.counts()
        total = sum(counts.values())
        residual: Tensor = self["abs_lowest"].flatten()
        relative: Tensor = self["rel_lowest"].flatten()
        status: Tensor = self["status"].flatten()
        parts: list[str] = []
        for code, count in counts.items():
            if self._is_failure(code):
                rows = status == code
                worst, share = residual[rows].max().item(), relative[rows].max().item()
                parts.append(
                    f"{count} of {total} samples {code.name.lower()} ({code.text}; worst residual {worst:.3g} absolute,"
                    f" {share:.3g} relative): {code.remedy}"
                )
        return f"{what}: " + ("; ".join(parts) if parts else f"all {total} samples converged")

    def apply_policy(self, on_failure: OnFailure, what: str = "forward solve", stacklevel: int = 3) -> None:
        """Do what `on_failure` says about samples that failed.

        Raises:
            ConvergenceError: some sample failed and `on_failure` is ``"raise"``.
        """
        if on_failure == "ignore" or not self.failed():
            return
        if on_failure == "raise":
            raise ConvergenceError(
                self.summary(what) + '. (on_failure="warn" or "ignore" goes on with the best state.)', self
            )
        warnings.warn(
            self.summary(what) + '. (on_failure="ignore" silences this, "raise" stops.)', ConvergenceWarning, stacklevel
        )

    def judged(self, on_failure: OnFailure, what: str) -> None:
        """As :meth:`apply_policy`, in the name of the user's own line; only what waited for its device anyway, or what
        is to raise, is looked at."""
        looks = self.waits or on_failure == "raise"
        if on_failure != "ignore" and looks and self.failed():
            self.apply_policy(on_failure, what, stacklevel=caller() + 1)

    def __repr__(self) -> str:
        if "status" not in self._values:
            return f"Solution({', '.join(self._values)})"
        counts = ", ".join(f"{count} {status.name.lower()}" for status, count in self.counts().items())
        worst = self["abs_lowest"].max().item()
        return f"Solution({counts}; worst residual {worst:.3g}, nfe={self._values.get('nfe')})"


Stats = Solution


def from_final_step(z: Any, fz: Any, nstep: int = 0, pack: Callable[[Any], Tensor] | None = None) -> Solution:
    """A Solution that knows one pair (z, f(z)) only; TorchDEQ's ``solver_stat_from_final_step``.

    Args:
        z: state, a tensor of shape (B, ...) or a tuple or list of them.
        fz: f(z), of the same structure.
        nstep: step to report.
        pack: how to turn either into a (B, features) tensor; flattens by default.
    """

    def flat(state: Any) -> Tensor:
        parts = [state] if isinstance(state, Tensor) else list(state)
        return torch.cat([part.reshape(part.shape[0] if part.dim() else 1, -1) for part in parts], dim=1).detach()

    pack = pack or flat
    packed, image = pack(z), pack(fz)
    residual = torch.linalg.vector_norm(image - packed, dim=1)
    relative = residual / (torch.linalg.vector_norm(image, dim=1) + 1e-8)
    return Solution(
        {
            "abs_lowest": residual,
            "rel_lowest": relative,
            "abs_trace": residual[:, None],
            "rel_trace": relative[:, None],
            "nstep": torch.full_like(residual, float(nstep)),
            "sradius": torch.tensor([-1.0]),
        }
    )
