"""The examples in README, CONTRIBUTING and docs run, in order, one namespace a file."""

import re
import types
import warnings
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path) -> list[str]:
    found = re.findall(r"^( *)```python\n(.*?)^ *```", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    return [re.sub(rf"^{indent}", "", text, flags=re.M) for indent, text in found]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_run(page: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    import sys

    monkeypatch.setitem(sys.modules, "torchdeq", sys.modules.get("torchdeq"))
    torch.manual_seed(0)
    if "torch._dynamo" in sys.modules:  # what other tests had compiled
        torch._dynamo.reset()
    module = types.ModuleType("example")
    monkeypatch.setitem(sys.modules, "example", module)  # torch.compile looks a function's module up by name
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*torch.jit.script.*")  # torch's own, at the first jvp
        for text in blocks(page):
            exec(compile(text, str(page), "exec"), module.__dict__)


def test_pages_have_examples():
    assert blocks(PAGES[0]) and blocks(PAGES[1])


def test_readme_names_every_builtin():
    from deqcore import registry

    readme = PAGES[0].read_text(encoding="utf-8")
    for kind in ("solvers", "linear_solvers", "gradients", "cores", "norms", "regularizers"):
        for entry in registry.entries(kind):
            if entry.builtin:
                assert f"`{entry.name}`" in readme, f"README's table lacks the {kind} {entry.name}"


def test_plugin_example_in_the_readme_is_a_plugin():
    from deqcore import get_deq, registry

    text = next(text for text in blocks(PAGES[0]) if "Halfway" in text)
    module = types.ModuleType("halfway")
    exec(text, module.__dict__)
    with registry.scope():
        registry.register("solver", "halfway", module.deqcore_solver())
        z_out, info = get_deq(solver="halfway")(lambda z: 0.5 * z + 1, torch.zeros(2, 3))
    assert info.converged.all()
    torch.testing.assert_close(z_out[-1], torch.full((2, 3), 2.0), atol=5e-3, rtol=0)


def test_example_learns():
    import runpy

    example = runpy.run_path(str(ROOT / "examples" / "mlp.py"))
    assert example["main"](steps=120) > 0.85
