"""Normalised modules as state: loading, copies, pickles, optimizers, moves, and the norm taken off again."""

from __future__ import annotations

import copy
import io
import itertools
import pickle

import pytest
import torch
import torchdeq
from hypothesis import given, settings
from hypothesis import strategies as st
from norms_support import LAYERS, NORMS, Recurrent, all_layers, block, originals, parametrized
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import deqcore
from deqcore import NormError, apply_norm, get_deq, register_norm_module, remove_norm, reset_norm


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


# ---- state, copies


@pytest.mark.parametrize("name", NORMS)
def test_load_state_dict_is_seen_at_once(name):
    source, ours = apply_norm(block(), name).eval(), apply_norm(block(), name).eval()
    x = torch.randn(2, 5)
    deq = get_deq(f_max_iter=100, f_tol=1e-12).eval()
    deq(lambda z: 0.3 * ours(z), torch.zeros(2, 5))
    ours.load_state_dict(source.state_dict())
    torch.testing.assert_close(ours(x), source(x), rtol=0, atol=0)
    (a,), _ = deq(lambda z: 0.3 * torch.tanh(ours(z)) + x, torch.zeros(2, 5))
    (b,), _ = deq(lambda z: 0.3 * torch.tanh(source(z)) + x, torch.zeros(2, 5))
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_torchdeq_is_stale_there():
    source, theirs = block(), block()
    torchdeq.norm.apply_norm(source)
    torchdeq.norm.apply_norm(theirs)
    theirs.load_state_dict(source.state_dict())
    x = torch.randn(2, 5)
    assert (theirs(x) - source(x)).abs().max() > 1e-3


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "pickle2": lambda m: pickle.loads(pickle.dumps(m, protocol=2)),
    "save": lambda m: load(save(m)),
}


def save(model):
    file = io.BytesIO()
    torch.save(model, file)
    return file


def load(file):
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("how", COPIES)
def test_copies_are_equal_and_independent(name, how):
    model = apply_norm(block(), name).eval()
    twin = COPIES[how](model)
    x = torch.randn(3, 5)
    torch.testing.assert_close(twin(x), model(x), rtol=0, atol=0)
    assert list(twin.state_dict()) == list(model.state_dict())
    assert [p.requires_grad for p in twin.parameters()] == [p.requires_grad for p in model.parameters()]
    assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in model.parameters()}
    before = model(x).detach()
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    twin(x).square().sum().backward()
    optimizer.step()
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)
    assert (twin(x) - before).abs().max() > 1e-3
    assert all(p.grad is None for p in model.parameters())
    remove_norm(twin)  # torch's own deepcopy would take the original's weight away with it
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)
    third = COPIES[how](COPIES[how](model))
    torch.testing.assert_close(third(x), before, rtol=0, atol=0)


def test_a_shallow_copy_shares_parameters():
    layer = apply_norm(nn.Linear(3, 3))
    twin = copy.copy(layer)
    assert twin is not layer and originals(twin)[0] is originals(layer)[0]
    torch.testing.assert_close(twin.weight, layer.weight)


def test_a_pickle_of_a_module_that_refers_to_itself(own_targets):
    register_norm_module(Recurrent, "weight_norm", ["kernel", "recurrent"], [1, 0])
    module = apply_norm(Recurrent())
    for copied in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        assert copied.__dict__["parent"][0] is copied
        torch.testing.assert_close(copied.kernel, module.kernel, rtol=0, atol=0)
        torch.testing.assert_close(copied.recurrent, module.recurrent, rtol=0, atol=0)
        assert isinstance(copied, Recurrent) and type(remove_norm(copied)) is Recurrent


@pytest.mark.parametrize("name", NORMS)
def test_optimizer_steps_change_the_weight(name):
    layer = apply_norm(nn.Linear(4, 4), name)
    deq = get_deq(ift=True, f_max_iter=60)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    x, target = torch.randn(8, 4), 0.1 * torch.randn(8, 4)
    seen, losses = [], []
    for _ in range(15):
        seen.append(layer.weight.detach().clone())
        (z,), _ = deq(lambda z: 0.5 * torch.tanh(layer(z) + x), torch.zeros(8, 4))
        loss = (z - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    assert all((a - b).abs().max() > 1e-4 for a, b in itertools.pairwise(seen))


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("options", [{}, {"learn_scale": False}])
def test_frozen_layers_stay_frozen(name, options):
    layer = nn.Linear(3, 3)
    layer.weight.requires_grad_(False)
    apply_norm(layer, name, **options)
    assert not layer.weight.requires_grad
    assert {n: p.requires_grad for n, p in layer.named_parameters()} == {
        n: n == "bias" for n, _ in layer.named_parameters()
    }
    remove_norm(layer)
    assert isinstance(layer.weight, nn.Parameter) and not layer.weight.requires_grad
    assert [n for n, _ in layer.named_parameters()] == ["bias", "weight"] and not list(layer.buffers())


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_moves_between_dtypes(name, dtype):
    layer = apply_norm(nn.Linear(4, 4), name).eval()
    exact = layer.weight.detach()
    layer.to(dtype)
    assert layer.weight.dtype == dtype
    assert {t.dtype for t in layer.state_dict().values()} == {dtype}
    torch.testing.assert_close(
        layer.weight.double(), exact, rtol=20 * torch.finfo(dtype).eps, atol=1e-2 if dtype.itemsize == 2 else 1e-6
    )
    layer.double()
    deq = get_deq(f_max_iter=5, on_failure="ignore")
    (z,), _ = deq(lambda z: 0.5 * layer(z), torch.ones(1, 4))
    assert z.dtype == torch.float64


@pytest.mark.parametrize("name", NORMS)
def test_a_model_without_data(name):
    with torch.device("meta"):
        layer = apply_norm(nn.Linear(4, 4), name)
    assert layer.weight.is_meta
    source = apply_norm(nn.Linear(4, 4), name).eval()
    filled = layer.to_empty(device="cpu").eval()
    filled.load_state_dict(source.state_dict())
    torch.testing.assert_close(filled.weight, source.weight, rtol=0, atol=0)


def test_assigning_a_weight():
    value = torch.randn(3, 3)
    layer = apply_norm(nn.Linear(3, 3))
    layer.weight = value.clone()
    torch.testing.assert_close(layer.weight, value)
    layer = apply_norm(nn.Linear(3, 3), "spectral_norm", learn_scale=False, target_norm=0.5, n_power_iterations=300)
    layer.weight = value.clone()
    expected = 0.5 * value / torch.linalg.matrix_norm(value, 2)
    torch.testing.assert_close(layer.weight, expected)
    layer.eval()
    layer.weight = 3 * value.T  # its singular vectors are found at once
    torch.testing.assert_close(layer.weight, expected.T, rtol=1e-2, atol=1e-3)


def test_a_state_dict_is_that_of_torchs_weight_norm():
    layer = nn.Conv2d(2, 3, 3)
    theirs = parametrizations.weight_norm(copy.deepcopy(layer), dim=0)
    apply_norm(layer)
    layer.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(layer.weight, theirs.weight)


# ---- off again


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("options", [{}, {"learn_scale": False, "target_norm": 0.3}, {"clip": True, "clip_value": 0.5}])
def test_remove_leaves_an_equal_plain_parameter(name, options):
    model = apply_norm(all_layers(), name, **options)
    assert model.training
    before = {layer: model[layer].weight.detach().clone() for layer in LAYERS}
    with torch.no_grad():  # no reason to leave buffers behind
        assert remove_norm(model) is model
    fresh = all_layers()
    assert {n: tuple(p.shape) for n, p in model.named_parameters()} == {
        n: tuple(p.shape) for n, p in fresh.named_parameters()
    }
    assert not list(model.buffers())
    for layer in LAYERS:
        assert type(model[layer]) is type(fresh[layer])
        assert type(model[layer].weight) is nn.Parameter
        assert model[layer].weight.requires_grad and model[layer].weight.is_leaf
        torch.testing.assert_close(model[layer].weight.detach(), before[layer], rtol=0, atol=0)
    remove_norm(model)
    apply_norm(model, name)  # and on again


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(NORMS),
    st.integers(1, 5),
    st.integers(1, 5),
    st.booleans(),
    st.floats(0.05, 20.0),
    st.sampled_from([nn.Linear, nn.Conv1d, nn.ConvTranspose1d]),
    st.integers(0, 1000),
)
def test_on_copy_off(name, inputs, outputs, learn_scale, target, cls, seed):
    torch.manual_seed(seed)
    layer = cls(inputs, outputs) if cls is nn.Linear else cls(inputs, outputs, 2)
    plain = layer.weight.detach().clone()
    apply_norm(layer, {"name": name, "learn_scale": learn_scale, **({} if learn_scale else {"target_norm": target})})
    layer.eval()
    normed = layer.weight.detach().clone()
    channel = 1 if cls is nn.ConvTranspose1d else 0
    directions = plain.movedim(channel, 0).flatten(1)
    if name == "weight_norm":
        expected = directions if learn_scale else target * nn.functional.normalize(directions, dim=1)
        torch.testing.assert_close(normed.movedim(channel, 0).flatten(1), expected)
    else:  # the same up to a factor
        ratio = normed / plain
        torch.testing.assert_close(ratio, torch.full_like(ratio, float(ratio.flatten()[0])))
    twin = pickle.loads(pickle.dumps(layer))
    for one in (layer, twin):
        remove_norm(one)
        torch.testing.assert_close(one.weight.detach(), normed, rtol=0, atol=0)


def test_reset_norm_keeps_working():
    model = apply_norm(block(), "spectral_norm")
    before = copy.deepcopy(model.state_dict())
    reset_norm(model)
    deqcore.reset_deq(model)
    reset_norm(nn.Linear(2, 2))
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)


def test_a_parametrization_on_top_is_not_torn_off():
    layer = apply_norm(nn.Linear(3, 3), learn_scale=False)
    parametrize.register_parametrization(layer, "weight", nn.Identity())
    with pytest.raises(NormError, match=r"^weight has another parametrization on top"):
        remove_norm(layer)
    other = parametrizations.orthogonal(nn.Linear(3, 3))
    remove_norm(other)  # none of ours
    assert parametrized(other)
