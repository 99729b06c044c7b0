"""The polyalgorithm: counts, escalation, what it reports, and that samples go their own ways."""

from __future__ import annotations

import pickle
import tomllib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from solvers_support import F64, PROBLEMS, Calls, affine, chandrasekhar, gaussian, rows_tanh, solve

from benchmarks.maps import six
from deqcore import ConfigError, DEQConfig, GradientModeError, Status, UnknownKeyError, UnknownPluginError, get_deq
from deqcore_solvers.anderson import Anderson
from deqcore_solvers.auto import Auto
from deqcore_solvers.broyden import Broyden
from deqcore_solvers.newton_krylov import NewtonKrylov

TIGHT = {"rtol": 1e-12, "max_iter": 300}


def repelling(z):
    """Its only fixed point is .5, and f leads away from it."""
    return 3 * z - 1


def stages_of(found):
    return [stage["solver"] for stage in found["stages"]]


def work(found):
    return found["nfe"] + found["njvp"] + found["nvjp"]


def expanding(seed, d=8, batch=6):
    """tanh(3 W z + x), which has a fixed point and leads away from it."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(d, d, generator=g, dtype=F64) / d**0.5
    x = torch.randn(batch, d, generator=g, dtype=F64)
    return lambda z: torch.tanh(3 * z @ w.T + x), torch.zeros_like(x)


# ---- answers and counts


@pytest.mark.parametrize("name", PROBLEMS)
def test_exact_answers(name):
    problem = PROBLEMS[name]()
    found = solve(Auto(**TIGHT), problem.fn, problem.z0)
    assert not found.failed()
    assert problem.error(found["z"]) <= 1e-9


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["G64a", "N64", "S64"])
def test_evaluations_beside_the_best_single_solver(name, dtype):
    counts = []
    problem = six(name, 7, dtype)
    for cls in (Auto, Anderson, Broyden):
        fn = Calls(problem.fn())
        found = solve(cls(tol=1e-6, stop_mode="rel", max_iter=200), fn, torch.zeros_like(problem.x))
        assert bool(found.converged.all()) and problem.relative_residual(found["z"]) <= 1.2e-6
        assert fn.count == work(found)
        counts.append(fn.count)
    assert counts[0] <= 1.1 * min(counts[1:])


def test_plain_iteration_is_kept_while_it_contracts_fast():
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=F64)
    found = solve(Auto(**TIGHT), lambda z: 0.01 * torch.sin(z) + x, torch.zeros_like(x))
    assert bool(found.converged.all())
    assert stages_of(found) == ["fixed_point_iter"] and found["nfe"] <= 8


def test_the_plain_step_is_not_lost_to_the_next_stage():
    """Broyden's method after one plain step is Broyden's method from the start."""
    fn, x = rows_tanh()
    alone = solve(Broyden(**TIGHT), fn, torch.zeros_like(x), (x,))
    found = solve(Auto(stages=["fixed_point_iter", "broyden"], **TIGHT), fn, torch.zeros_like(x), (x,))
    assert found["nfe"] == alone["nfe"]
    torch.testing.assert_close(found["z"], alone["z"], atol=1e-14, rtol=0)


# ---- what info says


def test_info_says_what_was_used():
    fn = Calls(PROBLEMS["tanh -5"]().fn)
    found = solve(Auto(**TIGHT), fn, PROBLEMS["tanh -5"]().z0)
    first, second = found["stages"]
    assert first == {
        **{"solver": "fixed_point_iter", "samples": 4, "steps": 1, "nfe": 1, "products": 0},
        "reason": "first (4)",
    }
    assert second["solver"] == "anderson" and second["reason"] == "turns round (4)" and second["samples"] == 4
    assert 1 + first["nfe"] + second["nfe"] == found["nfe"] == fn.count  # the first evaluation came before all stages


def test_products_are_counted_with_their_stage():
    found = solve(Auto(stages="newton_krylov", **TIGHT), repelling, torch.zeros(2, 3, dtype=F64))
    (stage,) = found["stages"]
    assert stage["products"] == found["njvp"] + found["nvjp"] > 0
    assert 1 + stage["nfe"] == found["nfe"]


# ---- the choice of stages


def test_stages_by_name_from_toml(tmp_path):
    path = tmp_path / "deq.toml"
    path.write_text(
        '[solver]\nname = "auto"\nstages = ["broyden", {name = "newton_krylov", max_linear = 7, patience = 3}]\n'
    )
    config = DEQConfig.load(path)
    assert [stage.name for stage in config.solver.stages] == ["broyden", "newton_krylov"]  # pyright: ignore
    assert config.solver.stages[1].max_linear == 7  # pyright: ignore
    assert DEQConfig.from_dict(tomllib.loads(config.to_toml())) == config
    assert DEQConfig.from_dict(DEQConfig.load("auto").to_dict()) == DEQConfig.load("auto")


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ({"stages": ["brodyen"]}, UnknownPluginError, "broyden"),
        ({"stages": []}, ConfigError, "stages"),
        ({"stages": [{"name": "broyden", "memroy": 3}]}, UnknownKeyError, "memory"),
        ({"stages": [{"name": "broyden", "tol": 1e-4}]}, ConfigError, "tol=0.0001 can't be set for stage 'broyden'"),
        ({"turning": "andersen"}, ConfigError, "turning='andersen' is not among the stages"),
        ({"stall_after": 0}, ConfigError, "stall_after"),
    ],
)
def test_wrong_settings_are_refused(given, error, text):
    with pytest.raises(error, match=text):
        get_deq(solver={"name": "auto", **given})


def test_turning_may_name_another_stage():
    problem = PROBLEMS["tanh -5"]()
    found = solve(Auto(turning="damped", **TIGHT), problem.fn, problem.z0)
    assert stages_of(found)[:2] == ["fixed_point_iter", "damped"]
    found = solve(Auto(stages=["fixed_point_iter", "broyden"], **TIGHT), problem.fn, problem.z0)
    assert stages_of(found) == ["fixed_point_iter", "broyden"]


# ---- going on to another stage


@pytest.mark.parametrize("radius", [3.0, 10.0, 30.0, 100.0])
def test_negative_maps_on_which_plain_iteration_diverges(radius):
    g = torch.Generator().manual_seed(2)
    w = gaussian(24, radius, g, "negative")
    x = 0.5 * torch.randn(4, 24, generator=g, dtype=F64)
    found = solve(Auto(rtol=1e-10, max_iter=400), lambda z: torch.tanh(z @ w.T + x), torch.zeros_like(x))
    assert bool(found.converged.all())


def test_from_a_stage_that_stalls_to_newton():
    """Broyden's method with two vectors stalls on this; the next stage takes over from where it is."""
    problem = affine(1.5, d=12)
    settings_ = {"stages": [{"name": "broyden", "memory": 2}, "newton_krylov"], "stall_after": 5, **TIGHT}
    assert solve(Broyden(memory=2, **TIGHT), problem.fn, problem.z0).failed()
    found = solve(Auto(**settings_), problem.fn, problem.z0)
    assert bool(found.converged.all()) and problem.error(found["z"]) <= 1e-9
    assert stages_of(found) == ["broyden", "newton_krylov"]


def test_what_diverged_goes_back_to_its_best_state():
    found = solve(Auto(stages=["damped", "newton_krylov"], **TIGHT), repelling, torch.zeros(2, 3, dtype=F64))
    torch.testing.assert_close(found["z"], torch.full((2, 3), 0.5, dtype=F64), atol=1e-9, rtol=0)
    assert found["stages"][1]["reason"] == "diverged (2)"


@pytest.mark.parametrize("c", [0.9, 1 - 1e-6])
def test_chandrasekhar(c):
    problem = chandrasekhar(c)
    found = solve(Auto(**TIGHT), problem.fn, problem.z0)
    assert bool(found.converged.all()) and problem.error(found["z"]) <= (1e-9 if c == 0.9 else 1e-5)


def test_more_expanding_maps_are_solved_than_by_any_single_solver():
    solved = {}
    for name, cls in {"auto": Auto, "anderson": Anderson, "broyden": Broyden, "newton_krylov": NewtonKrylov}.items():
        solver = cls(tol=1e-6, stop_mode="rel", max_iter=150, max_nfe=400)
        solved[name] = sum(int(solve(solver, *expanding(seed)).converged.sum()) for seed in range(8))
    assert solved.pop("auto") > max(solved.values())


def test_a_kinked_map_and_one_that_jumps():
    g = torch.Generator().manual_seed(4)
    w = gaussian(10, 1.2, g, "negative")
    x = torch.randn(4, 10, generator=g, dtype=F64)
    kinked = solve(Auto(**TIGHT), lambda z: torch.relu(z @ w.T + x), torch.zeros_like(x))
    assert bool(kinked.converged.all())
    jump = solve(Auto(rtol=1e-9, max_iter=200), lambda z: 0.4 * z + 0.1 * torch.sign(z - 5) + x, torch.zeros_like(x))
    assert bool(jump.converged.all())


def test_a_map_without_a_fixed_point_is_not_called_solved():
    found = solve(Auto(max_iter=200, tol=1e-6), lambda z: z + 1, torch.zeros(2, 3))
    assert Status.CONVERGED not in found.counts()


def test_a_stage_without_derivatives_is_left_out():
    fn, z0 = expanding(1)
    options = {"stages": [{"name": "damped", "patience": 2}, "newton_krylov", "broyden"], "max_iter": 30}
    with torch.inference_mode():
        found = solve(Auto(tol=1e-6, **options), fn, z0)
        with pytest.raises(GradientModeError):
            solve(Auto(stages="newton_krylov"), fn, z0)
    assert "no derivative" in next(s for s in found["stages"] if s["solver"] == "broyden")["reason"]


# ---- samples


def test_nan_in_one_sample_touches_no_other():
    fn, x = rows_tanh()
    bad = x.clone()
    bad[2] = torch.nan
    clean = solve(Auto(**TIGHT), fn, torch.zeros_like(x), (x,))
    found = solve(Auto(**TIGHT), fn, torch.zeros_like(x), (bad,))
    others = [0, 1, 3, 4]
    assert found["status"].tolist() == [0, 0, int(Status.NON_FINITE), 0, 0]
    torch.testing.assert_close(found["z"][others], clean["z"][others], atol=1e-11, rtol=0)
    assert found["njvp"] + found["nvjp"] == 0  # nothing dear is tried for a sample that is lost


@settings(max_examples=10, deadline=None)
@given(order=st.permutations(range(6)))
def test_permuted_batches_have_permuted_answers(order):
    fn, _ = rows_tanh(batch=6, radius=1.3)
    x = rows_tanh(batch=6, radius=1.3)[1]
    solver = Auto(rtol=1e-10, max_iter=100)
    one = solve(solver, fn, torch.zeros_like(x), (x,))
    other = solve(solver, fn, torch.zeros_like(x), (x[order],))
    torch.testing.assert_close(other["z"], one["z"][order], atol=1e-7, rtol=0)
    assert {(s["solver"], s["samples"]) for s in one["stages"]} == {
        (s["solver"], s["samples"]) for s in other["stages"]
    }


def test_easy_samples_stay_where_they_are_when_a_hard_one_goes_on():
    radius = torch.tensor([0.5, 3.0, 0.5], dtype=F64)[:, None]
    options = {"stages": ["damped", "newton_krylov"], **TIGHT}
    found = solve(Auto(**options), lambda z: radius * z - 1, torch.zeros(3, 2, dtype=F64))
    assert bool(found.converged.all())
    assert [stage["samples"] for stage in found["stages"]] == [3, 1]


@pytest.mark.parametrize("radius", [0.9, 1.5])
def test_compaction_gives_the_same_answers(radius):
    fn, x = rows_tanh(batch=8, radius=radius)
    x = x * torch.linspace(0.3, 3, 8, dtype=F64)[:, None]
    options = {"solver": {"name": "auto", "rtol": 1e-10, "max_iter": 150}, "on_failure": "ignore"}
    with torch.no_grad():
        whole, info = get_deq(**options).eval()(fn, torch.zeros_like(x), args=(x,))
        parts, compact = get_deq(compact=True, **options).eval()(fn, torch.zeros_like(x), args=(x,))
    assert bool(info.converged.all()) and bool(compact.converged.all())
    torch.testing.assert_close(fn(parts[-1], x), parts[-1], atol=1e-8, rtol=0)
    if radius < 1:  # else there may be several fixed points
        torch.testing.assert_close(parts[-1], whole[-1], atol=1e-8, rtol=0)
    assert int(compact["sample_nfe"].sum()) < int(compact["nfe"]) * 8


def test_select_keeps_each_sample_in_its_stage():
    radius = torch.tensor([0.5, 3.0, 0.5, 3.0], dtype=F64)[:, None]
    options = {"stages": ["damped", {"name": "broyden"}], "max_iter": 7, "rtol": 1e-14, "stall_after": 3}
    solver = Auto(**options)
    state = solve(solver, lambda z: radius * torch.tanh(z) - 1, torch.full((4, 2), 2.0, dtype=F64), keep_state=True)
    kept = solver.select(state.solver_state, torch.tensor([1, 2]))
    assert kept.best.shape == (2, 2)
    assert sorted(int(k) for group in kept.groups for k in (torch.arange(2) if group.rows is None else group.rows)) == [
        *range(2)
    ]
    assert torch.equal(kept.stage, state.solver_state.stage[[1, 2]])


def graph(seed):
    """A map that mixes its rows, as a graph network does."""
    g = torch.Generator().manual_seed(seed)
    mix, w = gaussian(5, 1.0, g), gaussian(4, 0.8, g)
    x = torch.randn(5, 4, generator=g, dtype=F64)
    return lambda z: torch.tanh(mix @ z @ w.T + x), torch.zeros_like(x)


def test_samples_that_depend_on_each_other():
    deq = get_deq(solver={"name": "auto", "rtol": 1e-9, "max_iter": 100}, batch_dims=0, on_failure="raise").eval()
    solved = {Auto: 0, Broyden: 0}
    for seed in range(6, 14):
        fn, z0 = graph(seed)
        with torch.no_grad():
            (z,), _ = deq(fn, z0)
        torch.testing.assert_close(fn(z), z, atol=1e-8, rtol=0)
        for cls in solved:  # without being told
            found = solve(cls(rtol=1e-9, max_iter=200), fn, z0)
            solved[cls] += bool(found.converged.all())
            assert float((fn(found["z"]) - found["z"]).norm(dim=1).max()) <= 1.01 * float(found["abs_lowest"].max())
    assert solved[Auto] > solved[Broyden]


# ---- going on from an earlier solve, and backwards


def test_warm_start_goes_on_in_its_stage():
    fn, x = rows_tanh()
    deq = get_deq(solver={"name": "auto", "rtol": 1e-10, "max_iter": 100}, keep_state=True).eval()
    with torch.no_grad():
        _, first = deq(fn, torch.zeros_like(x), args=(x,))
        pickle.dumps(first.solver_state)
        _, second = deq(
            fn,
            torch.zeros_like(x),
            args=(x + 1e-3,),
            warm_start=first,
        )
    assert second["nfe"] < first["nfe"]
    assert all("warm start" in stage["reason"] for stage in second["stages"])
    assert "fixed_point_iter" not in stages_of(second)


def test_its_estimate_of_the_inverse_is_that_of_its_stages():
    fn, x = rows_tanh(radius=0.5)
    solver = Auto(stages=["broyden"], **TIGHT)
    found = solve(solver, fn, torch.zeros_like(x), (x,), keep_state=True)
    estimate = solver.inverse(found.solver_state)
    (group,) = found.solver_state.groups
    assert estimate is not None
    torch.testing.assert_close(estimate(x), Broyden().inverse(group.state)(x))
    assert Auto(stages=["anderson"]).inverse(found.solver_state) is None


def test_backward_solves():
    fn, x = rows_tanh(radius=0.9)
    gradients = []
    for name in ("auto", "broyden"):
        leaf = x.clone().requires_grad_()
        solver = {"name": name, "rtol": 1e-12, "max_iter": 100}
        deq = get_deq(
            solver=solver, gradient={"name": "implicit", "solver": {"name": name, "tol": 1e-12, "max_iter": 100}}
        )
        (z,), _ = deq(fn, torch.zeros_like(x), args=(leaf,))
        gradients += torch.autograd.grad(z.square().sum(), leaf)
    torch.testing.assert_close(*gradients, atol=1e-9, rtol=0)
