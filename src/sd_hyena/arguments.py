"""What callers give, checked at the door: a wrong argument is one line, not an error from deep within."""

from __future__ import annotations

import os
import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .errors import UsageError


def given_path(value: Any, what: str) -> Path:
    """A path that the caller chose; ``~`` is the home folder. ``what`` starts the messages.

    Raises UsageError for what is no path, and for an empty one, which would be the working folder.
    """
    path = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(path, str):
        raise UsageError(f"{what} must be a path, got {shown(value)}")
    if not path:
        raise UsageError(f"{what} is empty: name one; . is the working folder")
    return Path(os.path.expanduser(path))


def given_texts(value: Any, what: str) -> list[str]:
    """One text, or any iterable of them, as a list. Raises UsageError for anything else."""
    texts = [value] if isinstance(value, str) or not isinstance(value, Iterable) else list(value)
    for text in texts:
        if not isinstance(text, str):
            raise UsageError(f"{what} must be text or a list of texts, got {shown(text)}")
    return texts


def given_words(value: Any, what: str) -> list[str]:
    """The words of a comma list, or of any iterable of them."""
    return [word for text in given_texts(value, what) for word in text.split(",")]


def shown(value: Any) -> str:
    """A wrong argument in a message: text, shortened, and numbers as they are, others by their type."""
    plain = value is None or isinstance(value, bool | int | float | str)
    return reprlib.repr(value) if plain else type(value).__name__
