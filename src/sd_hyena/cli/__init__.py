"""The command line: parse, call, print. Heavy imports happen inside the commands, so ``--help`` is quick."""

from __future__ import annotations

import errno
import importlib
import logging
import os
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import __version__, extras, interrupts, processes
from ..errors import SdHyenaError, UsageError, is_out_of_memory
from ..ops import environment
from ..texts import check_text, one_line, reason, shortened
from .parser import Parser

COMMANDS = {
    "anatomy": "show what a model's self-attention looks like, and what could replace it",
    "prepare": "have a model make the data its students learn from",
    "train": "teach Hyena layers to do what a model's self-attention does",
    "generate": "draw pictures with any set of layers replaced",
    "ui": "open a local page that draws with attention and with Hyena layers side by side",
    "info": "print what a Hyena file holds",
    "targets": "list a model's self-attention layers and what they cost",
    "merge": "put the layers of several Hyena files into one",
    "convert": "write a Hyena file anew: 2024 files, other types, some layers, folders for the hub",
    "evaluate": "measure how far a student's pictures are from its teacher's",
    "benchmark": "time a Hyena layer against attention at growing sizes",
    "demo": "the whole story on the bundled model, with a report",
}
# What they need beyond the package's own dependencies.
NEEDS = {
    "anatomy": ("evaluate",),
    "train": ("train",),
    "evaluate": ("evaluate",),
    "benchmark": ("bench",),
    "demo": ("train", "evaluate", "bench"),
    "ui": ("ui",),
}
SHARED = ("prepare", "train", "generate")  # commands whose work several processes may share
PACKAGE = Path(__file__).parent.parent
COMMAND_LINE = "sd-hyena's command line"  # the name of its log handler
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch reads it on import, and warns past Python's log


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0 done, 1 failure, 2 usage, 128 + N ended by signal N."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = Parser(
        prog="sd-hyena",
        description="Hyena operators in place of Stable Diffusion's self-attention.",
        epilog="Every --long_name may also be written --long-name, or shortened while no other begins like it.",
    )
    parser.add_argument("--version", action="version", version=f"sd-hyena {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    chosen = parser
    asked = next((word for word in arguments if not word.startswith("-")), None)
    for name, summary in COMMANDS.items():
        sub = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if name == asked:  # the others' options are not needed, nor the imports behind their defaults
            chosen = sub
            sub.add_argument("--debug", action="store_true", help="show tracebacks")
            module = importlib.import_module(f".{name}", __name__)
            module.add_arguments(sub)
            sub.set_defaults(run=module.run)
    if not arguments:
        parser.print_help(sys.stderr)
        return 2
    known, unknown = parser.parse_known_args(arguments)
    if unknown:
        chosen.error(f"unrecognized arguments: {' '.join(unknown)}")
    args = vars(known)
    run, debug = args.pop("run"), args.pop("debug")
    command = args.pop("command")
    with interrupts.guarded_output(), interrupts.handled():
        return _run(command, run, args, debug)


def _run(command: str, run: Callable[[dict[str, Any]], int], args: dict[str, Any], debug: bool) -> int:
    _log_our_lines_alone()
    try:
        for name, value in args.items():
            if isinstance(value, str):
                check_text(name, value)
        environment.kernel()
        extras.require(f"sd-hyena {command}", *NEEDS.get(command, ()))
        with processes.speaking(command not in SHARED):
            return run(args)
    except interrupts.Interrupted as wish:
        if processes.here().is_main:
            print(f"sd-hyena: {one_line(str(wish))}", file=sys.stderr)
        return 128 + wish.number
    except KeyboardInterrupt:
        return 130
    except (UsageError, SdHyenaError) as error:
        if debug:
            raise
        _say(str(error) or type(error).__name__)
        return 2 if isinstance(error, UsageError) else 1
    except Exception as error:
        if debug:
            raise
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            _say(f"{shortened(str(error.filename))}: {error.strerror}")
            return 2
        if processes.lost(error):
            _say(processes.LOST)
            return 1
        _say(_unforeseen(error))
        return 1


def _say(line: str) -> None:
    line = one_line(line)
    if processes.first_to_say(line):
        print(f"sd-hyena: {line}", file=sys.stderr)


def _unforeseen(error: Exception) -> str:
    """What to say of an error that nobody has put into words."""
    kind, text = type(error).__name__, reason(error)
    if is_out_of_memory(error):
        return "out of memory: lower the size in px, the batch size or the pictures at a time"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {text}"
    places = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).is_relative_to(PACKAGE)]
    where = f" at {Path(places[-1].filename).relative_to(PACKAGE)}:{places[-1].lineno}" if places else ""
    return f"{kind}{where}{'' if text == kind else f': {text}'} (--debug shows where)"


class Lines(logging.Formatter):
    """A line for each record, and the traceback of one that has it."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return one_line(super().formatMessage(record))


def _is_to_be_said(record: logging.LogRecord) -> bool:
    """Not what several processes say alike, nor that they stop: torchrun has the others stop whenever one ends."""
    if record.name == interrupts.__name__ and processes.here().count > 1:
        return False
    return processes.first_to_say(record.getMessage())


def _log_our_lines_alone() -> None:
    """Our log goes to standard error, a line each; what libraries have to say goes nowhere."""
    threading.excepthook = lambda failed: logging.debug("in a thread", exc_info=failed.exc_value)
    logging.raiseExceptions = False  # a log that cannot be written
    logging.captureWarnings(True)  # of libraries: they go where their logs do
    ours, root = logging.getLogger("sd_hyena"), logging.getLogger()
    ours.setLevel(logging.INFO)
    for handler in [each for each in ours.handlers if each.name == COMMAND_LINE]:  # of an earlier call
        ours.removeHandler(handler)
    handler = logging.StreamHandler()
    handler.name = COMMAND_LINE
    handler.setFormatter(Lines("sd-hyena: %(message)s"))
    handler.addFilter(_is_to_be_said)
    ours.addHandler(handler)
    if not root.handlers:  # else Python prints warnings that nobody handles
        root.addHandler(logging.NullHandler())
    os.environ.setdefault("HF_HUB_VERBOSITY", "critical")  # it has a handler of its own, and sets its level on import
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
