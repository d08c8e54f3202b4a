"""What the environment can ask of a layer. Light: imports no torch."""

from __future__ import annotations

import os

from ..errors import UsageError

KERNEL = "SD_HYENA_KERNEL"  # the path to prefer over all others
PATHS = ("triton", "cpu", "plain")


def kernel() -> str:
    """The path that is asked for, or "". Raises UsageError for one that there is not."""
    name = os.environ.get(KERNEL, "")
    if name and name not in PATHS:
        raise UsageError(f"{KERNEL} must be one of {', '.join(PATHS)}, got {name!r}")
    return name
