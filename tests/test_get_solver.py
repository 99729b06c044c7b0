"""Solvers handed out as functions of TorchDEQ's signature, beside TorchDEQ's own."""

from __future__ import annotations

import pytest
import torch
import torchdeq
import torchdeq.solver
from plugins_support import linear_map

import deqcore
from deqcore import (
    ConfigError,
    UnknownKeyError,
    UnknownPluginError,
    get_solver,
    registry,
    solver_stat_from_final_step,
)

BUILT_IN = ["anderson", "broyden", "fixed_point_iter", "simple_fixed_point_iter"]
KEYS = ("abs_lowest", "rel_lowest", "abs_trace", "rel_trace", "nstep", "sradius")


@pytest.fixture(autouse=True)
def _scope():
    with registry.scope():
        yield


def their_solver(name):
    """TorchDEQ's function, whose simple_fixed_point_iter leaves the damping to f."""
    solver = torchdeq.solver.get_solver(name)
    return lambda f, z0, **options: solver(lambda z, tau=1.0: tau * f(z) + (1 - tau) * z, z0, **options)


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("stop_mode", ["abs", "rel"])
@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 4), (4, 1)])
def test_get_solver_beside_torchdeqs(name, stop_mode, shape):
    f, z0, exact = linear_map(shape)
    options = {"max_iter": 60, "tol": 1e-8, "stop_mode": stop_mode}
    z, trajectory, info = get_solver(name)(f, z0, **options)
    theirs, their_trajectory, their_info = their_solver(name)(f, z0, **options)
    torch.testing.assert_close(z, exact, atol=1e-7, rtol=0)
    torch.testing.assert_close(z, theirs, atol=1e-7, rtol=0)
    assert trajectory == their_trajectory == []
    batch = shape[0]
    for key in KEYS:
        assert key in info and key in their_info
    for key in ("abs_lowest", "rel_lowest", "nstep"):
        assert info[key].shape == their_info[key].shape == (batch,)
    for key in ("abs_trace", "rel_trace"):
        assert info[key].dim() == their_info[key].dim() == 2 and info[key].shape[0] == batch
    assert info["sradius"].shape == their_info["sradius"].shape == (1,)
    residual = torch.linalg.vector_norm((f(z) - z).flatten(1), dim=1)
    torch.testing.assert_close(info["abs_lowest"], residual, atol=1e-12, rtol=1e-6)


@pytest.mark.parametrize("name", BUILT_IN)
def test_scalars_and_vectors(name):
    """TorchDEQ's own examples: a number, and one state a number."""
    for x0 in (torch.tensor(0.0), torch.zeros(1), torch.zeros(3)):
        z, _, _ = get_solver(name)(torch.cos, x0, max_iter=100, tol=1e-6)
        assert z.shape == x0.shape
        torch.testing.assert_close(z, torch.full_like(x0, 0.7390851), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["fixed_point_iter", "simple_fixed_point_iter"])
def test_indexing_beside_torchdeqs(name):
    f, z0, _ = linear_map()
    steps = [1, 4, 6]
    options = {"max_iter": 6, "tol": 0.0, "indexing": steps}
    z, trajectory, _ = get_solver(name)(f, z0, **options)
    _, theirs, _ = their_solver(name)(f, z0, **options)
    states = [z0]
    for _ in range(6):
        states.append(f(states[-1]))
    torch.testing.assert_close(trajectory, [states[k] for k in steps])
    torch.testing.assert_close(trajectory, theirs)
    torch.testing.assert_close(z, states[6])


def test_indexing_past_an_early_stop_gives_the_solution():
    f, z0, exact = linear_map()
    z, trajectory, info = get_solver("anderson")(f, z0, max_iter=60, tol=1e-8, indexing=[2, 50])
    assert int(info["steps"].max()) < 50
    assert len(trajectory) == 2 and torch.equal(trajectory[1], z)
    assert not torch.allclose(trajectory[0], exact)


def test_options_of_the_functions():
    f, z0, exact = linear_map()
    for name, options in (
        ("anderson", {"m": 3, "lam": 1e-8, "tau": 0.8}),
        ("anderson", {"memory": 3, "damping": 0.8}),
        ("broyden", {"LBFGS_thres": 5, "ls": True}),
        ("fixed_point_iter", {"tau": 0.9}),
        ("anderson", {"rtol": 1e-9}),
        ("anderson", {"atol": 1e-9, "residual_norm": "max"}),
    ):
        tolerance = {} if options.keys() & {"rtol", "atol"} else {"tol": 1e-8}
        z, _, info = get_solver(name)(f, z0, max_iter=100, **tolerance, **options)
        torch.testing.assert_close(z, exact, atol=1e-7, rtol=0)
        assert bool(info.converged.all()), (name, options)
    with pytest.raises(UnknownKeyError, match="Did you mean 'memory'"):
        get_solver("anderson")(f, z0, memroy=3)
    with pytest.raises(ConfigError, match="max_iter"):
        get_solver("anderson")(f, z0, max_iter=-1)
    with pytest.raises(ConfigError, match="either tol"):
        get_solver("anderson")(f, z0, tol=1e-4, rtol=1e-4)


def test_return_final_beside_torchdeqs():
    f, z0, _ = linear_map()
    options = {"max_iter": 7, "tol": 1.0, "return_final": True}
    z, _, _ = get_solver("fixed_point_iter")(f, z0, **options)
    theirs, _, _ = their_solver("fixed_point_iter")(f, z0, **options)
    torch.testing.assert_close(z, theirs)


def test_the_functions_leave_no_graph_and_change_nothing():
    f, z0, _ = linear_map()
    scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    start = z0.clone()
    z, _, info = get_solver("anderson")(lambda z: scale * f(z), z0)
    assert not z.requires_grad and torch.equal(z0, start)
    assert not any(isinstance(value, torch.Tensor) and value.requires_grad for value in info.values())


def test_get_solver_names():
    for name in BUILT_IN:
        assert get_solver(name).__name__ == name and get_solver(name).__doc__
    assert get_solver("deqcore/anderson")
    with pytest.raises(UnknownPluginError, match="Did you mean 'anderson'"):
        get_solver("andersn")
    for kept, name in (("anderson_solver", "anderson"), ("broyden_solver", "broyden"), ("fixed_point_iter",) * 2):
        assert getattr(deqcore.solver, kept).__name__ == name
    with pytest.raises(AttributeError, match="nothing_solver"):
        _ = deqcore.solver.nothing_solver


# ---- statistics from a final step


@pytest.mark.parametrize("several", [False, True])
def test_solver_stat_from_final_step_beside_torchdeqs(several):
    generator = torch.Generator().manual_seed(3)

    def state():
        parts = [torch.randn(4, *shape, generator=generator) for shape in ((3,), (2, 2))]
        return tuple(parts) if several else parts[1]

    z, fz = state(), state()
    info = solver_stat_from_final_step(z, fz, 7)
    theirs = torchdeq.solver.solver_stat_from_final_step(z, fz, 7)
    assert set(KEYS) == set(theirs)
    for key in KEYS:
        torch.testing.assert_close(info[key], theirs[key])
    assert info["abs_trace"].shape == (4, 1) and info["nstep"].shape == (4,)


def test_solver_stat_from_final_step_by_hand():
    info = solver_stat_from_final_step(torch.tensor([[3.0, 0.0]]), torch.tensor([[3.0, 4.0]]))
    assert float(info["abs_lowest"]) == 4.0
    torch.testing.assert_close(info["rel_lowest"], torch.tensor([0.8]))
    assert float(info["nstep"]) == 0.0
