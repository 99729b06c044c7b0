"""Linear solvers against dense solves, least squares over Krylov spaces and counts of products."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deqcore import (
    ConfigError,
    ConfigTypeError,
    ConvergenceError,
    ConvergenceWarning,
    DEQConfig,
    FunctionError,
    FunctionTypeError,
    GradientModeError,
    LinearProblem,
    LinearSolver,
    SolverSettings,
    StateError,
    StateTypeError,
    Status,
    Step,
    UnknownKeyError,
    UnknownPluginError,
    get_deq,
    iterate,
    registry,
)
from deqcore.linear import linear_solve

DOUBLE = torch.float64
KRYLOV = ["gmres", "bicgstab", "cg"]
ALL = [*KRYLOV, "neumann", "dense"]


def rand(*shape, seed=0, dtype=DOUBLE):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE).to(dtype)


class Counted:
    """u -> (I - M) u for matrices M, (B, F, F), counted."""

    def __init__(self, matrix):
        self.matrix = matrix
        self.calls = 0

    def __call__(self, u):
        self.calls += 1
        return u - torch.einsum("bij,bj->bi", self.matrix, u)


def solve(solver, matrix, b, tol=1e-9, max_iter=400, start=None, **options):
    """(solution, counted product) of M u = b from `start`, or from zero, where the residual is known."""
    product = Counted(matrix)
    problem = LinearProblem(product, Counted(matrix.mT), b)
    if isinstance(solver, str):
        solver = registry.create("linear_solvers", {"name": solver, "tol": tol, "max_iter": max_iter, **options})
    first = b if start is None else None
    start = torch.zeros_like(b) if start is None else start
    run = iterate(solver, problem, start, first, scale=torch.linalg.vector_norm(b, dim=1).clamp_min(1e-300))
    assert run.solution["nfe"] == product.calls == problem.nfe
    return run.solution, product


def residuals(matrix, b, u):
    matrix, b, u = matrix.double(), b.double(), u.double()
    return torch.linalg.vector_norm(b - torch.einsum("bij,bj->bi", matrix, u), dim=1)


def exact(matrix, b):
    return torch.linalg.solve(matrix, b[..., None])[..., 0]


# ---- matrices M = I - A


def definite(batch=4, size=12):
    a = rand(batch, size, size, seed=1)
    return a @ a.mT / size + 0.3 * torch.eye(size, dtype=DOUBLE)


def general(batch=4, size=12):
    return torch.eye(size, dtype=DOUBLE) + 0.6 * rand(batch, size, size, seed=2) / math.sqrt(size)


def indefinite(batch=4, size=12):
    q = torch.linalg.qr(rand(batch, size, size, seed=3))[0]
    values = torch.linspace(0.4, 2.0, size, dtype=DOUBLE) * (-1.0) ** torch.arange(size)
    return q * values @ q.mT


def defective(batch=4, size=12):
    """One Jordan block a sample: a single eigenvalue, a single eigenvector."""
    eye = torch.eye(size, dtype=DOUBLE)
    return torch.stack(
        [(1 + 0.1 * k) * eye + torch.diag(torch.full((size - 1,), 0.9, dtype=DOUBLE), 1) for k in range(batch)]
    )


def non_normal(batch=4, size=40):
    """Grcar's matrix: its eigenvalues say little about how GMRES converges."""
    ones = [torch.diag(torch.ones(size - abs(k), dtype=DOUBLE), k) for k in (-1, 0, 1, 2, 3)]
    return (sum(ones) - 2 * ones[0]).expand(batch, -1, -1).contiguous()


def rotation(batch=4, size=12):
    """I + S with S skew."""
    a = rand(batch, size, size, seed=4)
    return torch.eye(size, dtype=DOUBLE) + 0.3 * (a - a.mT)


def identity(batch=4, size=12):
    return torch.eye(size, dtype=DOUBLE).expand(batch, -1, -1).contiguous()


def single(batch=4, size=1):
    return rand(batch, size, size, seed=5).abs() + 0.5


def mixed(batch=4, size=12):
    """Every sample a system of another kind."""
    return torch.stack([definite()[0], 3 * general()[1], 0.5 * identity()[2], defective()[3]])


MATRICES = [definite, general, indefinite, defective, non_normal, rotation, identity, single, mixed]
SYMMETRIC = [definite, identity, single]
CLAIMS = [
    *(("gmres", make) for make in MATRICES),
    *(("dense", make) for make in MATRICES),
    *(("bicgstab", make) for make in (definite, general, defective, rotation, identity, single, mixed)),
    *(("cg", make) for make in SYMMETRIC),
]


@pytest.mark.parametrize(("solver", "make"), CLAIMS)
@pytest.mark.parametrize("batch", [1, 4, 12])
def test_solution_is_the_dense_one(solver, make, batch):
    matrix = make()[torch.arange(batch) % 4]
    b = rand(batch, matrix.shape[1], seed=7)
    found, _ = solve(solver, matrix, b, tol=1e-11)
    assert found.converged.all()
    torch.testing.assert_close(found["z"], exact(matrix, b), rtol=1e-7, atol=1e-8)
    # A residual of a recurrence differs from the true one by rounding; this is the true one.
    torch.testing.assert_close(found["abs_lowest"], residuals(matrix, b, found["z"]), rtol=1e-4, atol=1e-14)


@pytest.mark.parametrize(("solver", "make"), CLAIMS)
def test_from_another_start(solver, make):
    matrix = make()
    b, start = rand(4, matrix.shape[1], seed=7), rand(4, matrix.shape[1], seed=8)
    before = start.clone()
    found, _ = solve(solver, matrix, b, tol=1e-11, start=start)
    assert found.converged.all() and torch.equal(start, before)
    torch.testing.assert_close(found["z"], exact(matrix, b), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize(("solver", "make"), CLAIMS)
def test_transposed_products(solver, make):
    matrix = make()
    b = rand(4, matrix.shape[1], seed=7)
    chosen = registry.create("linear_solvers", {"name": solver, "tol": 1e-11, "max_iter": 400})
    found = iterate(chosen, LinearProblem(Counted(matrix.mT), Counted(matrix), b), torch.zeros_like(b), b).solution
    torch.testing.assert_close(found["z"], exact(matrix.mT, b), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("damping", [1.0, 0.4, 1.1])
def test_neumann_sums_its_series(damping):
    a = 0.7 * torch.linalg.qr(rand(3, 6, 6))[0]
    matrix, b = torch.eye(6, dtype=DOUBLE) - a, rand(3, 6, seed=7)
    found, product = solve("neumann", matrix, b, tol=0, max_iter=5, damping=damping, return_final=True)
    u = torch.zeros_like(b)
    for _ in range(5):
        u = (1 - damping) * u + damping * (torch.einsum("bij,bj->bi", a, u) + b)
    torch.testing.assert_close(found["z"], u)
    assert product.calls == 5
    found, _ = solve("neumann", matrix, b, tol=1e-10, damping=damping)
    assert found.converged.all()
    torch.testing.assert_close(found["z"], exact(matrix, b))


def test_neumann_says_that_it_diverges():
    matrix = -torch.eye(4, dtype=DOUBLE).expand(3, -1, -1)
    found, product = solve("neumann", matrix, rand(3, 4))
    assert (found["status"] == Status.DIVERGED).all()
    assert product.calls < 60


# ---- gmres


def krylov_residuals(matrix, b, steps):
    """Smallest residual over span(b, M b, ..., M^(k-1) b) for k = 1 .. steps, by Arnoldi and least squares."""
    basis, lowest = [b / b.norm()], []
    for _ in range(steps):
        images = matrix @ torch.stack(basis, 1)
        weights = torch.linalg.lstsq(images, b[:, None], driver="gelsd").solution
        lowest.append((b - (images @ weights)[:, 0]).norm())
        v = images[:, -1]
        for _ in range(2):
            for q in basis:
                v = v - (q @ v) * q
        if v.norm() < 1e-13:
            break
        basis.append(v / v.norm())
    return torch.stack(lowest)


@pytest.mark.parametrize("make", MATRICES)
def test_gmres_has_the_smallest_residual_at_every_step(make):
    matrix = make()
    b = rand(4, matrix.shape[1], seed=7)
    found, _ = solve("gmres", matrix, b, tol=1e-12, max_iter=matrix.shape[1])
    for row in range(4):
        best = krylov_residuals(matrix[row], b[row], matrix.shape[1])
        ours = found["abs_trace"][row, 1 : len(best) + 1]
        best = best[: len(ours)]
        assert (ours <= best * (1 + 1e-6) + 1e-12 * b[row].norm()).all()


def test_gmres_where_nothing_moves_until_the_last_step():
    """With a cyclic shift, the smallest residual stays ||b|| for F - 1 steps, and then is 0."""
    size = 16
    matrix = torch.roll(torch.eye(size, dtype=DOUBLE), 1, 0).expand(2, -1, -1).contiguous()
    b = torch.eye(size, dtype=DOUBLE)[[0, 3]]
    found, product = solve("gmres", matrix, b, max_iter=size + 3)
    assert found.converged.all()
    assert product.calls == size + 1  # one to confirm
    torch.testing.assert_close(found["z"], exact(matrix, b))


@pytest.mark.parametrize("make", MATRICES)
def test_gmres_needs_no_more_products_than_there_are_features(make):
    matrix = make()
    found, product = solve("gmres", matrix, rand(4, matrix.shape[1], seed=7), tol=1e-8)
    assert found.converged.all()
    assert product.calls <= matrix.shape[1] + 1


@pytest.mark.parametrize("restart", [1, 2, 5, 12])
def test_gmres_with_a_small_memory(restart):
    matrix, b = definite(4, 60), rand(4, 60, seed=7)
    found, product = solve("gmres", matrix, b, restart=restart, max_iter=2000)
    assert found.converged.all()
    torch.testing.assert_close(found["z"], exact(matrix, b), rtol=1e-6, atol=1e-7)
    trace = found["abs_trace"]
    assert (trace[:, 1:-1] <= trace[:, :-2] * (1 + 1e-9)).all()  # never rises, a full memory or not
    if restart == 12:
        _, whole = solve("gmres", matrix, b)
        assert product.calls <= 1.5 * whole.calls


def test_gmres_memory_is_what_it_says():
    solver = registry.create("linear_solvers", {"name": "gmres", "restart": 7, "max_iter": 1000})
    b = rand(3, 20)
    state = solver.init(LinearProblem(Counted(general(3, 20)), None, b), torch.zeros_like(b), b)
    held = {t.data_ptr(): t.numel() for t in vars(state).values() if isinstance(t, torch.Tensor)}
    assert sum(held.values()) <= (2 * 7 + 5) * b.numel()


@pytest.mark.parametrize("terms", [None, 1, 3])
def test_neumann_preconditioner(terms):
    matrix, b = general(4, 30), rand(4, 30, seed=7)
    plain, _ = solve("gmres", matrix, b)
    options = {} if terms is None else {"terms": terms}
    found, product = solve("gmres", matrix, b, preconditioner="neumann", **options)
    assert found.converged.all()
    torch.testing.assert_close(found["z"], exact(matrix, b), rtol=1e-6, atol=1e-7)
    steps = int(found["steps"].max())
    assert steps < int(plain["steps"].max())
    assert product.calls == steps * (1 + (terms or 1)) + 1


def test_a_preconditioner_of_ones_own():
    matrix, b = general(4, 30), rand(4, 30, seed=7)
    gmres = registry.get("linear_solvers", "gmres")
    near = torch.linalg.inv(matrix + 1e-3 * rand(4, 30, 30, seed=9))
    chosen = gmres(preconditioner=lambda x: torch.einsum("bij,bj->bi", near, x), tol=1e-9)
    found, product = solve(chosen, matrix, b)
    assert found.converged.all() and product.calls < 8
    torch.testing.assert_close(found["z"], exact(matrix, b), rtol=1e-6, atol=1e-7)
    with pytest.raises(ConfigTypeError, match="got 3"):
        gmres(preconditioner=3)
    with pytest.raises(ConfigError, match="preconditioner"):
        gmres(preconditioner="ilu")
    with pytest.raises(ConfigError, match="terms=2 is for preconditioner='neumann'"):
        gmres(terms=2)
    made = gmres(preconditioner="neumann", terms=2)
    assert made.settings.terms == 2
    for options in ({"preconditioner": torch.neg}, {"preconditioner": "neumann"}):
        with pytest.raises(ConfigError, match="given twice: 'neumann'"):
            gmres(made.settings, **options)
    with pytest.raises(ConfigError, match="complete; give preconditioner there"):
        gmres(gmres().settings, "neumann")
    assert gmres(gmres(restart=3).settings, torch.neg).settings.restart == 3


@pytest.mark.parametrize("solver", ["gmres", "dense", "broyden"])
def test_another_solvers_inverse_is_a_preconditioner(solver):
    """What a solve learned of (I - A)^-1 makes a later one cheaper, as SHINE does."""
    matrix, b = general(4, 30), rand(4, 30, seed=7)
    first = registry.create("any_solvers", {"name": solver, "tol": 1e-10, "max_iter": 200})
    problem = LinearProblem(Counted(matrix), None, b)
    state = iterate(first, problem, torch.zeros_like(b), b, keep_state=True).solution.solver_state
    inverse = first.inverse(state)
    if solver != "broyden":
        torch.testing.assert_close(inverse(b), exact(matrix, b), rtol=1e-6, atol=1e-6)
    other = b + 0.1 * rand(4, 30, seed=8)
    chosen = registry.get("linear_solvers", "gmres")(preconditioner=inverse, tol=1e-9)
    found, product = solve(chosen, matrix, other)
    torch.testing.assert_close(found["z"], exact(matrix, other), rtol=1e-6, atol=1e-7)
    assert product.calls <= solve("gmres", matrix, other)[1].calls


# ---- cg, bicgstab, dense


def test_cg_is_as_short_as_its_theory():
    """As many steps as there are distinct eigenvalues."""
    q = torch.linalg.qr(rand(3, 20, 20))[0]
    values = torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=DOUBLE).repeat(5)
    found, product = solve("cg", q * values @ q.mT, rand(3, 20, seed=7))
    assert found.converged.all()
    assert product.calls == 5


def test_cg_ends_where_a_sample_is_not_positive_definite():
    matrix = definite()
    matrix[1] = indefinite()[1]
    matrix[2] = -matrix[2]
    b = rand(4, 12, seed=7)
    found, _ = solve("cg", matrix, b, max_iter=60)
    assert found["indefinite"].tolist() == [False, True, True, False]
    assert found.converged.tolist() == [True, False, False, True]
    assert torch.isfinite(found["z"]).all()
    torch.testing.assert_close(found["z"][[0, 3]], exact(matrix, b)[[0, 3]], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found["abs_lowest"], residuals(matrix, b, found["z"]))
    assert (found["abs_lowest"] <= b.norm(dim=1) * (1 + 1e-12)).all()  # no worse than the start


@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32])
def test_cg_on_what_is_not_symmetric_ends_no_worse_than_it_began(dtype):
    a = rand(8, 20, 20, seed=11)
    matrix, b = torch.linalg.qr(a)[0].to(dtype), rand(8, 20, seed=7, dtype=dtype)
    found, _ = solve("cg", matrix, b, max_iter=400)
    assert not found.converged.any() and torch.isfinite(found["z"]).all()
    assert (residuals(matrix, b, found["z"]) <= 1.1 * b.double().norm(dim=1)).all()


@pytest.mark.parametrize("bad", [math.nan, 0.0])
@pytest.mark.parametrize("check_every", [1, 4])
def test_gmres_beside_a_lost_sample_is_as_short_as_without(bad, check_every):
    matrix, b = general(4, 30), rand(4, 30, seed=7)
    chosen = registry.create("linear_solvers", {"name": "gmres", "tol": 1e-9, "max_iter": 60})
    alone = iterate(chosen, LinearProblem(Counted(matrix[1:]), None, b[1:]), 0 * b[1:], b[1:]).solution
    matrix[0] = bad
    problem = LinearProblem(Counted(matrix), None, b)
    found = iterate(chosen, problem, torch.zeros_like(b), b, check_every=check_every).solution
    assert found.converged.tolist() == [False, True, True, True]
    assert (found["steps"][1:] <= alone["steps"].max() + 12).all()  # begun anew once, if the NaN was seen late


def test_cg_makes_no_products_once_it_can_do_nothing():
    _, product = solve("cg", -definite(), rand(4, 12, seed=7), max_iter=60)
    assert product.calls <= 3


@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32])
def test_cg_does_not_call_rounding_indefinite(dtype):
    matrix = definite().to(dtype)
    found, _ = solve("cg", matrix, rand(4, 12, seed=7, dtype=dtype), tol=0, max_iter=80)
    assert not found["indefinite"].any() and torch.isfinite(found["z"]).all()


@pytest.mark.parametrize("solver", ["bicgstab", "gmres", "cg"])
@pytest.mark.parametrize("make", [lambda: rotation() - identity(), lambda: torch.zeros(4, 12, 12, dtype=DOUBLE)])
def test_breakdown_ends_without_nan(solver, make):
    """Skew-symmetric matrices, and none at all: every recurrence divides by zero somewhere."""
    found, _ = solve(solver, make(), rand(4, 12, seed=7), max_iter=60)
    assert torch.isfinite(found["z"]).all() and torch.isfinite(found["abs_lowest"]).all()
    torch.testing.assert_close(found["abs_lowest"], residuals(make(), rand(4, 12, seed=7), found["z"]))


def test_dense_takes_a_product_a_feature():
    matrix, b = general(), rand(4, 12, seed=7)
    found, product = solve("dense", matrix, b, tol=1e-12)
    assert product.calls == 12 + 1
    assert (found["steps"] == 1).all()


def test_dense_refuses_too_many_features():
    with pytest.raises(ConfigError, match=r"12 products.*max_features is 11.*gmres"):
        solve("dense", general(), rand(4, 12, seed=7), max_features=11)


@pytest.mark.parametrize("solver", ["dense", "gmres", "bicgstab"])
def test_a_singular_sample_fails_alone(solver):
    matrix, b = general(), rand(4, 12, seed=7)
    matrix[2, 5] = 0
    found, _ = solve(solver, matrix, b, max_iter=60)
    assert found.converged.tolist() == [True, True, False, True]
    assert torch.isfinite(found["z"]).all()
    keep = torch.tensor([0, 1, 3])
    torch.testing.assert_close(found["z"][keep], exact(matrix[keep], b[keep]), rtol=1e-6, atol=1e-7)
    rounding = 1e-15 * float(found["z"].norm(dim=1).max())  # a singular sample's solution is large
    assert rounding < 0.1
    torch.testing.assert_close(found["abs_lowest"], residuals(matrix, b, found["z"]), rtol=1e-4, atol=rounding)
    assert (found["abs_lowest"] <= b.norm(dim=1)).all()


# ---- honesty


@pytest.mark.parametrize("solver", ["gmres", "bicgstab", "cg", "dense", "neumann"])
@pytest.mark.parametrize("tol", [1e-5, 1e-7, 1e-9, 0.0])
@pytest.mark.parametrize("size", [12, 200])
def test_float32_at_tight_tolerances_ends_honestly(solver, tol, size):
    """A recurrence's residual goes on falling where the true one stays."""
    matrix = definite(4, size).float()
    matrix = matrix / torch.linalg.matrix_norm(matrix, 2)[:, None, None]
    b = rand(4, size, seed=7, dtype=torch.float32)
    found, _ = solve(solver, matrix, b, tol=tol, max_iter=300)
    true = residuals(matrix, b, found["z"])
    torch.testing.assert_close(found["abs_lowest"].double(), true, rtol=0.5, atol=2e-6 * float(b.norm(dim=1).max()))
    claimed = found["status"] == Status.CONVERGED
    assert (true[claimed] <= tol * b.norm(dim=1)[claimed] + 1e-6 * found["z"].norm(dim=1)[claimed]).all()
    if tol and solver != "neumann":
        ok = (found["status"] == Status.CONVERGED) | (found["status"] == Status.AT_PRECISION)
        assert ok.all(), found


@pytest.mark.parametrize("solver", KRYLOV)
def test_a_claim_that_the_products_do_not_bear_out_is_taken_back(solver):
    """Products with an error of 1e-4: the recurrence believes it has got to 1e-10, and never has."""
    matrix, b = definite(), rand(4, 12, seed=7)
    noise = torch.Generator().manual_seed(0)

    def product(u):
        exactly = u - torch.einsum("bij,bj->bi", matrix, u)
        return exactly + 1e-4 * u.norm(dim=1, keepdim=True) * torch.randn(4, 12, generator=noise, dtype=DOUBLE)

    chosen = registry.create("linear_solvers", {"name": solver, "tol": 1e-10, "max_iter": 80})
    found = iterate(chosen, LinearProblem(product, None, b), torch.zeros_like(b), b).solution
    assert not found.converged.any()
    assert (residuals(matrix, b, found["z"]) < 0.05).all()
    assert (found["abs_lowest"] > 1e-6).all()


@pytest.mark.parametrize("solver", ALL)
def test_rows_without_a_right_hand_side_stay_zero(solver):
    matrix = definite() / 4
    b = rand(4, 12, seed=7)
    b[1] = 0
    found, _ = solve(solver, matrix, b, tol=1e-10, max_iter=2000)
    assert not found.failed()
    assert not found["z"][1].any()
    torch.testing.assert_close(found["z"], exact(matrix, b), rtol=1e-6, atol=1e-7)
    found, product = solve(solver, matrix, 0 * b)
    assert found.converged.all() and not found["z"].any() and product.calls == 0


@pytest.mark.parametrize("solver", ALL)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("batch", [4, 12])
def test_a_row_of_nan_touches_nobody(solver, bad, batch):
    matrix = (definite() / 4)[torch.arange(batch) % 4]
    b = rand(batch, 12, seed=7)
    clean, _ = solve(solver, matrix, b, max_iter=2000)
    matrix = matrix.clone()
    matrix[2] = bad
    found, _ = solve(solver, matrix, b, max_iter=2000)
    keep = torch.arange(batch) != 2
    assert found["status"][2] == Status.NON_FINITE
    assert found.converged[keep].all()
    assert torch.isfinite(found["z"]).all()
    torch.testing.assert_close(found["z"][keep], clean["z"][keep], rtol=1e-6, atol=1e-7)
    assert (found["steps"][keep] <= clean["steps"].max() + 3).all()


@pytest.mark.parametrize("solver", ["gmres", "bicgstab", "cg", "neumann"])
@pytest.mark.parametrize("when", [1, 3, 6])
def test_a_product_that_fails_once_is_made_good(solver, when):
    matrix, b = definite() / 4, rand(4, 12, seed=7)
    calls = 0

    def product(u):
        nonlocal calls
        calls += 1
        out = u - torch.einsum("bij,bj->bi", matrix, u)
        if calls == when:
            out[1, 3] = math.nan
        return out

    chosen = registry.create("linear_solvers", {"name": solver, "tol": 1e-9, "max_iter": 2000})
    found = iterate(chosen, LinearProblem(product, None, b), torch.zeros_like(b), b).solution
    assert found.converged.all()
    torch.testing.assert_close(found["z"], exact(matrix, b), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("solver", ALL)
def test_results_do_not_depend_on_the_company(solver):
    matrix, b = definite() / 4, rand(4, 12, seed=7)
    whole, _ = solve(solver, matrix, b, tol=1e-10, max_iter=2000)
    for row in range(4):
        alone, _ = solve(solver, matrix[row : row + 1], b[row : row + 1], tol=1e-10, max_iter=2000)
        torch.testing.assert_close(whole["z"][row], alone["z"][0], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("solver", ALL)
def test_state_of_some_rows_goes_on_as_if_alone(solver):
    """What compaction does: the state indexed, the problem made smaller."""
    matrix, b = definite() / 4, rand(4, 12, seed=7)
    rows = torch.tensor([3, 1])
    chosen = registry.create("linear_solvers", {"name": solver})
    problem = LinearProblem(Counted(matrix), None, b)
    u, fu = torch.zeros_like(b), b
    state = chosen.init(problem, u, fu)

    def steps(problem, u, fu, state, count):
        for _ in range(count):
            u, state, fu = chosen.step(problem, u, fu, state)
            fu = problem(u) if fu is None else fu
        return u, fu, state

    u, fu, state = steps(problem, u, fu, state, 3)
    half = LinearProblem(Counted(matrix[rows]), None, b[rows])
    chosen_state = chosen.select(state, rows)
    fewer, _, _ = steps(half, u[rows], fu[rows], chosen_state, 3)
    u, fu, state = steps(problem, u, fu, state, 3)
    torch.testing.assert_close(fewer, u[rows], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("solver", ALL)
def test_step_leaves_its_arguments_alone(solver):
    matrix, b = definite() / 4, rand(4, 12, seed=7)
    chosen = registry.create("linear_solvers", {"name": solver})
    problem = LinearProblem(Counted(matrix), None, b)
    u = rand(4, 12, seed=8)
    fu = problem(u)
    state = chosen.init(problem, u, fu)
    for _ in range(5):
        before = u.clone(), fu.clone()
        step = chosen.step(problem, u, fu, state)
        assert torch.equal(u, before[0]) and torch.equal(fu, before[1])
        u, state = step.z, step.state
        fu = problem(u) if step.fz is None else step.fz


@pytest.mark.parametrize("check_every", [3, 7])
@pytest.mark.parametrize("solver", ALL)
def test_seldom_checked(solver, check_every):
    matrix, b = definite() / 4, rand(4, 12, seed=7)
    chosen = registry.create("linear_solvers", {"name": solver, "tol": 1e-9, "max_iter": 2000})
    problem = LinearProblem(Counted(matrix), None, b)
    found = iterate(chosen, problem, torch.zeros_like(b), b, check_every=check_every).solution
    assert found.converged.all()
    torch.testing.assert_close(found["z"], exact(matrix, b), rtol=1e-6, atol=1e-7)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 6),
    st.integers(1, 24),
    st.integers(0, 10**6),
    st.floats(0.0, 0.9),
    st.sampled_from(["gmres", "bicgstab", "dense", "neumann"]),
    st.sampled_from([DOUBLE, torch.float32]),
    st.floats(-12, 12),
)
def test_random_well_conditioned_systems(batch, size, seed, rho, solver, dtype, exponent):
    a = rand(batch, size, size, seed=seed)
    a = rho * a / torch.linalg.matrix_norm(a, 2)[:, None, None]
    matrix = (torch.eye(size, dtype=DOUBLE) - a).to(dtype)
    b = (10.0**exponent * rand(batch, size, seed=seed + 1)).to(dtype)
    tol = 1e-8 if dtype == DOUBLE else 1e-4
    found, _ = solve(solver, matrix, b, tol=tol, max_iter=3000)
    assert found.converged.all()
    true = residuals(matrix, b, found["z"])
    assert (true <= 1.1 * tol * b.double().norm(dim=1)).all()


@pytest.mark.parametrize("size", [256, 512])
@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32])
def test_many_features(size, dtype):
    matrix, b = general(2, size).to(dtype), rand(2, size, seed=7, dtype=dtype)
    for solver in ("gmres", "bicgstab", "dense"):
        found, product = solve(solver, matrix, b, tol=1e-6)
        assert not found.failed()
        error = (found["z"].double() - exact(matrix.double(), b.double())).norm(dim=1)
        assert (error <= 1e-4 * b.norm(dim=1)).all()
        if solver == "gmres":
            assert product.calls < 50


# ---- as backward solvers, by name


def chain(size=12):
    links = torch.diag(torch.full((size - 1,), 0.5, dtype=DOUBLE), 1)
    return links + links.T


@pytest.mark.parametrize("solver", ["gmres", "bicgstab", "dense", "neumann", "newton_krylov"])
@pytest.mark.parametrize("flat", [True, False])
def test_gradients_by_every_linear_solver(solver, flat):
    w, x = 0.8 * torch.linalg.qr(rand(6, 6))[0], rand(4, 6, seed=3).requires_grad_()
    if flat:
        deq = get_deq(ift=True, f_solver="broyden", f_tol=1e-12, f_max_iter=200, b_solver=solver, b_max_iter=300)
    else:
        given = {"name": "implicit", "solver": {"name": solver, "max_iter": 300}}
        deq = get_deq(solver={"name": "broyden", "tol": 1e-12, "max_iter": 200}, gradient=given)
    assert deq.config.gradient.solver.name == solver and deq.config.gradient.solver.tol == 1e-6
    z_out, info = deq(lambda z: torch.tanh(z @ w + x), torch.zeros(4, 6, dtype=DOUBLE))
    (found,) = torch.autograd.grad(z_out[-1].sum(), x)
    assert info["backward"].converged.all()
    slope = 1 - z_out[-1].detach() ** 2
    jacobian = slope[:, :, None] * w.T
    u = exact(torch.eye(6, dtype=DOUBLE) - jacobian.mT, torch.ones(4, 6, dtype=DOUBLE))
    torch.testing.assert_close(found, slope * u, rtol=1e-5, atol=1e-6)


def test_the_adjoint_starts_from_what_is_known():
    """From u = 0, J^T u + cotangent is the cotangent: f linear with J = 0.5 I takes one product, and one to confirm."""
    x = rand(4, 6, seed=3).requires_grad_()
    z_out, info = get_deq(gradient="implicit", f_max_iter=60)(lambda z: 0.5 * z + x, torch.zeros(4, 6, dtype=DOUBLE))
    (found,) = torch.autograd.grad(z_out[-1].sum(), x)
    torch.testing.assert_close(found, torch.full_like(found, 2.0))
    assert info["backward"]["nfe"] == 2


def test_no_backward_step_hands_the_cotangent_on():
    x = rand(4, 6, seed=3).requires_grad_()
    deq = get_deq(ift=True, b_max_iter=0, f_max_iter=60)
    z_out, _ = deq(lambda z: 0.5 * z + x, torch.zeros(4, 6, dtype=DOUBLE))
    (found,) = torch.autograd.grad(z_out[-1].sum(), x)
    assert torch.equal(found, torch.ones_like(found))


@pytest.mark.parametrize("solver", ["gmres", "bicgstab", "dense", "neumann"])
@pytest.mark.parametrize("every", [True, False])
def test_rows_that_depend_on_each_other(solver, every):
    links, w, x = chain(), 0.9 * torch.linalg.qr(rand(4, 4))[0], rand(12, 4, seed=3).requires_grad_()

    def fn(z):
        return torch.tanh(links @ z @ w + x)

    deq = get_deq(ift=True, f_tol=1e-9, f_max_iter=2000, b_solver=solver, b_max_iter=300)
    for _ in range(2):
        z_out, info = deq(fn, torch.zeros(12, 4, dtype=DOUBLE))
        cotangent = torch.zeros(12, 4, dtype=DOUBLE)
        cotangent[slice(None) if every else 3] = 1
        (found,) = torch.autograd.grad(z_out[-1], x, cotangent)
        assert not info["backward"].failed()
        z = z_out[-1].detach()
        jacobian = torch.autograd.functional.jacobian(lambda v: fn(v.view(12, 4)).reshape(-1), z.reshape(-1)).detach()
        u = torch.linalg.solve((torch.eye(48, dtype=DOUBLE) - jacobian).T, cotangent.reshape(-1))
        expected = (1 - z**2) * u.view(12, 4)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)


def test_dense_says_when_coupled_rows_are_too_many():
    links, x = chain(), rand(12, 4, seed=3).requires_grad_()
    solver = {"name": "dense", "max_features": 8}
    deq = get_deq(
        solver={"name": "fixed_point_iter", "max_iter": 2000}, gradient={"name": "implicit", "solver": solver}
    )
    z_out, _ = deq(lambda z: torch.tanh(links @ z * 0.9 + x), torch.zeros(12, 4, dtype=DOUBLE))
    with pytest.raises(ConfigError, match="max_features is 8"):
        torch.autograd.grad(z_out[-1].sum(), x)


def test_configuration_round_trips(tmp_path):
    solver = {"name": "gmres", "restart": 7, "preconditioner": "neumann", "terms": 2, "rtol": 1e-4}
    for given_solver in (
        solver,
        "gmres",
        "cg",
        {"name": "dense", "max_features": 5},
        {"name": "neumann", "damping": 0.5},
    ):
        config = DEQConfig.load(gradient={"name": "implicit", "solver": given_solver})
        config.save(tmp_path / "deq.toml")
        assert DEQConfig.load(tmp_path / "deq.toml") == config
        assert DEQConfig.from_dict(config.to_dict()) == config


def test_wrong_names_and_keys():
    with pytest.raises(UnknownPluginError, match=r"'gmers'.*Did you mean 'gmres'") as caught:
        get_deq(gradient={"name": "implicit", "solver": "gmers"})
    for name in (*ALL, "anderson", "broyden", "fixed_point_iter"):  # both kinds
        assert name in str(caught.value)
    with pytest.raises(UnknownPluginError, match=r"b_solver.*'gmers'.*'gmres'"):
        get_deq(ift=True, b_solver="gmers")
    with pytest.raises(UnknownPluginError, match="'gmres' is a linear solver"):  # not a forward solver
        get_deq("gmres")
    with pytest.raises(UnknownKeyError, match=r"gradient\.solver.*'restrat'.*Did you mean 'restart'"):
        get_deq(gradient={"name": "implicit", "solver": {"name": "gmres", "restrat": 3}})


def test_a_b_solver_that_is_not_used_may_be_linear():
    """TorchDEQ's programs give b_solver with ift=False as well."""
    assert get_deq(b_solver="gmres", ift=False).config.gradient.name == "phantom"


class Other(LinearSolver[SolverSettings]):
    """A linear solver with the name of a fixed-point one."""


def test_a_name_in_both_kinds():
    with registry.scope():
        registry.register("linear_solvers", "broyden", Other)
        assert registry.get("any_solvers", "broyden") is Other  # this process's own comes first
        assert registry.get("any_solvers", "deqcore/broyden") is registry.get("solvers", "broyden")
        assert registry.get("solvers", "broyden") is not Other
    assert registry.get("any_solvers", "broyden") is registry.get("solvers", "broyden")


def test_a_disabled_name_is_looked_for_in_the_other_kind(monkeypatch):
    with registry.scope():
        registry.register("linear_solvers", "broyden", Other)
        monkeypatch.setenv("DEQCORE_DISABLE_PLUGINS", "linear_solvers:broyden")
        assert registry.get("any_solvers", "broyden") is registry.get("solvers", "broyden")


# ---- linear_solve


def times(matrix):
    """u -> M u, for u of any shape with the batch first."""
    return lambda u: torch.einsum("bij,bj->bi", matrix, u.reshape(len(u), -1)).reshape(u.shape)


@pytest.mark.parametrize("solver", [*KRYLOV, "dense", "neumann", "anderson", "broyden"])
@pytest.mark.parametrize("shape", [(4, 12), (4, 3, 4), (1, 12), (4, 2, 3, 2)])
def test_linear_solve(solver, shape):
    matrix, b = definite()[: shape[0]] / 4, rand(*shape, seed=7)
    calls = Counted(matrix)
    u, info = linear_solve(lambda u: u - calls(u.reshape(shape[0], -1)).reshape(shape), b, solver, max_iter=2000)
    assert info.converged.all() and u.shape == b.shape and not u.requires_grad
    assert info["nfe"] == calls.calls
    left = torch.linalg.vector_norm((b - times(matrix)(u)).flatten(1), dim=1)
    assert (left <= 1e-6 * b.flatten(1).norm(dim=1)).all()
    torch.testing.assert_close(info["abs_lowest"], left, rtol=1e-4, atol=1e-13)
    torch.testing.assert_close(info["rel_lowest"], left / b.flatten(1).norm(dim=1), rtol=1e-4, atol=1e-13)


@pytest.mark.parametrize("size", [1e-12, 1e-4, 1.0, 1e6])
@pytest.mark.parametrize("right", [1e-20, 1.0, 1e20])
@pytest.mark.parametrize("solver", KRYLOV)
def test_linear_solve_does_not_depend_on_scale(size, right, solver):
    matrix = (size * definite()).float()
    b = right * rand(4, 12, seed=7, dtype=torch.float32)
    u, info = linear_solve(times(matrix), b, solver, tol=1e-5)
    assert info.converged.all()
    assert (residuals(matrix, b, u) <= 1.5e-5 * b.double().norm(dim=1)).all()


def test_linear_solve_samples_of_different_sizes():
    size = torch.tensor([1e-8, 1.0, 1e8, 1e3], dtype=DOUBLE)
    right = torch.tensor([1e9, 1e-9, 1.0, 0.0], dtype=DOUBLE)
    matrix, b = size[:, None, None] * general(), right[:, None] * rand(4, 12, seed=7)
    u, info = linear_solve(times(matrix), b)
    assert info.converged.all() and not u[3].any()
    assert (residuals(matrix, b, u) <= 1e-6 * b.norm(dim=1)).all()


@pytest.mark.parametrize("solver", ["gmres", "bicgstab", "dense"])
@pytest.mark.parametrize("dtype", [torch.complex128, torch.complex64])
def test_linear_solve_complex(solver, dtype):
    matrix = (general() + 0.2j * rand(4, 12, 12, seed=9)).to(dtype)
    b = torch.complex(rand(4, 12, seed=7), rand(4, 12, seed=8)).to(dtype)
    u, info = linear_solve(times(matrix), b, solver, tol=1e-5)
    assert info.converged.all() and u.dtype == dtype
    torch.testing.assert_close(u, exact(matrix, b), rtol=1e-3, atol=1e-3)
    swapped, _ = linear_solve(lambda u: torch.einsum("bij,bj->bi", matrix, u).conj(), b.conj(), solver, tol=1e-5)
    torch.testing.assert_close(swapped, u, rtol=1e-3, atol=1e-3)  # linear over the reals only


def test_linear_solve_half_precision_and_scalars():
    b = rand(3, 4, seed=7, dtype=torch.bfloat16)
    u, info = linear_solve(lambda u: 2 * u, b, tol=1e-2)
    assert u.dtype == torch.bfloat16 and not info.failed() and torch.equal(u, b / 2)
    u, _ = linear_solve(lambda u: 4 * u, torch.tensor(3.0, dtype=DOUBLE))
    assert u.shape == () and u.item() == 0.75


def test_linear_solve_from_a_start():
    matrix, b = general(), rand(4, 12, seed=7)
    near = exact(matrix, b) + 1e-3 * rand(4, 12, seed=8)
    u, info = linear_solve(times(matrix), b, u0=near)
    _, cold = linear_solve(times(matrix), b)
    assert info["steps"].max() < cold["steps"].max()
    torch.testing.assert_close(u, exact(matrix, b), rtol=1e-5, atol=1e-5)
    _, info = linear_solve(times(matrix), b, u0=exact(matrix, b))
    assert info["nfe"] == 2 and not info["steps"].any()


def test_linear_solve_takes_solvers_and_settings():
    matrix, b = general(), rand(4, 12, seed=7)
    inverse = torch.linalg.inv(matrix)
    gmres = registry.get("linear_solvers", "gmres")
    u, info = linear_solve(times(matrix), b, gmres(tol=1e-10, preconditioner=lambda x: times(inverse)(x)))
    assert info["steps"].max() == 1
    torch.testing.assert_close(u, exact(matrix, b))
    for solver in (
        {"name": "gmres", "tol": 1e-10},
        registry.settings("linear_solvers", {"name": "gmres", "tol": 1e-10}),
    ):
        u, info = linear_solve(times(matrix), b, solver)
        assert (residuals(matrix, b, u) <= 1e-10 * b.norm(dim=1)).all()
    with pytest.raises(ConfigError, match=r"tol is given twice"):
        linear_solve(times(matrix), b, {"name": "gmres", "tol": 1e-3}, tol=1e-4)
    with pytest.raises(ConfigError, match=r"has settings of its own.*Gmres\(tol=\.\.\.\)"):
        linear_solve(times(matrix), b, gmres(), tol=1e-4)
    with pytest.raises(ConfigError, match="complete"):
        linear_solve(times(matrix), b, registry.settings("linear_solvers", "gmres"), tol=1e-4)


def test_linear_solve_hands_the_transpose_to_who_needs_it():
    """Gradient descent on the normal equations, whose step is a fraction of (I - A)^T r."""

    class Descent(LinearSolver[SolverSettings]):
        def step(self, problem, u, fu, state):
            return Step(u + 0.2 * problem.rmatvec(fu - u), state)

    matrix, b = general(), rand(4, 12, seed=7)
    u, info = linear_solve(times(matrix), b, Descent(max_iter=3000, tol=1e-8), rmatvec=times(matrix.mT))
    assert info.converged.all()
    torch.testing.assert_close(u, exact(matrix, b), rtol=1e-5, atol=1e-5)
    with pytest.raises(NotImplementedError, match="no transposed product"):
        linear_solve(times(matrix), b, Descent())


@pytest.mark.parametrize("policy", ["ignore", "warn", "raise"])
def test_linear_solve_that_fails(policy):
    matrix, b = general(), rand(4, 12, seed=7)
    if policy == "raise":
        with pytest.raises(ConvergenceError, match="linear solve: 4 of 4 samples max_steps"):
            linear_solve(times(matrix), b, max_iter=2, on_failure=policy)
    elif policy == "warn":
        with pytest.warns(ConvergenceWarning, match="linear solve: 4 of 4 samples max_steps") as caught:
            linear_solve(times(matrix), b, max_iter=2)
        assert caught[0].filename == __file__
    else:
        u, info = linear_solve(times(matrix), b, max_iter=2, on_failure=policy)
        torch.testing.assert_close(info["abs_lowest"], residuals(matrix, b, u))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"matvec": 3}, FunctionTypeError, "matvec must be a function.*got 3"),
        ({"rmatvec": 3}, FunctionTypeError, "rmatvec must be a function.*got 3"),
        ({"matvec": lambda u: None}, FunctionTypeError, "matvec returned None"),
        ({"matvec": lambda u: u[:1]}, FunctionError, r"matvec returned .*shape \(1, 12\).*shape \(4, 12\)"),
        ({"matvec": lambda u: u + 0j}, FunctionError, "matvec returned .*complex.*real"),
        ({"matvec": lambda u: u.mul_(2)}, FunctionError, "changed its input in place"),
        ({"b": [1.0]}, StateTypeError, "b must be a tensor, got a list"),
        ({"b": torch.ones(4, 12, dtype=torch.int64)}, StateTypeError, "b must be .*floating point.*int64"),
        ({"b": torch.full((4, 12), math.inf)}, StateError, "b holds NaN or inf"),
        ({"b": torch.ones(0, 12)}, StateError, r"b is empty, of shape \(0, 12\)"),
        ({"u0": torch.ones(4, 12)}, StateError, r"u0 must be like b.*float64.*float32"),
        ({"u0": torch.full((4, 12), math.nan, dtype=DOUBLE)}, StateError, "u0 holds NaN or inf"),
        ({"b": torch.ones(4, 12, dtype=DOUBLE, requires_grad=True)}, GradientModeError, "b requires grad"),
        ({"on_failure": "no"}, ConfigError, "on_failure must be .*'no'"),
        ({"solver": "gmers"}, UnknownPluginError, "Did you mean 'gmres'"),
        ({"restrat": 3}, UnknownKeyError, "Did you mean 'restart'"),
        ({"tol": -1}, ConfigError, "tol must be .*at least 0"),
        ({"tol": 1e-3, "rtol": 1e-3}, ConfigError, "either tol"),
    ],
)
def test_linear_solve_refuses(change, error, text):
    given = {"matvec": lambda u: 2 * u, "b": rand(4, 12, seed=7), **change}
    with pytest.raises(error, match=text):
        linear_solve(**given)


def test_linear_solve_with_grad_off_and_other_tolerances():
    b = rand(4, 12, seed=7).requires_grad_()
    with torch.no_grad():
        u, info = linear_solve(times(general()), b, rtol=1e-4)
    assert info.converged.all() and not u.requires_grad
