"""Flat gradient options (``ift``, ``grad``, ``tau``, ``b_tol``, ...), whose meaning depends on each other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from pydantic import Field

from .errors import ConfigError, ConfigTypeError, DEQError
from .merge import Notes
from .settings import BaseSettings
from .sources import Given, Layer
from .validation import Finding, failure, shown, validate

__all__ = ["finish", "spell_out"]

IMPLICIT = ("ift", "hook_ift")
#: Flat options of the phantom gradient, with its settings.
PHANTOM = {"tau": "damping", "sup_gap": "sup_gap", "sup_loc": "sup_loc"}


class _Backward(BaseSettings):
    """Flat options of the backward solve, to check them where nothing uses them."""

    b_max_iter: int = Field(40, ge=0)
    b_tol: float = Field(1e-6, ge=0, allow_inf_nan=False)
    b_stop_mode: Literal["abs", "rel"] = "abs"


class _Grad(BaseSettings):
    grad: tuple[int, ...]


def spell_out(layers: Sequence[Layer]) -> None:
    """Add to each layer what its flat gradient options mean, the stronger layers considered.

    ``ift`` and ``hook_ift`` name the gradient, and so does ``ift=False`` above a layer that names `implicit`. The
    others are settings of the phantom gradient, if that is the last state's.

    Raises:
        ConfigError, ConfigTypeError: a layer contradicts itself, or a value is wrong.
    """
    name: Any = None
    flags: dict[str, Given] = {}
    for layer in layers:
        if "grad" in layer.flags:
            layer.flags["grad"] = layer.flags["grad"]._replace(value=_steps(layer.flags["grad"]))
        asked = _asked(layer)
        mine = {key: layer.flags[key] for key in IMPLICIT if key in layer.flags}
        if asked is not None:
            _agree(asked, mine)
            name, flags = asked.value, {}
        elif mine:
            flags.update(mine)
            chosen = next((given for given in flags.values() if given.value), None)
            if chosen is not None:
                name = "implicit"
                layer.entries.append((("gradient", "name"), chosen._replace(value=name)))
            elif _bare(name) == "implicit":
                name = "phantom"
                layer.entries.append((("gradient", "name"), next(iter(mine.values()))._replace(value=name)))
    if _bare(name) not in (None, "phantom"):
        return
    for layer in layers:
        for key, setting in PHANTOM.items():
            if key in layer.flags:
                layer.entries.append((("gradient", setting), layer.flags[key]))
        if "grad" in layer.flags:
            given = layer.flags["grad"]
            layer.entries.append((("gradient", "steps"), given._replace(value=given.value[-1])))


def _asked(layer: Layer) -> Given | None:
    """The gradient that a layer names in so many words."""
    found: Given | None = None
    for path, given in layer.entries:
        value = given.value
        if path == ("gradient",) and isinstance(value, Mapping):
            value = value.get("name")  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        elif path == ("gradient",) and isinstance(value, BaseSettings):
            value = getattr(value, "name", None)
        elif path not in (("gradient",), ("gradient", "name")):
            continue
        if value is not None:
            found = given._replace(value=value)
    return found


def _bare(name: Any) -> Any:
    return name.rpartition("/")[2] if isinstance(name, str) else name


def _agree(asked: Given, flags: Mapping[str, Given]) -> None:
    """Refuse ift=True beside another gradient, and ift=False beside `implicit`, in one source."""
    implicit = [f"{key}={given.value}" for key, given in flags.items() if given.value]
    explicit = [f"{key}={given.value}" for key, given in flags.items() if not given.soft]
    wanted = _bare(asked.value) == "implicit"
    wrong = implicit if not wanted else [] if implicit else explicit
    if wrong:
        text = f": {wrong[0]} contradicts {asked.value!r}, given by {asked.origin}. Give one."
        raise failure([Finding(("gradient",), text)])


def _steps(given: Given) -> list[int]:
    """The steps that ``grad`` asks for."""
    grad = given.value
    listed = grad if isinstance(grad, Iterable) else [grad]  # pyright: ignore[reportUnknownVariableType]
    try:
        steps = validate(_Grad, {"grad": [] if isinstance(grad, str) else listed}).grad
    except ConfigTypeError:
        steps = ()
    if not steps:
        raise ConfigTypeError(
            f"grad ({given.origin}) must be an int, or a list with one int a state, got {shown(grad)}."
        )
    if min(steps) < 1:
        text = "takes at least one step each; ift=True gives the exact gradient"
        raise ConfigError(f"grad ({given.origin}) {text}, got {shown(grad)}.")
    return list(steps)


# ---- after the merge


def finish(merged: dict[str, Any], layers: Sequence[Layer], notes: Notes) -> None:
    """Add to `merged` what flat options say about the states before the last, and check those that nothing uses.

    Raises:
        ConfigError: ``grad`` has neither one value nor one a state, or an unused option is wrong.
    """
    flags: dict[str, tuple[int, Given]] = {}
    for rank, layer in enumerate(layers):
        flags.update({key: (rank, given) for key, given in layer.flags.items() if key not in IMPLICIT})
    core: dict[str, Any] = merged.get("core", {})
    before = _before({key: given for key, (_, given) in flags.items()}, merged.get("gradient", {}), core)
    strongest = max((rank for rank, _ in flags.values()), default=-1)
    if before and isinstance(core, dict) and notes.rank(("core", "intermediate")) < strongest:  # pyright: ignore
        merged["core"] = {**core, "intermediate": before}
        origins = dict.fromkeys(given.origin for _, given in flags.values())
        notes.given["core", "intermediate"] = strongest, Given(before, ", ".join(origins))
    _check_unused(layers, notes)


def _before(flags: Mapping[str, Given], gradient: Any, core: Any) -> list[dict[str, Any]]:
    """Gradients of the states before the last; none where the default says the same."""
    phantom = {setting: flags[key].value for key, setting in PHANTOM.items() if key in flags}
    steps: list[int] = flags["grad"].value if "grad" in flags else []
    if "grad" in flags:
        _check_count(steps, flags["grad"], core)
    found = [{"name": "phantom", **phantom, "steps": k} for k in steps or [1]]
    name = gradient.get("name", "phantom") if isinstance(gradient, Mapping) else getattr(gradient, "name", "")  # pyright: ignore
    if _bare(name) == "phantom" or len(found) > 1:
        return found[:-1]
    return found if phantom or steps else []


def _check_count(steps: list[int], given: Given, core: Any) -> None:
    settings: Mapping[str, Any] = core if isinstance(core, Mapping) else {}  # pyright: ignore[reportUnknownVariableType]
    n_states, indexing = settings.get("n_states", 1), settings.get("indexing", ())
    if not isinstance(n_states, int) or not isinstance(indexing, list | tuple):
        return  # wrong themselves, which validation says better
    states = max(n_states, len(indexing) + 1)  # pyright: ignore[reportUnknownArgumentType]
    if len(steps) not in (1, states):
        raise ConfigError(
            f"grad ({given.origin}) has {len(steps)} values for {states} state(s): give one, or one a state (n_states "
            "or indexing say how many)."
        )


def _check_unused(layers: Sequence[Layer], notes: Notes) -> None:
    """Validate ``b_*`` options where the gradient has no solver; TorchDEQ's programs give them all the same."""
    from .registry import registry

    model = notes.models.get(("gradient",))
    if model is not None and "solver" in model.model_fields:
        return
    backward = {
        path[2]: given
        for layer in layers
        for path, given in layer.entries
        if path[:2] == ("gradient", "solver") and given.flat
    }
    if "name" in backward:
        given = backward.pop("name")
        try:
            registry.find("any_solvers", given.value)
        except DEQError as error:
            error.args = (f"b_solver ({given.origin}): {error}",)
            raise
    values = {f"b_{key}": given.value for key, given in backward.items()}
    origins: dict[Any, str] = {(f"b_{key}",): given.origin for key, given in backward.items()}
    validate(_Backward, values, "", lambda path: origins.get(path, ""))
