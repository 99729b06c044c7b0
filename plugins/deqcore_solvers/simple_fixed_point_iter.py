"""Plain fixed-point iteration that looks at nothing on the way."""

from __future__ import annotations

from typing import ClassVar

from deqcore import hookimpl

from .fixed_point_iter import FixedPointIter


class SimpleFixedPointIter(FixedPointIter):
    """`max_iter` steps of z <- z + damping * (f(z) - z), without statistics and without a stop test.

    Use it when the number of steps is fixed anyway and every microsecond counts. The residual is measured once, at the
    end, so the status is still the truth; an unreached tolerance is no failure here, as none was aimed at.

    A step costs one evaluation of f; the whole run waits for the device once.

    Source: Banach's fixed-point theorem.
    """

    monitored: ClassVar[bool] = False


@hookimpl
def deqcore_solver() -> type[SimpleFixedPointIter]:
    return SimpleFixedPointIter
