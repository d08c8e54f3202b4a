"""What something was measured on, and how much memory it has left."""

from __future__ import annotations

import importlib.metadata
import platform
from datetime import UTC, datetime
from typing import Any

import torch

LIBRARIES = ("diffusers", "torchmetrics", "xformers", "flash-attn", "tomesd", "triton")


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
