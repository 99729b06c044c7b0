"""Wheels: what is in ours, and what a user has who installs it with two plugins that are not ours."""

from __future__ import annotations

import configparser
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
PLUGINS = ("deqcore-example-solver", "deqcore-example-gradient", "deqcore-reversible")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

pytestmark = pytest.mark.packaging


def run(*command, cwd):
    """Run a command in `cwd`, without this checkout on its path; returns its stdout."""
    unwanted = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    env = {k: v for k, v in os.environ.items() if k not in unwanted and not k.startswith(("DEQCORE_", "PIP_"))}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**env, "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, f"{command} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    """Wheels by distribution, built from a copy: setuptools leaves build/ and egg-info beside what it builds."""
    folder = tmp_path_factory.mktemp("wheels")
    source = folder / "source"
    ignore = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info")
    shutil.copytree(ROOT, source, ignore=ignore, symlinks=True)
    places = [source, *(source / "plugins" / name for name in PLUGINS)]
    run(
        *(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder),
        *places,
        cwd=folder,
    )
    found = {path.name.split("-")[0].replace("_", "-"): path for path in folder.glob("*.whl")}
    assert set(found) == {"deqcore", *PLUGINS}
    return found


def entry_points_in(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/entry_points.txt"))
        parser = configparser.ConfigParser(delimiters=("=",))
        parser.optionxform = str  # type: ignore[assignment]
        parser.read_string(archive.read(name).decode())
    return {section: dict(parser[section]) for section in parser.sections()}


# ---- what is in the wheels


def test_our_wheel_has_the_entry_points_of_pyproject(wheels):
    expected = dict(PYPROJECT["project"]["entry-points"])
    expected["console_scripts"] = PYPROJECT["project"]["scripts"]
    assert entry_points_in(wheels["deqcore"]) == expected


def test_our_wheel_has_our_packages_and_nothing_else(wheels):
    with zipfile.ZipFile(wheels["deqcore"]) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
        licenses = [name for name in archive.namelist() if name.endswith("LICENSE")]
    packages = [ROOT / "deqcore", *sorted((ROOT / "plugins").glob("deqcore_*"))]
    packages = [folder for folder in packages if list(folder.glob("*.py"))]
    assert len(packages) >= 7
    assert {name.split("/")[0] for name in names} == {folder.name for folder in packages}
    for folder in packages:
        assert f"{folder.name}/py.typed" in names
        for file in folder.rglob("*.py"):
            assert file.relative_to(folder.parent).as_posix() in names
    for name in names:
        assert not {"tests", "docs", "benchmarks", "examples", "src"} & set(name.split("/")), name
        assert name.endswith((".py", "py.typed")) or not name.endswith((".pyc", ".toml", ".md")), name
    assert licenses


def test_our_wheel_asks_for_what_pyproject_asks_for(wheels):
    from email.parser import Parser

    with zipfile.ZipFile(wheels["deqcore"]) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode())
    base = [text for text in metadata.get_all("Requires-Dist", []) if "extra ==" not in text]
    assert sorted(base) == sorted(PYPROJECT["project"]["dependencies"])
    assert set(metadata.get_all("Provides-Extra", [])) == set(PYPROJECT["project"]["optional-dependencies"])
    assert metadata["Requires-Python"] == PYPROJECT["project"]["requires-python"]


@pytest.mark.parametrize("name", PLUGINS)
def test_a_plugins_wheel_is_one_package_and_its_entry_points(wheels, name):
    with zipfile.ZipFile(wheels[name]) as archive:
        names = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" not in name}
    module = name.replace("-", "_")
    assert names == {module}
    groups = entry_points_in(wheels[name])
    assert (
        set(groups)
        == {
            "deqcore-example-solver": {"deqcore.solvers"},
            "deqcore-example-gradient": {"deqcore.gradients"},
            "deqcore-reversible": {"deqcore.solvers", "deqcore.gradients", "deqcore.cores"},
        }[name]
    )
    values = [value for points in groups.values() for value in points.values()]
    assert all(value.partition(".")[0] == module for value in values) and len(set(values)) == len(groups)


# ---- installed


@pytest.fixture(scope="module")
def venv(wheels, tmp_path_factory):
    """(python, folder) of a fresh environment with all wheels; all else comes from this one's site-packages.

    That folder is on its path by a .pth file: after its own packages, and without running the .pth files in it, so
    a deqcore that is installed there, editable or not, is not what gets imported.
    """
    folder = tmp_path_factory.mktemp("fresh")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    bin_ = folder / "venv" / ("Scripts" if os.name == "nt" else "bin")
    python = bin_ / Path(sys.executable).name
    (purelib,) = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).split("\n")[:1]
    shared = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), str(Path(torch.__file__).parents[1])}
    Path(purelib, "shared.pth").write_text("\n".join(sorted(shared)) + "\n")
    pip(python, "install", "--no-deps", *wheels.values(), cwd=folder)
    return python, folder


def pip(python, *arguments, cwd):
    return run(sys.executable, "-m", "pip", "--python", python, *arguments, "--quiet", cwd=cwd)


SOLVE = """
import json, os, sys
import torch
import deqcore

inside = [os.path.realpath(sys.prefix)]
for module in (deqcore, __import__("deqcore_solvers"), __import__("deqcore_cores")):
    assert os.path.commonpath([os.path.realpath(module.__file__), *inside]) == inside[0], module.__file__

torch.manual_seed(0)
eye = torch.eye(5, dtype=torch.float64)
a = torch.randn(5, 5, dtype=torch.float64)
a = (a + a.mT) / 2
a = (0.6 * a / torch.linalg.matrix_norm(a, 2)).requires_grad_()
x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
weight = torch.randn(3, 5, dtype=torch.float64)

deq = deqcore.get_deq(
    solver={"name": "example_secant", "tol": 1e-12, "max_iter": 200, "start": 0.7},
    gradient={"name": "example_neumann", "terms": 80},
    on_failure="raise",
)
(z,), info = deq(lambda z: z @ a + x, torch.zeros(3, 5, dtype=torch.float64))
found = torch.autograd.grad((weight * z).sum(), (x, a))
exact = torch.linalg.solve((eye - a).mT, x.mT).mT
expected = torch.autograd.grad((weight * exact).sum(), (x, a))
torch.testing.assert_close(z, exact, atol=1e-10, rtol=0)
for one, other in zip(found, expected):
    torch.testing.assert_close(one, other, atol=1e-9, rtol=0)
print(json.dumps([type(deq.solver).__module__, type(deq.gradients[-1]).__module__]))
"""

GONE = """
import deqcore
try:
    deqcore.get_deq(solver="example_secant")
except deqcore.UnknownPluginError as error:
    print(error)
deqcore.get_deq(gradient="example_neumann")
"""


def test_plugins_that_are_not_ours(venv):
    """Solve, differentiate, list, and uninstall: one test, as each step needs the one before."""
    python, folder = venv
    assert json.loads(run(python, "-c", SOLVE, cwd=folder)) == ["deqcore_example_solver", "deqcore_example_gradient"]

    listed = json.loads(run(python.parent / "deqcore", "plugins", "list", "--json", cwd=folder))
    rows = {(row["kind"], row["name"]): row for row in listed["plugins"]}
    for kind, name, origin, version in (
        ("solvers", "example_secant", "deqcore-example-solver", "0.1.0"),
        ("gradients", "example_neumann", "deqcore-example-gradient", "0.2.0"),
        ("solvers", "anderson", "deqcore", PYPROJECT["project"]["version"]),
    ):
        row = rows[kind, name]
        assert (row["origin"], row["version"], row["status"]) == (origin, version, "ok")

    pip(python, "uninstall", "--yes", PLUGINS[0], cwd=folder)
    text = run(python, "-c", GONE, cwd=folder)
    assert "no solver named 'example_secant'" in text and "Installed: aitken, anderson" in text


def test_the_plugins_own_tests_pass_where_they_are_installed(wheels, venv):
    python, folder = venv
    pip(python, "install", "--no-deps", "--force-reinstall", *(wheels[name] for name in PLUGINS), cwd=folder)
    for name in PLUGINS:
        shutil.copytree(ROOT / "plugins" / name / "tests", folder / name)
    out = run(python, "-W", "error", "-m", "pytest", "-q", "-p", "no:cacheprovider", *PLUGINS, cwd=folder)
    assert " passed" in out and "skipped" not in out and "failed" not in out
