"""The operators. Needs torch only.

``config.OPERATORS`` lists them; :func:`build` makes one.
"""

import importlib

from ..config import OPERATORS, OperatorConfig
from .operator import Operator

__all__ = ["Operator", "OperatorConfig", "build"]


def build(config: OperatorConfig) -> Operator:
    """A randomly initialised operator. Raises ValueError for choices that do not fit together."""
    module, _, name = OPERATORS[config.operator].where.partition(":")
    return getattr(importlib.import_module(f".{module}", __name__), name)(config)
