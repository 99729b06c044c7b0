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

from deqcore import Solution, Status, current_scope, get_deq

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


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(cases())
def test_a_solve_tells_the_truth(case: Case) -> None:
    check(case)


# ---- samples that are not finite


@pytest.mark.parametrize("solver", ["fixed_point_iter", "anderson", "broyden"])
@pytest.mark.parametrize("check_every", [1, 3])
@pytest.mark.parametrize("batch", [4, 70])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("call", [0, 3, 4, 5, 6])
def test_a_sample_recovers_from_one_bad_value(
    solver: str, check_every: int, batch: int, value: float, call: int
) -> None:
    fn = maps("tanh", batch, 7, DOUBLE)
    faulty = Faulty(fn, 1, frozenset({call}), None, value)
    deq = get_deq(f_solver=solver, f_tol=1e-8, f_max_iter=300, check_every=check_every).eval()
    (z,), info = deq(faulty, torch.zeros(batch, 7, dtype=DOUBLE))
    assert info.converged.all()
    assert (truth(fn, z, 1, "l2")[0] <= 1e-8).all()


@pytest.mark.parametrize("solver", ["fixed_point_iter", "anderson", "broyden"])
@pytest.mark.parametrize("options", [{"tol": 1e-8}, {"tol": 0.0}, {"tol": 1e-8, "return_final": True}], ids=str)
@pytest.mark.parametrize("batch", [4, 70])
@pytest.mark.parametrize("since", [0, 3])
@pytest.mark.parametrize("check_every", [1, 5])
def test_a_lost_sample_leaves_its_neighbours_alone(
    solver: str, options: dict[str, Any], batch: int, since: int, check_every: int
) -> None:
    fn = maps("tanh", batch, 7, DOUBLE)
    settings = {"name": solver, "max_iter": 240, **options}
    if solver == "broyden":
        settings["memory"] = 5  # which is decomposed when it is full, by a routine that refuses NaN
    deq = get_deq(solver=settings, check_every=check_every, on_failure="ignore").eval()
    faulty = Faulty(fn, 1, frozenset(), since, math.nan)
    (z,), info = deq(faulty, torch.zeros(batch, 7, dtype=DOUBLE))
    others = torch.arange(batch) != 1
    residual, _ = truth(fn, z, 1, "l2")
    assert (info["status"] == Status.NON_FINITE).tolist() == (~others).tolist()
    assert (residual[others] <= 1e-8).all()
    assert torch.allclose(info["abs_lowest"][others], residual[others], atol=1e-14)
    assert torch.isfinite(z).all()
    assert info.failed()


@pytest.mark.parametrize("check_every", [1, 4])
def test_a_lost_sample_is_called_off_after_three_failures(check_every: int) -> None:
    fn = maps("hard", 3, 5, DOUBLE)
    faulty = Faulty(fn, 1, frozenset(), 6, math.nan)
    deq = get_deq(f_tol=1e-6, f_max_iter=800, check_every=check_every, on_failure="ignore").eval()
    with torch.no_grad():
        (z,), info = deq(faulty, torch.zeros(3, 5, dtype=DOUBLE))
    assert info["status"].tolist() == [Status.CONVERGED, Status.NON_FINITE, Status.CONVERGED]
    assert info["nfe"] == faulty.count <= info["steps"].max() + 1 + 3
    assert truth(fn, z, 1, "l2")[0][1] < truth(fn, torch.zeros(3, 5, dtype=DOUBLE), 1, "l2")[0][1]


def test_nan_at_the_only_check_is_a_failure() -> None:
    """The unmonitored solver looks once; what stands in for NaN there is the start, and that is no result."""
    fn = maps("easy", 3, 5, DOUBLE)
    deq = get_deq(f_solver="simple_fixed_point_iter", f_max_iter=20, on_failure="ignore").eval()
    (z,), info = deq(Faulty(fn, 1, frozenset({7}), None, math.nan), torch.zeros(3, 5, dtype=DOUBLE))
    assert info["status"].tolist() == [Status.CONVERGED, Status.NON_FINITE, Status.CONVERGED]
    assert torch.equal(z[1], torch.zeros(5, dtype=DOUBLE))
    assert torch.allclose(info["abs_lowest"], truth(fn, z, 1, "l2")[0])


# ---- rows that depend on each other


@pytest.mark.parametrize("mode", ["abs", "rel"])
@pytest.mark.parametrize("batch_dims", [0, 1])
def test_news_that_travel_from_row_to_row_are_waited_for(mode: str, batch_dims: int) -> None:
    """Each row of a chain is still, with a residual of 0, until its neighbour's news arrive: it has not diverged."""
    size = 30
    links = torch.diag(torch.full((size - 1,), 0.9, dtype=DOUBLE), -1)
    source = torch.zeros(size, 1, dtype=DOUBLE)
    source[0] = 1
    deq = get_deq(f_tol=1e-10, f_stop_mode=mode, f_max_iter=100, batch_dims=batch_dims).eval()
    (z,), info = deq(lambda z: links @ z + source, torch.zeros(size, 1, dtype=DOUBLE))
    exact = torch.linalg.solve(torch.eye(size, dtype=DOUBLE) - links, source)
    assert info.converged.all()
    assert torch.allclose(z, exact, atol=1e-12)


# ---- when a run ends, and what it is called


@pytest.mark.parametrize("batch", [3, 70])
@pytest.mark.parametrize(
    ("kind", "options", "status"),
    [
        ("expanding", {"max_iter": 12}, Status.DIVERGED),
        ("expanding", {"max_iter": 12, "return_final": True}, Status.DIVERGED),
        ("expanding", {"max_iter": 12, "tol": 0.0}, Status.DIVERGED),
        ("flip", {"max_iter": 40}, Status.STALLED),
        ("hard", {"max_iter": 10}, Status.MAX_STEPS),
        ("easy", {"max_iter": 40}, Status.CONVERGED),
        ("easy", {"max_iter": 80, "tol": 1e-18}, Status.AT_PRECISION),
        ("easy", {"max_iter": 0}, Status.SKIPPED),
        ("identity", {"max_iter": 3}, Status.CONVERGED),
    ],
)
def test_the_status_says_what_happened(kind: str, options: dict[str, Any], status: Status, batch: int) -> None:
    fn = maps(kind, batch, 4, DOUBLE)
    deq = get_deq(solver={"name": "fixed_point_iter", **options}, on_failure="ignore").eval()
    _, info = deq(fn, torch.zeros(batch, 4, dtype=DOUBLE))
    assert set(info.counts()) <= {status, Status.CONVERGED if status == Status.AT_PRECISION else status}
    assert status in info.counts()
    assert info.failed() == (status not in (Status.CONVERGED, Status.AT_PRECISION, Status.SKIPPED))


@pytest.mark.parametrize("solver", ["fixed_point_iter", "anderson", "broyden"])
def test_a_run_of_fixed_length_that_ends_in_rounding_has_not_failed(solver: str) -> None:
    fn = maps("tanh", 70, 7, DOUBLE)
    deq = get_deq(f_solver=solver, f_tol=0.0, f_max_iter=400).eval()
    with torch.no_grad():
        _, info = deq(fn, torch.zeros(70, 7, dtype=DOUBLE))
    assert not info.failed()
    assert info["nfe"] == 401
    assert (info["abs_lowest"] < 1e-12).all()


@pytest.mark.parametrize("patience", [1, 3, 10])
def test_patience_counts_checks_without_improvement(patience: int) -> None:
    settings = {"name": "fixed_point_iter", "patience": patience, "max_iter": 100}
    _, info = get_deq(solver=settings, on_failure="ignore").eval()(lambda z: 1 - z, torch.zeros(2, 3))
    assert info["abs_trace"].shape == (2, patience + 1)
    assert (info["status"] == Status.STALLED).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("solver", ["fixed_point_iter", "anderson", "broyden"])
def test_half_precision_gets_as_far_as_it_can(dtype: torch.dtype, solver: str) -> None:
    """A tolerance of 1.5 spacings is within reach; "at precision" would be an excuse."""
    w, x = (_orthogonal(64) * 0.8).to(dtype), rand(8, 64, seed=2).to(dtype)
    tol = 1.5 * torch.finfo(dtype).eps
    deq = get_deq(f_solver=solver, f_tol=tol, f_stop_mode="rel", f_max_iter=60).eval()
    (z,), info = deq(lambda z: torch.tanh(z @ w + x), torch.zeros(8, 64, dtype=dtype))
    assert info.converged.all()
    residual, size = truth(lambda z: torch.tanh(z @ w + x), z, 1, "l2")
    assert (residual <= 1.0001 * tol * size).all()


# ---- counts, memory, second use


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ift": True},
        {"grad": 3, "n_states": 3},
        {"core": "indexing", "indexing": [2, 4], "ift": True},
        {"regularizers": ["jacobian"], "n_states": 2},
        {"check_every": 4},
        {"f_tol": 0.0},
    ],
    ids=str,
)
def test_every_evaluation_is_counted(solver: str, options: dict[str, Any], training: bool) -> None:
    w, x = _orthogonal(5) * 0.9, rand(9, 5).requires_grad_()
    counted = Faulty(lambda z: torch.tanh(z @ w + x), 0, frozenset(), None, 0.0)
    deq = get_deq(f_solver=solver, f_max_iter=20, on_failure="ignore", **options).train(training)
    z_out, info = deq(counted, torch.zeros(9, 5, dtype=DOUBLE), sradius_mode=True)
    assert info["nfe"] == counted.count
    assert (info["sample_nfe"] == counted.count).all()
    z_out[-1].sum().backward()
    assert info["nfe"] == counted.count


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("kind", ["identity", "view", "transposed", "easy"])
@pytest.mark.parametrize("options", [{"max_iter": 0}, {"max_iter": 3, "return_final": True}, {"tol": 1e3}], ids=str)
def test_the_result_is_not_z0s_memory(solver: str, kind: str, options: dict[str, Any]) -> None:
    fn = (lambda z: z.mT) if kind == "transposed" else maps(kind, 4, 4, DOUBLE)
    z0 = rand(4, 4)
    before = z0.clone()
    deq = get_deq(solver={"name": solver, **options}, on_failure="ignore").eval()
    with torch.no_grad():
        (z,), info = deq(fn, z0)
        z.add_(1)
        info["z"].add_(1)
    assert torch.equal(z0, before)


@pytest.mark.parametrize("solver", ["fixed_point_iter", "anderson", "broyden"])
@torch.no_grad()
def test_a_warm_start_can_be_repeated(solver: str) -> None:
    w, x = _orthogonal(7) * 0.9, rand(5, 7)
    zero = torch.zeros(5, 7, dtype=DOUBLE)
    deq = get_deq(f_solver=solver, f_tol=1e-8, f_max_iter=300, keep_state=True).eval()
    _, first = deq(lambda z: torch.tanh(z @ w + x), zero)
    results = [deq(lambda z: torch.tanh(z @ w + 1.05 * x), zero, warm_start=first) for _ in range(2)]
    assert torch.equal(results[0][0][0], results[1][0][0])
    _, cold = deq(lambda z: torch.tanh(z @ w + 1.05 * x), zero)
    assert results[0][1]["nfe"] == results[1][1]["nfe"] < cold["nfe"]
    _, again = deq(lambda z: torch.tanh(z @ w + x), zero, warm_start=first)
    assert again["nfe"] == 1
    assert (truth(lambda z: torch.tanh(z @ w + 1.05 * x), results[0][0][0], 1, "l2")[0] <= 1e-8).all()


@pytest.mark.parametrize("training", [True, False])
def test_an_error_in_f_passes_through_and_leaves_nothing_behind(training: bool) -> None:
    class Own(Exception):
        pass

    deq = get_deq().train(training)

    def fails(z: Tensor) -> Tensor:
        raise Own

    with pytest.raises(Own):
        deq(fails, torch.zeros(2, 3))
    assert current_scope() is None
    assert deq(torch.cos, torch.zeros(2, 3))[1].converged.all()


@pytest.mark.parametrize("training", [True, False])
def test_a_run_that_is_judged_at_its_end_tells_of_divergence(training: bool) -> None:
    deq = get_deq(f_solver="simple_fixed_point_iter", f_max_iter=30, on_failure="ignore").train(training)
    _, info = deq(maps("expanding", 3, 4, DOUBLE), torch.zeros(3, 4, dtype=DOUBLE))
    assert (info["status"] == Status.DIVERGED).all()
    assert info.failed()
    deq = get_deq(f_solver="simple_fixed_point_iter", f_max_iter=3, f_tol=1e-9, on_failure="ignore").train(training)
    _, info = deq(maps("hard", 3, 4, DOUBLE), torch.zeros(3, 4, dtype=DOUBLE))
    assert (info["status"] == Status.MAX_STEPS).all()
    assert not info.failed()  # no tolerance was aimed at


@pytest.mark.parametrize("keep_trace", [True, False])
@pytest.mark.parametrize("options", [{"tol": 0.0}, {"return_final": True}, {}], ids=str)
def test_divergence_is_told_without_a_trace(keep_trace: bool, options: dict[str, Any]) -> None:
    settings = {"name": "fixed_point_iter", "max_iter": 12, **options}
    deq = get_deq(solver=settings, keep_trace=keep_trace, on_failure="ignore").eval()
    _, info = deq(maps("expanding", 3, 4, DOUBLE), torch.zeros(3, 4, dtype=DOUBLE))
    assert (info["status"] == Status.DIVERGED).all()


@pytest.mark.parametrize("check_every", [1, 4, 100])
def test_sampled_states_are_those_of_their_steps(check_every: int) -> None:
    deq = get_deq(core="indexing", indexing=[2, 5], f_max_iter=9, f_tol=0.0, check_every=check_every)
    z_out, _ = deq(lambda z: 0.5 * z + 1, torch.zeros(2, 3, dtype=DOUBLE))
    for z, step in zip(z_out, (2, 5, 9), strict=True):
        assert torch.allclose(z, torch.full_like(z, 2 - 2 * 0.5 ** (step + 1)))
