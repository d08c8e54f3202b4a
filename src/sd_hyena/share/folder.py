"""Writing a folder of Hyena layers: weights, a config for people and programs, a model card, a sheet of samples."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from .. import __version__, strict_json
from ..arguments import given_path
from ..checkpoint import FORMAT, describe, to_bytes
from ..errors import SdHyenaError, UsageError
from ..files import atomic_folder
from ..hyena_file import HyenaFile
from ..sources import WEIGHTS
from .card import MARK, model_card

if TYPE_CHECKING:
    from PIL import Image

CONFIG, CARD, SHEET = "config.json", "README.md", "sheet.png"
logger = logging.getLogger(__name__)


def write_folder(
    folder: Path | str,
    file: HyenaFile,
    *,
    name: str = "",
    base_model: str = "",
    license: str = "",
    picture: Image.Image | None = None,
    known: str = "",
    overwrite: bool = False,
) -> list[str]:
    """:func:`save_pretrained` of what a file holds, all of it named; returns the names of the files written. The
    sheet of an earlier save goes where the card no longer shows one.

    ``name`` is what the card says to load, unless given the folder's; ``known`` the card on the hub.
    """
    folder = given_path(folder, "folder")
    check_folder(folder, overwrite)
    name = name or folder.resolve().name
    sheet = SHEET if picture is not None else ""
    try:
        here = (folder / CARD).read_text(encoding="utf-8", errors="replace") if (folder / CARD).is_file() else ""
        card = next((text for text in (here, known) if text and MARK not in text and not overwrite), "")
        if card:
            logger.warning("%s: kept, being another's or edited; overwrite writes a new one", CARD)
        else:
            card = model_card(file, name, base_model=base_model, license=license, sheet=sheet, known=known or here)
        stale = not sheet and holds_ours(folder) and outlives(here, card)
        with atomic_folder(folder, [SHEET] if stale else []) as new:
            (new / WEIGHTS).write_bytes(to_bytes(file, folder / WEIGHTS))
            config = describe(file) | {"sd_hyena_version": __version__}
            (new / CONFIG).write_text(strict_json.dumps(config, f"{folder / CONFIG}", 2) + "\n", encoding="utf-8")
            (new / CARD).write_text(card, encoding="utf-8")
            if picture is not None:
                picture.save(new / SHEET)
            return sorted(path.name for path in new.iterdir())
    except OSError as error:
        raise SdHyenaError(f"{folder}: cannot write: {error.strerror or error}") from error


def folder_files(folder: Path) -> list[Path]:
    """Those of the files that a save writes, but the card, which are there."""
    return [folder / name for name in (WEIGHTS, CONFIG, SHEET) if (folder / name).exists()]


def check_folder(folder: Path, overwrite: bool) -> None:
    """Raises UsageError if the folder cannot be one, or a file in it is neither ours nor to be replaced."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file: give a folder")
    there = folder_files(folder)
    if there and not overwrite and not holds_ours(folder):
        raise UsageError(f"{there[0]} was not written by save_pretrained: choose another folder, or give overwrite")


def holds_ours(folder: Path) -> bool:
    """Whether a save wrote the folder."""
    return (folder / CONFIG).is_file() and is_ours((folder / CONFIG).read_bytes())


def outlives(earlier: str, card: str) -> bool:
    """Whether the earlier card shows a sheet of samples that the new one does not: it is then of other layers."""
    shown = f"]({SHEET})"
    return shown in earlier and shown not in card


def is_ours(config: bytes) -> bool:
    try:
        return strict_json.loads(config)["format"] == FORMAT
    except (ValueError, LookupError, TypeError):
        return False
