"""``save_pretrained`` and ``push_to_hub``."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..api import attached_file
from ..arguments import given_path, given_texts, shown
from ..errors import UsageError
from ..sources import is_repo_id
from .folder import check_folder, write_folder
from .hub import remote_card, upload

if TYPE_CHECKING:
    from PIL import Image


def save_pretrained(
    pipe_or_unet: Any,
    folder: Path | str,
    *,
    push_to_hub: bool = False,
    repo_id: str | None = None,
    base_model: str = "",
    license: str = "",
    sheet: Path | str | Image.Image | None = None,
    sample_prompts: Sequence[str] = (),
    sample_options: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
) -> str | None:
    """Writes all attached layers to ``folder``: ``hyena.safetensors``, ``config.json``, ``README.md`` (a model card)
    and, if there are samples, ``sheet.png``. ``load_hyena(pipe, folder)`` reads them again.

    The records say how the layers were trained, with the paths that were given to ``sd-hyena train``.

    Args:
        push_to_hub: also put the folder on the hub as ``repo_id``, ``user/name``, with ``private``, ``token``,
            ``commit_message`` and ``create_pr`` as in huggingface_hub; returns the commit's address.
        base_model: hub id of the model that taught them, for the card; unless given, what the records say.
        license: for the card's front matter.
        sheet: a picture of samples, or its file; or else
        sample_prompts: draw one from these, with attention and with Hyena; ``sample_options`` are the pipeline's.
        overwrite: replace files that this function did not write, and a card that was edited.

    Either all files are written or none. An earlier save, here or on the hub, is replaced; its card is too, with
    its front matter kept, but not one without the line that says it may be. A save without samples takes the sheet
    of an earlier one away.
    Raises UsageError if nothing is attached or another's file is in the way, SdHyenaError if something cannot be
    written or the hub refuses.
    """
    folder = given_path(folder, "folder")
    file = attached_file(pipe_or_unet)
    check_folder(folder, overwrite)
    known = ""
    if push_to_hub:
        if not repo_id or not is_repo_id(repo_id):
            raise UsageError(f"push_to_hub needs a repo_id such as user/name, got {repo_id!r}")
        known = remote_card(repo_id, token, overwrite)
    names = write_folder(
        folder,
        file,
        name=repo_id or "",
        base_model=base_model,
        license=license,
        picture=_picture(pipe_or_unet, sheet, sample_prompts, sample_options or {}),
        known=known,
        overwrite=overwrite,
    )
    if not push_to_hub or not repo_id:
        return None
    return upload(folder, names, repo_id, token, private, commit_message, create_pr, known)


def _picture(pipe: Any, sheet: Any, prompts: Any, options: Any) -> Image.Image | None:
    from .samples import draw_sheet, read_sheet

    if sheet is not None:
        return read_sheet(sheet)
    if not isinstance(options, Mapping):
        raise UsageError(f"sample_options must be a dict of the pipeline's options, got {shown(options)}")
    texts = given_texts(prompts or (), "sample_prompts")
    return draw_sheet(pipe, texts, options) if texts else None


def push_to_hub(pipe_or_unet: Any, repo_id: str, **options: Any) -> str | None:
    """Puts all attached layers on the hub, as :func:`save_pretrained` writes them and with its options; returns the
    commit's address."""
    with tempfile.TemporaryDirectory() as folder:
        return save_pretrained(pipe_or_unet, folder, push_to_hub=True, repo_id=repo_id, **options)
