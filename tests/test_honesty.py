"""What a solve says of itself, against f evaluated again at the state that it returned."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from deqcore import Solution, Status, get_deq

DOUBLE = torch.float64
SOLVERS = ("fixed_point_iter", "simple_fixed_point_iter", "anderson", "broyden")
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.complex128)
#: Spacings of the dtype below which a residual counts as rounding error: sums are kept wider than half precision.
FLOOR = {torch.float16: 1.0, torch.bfloat16: 1.0}

Map = Callable[[Tensor], Tensor]


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _orthogonal(size: int) -> Tensor:
    return torch.linalg.qr(rand(size, size, seed=1))[0]


def maps(kind: str, batch: int, size: int, dtype: torch.dtype) -> Map:
    w, x = _orthogonal(size).to(dtype), rand(batch, size, seed=2).to(dtype)
    spread = torch.linspace(0.05, 1.0, batch, dtype=DOUBLE)[:, None].to(dtype)
    links = (rand(batch, batch, seed=3) / (2 * batch)).to(dtype)
    real = dtype.is_floating_point
    table: dict[str, Map] = {
        "easy": lambda z: 0.3 * (z @ w) + x,
        "hard": lambda z: 0.97 * (z @ w) + x,
        "uneven": lambda z: 0.95 * spread * (z @ w) + x,
        "tanh": lambda z: torch.tanh(0.9 * (z @ w) + x) if real else 0.5j * z + x,
        "expanding": lambda z: 3.0 * z + x,
        "exploding": lambda z: 100.0 * z * z + x,
        "flip": lambda z: -z + x,
        "kinked": lambda z: torch.relu(1.2 * (z @ w) + x) if real else z * 0.1,
        "chaotic": lambda z: 3.9 * z * (1 - z),
        "constant": lambda z: x,
        "expanded": lambda z: x[:, :1].expand(batch, size),
        "identity": lambda z: z,
        "view": lambda z: z.view_as(z),
        "strided": lambda z: (0.5 * z.mT.contiguous() + x.mT).mT,
        "coupled": lambda z: 0.9 * (links @ z) @ w + x,
        "shifted": lambda z: 0.9 * z.roll(1, 0) + 0.01 * x,
        "tiny": lambda z: 0.5 * z + 1e-6 * x,
        "huge": lambda z: 0.5 * z + 1e4 * x,
    }
    return table[kind]


KINDS = (
    *("easy", "hard", "uneven", "tanh", "expanding", "exploding", "flip", "kinked", "chaotic", "constant", "expanded"),
    *("identity", "view", "strided", "coupled", "shifted", "tiny", "huge"),
)


EXPLOSIVE = ("exploding", "expanding", "chaotic", "kinked", "huge")


class Faulty:
    """f, counted, which gives NaN or inf in one row at some of its calls."""

    def __init__(self, fn: Map, row: int, calls: frozenset[int], since: int | None, value: float) -> None:
        self.fn = fn
        self.row = row
        self.calls = calls
        self.since = since
        self.value = value
        self.count = 0

    def __call__(self, z: Tensor) -> Tensor:
        call, self.count = self.count, self.count + 1
        out = self.fn(z)
        if call in self.calls or (self.since is not None and call >= self.since):
            out = out.clone()
            out.reshape(out.shape[0], -1)[self.row] = self.value
        return out


class Case(NamedTuple):
    solver: str
    kind: str
    batch: int
    size: int
    dtype: torch.dtype
    options: dict[str, Any]
    check_every: int
    batch_dims: int
    start: int
    faults: frozenset[int]
    since: int | None
    value: float


@st.composite
def cases(draw: Any) -> Case:
    tol = draw(st.sampled_from([0.0, 1e-12, 1e-6, 1e-4, 1e-3, 0.1, 1e3]))
    options = {
        "max_iter": draw(st.sampled_from([0, 1, 2, 3, 10, 40, 60])),
        "return_final": draw(st.sampled_from([False, False, False, True])),
        "residual_norm": draw(st.sampled_from(["l2", "l2", "rms", "max"])),
        "patience": draw(st.sampled_from([None, None, None, 3])),
    }
    if draw(st.booleans()):
        options |= {"tol": tol, "stop_mode": draw(st.sampled_from(["abs", "rel"]))}
    else:
        options |= {"atol": tol, "rtol": draw(st.sampled_from([0.0, 1e-5, 1e-2]))}
    solver = draw(st.sampled_from(SOLVERS))
    if solver == "anderson":
        options["memory"] = draw(st.sampled_from([1, 2, 5, 10]))
    if solver == "broyden":
        options["memory"] = draw(st.sampled_from([0, 1, 3, 30]))
        options["line_search"] = draw(st.booleans())
    if draw(st.sampled_from([False, False, True])) and solver in ("fixed_point_iter", "anderson"):
        options["damping"] = draw(st.sampled_from([0.1, 0.7, 1.5]))
    return Case(
        solver,
        draw(st.sampled_from(KINDS)),
        draw(st.sampled_from([1, 2, 8, 9, 64, 80])),
        draw(st.sampled_from([1, 2, 7, 33])),
        draw(st.sampled_from(DTYPES)),
        options,
        draw(st.sampled_from([1, 1, 2, 7])),
        draw(st.sampled_from([1, 1, 1, 0])),
        draw(st.integers(0, 2)),
        draw(st.frozensets(st.integers(0, 12), max_size=4)) if draw(st.booleans()) else frozenset(),
        draw(st.sampled_from([None, None, None, 0, 3])),
        draw(st.sampled_from([math.nan, math.inf])),
    )


def truth(fn: Map, z: Tensor, batch_dims: int, norm: str) -> tuple[Tensor, Tensor]:
    """Residual and size of every sample, by one more evaluation of f, in float64."""

    def flat(t: Tensor) -> Tensor:
        parts = torch.view_as_real(t) if t.is_complex() else t
        return parts.double().reshape(t.shape[0] if batch_dims else 1, -1)

    fz = flat(fn(z))
    order = math.inf if norm == "max" else 2
    factor = fz.shape[1] ** -0.5 if norm == "rms" else 1.0
    norms = [torch.linalg.vector_norm(t, order, 1) * factor for t in (fz - flat(z), fz)]
    return norms[0], norms[1]


def targets(options: dict[str, Any], size: Tensor) -> Tensor:
    if "rtol" in options:
        return options["atol"] + options["rtol"] * size
    return options["tol"] * (size if options["stop_mode"] == "rel" else torch.ones_like(size))


def check(case: Case) -> Solution:
    fn = maps(case.kind, case.batch, case.size, case.dtype)
    z0 = (0.3 * case.start * rand(case.batch, case.size, seed=4)).to(case.dtype)
    before = z0.clone()
    faulty = Faulty(fn, case.batch // 2, case.faults, case.since, case.value)
    deq = get_deq(
        solver={"name": case.solver, **case.options},
        check_every=case.check_every,
        batch_dims=case.batch_dims,
        on_failure="ignore",
    ).eval()
    with torch.no_grad():
        (z,), info = deq(faulty, z0)
        consistent(case, info, faulty.count)
        assert torch.equal(z0, before)
        assert z.shape == z0.shape
        assert z.dtype == z0.dtype
        assert torch.isfinite(z).all()
        if case.options["max_iter"] == 0:
            assert faulty.count == 0
            assert torch.equal(z, z0)
            assert (info["status"] == Status.SKIPPED).all()
        else:
            honest(case, info, *truth(fn, z, case.batch_dims, case.options["residual_norm"]))
    return info


def consistent(case: Case, info: Solution, calls: int) -> None:
    batch = case.batch if case.batch_dims else 1
    limit = case.options["max_iter"]
    assert info["nfe"] == calls
    for key in ("abs_lowest", "rel_lowest", "nstep", "status", "steps", "sample_nfe"):
        assert info[key].shape == (batch,), key
    judged = info["abs_trace"].shape[1]
    assert info["abs_trace"].shape == info["rel_trace"].shape == (batch, judged)
    assert 1 <= judged <= max(limit // case.check_every + 2, 1)
    assert (info["steps"] >= 0).all()
    assert (info["steps"] <= limit).all()
    assert (info["nstep"] <= limit).all()


def honest(case: Case, info: Solution, residual: Tensor, size: Tensor) -> None:
    status = info["status"]
    eps = torch.finfo(case.dtype).eps
    wide = torch.float64 if case.dtype in (torch.float64, torch.complex128) else torch.float32
    noise = 8 * torch.finfo(wide).eps * size + torch.finfo(wide).tiny ** 0.5  # squares below underflow in a norm
    known = status != Status.NON_FINITE
    target = targets(case.options, size)
    floor = max(4 * torch.finfo(wide).eps, FLOOR.get(case.dtype, 4.0) * eps) * size
    claimed = info["abs_lowest"].double()
    assert (~known | ((claimed - residual).abs() <= 1e-4 * residual + noise)).all(), (claimed, residual, status)
    relative = torch.where(size > 0, info["rel_lowest"].double() * size, residual)
    assert (~known | ((relative - residual).abs() <= 1e-4 * residual + noise)).all()
    converged = status == Status.CONVERGED
    assert (~converged | (residual <= 1.0001 * target + noise)).all(), (residual, target, status)
    at_precision = status == Status.AT_PRECISION
    assert (~at_precision | (residual <= 1.0001 * floor + noise)).all(), (residual, floor, status)
    # And the other way round: what is within the tolerance is not called a failure.
    missed = known & (residual <= 0.9999 * target - noise) & ~converged
    assert not missed.any(), (residual, target, status)
    if not case.faults and case.since is None and case.dtype != torch.float16 and case.kind not in EXPLOSIVE:
        assert known.all()


@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(cases())
def test_a_solve_tells_the_truth(case: Case) -> None:
    check(case)
