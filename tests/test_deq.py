"""The DEQ module's call: per-call settings, failure policy, warm starts, callbacks, copies, threads."""

from __future__ import annotations

import concurrent.futures
import copy
import inspect
import io
import pickle
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import deqcore
from deqcore import (
    DEQ,
    ConfigError,
    ConfigTypeError,
    ConvergenceError,
    ConvergenceWarning,
    DEQConfig,
    FunctionTypeError,
    Solution,
    StateError,
    StateTypeError,
    Status,
    UnknownKeyError,
    UnknownPluginError,
    get_deq,
    registry,
)


def slow(z: torch.Tensor) -> torch.Tensor:
    """Contracts by 0.9 a step to 10."""
    return 0.9 * z + 1


Z0 = torch.zeros(4, 3, dtype=torch.float64)


class Counted:
    """f that counts its evaluations."""

    def __init__(self, fn: Any = slow) -> None:
        self.fn, self.calls = fn, 0

    def __call__(self, *args: Any) -> Any:
        self.calls += 1
        return self.fn(*args)


def steps(deq: DEQ, *args: Any, **keywords: Any) -> int:
    """Largest number of solver updates in a call; f contracts by 0.9, so none stops before its limit."""
    _, info = deq(slow, Z0, *args, **keywords)
    return int(info["steps"].max())


# ---- solver_kwargs


@pytest.fixture
def deq():
    return get_deq("anderson", f_max_iter=25, f_tol=0, on_failure="ignore")


@pytest.fixture
def plain():
    return get_deq(f_max_iter=25, f_tol=0, on_failure="ignore")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "options", [{"f_max_iter": 3}, {"max_iter": 3}, {"f_max_iter": 3.0}, {"f_max_iter": 3, "max_iter": 3}]
)
def test_the_step_limit_per_call(plain, training, options):
    plain.train(training)
    assert steps(plain, solver_kwargs=options) == 3
    assert steps(plain) == 25
    assert steps(plain, options) == 3


def test_options_of_every_sort_per_call():
    deq = get_deq("anderson", f_max_iter=200, f_tol=1e-4, m=6, on_failure="ignore")
    for options, field, value in (
        ({"tol": 1e-2}, "tol", 1e-2),
        ({"f_tol": 1e-2}, "tol", 1e-2),
        ({"stop_mode": "rel"}, "stop_mode", "rel"),
        ({"f_stop_mode": "rel"}, "stop_mode", "rel"),
        ({"memory": 3}, "memory", 3),
        ({"m": 3}, "memory", 3),
        ({"lam": 1e-3}, "absolute_ridge", 1e-3),
        ({"tau": 0.5}, "damping", 0.5),
        ({"return_final": True}, "return_final", True),
        ({"rtol": 1e-2}, "rtol", 1e-2),
        ({"f_max_iter": None}, "max_iter", 200),
        ({}, "memory", 6),
        (None, "tol", 1e-4),
    ):
        solver = deq.solver_for(options)
        assert getattr(solver.settings, field) == value
        assert solver.settings.memory == (3 if field == "memory" and value == 3 else 6)
        deq(slow, Z0, solver_kwargs=options)
    assert get_deq(solver={"rtol": 1e-3}).solver_for({"tol": 1e-5}).settings.thresholds() == (1e-5, 0.0)
    assert get_deq("broyden").solver_for({"LBFGS_thres": None, "ls": True}).settings.line_search


def test_per_call_options_change_that_call_only(plain):
    before = plain.config.to_json()
    options = {"f_max_iter": 3, "tau": 0.5}
    plain(slow, Z0, options)
    assert options == {"f_max_iter": 3, "tau": 0.5}
    assert plain.config.to_json() == before
    assert steps(plain) == 25


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        (
            {"memry": 3},
            UnknownKeyError,
            "solver_kwargs: unknown key 'memry'. Did you mean 'memory'. solver 'anderson' takes",
        ),
        ({"b_tol": 3}, UnknownKeyError, "solver_kwargs: unknown key 'b_tol'"),
        ({"LBFGS_thres": 3}, UnknownKeyError, "solver_kwargs: unknown key 'LBFGS_thres'"),
        ({"f_maxiter": 3}, UnknownKeyError, "solver_kwargs: unknown key 'f_maxiter'. Did you mean 'max_iter'"),
        ({"f_max_iter": -1}, ConfigError, "solver_kwargs: max_iter must be an int, at least 0, got -1"),
        ({"max_iter": -1}, ConfigError, "max_iter must be an int, at least 0, got -1"),
        ({"tol": -1e-3}, ConfigError, "tol must be a finite number, at least 0, got -0.001"),
        ({"f_max_iter": True}, ConfigTypeError, "max_iter must be an int, at least 0, got True"),
        ({"f_max_iter": 3.5}, ConfigTypeError, "max_iter must be an int, at least 0, got 3.5"),
        ({"f_max_iter": "many"}, ConfigTypeError, "max_iter must be an int, at least 0, got 'many'"),
        ({"m": 0}, ConfigError, "memory must be an int, at least 1, got 0"),
        ({"m": 2, "memory": 3}, ConfigError, "solver_kwargs: memory is given twice: m=2 .* memory=3"),
        ({"f_max_iter": 3, "max_iter": 4}, ConfigError, "f_max_iter=3 and max_iter=4 differ; give one"),
        ({"tol": 1e-3, "rtol": 1e-3}, ConfigError, "give either tol .* or rtol/atol, not both"),
        ({"name": "broyden"}, ConfigError, "name can't change from call to call; make another DEQ"),
        ({"f_solver": "broyden"}, ConfigError, "f_solver can't change from call to call"),
        ([("tol", 1)], ConfigTypeError, "solver_kwargs must be a dict"),
    ],
)
def test_wrong_per_call_options(deq, options, error, text):
    with pytest.raises(error, match=text):
        deq(slow, Z0, solver_kwargs=options)


def test_naming_the_solver_that_it_is_changes_nothing(plain):
    assert steps(plain, {"f_solver": "fixed_point_iter", "f_max_iter": 4}) == 4


def test_options_that_are_no_plain_values():
    """A tensor's text says too little to tell it from another's."""
    deq = get_deq(on_failure="ignore")
    for value in (2, 5):
        options = {"max_iter": value, "tol": torch.tensor(0.0, dtype=torch.float64)}
        assert deq.solver_for(options) is not deq.solver_for(options)
        assert steps(deq, options) == value


def test_options_that_change_with_every_call_are_not_kept_forever(deq):
    for k in range(200):
        assert steps(deq, {"f_max_iter": 1, "tol": 1e-9 * k}) == 1
    assert len(deq._solvers) <= 64


def test_no_step_hands_the_start_to_the_gradient_backend():
    fn = Counted()
    z_out, info = get_deq(f_max_iter=0)(fn, Z0)
    assert fn.calls == 1 and torch.equal(z_out[-1], torch.ones_like(Z0))  # one phantom step
    assert info.counts() == {Status.SKIPPED: 4} and info["nfe"] == 1
    z_out, info = get_deq()(fn, Z0, {"f_max_iter": 0})
    assert torch.equal(z_out[-1], torch.ones_like(Z0))


# ---- TorchDEQ's order of arguments


def test_torchdeqs_positional_order():
    x = torch.ones(4, 3, dtype=torch.float64, requires_grad=True)
    written: list[Solution] = []
    deq = get_deq(ift=True, f_max_iter=200, on_failure="ignore")

    def fn(z):
        return 0.5 * z + x

    z_out, info = deq(fn, Z0, {"f_max_iter": 3}, False, written.append)
    assert int(info["steps"].max()) == 3
    z_out[-1].sum().backward()
    assert len(written) == 1 and written[0]["abs_lowest"].shape == (4,)
    for call in (
        lambda d: d(fn, Z0, {"f_max_iter": 3}, True),
        lambda d: d(fn, Z0, {"f_max_iter": 3}, sradius_mode=True),
        lambda d: d(fn, Z0, {"f_max_iter": 3}, True, None),
        lambda d: d(fn, Z0, (), {"f_max_iter": 3}, True),
        lambda d: d(fn, Z0, None, True, None),
        lambda d: d(fn, Z0, None, sradius_mode=True),
        lambda d: d(fn, Z0, solver_kwargs=None, sradius_mode=True, backward_writer=None),
        lambda d: d(fn, Z0, None, None, True),
    ):
        _, info = call(deq.eval())
        torch.testing.assert_close(info["sradius"], torch.full((4,), 0.5, dtype=torch.float64), rtol=0, atol=1e-6)
    for call in (
        lambda d: d(fn, Z0, {"f_max_iter": 3}, False, written.append),
        lambda d: d(fn, Z0, {"f_max_iter": 3}, backward_writer=written.append),
        lambda d: d(fn, Z0, (), {"f_max_iter": 3}, False, written.append),
        lambda d: d(fn, Z0, None, False, written.append),
    ):
        written.clear()
        z_out, info = call(deq.train())
        z_out[-1].sum().backward()
        assert len(written) == 1 and info["sradius"].tolist() == [-1.0]


def test_settings_given_twice_in_one_call(deq):
    with pytest.raises(ConfigError, match="solver_kwargs is given twice"):
        deq(slow, Z0, {"f_max_iter": 3}, solver_kwargs={"tol": 1})


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda d: d(None, Z0), r"f must be callable, got NoneType: deq\(fn, z0\)"),
        (lambda d: d(Z0, slow), "f must be callable, got Tensor"),
        (lambda d: d(slow, Z0, torch.zeros(3)), r"args must be a tuple .* got Tensor: args=\(x,\)"),
        (lambda d: d(slow, Z0, 3), "args must be a tuple .* got int"),
    ],
)
def test_wrong_arguments_of_a_call(deq, call, text):
    with pytest.raises(FunctionTypeError, match=text):
        call(deq)


def test_args_are_handed_on_and_get_gradients():
    a = torch.full((4, 3), 0.5, dtype=torch.float64, requires_grad=True)
    b = torch.ones(4, 3, dtype=torch.float64, requires_grad=True)
    for args in ((a, b), [a, b]):
        z_out, _ = get_deq(ift=True, f_tol=1e-10, b_tol=1e-12, f_max_iter=200)(lambda z, a, b: a * z + b, Z0, args)
        grads = torch.autograd.grad(z_out[-1].sum(), (a, b))
        torch.testing.assert_close(z_out[-1], torch.full_like(Z0, 2.0))
        torch.testing.assert_close(grads[0], torch.full_like(Z0, 4.0))  # b / (1 - a)^2
        torch.testing.assert_close(grads[1], torch.full_like(Z0, 2.0))  # 1 / (1 - a)


# ---- eval


@pytest.mark.parametrize(
    ("options", "train", "evaluate"),
    [
        (dict(f_max_iter=10), 10, 10),
        (dict(f_max_iter=10, eval_factor=1.5), 10, 15),
        (dict(f_max_iter=10, eval_factor=0.25), 10, 2),
        (dict(f_max_iter=10, eval_factor=0.0), 10, 0),
        (dict(f_max_iter=10, eval_f_max_iter=4), 10, 4),
        (dict(f_max_iter=10, eval_f_max_iter=4, eval_factor=3.0), 10, 4),
        (dict(f_max_iter=10, eval_max_iter=4), 10, 4),
    ],
)
def test_the_step_limit_in_eval(options, train, evaluate):
    deq = get_deq(**options, f_tol=0)
    assert (steps(deq), steps(deq.eval()), steps(deq.train())) == (train, evaluate, train)
    assert steps(deq.eval(), {"f_max_iter": 3}) == 3  # the call's own word is the last


def test_eval_returns_one_state_and_no_graph_without_grad():
    x = torch.ones(4, 3, dtype=torch.float64, requires_grad=True)
    deq = get_deq(n_states=3, grad=2, f_max_iter=60).eval()
    z_out, info = deq(lambda z: 0.5 * z + x, Z0)
    assert len(z_out) == 1 and z_out[0].requires_grad and torch.equal(z_out[0].detach(), info["z"])
    with torch.no_grad():
        z_out, _ = deq(lambda z: 0.5 * z + x, Z0)
    assert not z_out[0].requires_grad
    assert info["sradius"].shape == (1,) and info["sradius"].item() == 0


def test_the_value_in_eval_survives_a_gradient_that_is_not_finite():
    x = torch.ones(4, 3, dtype=torch.float64, requires_grad=True)

    def fn(z):
        out = 0.5 * z + x
        return out * torch.inf if torch.is_grad_enabled() else out  # overflows where the gradient is attached only

    z_out, info = get_deq(ift=False, f_max_iter=200, f_tol=1e-10).eval()(fn, Z0)
    assert torch.equal(z_out[0].detach(), info["z"]) and torch.isfinite(z_out[0]).all()


# ---- what happens when a solve fails


def here() -> int:
    return inspect.currentframe().f_back.f_lineno


@pytest.mark.parametrize("training", [True, False])
def test_a_warning_tells_what_failed_and_points_to_the_callers_line(training):
    deq = get_deq(f_max_iter=4, eval_f_max_iter=4).train(training)
    residual = 0.9**4 * 3**0.5
    with pytest.warns(ConvergenceWarning, match="forward solve: 4 of 4 samples max_steps") as caught:
        line = here() + 1
        deq(slow, Z0)
    (warning,) = caught
    assert (warning.filename, warning.lineno) == (__file__, line)
    text = str(warning.message)
    assert f"{residual:.3g} absolute" in text and "raise max_iter" in text and 'on_failure="ignore" silences' in text


def test_the_line_is_right_below_modules_hooks_and_wrappers():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.deq = get_deq(f_max_iter=2)

        def forward(self, x):
            return self.deq(lambda z: 0.9 * z + x, torch.zeros_like(x))[0][-1]  # the line

    source, start = inspect.getsourcelines(Model)
    line = start + next(k for k, text in enumerate(source) if "# the line" in text)
    model = Model()
    for prepare in (lambda: None, lambda: model.deq.register_forward_hook(lambda *_: None)):
        prepare()
        with pytest.warns(ConvergenceWarning) as caught:
            nn.Sequential(model)(torch.ones(2, 3))
        assert (caught[0].filename, caught[0].lineno) == (__file__, line)


def test_a_failing_backward_points_to_the_backward():
    x = torch.ones(4, 3, dtype=torch.float64, requires_grad=True)
    w = 0.95 * torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    deq = get_deq(ift=True, b_solver="fixed_point_iter", b_max_iter=2, f_max_iter=900, f_tol=1e-6)
    loss = deq(lambda z: z @ w + x, Z0)[0][-1].sum()
    with pytest.warns(ConvergenceWarning, match=r"backward solve: \d of 4 samples max_steps") as caught:
        line = here() + 1
        loss.backward()
    assert (caught[0].filename, caught[0].lineno) == (__file__, line)
    loss = deq(lambda z: z @ w + x, Z0)[0][-1].sum()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ConvergenceWarning):
            loss.backward()
    strict = get_deq(deq.config, on_failure="raise")
    loss = strict(lambda z: z @ w + x, Z0)[0][-1].sum()
    with pytest.raises(ConvergenceError, match=r"backward solve: \d of 4 samples"):
        loss.backward()


def test_raise_carries_the_solution():
    with pytest.raises(ConvergenceError, match=r'samples max_steps.*on_failure="warn" or "ignore" goes on') as caught:
        get_deq(f_max_iter=4, on_failure="raise")(slow, Z0)
    solution = caught.value.solution
    assert isinstance(caught.value, RuntimeError) and solution.counts() == {Status.MAX_STEPS: 4}
    torch.testing.assert_close(solution["z"], torch.full_like(Z0, 10 * (1 - 0.9**4)))


def test_ignore_says_nothing_and_info_tells_all():
    _, info = get_deq(f_max_iter=4, on_failure="ignore")(slow, Z0)
    assert info.failed() and info.summary().startswith("forward solve: 4 of 4 samples max_steps")


def test_only_the_samples_that_failed_are_counted():
    rho = torch.tensor([[0.1], [0.999], [0.1], [0.999]], dtype=torch.float64)
    with pytest.warns(ConvergenceWarning, match="2 of 4 samples max_steps"):
        _, info = get_deq(f_max_iter=20)(lambda z: rho * z + 1, Z0)
    assert info["status"].tolist() == [Status.CONVERGED, Status.MAX_STEPS] * 2


@pytest.mark.parametrize(
    "options", [dict(f_tol=0), dict(f_solver="simple_fixed_point_iter"), dict(return_final=True), dict(f_max_iter=0)]
)
def test_what_was_not_asked_to_converge_does_not_fail(options):
    get_deq(**{"f_max_iter": 4, **options}, on_failure="raise")(slow, Z0)


def test_several_statuses_are_told_apart():
    def fn(z):
        out = 0.9 * z + 1
        return torch.cat([0.1 * z[:1], out[1:2], 3 * z[2:3] + 1, z[3:] * torch.nan])

    with pytest.warns(ConvergenceWarning) as caught:
        _, info = get_deq(f_max_iter=30)(fn, Z0 + 1)
    text = str(caught[0].message)
    assert (
        "1 of 4 samples max_steps" in text and "1 of 4 samples diverged" in text and "1 of 4 samples non_finite" in text
    )
    assert "make f contractive" in text and "look for overflow" in text
    assert info["status"].tolist() == [Status.CONVERGED, Status.MAX_STEPS, Status.DIVERGED, Status.NON_FINITE]


# ---- traces, checks, callbacks, progress


@pytest.mark.parametrize("solver", ["fixed_point_iter", "anderson", "broyden"])
def test_no_stat_keeps_no_trace(solver):
    _, info = get_deq(solver, no_stat=True, f_max_iter=9, on_failure="ignore")(slow, Z0)
    assert info["abs_trace"].shape == (4, 1) and torch.equal(info["abs_trace"][:, 0], info["abs_lowest"])
    _, info = get_deq(solver, f_max_iter=9, f_tol=0)(slow, Z0)
    assert info["abs_trace"].shape[1] > 1


@pytest.mark.parametrize("every", [1, 3, 7, 50])
def test_check_every(every):
    fn, seen = Counted(), []
    _, info = get_deq(check_every=every, f_tol=1e-2, f_max_iter=100, on_failure="ignore")(
        fn, Z0, callback=lambda step, z, residual: seen.append(step)
    )
    needed = next(k for k in range(100) if 0.9**k * 3**0.5 <= 1e-2)
    expected = min(-(-needed // every) * every, 100)
    assert seen[-1] == expected and all(step % every == 0 for step in seen)
    assert fn.calls == info["nfe"] and expected <= fn.calls <= expected + 2


def test_a_callback_sees_packed_states_and_residuals():
    seen: list[Any] = []
    z0 = (torch.zeros(4, 3, dtype=torch.float64), torch.zeros(4, 2, dtype=torch.float16))
    get_deq(f_tol=0, f_max_iter=5)(
        lambda a, b: (0.5 * a + 1, 0.5 * b + 1), z0, callback=lambda step, z, residual: seen.append((step, z, residual))
    )
    assert [step for step, _, _ in seen] == [1, 2, 3, 4, 5]
    for step, z, residual in seen:
        assert z.shape == (4, 5) and residual.shape == (4,)
        torch.testing.assert_close(
            residual, torch.full((4,), 0.5**step * 5**0.5, dtype=torch.float64), rtol=1e-2, atol=0
        )


@pytest.mark.parametrize("core", ["sliced", "indexing"])
def test_a_callbacks_steps_count_from_the_start_of_the_call(core):
    seen: list[int] = []
    get_deq(core=core, n_states=3, f_tol=0, f_max_iter=9)(
        slow, Z0, callback=lambda step, z, residual: seen.append(step)
    )
    assert seen == list(range(1, 10))


def test_an_exception_in_a_callback_passes_through():
    raised = KeyError("mine")

    def callback(step, z, residual):
        raise raised

    for progress in (False, True):
        with pytest.raises(KeyError) as caught:
            get_deq()(slow, Z0, callback=callback, progress=progress)
        assert caught.value is raised


@pytest.mark.parametrize("training", [True, False])
def test_progress(training, capsys):
    seen: list[int] = []
    deq = get_deq(f_max_iter=300, f_tol=1e-3, n_states=2).train(training)
    deq(slow, Z0, progress=True, callback=lambda step, z, residual: seen.append(step))
    out, err = capsys.readouterr()
    assert out == ""
    assert "residual " in err and "e-04" in err and "/300" in err
    assert seen
    deq(slow, Z0)
    assert capsys.readouterr() == ("", "")


def test_progress_inside_a_bar_of_the_programs_own(capsys):
    from rich.progress import track

    for _ in track(range(2)):
        get_deq(f_max_iter=200)(slow, Z0, progress=True)


# ---- warm starts


@pytest.mark.parametrize("solver", ["fixed_point_iter", "anderson", "broyden"])
@pytest.mark.parametrize("keep_state", [False, True])
def test_a_warm_start_takes_fewer_evaluations(solver, keep_state):
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(16, 16, generator=generator, dtype=torch.float64)
    w = 0.9 * w / torch.linalg.matrix_norm(w, 2)
    x = torch.randn(8, 16, generator=generator, dtype=torch.float64)
    deq = get_deq(solver, f_tol=1e-8, f_max_iter=500, keep_state=keep_state)
    cold = Counted(lambda z: torch.tanh(z @ w + x))
    z0 = torch.zeros(8, 16, dtype=torch.float64)
    exact, info = deq(cold, z0)
    assert (info.solver_state is not None) == (keep_state and solver != "fixed_point_iter")  # it has no state
    again = Counted(cold.fn)
    z_out, _ = deq(again, z0, warm_start=info)
    assert again.calls <= 4
    torch.testing.assert_close(z_out[-1], exact[-1], rtol=0, atol=1e-7)
    near = Counted(lambda z: torch.tanh(z @ w + 1.0001 * x))
    fresh = Counted(near.fn)
    z_warm, _ = deq(near, z0, warm_start=info)
    z_cold, _ = deq(fresh, z0)
    assert near.calls < fresh.calls
    torch.testing.assert_close(z_warm[-1], z_cold[-1], rtol=0, atol=1e-6)


def test_a_warm_start_from_another_solver_and_from_a_pickle():
    _, info = get_deq("broyden", f_max_iter=300, f_tol=1e-8, keep_state=True)(slow, Z0)
    for start in (info, pickle.loads(pickle.dumps(info)), copy.copy(info)):
        fn = Counted()
        z_out, _ = get_deq("anderson", f_tol=1e-6)(fn, Z0, warm_start=start)
        assert fn.calls <= 3
        torch.testing.assert_close(z_out[-1], torch.full_like(Z0, 10.0), rtol=0, atol=1e-4)


def test_a_warm_start_of_a_structured_state():
    z0 = {"h": torch.zeros(2, 3), "c": torch.zeros(2, dtype=torch.complex64)}
    _, info = get_deq(f_max_iter=100, f_tol=1e-5)(lambda s: {"h": 0.5 * s["h"] + 1, "c": 0.5 * s["c"] + 1j}, z0)
    fn = Counted(lambda s: {"h": 0.5 * s["h"] + 1, "c": 0.5 * s["c"] + 1j})
    z_out, _ = get_deq(f_tol=1e-4)(fn, z0, warm_start=info)
    assert fn.calls <= 3 and torch.allclose(z_out[-1]["c"], torch.tensor(2j), atol=1e-3)


@pytest.mark.parametrize(
    ("z0", "start", "error", "text"),
    [
        (
            torch.zeros(4, 2, dtype=torch.float64),
            "info",
            StateError,
            r"for another state: .*\(4, 3\).*; this call's is .*\(4, 2\)",
        ),
        (torch.zeros(5, 3, dtype=torch.float64), "info", StateError, "for another state"),
        (torch.zeros(4, 3), "info", StateError, "for another state"),
        ((torch.zeros(4, 3, dtype=torch.float64),), "info", StateError, "for another state"),
        (torch.zeros(5, 3), "pickled", StateError, r"packed state of shape \(4, 3\); this call's is"),
        (Z0, "z", StateTypeError, "warm_start takes the info of an earlier call, got Tensor"),
        (Z0, "pair", StateTypeError, "warm_start takes the info of an earlier call, got tuple"),
        (Z0, "broken", StateError, "warm_start holds NaN or inf in 1 of 4 samples"),
    ],
)
def test_a_warm_start_that_does_not_fit(z0, start, error, text):
    z_out, info = get_deq(f_max_iter=300)(slow, Z0)
    given = {"info": info, "z": z_out[-1], "pair": (z_out, info), "pickled": pickle.loads(pickle.dumps(info))}
    given["broken"] = pickle.loads(pickle.dumps(info))
    given["broken"]["z"][0, 0] = torch.nan
    with pytest.raises(error, match=text):
        get_deq()(lambda *state: state[0], z0, warm_start=given[start])


# ---- cores


@pytest.mark.parametrize("core", registry.names("cores"))
@pytest.mark.parametrize("states", [1, 2, 4])
def test_as_many_states_as_asked_for(core, states):
    deq = get_deq(core=core, n_states=states, f_max_iter=12, f_tol=0)
    assert len(deq(slow, Z0)[0]) == states and deq.core.settings.name == core
    assert len(deq.eval()(slow, Z0)[0]) == 1
    assert len(get_deq(core=core, indexing=list(range(1, states)), f_max_iter=12, f_tol=0)(slow, Z0)[0]) == states


@pytest.mark.parametrize("core", ["sliced", "deqcore/sliced", "deqcore/indexing"])
def test_cores_by_name(core):
    assert get_deq(core=core).config.core.name == core


def test_an_unknown_core():
    with pytest.raises(
        UnknownPluginError, match=r"core \(keyword core\): no core named 'slced'. Did you mean 'sliced'"
    ):
        get_deq(core="slced")


# ---- regularizers


def test_regularizers_in_training_and_not_in_eval():
    torch.manual_seed(0)
    x = torch.ones(4, 3, dtype=torch.float64, requires_grad=True)
    deq = get_deq(regularizers=[{"name": "jacobian", "weight": 0.5, "vecs": 3}], f_max_iter=60)
    _, info = deq(lambda z: 0.5 * z * x + 1, Z0)
    assert set(info["regularizers"]) == {"jacobian"}
    torch.testing.assert_close(info["regularization"], 0.5 * info["regularizers"]["jacobian"])
    (grad,) = torch.autograd.grad(info["regularization"], x)
    assert grad.abs().sum() > 0
    with torch.no_grad():
        assert deq.eval()(lambda z: 0.5 * z * x + 1, Z0)[1]["regularization"] == 0
    with pytest.raises(ConfigError, match="each regularizer at most once"):
        get_deq(regularizers=["jacobian", {"name": "jacobian", "weight": 2}])


# ---- copies, pickles, processes, threads


def variants() -> list[DEQ]:
    return [
        get_deq(),
        get_deq("anderson", ift=True, n_states=3, grad=[1, 2, 3]),
        get_deq(
            solver={"name": "broyden", "rtol": 1e-4},
            core="indexing",
            indexing=[2],
            regularizers=["jacobian"],
            norm="spectral_norm",
        ),
    ]


@pytest.mark.parametrize("index", range(3))
def test_copies_and_pickles_work_alike(index, tmp_path):
    deq = variants()[index]
    torch.save(deq, tmp_path / "deq.pt")
    copies = [
        copy.deepcopy(deq),
        copy.copy(deq),
        pickle.loads(pickle.dumps(deq)),
        torch.load(tmp_path / "deq.pt", weights_only=False),
        get_deq(deq.config),
    ]
    torch.manual_seed(0)

    def fn(z):
        return 0.5 * torch.tanh(z) + 1

    expected, info = deq(fn, Z0)
    for other in copies:
        assert other.config == deq.config and repr(other) == repr(deq)
        torch.manual_seed(0)
        z_out, found = other(fn, Z0)
        assert all(map(torch.equal, z_out, expected)) and torch.equal(found["status"], info["status"])
    eval_copy = pickle.loads(pickle.dumps(deq.eval()))
    assert not eval_copy.training


def test_a_model_with_a_deq_inside():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)
            self.deq = get_deq("anderson")

        def forward(self, x):
            return self.deq(lambda z: 0.5 * torch.tanh(self.linear(z)) + x, torch.zeros_like(x))[0][-1]

    model = Model()
    assert set(model.state_dict()) == {"linear.weight", "linear.bias"}
    other = copy.deepcopy(model)
    other.load_state_dict(model.state_dict())
    x = torch.ones(2, 3)
    assert torch.equal(model(x), other(x))
    buffer = io.BytesIO()
    torch.save({"config": model.deq.config, "model": model.state_dict()}, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert loaded["config"] == model.deq.config
    assert "deq" in repr(model) and "solver=anderson" in repr(model)


def test_unpickling_where_the_solver_is_missing_names_it():
    from deqcore import register_solver

    def mine(func, x0, max_iter=50, tol=1e-3, stop_mode="abs", indexing=None, weight=1.0):
        for _ in range(max_iter):
            x0 = torch.lerp(x0, func(x0), weight)
        return x0, [], {}

    with registry.scope():
        register_solver("mine", mine)
        data = pickle.dumps(get_deq(solver={"name": "mine", "weight": 0.5}))
        assert pickle.loads(data).config.solver.weight == 0.5
    with pytest.raises(UnknownPluginError, match="no solver named 'mine'"):
        pickle.loads(data)


CHILD = """
import pickle, sys
import deqcore, torch
deq, info, z0 = pickle.load(sys.stdin.buffer)
if __name__ == "__main__":
    z_out, again = deq(lambda z: 0.9 * z + 1, z0, warm_start=info)
    sys.stdout.buffer.write(pickle.dumps((z_out[-1].detach(), again, info.summary())))
"""


def test_a_deq_and_its_info_in_another_process():
    deq = get_deq("anderson", f_tol=1e-6, f_max_iter=100)
    z_out, info = deq(slow, Z0)
    run = subprocess.run(
        [sys.executable, "-c", CHILD], input=pickle.dumps((deq, info, Z0)), capture_output=True, check=False
    )
    assert run.returncode == 0, run.stderr.decode()
    z, again, summary = pickle.loads(run.stdout)
    torch.testing.assert_close(z, z_out[-1], rtol=0, atol=1e-5)
    assert again["nfe"] < info["nfe"] and again.counts() == info.counts() and summary == info.summary()
    assert set(again) == set(info)


def test_one_deq_in_many_threads():
    deq = get_deq("anderson", f_max_iter=200, f_tol=1e-9, ift=True, b_tol=1e-10)
    torch.manual_seed(0)
    inputs = [torch.randn(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(24)]

    def work(k: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        x = inputs[k].detach().clone().requires_grad_()
        fn = Counted(lambda z: torch.tanh(0.5 * z + x))
        options = {"m": 2 + k % 5, "f_max_iter": 150 + k}
        z_out, info = deq(fn, Z0, options)
        (grad,) = torch.autograd.grad(z_out[-1].sum(), x)
        assert info["nfe"] == fn.calls  # counts are each call's own
        return z_out[-1].detach(), grad, fn.calls

    alone = [work(k) for k in range(len(inputs))]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        together = list(pool.map(work, list(range(len(inputs))) * 3))
    for k, (z, grad, calls) in enumerate(together):
        expected_z, expected_grad, expected_calls = alone[k % len(inputs)]
        assert torch.equal(z, expected_z) and torch.equal(grad, expected_grad) and calls == expected_calls


def test_threads_that_fill_the_cache_of_solvers():
    deq = get_deq(f_tol=0)

    def work(k: int) -> int:
        return steps(deq, {"f_max_iter": 1 + k % 3, "tol": 1e-12 * k, "return_final": True})

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(300))) == [1 + k % 3 for k in range(300)]


def test_making_deqs_in_many_threads():
    def work(k: int) -> Any:
        return get_deq(f_solver=("anderson", "broyden")[k % 2], ift=bool(k % 3), norm="spectral_norm").config

    with registry.scope(), concurrent.futures.ThreadPoolExecutor(4) as pool:
        registry.refresh()
        made = list(pool.map(work, range(40)))
    assert made == [
        DEQConfig.load(f_solver=("anderson", "broyden")[k % 2], ift=bool(k % 3), norm="spectral_norm")
        for k in range(40)
    ]


def test_one_normalised_model_in_many_threads():
    torch.manual_seed(0)
    linear = deqcore.apply_norm(nn.Linear(3, 3).double(), "spectral_norm", learn_scale=False, target_norm=0.8).eval()
    deq = get_deq("anderson", ift=True, f_tol=1e-9, f_max_iter=200, b_tol=1e-10)
    inputs = torch.randn(12, 4, 3, dtype=torch.float64)

    def work(k: int) -> tuple[torch.Tensor, ...]:
        z_out, _ = deq(lambda z: torch.tanh(linear(z) + inputs[k]), Z0)
        return z_out[-1].detach(), *torch.autograd.grad(z_out[-1].square().sum(), list(linear.parameters()))

    alone = [work(k) for k in range(12)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        together = list(pool.map(work, list(range(12)) * 3))
    for k, found in enumerate(together):
        for a, b in zip(found, alone[k % 12], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_solvers_as_functions_in_many_threads():
    solver = deqcore.get_solver("anderson")

    def work(k: int) -> torch.Tensor:
        return solver(lambda z: 0.5 * torch.cos(z) + k, Z0, max_iter=100, tol=1e-10)[0]

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        together = list(pool.map(work, range(40)))
    for k, z in enumerate(together):
        torch.testing.assert_close(z, 0.5 * torch.cos(z) + k, rtol=0, atol=1e-9)


def test_a_deq_in_another_deqs_f():
    inner = get_deq(f_tol=1e-10, f_max_iter=200)

    def fn(z):
        y = inner(lambda y: 0.5 * y + z, torch.zeros_like(z))[0][-1]  # y = 2 z
        return 0.25 * y + 1  # z = 0.5 z + 1

    z_out, _ = get_deq(f_tol=1e-8, f_max_iter=200)(fn, Z0)
    torch.testing.assert_close(z_out[-1], torch.full_like(Z0, 2.0), rtol=0, atol=1e-6)


# ---- what it says about itself


def test_every_public_name_is_there_and_documented():
    for name in deqcore.__all__:
        thing = getattr(deqcore, name)
        assert (getattr(thing, "__doc__", None) or "").strip(), name


def test_repr_and_modes():
    deq = get_deq("anderson", ift=True, core="indexing")
    assert repr(deq) == "DEQ(solver=anderson, gradient=implicit, core=indexing)"
    assert list(deq.parameters()) == []
    assert deq.apply_norm(nn.Linear(3, 3)).weight.shape == (3, 3)
