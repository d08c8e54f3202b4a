"""How far a student is from its teacher: layer by layer, the whole UNet, and the pictures.

``evaluate`` and what it returns are imported on first use, so that the settings cost no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .settings import EvaluateSettings

if TYPE_CHECKING:
    from .run import Evaluation, Row, evaluate

__all__ = ["EvaluateSettings", "Evaluation", "Row", "evaluate"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import run

    return getattr(run, name)
