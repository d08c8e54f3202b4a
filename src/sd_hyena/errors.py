"""Errors that are the user's to fix. The command line prints them as one line, without a traceback."""

from __future__ import annotations


class SdHyenaError(RuntimeError):
    """Something failed that the message explains: exit status 1."""


class UsageError(ValueError):
    """The request itself is wrong (an option, a name, a size): exit status 2."""


class CheckpointError(SdHyenaError):
    """A weights file cannot be used; the message names the file and what is wrong with it."""
