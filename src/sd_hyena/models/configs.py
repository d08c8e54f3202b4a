"""Configurations of a model's parts, which come from anywhere: bounded before anything is built by them."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import strict_json
from ..errors import CheckpointError, UsageError
from ..texts import reason

if TYPE_CHECKING:
    from torch import nn

MAX_NUMBER = 1 << 20  # of channels, words, timesteps
MAX_LAYERS = 256
MAX_ITEMS = 64  # of a list with an entry for each block
MAX_WEIGHTS, MAX_VALUES = 3000, 1 << 35  # SDXL's UNet has 1680 tensors with 2.6e9 values
# Settings that may be zero, of those whose usual value is above it.
_MAY_BE_ZERO = ("eps", "padding", "_id", "initializer", "projection_dim")
_KINDS = {"dtype": str, "torch_dtype": str, "quantization_config": dict}  # what every class takes
_OWN_CODE = ("auto_map", "custom_pipeline", "_custom_pipeline", "custom_generate")


class _TooLargeError(Exception):
    pass


def read_json(path: Path, name: str, folder: str = "") -> dict[str, Any]:
    """A JSON object. Raises CheckpointError, which calls the file by its name after ``folder``, and UsageError for one
    that asks to run code."""
    what = f"model {name}: {folder}{path.name}"
    try:
        content = strict_json.load(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{what} cannot be read: {reason(error)}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{what} is not a JSON object")
    asks = next((key for key in _OWN_CODE if content.get(key)), None)
    if asks:
        raise UsageError(f"{what} asks to run code of its own ({asks}), which is never done")
    return content


def check_config(config: dict[str, Any], takes: Callable[..., Any], what: str) -> None:
    """Compares settings with the defaults of the function or class that ``takes`` them: of their kind, finite, not
    huge, and above zero where those are. ``what`` starts the messages. Raises CheckpointError, which names the
    setting."""
    for key, parameter in inspect.signature(takes).parameters.items():
        value, default, kind = config.get(key), parameter.default, str(parameter.annotation)
        if key not in config or parameter.kind is parameter.VAR_KEYWORD or key == "trained_betas":
            continue
        may_be_null = default is None or "None" in kind or "Optional" in kind
        wrong = ("" if may_be_null else "is null") if value is None else _wrong(key, value, default, kind)
        if wrong:
            raise CheckpointError(f"{what}: {key} {wrong}")
    for key, value in config.items():
        if key in _KINDS and not isinstance(value, _KINDS[key] | None):
            raise CheckpointError(f"{what}: {key} is {value!r:.40}, but must be a {_KINDS[key].__name__}")
        if key.endswith("_implementation") and "/" in str(value):
            raise UsageError(f"{what}: {key} {value} would run code of its own, which is never done")


def _wrong(key: str, value: Any, default: Any, kind: str) -> str:
    if isinstance(value, list):
        if len(value) > MAX_ITEMS:
            return f"has {len(value)} entries, but may have {MAX_ITEMS}"
        if not value:
            return "is empty"
        usual = default[0] if isinstance(default, list | tuple) and default else default
        return next(filter(None, (_wrong(key, each, usual, kind) for each in value if each is not None)), "")
    shown = repr(value)[:40]
    if isinstance(default, list | tuple):
        return f"is {shown}, but must be a list"
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(default, bool):
        return "" if isinstance(value, bool) else f"is {shown}, but must be true or false"
    if isinstance(default, str):
        return "" if isinstance(value, str) else f"is {shown}, but must be a text"
    if not number:
        counts = isinstance(default, int | float) or (isinstance(value, str) and "int" in kind and "str" not in kind)
        return f"is {shown}, but must be a number" if counts else ""
    if isinstance(value, float) and isinstance(default, int) and "float" not in kind:
        return f"is {shown}, but must be a whole number"
    most = MAX_LAYERS if "layers" in key else MAX_NUMBER
    if (isinstance(value, float) and not math.isfinite(value)) or abs(value) > most:
        return f"is {shown}, but must be at most {most}"
    above = (default is None and isinstance(value, int)) or (default is not None and default > 0)
    least = 0 if any(word in key for word in _MAY_BE_ZERO) else 1 if isinstance(value, int) else math.ulp(0)
    if above and value < least:
        return f"is {shown}, but must be {'0 or more' if least == 0 else 'above 0'}"
    return ""


def build(make: Callable[[], nn.Module], what: str) -> nn.Module:
    """What ``make`` builds, on the meta device. Raises CheckpointError, which starts with ``what``, for whatever that
    leads to, and as soon as it becomes larger than any model of the kind."""
    import torch

    try:
        with torch.device("meta"), _bounded():
            return make()
    except _TooLargeError as error:
        raise CheckpointError(f"{what}: {error}") from None
    except Exception as error:  # whatever the numbers in it lead to
        raise CheckpointError(f"{what}: {reason(error)}") from None


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    """Raises _TooLargeError within when more weights are made than any model has, whichever setting asks for them."""
    from torch.nn.modules.module import register_module_parameter_registration_hook

    tensors, values = 0, 0

    def count(module: nn.Module, name: str, weight: Any) -> None:
        nonlocal tensors, values
        tensors, values = tensors + 1, values + (0 if weight is None else weight.numel())
        if tensors > MAX_WEIGHTS or values > MAX_VALUES:
            raise _TooLargeError("asks for more layers, or larger ones, than any model of its kind has")

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()
