"""Hub ids: the folder of a model in the cache of downloads, which is fetched first where there is a network."""

from __future__ import annotations

from pathlib import Path

from ..errors import SdHyenaError
from ..texts import reason
from .folders import check_folder, read_index
from .locate import ModelSource


def fetch(source: ModelSource) -> tuple[Path, str]:
    """The folder and the variant of its weights. Raises SdHyenaError if it is not in the cache and cannot be had."""
    from ..tensors import weights_in

    folder = _download(source, source.variant)
    read_index(folder, source.name)
    if not source.variant and (folder / "unet").is_dir() and not weights_in(folder / "unet"):
        folder = _download(source, "fp16")  # which is what those have that have no plain weights
    return folder, check_folder(folder, source.name, source.variant)


def _download(source: ModelSource, variant: str) -> Path:
    from diffusers import DiffusionPipeline
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(DiffusionPipeline.download(source.location, variant=variant or None))
    except errors.GatedRepoError:
        problem = "asks for its terms to be accepted on the hub, and for a login (hf auth login)"
    except errors.RepositoryNotFoundError:
        problem = "is not on the hub under this name, or is private and asks for a login (hf auth login)"
    except (OSError, errors.HfHubHTTPError):
        try:
            return Path(snapshot_download(source.location, local_files_only=True))
        except errors.LocalEntryNotFoundError:
            problem = (
                "is not in the cache of downloaded models, and the hub cannot be reached: give a folder or a file, or "
                "download it where there is a network"
            )
    except ValueError as error:
        if "trust_remote_code" in str(error):
            problem = "asks to run code of its own, which is never done"
        elif variant and "variant" in str(error):
            problem = f"has no weights of variant {variant}"
        else:
            problem = f"cannot be downloaded: {reason(error)}"
    raise SdHyenaError(f"model {source.name}: {problem}")
