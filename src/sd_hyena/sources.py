"""Where Hyena layers come from: the weights file that a path, a folder or a hub id means. Imports no torch."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

from .arguments import given_path, shown
from .errors import CheckpointError, SdHyenaError, UsageError
from .settings import check_path

# Where files are named, this name stands for the bundled model's student, unless a file is called so.
STUDENT = "demo"
STUDENT_FILE = Path(__file__).parent / "demo" / "student.safetensors"
WEIGHTS = "hyena.safetensors"  # in a folder or hub repository
WEIGHTS_ENDINGS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
_NUMBERED = re.compile(r"(.*?)(\d+)\.safetensors")  # what train writes: Hyena-00500.safetensors
_REPO_ID = re.compile(r"(?!.*(--|\.\.))[a-z\d][\w.-]*/\w[\w.-]*(?<![-.])(?<!\.git)", re.ASCII | re.IGNORECASE)
_taken: set[Path] = set()
logger = logging.getLogger(__name__)


def hyena_path(
    name: Path | str, *, revision: str | None = None, subfolder: str | None = "", token: str | bool | None = None
) -> Path:
    """The file that ``name`` means: itself, the bundled student, or ``hyena.safetensors`` of a folder or hub id. In a
    folder that ``train`` wrote, it is the file of the last step.

    Of a hub repository that file alone is fetched, to the hub's cache; what is there is used if the hub cannot be
    reached. ``revision``, ``subfolder`` and ``token`` are huggingface_hub's. What is not there and no hub id is
    returned as it is. Raises CheckpointError for a folder or repository without that file, UsageError for what is no
    name at all.
    """
    if not isinstance(name, str | os.PathLike):
        raise UsageError(
            f"Hyena layers are named by one file, folder or hub id, or given as a state dict; got {shown(name)}"
        )
    if not isinstance(subfolder or "", str | os.PathLike):
        raise UsageError(f"subfolder must be a folder's name, got {shown(subfolder)}")
    path = given_path(name, "the name of a Hyena file")
    check_path("Hyena file", str(path))
    # Unlike Path's own methods, these of os.path take any name.
    file = path if os.path.isfile(path) else STUDENT_FILE if str(name) == STUDENT else None
    if revision and (file or os.path.exists(path)):
        logger.warning("%s: is on this machine, so there is no revision to choose: %s is ignored", name, revision)
    if subfolder and file:
        logger.warning("%s: is a file, so there is no subfolder to choose: %s is ignored", name, subfolder)
    if file:
        return file
    if os.path.isdir(path):
        return _in_folder(path / (subfolder or ""))
    if not is_remote(str(name)):
        return path
    from huggingface_hub import hf_hub_download, hf_hub_url

    folder = str(subfolder) if subfolder else None
    with hub_errors(f"{name}: no such file or folder; as a hub id"):
        cached = not _answers(hf_hub_url(str(name), WEIGHTS, revision=revision, subfolder=folder), token)
        return Path(
            hf_hub_download(
                str(name), WEIGHTS, revision=revision, subfolder=folder, token=token, local_files_only=cached
            )
        )


def _answers(url: str, token: str | bool | None) -> bool:
    """Whether the hub says anything of a file, be it that there is none; asked once, where its client tries again."""
    from huggingface_hub import errors, get_hf_file_metadata

    try:
        get_hf_file_metadata(url, token=token)
    except errors.HfHubHTTPError as error:
        return error.response.status_code < 500
    except Exception:  # of several network libraries
        return False
    return True


def _in_folder(folder: Path) -> Path:
    if (folder / WEIGHTS).is_file():
        return folder / WEIGHTS
    if (folder / "model_index.json").is_file():
        raise CheckpointError(f"{folder}: is a diffusers model, for -m/--model, not a folder of Hyena layers")
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    steps = [match for name in others if (match := _NUMBERED.fullmatch(name))]
    if steps and len(steps) == len(others) and len({match[1] for match in steps}) == 1:
        last = max(steps, key=lambda match: int(match[2]))[0]
        if folder / last not in _taken:  # it is asked for again and again
            logger.info("%s: taking %s", folder, last)
            _taken.add(folder / last)
        return folder / last
    hint = f": name one of its files, {', '.join(others[:3])}{' ...' if len(others) > 3 else ''}" if others else ""
    raise CheckpointError(f"{folder}: the folder has no {WEIGHTS}{hint}")


def is_repo_id(name: str) -> bool:
    """Whether ``name`` is shaped like a hub repository's, ``user/name``."""
    return len(name) <= 96 and _REPO_ID.fullmatch(name) is not None


def is_remote(name: str) -> bool:
    """Whether ``name``, which is nothing on this machine, may be something on the hub: it is shaped like a repository's
    name, not like a file's, and not in a folder that is here."""
    file = name.lower().endswith(WEIGHTS_ENDINGS)
    return is_repo_id(name) and not file and not os.path.isdir(name.partition("/")[0])


@contextlib.contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Raises CheckpointError, one line that starts with ``what``, for whatever goes wrong with the hub."""
    try:
        yield
    except SdHyenaError:
        raise
    except Exception as error:  # the hub's client raises those of several network libraries
        raise CheckpointError(f"{what}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    from huggingface_hub import errors

    reasons = {
        errors.GatedRepoError: "its owner has to give access first: ask on its page, then log in with 'hf auth login'",
        errors.RepositoryNotFoundError: "there is none, or it is private: check the name, or log in with "
        "'hf auth login'",
        errors.RevisionNotFoundError: "the repository has no such revision",
        errors.LocalEntryNotFoundError: "not in the hub's local cache, and the hub cannot be reached",
        errors.OfflineModeIsEnabled: "the hub cannot be reached, being in offline mode",
        errors.EntryNotFoundError: f"the repository has no {WEIGHTS}, so it holds no Hyena layers of ours",
    }
    for kind, reason in reasons.items():
        if isinstance(error, kind):
            return reason
    if isinstance(error, errors.HfHubHTTPError):
        return (
            f"the hub refuses it (HTTP {error.response.status_code}): log in with 'hf auth login', and see whether "
            "you may do this"
        )
    return f"the hub cannot be used ({type(error).__name__})"
