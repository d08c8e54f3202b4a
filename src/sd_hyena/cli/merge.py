"""``sd-hyena merge A B ... -o OUT``."""

from __future__ import annotations

import argparse
from typing import Any

from ..errors import UsageError
from .output import HELP, check_out, write_out


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE", help="Hyena files, folders or hub ids, two or more")
    parser.add_argument("-o", "--out", required=True, help=HELP)
    parser.add_argument("--prefer", choices=("first", "last"), default="", help="of a layer that is in several files")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")


def run(args: dict[str, Any]) -> int:
    if len(args["files"]) < 2:
        raise UsageError("merge takes two or more Hyena files; 'sd-hyena convert' takes one")
    out = check_out(args["out"], args["overwrite"])

    from ..checkpoint import load
    from ..combine import merge

    write_out(out, merge([load(name) for name in args["files"]], args["prefer"]), args["overwrite"])
    return 0
