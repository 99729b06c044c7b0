"""The truncated Neumann gradient: right against dense Jacobians, and found by its name."""

from __future__ import annotations

import pytest
import torch
from deqcore_example_gradient import Neumann

import deqcore


class Map(torch.nn.Module):
    """f(z, x) = tanh(W z + x), contracting."""

    def __init__(self, size=4, norm=0.6):
        super().__init__()
        w = torch.randn(size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        self.w = torch.nn.Parameter(norm * w / torch.linalg.matrix_norm(w, 2))

    def forward(self, z, x):
        return torch.tanh(z @ self.w.mT + x)


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 4, generator=generator, dtype=torch.float64).requires_grad_()
    return Map(), x, torch.randn(3, 4, generator=generator, dtype=torch.float64)


def gradients(problem, terms):
    """The equilibrium, and the gradients of <cotangent, z*> in x and W by this backend."""
    f, x, cotangent = problem
    deq = deqcore.get_deq(
        solver={"name": "anderson", "tol": 1e-13, "max_iter": 200}, gradient={"name": "example_neumann", "terms": terms}
    )
    assert type(deq.gradients[-1]) is Neumann
    z_out, info = deq(f, torch.zeros_like(x), args=(x,))
    assert bool(info.converged.all())
    return z_out[-1], torch.autograd.grad((cotangent * z_out[-1]).sum(), (x, f.w))


def dense(problem, z, terms=None):
    """The same gradients from each sample's dense Jacobian: the whole inverse, or this many terms of its series."""
    f, x, cotangent = problem
    adjoints = []
    for row in range(len(x)):
        j = torch.autograd.functional.jacobian(lambda v, row=row: f(v, x[row].detach()), z[row].detach())
        eye = torch.eye(len(j), dtype=j.dtype)
        if terms is None:
            inverse = torch.linalg.inv(eye - j.mT)
        else:
            inverse = sum((torch.linalg.matrix_power(j.mT, k) for k in range(terms)), torch.zeros_like(eye))
        adjoints.append(inverse @ cotangent[row])
    return torch.autograd.grad((torch.stack(adjoints) * f(z.detach(), x)).sum(), (x, f.w))


@pytest.mark.parametrize("terms", [1, 2, 5])
def test_gives_the_terms_it_says(problem, terms):
    z, found = gradients(problem, terms)
    for one, expected in zip(found, dense(problem, z, terms), strict=True):
        torch.testing.assert_close(one, expected, atol=1e-11, rtol=0)


def test_tends_to_the_exact_gradient(problem):
    errors = []
    for terms in (2, 8, 60):
        z, found = gradients(problem, terms)
        errors.append(max(float((a - b).abs().max()) for a, b in zip(found, dense(problem, z), strict=True)))
    assert errors[0] > 1e-3 and errors[1] < errors[0] / 10 and errors[2] < 1e-10


def test_the_value_is_the_equilibrium_itself(problem):
    f, x, _ = problem
    z, _ = gradients(problem, 3)
    torch.testing.assert_close(f(z, x), z, atol=1e-12, rtol=0)


def test_second_derivatives_are_refused(problem):
    f, x, _ = problem
    deq = deqcore.get_deq("anderson", gradient="example_neumann", f_tol=1e-10)
    z_out, _ = deq(f, torch.zeros_like(x), args=(x,))
    with pytest.raises(deqcore.GradientModeError, match="first derivatives only"):
        torch.autograd.grad(z_out[-1].sum(), x, create_graph=True)


@pytest.mark.parametrize("wrong", [0, -3, 2.5, "all"])
def test_settings_are_checked(wrong):
    with pytest.raises(deqcore.ConfigError, match=r"gradient\.terms"):
        deqcore.get_deq(gradient={"name": "example_neumann", "terms": wrong})


def test_where_it_comes_from():
    entry = deqcore.registry.find("gradient", "example_neumann")
    assert (entry.origin, entry.version) == ("deqcore-example-gradient", "0.2.0")
    assert deqcore.registry.get("gradient", "deqcore-example-gradient/example_neumann") is Neumann
