"""Compiles every Triton kernel for a GPU that need not be there, and prints what each candidate takes.

    python benchmarks/compile_kernels.py            # every candidate of the tuner, at the sizes SD 1.x meets
    python benchmarks/compile_kernels.py --quick    # one each

Registers a thread, bytes of stack (where registers are spilled), shared memory, and how many products use which tensor
core instruction (wgmma, Hopper's; mma, older). A candidate that does not compile for the target ends in status 1.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sd_hyena.ops.kernels import columns, features, flash, launch, short_gate

FLOATS = {"twiddle_ptr", "best_ptr", "total_ptr", "state_ptr", "logs_ptr", "mean_ptr", "weight_ptr", "bias_ptr"}
DOT = {"DOT": tl.float16, "PRECISION": "tf32"}
WIDTHS = (5, 6, 7, 6, 5)  # of the columns of figures


def cases() -> list[tuple[str, Any, dict[str, Any]]]:
    """(name, kernel, what is known when it is compiled)"""
    found: list[tuple[str, Any, dict[str, Any]]] = []
    for grid in (32, 64, 96, 128):
        t = launch.power_of_two(-(-grid // 2))
        known = {"quarter": grid // 2, "half": grid, "T": t, "W": launch.power_of_two(grid), "GATE": True, **DOT}
        found.append((f"flash {grid}x{grid}", flash._flash, known))
    for grid in (128, 160, 256, 512):
        t = launch.power_of_two(-(-grid // 2))
        found.append((f"columns {grid}x{grid}", columns._columns, {"quarter": grid // 2, "T": t, **DOT}))
    found.append(("short filter and gate", short_gate._short_gate, {"TAPS": 3, "OFFSET": True, "KEYS": True}))
    found.append(("gate", short_gate._gate, {}))
    found.append(("sums over keys", features._sums, {"D": 64, "E": 128, "FINE": False, **DOT}))
    found.append(("join of shares", features._join, {"SPLITS": 64, "D": 64, "E": 128, "SOME": 16}))
    found.append(("attend and gate", features._apply, {"D": 64, "E": 128, "FINE": False, **DOT}))
    return found


def compile_one(kernel: Any, known: dict[str, Any], warps: int, stages: int, capability: int) -> dict[str, int]:
    """What a kernel takes on a GPU of that compute capability (90: Hopper)."""
    names = kernel.arg_names
    signature = {
        name: "constexpr" if name in known else _kind(name) if name.endswith("_ptr") else "i32" for name in names
    }
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name] != "constexpr" and name not in ("images", "width", "features")
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=known, attrs=aligned)
    made = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps, "num_stages": stages}
    )
    registers, stack = _resources(made.asm["cubin"])
    return {
        "registers": registers,
        "stack": stack,
        "shared": made.metadata.shared,
        "wgmma": made.asm["ptx"].count("wgmma.mma_async"),
        "mma": made.asm["ptx"].count("mma.sync"),
    }


def _kind(name: str) -> str:
    return "*fp32" if name in FLOATS else "*fp16"


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers a thread, bytes of stack), by the cuobjdump that Triton brings; (-1, -1) if it brings none."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        return -1, -1
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
    match = re.search(r"REG:(\d+) STACK:(\d+)", text)
    return (int(match[1]), int(match[2])) if match else (-1, -1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one candidate a kernel, the smallest size")
    parser.add_argument("--capability", type=int, default=90, help="compute capability: 90 Hopper, 80 Ampere, 89 Ada")
    args = parser.parse_args()
    failures, seen = 0, set()
    print(f"{'kernel':<24} {'candidate':<34} {'regs':>5} {'stack':>6} {'shared':>7} {'wgmma':>6} {'mma':>5}")
    for name, kernel, known in cases():
        if args.quick and kernel in seen:
            continue
        seen.add(kernel)
        configs = getattr(kernel, "configs", [triton.Config({})])
        for config in configs[:1] if args.quick else configs:
            tried = ", ".join(f"{k} {v}" for k, v in config.kwargs.items())
            label = f"{tried}{', ' if tried else ''}{config.num_warps} warps, {config.num_stages} stages"
            try:
                got = compile_one(
                    getattr(kernel, "fn", kernel) if hasattr(kernel, "configs") else kernel,
                    known | config.kwargs, config.num_warps, config.num_stages, args.capability,
                )  # fmt: skip
                print(
                    f"{name:<24} {label:<34} "
                    + " ".join(f"{v:>{w}}" for v, w in zip(got.values(), WIDTHS, strict=True))
                )
            except Exception as error:
                failures += 1
                print(f"{name:<24} {label:<34} {type(error).__name__}: {str(error).splitlines()[0][:80]}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
