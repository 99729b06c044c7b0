"""The secant solver: right against a dense solve, and found by its name."""

from __future__ import annotations

import pytest
import torch
from deqcore_example_solver import Secant

import deqcore


def problem_with(eigenvalues, batch=4, seed=0):
    """f(z) = z A + b, A symmetric with these eigenvalues, and its fixed point from a dense solve."""
    generator = torch.Generator().manual_seed(seed)
    size = len(eigenvalues)
    basis, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    a = basis @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ basis.mT
    b = torch.randn(batch, size, generator=generator, dtype=torch.float64)
    exact = torch.linalg.solve(torch.eye(size, dtype=torch.float64) - a, b.mT).mT
    return (lambda z: z @ a + b), torch.zeros_like(b), exact


def solve(f, z0, **settings):
    deq = deqcore.get_deq(solver={"name": "example_secant", "tol": 1e-10, "max_iter": 300, **settings}).eval()
    assert type(deq.solver) is Secant
    z_out, info = deq(f, z0)
    return z_out[-1], info


@pytest.mark.parametrize("eigenvalues", [[0.9, 0.5, 0.1, -0.3], [0.99, 0.98], [0.5], [1.5, 2.5, 4.0]])
def test_finds_the_fixed_point(eigenvalues):
    f, z0, exact = problem_with(eigenvalues)
    z, info = solve(f, z0)
    assert bool(info.converged.all())
    torch.testing.assert_close(z, exact, atol=1e-7, rtol=0)


def test_one_eigenvalue_takes_one_secant():
    f, z0, exact = problem_with([0.97, 0.97, 0.97])
    z, info = solve(f, z0)
    torch.testing.assert_close(z, exact, atol=1e-8, rtol=0)
    assert info["nfe"] <= 4  # z0, the first step, the secant's


def test_needs_fewer_evaluations_than_plain_iteration():
    f, z0, exact = problem_with([0.98, 0.8, 0.4, 0.1])
    z, info = solve(f, z0, max_iter=2000)
    plain = deqcore.get_deq(solver={"name": "fixed_point_iter", "tol": 1e-10, "max_iter": 2000}).eval()
    other, plain_info = plain(f, z0)
    torch.testing.assert_close(z, exact, atol=1e-7, rtol=0)
    torch.testing.assert_close(other[-1], exact, atol=1e-7, rtol=0)
    assert info["nfe"] < plain_info["nfe"] / 4


def test_samples_do_not_depend_on_each_other():
    f, z0, _ = problem_with([0.9, 0.5, 0.1], batch=3)
    z0[1] = 1e6 * torch.randn(3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    together, _ = solve(f, z0, return_final=True, max_iter=7)
    f_alone, start, _ = problem_with([0.9, 0.5, 0.1], batch=3)
    start[1] = 0.0
    apart, _ = solve(f_alone, start, return_final=True, max_iter=7)
    torch.testing.assert_close(together[[0, 2]], apart[[0, 2]])
    assert not torch.allclose(together[1], apart[1])


def test_a_start_at_the_fixed_point_stays_there():
    f, _, exact = problem_with([0.9, 0.5, 0.1])
    z, info = solve(f, exact)
    assert bool(info.converged.all()) and bool(torch.isfinite(z).all())
    torch.testing.assert_close(z, exact)


@pytest.mark.parametrize("wrong", [{"start": 0}, {"start": 1.5}, {"limit": -1.0}, {"start": "fast"}])
def test_settings_are_checked(wrong):
    with pytest.raises(deqcore.ConfigError, match=rf"solver\.{next(iter(wrong))}"):
        deqcore.get_deq(solver={"name": "example_secant", **wrong})
    with pytest.raises(deqcore.UnknownKeyError, match="Did you mean 'start'"):
        deqcore.get_deq(solver={"name": "example_secant", "strat": 0.3})


def test_where_it_comes_from():
    entry = deqcore.registry.find("solver", "example_secant")
    assert (entry.origin, entry.version) == ("deqcore-example-solver", "0.1.0")
    assert deqcore.registry.get("solver", "deqcore-example-solver/example_secant") is Secant
