"""The loop: when it waits for a device, when it ends, what it says then, and what it goes on from."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass

import pytest
import torch
from solvers_support import F64, Calls, complex_affine, gaussian, rows_tanh, solve, tanh
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deqcore import (
    ConfigError,
    LinearProblem,
    LinearSolver,
    Problem,
    Solver,
    SolverSettings,
    StateError,
    StateTypeError,
    Status,
    Step,
    get_deq,
    iterate,
    register_solver,
    registry,
)
from deqcore_solvers.anderson import Anderson
from deqcore_solvers.broyden import Broyden

ASKS = ("aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::equal", "aten::nonzero")
PATCHED = ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "cpu", "numpy")
PLAIN = ["aitken", "damped", "fixed_point_iter", "simple_fixed_point_iter"]
NEWTON = ["chord", "newton", "newton_krylov", "pseudo_transient"]
SOLVERS = [*PLAIN, *NEWTON, "anderson", "broyden"]


def make(name, **options):
    return registry.create("solvers", {"name": name, **options})


class Waits(TorchDispatchMode):
    """Notes what makes the host wait for the device: questions, and copies from one to the other."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.dim()]
        devices = {t.device for t in tensors}
        if devices and isinstance(out, torch.Tensor):
            devices.add(out.device)
        if name in ASKS or len(devices) > 1:
            self.found.append(name)
        return out


@contextlib.contextmanager
def waits(monkeypatch):
    """Names of the calls that wait, by the dispatcher and by Tensor's own methods."""
    mode = Waits()
    with monkeypatch.context() as patch, mode:
        for name in PATCHED:
            usual = getattr(torch.Tensor, name)

            def counting(self, *args, _usual=usual, _name=name):
                mode.found.append(_name)
                return _usual(self, *args)

            patch.setattr(torch.Tensor, name, counting)
        yield mode.found


def fixed(batch=20, d=5, size=0.8):
    g = torch.Generator().manual_seed(4)
    w = gaussian(d, size, g)
    x = torch.randn(batch, d, generator=g, dtype=F64)
    return (lambda z: torch.tanh(z @ w.T) + x), torch.zeros(batch, d, dtype=F64)


# ---- runs that never wait

#: What can't be done without a question: a line search, and Newton's kin, ask whether all samples are content.
NO_WAIT = {
    "fixed_point_iter": {},
    "fixed_point_iter final": {"return_final": True},
    "damped": {},
    "damped fixed": {"damping": 0.5},
    "aitken": {},
    "broyden": {},
    "broyden bad": {"update": "bad"},
    "broyden good": {"update": "good"},
    "broyden small": {"memory": 3},
    "anderson": {},
    "anderson I": {"type": "I"},
    "anderson safe": {"safeguard": 2.0},
    "anderson capped": {"weight_cap": 5.0},
    "anderson restarted": {"restart": 4},
    "anderson damped": {"damping": 0.7},
    "simple_fixed_point_iter": {},
}


@pytest.fixture
def elsewhere(monkeypatch):
    """Makes a map on a device other than the CPU: one without values, where every question is an error."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device: False)  # that device has none
    usual = torch.tensor

    def tensor(data, **options):
        assert torch.device(options.get("device") or "cpu").type == "cpu", "numbers are copied to the device"
        return usual(data, **options)

    monkeypatch.setattr(torch, "tensor", tensor)

    def make_map(batch, d=5):
        w, x = torch.empty(d, d, device="meta"), torch.empty(batch, d, device="meta")
        return (lambda z: torch.tanh(z @ w.T) + x), torch.empty(batch, d, device="meta")

    return make_map


@pytest.mark.parametrize("case", NO_WAIT)
@pytest.mark.parametrize("given", [{"tol": 0.0}, {"rtol": 0.0, "atol": 0.0}])
@pytest.mark.parametrize("batch", [3, 20])
def test_fixed_runs_never_wait(case, given, batch, elsewhere):
    fn, z0 = elsewhere(batch)
    solver = make(case.split()[0], max_iter=12, **given, **NO_WAIT[case])
    with Waits() as mode:
        solve(solver, fn, z0)
    assert mode.found == []


@pytest.mark.parametrize(
    "options",
    [
        {"check_every": 3},
        {"keep_trace": False},
        {"sample_at": [5, 9]},
        {"callback": lambda step, z, residual: None},
        {"keep_state": True},
        {"compact": True},
    ],
)
@pytest.mark.parametrize("size", [5, 1 << 14])
def test_fixed_runs_never_wait_whatever_is_asked_for(options, size, elsewhere):
    """More steps than are kept, and states so large that none is kept."""
    w, x = torch.empty(size, device="meta"), torch.empty(20, size, device="meta")
    with Waits() as mode:
        solve(make("fixed_point_iter", max_iter=70, tol=0.0), lambda z: w * z + x, torch.empty_like(x), **options)
    assert mode.found == []


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("on_failure", ["ignore", "warn"])
def test_the_whole_call_of_a_fixed_run_never_waits(mode, on_failure, elsewhere):
    fn, z0 = elsewhere(20)
    deq = get_deq(solver={"name": "anderson", "max_iter": 9, "tol": 0.0}, on_failure=on_failure).train(mode)
    with Waits() as seen, torch.no_grad():
        deq(fn, z0)
    assert seen.found == []


@pytest.mark.parametrize("name", ["anderson", "fixed_point_iter"])
def test_a_run_with_a_tolerance_does_wait(name, elsewhere):
    fn, z0 = elsewhere(20)
    with pytest.raises(RuntimeError, match="meta"):
        solve(make(name, max_iter=12, tol=1e-3), fn, z0)


def pretend(monkeypatch, name):
    """Have anderson and broyden take the way that they take where asking would be waiting."""
    import deqcore_solvers.anderson as anderson
    import deqcore_solvers.broyden as broyden

    if name == "broyden":
        monkeypatch.setattr(broyden, "_some", lambda rows: True)
    if name == "anderson":
        elsewhere = _Elsewhere(anderson.torch)
        monkeypatch.setattr(anderson, "torch", elsewhere)


class _Elsewhere:
    """torch, whose factorizations say that all is well in a tensor that claims to be on another device."""

    def __init__(self, real):
        self.real = real
        self.linalg = self

    def __getattr__(self, name):
        found = getattr(self.real, name, None)
        return getattr(self.real.linalg, name) if found is None else found

    def cholesky_ex(self, gram):
        factor, info = self.real.linalg.cholesky_ex(gram)
        return factor, _Info(info)

    def solve_ex(self, gram, target):
        weights, info = self.real.linalg.solve_ex(gram, target)
        return weights, _Info(info)


class _Info:
    def __init__(self, info):
        self.info = info
        self.device = torch.device("meta")

    def __ne__(self, other):
        return self.info != other


@pytest.mark.parametrize("name", ["anderson", "broyden"])
def test_the_way_of_other_devices_gives_the_same_values(name, monkeypatch):
    fn, z0 = fixed()
    runs = []
    for elsewhere in (False, True):
        with monkeypatch.context() as patch:
            if elsewhere:
                pretend(patch, name)
            runs.append(solve(make(name, max_iter=12, tol=0.0), fn, z0)["z"])
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-12, atol=1e-13)


def test_the_counter_of_waits_counts(monkeypatch):
    with waits(monkeypatch) as found:
        bool(torch.ones(1) > 0)
        torch.ones(1).item()
        torch.ones(2).tolist()
        torch.ones(2).nonzero()
        torch.ones(2).to("meta")
    assert {"aten::_to_copy", "__bool__", "item", "tolist", "aten::nonzero", "aten::_local_scalar_dense"} <= set(found)


@pytest.mark.parametrize("name", ["fixed_point_iter", "damped", "broyden"])
@pytest.mark.parametrize("every", [3, 5])
def test_checks_are_the_only_waits(name, every, monkeypatch):
    fn, z0 = fixed()
    pretend(monkeypatch, name)
    at = []
    calls = []

    def counted(z):
        calls.append(len(found))
        return fn(z)

    with waits(monkeypatch) as found:
        solve(make(name, max_iter=20, tol=1e-13), counted, z0, check_every=every)
    # The evaluation of step k is calls[k]; between two of them something was asked only where the first was judged.
    for k in range(1, len(calls) - 1):
        asked = calls[k + 1] - calls[k]
        assert (asked > 0) == (k % every == 0), (k, asked)
        at.append(asked)
    assert at


@pytest.mark.parametrize("given", [{"tol": 0.0}, {"rtol": 0.0, "atol": 0.0}])
@pytest.mark.parametrize("steps", [1, 5, 40, 90])
@pytest.mark.parametrize("size", [0.7, 1.6])
def test_fixed_runs_return_the_best_step(given, steps, size):
    """The best whole step, by its worst sample, of an explicit loop."""
    fn, z0 = fixed(size=size)
    linear = gaussian(5, size, torch.Generator().manual_seed(8))

    def f(z):
        return fn(z) * 0.5 + z @ linear.T

    states = [z0]
    for _ in range(steps):
        states.append(f(states[-1]))
    residuals = torch.stack([(f(z) - z).norm(dim=1) for z in states])
    best = int(residuals.amax(1).argmin())
    info = solve(make("fixed_point_iter", max_iter=steps, **given), f, z0)
    torch.testing.assert_close(info["z"], states[best], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(info["abs_lowest"], residuals[best], rtol=1e-9, atol=1e-14)
    assert info["nstep"].tolist() == [best] * 20
    torch.testing.assert_close(info["abs_trace"], residuals.T, rtol=1e-9, atol=1e-14)
    assert info["nfe"] == steps + 1


@pytest.mark.parametrize("steps", [20, 90])
@pytest.mark.parametrize("since", [7, 50])
def test_rows_of_nan_in_a_fixed_run_get_their_own_best(steps, since):
    fn, z0 = fixed()
    calls = Calls(fn)

    def faulty(z):
        out = calls(z)
        if calls.count > since:
            out = out.clone()
            out[4] = math.nan
        return out

    info = solve(make("fixed_point_iter", max_iter=steps, tol=0.0), faulty, z0)
    states = [z0]
    for _ in range(steps):
        states.append(fn(states[-1]))
    residuals = torch.stack([(fn(z) - z).norm(dim=1) for z in states])
    others = torch.arange(20) != 4
    best = int(residuals[:, others].amax(1).argmin())
    torch.testing.assert_close(info["z"][others], states[best][others], rtol=1e-12, atol=1e-12)
    if since < steps:
        mine = int(residuals[:since, 4].argmin())
        assert info["status"][4] == Status.NON_FINITE
        torch.testing.assert_close(info["z"][4], states[mine][4], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(info["abs_lowest"][4], residuals[mine, 4], rtol=1e-9, atol=1e-14)
        assert info["nstep"][4] == mine
    assert not (info["status"][others] == Status.NON_FINITE).any()
    assert torch.isfinite(info["z"]).all()


def test_a_row_of_nan_gets_a_finite_state_of_before():
    slope = torch.tensor([[1.01], [0.5]], dtype=F64)
    start = torch.tensor([[1e-3], [1.0]], dtype=F64)
    calls = []

    def fn(z):
        calls.append(1)
        out = slope * z
        if len(calls) > 50:
            out[0] = math.nan
        return out

    info = solve(make("fixed_point_iter", max_iter=60, tol=0.0), fn, start)
    assert info["nstep"][0] < 51 and info["nstep"][1] == 60
    assert torch.isfinite(info["z"]).all() and info["status"][0] == Status.NON_FINITE


def test_fixed_runs_that_are_never_finite():
    info = solve(make("anderson", max_iter=5, tol=0.0), lambda z: z * math.nan, torch.ones(3, 2, dtype=F64))
    assert (info["z"] == 1).all()
    assert info["status"].tolist() == [Status.NON_FINITE] * 3


def test_fixed_runs_with_everything_else():
    fn, z0 = fixed()
    seen = []
    info = solve(
        make("anderson", max_iter=30, tol=0.0, max_nfe=11),
        fn,
        z0,
        check_every=4,
        callback=lambda step, z, residual: seen.append(step),
        keep_trace=False,
    )
    assert seen == [4, 8, 10]
    assert info["nfe"] == 11
    assert info["abs_trace"].shape == (20, 1)
    torch.testing.assert_close((fn(info["z"]) - info["z"]).norm(dim=1), info["abs_lowest"], rtol=1e-9, atol=1e-14)


# ---- budgets


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("budget", [1, 2, 3, 7, 20])
@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("tol", [1e-13, 0.0])
def test_no_step_begins_beyond_the_budget(name, budget, every, tol):
    fn, z0 = fixed()
    begun = []
    solver = make(name, max_iter=60, max_nfe=budget, tol=tol)
    step, problem = solver.step, Problem.of(fn, _spec(z0))

    def watched(problem, z, fz, state):
        begun.append(problem.work)
        return step(problem, z, fz, state)

    solver.step = watched
    with torch.no_grad():
        info = iterate(solver, problem, z0.clone(), check_every=every).solution
    assert all(work < budget for work in begun), begun
    assert begun or budget == 1
    z = info["z"]
    residual = (fn(z) - z).norm(dim=1)
    torch.testing.assert_close(residual, info["abs_lowest"], rtol=1e-7, atol=1e-13)
    done = residual <= tol
    for k, code in enumerate(info["status"].tolist()):
        assert (code == Status.CONVERGED) == bool(done[k])
        assert code in (Status.CONVERGED, Status.MAX_STEPS, Status.STALLED, Status.AT_PRECISION)
    if budget < 20:
        assert not info.converged.any()
        assert int(info["steps"].max()) == len(begun)


def _spec(z0):
    from deqcore import StateSpec

    return StateSpec(z0)


def test_a_budget_holds_for_the_whole_call():
    fn, z0 = fixed()
    calls = Calls(fn)
    deq = get_deq(
        solver={"name": "fixed_point_iter", "max_iter": 60, "max_nfe": 10, "tol": 1e-13},
        core={"n_states": 3},
        on_failure="ignore",
    )
    with torch.no_grad():
        deq(calls, z0)
    assert calls.count <= 10 + 3 + 3  # what each stretch judges, and what its gradient takes


def own_loop(func, x0, max_iter=50, tol=1e-3, stop_mode="abs", indexing=None):
    for _ in range(max_iter):
        x0 = func(x0)
    return x0, [], {}


@pytest.mark.parametrize("given", [{"max_nfe": 5}, {"patience": 2}])
def test_limits_that_a_solver_with_its_own_loop_cannot_keep_are_refused(given):
    """Nothing given is ignored."""
    fn, z0 = fixed()
    with registry.scope():
        register_solver("own_loop", own_loop)
        with pytest.raises(ConfigError, match=next(iter(given))):
            get_deq(solver={"name": "own_loop", "max_iter": 30, **given})(fn, z0)


# ---- callbacks


@pytest.mark.parametrize("name", ["anderson", "broyden", "fixed_point_iter", "newton_krylov"])
@pytest.mark.parametrize("tol", [1e-9, 0.0])
@pytest.mark.parametrize("every", [1, 3])
def test_a_callback_ends_the_run(name, tol, every):
    fn, z0 = fixed()
    seen = []

    def callback(step, z, residual):
        torch.testing.assert_close((fn(z) - z).norm(dim=1), residual, rtol=1e-7, atol=1e-13)
        seen.append(step)
        return step >= 2

    info = solve(make(name, max_iter=40, tol=tol), fn, z0, callback=callback, check_every=every)
    assert seen == ([1, 2] if every == 1 else [3])
    residual = (fn(info["z"]) - info["z"]).norm(dim=1)
    torch.testing.assert_close(residual, info["abs_lowest"], rtol=1e-7, atol=1e-13)
    assert (info.converged == (residual <= tol)).all()
    assert info["status"].shape == (20,)


@pytest.mark.parametrize("value", [None, 1, "yes", False])
def test_only_true_ends_the_run(value):
    fn, z0 = fixed()
    seen = []

    def callback(step, z, residual):
        seen.append(step)
        return value

    info = solve(make("anderson", max_iter=40, tol=1e-9), fn, z0, callback=callback)
    assert info.converged.all()
    assert len(seen) == int(info["steps"].max())


def test_the_step_at_which_a_callback_ends_an_unfinished_run_is_no_failure_to_judge():
    """A state that converged at the same step is called converged."""
    fn, z0 = fixed()
    usual = solve(make("anderson", max_iter=40, tol=1e-6), fn, z0)
    last = int(usual["steps"].max())
    info = solve(make("anderson", max_iter=40, tol=1e-6), fn, z0, callback=lambda step, z, r: step == last)
    assert info.converged.all()


@pytest.mark.parametrize("core", [{"n_states": 3}, {"indexing": (5, 9)}, {"name": "indexing", "indexing": (5, 9)}])
def test_a_callback_ends_the_whole_call(core):
    fn, z0 = fixed()
    seen = []

    def callback(step, z, residual):
        seen.append(step)
        return step == 2

    deq = get_deq(
        solver={"name": "fixed_point_iter", "tol": 1e-12, "max_iter": 60},
        core={"name": "sliced", **core},
        on_failure="ignore",
    )
    with torch.no_grad():
        out, _ = deq(fn, z0, callback=callback)
    assert seen == [1, 2]
    assert len(out) == 3


# ---- patience, divergence and their composition


def slopes(values, x=1.0):
    slope = torch.tensor(values, dtype=F64)[:, None]
    return (lambda z: slope * z + x), torch.zeros(len(values), 1, dtype=F64)


def test_patience_waits_for_the_last_one_that_improves():
    fn, z0 = slopes([-1.0] * 9 + [0.9])
    info = solve(make("fixed_point_iter", rtol=1e-8, max_iter=2000, patience=4), fn, z0)
    steps = math.ceil(math.log(1e-8) / math.log(0.9))
    assert info["status"].tolist() == [Status.STALLED] * 9 + [Status.CONVERGED]
    assert abs(int(info["steps"][-1]) - steps) <= 25


@pytest.mark.parametrize("batch", [1, 20])
@pytest.mark.parametrize("patience", [1, 2, 5, 12])
def test_patience_ends_a_run_in_which_nobody_improves(batch, patience):
    fn, z0 = slopes([-1.0] * batch)
    calls = Calls(fn)
    info = solve(make("fixed_point_iter", rtol=1e-8, max_iter=500, patience=patience), calls, z0)
    assert info["status"].tolist() == [Status.STALLED] * batch
    assert patience <= calls.count - 1 <= patience + 2


def test_patience_counts_steps_between_checks():
    fn, z0 = slopes([-1.0] * 12)
    calls = Calls(fn)
    solve(make("fixed_point_iter", rtol=1e-8, max_iter=500, patience=6), calls, z0, check_every=3)
    assert 6 <= calls.count - 1 <= 12 + 6


@pytest.mark.parametrize(
    ("given", "slope", "expected", "steps"),
    [
        ({"rtol": 1e-2, "atol": 1e-3}, 0.5, Status.CONVERGED, None),
        ({"rtol": 1e-9, "atol": 1e-12, "max_nfe": 6}, 0.5, Status.MAX_STEPS, 5),
        ({"rtol": 1e-9, "max_iter": 4}, 0.5, Status.MAX_STEPS, 4),
        ({"rtol": 1e-9, "patience": 3, "max_nfe": 50}, -1.0, Status.STALLED, 3),
        ({"rtol": 1e-9, "patience": 30, "max_nfe": 6}, -1.0, Status.MAX_STEPS, 5),
        ({"rtol": 1e-9, "patience": 30, "divergence_factor": 100.0}, 3.0, Status.DIVERGED, None),
        ({"rtol": 1e-9, "patience": 2, "divergence_factor": 1e6}, 3.0, Status.STALLED, None),
        ({"rtol": 1e-9, "divergence_factor": 1e6, "max_nfe": 8}, 3.0, Status.DIVERGED, 7),
        ({"atol": 0.3, "rtol": 0.0, "patience": 3, "max_nfe": 9}, 0.5, Status.CONVERGED, 2),
    ],
)
@pytest.mark.parametrize("batch", [2, 20])
def test_whichever_comes_first_ends_the_run_and_gives_the_status(given, slope, expected, steps, batch):
    fn, z0 = slopes([slope] * batch)
    calls = Calls(fn)
    info = solve(make("fixed_point_iter", **{"max_iter": 400, **given}), calls, z0)
    if expected is Status.STALLED and slope == 3.0:  # its last residual is that of a diverging run
        assert set(info["status"].tolist()) <= {Status.STALLED, Status.DIVERGED}
    else:
        assert info["status"].tolist() == [expected] * batch
    if steps is not None:
        assert calls.count == steps + 1 or (expected is Status.STALLED and calls.count <= steps + 3)
    else:
        assert calls.count < 40


def test_growing_states_are_not_done_by_their_first_residual():
    """A small residual at a small state is none of a solution because the state has grown since."""
    for batch in (4, 20):
        info = solve(
            make("fixed_point_iter", rtol=1e-4, max_iter=200),
            lambda z: 2 * z / (1 + z / 1e6),
            torch.ones(batch, 1, dtype=F64),
        )
        assert info.converged.all()
        assert ((info["z"] / 1e6 - 1).abs() < 1e-3).all()


# ---- warm start


@pytest.mark.parametrize("name", ["anderson", "broyden"])
def test_a_kept_solver_state_saves_steps(name):
    problem = tanh(0.97, d=40, batch=12)
    options = {"solver": {"name": name, "rtol": 1e-9, "max_iter": 300}, "keep_state": True}
    deq = get_deq(**options).eval()
    g = torch.Generator().manual_seed(1)
    shift = 1e-3 * torch.randn(12, 40, generator=g, dtype=F64)

    def moved(z):
        return problem.fn(z) + shift

    with torch.no_grad():
        _, first = deq(problem.fn, problem.z0)
        _, cold = deq(moved, problem.z0)
        bare = get_deq(**{**options, "keep_state": False}).eval()
        _, by_z = bare(moved, problem.z0, warm_start=bare(problem.fn, problem.z0)[1])
        _, by_state = deq(moved, problem.z0, warm_start=first)
        again = deq(moved, problem.z0, warm_start=first)[1]
    assert first.solver_state is not None
    assert by_state.converged.all()
    assert by_z["nfe"] < cold["nfe"]
    assert by_state["nfe"] < 0.9 * by_z["nfe"], (cold["nfe"], by_z["nfe"], by_state["nfe"])
    assert (again["z"] == by_state["z"]).all()  # the solution that it comes from is not used up
    torch.testing.assert_close(by_state["z"], cold["z"], rtol=0, atol=1e-6)


def test_warm_starts_of_other_shapes_are_refused():
    fn, z0 = fixed(20)
    other, w0 = fixed(7)
    deq = get_deq(solver="anderson", keep_state=True).eval()
    with torch.no_grad():
        _, info = deq(fn, z0)
        with pytest.raises(StateError, match=r"warm_start is for another state.*20.*7"):
            deq(other, w0, warm_start=info)
        with pytest.raises(StateTypeError, match="info of an earlier call"):
            deq(fn, z0, warm_start=info["z"])
        import pickle

        loaded = pickle.loads(pickle.dumps(info))
        with pytest.raises(StateError, match=r"\(20, 5\)"):
            deq(other, w0, warm_start=loaded)
        assert deq(fn, z0, warm_start=loaded)[1]["nfe"] < info["nfe"]


@pytest.mark.parametrize("first", ["anderson", "broyden", "damped"])
@pytest.mark.parametrize("second", ["anderson", "broyden", "newton_krylov"])
def test_another_solvers_state_is_ignored(first, second):
    fn, z0 = fixed()
    with torch.no_grad():
        _, info = get_deq(solver={"name": first, "tol": 1e-3}, keep_state=True).eval()(fn, z0)
        deq = get_deq(solver={"name": second, "tol": 1e-10, "max_iter": 99}).eval()
        out, warm = deq(fn, z0, warm_start=info)
    assert warm.converged.all()
    assert (fn(out[0]) - out[0]).norm(dim=1).max() <= 1e-10


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("anderson", {"memory": 3}, {"memory": 12}),
        ("anderson", {"memory": 12}, {"memory": 3}),
        ("anderson", {"type": "II"}, {"type": "I", "safeguard": 2.0}),
        ("anderson", {"safeguard": 2.0}, {}),
        ("anderson", {}, {"safeguard": 2.0}),
        ("broyden", {"memory": 40}, {"memory": 3}),
        ("broyden", {"memory": 3}, {"memory": 40}),
        ("broyden", {"line_search": True}, {}),
        ("broyden", {}, {"line_search": True, "update": "good"}),
        ("damped", {}, {"damping": 0.5}),
        ("damped", {"damping": 0.5}, {}),
        ("newton_krylov", {}, {}),
    ],
)
def test_a_state_kept_under_other_settings(name, first, second):
    fn, z0 = fixed()
    with torch.no_grad():
        _, info = get_deq(solver={"name": name, "tol": 1e-4, "max_iter": 200, **first}, keep_state=True).eval()(fn, z0)
        deq = get_deq(solver={"name": name, "tol": 1e-10, "max_iter": 400, **second}).eval()
        out, warm = deq(lambda z: fn(z) + 1e-3, z0, warm_start=info)
        cold = deq(lambda z: fn(z) + 1e-3, z0)[1]
    assert warm.converged.all()
    assert (fn(out[0]) + 1e-3 - out[0]).norm(dim=1).max() <= 1e-10
    assert warm["nfe"] <= cold["nfe"] + 2


# ---- complex states


@pytest.mark.parametrize("name", [n for n in SOLVERS if n != "simple_fixed_point_iter"])
@pytest.mark.parametrize("tol", [1e-10, 0.0])
def test_complex_states(name, tol):
    fn, z0, answer = complex_affine()
    info = solve(make(name, tol=tol, max_iter=150), fn, z0)
    z = torch.view_as_complex(info["z"].unflatten(1, (4, 2)))
    assert (z - answer).abs().max() < 1e-8
    torch.testing.assert_close((fn(z) - z).norm(dim=1), info["abs_lowest"], rtol=1e-6, atol=1e-13)


# ---- linear solvers that estimate


class Liar(LinearSolver[SolverSettings]):
    """Steps by u <- A u + b, and says from the third step on that it is there."""

    estimates = True

    def __init__(self, settings=None, **options):
        super().__init__(settings, **options)
        self.inits = 0

    def init(self, problem, u, fu):
        self.inits += 1
        return {"steps": 0}

    def step(self, problem, u, fu, state):
        state["steps"] += 1
        new = fu
        claimed = new if state["steps"] >= 3 else u
        return Step(new, state, claimed if state["steps"] >= 3 else problem(new))

    def notes(self, state):
        return {"liar_steps": state["steps"]}


class Hopeless(Liar):
    """Never moves, and always says that it is there."""

    def step(self, problem, u, fu, state):
        state["steps"] += 1
        return Step(u, state, u)


def linear(batch=12, d=6, radius=0.8):
    g = torch.Generator().manual_seed(2)
    a = gaussian(d, radius, g)
    b = torch.randn(batch, d, generator=g, dtype=F64)
    exact = torch.linalg.solve(torch.eye(d, dtype=F64) - a, b.T).T
    return LinearProblem(lambda u: u @ a.T, lambda u: u @ a, b), exact


@pytest.mark.parametrize("batch", [4, 12])
def test_estimates_are_confirmed(batch):
    problem, exact = linear(batch)
    solver = Liar(tol=1e-8, max_iter=500)
    with torch.no_grad():
        info = iterate(solver, problem, torch.zeros_like(problem.b), problem.b).solution
    assert info.converged.all()
    assert (info["z"] - exact).norm(dim=1).max() < 1e-6
    true = (problem.b - problem.matvec(info["z"])).norm(dim=1)
    torch.testing.assert_close(true, info["abs_lowest"], rtol=1e-4, atol=1e-12)
    assert solver.inits > 5  # it went on from a new state each time it was caught


@pytest.mark.parametrize("given", [{}, {"max_nfe": 9}, {"patience": 4}])
@pytest.mark.parametrize("every", [1, 3])
def test_a_solver_that_only_lies_is_never_believed(given, every):
    problem, _ = linear()
    with torch.no_grad():
        info = iterate(
            Hopeless(tol=1e-8, max_iter=25, **given),
            problem,
            torch.zeros_like(problem.b),
            problem.b,
            check_every=every,
        ).solution
    true = (problem.b - problem.matvec(info["z"])).norm(dim=1)
    assert not info.converged.any()
    torch.testing.assert_close(true, info["abs_lowest"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("tol", [1e-8, 0.0])
def test_estimates_are_not_reported_where_the_run_is_cut_short(limit, tol):
    problem, _ = linear()
    with torch.no_grad():
        info = iterate(Liar(tol=tol, max_iter=limit), problem, torch.zeros_like(problem.b), problem.b).solution
    true = (problem.b - problem.matvec(info["z"])).norm(dim=1)
    torch.testing.assert_close(true, info["abs_lowest"], rtol=1e-6, atol=1e-9)
    assert not info.converged.any()


def test_a_callback_that_ends_a_run_of_estimates():
    problem, _ = linear()
    with torch.no_grad():
        info = iterate(
            Liar(tol=1e-8, max_iter=50), problem, torch.zeros_like(problem.b), problem.b, callback=lambda *_: True
        ).solution
    true = (problem.b - problem.matvec(info["z"])).norm(dim=1)
    torch.testing.assert_close(true, info["abs_lowest"], rtol=1e-6, atol=1e-9)


# ---- what a solver's own state may be


@dataclass
class Inner:
    values: torch.Tensor
    name: str


@dataclass
class Nested:
    """A state with everything in it."""

    inner: Inner
    listed: list
    mapping: dict
    number: torch.Tensor
    count: int = 0
    nothing: None = None


class Noted(Solver[SolverSettings]):
    def init(self, problem, z, fz):
        return Nested(Inner(z, "z"), [z, (fz, None)], {"a": z[:, 0]}, torch.tensor(3.0))

    def step(self, problem, z, fz, state):
        assert state.inner.values.shape[0] == z.shape[0]
        state.count += 1
        return Step(fz, state)

    def notes(self, state):
        return {"noted": state.count}


def test_select_takes_rows_of_everything():
    z = torch.arange(12.0).view(6, 2)
    solver = Noted()
    state = solver.init(None, z, z + 1)
    chosen = solver.select(state, torch.tensor([4, 1]))
    assert type(chosen) is Nested
    assert type(chosen.inner) is Inner
    assert (chosen.inner.values == z[[4, 1]]).all()
    assert (chosen.listed[1][0] == z[[4, 1]] + 1).all()
    assert chosen.listed[1][1] is None
    assert (chosen.mapping["a"] == z[[4, 1], 0]).all()
    assert chosen.number == 3
    assert (chosen.count, chosen.nothing, chosen.inner.name) == (0, None, "z")
    assert (state.inner.values == z).all()


@pytest.mark.parametrize("compact", [False, True])
def test_notes_arrive(compact):
    f, x = rows_tanh(batch=24)
    scale = torch.linspace(0.1, 1, 24, dtype=F64)[:, None]
    with registry.scope():
        register_solver("noted", Noted)
        deq = get_deq(solver={"name": "noted", "max_iter": 200, "tol": 1e-8}, compact=compact).eval()
        with torch.no_grad():
            _, info = deq(lambda z, s, x: f(s * z, x), torch.zeros_like(x), (scale, x))
    assert info["noted"] == int(info["steps"].max())


# ---- large states


@pytest.mark.parametrize("name", ["anderson", "broyden", "fixed_point_iter", "damped", "aitken"])
@pytest.mark.parametrize("tol", [1e-7, 0.0])
def test_large_states_are_solved_as_their_rows_alone(name, tol):
    """Beyond 2 ** 18 numbers, norms and products are made in parts and states are kept elsewhere."""
    batch, d = 10, (1 << 18) // 8
    g = torch.Generator().manual_seed(6)
    slope = torch.linspace(-0.6, 0.7, d, dtype=F64)
    x = torch.randn(batch, d, generator=g, dtype=F64)
    assert x.numel() >= 1 << 18

    def fn(z, x):
        return slope * z + 0.1 * torch.sin(z) + x

    steps = 14
    whole = solve(make(name, rtol=tol, max_iter=steps), fn, torch.zeros_like(x), (x,))
    for k in (0, 9):
        own = x[k : k + 1, :]
        alone = solve(make(name, rtol=tol, max_iter=steps), fn, torch.zeros_like(own), (own,))
        n = min(alone["abs_trace"].shape[1], whole["abs_trace"].shape[1])
        torch.testing.assert_close(whole["abs_trace"][k, :n], alone["abs_trace"][0, :n], rtol=1e-5, atol=1e-9)
        if tol == 0.0:
            torch.testing.assert_close(whole["abs_lowest"][k], alone["abs_lowest"][0], rtol=1e-5, atol=1e-9)
        z = whole["z"][k : k + 1]
        residual = (fn(z, own) - z).norm()
        torch.testing.assert_close(residual, whole["abs_lowest"][k], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(residual / fn(z, own).norm(), whole["rel_lowest"][k], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("norm", ["l2", "rms", "max"])
@pytest.mark.parametrize("tol", [1e-6, 0.0])
@pytest.mark.parametrize("size", [1 << 15, 1 << 19])
def test_norms_of_large_states(norm, tol, size):
    batch = 3
    g = torch.Generator().manual_seed(6)
    x = torch.randn(batch, size // batch + 1, generator=g)
    fn = lambda z: 0.5 * z + x  # noqa: E731
    info = solve(make("fixed_point_iter", rtol=tol, max_iter=12, residual_norm=norm), fn, torch.zeros_like(x))
    z = info["z"].double()
    gap = 0.5 * z + x - z
    expected = {"l2": gap.norm(dim=1), "rms": gap.square().mean(1).sqrt(), "max": gap.abs().amax(1)}[norm]
    torch.testing.assert_close(info["abs_lowest"].double(), expected, rtol=1e-3, atol=1e-6)
    assert info["abs_trace"].shape == (3, 13)
    ratios = info["abs_trace"][:, 1:] / info["abs_trace"][:, :-1]
    assert (ratios - 0.5).abs().max() < 1e-2


def test_rows_of_nan_in_a_large_fixed_run():
    size = 1 << 17
    g = torch.Generator().manual_seed(6)
    x = torch.randn(3, size, generator=g)
    calls = []

    def fn(z):
        calls.append(1)
        out = 0.5 * z + x
        if len(calls) > 5:
            out[1] = math.nan
        return out

    info = solve(make("fixed_point_iter", tol=0.0, max_iter=10), fn, torch.zeros_like(x))
    assert info["status"][1] == Status.NON_FINITE
    assert info["nstep"].tolist() == [10, 4, 10]
    assert torch.isfinite(info["z"]).all()


def test_the_names_of_solvers_are_known():
    assert {Anderson, Broyden} <= {registry.get("solvers", name) for name in ("anderson", "broyden")}
    left = set(registry.names("solvers")) - set(SOLVERS)
    assert left <= {"auto", "forward_backward", "peaceman_rachford"}
