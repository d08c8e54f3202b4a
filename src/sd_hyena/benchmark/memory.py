"""Peak memory: of one call, exactly; of a whole generation, as the system sees it."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

CALL_METHOD = {
    "cpu": "most bytes held by PyTorch's CPU allocator during a call, above what was held before it (torch.profiler)",
    "cuda": "torch.cuda.max_memory_allocated during a call, above what was allocated before it",
}
RUN_METHOD = {
    "cpu": "peak resident memory of the process (VmHWM, reset before each picture, free memory returned first)",
    "cuda": "torch.cuda.max_memory_allocated of the process",
}


def peak_of_call(call: Callable[[], Any], device: torch.device) -> tuple[int, Any]:
    """(bytes at most held above what was held before, what ``call`` returned)."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before, result
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler's own log is read at its first use: errors only
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        result = call()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak, result


class PeakOfRun:
    """Peak memory since :meth:`reset`, of the process (CPU) or of what PyTorch allocated (CUDA)."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def reset(self) -> None:
        """Forgets the peak so far. Where the system cannot, the peak is that of the whole process."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # else memory freed long ago still counts
            Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int:
        """Bytes."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        try:
            found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        except OSError:
            found = None
        if found:
            return int(found[1]) * 1024
        import psutil

        memory = psutil.Process().memory_info()
        if hasattr(memory, "peak_wset"):  # Windows
            return memory.peak_wset
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
