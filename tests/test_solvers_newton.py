"""Newton-Krylov, Newton, chord and pseudo-transient continuation."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from solvers_support import F64, PROBLEMS, Calls, affine, complex_affine, rows_tanh, solve, states_of

from deqcore import (
    ConfigError,
    DEQConfig,
    GradientModeError,
    LinearProblem,
    LinearSolver,
    Problem,
    SolverSettings,
    StateSpec,
    Status,
    Step,
    UnknownKeyError,
    UnknownPluginError,
    get_deq,
    iterate,
    registry,
)
from deqcore_solvers.chord import Chord
from deqcore_solvers.newton import Newton
from deqcore_solvers.newton_krylov import NewtonKrylov
from deqcore_solvers.pseudo_transient import PseudoTransient
from deqcore_solvers.shared import search

ALL = [NewtonKrylov, Newton, Chord, PseudoTransient]
NAMES = {NewtonKrylov: "newton_krylov", Newton: "newton", Chord: "chord", PseudoTransient: "pseudo_transient"}
EACH = pytest.mark.parametrize("cls", ALL, ids=lambda cls: NAMES[cls])
TIGHT = {"rtol": 1e-12, "max_iter": 100}


class NoForward(torch.autograd.Function):
    """tanh without a forward derivative."""

    @staticmethod
    def forward(ctx, v):
        out = torch.tanh(v)
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx, grad):
        (out,) = ctx.saved_tensors
        return grad * (1 - out**2)


def arctan_map(z):
    """z - atan(z): its only fixed point is 0, and full Newton steps diverge from |z| > 1.4."""
    return z - torch.atan(z)


# ---- answers


@EACH
@pytest.mark.parametrize("name", PROBLEMS)
def test_exact_answers(cls, name):
    problem = PROBLEMS[name]()
    found = solve(cls(**TIGHT), problem.fn, problem.z0)
    assert not found.failed()
    assert problem.error(found["z"]) <= 1e-9
    assert (problem.fn(found["z"]) - found["z"]).norm(dim=1) == pytest.approx(found["abs_lowest"], abs=1e-15)


@EACH
def test_repelling_fixed_points_are_found_where_the_method_allows(cls):
    fn, z0 = (lambda z: 3 * z - 1), torch.zeros(2, 3, dtype=F64)  # the fixed point is .5, and f leads away from it
    found = solve(cls(**TIGHT), fn, z0)
    torch.testing.assert_close(found["z"], torch.full_like(z0, 0.5), atol=1e-9, rtol=0)


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_residuals_reported_are_the_truth(cls, dtype):
    fn, x = rows_tanh(dtype=dtype)
    tol = 1e-5 if dtype == torch.float32 else 1e-11
    found = solve(cls(rtol=tol), fn, torch.zeros_like(x), (x,))
    z = found["z"].double()
    fz = torch.tanh(torch.atanh(fn(found["z"], x).double()))
    assert bool(found.converged.all())
    assert float(((fz - z).norm(dim=1) / fz.norm(dim=1)).max()) <= 1.1 * tol


@EACH
def test_float32_is_solved_to_its_precision(cls):
    fn, x = rows_tanh(dtype=torch.float32)
    found = solve(cls(rtol=1e-9, max_iter=40), fn, torch.zeros_like(x), (x,))
    assert set(found.counts()) == {Status.AT_PRECISION}
    exact = solve(Newton(**TIGHT), lambda z, x: rows_tanh()[0](z, x), torch.zeros_like(x).double(), (x.double(),))
    torch.testing.assert_close(found["z"].double(), exact["z"], atol=1e-5, rtol=0)


@EACH
def test_complex_states(cls):
    fn, z0, answer = complex_affine()
    found = solve(cls(**TIGHT), fn, z0)
    torch.testing.assert_close(torch.view_as_complex(found["z"].reshape(3, 4, 2)), answer, atol=1e-9, rtol=0)


@EACH
def test_a_batch_of_one_and_each_row_alone(cls):
    fn, x = rows_tanh()
    together = solve(cls(**TIGHT), fn, torch.zeros_like(x), (x,))["z"]
    for k in range(len(x)):
        alone = solve(cls(**TIGHT), fn, torch.zeros_like(x[:1]), (x[k : k + 1],))["z"]
        torch.testing.assert_close(alone[0], together[k], atol=1e-10, rtol=0)


@EACH
def test_a_permuted_batch_gives_permuted_steps(cls):
    fn, x = rows_tanh(radius=3.0)
    order = torch.tensor([3, 0, 4, 1, 2])
    plain = states_of(cls(rtol=1e-9), fn, torch.zeros_like(x), (x,))
    permuted = states_of(cls(rtol=1e-9), fn, torch.zeros_like(x), (x[order],))
    assert len(plain) == len(permuted)
    for a, b in zip(plain, permuted, strict=True):
        torch.testing.assert_close(a[order], b, atol=1e-9, rtol=0)


# ---- rows that are not finite


@EACH
def test_a_row_of_nan_harms_no_other(cls):
    fn, x = rows_tanh()
    clean = solve(cls(**TIGHT), fn, torch.zeros_like(x), (x,))
    spoilt = x.clone()
    spoilt[2] = torch.nan
    found = solve(cls(**TIGHT), fn, torch.zeros_like(x), (spoilt,))
    others = [0, 1, 3, 4]
    assert found["status"].tolist() == [3 if k == 2 else 0 for k in range(5)]
    torch.testing.assert_close(found["z"][others], clean["z"][others], atol=1e-10, rtol=0)
    assert found["nfe"] <= clean["nfe"] + 20


@EACH
def test_a_row_whose_derivative_is_not_finite(cls):
    """sqrt has an infinite derivative at 0: f is fine there, J is not."""
    z0 = torch.tensor([[0.0, 0.0], [2.0, 3.0]], dtype=F64)
    found = solve(cls(**TIGHT), lambda z: 0.5 * z.clamp_min(0).sqrt() + 0.25, z0)
    z = found["z"]
    torch.testing.assert_close(0.5 * z.sqrt() + 0.25, z, atol=1e-10, rtol=0)


@EACH
def test_a_singular_row_harms_no_other(cls):
    scale = torch.tensor([[1.0], [0.3]], dtype=F64)  # z + 1 has no fixed point, and I - J = 0
    shift = torch.tensor([[1.0, 1.0], [0.7, 0.7]], dtype=F64)
    found = solve(cls(rtol=1e-10, max_iter=12), lambda z: scale * z + shift, torch.zeros_like(shift))
    assert found["status"][1] == Status.CONVERGED
    torch.testing.assert_close(found["z"][1], torch.ones(2, dtype=F64), atol=1e-9, rtol=0)
    assert bool(torch.isfinite(found["z"]).all())


# ---- counts


def test_evaluations_and_products_are_counted():
    fn, x = rows_tanh()
    counted = Calls(fn)
    found = solve(NewtonKrylov(**TIGHT), counted, torch.zeros_like(x), (x,))
    assert counted.count == found["nfe"] + found["njvp"]  # forward mode is one call a product
    assert found["nvjp"] == 0
    steps = int(found["steps"].max())
    assert found["nfe"] == steps + 1  # no step was shortened


@pytest.mark.parametrize("cls", [NewtonKrylov, PseudoTransient])
def test_without_forward_mode_the_graph_of_the_trial_point_serves_the_next_step(cls):
    fn, x = rows_tanh()
    w = fn(torch.eye(6, dtype=F64), torch.zeros(6, 6, dtype=F64)).atanh()  # W^T
    counted = Calls(lambda z, x: NoForward.apply(z @ w + x))
    found = solve(cls(**TIGHT), counted, torch.zeros_like(x), (x,))
    reference = solve(cls(**TIGHT), fn, torch.zeros_like(x), (x,))
    torch.testing.assert_close(found["z"], reference["z"], atol=1e-10, rtol=0)
    assert found["nfe"] == reference["nfe"] + 1  # the first point once more, with its graph
    assert counted.count == found["nfe"] + 1  # and the product that failed
    assert found["njvp"] == reference["njvp"] + 1


def test_dense_jacobians_by_vjp_where_forward_mode_fails():
    fn, x = rows_tanh()
    w = fn(torch.eye(6, dtype=F64), torch.zeros(6, 6, dtype=F64)).atanh()
    found = solve(Newton(**TIGHT), lambda z, x: NoForward.apply(z @ w + x), torch.zeros_like(x), (x,))
    reference = solve(Newton(**TIGHT), fn, torch.zeros_like(x), (x,))
    torch.testing.assert_close(found["z"], reference["z"], atol=1e-12, rtol=0)
    steps = int(reference["steps"].max())
    assert reference["njvp"] == 6 * steps
    assert found["nvjp"] == 6 * steps
    assert found["nfe"] == reference["nfe"] + 1


def test_a_linear_map_takes_one_newton_step_and_one_jacobian():
    problem = affine(0.9)
    newton = solve(Newton(rtol=1e-11), problem.fn, problem.z0)
    assert (newton["nfe"], newton["njvp"]) == (2, 16)
    chord = solve(Chord(tol=0, max_iter=5), problem.fn, problem.z0)
    assert (chord["nfe"], chord["njvp"]) == (6, 16)


# ---- the methods


def test_newton_is_newton():
    fn, x = rows_tanh(radius=0.9)
    z = torch.zeros_like(x)
    for state in states_of(Newton(rtol=1e-12), fn, z, (x,)):
        jacobian = torch.autograd.functional.jacobian(lambda z: fn(z, x).sum(0), z).transpose(0, 1)
        z = z + torch.linalg.solve(torch.eye(6, dtype=F64) - jacobian, fn(z, x) - z)
        torch.testing.assert_close(state, z, atol=1e-13, rtol=0)


@pytest.mark.parametrize("linear", ["gmres", "bicgstab", "anderson", "broyden"])
def test_newton_krylov_with_close_linear_solves_is_newton(linear):
    fn, x = rows_tanh()
    exact = states_of(Newton(rtol=1e-12), fn, torch.zeros_like(x), (x,))
    solver = NewtonKrylov(rtol=1e-12, forcing=1e-12, linear_solver=linear)
    seen = states_of(solver, fn, torch.zeros_like(x), (x,))
    assert len(exact) == len(seen)
    # Kelley's bound ends the last solves early: nothing finer than the tolerance is asked for
    torch.testing.assert_close(torch.stack(seen), torch.stack(exact), atol=1e-8, rtol=0)


def test_newton_converges_quadratically_and_linearly_with_a_fixed_forcing():
    fn, x = rows_tanh()
    trace = solve(Newton(rtol=1e-12), fn, torch.zeros_like(x), (x,))["abs_trace"]
    assert bool((trace[:, 2:] <= (2 * trace[:, 1:-1] ** 2).clamp_min(1e-14)).all())
    forced = solve(NewtonKrylov(rtol=1e-12, forcing=0.3), fn, torch.zeros_like(x), (x,))["abs_trace"]
    assert bool((forced[:, 1:8] <= 0.5 * forced[:, :7]).all())
    assert forced.shape[1] > trace.shape[1]


def test_forcing_terms_are_each_samples_own():
    settings = {"rtol": 1e-12, "min_forcing": 0.0, "first_forcing": 0.3}
    solver = NewtonKrylov(**settings)
    state = solver.init(None, None, None)
    norm = torch.tensor([[1.0], [1.0], [4.0]], dtype=F64)
    limit = torch.zeros_like(norm)
    assert solver._forcing(state, norm, limit).tolist() == [[0.3]] * 3
    after = torch.tensor([[0.1], [0.9], [2.0]], dtype=F64)
    torch.testing.assert_close(
        solver._forcing(state, after, limit)[:, 0], 0.9 * torch.tensor([0.01, 0.81, 0.25], dtype=F64)
    )
    # the second sample's .729 is not allowed to fall faster than .9 * .729^2
    third = solver._forcing(state, 0.01 * after, torch.tensor([[0.0], [0.0], [0.004]], dtype=F64))
    torch.testing.assert_close(third[:, 0], torch.tensor([0.9e-4, 0.9 * 0.729**2, 0.1], dtype=F64))


@pytest.mark.parametrize("cls", [NewtonKrylov, Newton])
def test_the_line_search_shortens_a_samples_own_steps(cls):
    z0 = torch.tensor([[0.5], [20.0], [-3.0]], dtype=F64)
    found = solve(cls(rtol=0, atol=1e-12, max_iter=60), arctan_map, z0)
    assert bool(found.converged.all())
    torch.testing.assert_close(found["z"], torch.zeros_like(z0), atol=1e-11, rtol=0)
    without = solve(cls(rtol=0, atol=1e-12, line_search=False, max_iter=60), arctan_map, z0)
    assert bool(without.converged[0])
    assert not bool(without.converged[1:].any())
    first = states_of(cls(rtol=0, atol=1e-12, max_iter=1), arctan_map, z0)[0]
    alone = states_of(cls(rtol=0, atol=1e-12, max_iter=1), arctan_map, z0[:1])[0]
    torch.testing.assert_close(first[:1], alone, atol=1e-14, rtol=0)  # the first sample's full step is not shortened
    shares = (first - z0) / (-torch.atan(z0) * (1 + z0**2))
    assert shares[0] == pytest.approx(1.0, abs=1e-9)
    assert float(shares[1]) < 0.5
    residual = torch.atan(z0).abs()
    assert bool((torch.atan(first).abs() < residual).all())


def test_a_search_along_a_bad_direction_ends_in_a_plain_step():
    calls = Calls(lambda z: 0.5 * z)
    z = torch.tensor([[1.0], [1.0], [torch.nan]], dtype=F64)
    residual = calls.fn(z) - z
    direction = torch.tensor([[1.0], [-1.0], [0.0]], dtype=F64)  # away from 0, to 0, nowhere
    trial, fz = search(calls, z, residual, direction, torch.zeros_like(z))
    assert trial[:2].tolist() == [[0.5], [0.0]]
    assert fz[:2].tolist() == [[0.25], [0.0]]
    assert calls.count == 9


def test_a_chord_with_refresh_1_is_newton():
    fn, x = rows_tanh(radius=2.0)
    newton = states_of(Newton(rtol=1e-12), fn, torch.zeros_like(x), (x,))
    chord = states_of(Chord(rtol=1e-12, refresh=1), fn, torch.zeros_like(x), (x,))
    torch.testing.assert_close(torch.stack(chord), torch.stack(newton), atol=0, rtol=0)


def test_a_chord_saves_jacobians_and_makes_them_when_it_must():
    fn, x = rows_tanh()
    newton = solve(Newton(**TIGHT), fn, torch.zeros_like(x), (x,))
    chord = solve(Chord(**TIGHT), fn, torch.zeros_like(x), (x,))
    assert chord["njvp"] < newton["njvp"]
    assert chord["nfe"] > newton["nfe"]
    stubborn = solve(Chord(rtol=1e-12, contraction=1.0, refresh=3, max_iter=100), fn, torch.zeros_like(x), (x,))
    assert stubborn["njvp"] == 6 * -(-int(stubborn["steps"].max()) // 3)  # every third step
    far = solve(Chord(rtol=0, atol=1e-12, max_iter=60), arctan_map, torch.full((1, 1), 20.0, dtype=F64))
    assert bool(far.converged.all())
    assert far["njvp"] > 1


def test_pseudo_transient_steps_are_implicit_euler():
    fn, x = rows_tanh()
    z0, dt = torch.zeros_like(x), 0.7
    (state,) = states_of(PseudoTransient(first_step=dt, forcing=1e-12, rtol=1e-12, max_iter=1), fn, z0, (x,))
    jacobian = torch.autograd.functional.jacobian(lambda z: fn(z, x).sum(0), z0).transpose(0, 1)
    matrix = (1 + 1 / dt) * torch.eye(6, dtype=F64) - jacobian
    torch.testing.assert_close(state, z0 + torch.linalg.solve(matrix, fn(z0, x) - z0), atol=1e-10, rtol=0)


def test_pseudo_time_steps_follow_each_samples_residual():
    fn, x = rows_tanh(batch=2)
    x[1] *= 8
    solver = PseudoTransient(first_step=1.0, rtol=1e-12, max_iter=2)
    found = solve(solver, fn, torch.zeros_like(x), (x,), keep_state=True)
    trace = found["abs_trace"]
    torch.testing.assert_close(found.solver_state.dt[:, 0], (trace[:, 0] / trace[:, 2]).clamp(max=100.0))
    assert found.solver_state.dt[0] != found.solver_state.dt[1]


def test_pseudo_transient_takes_back_a_step_that_ends_in_nan():
    def fn(z):  # a Newton step from 0 ends at 10, where the logarithm has no value
        return torch.log(4 - z) - 1.0 + 0.0 * z

    z0 = torch.tensor([[3.99], [0.5]], dtype=F64)
    found = solve(PseudoTransient(first_step=1e6, rtol=1e-10, max_iter=60), fn, z0)
    assert bool(found.converged.all())
    z = found["z"]
    torch.testing.assert_close(fn(z), z, atol=1e-9, rtol=0)


# ---- states and settings


@EACH
def test_states_can_be_selected_copied_and_pickled(cls):
    fn, x = rows_tanh()
    w = fn(torch.eye(6, dtype=F64), torch.zeros(6, 6, dtype=F64)).atanh()
    close = {Chord: {"contraction": 1.0}, Newton: {}}.get(cls, {"forcing": 1e-12})  # no row decides for another
    solver = cls(rtol=1e-12, **close)
    with torch.no_grad():
        z = torch.zeros_like(x)
        problem = Problem.of(lambda z: NoForward.apply(z @ w + x), StateSpec(z))
        fz = problem(z)
        state = solver.init(problem, z, fz)
        for _ in range(2):
            z, state, fz = solver.step(problem, z, fz, state)
            fz = problem(z) if fz is None else fz
        kept = copy.deepcopy(state)
        pickle.loads(pickle.dumps(state))
        rows = torch.tensor([4, 1])
        fewer = Problem.of(lambda z: NoForward.apply(z @ w + x[rows]), StateSpec(z[rows]))
        some = solver.step(fewer, z[rows], fz[rows], solver.select(kept, rows)).z
        every = solver.step(problem, z, fz, state).z
    torch.testing.assert_close(some, every[rows], atol=1e-10, rtol=0)
    assert fewer.njvp + fewer.nvjp > 0 or cls is Chord


@EACH
def test_a_kept_state_holds_no_graph(cls):
    fn, x = rows_tanh()
    w = fn(torch.eye(6, dtype=F64), torch.zeros(6, 6, dtype=F64)).atanh()
    found = solve(cls(**TIGHT), lambda z: NoForward.apply(z @ w + x), torch.zeros_like(x), keep_state=True)
    assert found.solver_state.products._linearized is None
    again = solve(cls(**TIGHT), fn, found["z"], (x,), warm_state=found.solver_state)
    assert again["nfe"] == 1


def test_a_state_too_large_for_a_matrix_is_refused():
    for cls in (Newton, Chord):
        with pytest.raises(ConfigError, match=r"300 features a sample, more than max_features=256.*newton_krylov"):
            solve(cls(), lambda z: 0.5 * z + 1, torch.zeros(2, 300))
        assert not solve(cls(max_features=300), lambda z: 0.5 * z + 1, torch.zeros(2, 300)).failed()


@pytest.mark.parametrize("cls", [NewtonKrylov, PseudoTransient])
def test_what_a_linear_solver_may_be_told(cls):
    assert cls(linear_solver={"name": "gmres", "restart": 7}).settings.linear_solver.restart == 7
    assert cls(linear_solver={"name": "gmres", "tol": 1e-3}).settings.linear_solver.tol == 1e-3  # the default
    with pytest.raises(ConfigError, match=r"tol=0.1.*forcing and max_linear"):
        cls(linear_solver={"name": "gmres", "tol": 0.1})
    with pytest.raises(ConfigError, match=r"max_iter=7.*max_linear"):
        cls(linear_solver={"name": "gmres", "max_iter": 7})
    with pytest.raises(UnknownPluginError, match="gmress"):
        cls(linear_solver="gmress")
    with pytest.raises(UnknownKeyError, match="restrat"):
        cls(linear_solver={"name": "gmres", "restrat": 7})


class Useless(LinearSolver[SolverSettings]):
    """Goes away from the solution, for some samples to NaN."""

    def step(self, problem, u, fu, state):
        away = -10 * problem.b
        away[1:] = torch.nan
        return Step(away, state)


@pytest.mark.parametrize("cls", [NewtonKrylov, PseudoTransient])
def test_a_linear_solver_that_fails_leaves_plain_steps(cls):
    fn, x = rows_tanh()
    with registry.scope():
        registry.register("linear_solvers", "useless", Useless)
        found = solve(cls(linear_solver="useless", rtol=1e-8, max_iter=400), fn, torch.zeros_like(x), (x,))
    assert bool(found.converged.all())
    (first,) = states_of(NewtonKrylov(rtol=1e-8, max_iter=1, max_linear=1), fn, torch.zeros_like(x), (x,))
    assert bool(torch.isfinite(first).all())


def test_max_linear_bounds_the_products_of_a_step():
    problem = affine(0.9)
    found = solve(NewtonKrylov(max_linear=2, rtol=1e-10, max_iter=3), problem.fn, problem.z0)
    assert found["njvp"] == 6


def test_settings_that_contradict_each_other():
    with pytest.raises(ConfigError, match=r"min_forcing=0.5 is above max_forcing=0.2"):
        NewtonKrylov(min_forcing=0.5, max_forcing=0.2)


def test_configurations_round_trip():
    given = {"name": "newton_krylov", "linear_solver": {"name": "gmres", "restart": 7}, "forcing": 0.2, "rtol": 1e-8}
    config = get_deq(solver=given).config
    again = DEQConfig.load(config.to_dict())
    assert again == config
    assert again.solver.linear_solver.restart == 7


@EACH
def test_inference_mode_is_refused(cls):
    with torch.inference_mode(), pytest.raises(GradientModeError, match=r"torch.no_grad\(\)"):
        iterate(cls(), Problem.of(lambda z: 0.5 * z + 1, StateSpec(torch.zeros(2, 3))), torch.zeros(2, 3))


# ---- by name


@EACH
def test_by_name_with_an_exact_gradient(cls):
    fn, x = rows_tanh()
    x.requires_grad_()
    deq = get_deq(
        solver={"name": NAMES[cls], "rtol": 1e-12},
        gradient={"name": "implicit", "solver": {"name": "anderson", "tol": 1e-11, "max_iter": 200}},
    )
    z_out, info = deq(fn, torch.zeros(5, 6, dtype=F64), args=(x,))
    assert bool(info.converged.all())
    g = torch.randn(5, 6, generator=torch.Generator().manual_seed(0), dtype=F64)
    (grad,) = torch.autograd.grad(z_out[-1], x, g)
    z = z_out[-1].detach()
    slope = 1 - fn(z, x.detach()) ** 2
    jacobian = torch.autograd.functional.jacobian(lambda z: fn(z, x.detach()).sum(0), z).transpose(0, 1)
    expected = slope * torch.linalg.solve((torch.eye(6, dtype=F64) - jacobian).mT, g)
    torch.testing.assert_close(grad, expected, atol=1e-8, rtol=0)


@EACH
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_by_name_as_the_backward_solver(cls, mode):
    """The adjoint is a linear problem: its products are there already."""
    fn, x = rows_tanh()
    x.requires_grad_()
    grads = []
    for name in (NAMES[cls], "anderson"):
        gradient = {"name": "implicit", "solver": {"name": name, "rtol": 1e-11, "max_iter": 60}}
        deq = getattr(get_deq(solver={"name": "newton", "rtol": 1e-13}, gradient=gradient), mode)()
        z_out, info = deq(fn, torch.zeros(5, 6, dtype=F64), args=(x,))
        grads.append(torch.autograd.grad(z_out[-1].pow(2).sum(), x)[0])
        assert not info["backward"].failed()
    torch.testing.assert_close(grads[0], grads[1], atol=1e-9, rtol=0)


@EACH
def test_by_name_on_a_state_of_several_parts_and_half_precision(cls):
    deq = get_deq(solver={"name": NAMES[cls], "rtol": 1e-3}).eval()
    z0 = (torch.zeros(2, 3, dtype=torch.bfloat16), torch.zeros(2, 2, 2))
    z_out, info = deq(lambda a, b: (0.5 * a.cos(), 0.3 * b + 0.1), z0)
    a, b = z_out[-1]
    assert not info.failed()
    torch.testing.assert_close(a.float(), torch.full((2, 3), 0.4501836), atol=4e-3, rtol=0)
    torch.testing.assert_close(b, torch.full((2, 2, 2), 1 / 7), atol=1e-3, rtol=0)


@EACH
def test_a_map_that_cuts_its_own_graph_is_still_judged_truthfully(cls):
    found = solve(cls(rtol=1e-9, max_iter=60), lambda z: 0.5 * z.detach() + 1, torch.zeros(2, 3, dtype=F64))
    assert bool(found.converged.all())  # J is 0 as far as autograd knows: plain steps
    torch.testing.assert_close(found["z"], torch.full((2, 3), 2.0, dtype=F64), atol=1e-8, rtol=0)


def test_a_linear_problem_is_solved_by_its_own_products():
    problem = affine(0.9)
    with torch.no_grad():
        b = problem.fn(problem.z0)
        linear = LinearProblem(lambda u: problem.fn(u) - b, None, b)
        found = iterate(NewtonKrylov(rtol=1e-11), linear, torch.zeros_like(b)).solution
    assert problem.error(found["z"]) < 1e-9
    assert linear.njvp == 0


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    radius=st.floats(0.1, 6.0),
    batch=st.integers(1, 4),
    d=st.integers(1, 5),
    which=st.sampled_from(ALL),
    tol=st.sampled_from([1e-2, 1e-6, 1e-10]),
    bad=st.booleans(),
)
def test_nothing_is_called_converged_that_is_not(seed, radius, batch, d, which, tol, bad):
    fn, x = rows_tanh(batch, d, radius, seed=seed)
    if bad:
        x[0, 0] = torch.nan
    found = solve(which(rtol=tol, max_iter=15), fn, torch.zeros_like(x), (x,))
    z = found["z"]
    fz = fn(z, x)
    done = found.converged
    assert bool(torch.isfinite(z).all())
    assert bool(((fz - z).norm(dim=1) <= 1.0001 * tol * fz.norm(dim=1))[done].all())
