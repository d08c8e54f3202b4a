"""A folder of Hyena layers on the hub, by way of huggingface_hub."""

from __future__ import annotations

from pathlib import Path

from .. import __version__
from ..errors import UsageError
from ..sources import hub_errors
from .folder import CARD, CONFIG, SHEET, is_ours, outlives


def remote_card(repo_id: str, token: str | bool | None, overwrite: bool) -> str:
    """The card that a repository has, or "". Raises UsageError for a repository with another's config."""
    from huggingface_hub import HfApi, hf_hub_download

    api, there = HfApi(token=token), {}
    with hub_errors(f"hub repository {repo_id}"):
        for name in (CONFIG, CARD):
            if api.file_exists(repo_id, name):
                there[name] = Path(hf_hub_download(repo_id, name, token=token)).read_bytes()
    if CONFIG in there and not overwrite and not is_ours(there[CONFIG]):
        raise UsageError(
            f"hub repository {repo_id}: has a {CONFIG} of something else: choose another, or give overwrite"
        )
    return there.get(CARD, b"").decode(errors="replace")


def upload(
    folder: Path,
    names: list[str],
    repo_id: str,
    token: str | bool | None,
    private: bool | None,
    message: str | None,
    create_pr: bool,
    known: str = "",
) -> str:
    """Commits the named files of a folder to a repository, made if there is none; returns the commit's address.
    ``known``: the card that it has; the sheet that it shows goes where the new one shows none."""
    from huggingface_hub import HfApi

    api = HfApi(token=token, library_name="sd-hyena", library_version=__version__)
    stale = SHEET not in names and outlives(known, (folder / CARD).read_text(encoding="utf-8", errors="replace"))
    with hub_errors(f"hub repository {repo_id}"):
        repository = api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository.repo_id,
            folder_path=folder,
            allow_patterns=names,
            commit_message=message or "Hyena layers",
            create_pr=create_pr,
            delete_patterns=[SHEET] if stale else None,
        )
    return str(commit.commit_url)
