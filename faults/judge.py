"""What a good ending of a command is."""

from __future__ import annotations

import fnmatch
import hashlib
import os
import re
import stat
from collections.abc import Collection, Mapping
from pathlib import Path

LINE = 1000  # characters that an error line may have
# What only a library, or Python, says: of no use to a user, or advice that lets strangers in.
RAW = re.compile(
    r"Traceback \(most recent call last\)|weights_only|trust_remote_code|_target_device|\(--debug shows where\)"
    r"|no message|enforce fail|(?i:please (?:file|open|report))|object at 0x[0-9a-f]+|\[Errno \d+\]|<class '"
    r"|\bTORCH_[A-Z_]+|Exception in thread|core dumped|DefaultCPUAllocator|NoneType"
)
DIRECTIONS = re.compile(
    "[\u202a-\u202e\u2066-\u2069\u200e\u200f\u061c\u2028\u2029]"
)  # they reorder or break what is read
OURS = re.compile(r"(^|/)\.sd-hyena\.[^/]*\.tmp(/|$)")  # a temporary file that a command may clean up
TEMPORARY = re.compile(r"(^|/)\.[^/]*\.tmp(/|$)")


def judge(
    status: int | None,
    stdout: str,
    stderr: str,
    seconds: float,
    files_before: Mapping[str, str] | None = None,
    files_after: Mapping[str, str] | None = None,
    *,
    allowed: Collection[int] = (0, 1, 2),
    limit: float = 30.0,
    names: Collection[str] = (),
    writes: Collection[str] = (),
    stray: bool = False,
    refused: bool = False,
) -> str:
    """What is wrong with how a command ended; "" if nothing is.

    ``status``: None for one that had to be killed after its time, negative for one that a signal ended. ``names``:
    a failure's last line must hold one of them. ``files_before`` and ``files_after``: of :func:`files_in`; what was
    there must be there still, unchanged but for what one of the patterns ``writes`` matches. ``stray``: temporary
    files may be left. ``refused``: what was asked for must not be done.
    """
    if status is None or seconds > limit:
        return f"hang: {seconds:.1f} s, {limit:.0f} are allowed"
    said = f"said: {stderr.strip()[-300:]}"
    if status not in allowed:
        return f"exit status {status}, not one of {', '.join(map(str, sorted(allowed)))}; {said}"
    if refused and status not in (1, 2):
        return f"silent: exit status {status} for what has to be refused; stdout: {stdout.strip()[:200]}; {said}"
    return (
        words(stdout, stderr, failed=status in (1, 2), names=names)
        or (losses(files_before or {}, files_after, writes) if files_after is not None else "")
        or (strays(files_before or {}, files_after or {}) if not stray else "")
    )


def words(stdout: str, stderr: str, failed: bool, names: Collection[str] = ()) -> str:
    """What is wrong with what a command said."""
    for kind, text in (("stdout", stdout), ("stderr", stderr)):
        raw = RAW.search(text)
        if raw:
            return f"raw words {raw.group()!r} on {kind}: {text.strip()[-300:]}"
        control = unprintable(text)
        if control:
            return f"control character {control} on {kind}: {text.strip()[-300:]!a}"
    lines = stderr.splitlines()
    alien = next((line for line in lines if not line.startswith("sd-hyena: ")), None)
    if alien is not None:
        return f"raw line on stderr: {alien[:300]}"
    if not failed:
        return ""
    if not lines:
        return f"silent: a failure without a word; stdout: {stdout.strip()[-200:]}"
    if len(lines[-1]) > LINE:
        return f"a message of {len(lines[-1])} characters: {lines[-1][:200]}"
    if len(lines[-1]) < len("sd-hyena: ") + 10:
        return f"no message: {lines[-1]}"
    if names and not any(name in lines[-1] for name in names):
        return f"unnamed: none of {', '.join(names)} in: {lines[-1]}"
    return ""


def unprintable(text: str) -> str:
    """The first character that a terminal would obey rather than show, as Python writes it; "" if there is none."""
    for char in text:
        if (ord(char) < 32 and char not in "\n\t") or 127 <= ord(char) < 160 or DIRECTIONS.match(char):
            return ascii(char)
    return ""


def files_in(folder: Path | str) -> dict[str, str]:
    """By path within a folder: what a file holds (a digest), where a link leads, or what else is there."""
    found: dict[str, str] = {}
    for where, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = Path(where, name)
            mode = path.lstat().st_mode
            if stat.S_ISREG(mode):
                held = hashlib.sha256(path.read_bytes()).hexdigest()
            else:
                held = f"link to {os.readlink(path)}" if stat.S_ISLNK(mode) else f"kind {stat.S_IFMT(mode):o}"
            found[str(path.relative_to(folder))] = held
    return found


def losses(before: Mapping[str, str], after: Mapping[str, str], writes: Collection[str] = ()) -> str:
    """What was there and is gone, or another now without leave."""
    for path, held in before.items():
        if path not in after and not OURS.search(path):
            return f"lost: {path}"
        if path in after and after[path] != held and not any(fnmatch.fnmatch(path, each) for each in writes):
            return f"overwritten: {path}"
    return ""


def strays(before: Mapping[str, str], after: Mapping[str, str]) -> str:
    """A temporary file that was left."""
    return next((f"left behind: {path}" for path in after if path not in before and TEMPORARY.search(path)), "")
