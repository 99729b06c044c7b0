"""Other people's modules and norms: registered, chosen by name, and refused where they are broken."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from norms_support import (
    NORMS,
    Recurrent,
    parametrized,
    parse,
)
from torch import nn

import deqcore
from deqcore import NormError, apply_norm, get_deq, register_norm, register_norm_module, remove_norm


@pytest.fixture(autouse=True)
def _double():
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(dtype)


@pytest.fixture
def own_targets(monkeypatch):
    """Registrations of module classes, undone afterwards."""
    for name in NORMS:
        norm = deqcore.registry.get("norms", name)
        monkeypatch.setattr(norm, "targets", dict(norm.targets))


# ---- other people's modules and norms


@pytest.mark.parametrize("name", NORMS)
def test_a_custom_module_with_two_weights(own_targets, name):
    register_norm_module(Recurrent, name, ["kernel", "recurrent"], [1, 0])
    module = Recurrent()
    kernel, recurrent = module.kernel.detach().clone(), module.recurrent.detach().clone()
    apply_norm(
        module, name, learn_scale=False, target_norm=0.5, **({"n_power_iterations": 500} if "spec" in name else {})
    )
    if name == "weight_norm":
        kernel, recurrent = kernel / kernel.norm(dim=0, keepdim=True), recurrent / recurrent.norm(dim=1, keepdim=True)
    else:
        kernel, recurrent = (w / torch.linalg.matrix_norm(w, 2) for w in (kernel, recurrent))
    torch.testing.assert_close(module.kernel, 0.5 * kernel)
    torch.testing.assert_close(module.recurrent, 0.5 * recurrent)
    assert parametrized(module.inner)  # a Linear inside it is a layer of its own
    other = "spectral_norm" if name == "weight_norm" else "weight_norm"
    assert Recurrent not in deqcore.registry.get("norms", other).targets
    remove_norm(module)
    assert type(module) is Recurrent
    torch.testing.assert_close(module.kernel.detach(), 0.5 * kernel)


@pytest.mark.parametrize("name", NORMS)
def test_a_tensor_as_one_channel_and_a_vector(own_targets, name):
    register_norm_module(Recurrent, name, ("kernel",), (None,))
    module = apply_norm(Recurrent(), name, learn_scale=False, filter_out="inner")
    torch.testing.assert_close(module.kernel.norm(), torch.tensor(1.0))
    layer = apply_norm(nn.Linear(4, 4), name, names="bias", learn_scale=False)
    bias = layer.bias.abs() if name == "weight_norm" else layer.bias.norm().reshape(1)
    torch.testing.assert_close(bias, torch.ones_like(bias))
    assert not parametrized(layer)


class HalfSettings(deqcore.NormSettings):
    factor: float = 0.5


class Half(deqcore.Norm[HalfSettings]):
    """A third party's norm."""

    targets = {nn.Linear: (("weight", 0),)}  # noqa: RUF012

    def parametrization(self, weight, dim):
        return Times(self.settings.factor)


class Times(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor
        self.calls = 0

    def forward(self, weight):
        self.calls += 1
        return self.factor * weight


def test_a_third_partys_norm():
    before = deqcore.registry.names("norms")
    with deqcore.registry.scope():
        assert register_norm("half", Half) is Half
        layer = nn.Linear(3, 3)
        plain = layer.weight.detach().clone()
        apply_norm(layer, "half")
        torch.testing.assert_close(layer.weight, 0.5 * plain)
        torch.testing.assert_close(copy.deepcopy(layer).weight, 0.5 * plain)
        torch.testing.assert_close(pickle.loads(pickle.dumps(layer)).weight, 0.5 * plain)
        layer = apply_norm(remove_norm(layer), {"name": "half", "factor": 3.0})
        torch.testing.assert_close(layer.weight, 1.5 * plain)
        # a Namespace has flags that this norm knows nothing of
        apply_norm(nn.Linear(2, 2), args=parse("--norm_type", "half"))
        with pytest.raises(deqcore.UnknownKeyError, match=r"'half'.*clip"):
            apply_norm(nn.Linear(2, 2), args=parse("--norm_type", "half", "--norm_clip"))
        register_norm_module(nn.Bilinear, "half")
        assert parametrized(apply_norm(nn.Bilinear(2, 2, 2), "half"))
        with pytest.raises(deqcore.PluginClashError):
            register_norm("weight_norm", Half)
        assert get_deq(norm="half").apply_norm(nn.Linear(2, 2)).weight is not None
    assert deqcore.registry.names("norms") == before
    with pytest.raises(deqcore.UnknownPluginError):
        apply_norm(nn.Linear(2, 2), "half")
    Half.targets = {nn.Linear: (("weight", 0),)}


@pytest.mark.parametrize(
    ("made", "text"),
    [
        (lambda w: nn.Flatten(0), "shape"),
        (lambda w: 3, "must return a torch.nn.Module, got int"),
    ],
)
def test_a_third_partys_broken_norm_leaves_the_model_as_it_was(made, text):
    class Broken(Half):
        def parametrization(self, weight, dim):
            return made(weight) if weight.shape[0] == 5 else Times(0.5)

    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 5))
    first = model[0].weight.detach().clone()
    with deqcore.registry.scope():
        register_norm("broken", Broken)
        with pytest.raises(NormError, match=f"'broken'.*{text}"):
            apply_norm(model, "broken")
    assert type(model[0]) is nn.Linear and type(model[1]) is nn.Linear
    torch.testing.assert_close(model[0].weight.detach(), first)
