"""Whether numbers are finite. Imports no torch until there is a tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

NOT_FINITE = "holds NaN or infinite values"


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all values are: their sum tells in one pass, and only if it does not they are looked at one by one."""
    import torch

    if not tensor.is_floating_point() or tensor.is_meta:
        return True
    tensor = tensor.float() if tensor.dtype.itemsize == 1 else tensor
    return bool(torch.isfinite(tensor.sum(dtype=torch.float32))) or bool(torch.isfinite(tensor).all())


def first_not_finite(value: Any, name: str = "") -> str:
    """Where in mappings, lists and tuples of tensors and numbers the first is that is not finite, as keys with dots
    between; "" if there is none."""
    if isinstance(value, Mapping | list | tuple):
        for key, each in value.items() if isinstance(value, Mapping) else enumerate(value):
            if found := first_not_finite(each, f"{name}.{key}" if name else str(key)):
                return found
        return ""
    finite = math.isfinite(value) if isinstance(value, float) else not hasattr(value, "is_meta") or is_finite(value)
    return "" if finite else name or "value"


def fits(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether no finite value of it becomes infinite in another type."""
    return is_finite(tensor.to(dtype)) or not is_finite(tensor)


def beyond(dtype: torch.dtype) -> str:
    """Completes a line on a tensor some of whose values do not fit."""
    return f"has values beyond the range of {str(dtype).removeprefix('torch.')}: compute in another type"


def damaged_weight(pipe: Any) -> str:
    """The first weight of a pipeline that is not finite, in words, or ""."""
    for component, part in getattr(pipe, "components", {}).items():
        if hasattr(part, "state_dict") and (name := first_not_finite(part.state_dict())):
            return f"{component}'s weight {name}"
    return ""


def why_not_finite(pipe: Any) -> str:
    """Names a weight that is not finite; where all are, what else may help."""
    import torch

    if weight := damaged_weight(pipe):
        return f"{weight} {NOT_FINITE}: the file it came from is damaged"
    if pipe.unet.dtype == torch.float16:
        return "float16 may be too narrow: use bfloat16 or float32"
    return "use another sampler, more steps or a lower guidance scale"
