"""The Hyena nodes. ComfyUI calls ``comfy_entrypoint``."""

try:
    import sd_hyena  # noqa: F401
except ImportError as error:
    raise ImportError(
        "the Hyena nodes need the Python package sd-hyena: install it with ComfyUI's own Python, "
        "pip install --no-deps sd-hyena"
    ) from error

from .nodes import comfy_entrypoint

__all__ = ["comfy_entrypoint"]
