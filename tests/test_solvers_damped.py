"""Damped iteration and Aitken's extrapolation."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from solvers_support import F64, PROBLEMS, complex_affine, gaussian, rows_tanh, solve, states_of

from benchmarks.maps import six
from deqcore import ConfigError, Problem, StateSpec, Status, get_deq
from deqcore_solvers.aitken import Aitken
from deqcore_solvers.damped import Damped
from deqcore_solvers.fixed_point_iter import FixedPointIter

BOTH = pytest.mark.parametrize("cls", [Damped, Aitken], ids=["damped", "aitken"])
NAMES = {Damped: "damped", Aitken: "aitken"}
TIGHT = {"rtol": 1e-12, "max_iter": 3000}


def secant(fn, z, steps):
    """The secant method on f(z) - z for one number, begun by a plain step."""
    before, z = z, fn(z)
    for _ in range(steps - 1):
        r0, r1 = fn(before) - before, fn(z) - z
        before, z = z, z - r1 * (z - before) / (r1 - r0)
    return z


# ---- answers


@BOTH
@pytest.mark.parametrize("name", PROBLEMS)
def test_exact_answers(cls, name):
    problem = PROBLEMS[name]()
    found = solve(cls(**TIGHT), problem.fn, problem.z0)
    assert not found.failed()
    assert problem.error(found["z"]) <= 1e-9


@BOTH
@pytest.mark.parametrize("radius", [3.0, 10.0, 30.0])
def test_large_negative_eigenvalues(cls, radius):
    g = torch.Generator().manual_seed(4)
    w = gaussian(32, radius, g, "negative")
    x = 0.3 * torch.randn(8, 32, generator=g, dtype=F64)

    def fn(z):
        return torch.tanh(z @ w.T + x)

    assert solve(FixedPointIter(rtol=1e-6, max_iter=200), fn, torch.zeros_like(x)).failed()
    found = solve(cls(rtol=1e-6, max_iter=200), fn, torch.zeros_like(x))
    assert bool(found.converged.all())
    assert found["nfe"] <= 5 * radius + 20  # measured: 18, 33 and 66 at these radii


@pytest.mark.parametrize(("name", "most"), [("G64b", 1300), ("S64", 150), ("N64", 22), ("C256", 36)])
def test_aitkens_evaluations(name, most):
    """Plain iteration: 535 to 609, 650 to 1100, never, 19 to 70. The first has a complex pair of radius .99."""
    for seed in (200, 201):
        problem = six(name, seed)
        found = solve(Aitken(rtol=1e-6, max_iter=1300), problem.fn(), torch.zeros_like(problem.x))
        assert bool(found.converged.all())
        assert found["nfe"] <= most
        assert problem.relative_residual(found["z"]) <= 1e-6


@BOTH
def test_float32_complex_and_batches_of_one(cls):
    fn, x = rows_tanh(dtype=torch.float32)
    found = solve(cls(rtol=1e-9, max_iter=200), fn, torch.zeros_like(x), (x,))
    assert set(found.counts()) <= {Status.AT_PRECISION, Status.CONVERGED}
    alone = solve(cls(rtol=1e-6, max_iter=200), fn, torch.zeros_like(x[:1]), (x[:1],))
    torch.testing.assert_close(alone["z"], found["z"][:1], atol=1e-5, rtol=0)
    fn, z0, answer = complex_affine()
    found = solve(cls(**TIGHT), fn, z0)
    torch.testing.assert_close(torch.view_as_complex(found["z"].reshape(3, 4, 2)), answer, atol=1e-9, rtol=0)


# ---- samples are independent


@BOTH
def test_every_row_steps_as_it_does_alone_and_in_any_order(cls):
    fn, x = rows_tanh(radius=4.0)
    options = {"tol": 0, "max_iter": 12}
    together = torch.stack(states_of(cls(**options), fn, torch.zeros_like(x), (x,)))
    for k in range(len(x)):
        alone = torch.stack(states_of(cls(**options), fn, torch.zeros_like(x[:1]), (x[k : k + 1],)))
        torch.testing.assert_close(alone[:, 0], together[:, k], atol=1e-10, rtol=0)
    order = torch.tensor([3, 0, 4, 1, 2])
    permuted = torch.stack(states_of(cls(**options), fn, torch.zeros_like(x), (x[order],)))
    torch.testing.assert_close(permuted, together[:, order], atol=1e-10, rtol=0)


@BOTH
def test_a_row_of_nan_harms_no_other(cls):
    fn, x = rows_tanh()
    clean = solve(cls(**TIGHT), fn, torch.zeros_like(x), (x,))
    spoilt = x.clone()
    spoilt[2] = torch.nan
    found = solve(cls(**TIGHT), fn, torch.zeros_like(x), (spoilt,))
    assert found["status"].tolist() == [3 if k == 2 else 0 for k in range(5)]
    others = [0, 1, 3, 4]
    torch.testing.assert_close(found["z"][others], clean["z"][others], atol=1e-10, rtol=0)


@BOTH
def test_a_step_into_nan_is_tried_again_half_as_long(cls):
    def fn(z):  # a plain step from .9 ends below 0
        return torch.where(z > 0, 0.5 - 2 * (z - 0.5), torch.nan)

    z0 = torch.tensor([[0.9], [0.6]], dtype=F64)
    found = solve(cls(rtol=1e-10, max_iter=60), fn, z0)
    assert bool(found.converged.all())
    torch.testing.assert_close(found["z"], torch.full_like(z0, 0.5), atol=1e-9, rtol=0)


@BOTH
def test_residuals_that_never_change_divide_nothing_by_zero(cls):
    z0 = torch.zeros(2, 3, dtype=F64)
    shift = torch.tensor([[1.0], [0.0]], dtype=F64)
    found = solve(cls(tol=0, max_iter=50), lambda z: z + shift, z0)  # no fixed point; every point one
    assert bool(torch.isfinite(found["z"]).all())
    assert found["abs_lowest"].tolist() == pytest.approx([3**0.5, 0.0])
    found = solve(cls(tol=0, max_iter=50), lambda z: 0 * z + 1, z0)
    assert bool((found["z"] == 1).all())


@BOTH
def test_a_step_lost_in_rounding_does_not_end_the_solve(cls):
    """After it the residual hasn't changed; factors that were halved for good would never move the sample again."""
    fn, x = rows_tanh(batch=1)
    solver = cls()
    with torch.no_grad():
        z = torch.zeros_like(x)
        problem = Problem.of(fn, StateSpec(z), (x,))
        state = solver.init(problem, z, problem(z))
        factors = []
        for _ in range(8):  # never moved
            _, state, _ = solver.step(problem, z, problem(z), state)
            factors.append(state.factor.item())
    assert factors == [1.0, 0.5, 0.25, 0.125, 1.0, 0.5, 0.25, 0.125]


# ---- the methods


@pytest.mark.parametrize("start", [0.3, 1.2])
def test_aitken_is_the_secant_method_for_one_number(start):
    z0 = torch.full((1, 1), start, dtype=F64)
    for steps in range(1, 6):
        (z,) = states_of(Aitken(tol=0, max_iter=steps), torch.cos, z0)[-1:]
        assert z.item() == pytest.approx(secant(torch.cos, z0, steps).item(), abs=1e-12)
    found = solve(Aitken(rtol=1e-12), lambda z: 3 * z - 1, z0)  # repelling: the factor is negative
    assert found["z"].item() == pytest.approx(0.5, abs=1e-12)


def test_the_factor_leaves_the_least_residual_of_the_last_step():
    fn, x = rows_tanh()
    z0 = torch.zeros_like(x)
    _, z1, z2 = z0, *states_of(Aitken(tol=0, max_iter=2), fn, z0, (x,))
    r0, r1 = fn(z0, x) - z0, fn(z1, x) - z1
    factor = ((z2 - z1) * r1).sum(1) / (r1 * r1).sum(1)
    s, y = z1 - z0, r0 - r1
    least = torch.stack([torch.linalg.lstsq(b[:, None], a[:, None]).solution[0, 0] for a, b in zip(s, y, strict=True)])
    torch.testing.assert_close(factor, least, atol=1e-12, rtol=0)


def test_max_factor_and_first_factor():
    fn, x = rows_tanh()
    z0 = torch.zeros_like(x)
    (first,) = states_of(Aitken(tol=0, max_iter=1, first_factor=0.25), fn, z0, (x,))
    torch.testing.assert_close(first, 0.25 * fn(z0, x))
    slow = states_of(Aitken(tol=0, max_iter=6, max_factor=1.5), lambda z: 0.99 * z + 1, torch.zeros(1, 1, dtype=F64))
    for a, b in itertools.pairwise(slow[1:]):
        assert ((b - a) / (0.99 * a + 1 - a)).item() == pytest.approx(1.5)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), radius=st.floats(0.1, 30.0), damping=st.sampled_from(["adaptive", 0.3, 1.0]))
def test_damped_states_lie_between_the_last_and_its_image(seed, radius, damping):
    fn, x = rows_tanh(3, 4, radius, seed=seed)
    z = torch.zeros_like(x)
    for state in states_of(Damped(tol=0, max_iter=15, damping=damping), fn, z, (x,)):
        residual = fn(z, x) - z
        share = ((state - z) * residual).sum(1, keepdim=True) / (residual * residual).sum(1, keepdim=True)
        share = share.nan_to_num(1.0)
        moved = residual.norm(dim=1, keepdim=True) > 1e-9
        assert bool(((share >= 1e-3 - 1e-6) & (share <= 1 + 1e-6))[moved].all())
        torch.testing.assert_close(state, torch.where(moved, z + share * residual, state), atol=1e-12, rtol=0)
        assert bool((state.abs() <= 1).all())  # tanh maps the cube into itself
        z = state


def test_a_fixed_damping_is_fixed():
    fn, x = rows_tanh()
    z0 = torch.zeros_like(x)
    for damping in (0.3, 1.0):
        mine = states_of(Damped(tol=0, max_iter=9, damping=damping), fn, z0, (x,))
        plain = states_of(FixedPointIter(tol=0, max_iter=9, damping=damping), fn, z0, (x,))
        torch.testing.assert_close(torch.stack(mine), torch.stack(plain), atol=0, rtol=0)
    assert Damped(tau=1).settings.damping == 1.0


@pytest.mark.parametrize("damping", [0.0, -1.0, 1.5, "adaptiv", None, float("nan")])
def test_a_wrong_damping_is_refused(damping):
    with pytest.raises(ConfigError, match=r"damping"):
        Damped(damping=damping)


@BOTH
def test_states_can_be_selected(cls):
    fn, x = rows_tanh(radius=3.0)
    rows = torch.tensor([4, 1])
    solver = cls()
    with torch.no_grad():
        z = torch.zeros_like(x)
        problem = Problem.of(fn, StateSpec(z), (x,))
        state = solver.init(problem, z, problem(z))
        for _ in range(3):
            z, state, _ = solver.step(problem, z, problem(z), state)
        some = solver.step(problem, z[rows], problem(z)[rows], solver.select(state, rows)).z
        every = solver.step(problem, z, problem(z), state).z
    torch.testing.assert_close(some, every[rows], atol=1e-12, rtol=0)


# ---- by name


@BOTH
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_by_name_forward_and_backward(cls, mode):
    fn, x = rows_tanh()
    x.requires_grad_()
    solver = {"name": NAMES[cls], "rtol": 1e-12, "max_iter": 2000}
    deq = getattr(get_deq(solver=solver, gradient={"name": "implicit", "solver": solver}), mode)()
    z_out, info = deq(fn, torch.zeros(5, 6, dtype=F64), args=(x,))
    assert bool(info.converged.all())
    g = torch.randn(5, 6, generator=torch.Generator().manual_seed(0), dtype=F64)
    (grad,) = torch.autograd.grad(z_out[-1], x, g)
    z = z_out[-1].detach()
    jacobian = torch.autograd.functional.jacobian(lambda z: fn(z, x.detach()).sum(0), z).transpose(0, 1)
    adjoint = torch.linalg.solve((torch.eye(6, dtype=F64) - jacobian).mT, g)
    torch.testing.assert_close(grad, (1 - z**2) * adjoint, atol=1e-9, rtol=0)


@BOTH
def test_by_name_in_half_precision(cls):
    z0 = torch.zeros(4, 3, dtype=torch.float16)
    z_out, info = get_deq(solver=NAMES[cls], on_failure="ignore").eval()(torch.cos, z0)
    torch.testing.assert_close(z_out[-1].float(), torch.full((4, 3), 0.739085), atol=2e-3, rtol=0)
    assert not info.failed()
