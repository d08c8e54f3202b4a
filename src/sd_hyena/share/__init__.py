"""Hyena layers as a folder or hub repository, with a model card."""

from .save import push_to_hub, save_pretrained

__all__ = ["push_to_hub", "save_pretrained"]
