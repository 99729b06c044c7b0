"""Typed settings: the base classes an implementation's own settings derive from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, model_validator

from .choice import Choice
from .validation import prepare, translated

__all__ = [
    "AnySolverChoice",
    "BaseSettings",
    "CoreSettings",
    "GradientChoice",
    "GradientSettings",
    "LinearSolverChoice",
    "NormChoice",
    "NormSettings",
    "RegularizerSettings",
    "Settings",
    "SolverChoice",
    "SolverSettings",
]


class BaseSettings(BaseModel):
    """A frozen table of typed values: unknown keys are refused, every field has its type, default and meaning.

    Raises:
        UnknownKeyError, ConfigTypeError, ConfigError: a wrong key, type or value; the text has its path.

    Attributes:
        aliases: other names of fields, mostly TorchDEQ's (``m`` for ``memory``); class attribute.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), ser_json_inf_nan="constants")
    aliases: ClassVar[dict[str, str]] = {}

    def __init__(self, /, **values: Any) -> None:
        with translated(type(self)):
            super().__init__(**values)

    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]  # validation need not come through here

    @model_validator(mode="before")
    @classmethod
    def _prepare(cls, given: Any) -> Any:
        return prepare(cls, given) if isinstance(given, Mapping) else given  # pyright: ignore[reportUnknownArgumentType]

    @classmethod
    def known_keys(cls) -> list[str]:
        """Every key a user may write, aliases included."""
        return [*cls.model_fields, *cls.aliases]


class Settings(BaseSettings):
    """Base of an implementation's settings.

    Attributes:
        name: the name the implementation was picked by (``anderson``, or ``dist/anderson``).
    """

    name: str = Field("", description="the implementation, by its registered name or as dist/name")

    @classmethod
    def own_fields(cls) -> Iterable[str]:
        """Fields that only this implementation has; the rest are common to its kind."""
        common: set[str] = set()
        for base in cls.__mro__[1:]:
            if issubclass(base, Settings) and base.__module__ == __name__:
                common |= set(base.model_fields)
        return [field for field in cls.model_fields if field not in common]


class SolverSettings(Settings):
    """What the kernel's loop needs to know, the same for every solver."""

    max_iter: int = Field(40, ge=0, description="largest number of steps; 0 hands z0 on (TorchDEQ's default)")
    tol: float = Field(
        1e-3,
        ge=0,
        allow_inf_nan=False,
        description="tolerance on the residual; 0 runs max_iter steps (TorchDEQ's default)",
    )
    stop_mode: Literal["abs", "rel"] = Field("abs", description="residual ||f(z)-z||, or the same over ||f(z)||")
    rtol: float | None = Field(
        None, ge=0, allow_inf_nan=False, description="with atol instead of tol: stop at atol + rtol * ||f(z)||"
    )
    atol: float | None = Field(None, ge=0, allow_inf_nan=False, description="see rtol; 0 where only rtol is given")
    residual_norm: Literal["l2", "rms", "max"] = Field("l2", description="vector norm over the features of a sample")
    return_final: bool = Field(False, description="run all steps and return the last state, not the best")
    patience: int | None = Field(None, ge=1, description="stop when no sample improved for this many judged steps")
    max_nfe: int | None = Field(
        None, ge=1, description="begin no step once f was evaluated this often, products with its Jacobian included"
    )
    divergence_factor: float = Field(
        1e8, gt=1, description="stop when every unfinished sample's residual exceeds its lowest by this; inf: never"
    )

    @model_validator(mode="after")
    def _one_tolerance(self) -> SolverSettings:
        given = self.model_fields_set
        if given & {"tol", "stop_mode"} and (self.rtol is not None or self.atol is not None):
            tolerance = ", ".join(f"{key}={getattr(self, key)!r}" for key in ("tol", "stop_mode") if key in given)
            raise ValueError(
                f"give either tol (with stop_mode) or rtol/atol, not both: {tolerance}, "
                f"rtol={self.rtol!r}, atol={self.atol!r}"
            )
        return self

    @property
    def is_fixed(self) -> bool:
        """Whether exactly max_iter steps are to be made, without a stop test."""
        return self.thresholds() == (0.0, 0.0)

    def thresholds(self) -> tuple[float, float]:
        """(atol, rtol) that the residual is compared with: residual <= atol + rtol * ||f(z)||."""
        if self.rtol is not None or self.atol is not None:
            return self.atol or 0.0, self.rtol or 0.0
        return (self.tol, 0.0) if self.stop_mode == "abs" else (0.0, self.tol)


class GradientSettings(Settings):
    """Settings of a gradient backend."""


class CoreSettings(Settings):
    """Which states of the trajectory are returned in training, and how each gets its gradient."""

    n_states: int = Field(1, ge=1, description="states to return in training, evenly spaced over the steps")
    indexing: tuple[int, ...] = Field((), description="steps whose states to return besides the last, increasing")
    intermediate: tuple[GradientChoice, ...] = Field(
        (),
        description="gradients of the states before the last; one for all, or one each. Default: the last one's, "
        "or one phantom step where that one needs an equilibrium",
    )

    @model_validator(mode="after")
    def _consistent(self) -> CoreSettings:
        steps = self.indexing
        if any(later <= earlier for earlier, later in zip((0, *steps), steps, strict=False)):
            raise ValueError(f"indexing must be increasing steps from 1 on, got {list(steps)}")
        if self.n_states > 1 and steps:
            raise ValueError(f"give n_states or indexing, not both (n_states={self.n_states}, indexing={list(steps)})")
        states = max(self.n_states, len(steps) + 1)
        if len(self.intermediate) > 1 and len(self.intermediate) != states - 1:
            raise ValueError(
                f"{len(self.intermediate)} gradients for {states - 1} states before the last: give one, or one each"
            )
        return self


class NormSettings(Settings):
    """Settings of a weight normalisation."""


class RegularizerSettings(Settings):
    """Settings of a regularizer."""

    weight: float = Field(
        1.0, ge=0, allow_inf_nan=False, description="factor of this penalty in info['regularization']"
    )


if TYPE_CHECKING:
    SolverChoice = SolverSettings
    LinearSolverChoice = SolverSettings
    AnySolverChoice = SolverSettings
    GradientChoice = GradientSettings
    NormChoice = NormSettings
    RegularizerChoice = RegularizerSettings
    CoreChoice = CoreSettings
else:
    SolverChoice = Annotated[SerializeAsAny[SolverSettings], Choice("solvers")]
    LinearSolverChoice = Annotated[SerializeAsAny[SolverSettings], Choice("linear_solvers")]
    AnySolverChoice = Annotated[SerializeAsAny[SolverSettings], Choice("any_solvers")]
    GradientChoice = Annotated[SerializeAsAny[GradientSettings], Choice("gradients")]
    NormChoice = Annotated[SerializeAsAny[NormSettings], Choice("norms")]
    RegularizerChoice = Annotated[SerializeAsAny[RegularizerSettings], Choice("regularizers")]
    CoreChoice = Annotated[SerializeAsAny[CoreSettings], Choice("cores")]

CoreSettings.model_rebuild()
