"""What a picture's file says of how it was drawn: the ``parameters`` text of A1111's web UI and of ours, and the
``prompt`` of ComfyUI. Imports no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import strict_json
from .errors import UsageError
from .picture_files import open_picture
from .texts import check_prompt, check_text, literal_syntax, shortened, size_in

# Names of samplers, without blanks, signs and case, and ours for them. Files of ours have diffusers' names, which do
# not tell the SDE form of DPM++ from the other.
_SAMPLERS = {
    "ddim": "ddim",
    "ddpm": "ddpm",
    "dpmsolvermultistep": "dpmpp_2m",
    "dpmpp2m": "dpmpp_2m",
    "dpm++2m": "dpmpp_2m",
    "dpmpp2msde": "dpmpp_2m_sde",
    "dpm++2msde": "dpmpp_2m_sde",
    "euler": "euler",
    "eulera": "euler_a",
    "eulerancestral": "euler_a",
    "eulerancestraldiscrete": "euler_a",
    "eulerdiscrete": "euler",
    "heun": "heun",
    "heundiscrete": "heun",
    "lcm": "lcm",
    "plms": "pndm",
    "pndm": "pndm",
    "tcd": "tcd",
    "unipc": "unipc",
    "unipcmultistep": "unipc",
}
_KARRAS = ("dpmpp_2m", "dpmpp_2m_sde")  # those that come with Karras's noise levels too
_FIELD = re.compile(r'\s*(\w[\w \-/]{0,60}):\s*("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')
_NUMBER = re.compile(r"\d{1,20}(\.\d{1,20})?")
_NEGATIVE = "Negative prompt:"
_MAX_TEXT = 1 << 22  # characters


@dataclass
class PictureSettings:
    """What there is in a file, by the names of :class:`.generate.settings.GenerateSettings`; numbers may be too large.
    ``layers``: Hyena layers of ``hyena``, a file's name, whose contents ``hyena_hash`` tells. ``notes``: what is left
    out, in lines."""

    values: dict[str, Any] = field(default_factory=dict)
    hyena: str = ""
    hyena_hash: str = ""
    layers: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_settings(path: Path) -> PictureSettings:
    """The settings in a picture's file. Raises UsageError, one line, for what is no picture, and for one without."""
    with open_picture(path, what="picture") as image:
        texts = {key: value for key, value in image.info.items() if isinstance(value, str)}
    if max(map(len, texts.values()), default=0) > _MAX_TEXT:
        raise UsageError(f"picture {path.name}: says more than {_MAX_TEXT >> 20} MiB of text: no settings are so long")
    if texts.get("parameters"):
        found = from_parameters(texts["parameters"])
    elif texts.get("prompt"):
        found = from_comfy(texts["prompt"])
    else:
        found = PictureSettings()
    if not found.values:
        raise UsageError(f"picture {path.name}: says nothing of how it was drawn")
    for name in ("prompt", "negative_prompt"):
        text = found.values.get(name, "")
        check_prompt(f"picture {path.name}: {name}", text)
        check_text(f"picture {path.name}: {name}", text)
    if line := literal_syntax(found.values.get(name, "") for name in ("prompt", "negative_prompt")):
        found.notes.append(line)
    return found


def from_parameters(text: str) -> PictureSettings:
    """A ``parameters`` text: the prompt's lines, those of the negative prompt, and a line of fields."""
    *lines, last = text.strip().split("\n")
    fields, found = dict(_fields(last)), PictureSettings()
    if len(fields) < 3:  # A1111's own rule: less is words with a colon between them
        return found
    start = next((i for i, line in enumerate(lines) if line.startswith(_NEGATIVE)), len(lines))
    found.values["prompt"] = "\n".join(lines[:start]).strip()
    found.values["negative_prompt"] = "\n".join(lines[start:]).removeprefix(_NEGATIVE).strip()
    for name, key in (("steps", "Steps"), ("seed", "Seed"), ("cfg_scale", "CFG scale")):
        text = fields.get(key, "")
        if _NUMBER.fullmatch(text):
            _take_number(found, name, int(text) if text.isdecimal() else float(text))
    if size := size_in(fields.get("Size", "")):
        found.values["width"], found.values["height"] = size
    if "Sampler" in fields:
        _take_sampler(found, fields["Sampler"], fields.get("Schedule type", ""))
    found.hyena, found.hyena_hash = fields.get("Hyena", ""), fields.get("Hyena hash", "")
    found.layers = fields.get("Hyena layers", "").split()
    if "Hires resize" in fields:
        found.notes.append("its high size is left out: this page draws in one stage")
    return found


def from_comfy(text: str) -> PictureSettings:
    """A ``prompt`` of ComfyUI: what its first sampler is told, as far as that does not come from other nodes. Raises
    UsageError for what is no such thing."""
    try:
        nodes = strict_json.loads(re.sub(r"\[NaN\]", "[null]", text), _MAX_TEXT)  # which ComfyUI itself writes
    except ValueError as error:
        raise UsageError(f"the picture's ComfyUI prompt cannot be read: {error}") from None
    found = PictureSettings()
    if not isinstance(nodes, dict):
        return found
    sampler = next((node for node in nodes.values() if _kind(node).startswith("KSampler")), None)
    if sampler is None:
        return found
    told = _inputs(sampler)
    seed = told.get("seed", told.get("noise_seed"))
    for name, value in (("steps", told.get("steps")), ("seed", seed), ("cfg_scale", told.get("cfg"))):
        _take_number(found, name, value)
    for name, key in (("prompt", "positive"), ("negative_prompt", "negative")):
        value = _inputs(_linked(nodes, told.get(key))).get("text")
        if isinstance(value, str):
            found.values[name] = value.strip()
    latent = _linked(nodes, told.get("latent_image"))
    size = [_inputs(latent).get(side) for side in ("width", "height")]
    if _kind(latent).startswith("Empty") and all(type(side) is int for side in size):
        found.values["width"], found.values["height"] = size
    if isinstance(told.get("sampler_name"), str):
        _take_sampler(found, told["sampler_name"], str(told.get("scheduler", "")))
    return found


def sampler_named(name: str, schedule: str = "") -> str:
    """Our name for a sampler of A1111's, ComfyUI's or diffusers', or "" for one that we do not have."""
    plain = re.sub(r"[\s_-]", "", name).lower()
    karras = schedule.lower() == "karras" or plain.endswith("karras")
    ours = _SAMPLERS.get(plain.removesuffix("karras"), "")
    return f"{ours}_karras" if karras and ours in _KARRAS else ours


def _fields(line: str) -> list[tuple[str, str]]:
    pairs = []
    for key, value in _FIELD.findall(line):
        if value.startswith('"'):
            try:
                value = str(json.loads(value))
            except ValueError:
                continue
        pairs.append((key, value.strip()))
    return pairs


def _take_number(found: PictureSettings, name: str, value: Any) -> None:
    kinds = (int, float) if name == "cfg_scale" else (int,)
    if type(value) in kinds and 0 <= value < 2**64:
        found.values[name] = value


def _take_sampler(found: PictureSettings, name: str, schedule: str) -> None:
    ours = sampler_named(name, schedule)
    if ours:
        found.values["scheduler"] = ours
    else:
        found.notes.append(f"its sampler {shortened(name, 40)!r} is none of ours: the form's stays")


def _kind(node: Any) -> str:
    kind = node.get("class_type") if isinstance(node, Mapping) else None
    return kind if isinstance(kind, str) else ""


def _inputs(node: Any) -> Mapping[str, Any]:
    inputs = node.get("inputs") if isinstance(node, Mapping) else None
    return inputs if isinstance(inputs, Mapping) else {}


def _linked(nodes: Mapping[str, Any], link: Any) -> Any:
    """The node that an input comes from: ``[its number, which output]``."""
    return nodes.get(str(link[0])) if isinstance(link, list) and link else None
