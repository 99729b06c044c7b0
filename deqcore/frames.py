"""Which line of the user's a warning is about."""

from __future__ import annotations

import inspect
import os

import pydantic
import torch

__all__ = ["caller"]

#: Directories whose frames are not the user's.
INSIDE = tuple(
    os.path.join(os.path.dirname(os.path.abspath(path)), "") for path in (__file__, torch.__file__, pydantic.__file__)
)


def caller() -> int:
    """The `stacklevel` for a warning in the function that calls this: the nearest frame outside deqcore and torch.

    A fixed number would not do: hooks, torch.compile and the autograd engine put frames of their own in between.
    """
    frame, level = inspect.currentframe(), 0
    while frame is not None and frame.f_code.co_filename.startswith(INSIDE):
        frame, level = frame.f_back, level + 1
    return max(level, 1)
