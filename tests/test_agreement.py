"""Implicit gradients = unrolled ones = a dense solve of (I - J)^T, on the problems whose answer is known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deqcore
from deqcore import get_deq
from deqcore.testing import PROBLEMS, ExactProblem, exact_problem

DOUBLE = torch.float64
TOLERANCE = 1e-8


def rand_like(z: Tensor, seed: int = 7) -> Tensor:
    return torch.randn(z.shape, generator=torch.Generator().manual_seed(seed), dtype=z.dtype)


def settings(problem: ExactProblem, adjoint: str = "gmres") -> dict[str, Any]:
    return {
        "solver": {"name": "broyden", "tol": 1e-13, "max_iter": 300, "stop_mode": "rel"},
        "gradient": {"name": "implicit", "solver": {"name": adjoint, "tol": 1e-12, "max_iter": 500}},
        "batch_dims": problem.batch_dims,
        "on_failure": "ignore",
    }


def real(z: Tensor) -> Tensor:
    """A vector of real numbers that is linear in z."""
    return (torch.view_as_real(z) if z.is_complex() else z).reshape(-1)


def like(flat: Tensor, z: Tensor) -> Tensor:
    return torch.view_as_complex(flat.reshape(*z.shape, 2)) if z.is_complex() else flat.reshape(z.shape)


def dense(problem: ExactProblem, cotangent: Tensor, inputs: list[Tensor], fn: Any) -> list[Tensor]:
    """At the answer, which no solver under test has found; the state as real numbers, all of it at once."""
    point = real(problem.answer).detach().clone()

    def flat(x: Tensor) -> Tensor:
        return real(fn(like(x, problem.answer)))

    jacobian = torch.autograd.functional.jacobian(flat, point)
    u = torch.linalg.solve((torch.eye(len(point), dtype=point.dtype) - jacobian).T, real(cotangent))
    return list(torch.autograd.grad(flat(point), inputs, u))


def unrolled(problem: ExactProblem, cotangent: Tensor, inputs: list[Tensor], fn: Any) -> list[Tensor]:
    """Of enough steps; those of a map that expands go from the answer by damped steps, whose limit has this slope."""
    z, damping = problem.z0, 1.0
    steps = 700
    if not problem.contracts:
        jacobian = torch.autograd.functional.jacobian(
            lambda x: real(fn(like(x, problem.answer))), real(problem.answer).detach()
        )
        eigenvalues = torch.linalg.eigvals(jacobian)
        damping = min((0.4, 0.2, 0.05), key=lambda d: float((1 - d + d * eigenvalues).abs().max()))
        if float((1 - damping + damping * eigenvalues).abs().max()) > 0.97:
            return []  # no damped steps converge
        z = problem.answer
    for _ in range(steps):
        z = torch.lerp(z, fn(z), torch.tensor(damping, dtype=z.dtype)) if damping < 1 else fn(z)
    return list(torch.autograd.grad(z, inputs, cotangent))


def agree(found: Any, expected: Any, tol: float = TOLERANCE) -> None:
    for a, b in zip(found, expected, strict=True):
        scale = max(float(torch.linalg.vector_norm(b)), 1e-30)
        assert float(torch.linalg.vector_norm(a - b)) <= tol * scale, float(torch.linalg.vector_norm(a - b)) / scale


def with_grad(problem: ExactProblem) -> list[Tensor]:
    return [arg.detach().clone().requires_grad_() for arg in problem.args]


class Wrapped(nn.Module):
    """A problem as a module: its first argument is a buffer, the others are parameters."""

    def __init__(self, problem: ExactProblem) -> None:
        super().__init__()
        first, *others = (arg.detach().clone() for arg in problem.args)
        self.register_buffer("first", first)
        self.others = nn.ParameterList([nn.Parameter(other) for other in others])
        self.map = problem.fn
        self.first.requires_grad_()

    def forward(self, z: Tensor) -> Tensor:
        return self.map(z, self.first, *self.others)

    @property
    def inputs(self) -> list[Tensor]:
        return [self.first, *self.others]


def as_closure(problem: ExactProblem, deq: Any) -> tuple[Tensor, list[Tensor]]:
    inputs = with_grad(problem)
    return deq(lambda z: problem.fn(z, *inputs), problem.z0)[0][-1], inputs


def as_arguments(problem: ExactProblem, deq: Any) -> tuple[Tensor, list[Tensor]]:
    inputs = with_grad(problem)
    return deq(problem.fn, problem.z0, args=tuple(inputs))[0][-1], inputs


def as_module(problem: ExactProblem, deq: Any) -> tuple[Tensor, list[Tensor]]:
    module = Wrapped(problem)
    return deq(module, problem.z0)[0][-1], module.inputs


def as_function(problem: ExactProblem, deq: Any) -> tuple[Tensor, list[Tensor]]:
    inputs = with_grad(problem)
    return deqcore.fixed_point(problem.fn, problem.z0, tuple(inputs), **settings(problem)), inputs


WAYS = [as_closure, as_arguments, as_module, as_function]
WITH_INPUTS = [name for name in PROBLEMS if exact_problem(name).args]


def truths(problem: ExactProblem, cotangent: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    inputs = with_grad(problem)

    def fn(z: Tensor) -> Tensor:
        return problem.fn(z, *inputs)

    return dense(problem, cotangent, inputs, fn), unrolled(problem, cotangent, inputs, fn)


@pytest.mark.parametrize("name", WITH_INPUTS)
def test_implicit_unrolled_and_dense_agree(name: str) -> None:
    problem = exact_problem(name)
    cotangent = rand_like(problem.answer)
    by_dense, by_unrolling = truths(problem, cotangent)
    if by_unrolling:
        agree(by_unrolling, by_dense)  # the truths with each other
    assert by_unrolling or name == "affine, rotation"
    for training in (True, False):
        for way in WAYS:
            z, inputs = way(problem, get_deq(**settings(problem)).train(training))
            assert problem.error(z.detach()) < 1e-9
            found = torch.autograd.grad(z, inputs, cotangent)
            agree(found, by_dense)
            if by_unrolling:
                agree(found, by_unrolling)


@pytest.mark.parametrize("adjoint", [*deqcore.registry.names("linear_solvers"), "anderson", "broyden"])
@pytest.mark.parametrize("name", ["affine", "tanh", "tanh, negative", "affine, complex", "graph", "affine, rotation"])
def test_every_solver_of_the_adjoint_agrees_or_says_that_it_failed(name: str, adjoint: str) -> None:
    problem = exact_problem(name)
    inputs, cotangent = with_grad(problem), rand_like(problem.answer)
    deq = get_deq(**settings(problem, adjoint))
    z_out, info = deq(problem.fn, problem.z0, args=tuple(inputs))
    found = torch.autograd.grad(z_out[-1], inputs, cotangent)
    if not info["backward"].failed():
        agree(found, dense(problem, cotangent, inputs, lambda z: problem.fn(z, *inputs)))


@pytest.mark.parametrize("name", ["affine", "tanh", "tanh, negative", "graph", "bratu 2", "chandrasekhar 0.9"])
def test_single_precision_is_right_to_its_own_precision(name: str) -> None:
    problem, single = exact_problem(name), exact_problem(name, torch.float32)
    inputs, cotangent = with_grad(single), rand_like(problem.answer)
    options = settings(single)
    options["solver"] |= {"tol": 1e-6}
    options["gradient"] = {"name": "implicit", "solver": {"name": "gmres", "tol": 1e-6, "max_iter": 500}}
    z_out, _ = get_deq(**options)(single.fn, single.z0, args=tuple(inputs))
    found = torch.autograd.grad(z_out[-1], inputs, cotangent.float())
    wide = with_grad(problem)
    expected = dense(problem, cotangent, wide, lambda z: problem.fn(z, *wide))
    agree([g.double() for g in found], expected, 2e-3 if name == "chandrasekhar 0.9" else 2e-4)
    assert all(g.dtype == torch.float32 for g in found)


def test_a_state_of_several_precisions_is_right_to_the_coarsest() -> None:
    generator = torch.Generator().manual_seed(0)
    w = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=DOUBLE))[0] * 0.7
    x = torch.randn(3, 6, generator=generator, dtype=DOUBLE)

    def solve(a: torch.dtype, b: torch.dtype, wide: bool) -> tuple[Tensor, Tensor]:
        weight, inject = w.clone().requires_grad_(), x.clone().requires_grad_()

        def fn(h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
            joint = torch.tanh(torch.cat([h.double(), c.double()], 1) @ weight + inject)
            return joint[:, :2].to(h.dtype), joint[:, 2:].to(c.dtype)

        tol = 1e-12 if wide else 1e-5
        deq = get_deq(
            solver={"name": "broyden", "tol": tol, "max_iter": 100},
            gradient={"name": "implicit", "solver": {"name": "gmres", "tol": tol}},
            on_failure="ignore",
        )
        ((h, c),), _ = deq(fn, (torch.zeros(3, 2, dtype=a), torch.zeros(3, 4, dtype=b)))
        assert h.dtype == a and c.dtype == b
        loss = h.double().sum() + c.double().square().sum()
        gradients = torch.autograd.grad(loss, (weight, inject))
        assert all(g.dtype == DOUBLE for g in gradients)
        return gradients

    exact = solve(DOUBLE, DOUBLE, True)
    for a, b, tol in (
        (torch.float32, DOUBLE, 1e-5),
        (torch.float32, torch.float32, 1e-5),
        (torch.float16, DOUBLE, 2e-2),
        (torch.bfloat16, torch.float32, 0.1),
        (torch.float16, torch.bfloat16, 0.1),
    ):
        agree(solve(a, b, False), exact, tol)


def test_complex_inputs_of_a_real_state_and_real_inputs_of_a_complex_one() -> None:
    generator = torch.Generator().manual_seed(1)
    phase = torch.randn(4, generator=generator, dtype=torch.complex128).requires_grad_()
    size = torch.randn(4, generator=generator, dtype=DOUBLE).requires_grad_()

    def to_real(z: Tensor) -> Tensor:
        return torch.tanh(0.4 * z + (phase * torch.exp(1j * z)).real * 0.2 + size)

    def to_complex(z: Tensor) -> Tensor:
        return 0.4j * z + 0.1 * z.conj() + phase * size.sigmoid()

    for fn, dtype in ((to_real, DOUBLE), (to_complex, torch.complex128)):
        z0 = torch.zeros(2, 4, dtype=dtype)
        problem = ExactProblem("", fn, z0, z0)
        z = z0
        for _ in range(300):
            z = fn(z)
        cotangent = rand_like(z)
        found = get_deq(**settings(problem))(fn, z0)[0][-1]
        agree(torch.autograd.grad(found, (phase, size), cotangent), torch.autograd.grad(z, (phase, size), cotangent))


@pytest.mark.parametrize("gradient", ["implicit", "unrolled"])
def test_the_backend_by_name_is_the_loop_by_hand(gradient: str) -> None:
    """unrolled by name against unrolling by hand, beside implicit: three ways to one gradient."""
    problem = exact_problem("tanh")
    inputs, cotangent = with_grad(problem), rand_like(problem.answer)
    options = {"solver": {"name": "fixed_point_iter", "tol": 1e-12, "max_iter": 1000}, "on_failure": "ignore"}
    adjoint = {"solver": {"name": "gmres", "tol": 1e-12}} if gradient == "implicit" else {}
    z_out, _ = get_deq(**options, gradient={"name": gradient, **adjoint})(problem.fn, problem.z0, args=tuple(inputs))
    found = torch.autograd.grad(z_out[-1], inputs, cotangent)
    agree(found, dense(problem, cotangent, inputs, lambda z: problem.fn(z, *inputs)))
