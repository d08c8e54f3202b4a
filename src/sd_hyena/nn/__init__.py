"""The operators, and the module that puts one in attention's place. Needs torch only.

``config.OPERATORS`` lists them; :func:`build` makes one.
"""

import importlib

from ..config import OPERATORS, OperatorConfig
from .attention import HyenaAttention
from .operator import Operator

__all__ = ["HyenaAttention", "Operator", "OperatorConfig", "build"]


def build(config: OperatorConfig) -> Operator:
    """A randomly initialised operator. Raises ValueError for choices that do not fit together."""
    module, _, name = OPERATORS[config.operator].where.partition(":")
    return getattr(importlib.import_module(f".{module}", __name__), name)(config)
