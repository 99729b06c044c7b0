"""The search for a library's fastest configuration whose gradient is accurate enough."""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torchdeq
import torchdeq.solver
from torch import Tensor

import deqcore

from .gradients_count import Counter
from .gradients_training import ACCURACY, MOST, Gradient, Training

__all__ = ["KEPT", "LIBRARIES", "Library", "Part", "Step", "counted", "search"]

#: What a ladder is climbed down for: relative tolerances, and numbers of steps.
TOLERANCES = (2e-2, 1e-2, 5e-3, 2e-3, 1e-3, 5e-4, 2e-4, 1e-4, 5e-5, 2e-5, 1e-5, 5e-6, 2e-6)
STEPS = (8, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128, 192, 256, 384, 512, 768, 1024)
TIGHT = 1e-6
#: Parts of a configuration that go on to be combined, solver by solver the fastest ones.
KEPT = 2


class Part(NamedTuple):
    """One half of a configuration: a solver, and its tolerance or its number of steps."""

    name: str
    level: float
    ridge: float | None = None
    memory: int | None = None
    limit: int | None = None

    def __str__(self) -> str:
        named = {"memory": self.memory, "ridge": self.ridge}
        extra = "".join(f", {key} {value:g}" for key, value in named.items() if value is not None)
        return f"{self.name}{extra}, {f'{self.level:g} steps' if self.counts else f'{self.level:g}'}"

    @property
    def counts(self) -> bool:
        """Whether it makes a number of steps that was found beforehand, which no tolerance ends."""
        return self.name in COUNTED


COUNTED = ("simple_fixed_point_iter", "phantom")
Watch = Callable[[Callable[..., Tensor]], Callable[..., Tensor]]
Step = Callable[[], Gradient]


class Library(NamedTuple):
    """How a library's training steps are made, from a forward and a backward half, and what these can be.

    With `start`, the step makes no forward solve and starts there. `watch` wraps f.
    """

    title: str
    build: Callable[[Training, Part, Part, Tensor | None, Watch], Step]
    forward: tuple[Part, ...]
    backward: tuple[Part, ...]
    tight: Part


def _plain(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return f


def _step(task: Training, solve: Callable[[Callable[..., Tensor], Tensor], Tensor], watch: Watch) -> Step:
    w, u = task.w.clone().requires_grad_(), task.u.clone().requires_grad_()
    zero = torch.zeros_like(task.y)

    def step() -> Gradient:
        w.grad = u.grad = None
        injected = task.x @ u.T

        def f(z: Tensor, tau: float = 1.0) -> Tensor:
            fz = torch.tanh(torch.nn.functional.linear(z, w) + injected)
            return fz if tau == 1.0 else tau * fz + (1 - tau) * z

        (0.5 * (solve(watch(f), zero) - task.y).square().sum()).backward()
        return w.grad, u.grad

    return step


def _ours(task: Training, forward: Part, backward: Part, start: Tensor | None, watch: Watch) -> Step:
    def settings(part: Part) -> dict[str, Any]:
        given: dict[str, Any] = {"name": part.name} | ({} if part.memory is None else {"memory": part.memory})
        if part.counts:
            return {**given, "max_iter": int(part.level), "tol": 0.0}
        return {**given, "max_iter": MOST, "rtol": part.level}

    gradient = {"name": "implicit", "solver": settings(backward)}
    if backward.name == "phantom":
        gradient = {"name": "phantom", "steps": int(backward.level)}
    deq = deqcore.get_deq(solver=settings(forward), gradient=gradient, on_failure="ignore")
    call: dict[str, Any] = {} if start is None else {"solver_kwargs": {"max_iter": 0}}
    return _step(task, lambda f, zero: deq(f, zero if start is None else start, **call)[0][-1], watch)


def _ridged(part: Part) -> str:
    """Their Anderson with another ridge, which their configuration can't set for the backward, under a name."""
    if part.ridge is None:
        return part.name
    name, ridge = f"anderson_{part.ridge:g}", part.ridge

    def solver(*args: Any, **given: Any) -> Any:
        return torchdeq.solver.get_solver("anderson")(*args, **{**given, "lam": ridge})

    torchdeq.solver.register_solver(name, solver)
    return name


def _theirs(task: Training, forward: Part, backward: Part, start: Tensor | None, watch: Watch) -> Step:
    def most(part: Part) -> int:  # their buffers and traces are as long as the step limit
        return int(part.level) if part.counts else part.limit or (300 if part.name == "broyden" else MOST)

    given: dict[str, Any] = {"f_solver": _ridged(forward), "f_stop_mode": "rel", "f_max_iter": most(forward)}
    if not forward.counts:
        given |= {"f_tol": forward.level}
    if backward.name == "phantom":
        given |= {"grad": int(backward.level)}
    else:
        given |= {"ift": True, "b_solver": _ridged(backward), "b_max_iter": most(backward)}
        given |= {"b_stop_mode": "rel", "b_tol": backward.level}
    deq = torchdeq.get_deq(**given)
    call: dict[str, Any] = {} if start is None else {"solver_kwargs": {"f_max_iter": 0}}
    return _step(task, lambda f, zero: deq(f, zero if start is None else start, **call)[0][-1], watch)


def _parts(*names: str) -> tuple[Part, ...]:
    return tuple(Part(name, 0.0) for name in names)


RIDGED = tuple(Part("anderson", 0.0, ridge) for ridge in (1e-4, 1e-7, 1e-10))
LIBRARIES = (
    Library(
        "TorchDEQ",
        _theirs,
        (*_parts("fixed_point_iter", "broyden", "simple_fixed_point_iter"), *RIDGED),
        (*_parts("fixed_point_iter", "broyden", "phantom"), *RIDGED),
        Part("fixed_point_iter", TIGHT),
    ),
    Library(
        "**deqcore**",
        _ours,
        (
            *_parts("fixed_point_iter", "anderson", "broyden", "simple_fixed_point_iter"),
            Part("anderson", 0.0, memory=5),
        ),
        _parts("gmres", "bicgstab", "neumann", "anderson", "broyden", "phantom"),
        Part("gmres", TIGHT),
    ),
)


# ---- the search for a library's fastest configuration


class Found(NamedTuple):
    """A step that is accurate enough: its seconds, its two halves, its error, and evaluations and products it takes."""

    seconds: float
    step: Step
    halves: tuple[Part, Part]
    error: float


def _seconds(step: Step, rounds: int) -> float:
    """The thread's own: another process must not decide what is chosen."""
    spent: list[float] = []
    for _ in range(rounds):
        start = time.thread_time()
        step()
        spent.append(time.thread_time() - start)
    return min(spent)


def _tried(task: Training, step: Step) -> tuple[float, float]:
    """The error of its gradient, inf where it fails (a singular system, a state that is not finite), and seconds."""
    start = time.thread_time()
    try:
        found = task.error(step())
    except (RuntimeError, deqcore.DEQError):
        found = math.inf
    return (found if math.isfinite(found) else math.inf), time.thread_time() - start


def _ladder(part: Part) -> list[Part]:
    """The part at every level, the cheapest first."""
    return [part._replace(level=level) for level in (STEPS if part.counts else TOLERANCES)]


def _climbed(task: Training, library: Library, part: Part, forward: bool) -> tuple[list[Part], int, float] | None:
    """The ladder, the cheapest level whose error is small enough with the other half next to exact, and its time."""
    ladder = _ladder(part)

    def build(level: Part) -> Step:
        halves = (level, library.tight) if forward else (library.forward[0]._replace(level=TIGHT), level)
        return library.build(task, *halves, None if forward else task.z, _plain)

    seconds: dict[Part, float] = {}

    def does(level: Part) -> bool:
        error, seconds[level] = _tried(task, build(level))
        return error <= ACCURACY

    at = bisect_left(ladder, True, key=does)
    return None if at == len(ladder) else (ladder, at, seconds[ladder[at]])


def _halves(task: Training, library: Library, forward: bool) -> list[tuple[list[Part], int]]:
    """The fastest halves, with and without a number of steps found beforehand."""
    climbed = [_climbed(task, library, part, forward) for part in (library.forward if forward else library.backward)]
    ordered = sorted((found for found in climbed if found is not None), key=lambda found: found[2])
    by_tolerance = [found[:2] for found in ordered if not found[0][0].counts]
    return by_tolerance[:KEPT] + [found[:2] for found in ordered if found[0][0].counts]


def _candidates(
    task: Training, library: Library, forward: tuple[list[Part], int], backward: tuple[list[Part], int]
) -> Iterator[Found]:
    """The first level of the forward half that does for each of two levels of the backward half."""
    (fronts, front), (backs, back) = forward, backward
    for second in backs[back : back + 2]:
        # The steps of a phantom gradient move the state on, so the solve before them may be a coarser one.
        for first in fronts[0 if second.name == "phantom" else front : front + 2]:
            halves, error = _with_limits(task, library, first, second)
            if error <= ACCURACY:
                step = library.build(task, *halves, None, _plain)
                yield Found(_tried(task, step)[1], step, halves, error)
                break


def _with_limits(task: Training, library: Library, forward: Part, backward: Part) -> tuple[tuple[Part, Part], float]:
    """The halves with no higher step limits than they need, and the error of their gradient."""
    calls, passes, error = counted(task, library, forward, backward)
    return (forward._replace(limit=calls + 1), backward._replace(limit=passes + 3)), error


def counted(task: Training, library: Library, forward: Part, backward: Part) -> tuple[int, int, float]:
    """Evaluations of f, passes back through it, and the gradient's error, in one step."""
    counters: list[Counter] = []

    def watch(f: Callable[..., Tensor]) -> Counter:
        counters.append(Counter(f))
        return counters[-1]

    error, _ = _tried(task, library.build(task, forward, backward, None, watch))
    return counters[-1].calls, counters[-1].passes, error


def search(task: Training, library: Library) -> list[Found]:
    """The fastest configuration that stops by tolerances, and the fastest of all."""
    fronts, backs = _halves(task, library, True), _halves(task, library, False)
    found = [one for front in fronts for back in backs for one in _candidates(task, library, front, back)]
    found.sort(key=lambda one: one.seconds)
    chosen: list[Found] = []
    for free in (False, True):  # the first few, again and together, so that no other load decides
        these = [one for one in found if free or not any(half.counts for half in one.halves)][:3]
        if these:
            chosen.append(min(these, key=lambda one: _seconds(one.step, 3)))
    return chosen
