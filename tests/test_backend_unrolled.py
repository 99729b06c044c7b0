"""Unrolling: the gradient of the solver's own steps, with and without checkpoints."""

from __future__ import annotations

import gc
import threading
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from backends_support import DOUBLE, EXACT, Layer, close, cosine, layer, orthogonal, rand
from backends_support import backends as backends
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deqcore import (
    ConfigError,
    GradientModeError,
    Solver,
    SolverSettings,
    Step,
    VariationalDropout,
    apply_norm,
    get_deq,
    registry,
)
from deqcore.testing import exact_problems, peak_bytes

MODES: list[dict[str, Any]] = [
    {"checkpoint": "none"},
    {"checkpoint": "every_k"},
    {"checkpoint": "every_k", "every": 1},
    {"checkpoint": "every_k", "every": 100},
    {"checkpoint": "recursive"},
    {"checkpoint": "recursive", "every": 3},
]
CHECKPOINTED = [MODES[1], MODES[4]]
SOLVERS: list[dict[str, Any]] = [
    {"name": "fixed_point_iter"},
    {"name": "fixed_point_iter", "damping": 0.7},
    {"name": "simple_fixed_point_iter"},
    {"name": "damped"},
    {"name": "damped", "damping": 0.6},
    {"name": "aitken"},
    {"name": "anderson"},
    {"name": "anderson", "memory": 3, "damping": 0.8},
    {"name": "anderson", "type": "I", "restart": 4},
]


def unroll(steps: int, solver: dict[str, Any], tol: float = 0.0, **gradient: Any) -> Any:
    return get_deq(
        gradient={"name": "unrolled", **gradient},
        solver={"tol": tol, "max_iter": steps, "return_final": tol == 0, **solver},
        on_failure="ignore",
    )


# ---- the gradient


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("mode", [MODES[0], *CHECKPOINTED])
def test_it_is_the_derivative_of_the_steps(solver: dict[str, Any], mode: dict[str, Any]) -> None:
    """By finite differences of a fixed number of steps, in parameters, inputs and the start."""
    deq = unroll(4, solver, **mode)

    def solve(z0: Tensor, w: Tensor, x: Tensor) -> Tensor:
        return deq(lambda z: torch.tanh(z @ w + x), z0)[0][-1]

    inputs = rand(2, 6, seed=4), orthogonal(6, 0.9), rand(2, 6)
    assert torch.autograd.gradcheck(
        solve, tuple(t.requires_grad_() for t in inputs), atol=1e-6, rtol=1e-4, fast_mode=True
    )


@pytest.mark.parametrize("mode", MODES)
def test_plain_iteration_is_a_loop(mode: dict[str, Any]) -> None:
    f, z0 = layer(), rand(4, 6, seed=8).requires_grad_()
    (z,), info = unroll(11, {"name": "fixed_point_iter"}, **mode)(f, z0)
    expected = z0
    for _ in range(11):
        expected = f(expected)
    assert torch.equal(z, expected)
    assert torch.equal(z.detach(), info["z"])
    cotangent = rand(4, 6, seed=5)
    inputs = [z0, *f.inputs]
    close(torch.autograd.grad(z, inputs, cotangent), torch.autograd.grad(expected, inputs, cotangent), 1e-14)


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_mode_gives_the_same_gradient_and_the_solves_own_state(solver: dict[str, Any]) -> None:
    f = layer()
    cotangent, found = rand(4, 6, seed=5), []
    for mode in MODES:
        (z,), info = unroll(23, solver, **mode)(f, f.z0)
        assert torch.allclose(z, info["z"], rtol=1e-13, atol=1e-15)
        found.append(torch.autograd.grad(z, f.inputs, cotangent))
    for other in found[1:]:
        close(other, found[0], 1e-12)


@pytest.mark.parametrize("solver", SOLVERS[:2] + SOLVERS[3:])
@pytest.mark.parametrize("mode", [MODES[0], *CHECKPOINTED])
def test_run_to_the_end_it_is_the_exact_gradient(solver: dict[str, Any], mode: dict[str, Any]) -> None:
    """Against a dense solve and against implicit; some samples get there long before the others."""
    f = Layer(orthogonal(6, 0.8), rand(4, 6, seed=3) * torch.tensor([[3.0], [1.0], [0.3], [0.0]], dtype=DOUBLE))
    (z,), info = unroll(400, solver, 1e-13, **mode)(f, f.z0)
    assert not info.failed()
    cotangent = rand(4, 6, seed=5)
    found = torch.autograd.grad(z, f.inputs, cotangent)
    exact = f.pulled(info["z"], f.adjoint(info["z"], cotangent))
    # The last sample starts at its equilibrium, and so gets no further than the others' steps take its gradient.
    close([found[1][:3]], [exact[1][:3]])
    close([found[0]], [exact[0]])
    (z,), _ = get_deq(gradient=EXACT, solver={"name": "broyden", "tol": 1e-13, "max_iter": 100})(f, f.z0)
    implicit = torch.autograd.grad(z, f.inputs, cotangent)
    close([found[0], found[1][:3]], [implicit[0], implicit[1][:3]])


@pytest.mark.parametrize("name", ["fixed_point_iter", "damped", "anderson"])
def test_problems_with_exact_answers(name: str) -> None:
    """Agreement with a dense solve where the answer is known."""
    done = 0
    for problem in exact_problems():
        if not (problem.contracts and problem.batched and problem.args and problem.dtype == DOUBLE):
            continue
        args = tuple(a.clone().requires_grad_() for a in problem.args)
        deq = unroll(600, {"name": name}, 1e-13)
        (z,), info = deq(problem.fn, problem.z0, args=args)
        if not bool((info["abs_lowest"] < 1e-11).all()):
            continue  # plain iteration alone is too slow for this one
        cotangent = rand(*z.shape, seed=5)
        found = torch.autograd.grad(z, args, cotangent, allow_unused=True)
        point = problem.answer.reshape(-1)
        jacobian = torch.autograd.functional.jacobian(
            lambda p, problem=problem: problem.fn(p.view_as(problem.z0), *problem.args).reshape(-1), point
        )
        u = torch.linalg.solve((torch.eye(len(point), dtype=DOUBLE) - jacobian).T, cotangent.reshape(-1))
        image = problem.fn(problem.answer, *args).reshape(-1)
        exact = torch.autograd.grad(image, args, u, allow_unused=True)
        for a, b in zip(found, exact, strict=True):
            if b is not None:  # pyright: ignore[reportUnnecessaryComparison]
                close([a], [b], 1e-7)
        done += 1
    assert done >= 2


def test_a_solve_that_stops_early_is_differentiated_up_to_there() -> None:
    """Other than implicit, which would take the state for an equilibrium."""
    f = layer()
    (z,), info = unroll(100, {"name": "fixed_point_iter"}, 1e-2)(f, f.z0)
    steps = int(info["nstep"].max())
    assert steps < 40
    expected = f.z0
    for _ in range(steps):
        expected = f(expected)
    close(torch.autograd.grad(z.sum(), f.inputs), torch.autograd.grad(expected.sum(), f.inputs), 1e-13)


@pytest.mark.parametrize("mode", [MODES[0], *CHECKPOINTED])
@pytest.mark.parametrize("compact", [True, False])
def test_samples_that_end_at_different_steps(mode: dict[str, Any], compact: bool) -> None:
    w = orthogonal(6).requires_grad_()
    rho = torch.tensor([0.2, 0.5, 0.7, 0.95], dtype=DOUBLE)[:, None]
    x = rand(4, 6, seed=3).requires_grad_()

    def fn(z: Tensor, rho: Tensor, x: Tensor) -> Tensor:
        return rho * torch.tanh(z @ w / 0.8) + x

    deq = get_deq(
        gradient={"name": "unrolled", **mode},
        solver={"name": "fixed_point_iter", "tol": 1e-6, "max_iter": 300},
        compact=compact,
    )
    z0 = torch.zeros(4, 6, dtype=DOUBLE)
    (z,), info = deq(fn, z0, args=(rho, x))
    assert torch.allclose(z, info["z"], rtol=0, atol=1e-14)
    steps = info["nstep"].long().tolist()
    assert (len(set(steps)) > 1) == compact
    states = [z0]
    for _ in range(max(steps)):
        states.append(fn(states[-1], rho, x))
    expected = torch.stack([states[k][row] for row, k in enumerate(steps)])
    cotangent = rand(4, 6, seed=5)
    close(torch.autograd.grad(z, [w, x], cotangent), torch.autograd.grad(expected, [w, x], cotangent), 1e-12)


def test_a_sample_at_its_equilibrium_from_the_start() -> None:
    """Its residual is zero at every step: differences are, too, and 0 / 0 has no derivative."""
    for solver in SOLVERS:
        f = layer()
        with torch.no_grad():
            f.x[1] = 0
        (z,), _ = unroll(40, solver, 1e-12)(f, f.z0)
        found = torch.autograd.grad(z.sum(), f.inputs)
        assert all(torch.isfinite(t).all() for t in found)
        assert found[1][1].norm() > 0.5


def test_in_eval_the_value_is_not_moved() -> None:
    f = layer()
    (z,), info = unroll(5, {"name": "anderson"}).eval()(f, f.z0)
    assert torch.equal(z.detach(), info["z"])
    (trained,), _ = unroll(5, {"name": "anderson"}).train()(f, f.z0)
    close(torch.autograd.grad(z.sum(), f.inputs), torch.autograd.grad(trained.sum(), f.inputs), 1e-13)


@pytest.mark.parametrize("requires_grad", [True, False])
def test_no_step_hands_z0_on_with_its_gradient(requires_grad: bool) -> None:
    f, z0 = layer(), rand(4, 6).requires_grad_(requires_grad)
    (z,), _ = unroll(0, {"name": "fixed_point_iter"})(f, z0)
    assert torch.equal(z, z0)
    assert z.requires_grad == requires_grad
    if requires_grad:
        close(torch.autograd.grad(z.sum(), z0), [torch.ones_like(z0)])


def test_only_the_start_requires_grad() -> None:
    w, x, z0 = orthogonal(6), rand(4, 6), rand(4, 6, seed=2).requires_grad_()
    f = lambda z: torch.tanh(z @ w + x)  # noqa: E731
    (z,), _ = unroll(4, {"name": "fixed_point_iter"})(f, z0)
    close(torch.autograd.grad(z.sum(), z0), torch.autograd.grad(f(f(f(f(z0)))).sum(), z0), 1e-14)


def test_mixed_dtypes_are_rounded_as_in_the_solve() -> None:
    w = orthogonal(4, 0.5).float()
    x = rand(3, 4).float().requires_grad_()

    def fn(z: dict[str, Tensor]) -> dict[str, Tensor]:
        joint = torch.tanh(torch.cat([z["a"].float(), z["b"].float()], 1) @ w + x)
        return {"a": joint[:, :2], "b": joint[:, 2:].bfloat16()}

    start = {"a": torch.zeros(3, 2), "b": torch.zeros(3, 2, dtype=torch.bfloat16)}
    (z,), info = unroll(6, {"name": "fixed_point_iter"})(fn, start)
    assert torch.equal(torch.cat([z["a"], z["b"].float()], 1), info["z"])
    expected = start
    for _ in range(6):
        expected = fn(expected)
    close(
        torch.autograd.grad(z["a"].sum() + z["b"].float().sum(), x),
        torch.autograd.grad(expected["a"].sum() + expected["b"].float().sum(), x),
        1e-5,
    )


# ---- orders


@pytest.mark.parametrize("mode", [MODES[0], *CHECKPOINTED])
@pytest.mark.parametrize("solver", ["fixed_point_iter", "anderson"])
def test_second_derivatives(mode: dict[str, Any], solver: str) -> None:
    deq = unroll(3, {"name": solver}, **mode)

    def solve(z0: Tensor, w: Tensor, x: Tensor) -> Tensor:
        return deq(lambda z: torch.tanh(z @ w + x), z0)[0][-1]

    inputs = rand(1, 4, seed=4), orthogonal(4, 0.9), rand(1, 4)
    assert torch.autograd.gradgradcheck(
        solve, tuple(t.requires_grad_() for t in inputs), atol=1e-5, rtol=1e-3, fast_mode=True
    )


@pytest.mark.parametrize("mode", [MODES[0], *CHECKPOINTED])
def test_third_derivative_of_a_scalar(mode: dict[str, Any]) -> None:
    x = torch.tensor(0.3, dtype=DOUBLE, requires_grad=True)
    (z,), _ = unroll(60, {"name": "fixed_point_iter"}, **mode)(
        lambda z: torch.tanh(0.5 * z + x), torch.zeros((), dtype=DOUBLE)
    )
    (first,) = torch.autograd.grad(z, x, create_graph=True)
    (second,) = torch.autograd.grad(first, x, create_graph=True)
    (third,) = torch.autograd.grad(second, x)
    assert abs(second.item() + 3.06756) < 1e-5
    exact = x
    state = torch.zeros((), dtype=DOUBLE)
    for _ in range(60):
        state = torch.tanh(0.5 * state + exact)
    for _ in range(3):
        (state,) = torch.autograd.grad(state, x, create_graph=True)
    close([third], [state], 1e-12)


# ---- cost


def memory_of(mode: dict[str, Any], steps: int) -> float:
    """Peak of a training step over one evaluation of f with its graph."""
    x = rand(4, 20000).float().requires_grad_()

    def fn(z: Tensor) -> Tensor:
        for _ in range(5):
            z = torch.tanh(0.9 * torch.cos(z) + x)
        return 0.5 * z

    z0 = torch.zeros(4, 20000)
    deq = unroll(steps, {"name": "simple_fixed_point_iter"}, **mode)

    def train() -> Any:
        return torch.autograd.grad(deq(fn, z0)[0][-1].sum(), x)

    def once() -> Any:
        return torch.autograd.grad(fn(z0.clone().requires_grad_()).sum(), x)

    train()
    once()
    gc.disable()  # nothing may wait for the collector
    try:
        return peak_bytes(train) / peak_bytes(once)
    finally:
        gc.enable()


def test_memory_of_the_modes() -> None:
    """All graphs, about two roots of that with their states, next to none."""
    short, long = ({m["checkpoint"]: memory_of(m, n) for m in (MODES[0], *CHECKPOINTED)} for n in (9, 36))
    assert short["none"] > 5
    assert long["none"] > 3.2 * short["none"]
    assert long["every_k"] < 0.4 * long["none"]
    assert long["every_k"] < 2.2 * short["every_k"]
    assert long["recursive"] < 6
    assert long["recursive"] < short["recursive"] + 1.5


@pytest.mark.parametrize(
    ("mode", "most"), [(MODES[0], 0), (MODES[1], 64), (MODES[3], 0), (MODES[4], 64 * 3), (MODES[5], 64 * 3)]
)
def test_evaluations(mode: dict[str, Any], most: int) -> None:
    f = layer()
    with torch.no_grad():
        unroll(64, {"name": "fixed_point_iter"}, **mode)(f, f.z0)
    solve, f.calls = f.calls, 0
    (z,), info = unroll(64, {"name": "fixed_point_iter"}, **mode)(f, f.z0)
    assert f.calls == solve + 64 == info["nfe"]
    z.sum().backward()
    again = f.calls - solve - 64
    assert again <= most
    assert (again == 0) == (most == 0)


def test_nothing_is_left_to_the_garbage_collector() -> None:
    x = rand(3, 4).requires_grad_()
    deqs = [unroll(6, {"name": "anderson"}, **mode) for mode in (MODES[0], *CHECKPOINTED)]

    def train() -> None:
        for deq in deqs:
            (z,), _ = deq(lambda z: torch.tanh(0.5 * z + x), torch.zeros(3, 4, dtype=DOUBLE))
            torch.autograd.grad(z.sum(), x)

    train()
    gc.collect()
    gc.disable()
    try:
        before = sum(type(o) is Tensor for o in gc.get_objects())
        for _ in range(5):
            train()
        assert sum(type(o) is Tensor for o in gc.get_objects()) <= before
    finally:
        gc.enable()


# ---- what is fixed in a solve


@pytest.mark.parametrize("mode", MODES)
def test_a_checkpoint_sees_the_solves_masks_and_weights(mode: dict[str, Any]) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(6, 6, bias=False).double()
    apply_norm(linear, "weight_norm")
    drop = VariationalDropout(0.4)
    x = rand(4, 6, seed=3).requires_grad_()
    seen: list[tuple[Tensor, Tensor]] = []
    calls = 0

    def fn(z: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        out = drop(0.5 * torch.tanh(linear(z) + x))
        seen.append(((out.detach() != 0).clone(), linear.weight.detach().clone()))
        return out

    (z,), _ = unroll(12, {"name": "fixed_point_iter"}, **mode)(fn, torch.zeros(4, 6, dtype=DOUBLE))
    during = calls
    cotangent = rand(4, 6, seed=5)
    parameters = [x, *linear.parameters()]
    drop.reset_mask(x)  # a mask of another solve
    found = torch.autograd.grad(z, parameters, cotangent)
    assert (calls > during) == (mode["checkpoint"] != "none" and mode.get("every", 1) < 12)
    for mask, weight in seen:
        assert torch.equal(mask, seen[0][0])
        assert torch.equal(weight, seen[0][1])
    kept = seen[0][0].double() / 0.6
    state = torch.zeros(4, 6, dtype=DOUBLE)
    for _ in range(12):
        state = kept * 0.5 * torch.tanh(state @ linear.weight.T + x)
    assert torch.allclose(z, state, atol=1e-14)
    close(found, torch.autograd.grad(state, parameters, cotangent), 1e-12)


@pytest.mark.parametrize("mode", CHECKPOINTED)
def test_a_backward_in_another_thread(mode: dict[str, Any]) -> None:
    drop = VariationalDropout(0.4)
    x = rand(4, 6, seed=3).requires_grad_()
    (z,), _ = unroll(12, {"name": "fixed_point_iter"}, **mode)(
        lambda z: drop(0.5 * torch.tanh(z) + x), torch.zeros(4, 6, dtype=DOUBLE)
    )
    thread = threading.Thread(target=lambda: z.sum().backward())
    thread.start()
    thread.join()
    dropped = z.detach() == 0
    assert dropped.any()
    assert not x.grad[dropped].any()
    assert x.grad[~dropped].all()


@pytest.mark.parametrize("mode", [MODES[0], *CHECKPOINTED])
def test_inside_of_the_users_own_checkpoint(mode: dict[str, Any]) -> None:
    f = layer()
    deq = unroll(8, {"name": "anderson"}, **mode)

    def solve(z0: Tensor) -> Tensor:
        return deq(f, z0)[0][-1]

    z = checkpoint(solve, f.z0, use_reentrant=False)
    close(
        torch.autograd.grad(z.square().sum(), f.inputs),
        torch.autograd.grad(solve(f.z0).square().sum(), f.inputs),
        1e-13,
    )


@pytest.mark.parametrize("mode", [MODES[0], *CHECKPOINTED])
def test_a_deq_inside_of_f(mode: dict[str, Any]) -> None:
    x = rand(3, 4).requires_grad_()
    inner = get_deq(gradient=EXACT, solver={"name": "broyden", "tol": 1e-13, "max_iter": 60})

    def fn(z: Tensor) -> Tensor:
        (y,), _ = inner(lambda y: 0.3 * torch.tanh(y) + z, torch.zeros(3, 4, dtype=DOUBLE))
        return 0.3 * torch.sin(y) + x

    (z,), _ = unroll(9, {"name": "fixed_point_iter"}, **mode)(fn, torch.zeros(3, 4, dtype=DOUBLE))
    (found,) = torch.autograd.grad(z.sum(), x)
    z = z.detach()
    y = z
    for _ in range(100):
        y = 0.3 * torch.tanh(y) + z
    slope = 0.3 * torch.cos(y) / (1 - 0.3 * (1 - torch.tanh(y) ** 2))
    close([found], [1 / (1 - slope)], 5e-3)  # of the terms from the tenth on, of ratio .43 at most


# ---- refusals


@pytest.mark.parametrize("name", ["broyden", "auto", "newton", "chord", "newton_krylov", "pseudo_transient"])
def test_solvers_that_cant_be_replayed(name: str) -> None:
    f = layer()
    with pytest.raises(ConfigError, match=rf"solver='{name}' can't be.*'anderson', or gradient='implicit'"):
        get_deq(gradient="unrolled", solver=name)(f, f.z0)


def test_a_solver_with_its_own_loop() -> None:
    class Own(Solver[SolverSettings]):
        def solve(self, problem: Any, z: Tensor, sample_at: Any) -> Any:
            return problem(z), []

    registry.register("solvers", "own", Own)
    f = layer()
    with pytest.raises(ConfigError, match="its own loop"):
        get_deq(gradient="unrolled", solver="own", on_failure="ignore")(f, f.z0)


@dataclass
class Sum:
    total: Tensor
    count: int = 0


class Averaging(Solver[SolverSettings]):
    """Averages all images in a buffer that it writes to, inside of a dict in a list."""

    late = False

    def init(self, problem: Any, z: Tensor, fz: Tensor) -> Any:
        return [{"sum": Sum(torch.zeros_like(z))}]

    def step(self, problem: Any, z: Tensor, fz: Tensor, state: Any) -> Step:
        part = state[0]["sum"]
        torch.add(part.total, fz, out=part.total)
        part.count += 1
        mean = part.total / part.count
        if self.late:
            mean = mean + 0 * part.total.square()  # saves it for its derivative
            part.total.mul_(1.0)
        return Step(mean, state)


class Late(Averaging):
    late = True


@pytest.mark.parametrize("mode", [MODES[0], *CHECKPOINTED])
def test_a_solver_that_writes_to_its_state(mode: dict[str, Any]) -> None:
    registry.register("solvers", "averaging", Averaging)
    f = layer()
    (z,), _ = unroll(5, {"name": "averaging"}, **mode)(f, f.z0)
    images: list[Tensor] = []
    state = f.z0
    for k in range(5):
        images.append(f(state))
        state = sum(images) / (k + 1)
    close([z], [state], 1e-14)
    close(torch.autograd.grad(z.sum(), f.inputs), torch.autograd.grad(state.sum(), f.inputs), 1e-13)


@pytest.mark.parametrize("mode", [MODES[0], *CHECKPOINTED])
def test_a_solver_that_writes_to_what_autograd_has_saved(mode: dict[str, Any]) -> None:
    """Without checkpoints torch itself would object in the backward; with them, nobody would."""
    registry.register("solvers", "late", Late)
    f = layer()
    with pytest.raises(ConfigError, match="tensors that autograd needs as they were"):
        unroll(5, {"name": "late"}, **mode)(f, f.z0)


def test_anderson_with_settings_that_save_memory() -> None:
    """Large states and safeguards: right, or refused."""
    x = rand(2, 40000).requires_grad_()
    for solver, size in (({"name": "anderson"}, 40000), ({"name": "anderson", "safeguard": 2.0}, 6)):
        part = x[:, :size]
        deq = unroll(5, solver)
        f = lambda z, part=part: 0.5 * torch.cos(z) + part  # noqa: E731
        try:
            (z,), info = deq(f, torch.zeros(2, size, dtype=DOUBLE))
        except ConfigError as error:
            assert "anderson" in str(error)
            continue
        assert torch.allclose(z, info["z"], atol=1e-13)
        (found,) = torch.autograd.grad(z.sum(), x)
        bump = torch.zeros_like(x).index_fill_(1, torch.tensor([1]), 1e-6)
        with torch.no_grad():
            up, down = ((x + s * bump)[:, :size] for s in (1, -1))
            (high,), _ = deq(lambda z, up=up: 0.5 * torch.cos(z) + up, torch.zeros(2, size, dtype=DOUBLE))
            (low,), _ = deq(lambda z, down=down: 0.5 * torch.cos(z) + down, torch.zeros(2, size, dtype=DOUBLE))
        assert abs(float((high - low).sum() / 2e-6 - (found * bump / 1e-6).sum())) < 1e-5


def test_a_replay_that_ends_elsewhere_is_refused() -> None:
    x = rand(3, 4).requires_grad_()
    calls = 0

    def fn(z: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return 0.5 * z + x + (0.3 if calls > 30 else 0.0)

    with pytest.raises(GradientModeError, match="ended elsewhere"):
        unroll(30, {"name": "fixed_point_iter"}, 1e-8)(fn, torch.zeros(3, 4, dtype=DOUBLE))


def test_a_warm_start_from_a_state_replays_from_there() -> None:
    f = layer()
    deq = unroll(200, {"name": "fixed_point_iter"}, 1e-6)
    _, info = deq(f, f.z0)
    half = lambda z: torch.tanh(z @ f.w + 1.01 * f.x)  # noqa: E731
    (z,), again = deq(half, f.z0, warm_start=info)
    expected = info["z"]
    for _ in range(int(again["nstep"].max())):
        expected = half(expected)
    assert torch.equal(z, expected)
    close(torch.autograd.grad(z.sum(), f.inputs), torch.autograd.grad(expected.sum(), f.inputs), 1e-13)


def test_nan_is_not_handed_on() -> None:
    """The root has no derivative at 0, which f meets on the way."""
    x = torch.zeros(2, 3, dtype=DOUBLE, requires_grad=True)

    def fn(z: Tensor) -> Tensor:
        return 0.25 * torch.sqrt(z * z + x * x) + x

    (z,), _ = unroll(4, {"name": "fixed_point_iter"})(fn, torch.zeros(2, 3, dtype=DOUBLE))
    with pytest.raises(GradientModeError, match="not finite"):
        z.sum().backward()
    (z,), _ = unroll(4, {"name": "fixed_point_iter"})(lambda z: 0.5 * z + x, torch.zeros(2, 3, dtype=DOUBLE))
    (x_grad,) = torch.autograd.grad(z.sum() * float("inf"), x)  # what came in is handed on, for a gradient scaler
    assert not torch.isfinite(x_grad).any()


def test_states_before_the_last_one() -> None:
    f = layer()
    core = {"name": "indexing", "n_states": 3}
    solver = {"name": "fixed_point_iter", "tol": 0, "max_iter": 9}
    z_out, _ = get_deq(gradient="unrolled", solver=solver, core=core)(f, f.z0)  # phantom before the last
    assert len(z_out) == 3
    with pytest.raises(ConfigError, match="intermediate"):
        get_deq(gradient="unrolled", solver=solver, core={**core, "intermediate": ["unrolled"]})(f, f.z0)


@pytest.mark.parametrize(
    "options",
    [{"every": 4}, {"checkpoint": "none", "every": 4}, {"checkpoint": "every_k", "every": 0}, {"checkpoint": "some"}],
)
def test_settings_that_mean_nothing(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"every|checkpoint"):
        get_deq(gradient={"name": "unrolled", **options})


def test_direction_beside_the_exact_gradient_improves_with_steps() -> None:
    f = layer(rho=0.9)
    found = []
    for steps in (2, 10, 50):
        (z,), _ = unroll(steps, {"name": "fixed_point_iter"})(f, f.z0)
        found.append(torch.autograd.grad(z.sum(), f.inputs))
    exact = f.pulled(z, f.adjoint(z, torch.ones(4, 6, dtype=DOUBLE)))
    angles = [1 - cosine(part, exact) for part in found]
    assert angles[0] > angles[1] > angles[2]
