"""``sd-hyena convert IN -o OUT``."""

from __future__ import annotations

import argparse
from typing import Any

from ..targets import parse_names
from .output import HELP, check_out, write_out

DTYPES = ("float32", "float16", "bfloat16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="a Hyena file of ours or of the 2024 sd-hyena, a folder or a hub id")
    parser.add_argument("-o", "--out", required=True, help=HELP)
    parser.add_argument("-t", "--target", default="", help="layers to keep; or the name of one that has none")
    parser.add_argument("--dtype", choices=DTYPES, help="type of the weights (default: as they are)")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")


def run(args: dict[str, Any]) -> int:
    if args["target"]:
        parse_names(args["target"])
    out = check_out(args["out"], args["overwrite"])

    from .. import combine
    from ..checkpoint import load

    file = load(args["file"])
    if args["target"]:
        file = combine.select_layers(file, args["target"])
    combine.require_names(file)
    if args["dtype"]:
        import torch

        file = combine.cast(file, getattr(torch, args["dtype"]))
    write_out(out, file, args["overwrite"])
    return 0
