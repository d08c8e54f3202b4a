"""``sd-hyena targets -m MODEL``."""

from __future__ import annotations

import argparse
import logging
from typing import Any

from .. import strict_json
from ..errors import UsageError

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-m", "--model", required=True, help="demo, a diffusers folder, a single file, a hub id")
    parser.add_argument("-W", "--width", type=int, help="image width in px (default: the model's own)")
    parser.add_argument("-H", "--height", type=int, help="image height in px (default: the model's own)")
    parser.add_argument("--variant", default="", help="weights of a folder or hub id to take, such as fp16")
    parser.add_argument("--json", action="store_true", help="machine-readable output")


def run(args: dict[str, Any]) -> int:
    from ..models import check_size, locate

    source = locate(args["model"], args["variant"], whole=False)
    check_size(source.name, *(8 if args[side] is None else args[side] for side in ("width", "height")))

    from ..flops import Cost, step_flops
    from ..targets import find_targets, select

    unet = _unet(source, say=not args["json"])
    native = unet.config.sample_size or 64
    sides = zip(("height", "width"), native if isinstance(native, list | tuple) else (native, native), strict=True)
    height, width = (cells * 8 if args[side] is None else args[side] for side, cells in sides)
    latent = (height // 8, width // 8)
    targets = find_targets(unet)
    total, costs = 0, dict[str, Cost]()
    try:
        total, costs = step_flops(unet, latent)
    except UsageError as error:  # whoever asks for names still gets them
        logger.warning("model %s: names and sizes without costs: %s", source.name, error)
    high = {target.name for target in select(targets, "high")}
    rows = []
    for name, target in targets.items():
        h, w = target.grid(latent)
        cost = costs.get(name)
        rows.append(
            {
                "name": name,
                "groups": ["all", "high"] if name in high else ["all"],
                "path": target.path,
                "ldm_key": target.ldm_key,
                "channels": target.dim,
                "heads": target.heads,
                "grid": [h, w],
                "tokens": h * w,
                "flops": cost and cost.attention,
                "quadratic_flops": cost and cost.quadratic,
                "share": cost and cost.attention / total,
                "quadratic_share": cost and cost.quadratic / total,
            }
        )
    report = {"model": source.name, "width": width, "height": height, "flops": total or None, "targets": rows}
    if args["json"]:
        from ..flops import COUNTED

        print(strict_json.dumps(report | {"counted": COUNTED}, "targets", 2))
    else:
        _print(report)
    return 0


def _unet(source: Any, say: bool) -> Any:
    """The UNet on the meta device, read only where its configuration is not at hand."""
    from ..models import load_pipeline, unet_skeleton
    from .display import phase

    skeleton = unet_skeleton(source)
    if skeleton is None:
        if say:
            phase(f"loading {source.name}")
        skeleton = load_pipeline(source).unet.to("meta")
    return skeleton


def _print(report: dict[str, Any]) -> None:
    from ..evaluate.tables import Table
    from ..flops import COUNTED
    from .display import console, print_tables

    rows, total = report["targets"], report["flops"]
    groups = {"all": rows, "high": [row for row in rows if "high" in row["groups"]]}
    names = Table("where they are", "", ["layer", "in diffusers", "in LDM files, after model.diffusion_model."], [])
    costs = Table(
        f"{report['model']}: self-attention at {report['width']}x{report['height']} px",
        COUNTED,
        ["layer", "group", "channels", "heads", "grid", "tokens", *(["attn1", "quadratic"] if total else [])],
        [],
    )
    for row in rows:
        names.lines.append([row["name"], row["path"], row["ldm_key"].removeprefix("model.diffusion_model.")])
        h, w = row["grid"]
        size = [str(row["channels"]), str(row["heads"]), f"{h}x{w}", str(row["tokens"])]
        group = "high" if "high" in row["groups"] else ""
        costs.lines.append([row["name"], group, *size, *_shares([row])])
    for group, members in groups.items():
        costs.lines.append([group, "", "", "", "", str(sum(r["tokens"] for r in members)), *_shares(members)])
    print_tables([names, costs], left=[*names.headings, "group"])
    if total:
        console.print(f"shares of {total / 1e9:,.1f} GFLOP: {COUNTED}", soft_wrap=True)


def _shares(rows: list[dict[str, Any]]) -> list[str]:
    """Of a whole step, where that could be counted."""
    if rows[0]["share"] is None:
        return []
    return [f"{sum(row[key] for row in rows):.2%}" for key in ("share", "quadratic_share")]
