"""Text from outside: what a word of the command line or a recipe may hold, and how files of text are read."""

from __future__ import annotations

import codecs
import functools
import logging
import re
import stat
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from .errors import UsageError

_OTHER_ENCODINGS = {
    codecs.BOM_UTF32_LE: "UTF-32",  # before UTF-16, whose mark it starts with
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
# Weights, cuts, extra networks, changes on the way.
_A1111 = re.compile(
    r"\([^()]*:\s*-?\d*\.?\d+\s*\)|\bBREAK\b|<(?:lora|lyco|hypernet):[^<>]*>|\[[^\[\]]*:\s*\d*\.?\d+\s*\]"
)
logger = logging.getLogger(__name__)


def check_text(what: str, text: str) -> None:
    """Raises UsageError for bytes that are not UTF-8, and for control characters other than white space."""
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise UsageError(
            f"{what} {text!a} has bytes that are not UTF-8: give it as UTF-8 (a file or folder: rename it, "
            "or name a link to it)"
        )
    control = _control(text)
    if control:
        raise UsageError(f"{what} {text!a} has the control character {control!a}: leave it out")


def shortened(text: str, width: int = 80) -> str:
    """The text, or its beginning and end with dots between, for messages."""
    return text if len(text) <= width else f"{text[: width - 23]}...{text[-20:]}"


def size_in(text: str) -> tuple[int, int] | None:
    """``128x96``, ``128×96`` or ``128*96`` -> (128, 96); None for anything else."""
    match = re.fullmatch(r"\s*(\d{1,6})\s*[xX×*]\s*(\d{1,6})\s*", text)
    return (int(match[1]), int(match[2])) if match else None


def warn_of_syntax(what: str, prompts: Iterable[str]) -> None:
    """Says in one line which of A1111's signs there are in prompts, where they mean nothing."""
    found = dict.fromkeys(match[0] for prompt in prompts for match in _A1111.finditer(prompt))
    if found:
        _say_literal(what, ", ".join(shortened(sign, 50) for sign in list(found)[:3]), len(found) > 3)


@functools.cache
def _say_literal(what: str, signs: str, more: bool) -> None:
    logger.warning("%s: %s%s: drawn literally, as words: A1111's signs are not read", what, signs, " ..." * more)


def read_text(path: Path, what: str) -> str:
    """A UTF-8 file's text, with newlines alone as line ends and without byte order marks.

    ``what`` names the file's role in messages. Raises UsageError for a file that cannot be read, is not a regular
    one (a pipe can be read but once), or is not plain UTF-8 text.
    """
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            kind = "a folder" if stat.S_ISDIR(mode) else "a pipe or device: write its text to a file"
            raise UsageError(f"{what} {path}: cannot be read: it is {kind}")
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{what} {shortened(str(path))}: cannot be read: {error.strerror}") from None
    for mark, name in _OTHER_ENCODINGS.items():
        if data.startswith(mark):
            raise UsageError(f"{what} {path}: is {name} text: save it as UTF-8")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UsageError(f"{what} {path}: line {line} is not UTF-8 text (Latin-1?): save the file as UTF-8") from None
    # Marks stay inside files that were joined from several.
    text = text.replace("\ufeff", "").replace("\r\n", "\n").replace("\r", "\n")
    control = _control(text)
    if control:
        line = text.count("\n", 0, text.index(control)) + 1
        raise UsageError(f"{what} {path}: line {line} has the control character {control!a}: save it as UTF-8 text")
    return text


def _control(text: str) -> str:
    """The first control character that is not white space, or ""."""
    return next((c for c in text if unicodedata.category(c) == "Cc" and not c.isspace()), "")
