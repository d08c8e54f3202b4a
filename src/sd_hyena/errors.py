"""Errors that are the user's to fix. The command line prints them as one line, without a traceback."""

from __future__ import annotations

# What allocators say that raise no error of a kind of their own: PyTorch's on a CPU, CUDA and its libraries.
_NO_MEMORY = ("allocate memory", "not enough memory", "out of memory", "bad_alloc", "alloc_failed")


class SdHyenaError(RuntimeError):
    """Something failed that the message explains: exit status 1."""


class UsageError(ValueError):
    """The request itself is wrong (an option, a name, a size): exit status 2."""


class CheckpointError(SdHyenaError):
    """A weights file cannot be used; the message names the file and what is wrong with it."""


class OutOfMemory(SdHyenaError):
    """Memory did not suffice for the least that can be done at once; the message says what to lower."""


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error is some library's way to say that memory has run out, a GPU's or the machine's."""
    if isinstance(error, MemoryError):
        return True
    if not isinstance(error, RuntimeError) or isinstance(error, SdHyenaError):
        return False
    is_torchs = any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__)  # this file needs no torch
    return is_torchs or any(sign in str(error).lower() for sign in _NO_MEMORY)
