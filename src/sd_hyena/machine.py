"""What something was measured on, how much memory it has left, and what to do when that runs out."""

from __future__ import annotations

import gc
import importlib.metadata
import logging
import platform
import traceback
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, TypeVar

import torch

from .errors import OutOfMemory, is_out_of_memory

LIBRARIES = ("diffusers", "torchmetrics", "xformers", "flash-attn", "tomesd", "triton")

Item = TypeVar("Item")
Result = TypeVar("Result")
logger = logging.getLogger(__name__)


def machine(device: str = "cpu") -> dict[str, Any]:
    """CPU and GPU names, versions, threads and date."""
    facts: dict[str, Any] = {"cpu": _cpu_name(), "threads": torch.get_num_threads()}
    if torch.device(device).type == "cuda":
        facts |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    facts |= {"sd_hyena": _version("sd-hyena"), "torch": torch.__version__, "python": platform.python_version()}
    facts |= {name: version for name in LIBRARIES if (version := _version(name))}
    return facts | {
        "system": f"{platform.system()} {platform.machine()}",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def describe(facts: dict[str, Any]) -> str:
    """One line for titles: device, threads, torch."""
    if "gpu" in facts:
        return f"{facts['gpu']}, torch {facts['torch']}"
    return f"{facts['cpu']}, {facts['threads']} threads, torch {facts['torch']}"


def free_memory(device: torch.device) -> int:
    """Bytes that can be had now: of the GPU, or of the machine."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available


def let_go(error: BaseException | None) -> None:
    """Frees what a failed attempt still holds, in the frames of its traceback and in the allocator's cache."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__
    gc.collect()
    torch.cuda.empty_cache()


class Batches:
    """Work in batches of at most ``size``, which halves, for good, whenever memory runs out.

    ``what`` the work is and what to ``lower`` where there is no room for a single one: for messages.
    """

    def __init__(self, size: int, what: str, lower: str) -> None:
        self.size, self.what, self.lower = size, what, lower

    def run(self, work: Callable[[Sequence[Item]], Result], items: Sequence[Item]) -> list[Result]:
        """``work`` on all items, in their order, batch by batch. Raises OutOfMemory if one alone is too much."""
        results: list[Result] = []
        start = 0
        while start < len(items):
            batch = items[start : start + self.size]
            failure = None
            try:
                results.append(work(batch))
                start += len(batch)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                failure = error
            if failure is not None:
                self.halve(failure, len(batch))
                logger.warning("out of memory %s: %d at a time from here", self.what, self.size)
        return results

    def halve(self, failure: BaseException | None, count: int) -> None:
        """After a batch of ``count`` was too large. Raises OutOfMemory if that was one."""
        let_go(failure)
        if count == 1:
            raise OutOfMemory(f"out of memory {self.what}, one at a time: lower {self.lower}") from failure
        self.size = (count + 1) // 2


def settle(device: str) -> None:
    """Before anything is measured: events and statistics refer to this GPU, and float32 means float32."""
    if torch.device(device).type == "cuda":
        if torch.device(device).index is not None:
            torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as info:
            return next(line.split(":", 1)[1].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
