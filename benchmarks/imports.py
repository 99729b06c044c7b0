"""What importing deqcore and picking a solver cost, in fresh processes."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from .options import Options
from .report import Table
from .timing import Spread

__all__ = ["INTRO", "run"]

INTRO = (
    "Wall time inside fresh processes, those to be compared taking turns; ratios are of two that follow each other. "
    "Median (lowest..highest)."
)
PLUGINS = 100
LIMITS = {"import": 1.15, "get_deq": 2.0}

IMPORT = "import time; t = time.perf_counter(); import {module}; print(time.perf_counter() - t)"
GET_DEQ = (
    "import deqcore, time; t = time.perf_counter(); deqcore.get_deq('anderson'); print(time.perf_counter() - t); "
    "raise SystemExit(len(deqcore.registry.names('solvers')) < {installed})"
)
MODULE = """from deqcore import Solver, SolverSettings, Step, hookimpl


class Plain(Solver[SolverSettings]):
    def step(self, problem, z, fz, state):
        return Step(fz, state)


@hookimpl
def deqcore_solver():
    return Plain
"""


def run(options: Options) -> list[Table]:
    """The table; `quick` takes few processes."""
    rounds = 3 if options.quick else 11
    table = Table(
        "Imports and plugins",
        ("what", "milliseconds", "over", "milliseconds", "ratio", "at most", "ok"),
        notes=f"{rounds} processes each. The {PLUGINS} plugins are distributions of one solver module each.",
    )
    with tempfile.TemporaryDirectory() as folder:
        crowded, bytecode = Path(folder, "plugins"), Path(folder, "bytecode")
        _install(crowded)
        cases = {
            "import torch": (IMPORT.format(module="torch"), None),
            "import deqcore": (IMPORT.format(module="deqcore"), None),
            "alone": (GET_DEQ.format(installed=4), None),
            "crowded": (GET_DEQ.format(installed=4 + PLUGINS), crowded),
        }
        times: dict[str, list[float]] = {name: [] for name in cases}
        for code, path in cases.values():  # once to have the bytecode written
            _run(code, path, bytecode)
        for _ in range(rounds):
            for name, (code, path) in cases.items():
                times[name].append(_run(code, path, bytecode))
    pairs = (
        ("import deqcore", "import torch", "import deqcore", "import torch", LIMITS["import"]),
        (f'get_deq("anderson"), {PLUGINS} plugins more', "no plugins", "crowded", "alone", LIMITS["get_deq"]),
    )
    for what, over, case, base, limit in pairs:
        ratio = Spread([mine / other for mine, other in zip(times[case], times[base], strict=True)])
        spreads = (Spread(times[name]).times(1e3) for name in (case, base))
        table.add(what, next(spreads), over, next(spreads), ratio, limit, "yes" if ratio.median <= limit else "NO")
    return [table]


def _install(folder: Path) -> None:
    """Distributions as pip leaves them, each with a solver of its own name."""
    folder.mkdir()
    for k in range(PLUGINS):
        name = f"deqcore_bench_{k:03}"
        (folder / f"{name}.py").write_text(MODULE)
        info = folder / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[deqcore.solvers]\nbench_{k:03} = {name}\n")
        (info / "RECORD").write_text("")


def _run(code: str, path: Path | None, bytecode: Path) -> float:
    """Seconds that the code prints, in a process of its own that finds bytecode ready, as after `pip install`."""
    unset = ("PYTHONDONTWRITEBYTECODE", "PYTHONPROFILEIMPORTTIME")
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith("DEQCORE_") and key not in unset
    }
    environment["PYTHONPYCACHEPREFIX"] = str(bytecode)
    if path is not None:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(path), os.environ.get("PYTHONPATH"))))
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"a measuring process failed:\n{done.stderr}")
    return float(done.stdout)
