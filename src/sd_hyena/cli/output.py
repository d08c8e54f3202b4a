"""What ``merge`` and ``convert`` write: one file, or a folder such as ``save_pretrained`` writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .. import interrupts
from ..arguments import given_path
from ..errors import UsageError
from ..files import make_folder

HELP = "what to write: a .safetensors file, or a folder with it, a config and a model card"


def check_out(out: str, overwrite: bool) -> Path:
    """The path of ``--out``. Raises UsageError for one that is no Hyena file's, or is there already."""
    path = given_path(out, "--out")
    if path.suffix.lower() in (".ckpt", ".pt", ".pth", ".bin", ".safetensor"):
        raise UsageError(f"--out {out}: a Hyena file ends in .safetensors")
    if _is_file(path):
        if path.is_dir():
            raise UsageError(f"--out {out} is a folder: name a file in it, or a folder that does not end like a file")
        there = [path] if path.exists() else []
    else:
        from ..share.folder import check_folder, folder_files

        check_folder(path, overwrite=True)
        there = folder_files(path)
    if there and not overwrite:
        raise UsageError(f"{there[0]} exists: choose another --out, or give --overwrite")
    return path


def write_out(path: Path, file: Any, overwrite: bool) -> None:
    """Writes a Hyena file to what :func:`check_out` returned. Raises SdHyenaError if it cannot be written."""
    from .display import console

    make_folder(path.parent)
    written: list[str] = []
    try:
        with interrupts.unit("file"):
            if _is_file(path):
                from ..checkpoint import write

                write(path, file)
                written = [path.name]
            else:
                from ..share.folder import write_folder

                written = write_folder(path, file, overwrite=overwrite)
    except interrupts.Interrupted as wish:
        wish.kept = f"{path} is written" if written else wish.kept
        raise
    count = len(file.layers)
    console.print(f"{path}: {count} layer{'s' if count > 1 else ''} ({', '.join(written)})", soft_wrap=True)


def _is_file(path: Path) -> bool:
    return path.suffix.lower() == ".safetensors"
