"""Recipes that come with the package: TOML files with the settings of ``sd-hyena train``."""

from pathlib import Path

RECIPES = ("quick", "standard", "best")


def recipe_path(name: str) -> Path:
    """The file of one of RECIPES."""
    return Path(__file__).parent / f"{name}.toml"
