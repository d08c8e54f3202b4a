"""sd-hyena: Stable Diffusion's self-attention layers replaced by Hyena operators, taught by the original.

The names below are the stable API; they are imported on first use, so that ``import sd_hyena`` is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from . import nn
    from .api import list_targets, load_hyena, load_operator, save_hyena, set_hyena_enabled, unload_hyena
    from .errors import CheckpointError, SdHyenaError, UsageError

__all__ = [
    "CheckpointError",
    "SdHyenaError",
    "UsageError",
    "list_targets",
    "load_hyena",
    "load_operator",
    "nn",
    "save_hyena",
    "set_hyena_enabled",
    "unload_hyena",
]
_ERRORS = ("CheckpointError", "SdHyenaError", "UsageError")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "nn":
        return importlib.import_module(".nn", __name__)
    return getattr(importlib.import_module(".errors" if name in _ERRORS else ".api", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
