"""sd-hyena: Stable Diffusion's self-attention layers replaced by Hyena operators, taught by the original.

The names below are the stable API; they are imported on first use, so that ``import sd_hyena`` is quick.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Libraries that would report their use read these when they are imported.
for _name in ("DO_NOT_TRACK", "HF_HUB_DISABLE_TELEMETRY", "DISABLE_TELEMETRY"):
    os.environ.setdefault(_name, "1")
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

if TYPE_CHECKING:
    from . import nn
    from .api import (
        AttachedLayer,
        attached,
        hyena_config,
        hyena_state_dict,
        list_targets,
        load_hyena,
        load_operator,
        load_pipeline,
        save_hyena,
        set_hyena_enabled,
        unload_hyena,
    )
    from .errors import CheckpointError, SdHyenaError, UsageError
    from .generate.switching import hyena_range
    from .share import push_to_hub, save_pretrained

__all__ = [
    "AttachedLayer",
    "CheckpointError",
    "SdHyenaError",
    "UsageError",
    "attached",
    "hyena_config",
    "hyena_range",
    "hyena_state_dict",
    "list_targets",
    "load_hyena",
    "load_operator",
    "load_pipeline",
    "nn",
    "push_to_hub",
    "save_hyena",
    "save_pretrained",
    "set_hyena_enabled",
    "unload_hyena",
]
_WHERE = {
    ".errors": ("CheckpointError", "SdHyenaError", "UsageError"),
    ".generate.switching": ("hyena_range",),
    ".share": ("push_to_hub", "save_pretrained"),
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "nn":
        return importlib.import_module(".nn", __name__)
    module = next((module for module, names in _WHERE.items() if name in names), ".api")
    return getattr(importlib.import_module(module, __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
