"""Finding and loading teachers, and telling what a file is. One of the few places that import diffusers."""

from ..families import DEMO, DEMO_DIR
from .choices import ModelChoices
from .loading import load_pipeline, unet_skeleton
from .locate import ModelSource, check_size, locate, size_defaults
from .quiet import quiet_libraries
from .random_weights import random_pipeline

__all__ = [
    "DEMO",
    "DEMO_DIR",
    "ModelChoices",
    "ModelSource",
    "check_size",
    "load_pipeline",
    "locate",
    "quiet_libraries",
    "random_pipeline",
    "size_defaults",
    "unet_skeleton",
]
