"""Shared fixtures."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent))  # importlib mode leaves helper modules beside the tests unimportable

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    """Settings of the developer's shell must not reach the tests."""
    for variable in [name for name in os.environ if name.startswith("DEQCORE_")]:
        monkeypatch.delenv(variable)


@pytest.fixture
def fresh_dynamo(monkeypatch):
    """torch.compile without what other tests had compiled, and without pytest keeping all its graphs."""
    import torch._dynamo

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="torch")  # its own affairs
        yield


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder on sys.path to install distributions into (plugins_support.Site); undone afterwards."""
    from plugins_support import Site

    from deqcore import registry

    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    with registry.scope():
        yield Site(folder)
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or "").startswith(str(folder)):
            del sys.modules[name]
