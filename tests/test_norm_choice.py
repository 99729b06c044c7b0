"""Which norm goes on which layers: filters, shared weights, every way to name a norm, bad input."""

from __future__ import annotations

import argparse
import copy
import pickle

import pytest
import torch
import torchdeq
from norms_support import (
    LAYERS,
    NORMS,
    all_layers,
    block,
    count_computations,
    originals,
    parametrized,
    parse,
    scaling,
)
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


# ---- which layers


@pytest.mark.parametrize(
    "filters",
    [
        {},
        {"filter_out": "conv"},
        {"filter_out": ["conv", "1"]},
        {"prefix_filter_out": "up"},
        {"prefix_filter_out": ["lin", "conv2"]},
        {"prefix_filter_out": ("up",), "filter_out": ("2",)},
        {"prefix_filter_out": "onv"},
    ],
)
def test_filters_mean_what_they_mean_in_torchdeq(filters):
    ours = nn.Sequential()
    ours.body = all_layers()
    ours.up = nn.Linear(2, 2)
    theirs = copy.deepcopy(ours)
    apply_norm(ours, **filters)
    torchdeq.norm.apply_norm(theirs, **{k: list(v) if isinstance(v, tuple) else v for k, v in filters.items()})
    normed = {name for name, module in ours.named_modules() if parametrized(module)}
    assert normed == {name for name, module in theirs.named_modules() if hasattr(module, "_deq_norm")}
    assert normed


def test_a_generator_is_a_list_of_filters():
    model = apply_norm(all_layers(), filter_out=(name for name in ("conv", "up")))
    assert [name for name in LAYERS if parametrized(model[name])] == ["linear"]


def test_the_class_must_be_exactly_a_target():
    class Special(nn.Linear):
        pass

    model = apply_norm(nn.Sequential(nn.Linear(2, 2), Special(2, 2)))
    assert parametrized(model[0]) and not parametrized(model[1])


def test_layers_inside_a_parametrization_are_no_layers_of_the_model():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = nn.Linear(3, 3)

        def forward(self, weight):
            return self.mix(weight)

    model = nn.ModuleList([nn.Linear(2, 2), nn.LayerNorm(3)])
    parametrize.register_parametrization(model[1], "weight", Mixed())
    apply_norm(model)
    assert parametrized(model[0]) and not parametrized(scaling(model[1]).mix)


def test_nothing_to_normalise_is_an_error_that_says_what_would_be():
    with pytest.raises(NormError, match=r"found nothing to normalise in Sequential.*Conv1d.*Linear.*norm_type='none'"):
        apply_norm(nn.Sequential(nn.LayerNorm(3)))
    with pytest.raises(NormError, match=r"Filtered out: '0', '2'"):
        apply_norm(block(), filter_out=["0", "2"])


@pytest.mark.parametrize("name", NORMS)
def test_the_same_norm_twice_changes_nothing(name):
    model = apply_norm(block(), name, clip=True)
    before = dict(model.named_parameters())
    assert apply_norm(model, name, clip=True) is model
    after = dict(model.named_parameters())
    assert before.keys() == after.keys() and all(before[k] is after[k] for k in before)
    assert len(model[0].parametrizations.weight) == 1
    theirs = block()
    torchdeq.norm.apply_norm(theirs, name)
    with pytest.raises((KeyError, AttributeError)):
        torchdeq.norm.apply_norm(theirs, name)


def test_the_same_norm_reaches_layers_that_were_filtered_out_before():
    model = apply_norm(block(), filter_out="2")
    first = originals(model[0])
    apply_norm(model)
    assert originals(model[0])[0] is first[0] and parametrized(model[2])


@pytest.mark.parametrize("second", [{"norm_type": "spectral_norm"}, {"norm_type": "weight_norm", "clip": True}])
def test_another_norm_on_top_is_refused(second):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    apply_norm(model, filter_out="0")
    with pytest.raises(NormError, match=r"^1\.weight already has the norm .*remove_norm"):
        apply_norm(model, **second)
    assert not parametrized(model[0])
    apply_norm(remove_norm(model), **second)


def test_a_foreign_parametrization_is_refused():
    model = parametrizations.orthogonal(nn.Linear(3, 3))
    with pytest.raises(NormError, match=r"_Orthogonal.*no norm of deqcore.*remove_parametrizations"):
        apply_norm(model)
    theirs = nn.Sequential(nn.Linear(3, 3))
    torchdeq.norm.apply_norm(theirs)
    with pytest.raises(NormError, match=r"0\.weight is no parameter \(Tensor\)"):
        apply_norm(theirs)


# ---- shared weights


class Tied(nn.Module):
    def __init__(self, other):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = other
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("learn_scale", [True, False])
def test_a_weight_that_two_layers_share_stays_shared(monkeypatch, name, learn_scale):
    calls = count_computations(monkeypatch, name)
    model = Tied(nn.Linear(4, 4))
    apply_norm(model, name, learn_scale=learn_scale)
    parameters = dict(model.named_parameters())
    assert len(parameters) == 2 + 1 + int(learn_scale)
    model.eval()
    torch.testing.assert_close(model.first.weight, model.second.weight, rtol=0, atol=0)
    calls.clear()
    with deqcore.SolveScope():
        model(torch.ones(1, 4))
    assert len(calls) == 1
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert originals(twin.first)[0] is originals(twin.second)[0]
    apply_norm(model, name, learn_scale=learn_scale)
    with torch.no_grad():
        for p in originals(model.second):
            p.mul_(1.5)
    torch.testing.assert_close(model.first.weight, model.second.weight, rtol=0, atol=0)
    before = model.first.weight.detach().clone()
    remove_norm(model)
    assert model.first.weight is model.second.weight
    torch.testing.assert_close(model.second.weight.detach(), before, rtol=0, atol=0)


def test_a_weight_shared_with_a_layer_that_is_not_normalised_is_refused():
    model = Tied(nn.Embedding(4, 4))
    with pytest.raises(NormError, match=r"^first\.weight shares its tensor with second\.weight"):
        apply_norm(model)
    with pytest.raises(NormError, match=r"^first\.weight shares its tensor with second\.weight.*[Ff]ilter"):
        apply_norm(Tied(nn.Linear(4, 4)), filter_out="second")
    layer = nn.Linear(4, 4)
    model = nn.ModuleList([layer, layer])  # one module twice is one layer
    apply_norm(model)
    assert parametrized(layer)


def test_a_weight_shared_along_different_dimensions_is_refused():
    model = Tied(nn.ConvTranspose1d(4, 4, 1))
    model.first = nn.Conv1d(4, 4, 1)
    model.second.weight = model.first.weight
    with pytest.raises(NormError, match=r"shares its tensor with a layer of another kind"):
        apply_norm(model)


# ---- naming norms and modules


@pytest.mark.parametrize(
    "named",
    [
        "spectral_norm",
        "deqcore/spectral_norm",
        {"name": "spectral_norm", "n_power_iterations": 3},
        lambda: deqcore.registry.settings("norms", {"name": "spectral_norm", "target_norm": 0.4}),
    ],
)
def test_ways_to_name_a_norm(named):
    named = named() if callable(named) else named
    layer = apply_norm(nn.Linear(3, 3), named)
    assert type(scaling(layer)).__name__ == "SpectralScaling"
    if isinstance(named, dict):
        assert scaling(layer).settings.n_power_iterations == 3
    elif not isinstance(named, str):
        assert scaling(layer).settings.target_norm == 0.4


def test_keywords_win_over_settings():
    chosen = deqcore.registry.settings("norms", {"name": "weight_norm", "clip": True, "clip_value": 0.5})
    layer = apply_norm(nn.Linear(3, 3), chosen, clip_value=0.25, learn_scale=False)
    found = scaling(layer).settings
    assert (found.clip, found.clip_value, found.learn_scale) == (True, 0.25, False)


def test_none_leaves_the_model_alone():
    model = block()
    assert apply_norm(model, "none") is model
    assert apply_norm(model, args={"norm_type": "none"}) is model
    assert apply_norm(model, "spectral_norm", args=argparse.Namespace(norm_type="none")) is model
    assert apply_norm(model, args=deqcore.DEQConfig.load(norm_type="none")) is model
    assert not any(map(parametrized, model))


@pytest.mark.parametrize("said", [{"norm_type": "none"}, {"norm": "none"}, {"norm": None}])
def test_a_configuration_without_norm(said):
    layer = nn.Linear(3, 3)
    assert get_deq(**said).apply_norm(layer) is layer
    assert not parametrized(layer)


def test_a_norm_of_the_configuration():
    deq = get_deq(norm={"name": "spectral_norm", "target_norm": 0.6})
    layer = nn.Linear(3, 3)
    assert deq.apply_norm(layer) is layer
    assert scaling(layer).settings.target_norm == 0.6
    layer = get_deq().apply_norm(nn.Linear(3, 3))
    assert type(scaling(layer)).__name__ == "ChannelScaling"


class Plain:
    def __init__(self, **values):
        self.__dict__.update(values)


def as_file(tmp_path, text):
    path = tmp_path / "deq.toml"
    path.write_text(text)
    return path


WANTED = {"name": "spectral_norm", "learn_scale": False, "target_norm": 0.5, "n_power_iterations": 4}
FLAT = {"norm_type": "spectral_norm", "norm_no_scale": True, "norm_target_norm": 0.5, "sn_n_power_iters": 4}
FLAGS = "--norm_type spectral_norm --norm_no_scale --norm_target_norm 0.5 --sn_n_power_iters 4"
DOTTED = "--norm.name spectral_norm --norm.learn_scale false --norm_target_norm 0.5 --norm.n_power_iterations 4"
TOML = '[norm]\nname = "spectral_norm"\nlearn_scale = false\ntarget_norm = 0.5\nn_power_iterations = 4'


@pytest.mark.parametrize(
    "args",
    [
        lambda path: parse(*FLAGS.split()),
        lambda path: parse(*DOTTED.split()),
        lambda path: {**vars(parse(*FLAGS.split())), "lr": 0.1},
        lambda path: dict(FLAT),
        lambda path: {"norm": dict(WANTED)},
        lambda path: Plain(**FLAT, lr=0.1),
        lambda path: Plain(norm=dict(WANTED)),
        lambda path: deqcore.DEQConfig.load(norm=WANTED),
        lambda path: as_file(path, TOML),
    ],
)
def test_every_kind_of_configuration(args, tmp_path):
    args = args(tmp_path)
    before = copy.deepcopy(args)
    layer = apply_norm(nn.Linear(3, 3), args=args)
    assert scaling(layer).settings.model_dump(include=set(WANTED)) == WANTED
    assert getattr(args, "__dict__", args) == getattr(before, "__dict__", before)


def test_a_namespace_wins_over_keywords_as_in_torchdeq():
    args = parse()
    before = copy.deepcopy(vars(args))
    layer = apply_norm(nn.Linear(3, 3), "spectral_norm", args=args, learn_scale=False)
    found = scaling(layer).settings
    assert (found.name, found.learn_scale) == ("weight_norm", True)
    assert vars(args) == before
    theirs = nn.Linear(3, 3)
    torchdeq.norm.apply_norm(theirs, "spectral_norm", args=copy.deepcopy(args), learn_scale=False)
    assert hasattr(theirs, "weight_v") and hasattr(theirs, "weight_g") and not hasattr(theirs, "weight_u")
    layer = apply_norm(
        nn.Linear(3, 3), "spectral_norm", args=argparse.Namespace(norm_clip=True, lr=1.0), target_norm=0.5
    )
    found = scaling(layer).settings  # what it doesn't say is left to the call
    assert (found.name, found.clip, found.target_norm) == ("spectral_norm", True, 0.5)


def test_settings_of_another_norm_than_the_one_chosen_do_not_bother_it():
    layer = apply_norm(nn.Linear(3, 3), args={"norm_type": "weight_norm", "sn_n_power_iters": 4})
    assert type(scaling(layer)).__name__ == "ChannelScaling"
    spectral = {"name": "spectral_norm", "n_power_iterations": 3, "target_norm": 0.5}
    layer = apply_norm(nn.Linear(3, 3), spectral, args={"norm_type": "weight_norm", "norm_no_scale": True})
    assert type(scaling(layer)).__name__ == "ChannelScaling" and scaling(layer).settings.target_norm == 1.0


def test_a_programs_own_norm_attribute_is_left_alone():
    layer = apply_norm(nn.Linear(3, 3), args=argparse.Namespace(norm="batch", norm_type="spectral_norm"))
    assert type(scaling(layer)).__name__ == "SpectralScaling"


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda m: apply_norm(m, "weightnorm"),
            deqcore.UnknownPluginError,
            r"'weightnorm'.*Did you mean 'weight_norm'",
        ),
        (lambda m: apply_norm(m, args={"norm_type": "spektral_norm"}), deqcore.UnknownPluginError, "spectral_norm"),
        (lambda m: apply_norm(m, clipp=True), deqcore.UnknownKeyError, r"clipp.*Did you mean 'clip'"),
        (lambda m: apply_norm(m, n_power_iterations=2), deqcore.UnknownKeyError, r"weight_norm.*n_power_iterations"),
        (lambda m: apply_norm(m, args={"norm_clp": True}), deqcore.UnknownKeyError, r"norm_clp.*norm_clip"),
        (
            lambda m: apply_norm(m, learn_scale=False, target_norm=0.0),
            deqcore.ConfigError,
            r"target_norm.*greater than 0",
        ),
        (lambda m: apply_norm(m, clip=True, clip_value=-1), deqcore.ConfigError, r"clip_value.*greater than 0.*-1"),
        (lambda m: apply_norm(m, clip=True, clip_value=float("nan")), deqcore.ConfigError, "clip_value"),
        (lambda m: apply_norm(m, "spectral_norm", n_power_iterations=0), deqcore.ConfigError, "n_power_iterations"),
        (
            lambda m: apply_norm(m, "spectral_norm", n_power_iterations=1.5),
            deqcore.ConfigTypeError,
            "n_power_iterations",
        ),
        (lambda m: apply_norm(m, learn_scale="perhaps"), deqcore.ConfigTypeError, "learn_scale"),
        (lambda m: apply_norm(m, args={"norm_no_scale": "maybe"}), deqcore.ConfigTypeError, "norm_no_scale.*maybe"),
        (lambda m: apply_norm(m, 3), deqcore.ConfigTypeError, "a norm is given as"),
        (lambda m: apply_norm(m, None), deqcore.ConfigTypeError, "a norm is given as"),
        (lambda m: apply_norm(m, args=3), deqcore.ConfigTypeError, "args: a Namespace"),
        (lambda m: apply_norm(m, filter_out=[1]), deqcore.ConfigTypeError, "filters"),
        (lambda m: apply_norm(m, dims=1), deqcore.ConfigError, "says nothing without names"),
        (lambda m: apply_norm(m, names="weigth"), NormError, r"0\.weigth is no parameter"),
        (lambda m: apply_norm(m, names="bias", dims=1), NormError, r"0\.bias.*no dimension 1"),
        (lambda m: apply_norm(m, deqcore.NormSettings()), deqcore.ConfigError, "name"),
        (lambda m: apply_norm(m, deqcore.SolverSettings(name="anderson")), deqcore.ConfigTypeError, "norm"),
        (
            lambda m: apply_norm(m, args={"norm_clip_value": 0.5, "norm.clip_value": 0.6}),
            deqcore.ConfigError,
            r"clip_value.*0\.5.*0\.6",
        ),
        (lambda m: apply_norm([m]), deqcore.ConfigTypeError, "list"),
        (lambda m: remove_norm("m"), deqcore.ConfigTypeError, "str"),
        (lambda m: reset_norm(None), deqcore.ConfigTypeError, "NoneType"),
        (lambda m: register_norm_module(m, "weight_norm"), deqcore.ConfigTypeError, "class of modules"),
        (lambda m: register_norm_module(nn.Bilinear, "weightnorm"), deqcore.UnknownPluginError, "weight_norm"),
        (lambda m: register_norm_module(nn.Bilinear, "weight_norm", ["a", "b"], [0]), deqcore.ConfigError, "dims"),
        (lambda m: register_norm_module(nn.Bilinear, "weight_norm", "weight", "0"), deqcore.ConfigError, "dims"),
        (lambda m: register_norm_module(nn.Bilinear, "weight_norm", []), deqcore.ConfigTypeError, "names"),
    ],
)
def test_bad_input_is_refused_and_leaves_the_model_alone(call, error, text, own_targets):
    model = block()
    with pytest.raises(error, match=text):
        call(model)
    assert not any(map(parametrized, model)) and type(model[0]) is nn.Linear


@pytest.mark.parametrize("options", [{"clip_value": 0.5}, {"target_norm": 2.0}])
def test_a_setting_without_effect_is_a_warning(options):
    with pytest.warns(deqcore.DEQWarning, match="has no effect: it needs") as record:
        apply_norm(nn.Linear(2, 2), **options)
    assert record[0].filename == __file__


def test_integers_cannot_be_normalised(own_targets):
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.arange(4), requires_grad=False)

    register_norm_module(Counts, "weight_norm")
    with pytest.raises(NormError, match=r"torch\.int64"):
        apply_norm(Counts())
