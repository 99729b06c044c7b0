"""The kernel stands alone: it imports no implementation, and works as far as it can where there is none."""

from __future__ import annotations

import ast
import json
from pathlib import Path

from plugins_support import BUILTINS, run_python

import deqcore

KERNEL = Path(deqcore.__file__).parent

#: Stops every import of a built-in implementation, as if its package had been deleted.
BLOCK = """
import importlib.abc, sys

class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0].startswith("deqcore_"):
            raise ModuleNotFoundError(f"blocked: {name}", name=name)

sys.meta_path.insert(0, Block())
"""


def imported_by(tree):
    """Every module that code anywhere in `tree` imports by an absolute name, in functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module or ""
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                yield str(node.args[0].value)


def test_the_walk_finds_lazy_imports():
    code = "def f():\n  import a.b, c as d\n  from e.f import g\n  importlib.import_module('h')\n  __import__('i')\n"
    code += "from . import j\n"
    assert sorted(imported_by(ast.parse(code))) == ["a.b", "c", "e.f", "h", "i"]


def test_the_kernel_names_no_implementation():
    files = sorted(KERNEL.rglob("*.py"))
    assert len(files) > 20
    for file in files:
        for module in imported_by(ast.parse(file.read_text(encoding="utf-8"))):
            assert not module.startswith("deqcore_"), f"{file.relative_to(KERNEL)} imports {module}"


def test_what_is_imported_when():
    out = run_python(
        """
        import json, sys
        import torch
        before = set(sys.modules)

        def new():
            return sorted({name.partition(".")[0] for name in set(sys.modules) - before})

        def plugins():
            return sorted(name for name in sys.modules if name.startswith("deqcore_"))

        import deqcore
        found = [new()]
        deqcore.registry.entries()
        found += [plugins()]
        deqcore.registry.get("solvers", "anderson")
        print(json.dumps([*found, plugins(), new()]))
        """
    )
    kernel, listed, named, roots = json.loads(out)
    assert "deqcore" in kernel and "pluggy" in kernel
    assert "importlib_metadata" not in kernel, "metadata is read when a name is first asked for"
    for unwanted in ("sklearn", "scipy", "matplotlib", "rich", "typer", "click", "yaml", "torchdeq"):
        assert unwanted not in roots, unwanted
    assert not [root for root in kernel if root.startswith("deqcore_")]
    assert listed == []  # the index imports nothing
    assert named == ["deqcore_solvers", "deqcore_solvers.anderson"]  # and a name imports its own module


def test_the_kernel_without_its_built_ins():
    out = run_python(
        BLOCK
        + """
import json
import torch
import deqcore
from deqcore import BrokenPluginError, registry

names = {kind: registry.names(kind) for kind in ("solvers", "gradients", "cores", "norms", "regularizers")}
states = {f"{entry.kind}:{entry.name}": registry.state_of(entry) for entry in registry.entries()}
try:
    deqcore.get_deq("anderson")
except BrokenPluginError as error:
    refused = str(error)

class Mine(deqcore.Solver[deqcore.SolverSettings]):
    def step(self, problem, z, fz, state):
        return deqcore.Step(fz, state)

deqcore.register_solver("mine", Mine)  # the loop is the kernel's: a solver of one's own is enough to solve
spec = deqcore.StateSpec(torch.zeros(2, 3))
problem = deqcore.Problem.of(lambda z: 0.5 * z + 1, spec)
solution = deqcore.iterate(registry.create("solvers", "mine"), problem, spec.pack(torch.zeros(2, 3))).solution
print(json.dumps([names, states, refused, solution["z"].tolist(), bool(solution.converged.all())]))
"""
    )
    names, states, refused, z, converged = json.loads(out)
    assert names["solvers"] == BUILTINS["solvers"]
    assert names["gradients"] == BUILTINS["gradients"]
    assert {"indexing", "sliced"} == set(names["cores"]) and {"spectral_norm", "weight_norm"} <= set(names["norms"])
    for key, (state, cause) in states.items():
        assert state == "broken", key
        assert "blocked: deqcore_" in cause and "deqcore 0.1.0" in cause and key.split(":")[1] in cause
    assert "solver 'anderson'" in refused and "blocked: deqcore_solvers" in refused
    assert converged and all(abs(value - 2) < 2e-3 for row in z for value in row)


def test_the_command_line_lists_broken_built_ins():
    out = run_python(
        BLOCK
        + """
from deqcore.cli import main

sys.argv = ["deqcore", "plugins", "list", "--json"]
try:
    main()
except SystemExit as error:
    assert not error.code, error.code
"""
    )
    rows = {(row["kind"], row["name"]): row for row in json.loads(out)["plugins"]}
    for key in (("solvers", "anderson"), ("gradients", "implicit"), ("cores", "sliced"), ("norms", "weight_norm")):
        assert rows[key]["status"] == "broken" and "blocked: deqcore_" in rows[key]["cause"]
        assert rows[key]["origin"] == "deqcore" and rows[key]["version"] == deqcore.__version__
