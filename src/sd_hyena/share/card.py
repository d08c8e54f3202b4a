"""The model card of a folder of Hyena layers: front matter for the hub, and a page for people."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

from ..families import DEMO
from ..hyena_file import HyenaFile
from ..sources import is_repo_id
from ..texts import in_markdown

# As transformers has it: who edits the card takes this line out, and the card is theirs.
MARK = "<!-- Written by sd-hyena. Take this line out when you edit the card, and it will not be written again. -->"
TAGS = ["sd-hyena", "hyena", "stable-diffusion", "distillation", "diffusers"]


def front_matter(card: str) -> dict[str, Any]:
    """What a card says to the hub; empty if that cannot be read."""
    from huggingface_hub import ModelCard

    if not card.lstrip().startswith("---"):
        return {}
    try:
        return ModelCard(card, ignore_metadata_errors=True).data.to_dict()
    except Exception:  # YAML's errors are many
        return {}


def model_card(
    file: HyenaFile, name: str, *, base_model: str = "", license: str = "", sheet: str = "", known: str = ""
) -> str:
    """The card's text.

    Args:
        name: what the layers are loaded by, a hub id or folder.
        base_model: hub id of the model that taught them; unless given, the one that the records name, if they do.
        sheet: file name of a picture of samples, above attention, below Hyena.
        known: an earlier card, whose front matter is kept.
    """
    from huggingface_hub import ModelCardData

    earlier = front_matter(known)
    taught_by = str(file.origin(next(iter(file.layers))).training.get("teacher_model", ""))
    base_model = base_model or earlier.get("base_model", "") or _hub_id(taught_by)
    license = license or earlier.get("license", "")
    tags = list(dict.fromkeys([*(earlier.get("tags") or []), *TAGS]))
    ours = {"library_name": "sd-hyena", "tags": tags, "base_model": base_model or None, "license": license or None}
    data = ModelCardData(ignore_metadata_errors=True, **earlier | ours)
    count = len(file.layers)
    base = base_model[0] if isinstance(base_model, list) else base_model
    parts = [
        f"---\n{data.to_yaml()}\n---",
        MARK,
        f"# Hyena layers{f' for {in_markdown(base)}' if base else ''}",
        "Self-attention of a Stable Diffusion UNet as Hyena operators, taught by the original with sd-hyena: "
        f"{count} layer{'s' if count > 1 else ''}.",
    ]
    if sheet:
        parts.append(f"![samples]({sheet})\n\n*Above attention, below these layers; same prompts and seeds.*")
    model = DEMO if taught_by == DEMO and not base else base
    parts += ["## Use", _use(file, name, model), "## Layers", _layers(file), "## Training", _training(file)]
    if not license:
        stated = "None is stated: whoever shares these layers adds one, minding that of the model that taught them."
        parts += ["## Licence", stated]
    return "\n\n".join(parts) + "\n"


def _hub_id(model: str) -> str:
    """The hub id that a training record names as its teacher, or ""."""
    file = model.lower().endswith((".safetensors", ".ckpt"))
    return model if is_repo_id(model) and not file and not Path(model).exists() else ""


def _use(file: HyenaFile, name: str, model: str) -> str:
    kind = str(file.origin(next(iter(file.layers))).teacher.get("class", ""))
    kind = kind if re.fullmatch(r"\w+Pipeline", kind) else "DiffusionPipeline"
    lines = ["```python", "import sd_hyena", f"from diffusers import {kind}"]
    if model == DEMO:
        lines += ["from sd_hyena.models import DEMO_DIR", "", f"pipe = {kind}.from_pretrained(DEMO_DIR)"]
    else:
        lines += ["", f"pipe = {kind}.from_pretrained({json.dumps(model or 'MODEL')})"]
    lines += [
        f"sd_hyena.load_hyena(pipe, {json.dumps(name)})",
        "```",
        "",
        "```bash",
        f'sd-hyena generate -m {shlex.quote(model or "MODEL")} -y {shlex.quote(name)} -p "a fox"',
        "```",
    ]
    which = [] if model else ["MODEL is the model that taught them, or one made from it.", ""]
    return "\n".join(which + lines)


def _layers(file: HyenaFile) -> str:
    rows = []
    for layer, info in file.layers.items():
        c, f = info.config, info.figures
        parameters = sum(t.numel() for t in file.tensors[layer].values())
        figures = [f"{f[key]:.4f}" if key in f else "-" for key in ("relative_error", "cosine")]
        rows.append([layer, c.label, c.dim, f"{c.height}x{c.width}", f"{parameters:,}", *figures])
    headings = ["layer", "operator", "channels", "trained grid", "parameters", "held-out error", "cosine"]
    noise = any(file.origin(layer).training.get("measure_on") == "noise" for layer in file.layers)
    seen = "noise, which pictures are not," if noise else "latents that were not learned from,"
    note = f"Errors are relative, on {seen} as training measured them at its end; 1 is that of a constant."
    return f"{_table(headings, rows, words=2)}\n\n{note}"


def _training(file: HyenaFile) -> str:
    """A row for each record, with the layers that share it. Nothing that names files of whoever trained them."""
    records: dict[str, list[str]] = {}
    for layer in file.layers:
        origin = file.origin(layer)
        t = origin.training
        taught = " ".join(str(origin.teacher.get(key, "")) for key in ("class", "widths", "attention_sha256"))
        size = f"{t['width']}x{t['height']}" if "width" in t and "height" in t else "-"
        updates, seed = t.get("step", t.get("global_step", "-")), t.get("seed", t.get("train_seed", "-"))  # or of 2024
        cells = [updates, t.get("batch_size", "-"), t.get("lr") or "-", size, seed, taught.strip() or "-"]
        records.setdefault(json.dumps(cells, default=str), []).append(layer)
    rows = [[", ".join(layers) if len(records) > 1 else "all", *json.loads(cells)] for cells, layers in records.items()]
    return _table(["layers", "updates", "batch", "learning rate", "px", "seed", "taught by"], rows, words=1)


def _table(headings: list[str], rows: list[list[Any]], words: int) -> str:
    rule = ["---"] * words + ["---:"] * (len(headings) - words)
    return "\n".join(f"| {' | '.join(map(in_markdown, row))} |" for row in (headings, rule, *rows))
