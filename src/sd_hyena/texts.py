"""Text from outside: what a word of the command line or a recipe may hold, how files of text are read, and how any
text is shown."""

from __future__ import annotations

import codecs
import functools
import logging
import re
import stat
from collections.abc import Iterable
from pathlib import Path

from .errors import UsageError

_OTHER_ENCODINGS = {
    codecs.BOM_UTF32_LE: "UTF-32",  # before UTF-16, whose mark it starts with
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
# Weights, cuts, extra networks, changes on the way. A number is read in one way alone, else long ones take for ever.
_NUMBER = r"(?:\d+(?:\.\d+)?|\.\d+)"
_A1111 = re.compile(
    rf"\([^()]*:\s*-?{_NUMBER}\s*\)|\bBREAK\b|<(?:lora|lyco|hypernet):[^<>]*>|\[[^\[\]]*:\s*{_NUMBER}\s*\]"
)
MAX_PROMPT = 10_000  # characters: some 2,500 tokens, of which text encoders take 75 at a time
MAX_TEXT = 1 << 20  # bytes of a recipe or a caption
MAX_LIST = 1 << 25  # of a list of prompts
_CONTROLS = re.compile(r"[\0-\x08\x0e-\x1b\x7f-\x84\x86-\x9f]")  # but white space
# What moves a terminal's cursor, starts its commands, turns the order of what follows, or cannot be encoded.
_UNPRINTABLE = re.compile(
    "[\0-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
# A library's advice, which is for those who call it.
_ADVICE = re.compile(
    r"\w+_\w+ ?=|=(?:True|False)|\b(?:trust_remote_code|weights_only|allow_pickle|\w+_serialization|\w*safe_globals"
    r"|local_files_only|use_safetensors|low_cpu_mem_usage|from_(?:pt|tf|flax))\b"
    r"|\b(?:HF|TRANSFORMERS|DIFFUSERS|PYTORCH|TORCH\w*|CUDA_LAUNCH)_[A-Z_]+|\bpip3? install|https?://"
    r"|\b(?:[Pp]lease|[Mm]ake sure|[Tt]ry|[Cc]onsider|[Ii]nstall|[Ii]n order to)\b"
    r"|\b[Yy]ou(?:'d)? (?:can|could|should|may|might|must|need|have to|want)\b"
)
logger = logging.getLogger(__name__)


def printable(text: str, lines: bool = False) -> str:
    """The text with its control characters, those that turn the writing's direction, and lone surrogates as escapes;
    with ``lines``, newlines stay."""
    text = _UNPRINTABLE.sub(lambda match: ascii(match[0])[1:-1], text)
    return text if lines else text.replace("\n", "\\n")


def one_line(text: str, widest: int = 255) -> str:
    """A message as one printable line, words of more than ``widest`` characters shortened."""
    text = printable(" ".join(line.strip() for line in text.split("\n")).strip())
    return re.sub(rf"\S{{{widest + 1},}}", lambda match: shortened(match[0], widest), text)


def in_markdown(value: object) -> str:
    """Text from a file or a name in Markdown, as a table's cell too, where it says no more than itself."""
    text = printable(" ".join(str(value).split()))
    return re.sub(r"[\\`\[|]", r"\\\g<0>", text).replace("<", "&lt;")


def reason(error: BaseException) -> str:
    """What a library's exception says, in one line: without its advice, which is for those who call the library, and
    without what follows a first paragraph."""
    if isinstance(error, MemoryError):
        return "out of memory"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror
    elif isinstance(error, KeyError) and len(error.args) == 1:
        text = f"no {error.args[0]!r}"
    else:
        text = str(error)
    text = re.sub(r"<class '([\w.]+)'>", r"\1", text)
    text = re.split(r"\n\s*\n|\n?Exception raised from |\nTraceback ", text.strip())[0]
    said: list[str] = []
    for part in re.split(r"(?<=[.;!?])\s+|\n", text):
        advice = _ADVICE.search(part)
        if advice is None:
            said.append(part.strip())
        elif not any(said):  # else it says enough without
            before = part[: advice.start()]
            said.append(re.sub(r"[,;(][^,;(]*$", "", before).rstrip("`'\" "))
    return shortened(one_line(" ".join(filter(None, said))).strip(".,;:( "), 240) or type(error).__name__


def check_prompt(what: str, text: str) -> None:
    """Raises UsageError for a prompt of more characters than anybody means to give."""
    if len(text) > MAX_PROMPT:
        raise UsageError(f"{what}: is {len(text):,} characters long, but a prompt may have {MAX_PROMPT:,}")


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
    if line := literal_syntax(prompts):
        _say_once(f"{what}: {line}")


def literal_syntax(prompts: Iterable[str]) -> str:
    """The line that :func:`warn_of_syntax` says, or "" where there is nothing to say."""
    found = dict.fromkeys(match[0] for prompt in prompts for match in _A1111.finditer(prompt))
    signs = ", ".join(shortened(sign, 50) for sign in list(found)[:3])
    return f"{signs}{' ...' * (len(found) > 3)}: drawn literally, as words: A1111's signs are not read" if found else ""


@functools.cache
def _say_once(line: str) -> None:
    logger.warning("%s", line)


def read_text(path: Path, what: str, most: int = MAX_TEXT) -> str:
    """A UTF-8 file's text, with newlines alone as line ends and without byte order marks.

    ``what`` names the file's role in messages. Raises UsageError for a file that cannot be read, is not a regular
    one (a pipe can be read but once), has more than ``most`` bytes, or is not plain UTF-8 text.
    """
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            kind = "a folder" if stat.S_ISDIR(mode) else "a pipe or device: write its text to a file"
            raise UsageError(f"{what} {path}: cannot be read: it is {kind}")
        with path.open("rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        raise UsageError(f"{what} {shortened(str(path))}: cannot be read: {error.strerror}") from None
    if len(data) > most:
        raise UsageError(f"{what} {path}: is larger than {most / 2**20:g} MiB, which is no {what}")
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
    found = _CONTROLS.search(text)
    return found[0] if found else ""
