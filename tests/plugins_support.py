"""Distributions for tests: real metadata and modules in a folder on sys.path, as pip leaves them."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path

import torch

from deqcore import Solver, SolverSettings, Step, registry

DISABLE, ALLOW = "DEQCORE_DISABLE_PLUGINS", "DEQCORE_ALLOW_PLUGINS"
#: A module that must not be imported.
EXPLODES = "raise RuntimeError('imported')"

#: A whole third-party solver.
SOLVER = """
from deqcore import Solver, SolverSettings, Step, hookimpl

class Halfway(Solver[SolverSettings]):
    def step(self, problem, z, fz, state):
        return Step((z + fz) / 2, state)

@hookimpl
def deqcore_solver():
    return Halfway
"""

#: Every built-in name, kind by kind.
BUILTINS = {
    "solvers": [
        "aitken",
        "anderson",
        "auto",
        "broyden",
        "chord",
        "damped",
        "fixed_point_iter",
        "forward_backward",
        "newton",
        "newton_krylov",
        "peaceman_rachford",
        "pseudo_transient",
        "simple_fixed_point_iter",
    ],
    "linear_solvers": ["bicgstab", "cg", "dense", "gmres", "neumann"],
    "gradients": ["implicit", "neumann", "one_step", "phantom", "shine", "unrolled"],
    "cores": ["indexing", "sliced"],
    "norms": ["spectral_norm", "weight_norm"],
    "regularizers": ["fixed_point_correction", "jacobian"],
    "commands": ["demo"],
}


class Site:
    """A folder that counts as site-packages."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def install(
        self,
        dist: str,
        modules: Mapping[str, str],
        points: Mapping[str, Mapping[str, str]],
        version: str = "1.2.3",
    ) -> None:
        """Write `modules` (name -> source) and a dist-info with the entry points `points` (group -> name -> value)."""
        for name, source in modules.items():
            self.path.joinpath(f"{name}.py").write_text(textwrap.dedent(source))
        info = self.path / f"{dist.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        info.joinpath("METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: {version}\n")
        lines = []
        for group, named in points.items():
            lines += [f"[{group}]", *(f"{name} = {value}" for name, value in named.items()), ""]
        info.joinpath("entry_points.txt").write_text("\n".join(lines))
        registry.refresh()

    def solver(self, dist: str, name: str, module: str, source: str = SOLVER, version: str = "1.2.3") -> None:
        """A distribution with one solver."""
        self.install(dist, {module: source}, {"deqcore.solvers": {name: module}}, version)


def run_python(
    code: str, *, env: Mapping[str, str] | None = None, cwd: Path | None = None, python: str = sys.executable
):
    """Run `code` in a fresh interpreter; returns its stdout, or fails with all that it wrote."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("DEQCORE_")}
    done = subprocess.run(
        [python, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**clean, "OMP_NUM_THREADS": "1", **(env or {})},
        timeout=120,
    )
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


class Distribution:
    def __init__(self, name, version):
        self.name, self.version = name, version


class Point:
    """The least an entry point can be: what an index from elsewhere would give."""

    def __init__(self, group, name, value, dist=("fake-dist", "0.1")):
        self.group, self.name, self.value = group, name, value
        self.dist = Distribution(*dist) if dist else None
        self.loads = 0

    def load(self):
        self.loads += 1
        __import__(self.value)
        return sys.modules[self.value]


class Halfway(Solver[SolverSettings]):
    def step(self, problem, z, fz, state):
        return Step((z + fz) / 2, state)


def linear_map(shape=(3, 5), seed=0, norm=0.5):
    """f(z) = A z + b over the flattened features, a start, and the fixed point from a dense solve."""
    generator = torch.Generator().manual_seed(seed)
    size = 1
    for n in shape[1:]:
        size *= n
    a = torch.randn(size, size, generator=generator, dtype=torch.float64)
    a = norm * a / torch.linalg.matrix_norm(a, 2)
    b = torch.randn(shape[0], size, generator=generator, dtype=torch.float64)
    exact = torch.linalg.solve(torch.eye(size, dtype=torch.float64) - a, b.mT).mT.reshape(shape)

    def f(z):
        return (z.reshape(shape[0], size) @ a.mT + b).reshape(shape)

    return f, torch.zeros(shape, dtype=torch.float64), exact


def function_solver(func, x0, max_iter=50, tol=1e-3, stop_mode="abs", indexing=None, weight=1.0):
    for _ in range(max_iter):
        x0 = torch.lerp(x0, func(x0), weight)
    return x0, [], {}
