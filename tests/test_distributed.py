"""Two processes: their averaged gradients are the single process's."""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deqcore
from deqcore import get_deq

DOUBLE = torch.float64

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available() or sys.platform == "win32",
    reason="needs torch.distributed with gloo",
)

#: name -> (options of the model, of DistributedDataParallel)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "implicit": ({}, {}),
    "implicit, unused looked for": ({}, {"find_unused_parameters": True}),
    "phantom": ({"gradient": {"name": "phantom", "steps": 2}}, {}),
    "phantom, unused looked for": ({"gradient": {"name": "phantom", "steps": 2}}, {"find_unused_parameters": True}),
    "one unused": ({"unused": True}, {"find_unused_parameters": True}),
    "weight norm": ({"norm": "weight_norm"}, {}),
    "spectral norm": ({"norm": "spectral_norm"}, {"broadcast_buffers": False}),
    "spectral norm, phantom": ({"norm": "spectral_norm", "gradient": "phantom"}, {}),
    "compact": ({"compact": True, "solver": {"name": "fixed_point_iter", "tol": 1e-11, "max_iter": 900}}, {}),
    "compact, norm, phantom": ({"compact": True, "norm": "weight_norm", "gradient": "phantom"}, {}),
    "static graph": ({}, {"static_graph": True}),
    "views of buckets": ({}, {"gradient_as_bucket_view": True}),
    "two calls": ({"calls": 2}, {}),
    "several states": ({"core": {"name": "sliced", "n_states": 2}, "gradient": "phantom"}, {}),
}


class Model(nn.Module):
    """Everything that is trained is inside of f, or behind it."""

    def __init__(self, norm: str | None = None, calls: int = 1, unused: bool = False, **config: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inject, self.layer, self.head = nn.Linear(3, 5), nn.Linear(5, 5), nn.Linear(5, 2)
        if unused:
            self.unused = nn.Linear(5, 5)
        self.double()
        with torch.no_grad():
            self.layer.weight.mul_(0.6)
        if norm is not None:
            deqcore.apply_norm(self.layer, norm)
        self.calls = calls
        solver = {"name": "broyden", "tol": 1e-11, "max_iter": 200}
        gradient = {"name": "implicit", "solver": {"name": "gmres", "tol": 1e-11}}
        self.deq = get_deq(**{"solver": solver, "gradient": gradient, **config}, on_failure="ignore")

    def forward(self, x: Tensor) -> list[Tensor]:
        u = self.inject(x)

        def fn(z: Tensor, u: Tensor) -> Tensor:
            return torch.tanh(0.6 * self.layer(z) + u)

        states: list[Tensor] = []
        for _ in range(self.calls):
            states += self.deq(fn, torch.zeros(len(x), 5, dtype=x.dtype), args=(u,))[0]
            u = u + states[-1]
        return [self.head(z) for z in states]


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, 3, generator=generator, dtype=DOUBLE) * torch.linspace(0.1, 2, 8, dtype=DOUBLE)[:, None]
    return x, torch.randn(8, 2, generator=generator, dtype=DOUBLE)


def train(model: nn.Module, inner: nn.Module, x: Tensor, y: Tensor, steps: int = 2) -> dict[str, Any]:
    """The gradients of each step."""
    optimizer = torch.optim.SGD(inner.parameters(), lr=0.1)
    found: list[dict[str, Tensor]] = []
    for _ in range(steps):
        optimizer.zero_grad()
        sum(((out - y) ** 2).mean() for out in model(x)).backward()
        found.append({name: p.grad.clone() for name, p in inner.named_parameters() if p.grad is not None})
        optimizer.step()
    return {"gradients": found, "state": {key: value.clone() for key, value in inner.state_dict().items()}}


def run(rank: int, folder: str) -> None:
    """One of the two processes: all cases one after the other, for starting a process is what costs time."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    try:
        results: dict[str, Any] = {}
        for name, (options, wrapping) in CASES.items():
            x, y = (part[4 * rank : 4 * rank + 4] for part in batch())
            model = Model(**options)
            try:
                parallel = nn.parallel.DistributedDataParallel(model, **wrapping)
                results[name] = train(parallel, model, x, y)
            except Exception as error:
                results[name] = f"{type(error).__name__}: {error}"
                break  # the other process may be elsewhere now
        torch.save(results, Path(folder) / f"rank{rank}.pt")
        torch.distributed.barrier()
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both processes found; a file in a folder of the test's own is where they meet."""
    folder = tmp_path_factory.mktemp("distributed")
    context = torch.multiprocessing.get_context("spawn")
    processes = [context.Process(target=run, args=(rank, str(folder)), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    for process in processes:
        if process.is_alive():
            process.kill()
    files = [folder / f"rank{rank}.pt" for rank in range(2)]
    assert all(file.exists() for file in files), [process.exitcode for process in processes]
    return [torch.load(file) for file in files]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_give_the_gradients_of_one(name: str, found: list[dict[str, Any]]) -> None:
    options, _ = CASES[name]
    model = Model(**options)
    expected = train(model, model, *batch())
    for rank in range(2):
        assert name in found[rank], found[rank].get(list(found[rank])[-1])
        result = found[rank][name]
        assert not isinstance(result, str), result
        for step, (mine, right) in enumerate(zip(result["gradients"], expected["gradients"], strict=True)):
            trained = {key: value for key, value in mine.items() if key in right}
            assert trained.keys() == right.keys()
            assert all(not value.any() for key, value in mine.items() if key not in right)
            torch.testing.assert_close(trained, right, rtol=1e-7, atol=1e-8, msg=lambda m, s=step: f"step {s}: {m}")
    torch.testing.assert_close(found[0][name]["state"], found[1][name]["state"], rtol=1e-12, atol=1e-12)
