"""Commands with one fault each. On every one of them a part of the campaign must fire, or it proves nothing."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from pathlib import Path

RESULT = Path("out/sheet.png")
HALF = b"1234567890" * 500


def faultless(argv: list[str]) -> int:
    """Writes its result as it should, refuses to replace another, and finishes before it obeys a signal."""
    asked: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: asked.append(number))
    status = _write(argv, HALF + HALF)
    if asked and not status:
        print("sd-hyena: stopped; the result is kept", file=sys.stderr)
        return 128 + asked[0]
    return status


def _write(argv: list[str], data: bytes) -> int:
    replace = "--overwrite" in argv
    if RESULT.exists() and not replace:
        return _refuse()
    temporary = RESULT.with_name(".sd-hyena.x.tmp" if not replace else f".sd-hyena.{os.getpid()}.tmp")
    try:
        RESULT.parent.mkdir(exist_ok=True)
        if replace:
            RESULT.with_name(".sd-hyena.x.tmp").unlink(missing_ok=True)
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            (os.replace if replace else os.link)(temporary, RESULT)
        finally:
            temporary.unlink(missing_ok=True)
    except FileExistsError:
        return _refuse()
    except OSError as error:
        print(f"sd-hyena: {RESULT}: cannot write: {error.strerror}", file=sys.stderr)
        return 1
    return 0


def half_writes(argv: list[str]) -> int:
    """Opens its result by its name."""
    if RESULT.exists() and "--overwrite" not in argv:
        return _refuse()
    RESULT.parent.mkdir(exist_ok=True)
    with open(RESULT, "wb") as file:
        for half in (HALF, HALF):
            file.write(half)
            file.flush()
    return 0


def forgets(argv: list[str]) -> int:
    """Takes what a killed run began for done."""
    begun = RESULT.with_name(".begun-lock")
    if begun.exists():
        return 0
    begun.parent.mkdir(exist_ok=True)
    begun.touch()
    return faultless(argv)


def swallows(argv: list[str]) -> int:
    """Says nothing of a disk that is full."""
    with contextlib.suppress(OSError):
        half_writes([*argv, "--overwrite"])
    return 0


def tramples(argv: list[str]) -> int:
    """Replaces what is there, whoever's it is."""
    return _write([*argv, "--overwrite"], HALF + str(os.getpid()).encode())


def dies(argv: list[str]) -> int:
    """Is ended by a signal wherever it is."""
    return _write(argv, HALF)


def waits(argv: list[str]) -> int:
    """Waits for another process that may never come."""
    faultless(argv)
    if os.environ.get("RANK") == "1":
        time.sleep(600)
    return 0


def _refuse() -> int:
    print(f"sd-hyena: {RESULT} exists: give --overwrite", file=sys.stderr)
    return 2
