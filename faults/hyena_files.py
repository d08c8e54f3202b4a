"""Mutated Hyena files, ours and those of 2024, in every command that reads them, and attached to a UNet."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from . import child, hostile, tensor_files
from .report import Report

COUNT = 2000
LIMIT = 5.0  # seconds for one file
HALF, NOT_FINITE, UNREADABLE, NO_JSON = 11, 12, 13, 14  # exit statuses of what is wrong with a trial that says nothing
WRONG = {
    HALF: "half patched: the file was refused, but the UNet is not what it was",
    NOT_FINITE: "not finite: what was attached holds NaN or infinity",
    UNREADABLE: "unreadable: what was written cannot be read",
    NO_JSON: "no JSON: --json printed something else",
}
KINDS = ("near", "linear", "windows", "long", "causal", "states", "states")  # of the layers of a file


def run(report: Report, scale: float, seed: int) -> None:
    from sd_hyena.families import DEMO_DIR

    with tempfile.TemporaryDirectory(prefix="faults-") as place:
        folder = Path(place)
        unet = make_unet()
        whole = hyena_file(unet, folder / "sound.safetensors")
        golden = Path(__file__).parent.parent / "tests" / "golden"
        one = golden / "legacy_IN01_64px.safetensors"
        sound = [whole, whole, whole, one.read_bytes()]
        work = partial(attached, unet)
        for number in report.numbers(COUNT * scale):
            random = report.random(number)
            data = random.choice(sound)
            what, wrong = one_trial(random, data, data is whole, folder, work, DEMO_DIR)
            report.verdict((1, 2, 4, 5), what, wrong, report.again(number))


def one_trial(
    random: Random, data: bytes, ours: bool, folder: Path, attach: Callable[[Path], int], teacher: Path
) -> tuple[str, str]:
    """What was tried, and what is wrong with how it ended."""
    path = folder / "x.safetensors"
    options: dict[str, Any] = {"limit": LIMIT, "names": ["x.safetensors"]}
    group = random.random()
    if group < 0.03:
        kind, options["refused"] = random.choice(hostile.IN_PLACE), True
        hostile.put_in_place(path, kind)
        what = "Hyena files: something else in their place"
    elif group < 0.4:
        kind, damaged = hostile.damaged(data, random)
        path.write_bytes(damaged)
        what = f"Hyena files: {kind}"
        options["refused"] = kind in ("another format", "noise") or len(damaged) != len(data)
    else:
        kind, changed, options["refused"] = tensor_files.mutated(data, random)
        if not ours:
            options["refused"] &= kind not in ("a tensor renamed", "a key of the metadata twice")
        path.write_bytes(changed)
        what = f"Hyena files: {kind}"
    out = folder / "out.safetensors"
    ways: list[Callable[[], int | None]] = [
        *[partial(attach, path)] * 4,
        child.command(["info", str(path)]),
        partial(_info_json, path),
        partial(
            _written, ["convert", str(path), "-o", str(out), "--dtype", random.choice(("float16", "float32"))], out
        ),
        partial(_written, ["merge", str(path), str(folder / "sound.safetensors"), "-o", str(out)], out),
        child.command(
            ["generate", "-m", "demo", "-p", "x", "-y", str(path), "-o", str(folder / "pictures")], load=False
        ),
        child.command(["evaluate", "-m", "demo", "-y", str(path), "-o", str(folder / "tables")], load=False),
        child.command(["train", "-m", "demo", "-p", str(path), "-o", str(folder / "run")], load=False),
    ]
    way = random.randrange(len(ways))
    if way >= 7 and not options["refused"]:
        options["names"] = []  # it may be about what the file is for
    ending = child.call(ways[way], LIMIT)
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    else:
        path.unlink()
    out.unlink(missing_ok=True)
    if ending.status in WRONG:
        return what, f"{WRONG[ending.status]}; {ending.stderr[-200:]}"
    return what, child.judged(ending, **options)


def attached(unet: Any, path: Path) -> int:
    """Attaches a file, or says in a line why not; the UNet must be whole or as it was."""
    from sd_hyena import attached as layers_of
    from sd_hyena import load_hyena
    from sd_hyena.errors import SdHyenaError, UsageError
    from sd_hyena.texts import one_line

    child.say()
    before = _state(unet)
    try:
        names = load_hyena(unet, path)
    except (SdHyenaError, UsageError) as error:
        print(f"sd-hyena: {one_line(str(error))}", file=sys.stderr)
        return HALF if _state(unet) != before else 1
    if set(layers_of(unet)) != set(names):
        return HALF
    return 0 if all(weight.isfinite().all() for weight in unet.state_dict().values()) else NOT_FINITE


def _state(unet: Any) -> list[tuple[str, int]]:
    return [(name, id(module)) for name, module in unet.named_modules()] + [
        (name, id(value)) for name, value in unet.attn_processors.items()
    ]


def _info_json(path: Path) -> int:
    """``info --json``, whose output must be JSON."""
    import contextlib
    import io

    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        status = child.command(["info", "--json", str(path)])()
    try:
        if not status:
            json.loads(said.getvalue(), parse_constant=lambda name: json.loads("no JSON"))
    except ValueError:
        return NO_JSON
    return status


def _written(argv: list[str], out: Path) -> int:
    """A command that writes a Hyena file, which must be one that is read."""
    from sd_hyena import checkpoint
    from sd_hyena.errors import CheckpointError

    status = child.command(argv)()
    if not status:
        try:
            checkpoint.load(out)
        except CheckpointError as error:
            print(error, file=sys.stderr)
            return UNREADABLE
    return status


def make_unet() -> Any:
    """A tiny UNet with SD1.x's block types."""
    import torch
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"block_out_channels": (8, 16, 16, 16), "norm_num_groups": 4, "layers_per_block": 1}
    widths = {"sample_size": 16, "cross_attention_dim": 8, "attention_head_dim": 2}
    return UNet2DConditionModel(**sizes, **widths).eval().requires_grad_(False)


def hyena_file(unet: Any, path: Path) -> bytes:
    """Writes a Hyena file for that UNet, with an operator of every kind; returns what is in it."""
    import torch

    from sd_hyena import checkpoint
    from sd_hyena.hyena_file import Origin, gather
    from sd_hyena.nn import OperatorConfig, build
    from sd_hyena.targets import find_targets

    torch.manual_seed(0)
    operators = {}
    for kind, (name, target) in zip(KINDS, find_targets(unet).items(), strict=False):
        height, width = target.grid((16, 16))
        config = OperatorConfig(
            dim=target.dim, height=height, width=width, operator=kind, attention_heads=target.heads,
            block=4 if kind in ("windows", "states") else 8, hyena_filter_order=8,
        )  # fmt: skip
        operators[name] = build(config)
    origin = Origin({"relative_error": 0.5, "cosine": 0.9}, {"model": "a model", "sample": [0.5, 1.0]}, {"steps": 7})
    checkpoint.write(path, gather(operators, dict.fromkeys(operators, origin)))
    return path.read_bytes()
