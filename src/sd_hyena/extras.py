"""Packages that only some commands need: pyproject.toml has them as extras. ``import sd_hyena``, the operators and the
host adapters need torch and safetensors alone."""

from __future__ import annotations

import importlib.util

from .errors import SdHyenaError

# Extra -> modules of its packages that are imported without asking.
EXTRAS = {
    "train": ("tensorboard",),
    "evaluate": ("matplotlib",),
    "bench": ("matplotlib",),
    "ui": ("gradio",),
}


def require(what: str, *extras: str) -> None:
    """Raises SdHyenaError, which names the package and how to install it, if one of ``extras`` is not there. ``what``:
    who needs it."""
    for extra in extras:
        for module in EXTRAS[extra]:
            require_module(what, module, extra)


def require_module(what: str, module: str, extra: str) -> None:
    """:func:`require` for one module of an extra."""
    if importlib.util.find_spec(module) is None:
        raise SdHyenaError(f"{what} needs {module}: pip install 'sd-hyena[{extra}]'")
