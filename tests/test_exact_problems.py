"""Every solver on the problems whose answers are known, to 1e-9; and two methods step by step against theory."""

from __future__ import annotations

import inspect

import pytest
import torch

import deqcore
from deqcore import ConfigError, ConvergenceError, Status, registry
from deqcore.testing import PROBLEMS, exact_problem, newton_answer

DOUBLE = torch.float64
ALL = tuple(PROBLEMS)
EXPANDING = tuple(name for name in ALL if not exact_problem(name).contracts)
#: Solvers that take another form of problem than z = f(z), and what it is.
OTHER_FORM = {
    "forward_backward": "f must be a pair of monotone operators",
    "peaceman_rachford": "f must be a pair of monotone operators",
}
DIVERGES = "plain iteration needs a spectral radius below 1"
RIGHT_HALF = "one damping factor a sample can't turn eigenvalues whose real part is above 1"
#: solver -> {problem: why it is not expected to solve it}. Whoever is not here claims every problem.
EXCLUDED: dict[str, dict[str, str]] = {
    "fixed_point_iter": dict.fromkeys(EXPANDING, DIVERGES),
    "simple_fixed_point_iter": dict.fromkeys(EXPANDING, DIVERGES),
    "damped": {"affine, rotation": RIGHT_HALF},
    "aitken": {"affine, rotation": RIGHT_HALF},
}
#: What a solver needs set besides its defaults to claim what it claims.
OPTIONS: dict[str, dict[str, object]] = {}


def builtins() -> list[str]:
    return [entry.name for entry in registry.entries("solvers") if entry.builtin]


def claims(solver: str) -> list[str]:
    return [] if solver in OTHER_FORM else [name for name in ALL if name not in EXCLUDED.get(solver, {})]


def solve(solver, problem, tol=1e-12, **options):
    given = {"name": solver, "max_iter": 2000, "tol": tol, "stop_mode": "rel", **OPTIONS.get(solver, {}), **options}
    deq = deqcore.get_deq(solver=given, batch_dims=problem.batch_dims, on_failure="ignore").eval()
    with torch.no_grad():
        z_out, info = deq(problem.fn, problem.z0, args=problem.args)
    return z_out[-1], info


# ---- the problems themselves


@pytest.mark.parametrize("name", ALL)
def test_answers_are_fixed_points_and_agree_with_what_is_known(name):
    problem = exact_problem(name)
    assert problem.name == name and problem.answer.shape == problem.z0.shape
    assert problem.error(problem.fn(problem.answer, *problem.args)) < 2e-14
    for what, value, uncertainty, measure in problem.facts:
        assert abs(float(measure(problem.answer)) - value) <= uncertainty, what


def test_every_problem_but_the_general_ones_is_known_from_elsewhere():
    known = {name for name in ALL if exact_problem(name).facts}
    assert known == {"dottie", "chandrasekhar 0.5", "chandrasekhar 0.9", "bratu 1", "bratu 2"}


@pytest.mark.parametrize("name", ALL)
def test_problems_say_truly_whether_plain_iteration_gets_there(name):
    problem = exact_problem(name)
    z = problem.z0
    for _ in range(2000):
        z = problem.fn(z, *problem.args)
    assert (problem.error(z) < 1e-9) == problem.contracts


@pytest.mark.parametrize("name", ALL)
def test_problems_say_truly_whether_rows_are_independent(name):
    problem = exact_problem(name)
    one = torch.zeros_like(problem.answer)
    one[0] = 1e-3
    moved = problem.fn(problem.answer + one, *problem.args) - problem.fn(problem.answer, *problem.args)
    assert (float(moved[1:].abs().sum()) == 0.0) == problem.batched


@pytest.mark.parametrize("name", ALL)
def test_problems_in_single_precision(name):
    problem = exact_problem(name, torch.float32)
    assert problem.dtype in (torch.float32, torch.complex64)
    assert all(arg.dtype in (torch.float32, torch.complex64) for arg in problem.args)
    assert problem.error(problem.fn(problem.answer, *problem.args)) < 2e-6


def test_unknown_problem():
    with pytest.raises(ConfigError, match="no problem named 'dotie'; Did you mean 'dottie'"):
        exact_problem("dotie")


def test_an_answer_that_is_not_there():
    with pytest.raises(ConvergenceError, match="Newton's method"):
        newton_answer(lambda z: z + 1 + z * z, torch.zeros(2, dtype=DOUBLE))


# ---- solvers


def test_every_exclusion_has_a_reason_and_names_what_exists():
    for solver, excluded in EXCLUDED.items():
        assert solver in builtins() and set(excluded) <= set(ALL) and all(excluded.values())
    assert set(OTHER_FORM) <= set(builtins())
    assert set(OPTIONS) <= set(builtins())


@pytest.mark.parametrize(("solver", "name"), [(solver, name) for solver in builtins() for name in claims(solver)])
def test_solver_solves_what_it_claims(solver, name):
    problem = exact_problem(name)
    z, info = solve(solver, problem)
    assert all(status.ok for status in info.counts()), info
    assert problem.error(z) <= 1e-9


@pytest.mark.parametrize(("solver", "name"), [(solver, name) for solver in EXCLUDED for name in EXCLUDED[solver]])
def test_solver_says_so_where_it_does_not_get_there(solver, name):
    problem = exact_problem(name)
    z, info = solve(solver, problem)
    assert not any(status in (Status.CONVERGED, Status.AT_PRECISION) for status in info.counts())
    assert problem.error(z) > 1e-9


# ---- Anderson and GMRES


def gmres_iterates(w, b, z0, steps):
    """States of GMRES on (I - W) z = b, each by a dense least-squares problem on an orthogonal Krylov basis."""
    a = torch.eye(len(b), dtype=DOUBLE) - w
    r0 = b - a @ z0
    basis = (r0 / r0.norm())[:, None]
    iterates = [z0]
    for _ in range(steps):
        weights = torch.linalg.lstsq(a @ basis, r0[:, None], driver="gelsd").solution
        iterates.append(z0 + (basis @ weights)[:, 0])
        new = a @ basis[:, -1]
        for _ in range(2):
            new = new - basis @ (basis.mT @ new)
        basis = torch.cat([basis, (new / new.norm())[:, None]], 1)
    return iterates


def test_anderson_with_full_memory_is_one_f_after_gmres():
    generator = torch.Generator().manual_seed(0)
    d, batch, steps = 24, 3, 12
    w = torch.randn(d, d, generator=generator, dtype=DOUBLE)
    w *= 0.9 / torch.linalg.eigvals(w).abs().max()
    b, z0 = torch.randn(2, batch, d, generator=generator, dtype=DOUBLE)
    seen = {}
    solver = {"name": "anderson", "memory": steps, "ridge": 0.0, "max_iter": steps, "tol": 1e-14, "stop_mode": "rel"}
    deq = deqcore.get_deq(solver=solver, on_failure="ignore").eval()
    with torch.no_grad():
        deq(lambda z: z @ w.mT + b, z0, callback=lambda step, z, residual: seen.update({step: z.clone()}))
    assert len(seen) == steps
    for row in range(batch):
        for step, z in enumerate(gmres_iterates(w, b[row], z0[row], steps - 1), start=1):
            torch.testing.assert_close(seen[step][row], w @ z + b[row], atol=1e-9, rtol=0)


# ---- Broyden on linear systems


def updates() -> list[str]:
    """Kinds of Broyden's update that the installed solver knows."""
    return ["good", "bad"] if "update" in registry.get("solvers", "broyden").settings_type.model_fields else ["good"]


@pytest.mark.parametrize("update", updates())
@pytest.mark.parametrize("seed", range(4))
def test_broyden_ends_within_twice_the_dimension_on_linear_systems(seed, update):
    d = 8
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(d, d, generator=generator, dtype=DOUBLE)
    w *= 0.9 / torch.linalg.eigvals(w).abs().max()
    b = torch.randn(4, d, generator=generator, dtype=DOUBLE)
    options = {"update": update} if len(updates()) > 1 else {}
    solver = {"name": "broyden", "memory": 2 * d, "max_iter": 2 * d, "tol": 1e-9, "stop_mode": "rel", **options}
    deq = deqcore.get_deq(solver=solver, on_failure="ignore").eval()
    with torch.no_grad():
        z_out, info = deq(lambda z: z @ w.mT + b, torch.zeros_like(b))
    assert info.converged.all() and int(info["steps"].max()) <= 2 * d
    answer = torch.linalg.solve(torch.eye(d, dtype=DOUBLE) - w, b.mT).mT
    torch.testing.assert_close(z_out[-1], answer, atol=1e-7, rtol=0)


def test_solvers_document_when_to_use_them():
    """When to use it, what a step costs, and where it is from: every solver's docstring says all three."""
    for name in builtins():
        text = inspect.getdoc(registry.get("solvers", name)) or ""
        for word in ("Use it", "step costs", "Source:"):
            assert word.lower() in text.lower(), f"{name}'s docstring lacks {word!r}"
