"""The operators, and the module that puts one in attention's place. Needs torch only."""

from .attention import HyenaAttention
from .causal import HyenaOperator
from .config import OperatorConfig
from .hyena2d import Hyena2D
from .linear_attention import LinearAttention

__all__ = ["Hyena2D", "HyenaAttention", "HyenaOperator", "LinearAttention", "OperatorConfig"]
