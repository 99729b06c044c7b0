"""Fixed-point correction: a loss on the states before the equilibrium as well."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import reduce
from operator import add
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor

from deqcore import (
    ConfigError,
    ConfigTypeError,
    Problem,
    Regularizer,
    RegularizerSettings,
    UnknownKeyError,
    hookimpl,
)
from deqcore.errors import suggest

Weight = Callable[..., float]


def exponential(n: int, k: int, gamma: float = 0.8) -> float:
    """gamma ** (n - k - 1): the last of n states weighs 1, each before it gamma times less."""
    return gamma ** (n - k - 1)


def linear(n: int, k: int, gamma: float = 0.9, bias: float = 0.0) -> float:
    """1 - gamma * (n - k - 1) / n + bias."""
    return 1 - (n - k - 1) / n * gamma + bias


def constant(n: int, k: int, c: float = 1.0) -> float:
    """c for every state."""
    return c


class CorrectionSettings(RegularizerSettings):
    """Settings of fixed-point correction."""

    weight_func: str = Field("exp", description="weights over the states: exp, linear, const, or a registered one")
    gamma: float | None = Field(None, ge=0, description="decay of exp (0.8 by default) or slope of linear (0.9)")


class FixedPointCorrection(Regularizer[CorrectionSettings]):
    """Pulls the sampled states before the last one towards it, later ones more strongly.

    As a regularizer its criterion is the mean squared distance to the equilibrium, which is held fixed; it is zero
    unless `n_states` or `indexing` sample more than one state. For a criterion of one's own, such as the task's loss on
    every state, call :func:`deqcore.loss.fp_correction`.

    Source: Bai et al., Deep Equilibrium Optical Flow Estimation (CVPR 2022), eq. 6.
    """

    weights: ClassVar[dict[str, Weight]] = {"exp": exponential, "linear": linear, "const": constant}

    def __init__(self, settings: CorrectionSettings | None = None, **options: Any) -> None:
        super().__init__(settings, **options)
        gamma = self.settings.gamma
        self._options: dict[str, Any] = {} if gamma is None else {"gamma": gamma}
        self._weight(self.settings.weight_func, self._options)

    def penalty(self, problem: Problem, states: Sequence[Tensor]) -> Tensor:
        target = states[-1].detach()
        if len(states) == 1:
            return target.new_zeros(())
        distances = [(state - target).square().mean() for state in states[:-1]]
        return self._sum(distances, len(states), self.settings.weight_func, self._options)

    @classmethod
    def correct(
        cls,
        crit: Callable[..., Tensor],
        args: Sequence[Any],
        weight_func: str = "exp",
        return_loss_values: bool = False,
        **kwargs: Any,
    ) -> Any:
        """The weighted criterion; see :func:`deqcore.loss.fp_correction`."""
        if not callable(crit):  # pyright: ignore[reportUnnecessaryComparison]
            raise ConfigTypeError(f"the criterion is called as crit(*args); got {type(crit).__name__}.")
        if not isinstance(args, list | tuple):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigTypeError(
                f"args must be a tuple with one entry for each argument of the criterion, got {type(args).__name__}."
            )
        lists: list[Sequence[Any]] = [arg if isinstance(arg, list | tuple) else [arg] for arg in args]
        if not lists or not all(lists):
            raise ConfigError(
                "fp_correction needs at least one argument for the criterion, and no empty list of states."
            )
        count = max(map(len, lists))
        values = [crit(*(each[k % len(each)] for each in lists)) for k in range(count)]
        loss = cls._sum(values, count, weight_func, kwargs)
        return (loss, [float(value.detach()) for value in values]) if return_loss_values else loss

    @classmethod
    def _sum(cls, values: Sequence[Tensor], count: int, name: str, options: dict[str, Any]) -> Tensor:
        weight = cls._weight(name, options)
        return reduce(add, (weight(count, k, **options) * value for k, value in enumerate(values)))

    @classmethod
    def _weight(cls, name: str, options: dict[str, Any]) -> Weight:
        """The weight function of that name, which takes these options."""
        if name not in cls.weights:
            known = sorted(cls.weights)
            raise ConfigError(f"no weight function named {name!r}.{suggest(name, known)} Known: {', '.join(known)}.")
        weight = cls.weights[name]
        try:
            inspect.signature(weight).bind(1, 0, **options)
        except TypeError as error:
            takes = ", ".join(list(inspect.signature(weight).parameters)[2:]) or "none"
            raise UnknownKeyError(f"weight function {name!r}: {error}. Its options: {takes}.") from None
        except ValueError:
            pass  # a builtin that doesn't say what it takes
        return weight

    @classmethod
    def register_weight(cls, name: str, func: Weight) -> None:
        """Add a weight function; see :func:`deqcore.loss.register_weight_func`."""
        if not callable(func):
            raise ConfigTypeError(f"a weight function is called as func(n, k, **options); got {type(func).__name__}.")
        cls.weights[name] = func


@hookimpl
def deqcore_regularizer() -> type[FixedPointCorrection]:
    return FixedPointCorrection
