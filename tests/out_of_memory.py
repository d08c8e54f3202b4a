"""Running out of memory, on order: what allocators raise, from any call of any function."""

from __future__ import annotations

import torch

# Word for word what PyTorch says on a CPU, where there is no error of a kind of its own.
CPU = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "9663676416 bytes. Error code 12 (Cannot allocate memory)"
)
GPU = "CUDA out of memory. Tried to allocate 9.00 GiB. GPU 0 has a total capacity of 11.75 GiB"
ERRORS = {
    "cpu": lambda: RuntimeError(CPU),
    "gpu": lambda: torch.OutOfMemoryError(GPU),
    "python": lambda: MemoryError(),
}


def fail(monkeypatch, owner, name, when=lambda number, *args, **kwargs: True, kind="cpu", after=False):
    """Has ``owner.name`` run out of memory in each call for which ``when(its number from 0, *its arguments)`` holds,
    before its work or ``after`` it. Returns a list of what each call came to: True if it failed."""
    function, failed = getattr(owner, name), []

    def wrapper(*args, **kwargs):
        failed.append(bool(when(len(failed), *args, **kwargs)))
        fails = failed[-1]
        if fails and not after:
            raise ERRORS[kind]()
        result = function(*args, **kwargs)
        if fails:
            raise ERRORS[kind]()
        return result

    monkeypatch.setattr(owner, name, wrapper)
    return failed
