"""Distributions for tests: real metadata and modules in a folder on sys.path, as pip leaves them."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path

from deqcore import registry

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
