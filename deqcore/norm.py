"""Weight normalisation under TorchDEQ's names (``torchdeq.norm``), on torch's own parametrizations."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.utils import parametrize

from .config import SECTIONS, DEQConfig
from .errors import ConfigError, ConfigTypeError, NormError, UnknownKeyError, suggest
from .functions import register_norm
from .interfaces import Norm
from .legacy import FLAT, GIVEN
from .parametrized import Spot, parametrizations_on, parametrized_tensors, put_on, take_off
from .registry import registry
from .settings import NormSettings, Settings

__all__ = ["apply_norm", "register_norm", "register_norm_module", "remove_norm", "reset_norm"]

#: Attribute of a parametrization that apply_norm put on: its settings and dimension.
MARK = "deq_norm"
#: The flat names of a norm's settings (``norm_clip``), with the setting each means.
NORM_FLAT = {name: flat for name, flat in FLAT.items() if flat.path[:1] == ("norm",)}

Targets = tuple[tuple[str, int | None], ...]


def apply_norm(
    model: nn.Module,
    norm_type: str | Mapping[str, Any] | NormSettings = "weight_norm",
    prefix_filter_out: str | Iterable[str] | None = None,
    filter_out: str | Iterable[str] | None = None,
    args: Any = None,
    *,
    names: str | Sequence[str] | None = None,
    dims: int | Sequence[int | None] | None = 0,
    **norm_kwargs: Any,
) -> nn.Module:
    """Normalise the weights of `model`'s layers, in place.

    A normalised weight is computed from parameters (see ``module.parametrizations``) once a solve, at its first use,
    and at every use outside of solves; it is never stale. Make the optimizer afterwards: some norms replace the weight
    by other parameters. A model that has the very same norm already stays as it is.

    Args:
        model: its modules whose exact class is among the norm's targets are normalised: for the built-in norms Linear,
            Conv1d to 3d and ConvTranspose1d to 3d. Add others with :func:`register_norm_module`.
        norm_type: name of an installed norm, a dict with a ``name`` and settings, or the norm's settings; "none" leaves
            the model alone. The default is TorchDEQ's.
        prefix_filter_out: skip modules whose name starts with this, or one of these.
        filter_out: skip modules whose name has this, or one of these, in it.
        args: a configuration: argparse.Namespace, dict, DEQConfig, path to a file, or any object with attributes; not
            changed. Its ``norm_type``, ``norm_no_scale``, ``norm_clip``, ``norm_clip_value``, ``norm_target_norm``,
            ``sn_n_power_iters`` and ``norm`` win over the keywords, as in TorchDEQ.
        names: tensors to normalise instead of those registered for the layers.
        dims: with `names`, the dimension of the output channels of each, or of all.
        norm_kwargs: settings of the norm: ``learn_scale``, ``target_norm``, ``clip``, ``clip_value``, and
            ``n_power_iterations`` for spectral_norm.

    Returns:
        `model`.

    Raises:
        NormError: nothing to normalise; a weight that can't be, that has another norm, or that a module shares which is
            not to be normalised. The model is then as it was.
        UnknownPluginError: no norm has that name.
        UnknownKeyError, ConfigError: a setting the norm doesn't have, or a wrong value (bounds must be positive).

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        >>> apply_norm(model, "spectral_norm", learn_scale=False, target_norm=0.9) is model
        True
    """
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigTypeError(f"apply_norm takes a torch.nn.Module, got {type(model).__name__}.")
    chosen = _choose(norm_type, args, norm_kwargs)
    if chosen is None:
        return model
    norm: Norm[Any] = registry.create("norms", chosen)
    if names is None and dims != 0:
        raise ConfigError(f"dims={dims!r} says nothing without names: give the tensors' names too.")
    only = None if names is None else _targets(names, dims)
    spots = _find(model, norm, only, _as_list(prefix_filter_out), _as_list(filter_out))
    groups = _group(model, norm, [spot for spot in spots if not _is_on(spot, norm)])
    made = [(group, _make(norm, group[0])) for group in groups]
    try:
        put_on(made)
    except (ValueError, RuntimeError) as error:
        raise NormError(f"norm {norm.settings.name!r} gives no valid parametrization: {error}") from error
    return model


def reset_norm(model: nn.Module) -> None:
    """Does nothing, for programs written for TorchDEQ: a weight is made anew in every solve, so none is ever stale.

    A program that iterates f itself, without a DEQ, has every weight computed at each use; put its loop inside
    ``with deqcore.SolveScope():`` to fix weights and dropout masks for its length.
    """
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigTypeError(f"reset_norm takes a torch.nn.Module, got {type(model).__name__}.")


def remove_norm(model: nn.Module) -> nn.Module:
    """Take the norms that :func:`apply_norm` put on off again; each weight stays what it is, as a plain parameter.

    Make the optimizer anew afterwards. A model without norms stays as it is.

    Returns:
        `model`.

    Raises:
        NormError: another parametrization was put on top of a norm; remove that first.
    """
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigTypeError(f"remove_norm takes a torch.nn.Module, got {type(model).__name__}.")
    spots = [
        Spot(name, module, tensor, None)
        for name, module in model.named_modules()
        if parametrize.is_parametrized(module)
        for tensor in parametrized_tensors(module)
    ]
    normed = [spot for spot in spots if any(hasattr(p, MARK) for p in parametrizations_on(spot))]
    for spot in normed:
        if len(parametrizations_on(spot)) > 1:
            raise NormError(
                f"{spot} has another parametrization on top of its norm; remove that first with "
                f"torch.nn.utils.parametrize.remove_parametrizations."
            )
    take_off(normed)
    return model


def register_norm_module(
    module_class: type[nn.Module],
    norm_type: str,
    names: str | Sequence[str] = "weight",
    dims: int | Sequence[int | None] | None = 0,
) -> None:
    """Let a norm normalise modules of this class too, for this process.

    Args:
        module_class: exactly this class; subclasses are registered on their own.
        norm_type: name of the norm.
        names: the module's tensors to normalise.
        dims: dimension of the output channels of each, or one for all; None takes a whole tensor as one channel.

    Raises:
        UnknownPluginError: no norm has that name.
        ConfigError, ConfigTypeError: not a module class, or `dims` don't fit `names`.
    """
    if not (isinstance(module_class, type) and issubclass(module_class, nn.Module)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigTypeError(f"register_norm_module takes a class of modules, got {module_class!r}.")
    norm_class: type[Norm[Any]] = registry.get("norms", norm_type)
    norm_class.targets = {**norm_class.targets, module_class: _targets(names, dims)}


# ---- which norm


def _choose(norm_type: Any, args: Any, keywords: Mapping[str, Any]) -> Settings | None:
    """The settings that all sources together mean; None for no norm."""
    section = _section(norm_type)
    override, flat = _from_args(args)
    name = override.get("name", section.get("name", "weight_norm"))
    if name == "none":
        return None
    if section.get("name", name) != name:
        section = {}  # these are another norm's
    if flat:
        known = registry.get("norms", name).settings_type.known_keys()
        override = {key: value for key, value in override.items() if key in known or key not in flat}
    return registry.settings("norms", {**section, **keywords, **override, "name": name})


def _section(value: Any) -> dict[str, Any]:
    """A norm as somebody may write it, as one dict."""
    if isinstance(value, Settings):
        return {**value.model_dump(exclude_unset=True), "name": registry.settings("norms", value).name}
    if isinstance(value, Mapping):
        return {str(key): item for key, item in cast("Mapping[Any, Any]", value).items()}
    if isinstance(value, str):
        return {"name": value}
    raise ConfigTypeError(
        f"a norm is given as a name, a dict with a 'name', or its settings; got {value!r} ({type(value).__name__})."
    )


def _from_args(args: Any) -> tuple[dict[str, Any], set[str]]:
    """What a configuration says about the norm, and which of it are defaults of flags that not every norm has."""
    if isinstance(args, str | os.PathLike):
        args = DEQConfig.load(args)
    if isinstance(args, DEQConfig):
        if args.norm is not None:
            return _section(args.norm), set()
        return ({"name": "none"} if "norm" in args.model_fields_set else {}), set()
    if args is None:
        return {}, set()
    read = _read(args)
    given = read.get(GIVEN)
    found: dict[str, Any] = {}
    default: set[str] = set()
    for name, flat in NORM_FLAT.items():
        value = read.get(name)
        if value is None:
            continue
        key = flat.path[1]
        chosen = name in given if given is not None else value != flat.default
        if key == "no_scale":
            if value not in (True, False):
                raise ConfigTypeError(f"{name} must be true or false, got {value!r} ({type(value).__name__}).")
            key, value = "learn_scale", not value
        if not chosen:
            default.add(key)
        found[key] = value
    nested = _section(read["norm"]) if read.get("norm") is not None else {}
    nested |= {name.partition(".")[2]: value for name, value in read.items() if name.startswith("norm.")}
    for key, value in nested.items():
        if key in found and key not in default and found[key] != value:
            raise ConfigError(
                f"{type(args).__name__}: the norm's {key} is given as {found[key]!r} and {value!r}; give one."
            )
    found |= nested
    return found, default | {"n_power_iterations"}


def _read(args: Any) -> dict[str, Any]:
    """The entries of `args` that may be about a norm."""
    if isinstance(args, Mapping) and GIVEN in args:
        args = Namespace(**cast("Mapping[str, Any]", args))  # vars() of what our own flags were parsed into
    if isinstance(args, Mapping):
        mapping = cast("Mapping[Any, Any]", args)
        known = DEQConfig.known_keys()
        for key in mapping:
            if key not in known and str(key).partition(".")[0] not in SECTIONS:
                raise UnknownKeyError(
                    f"args: unknown key {key!r}.{suggest(key, known)} Allowed: {', '.join(sorted(known))}."
                )
        return {str(key): value for key, value in mapping.items()}
    if isinstance(args, int | float | list | tuple | set | bytes):
        raise ConfigTypeError(
            f"args: a Namespace, a dict, a DEQConfig, a file's path or an object with attributes; got {args!r} "
            f"({type(args).__name__})."
        )
    wanted = [name for name in dir(args) if name in NORM_FLAT or name in ("norm", GIVEN) or name.startswith("norm.")]
    read = {name: getattr(args, name) for name in wanted}
    norm = read.get("norm")
    if not isinstance(norm, Mapping | Settings) and norm not in registry.names("norms"):
        read.pop("norm", None)  # a program's own affair, such as norm="batch"
    return read


# ---- where it goes


def _targets(names: str | Sequence[str], dims: int | Sequence[int | None] | None) -> Targets:
    listed = [names] if isinstance(names, str) else list(names)
    along = list(dims) if isinstance(dims, Sequence) else [dims] * len(listed)
    if not listed or not all(isinstance(name, str) and name for name in listed):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigTypeError(f"names of tensors are strings, at least one; got {names!r}.")
    if len(along) != len(listed) or not all(d is None or type(d) is int for d in along):
        raise ConfigError(f"dims must be one int (or None) for all of names={names!r}, or one each; got {dims!r}.")
    return tuple(zip(listed, along, strict=True))


def _as_list(filters: str | Iterable[str] | None) -> list[str]:
    found = [filters] if isinstance(filters, str) else list(filters or ())
    if not all(isinstance(part, str) for part in found):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigTypeError(f"filters are a str or strings, got {filters!r}.")
    return found


def _find(model: nn.Module, norm: Norm[Any], only: Targets | None, prefixes: list[str], parts: list[str]) -> list[Spot]:
    """Every tensor to normalise."""
    spots: list[Spot] = []
    skipped: list[str] = []
    for path, module in model.named_modules():
        kind = parametrize.type_before_parametrizations(module)
        if kind not in norm.targets or "parametrizations" in path.split("."):
            continue
        if any(map(path.startswith, prefixes)) or any(part in path for part in parts):
            skipped.append(path)
            continue
        spots += [Spot(path, module, tensor, dim) for tensor, dim in only or norm.targets[kind]]
    if not spots:
        classes = ", ".join(sorted(kind.__name__ for kind in norm.targets)) or "none"
        filtered = f" Filtered out: {', '.join(map(repr, skipped))}." if skipped else ""
        raise NormError(
            f"norm {norm.settings.name!r} found nothing to normalise in {type(model).__name__}. It goes on layers of "
            f"exactly these classes: {classes}.{filtered} Loosen the filters, add a class with register_norm_module, "
            "or use norm_type='none'."
        )
    return spots


def _is_on(spot: Spot, norm: Norm[Any]) -> bool:
    """Whether the very same norm is on `spot` already.

    Raises:
        NormError: something else is.
    """
    if not parametrize.is_parametrized(spot.module, spot.tensor):
        return False
    first = next(iter(parametrizations_on(spot)))
    settings, dim = getattr(first, MARK, (None, None))
    if settings == norm.settings and dim == spot.dim:
        return True
    if settings is None:
        raise NormError(
            f"{spot} has a parametrization ({type(first).__name__}) that is no norm of deqcore; remove it with "
            "torch.nn.utils.parametrize.remove_parametrizations, or filter the module out."
        )
    raise NormError(
        f"{spot} already has the norm {settings!r}; take it off with deqcore.remove_norm(model) before you put "
        f"{norm.settings!r} on."
    )


def _group(model: nn.Module, norm: Norm[Any], spots: list[Spot]) -> list[list[Spot]]:
    """`spots` by parameter: modules that share a weight go on sharing it."""
    owners: dict[int, list[tuple[str, int, str]]] = {}
    for path, module in model.named_modules():
        for tensor, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            owners.setdefault(id(parameter), []).append((f"{path}.{tensor}" if path else tensor, id(module), tensor))
    groups: dict[int, list[Spot]] = {}
    for spot in spots:
        parameter = dict(spot.module.named_parameters(recurse=False, remove_duplicate=False)).get(spot.tensor)
        if parameter is None:
            has = type(getattr(spot.module, spot.tensor, None)).__name__
            raise NormError(
                f"{spot} is no parameter ({has}), so {norm.settings.name!r} can't go on it. Take off what replaced it "
                "(another library's norm, say), or filter the module out."
            )
        groups.setdefault(id(parameter), []).append(spot)
    for key, group in groups.items():
        mine = {(id(spot.module), spot.tensor) for spot in group}
        others = [name for name, module, tensor in owners[key] if (module, tensor) not in mine]
        if others or len({spot.dim for spot in group}) > 1:
            raise NormError(
                f"{', '.join(map(str, group))} shares its tensor with "
                f"{', '.join(others) or 'a layer of another kind'}, which would not be normalised alike. "
                "Filter both out, untie them, or register the other's class."
            )
    return list(groups.values())


def _make(norm: Norm[Any], spot: Spot) -> nn.Module:
    weight: Tensor = getattr(spot.module, spot.tensor)
    try:
        parametrization = norm.parametrization(weight, spot.dim)
    except NormError as error:
        error.args = (f"{spot}: {error}",)
        raise
    if not isinstance(parametrization, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise NormError(
            f"norm {norm.settings.name!r}: parametrization() must return a torch.nn.Module, got "
            f"{type(parametrization).__name__}."
        )
    setattr(parametrization, MARK, (norm.settings, spot.dim))
    return parametrization
