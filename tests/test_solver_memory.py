"""Memory of a solve, measured at the allocator: bounded by the solver's memory setting, whatever the step limit is."""

from __future__ import annotations

import math

import pytest
import torch

import deqcore
from deqcore.testing import peak_bytes, states_beyond

#: solver -> most states beyond the state and f's own use, by its memory setting.
LIMITS = {"anderson": lambda memory: 2 * memory + 2, "broyden": lambda memory: 2 * memory + 4}
#: 1 MiB in float32: what is kept of every sample, its residuals, is small beside it.
LARGE = (4, 65536)
SMALL = (64, 64)


def never(shape, dtype=torch.float32):
    """f, which takes one state and has no fixed point that a solver finds, and where to start."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    return lambda z: z.mul(3.0).add_(x).sin_(), torch.zeros(shape, dtype=dtype)


def beyond(options, shape, dtype=torch.float32, **config):
    f, z0 = never(shape, dtype)
    solver = {"tol": 1e-12, "divergence_factor": math.inf, **options}
    short, whole = (
        deqcore.get_deq(solver={**solver, "max_iter": steps}, on_failure="ignore", **config).eval()
        for steps in (2, options["max_iter"])
    )
    with torch.no_grad():
        short(f, z0)
        return states_beyond(lambda: whole(f, z0), lambda: f(z0), z0)


def test_the_measure_sees_what_is_held_and_what_was_only_passing():
    size = 1 << 20
    held = []

    def call():
        torch.empty(3 * size, dtype=torch.uint8)
        held.append(torch.empty(size, dtype=torch.uint8))
        return torch.empty(size, dtype=torch.uint8)

    assert peak_bytes(call) == 3 * size
    assert peak_bytes(lambda: [torch.empty(size, dtype=torch.uint8) for _ in range(5)]) == 5 * size
    inside = torch.randn(512, 512)
    assert peak_bytes(lambda: torch.nn.functional.softplus(inside.t().contiguous())) == 2 * inside.nbytes


@pytest.mark.parametrize("max_iter", [10, 50, 200])
@pytest.mark.parametrize("memory", [5, 10, 20])
@pytest.mark.parametrize("name", LIMITS)
def test_memory_of_a_solve_is_bounded(name, memory, max_iter):
    found = beyond({"name": name, "memory": memory, "max_iter": max_iter}, LARGE)
    assert found <= LIMITS[name](memory) + 0.1  # Gram matrices, residuals of 200 steps


@pytest.mark.parametrize("name", LIMITS)
def test_memory_in_double_precision(name):
    assert beyond({"name": name, "memory": 5, "max_iter": 30}, LARGE, torch.float64) <= LIMITS[name](5) + 0.1


def test_plain_iteration_keeps_the_best_state_and_nothing_else():
    assert beyond({"name": "fixed_point_iter", "max_iter": 50}, LARGE) <= 2.1


@pytest.mark.parametrize("name", LIMITS)
def test_small_states_do_not_pile_up(name):
    """Small states may be kept by reference for speed, up to a bound in bytes that the step limit doesn't move."""
    solver = {"name": name, "memory": 5}
    state = 4 * math.prod(SMALL)
    short, long = (beyond({**solver, "max_iter": steps}, SMALL) * state for steps in (50, 400))
    assert long <= LIMITS[name](5) * state + (2 << 20)
    assert long - short <= 1 << 20
