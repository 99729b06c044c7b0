"""The command line: ``deqcore plugins ...``, and whatever commands the installed plugins bring."""

from __future__ import annotations

from .app import main

__all__ = ["main"]
