"""Puts off garbage collection while deqcore is being imported.

Building the settings' schemas allocates enough to set off a full collection, which walks over all of torch's objects
and finds nothing: a tenth of a second, most of what `import deqcore` would cost.
"""

from __future__ import annotations

import gc

__all__ = ["done"]

_collecting = gc.isenabled()
gc.disable()


def done() -> None:
    """Collect again, if that is how things were."""
    if _collecting:
        gc.enable()
