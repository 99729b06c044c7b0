"""Solves drawn at random, each checked by one more evaluation of f: what is called converged must be."""

from __future__ import annotations

import math
import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic.fields import FieldInfo
from torch import Tensor
from torch.utils import _pytree as pytree

from ..choice import choice_of
from ..config import DEQConfig
from ..deq import get_deq
from ..errors import BrokenPluginError, ConfigError, DEQError
from ..registry import registry
from ..settings import Settings, SolverSettings
from ..solution import Solution, Status
from .random_maps import COUPLED, KINDS, random_map

__all__ = ["Outcome", "RandomCase", "installed", "random_case", "random_cases"]

REAL = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
DTYPES = (*REAL, torch.float32, torch.float64, torch.complex64, torch.complex128)
#: Values tried for a solver's own numbers, as far as their bounds allow.
NUMBERS = (0.0, 1e-10, 1e-3, 0.1, 0.4, 0.9, 1.0, 1.4, 3.0, 1e4)
COUNTS = (0, 1, 2, 3, 5, 10, 30)


def installed(kind: str) -> list[str]:
    """Names of this kind whose implementations load, sorted."""
    names: list[str] = []
    for name in registry.names(kind):
        try:
            registry.get(kind, name)
        except BrokenPluginError:
            continue
        names.append(name)
    return names


@dataclass
class Outcome:
    """What came of a case: how many samples ended how, what was refused, and what should not have happened."""

    statuses: Counter[Status] = field(default_factory=lambda: Counter())
    refused: str = ""
    violations: list[str] = field(default_factory=lambda: [])


@dataclass(frozen=True)
class RandomCase:
    """One solve: a map, a state, settings, and evaluations at which one sample gets NaN or inf.

    Attributes:
        seed: what x, the start and the map's matrix are drawn from.
        solver: the solver's table.
        config: further keywords of get_deq.
        kind: of the map, see :mod:`deqcore.testing.random_maps`.
        layout: of the state: ``flat`` (B, F), ``image`` (B, F, 1, 1), ``tuple`` or ``dict`` of two tensors.
        faults: evaluations of f that give `value` in the sample `row`; from `since` on all do.
        start: standard deviation of z0.
        again: solve twice, the second time warm started.
    """

    seed: int
    solver: dict[str, Any]
    config: dict[str, Any]
    kind: str
    layout: str
    batch: int
    features: int
    dtype: torch.dtype
    row: int
    faults: tuple[int, ...]
    since: int | None
    value: float
    start: float
    again: bool

    # ---- the map

    def pose(self) -> tuple[Callable[..., Any], Any, Tensor]:
        """(fn, z0, x); fn is called with the state as `layout` says, then x and each sample's number."""
        generator = torch.Generator().manual_seed(self.seed)
        flat = random_map(self.kind, self.features, self.dtype, generator)
        shape = (self.batch, self.features)
        x, start = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
        if self.dtype.is_complex:
            x, start = torch.complex(x, x.roll(1, 0)), torch.complex(start, start.roll(1, 1))
        split = max(1, self.features // 2)

        def shaped(z: Tensor) -> Any:
            if self.layout == "image":
                return z[:, :, None, None]
            if self.layout == "flat" or self.features == 1:
                return z
            parts = z[:, :split], z[:, split:]
            return parts if self.layout == "tuple" else {"a": parts[0], "b": parts[1]}

        def joined(tree: Any) -> Tensor:
            return torch.cat([leaf.reshape(leaf.shape[0], -1) for leaf in pytree.tree_leaves(tree)], 1)

        as_arguments = isinstance(shaped(x), tuple)

        def fn(*arguments: Any) -> Any:
            state, (x, _) = (arguments[:-2] if as_arguments else arguments[0]), arguments[-2:]
            return shaped(flat(joined(state), x))

        return fn, shaped((self.start * start).to(self.dtype)), x.to(self.dtype)

    def faulty(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """`fn` with its faults."""
        calls = -1

        def f(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            out, number = fn(*arguments), arguments[-1]
            if calls not in self.faults and (self.since is None or calls < self.since):
                return out
            hit = number == self.row

            def spoil(leaf: Tensor) -> Tensor:
                return torch.where(hit.reshape(-1, *[1] * (leaf.dim() - 1)), self.value, leaf)

            return pytree.tree_map(spoil, out)

        return f

    # ---- the solve

    def run(self) -> Outcome:
        """Solve and check. Warnings are errors here."""
        outcome = Outcome()
        fn, z0, x = self.pose()
        before = pytree.tree_map(torch.clone, z0)
        args = (x, torch.arange(self.batch))
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("error")
                warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, on the first forward derivative
                deq = get_deq(solver=self.solver, **self.config).eval()
                settings: Any = deq.solver.settings
                before_it: Solution | None = None
                for _ in range(1 + self.again):
                    z_out, info = deq(self.faulty(fn), z0, args=args, warm_start=before_it)
                    outcome.statuses.update(info.counts())
                    outcome.violations += self.check(fn, z_out[-1], args, info, settings)
                    before_it = info
        except ConfigError as error:
            outcome.refused = f"{type(error).__name__}: {error}"
        except DEQError as error:
            outcome.refused = type(error).__name__
        except Exception as error:
            outcome.violations.append(f"raised {type(error).__name__}: {error}")
        if not all(torch.equal(*pair) for pair in zip(*map(pytree.tree_leaves, (z0, before)), strict=True)):
            outcome.violations.append("z0 was changed")
        return outcome

    def check(self, fn: Callable[..., Any], z: Any, args: Any, info: Solution, settings: SolverSettings) -> list[str]:
        """What is wrong with a solution."""
        z = tuple(z) if isinstance(z, list) else z
        leaves = pytree.tree_leaves(z)
        if any(leaf.dtype is not self.dtype for leaf in leaves):
            return [f"returned {[leaf.dtype for leaf in leaves]}"]
        if not all(bool(torch.isfinite(leaf).all()) for leaf in leaves):
            return ["the state returned is not finite"]
        fz = fn(*z, *args) if isinstance(z, tuple) else fn(z, *args)
        residual, size = self._norms(fz, z, settings.residual_norm)
        atol, rtol = settings.thresholds()
        wide = torch.finfo(torch.promote_types(self.dtype.to_real(), torch.float32))
        noise = 16 * wide.eps * size + wide.tiny**0.5  # squares of smaller numbers are lost in a norm
        limit = (atol + rtol * size) * 1.0001 + noise
        converged = (info["status"] == Status.CONVERGED).cpu()
        found: list[str] = []
        if bool((converged & ~(residual <= limit)).any()):
            worst = int(torch.where(converged, residual - limit, -math.inf).nan_to_num(math.inf).argmax())
            found.append(
                f"sample {worst} is called converged: residual {residual[worst]:.3e}, tolerance "
                f"{atol + float(rtol * size[worst]):.3e}, reported {float(info['abs_lowest'][worst]):.3e}"
            )
        return found

    def _norms(self, fz: Any, z: Any, norm: str) -> tuple[Tensor, Tensor]:
        """Residual and size of every equilibrium, float64."""

        def flat(tree: Any) -> Tensor:
            parts = [torch.view_as_real(t) if t.is_complex() else t for t in pytree.tree_leaves(tree)]
            whole = torch.cat([part.double().reshape(self.batch, -1) for part in parts], 1)
            return whole if self.config["batch_dims"] else whole.reshape(1, -1)

        image, order = flat(fz), math.inf if norm == "max" else 2
        factor = image.shape[1] ** -0.5 if norm == "rms" else 1.0
        residual, size = (factor * torch.linalg.vector_norm(t, order, 1) for t in (image - flat(z), image))
        return residual, size


# ---- drawing


def random_case(seed: int, solver: str) -> RandomCase:
    """The case of this number for this solver; the same for ever, as long as the settings that exist are."""
    draw = random.Random(f"{seed} {solver}")
    kind = draw.choice(KINDS)
    config = _config(draw, kind)
    whole = config["batch_dims"] == 0
    batch = draw.choice((1, 2, 3, 8, 9, 20) if whole else (1, 2, 3, 8, 9, 20, 70))
    faulty = draw.random() < 0.4
    return RandomCase(
        seed=seed,
        solver={"name": solver, **_common(draw), **_own(draw, registry.get("solvers", solver).settings_type)},
        config=config,
        kind=kind,
        layout=draw.choice(("flat", "flat", "image", "tuple", "dict")),
        batch=batch,
        features=draw.choice((1, 2, 5, 7) if whole else (1, 2, 5, 7, 33)),
        dtype=draw.choice(DTYPES),
        row=draw.randrange(batch),
        faults=tuple(sorted(draw.sample(range(14), draw.randrange(5)))) if faulty else (),
        since=draw.choice((None, None, None, 0, 4)) if faulty else None,
        value=draw.choice((math.nan, math.inf, -math.inf)),
        start=draw.choice((0.0, 0.1, 1.0, 1.0, 100.0)),
        again=draw.random() < 0.1,
    )


def random_cases(count: int, solvers: Sequence[str] | None = None) -> Iterator[RandomCase]:
    """The first `count` cases, the solvers (by default all that load) taking turns."""
    names = installed("solvers") if solvers is None else list(solvers)
    for seed in range(count):
        yield random_case(seed, names[seed % len(names)])


def _common(draw: random.Random) -> dict[str, Any]:
    """What every solver has."""
    tol = draw.choice((0.0, 1e-14, 1e-9, 1e-6, 1e-4, 1e-3, 1e-2, 0.3, 1e3))
    if draw.random() < 0.5:
        given: dict[str, Any] = {"tol": tol, "stop_mode": draw.choice(("abs", "rel"))}
    else:
        given = {"atol": tol, "rtol": draw.choice((0.0, 1e-9, 1e-5, 1e-2))}
    given["max_iter"] = draw.choice((0, 1, 2, 3, 5, 12, 40, 40, 80))
    rare: dict[str, tuple[Any, ...]] = {
        "residual_norm": ("rms", "max"),
        "return_final": (True,),
        "patience": (1, 3, 10),
        "max_nfe": (1, 2, 7, 30),
        "divergence_factor": (2.0, 1e3, math.inf),
    }
    return given | {key: draw.choice(values) for key, values in rare.items() if draw.random() < 0.2}


def _config(draw: random.Random, kind: str) -> dict[str, Any]:
    config: dict[str, Any] = {
        "on_failure": draw.choice(("ignore", "ignore", "ignore", "raise")),
        "batch_dims": draw.choice((1, 1, 1, 0)),
        "check_every": draw.choice((1, 1, 1, 2, 5)),
        "keep_state": draw.random() < 0.3,
        "keep_trace": draw.random() < 0.7,
    }
    if "compact" in DEQConfig.model_fields and kind not in COUPLED and config["batch_dims"]:
        config["compact"] = draw.random() < 0.4
    return config


def _own(draw: random.Random, model: type[Settings]) -> dict[str, Any]:
    """Some of a solver's own settings, each at a value that its type and bounds allow."""
    given: dict[str, Any] = {}
    for name in model.own_fields():
        if draw.random() < 0.3:
            values = _values(model.model_fields[name])
            if values:
                given[name] = draw.choice(values)
    return given


def _values(field: FieldInfo) -> list[Any]:
    kind = choice_of(field)
    if kind:
        return [{"name": name} for name in installed(kind)] if kind in ("any_solvers", "linear_solvers") else []
    parts = getattr(field.annotation, "__args__", (field.annotation,))
    if isinstance(parts[0], str | int):  # a Literal
        return list(parts)
    if bool in parts:
        return [False, True]
    numbers = NUMBERS if float in parts else COUNTS if int in parts else ()
    return [value for value in numbers if _within(value, field)]


def _within(value: float, field: FieldInfo) -> bool:
    tests: dict[str, Callable[[Any], bool]] = {
        "ge": lambda bound: value >= bound,
        "gt": lambda bound: value > bound,
        "le": lambda bound: value <= bound,
        "lt": lambda bound: value < bound,
    }
    return all(test(getattr(mark, key)) for mark in field.metadata for key, test in tests.items() if hasattr(mark, key))
