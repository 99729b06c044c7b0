"""Which tests below this folder are this project's own."""

from __future__ import annotations

from pathlib import Path

# Folders with a hyphen are distributions of their own. Their tests need them installed, which tests/test_packaging.py
# does, in an environment of its own; it runs them there.
collect_ignore = [folder.name for folder in Path(__file__).parent.glob("deqcore-*")]
