"""Runs parts of the campaign, a few at a time, each in a process of its own."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from . import page
from .report import Report
from .scene import STAGE

ROOT = Path(__file__).parent.parent
# The file of each part, which has run(report, scale, seed) and may have RESULTS; the long ones first.
PARTS = {
    "kills": "kills",
    "signals": "signals",
    "disks": "disks",
    "folders": "folders",
    "pairs": "pairs",
    "ranks": "ranks",
    "demo": "demo",
    "hyena": "hyena_files",
    "recipes": "recipes",
    "prepared": "prepared",
    "pictures": "pictures",
    "pickles": "pickles",
    "models": "models",
    "options": "options",
    "trouble": "trouble",
    "network": "network",
}
LIMIT = 1800  # seconds for one part
WELL = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONHASHSEED": "0"}
RUNNING: set[int] = set()  # processes of parts, which lead their sessions


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m faults", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"any of {', '.join(PARTS)}; all unless given")
    parser.add_argument("--scale", type=float, default=1.0, help="how many trials, as a part of the full count")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, metavar="N", help="trial N alone")
    parser.add_argument("--jobs", type=int, default=3, help="parts at a time: on two cores, one of three mostly waits")
    parser.add_argument("--no-page", action="store_true", help="leave docs/faults.md as it is")
    parser.add_argument("--record", type=Path, help=argparse.SUPPRESS)  # a part's own process
    args = parser.parse_args(argv)
    unknown = [part for part in args.parts if part not in PARTS]
    if unknown:
        parser.error(f"no such part: {', '.join(unknown)}")
    whole = not args.parts and args.only is None
    if not (whole or args.no_page or args.record):
        parser.error("docs/faults.md is written from the whole campaign alone: give --no-page")
    if args.record:
        run_part(args.parts[0], args.scale, args.seed, args.only).write(args.record)
        return 0
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    began = time.monotonic()
    report = run_parts(args.parts or list(PARTS), args.scale, args.seed, args.only, args.jobs)
    for line in report.kinds():
        print(f"FAILED {line}")
    for what, why in report.skipped.items():
        print(f"not tried: {what}: {why}")
    print(f"{sum(row.tried for row in report.rows.values())} tried, {report.failures} failed")
    if not args.no_page:
        page.PAGE.write_text(page.page(report, args.scale, time.monotonic() - began))
    return 1 if report.failures else 0


def run_parts(parts: list[str], scale: float, seed: int, only: int | None = None, jobs: int = 2) -> Report:
    """All parts' results together, each from a process of its own."""
    report = Report(seed)
    with tempfile.TemporaryDirectory(prefix="faults-") as stage, ThreadPoolExecutor(jobs) as pool:
        for each in pool.map(lambda part: _in_a_process(part, scale, seed, only, stage), parts):
            report.add(each)
    return report


def run_part(part: str, scale: float, seed: int, only: int | None = None) -> Report:
    """One part in this process. An exception of the part's own is a failure too."""
    report = Report(seed, part, only)
    start = time.monotonic()
    try:
        importlib.import_module(f"faults.{PARTS[part]}").run(report, scale, seed)
    except Exception:
        lines = traceback.format_exc().strip().splitlines()
        report.verdict((), f"the campaign itself: {part}", " ".join(lines[-3:]), report.again(only))
    report.seconds[part] = time.monotonic() - start
    return report


def _in_a_process(part: str, scale: float, seed: int, only: int | None, stage: str) -> Report:
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        record = Path(folder) / "record.json"
        words = [part, "--scale", str(scale), "--seed", str(seed), "--record", str(record)]
        words += [] if only is None else ["--only", str(only)]
        # What a part leaves behind goes with its folder; what it starts, with its session.
        environment = os.environ | WELL | {"TMPDIR": folder, "SD_HYENA_CACHE": f"{folder}/cache", STAGE: stage}
        child = subprocess.Popen(
            [sys.executable, "-m", "faults", *words], cwd=ROOT, env=environment, start_new_session=True
        )
        RUNNING.add(child.pid)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(LIMIT)
        RUNNING.discard(child.pid)
        _kill(child.pid)
        child.wait()
        if record.exists():
            report = Report.read(record)
            print(f"{part}: {report.seconds[part]:.0f} s, {report.failures} failed", flush=True)
            return report
    report = Report(seed, part, only)
    what = f"the campaign itself: {part}"
    report.verdict((), what, f"ended with {child.returncode} and no results", report.again(only))
    return report


def _kill(*sessions: int) -> None:
    for session in sessions:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(session, signal.SIGKILL)


def _stop(number: int, frame: object) -> None:
    _kill(*RUNNING)
    os._exit(128 + number)


if __name__ == "__main__":
    raise SystemExit(main())
