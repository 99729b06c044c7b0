"""The examples in the hook specifications, each loaded as a plugin and used."""

from __future__ import annotations

import sys

import pytest
import torch
from plugins_support import linear_map

import deqcore
from deqcore import (
    get_deq,
    registry,
)
from deqcore.registry import KINDS


def example_of(kind):
    """The code in the docstring of the hook of `kind`."""
    import inspect

    from deqcore import hookspecs

    text = inspect.getdoc(getattr(hookspecs, KINDS[kind].hook)) or ""
    assert text.count("::\n") == 1
    return "\n".join(line.removeprefix("    ") for line in text.split("::\n")[1].splitlines())


@pytest.fixture
def example(site, request):
    kind = request.param
    site.install(
        "acme-example", {f"example_{kind}": example_of(kind)}, {f"deqcore.{kind}": {"example": f"example_{kind}"}}
    )
    found = registry.get(kind, "example")
    assert registry.state_of(registry.find(kind, "example")) == ("ok", "")
    assert registry.manager.get_name(sys.modules[f"example_{kind}"]) == f"{kind}:example@acme-example"
    return found


@pytest.mark.parametrize("example", ["solvers"], indirect=True)
def test_example_solver(example):
    f, z0, exact = linear_map()
    deq = get_deq(solver={"name": "example", "max_iter": 100, "tol": 1e-10}).eval()
    z_out, info = deq(f, z0)
    assert type(deq.solver) is example
    torch.testing.assert_close(z_out[-1], exact, atol=1e-8, rtol=0)
    assert 1 < info["nfe"] < 101


@pytest.mark.parametrize("example", ["linear_solvers"], indirect=True)
def test_example_linear_solver(example):
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    a = 0.4 * a / torch.linalg.matrix_norm(a, 2)
    b = torch.randn(2, 4, generator=generator, dtype=torch.float64)
    problem = deqcore.LinearProblem(lambda u: u @ a.mT, lambda u: u @ a, b)
    found = deqcore.iterate(example(max_iter=100, tol=1e-12), problem, b)
    exact = torch.linalg.solve(torch.eye(4, dtype=torch.float64) - a, b.mT).mT
    torch.testing.assert_close(found.solution["z"], exact, atol=1e-10, rtol=0)


@pytest.mark.parametrize("example", ["gradients"], indirect=True)
def test_example_gradient(example):
    deq = get_deq(solver={"name": "anderson", "tol": 1e-12}, gradient="example")
    assert type(deq.gradients[-1]) is example
    x = torch.full((2, 3), 0.3, dtype=torch.float64, requires_grad=True)
    z_out, _ = deq(lambda z: 0.5 * z + x, torch.zeros(2, 3, dtype=torch.float64))
    torch.testing.assert_close(z_out[-1], torch.full_like(x, 0.6), atol=1e-9, rtol=0)
    z_out[-1].sum().backward()
    torch.testing.assert_close(x.grad, torch.ones_like(x))  # one step of f; the whole gradient is 2


@pytest.mark.parametrize("example", ["cores"], indirect=True)
def test_example_core(example):
    deq = get_deq(core="example", f_tol=1e-12, ift=True)
    assert type(deq.core) is example
    x = torch.full((2, 3), 0.3, dtype=torch.float64, requires_grad=True)
    z_out, _ = deq(lambda z: 0.5 * z + x, torch.zeros(2, 3, dtype=torch.float64))
    assert len(z_out) == 1
    z_out[-1].sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, 2.0), atol=1e-5, rtol=0)


@pytest.mark.parametrize("example", ["norms"], indirect=True)
def test_example_norm(example):
    assert issubclass(example, deqcore.Norm)
    layer = torch.nn.Linear(3, 4, dtype=torch.float64)
    before = layer.weight.detach().clone()
    deqcore.apply_norm(layer, "example")
    torch.testing.assert_close(layer.weight, before / (1 + before.norm()))
    assert torch.nn.utils.parametrize.is_parametrized(layer, "weight")


@pytest.mark.parametrize("example", ["regularizers"], indirect=True)
def test_example_regularizer(example):
    deq = get_deq("anderson", regularizers=[{"name": "example", "weight": 0.5}], f_tol=1e-10)
    x = torch.full((2, 3), 0.3, requires_grad=True)
    _, info = deq(lambda z: 0.5 * z + x, torch.zeros(2, 3))
    torch.testing.assert_close(info["regularizers"]["example"], torch.tensor(0.36))
    torch.testing.assert_close(info["regularization"], torch.tensor(0.18))
    info["regularization"].backward()
    assert x.grad is not None and bool((x.grad > 0).all())


@pytest.mark.parametrize("example", ["models"], indirect=True)
def test_example_model(example):
    assert isinstance(example(), torch.nn.Module)


@pytest.mark.parametrize("example", ["commands"], indirect=True)
def test_example_command(example, capsys):
    example()
    example("reader")
    assert capsys.readouterr().out == "hello world\nhello reader\n"


def test_every_kind_has_an_example():
    for kind in KINDS:
        compile(example_of(kind), kind, "exec")
        assert f"def {KINDS[kind].hook}()" in example_of(kind)
