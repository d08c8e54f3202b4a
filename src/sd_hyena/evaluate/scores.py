"""What other models say of the pictures: the bundled scorer, CLIP, FID and LPIPS.

Nothing is downloaded unless its flag asks for it; each scorer is built before anything is drawn, so that what is
missing is known at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..errors import SdHyenaError
from ..extras import require_module
from ..families import DEMO, DEMO_DIR
from ..models import quiet_libraries
from ..models.configs import read_json
from ..texts import reason
from .pictures import Drawing
from .settings import EvaluateSettings

# (pictures, the teacher's pictures or None for the teacher itself, prompts) -> figures by name
Score = Callable[[Drawing, Drawing | None, Sequence[str]], dict[str, float]]
BATCH = 8


def make_scores(settings: EvaluateSettings, prompts: Sequence[str], device: str) -> list[Score]:
    """The scores that were asked for, and the bundled scorer's wherever the prompts are the bundled model's captions.

    Raises SdHyenaError naming the flag whose package or weights are missing.
    """
    scores: list[Score] = []
    if settings.model == DEMO and _are_captions(prompts):
        scores.append(_fidelity())
    if settings.clip_model:
        scores.append(_clip(settings.clip_model, device))
    if settings.fid:
        scores.append(_fid(device))
    if settings.lpips:
        scores.append(_lpips(device))
    return scores


def _are_captions(prompts: Sequence[str]) -> bool:
    from ..demo.scenes import all_scenes

    return set(prompts) <= {scene.caption for scene in all_scenes()}


def _fidelity() -> Score:
    from ..demo.scorer import fidelity, load_scorer

    scorer = load_scorer(DEMO_DIR)

    def score(drawing: Drawing, teacher: Drawing | None, prompts: Sequence[str]) -> dict[str, float]:
        found = fidelity(scorer, drawing.images, prompts)
        return {"prompt_fidelity": found.pop("prompt")} | {f"{name}_as_asked": value for name, value in found.items()}

    return score


def _clip(name: str, device: str) -> Score:
    quiet_libraries()
    require_module("--clip_model", "torchmetrics", "metrics")
    from torchmetrics.multimodal import CLIPScore
    from transformers import CLIPModel, CLIPProcessor

    for file in sorted(Path(name).glob("*.json")) if Path(name).is_dir() else ():
        read_json(file, name)  # which refuses those that ask for code

    def load() -> tuple[nn.Module, Any]:
        model = CLIPModel.from_pretrained(name, trust_remote_code=False)
        return _ClipFeatures(model), CLIPProcessor.from_pretrained(name, trust_remote_code=False)

    try:
        metric = CLIPScore(load).to(device)
    except Exception as error:  # transformers and the hub raise many unrelated types
        raise SdHyenaError(f"--clip_model {name}: cannot be loaded: {reason(error)}") from None

    @torch.no_grad()
    def score(drawing: Drawing, teacher: Drawing | None, prompts: Sequence[str]) -> dict[str, float]:
        metric.reset()
        for start in range(0, len(prompts), BATCH):
            chunk = slice(start, start + BATCH)
            metric.update(list(_bytes(drawing.images[chunk]).to(device)), list(prompts[chunk]))
        return {"clip_score": metric.compute().item()}

    return score


class _ClipFeatures(nn.Module):
    """A CLIP model whose features are tensors, as torchmetrics takes them; newer transformers wrap them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.config = model.eval(), model.config

    def get_image_features(self, *args: Any) -> Tensor:
        return self._tensor(self.model.get_image_features(*args))

    def get_text_features(self, *args: Any) -> Tensor:
        return self._tensor(self.model.get_text_features(*args))

    @staticmethod
    def _tensor(features: Any) -> Tensor:
        return features if isinstance(features, Tensor) else features.pooler_output


def _fid(device: str) -> Score:
    for module in ("torchmetrics", "torch_fidelity"):
        require_module("--fid", module, "metrics")
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = _build("--fid", partial(FrechetInceptionDistance, reset_real_features=False)).to(device)

    def score(drawing: Drawing, teacher: Drawing | None, prompts: Sequence[str]) -> dict[str, float]:
        if teacher is None:
            return {}
        metric.reset()
        if not metric.real_features_num_samples:
            _feed(metric, teacher.images, device, real=True)
        _feed(metric, drawing.images, device, real=False)
        return {"fid": metric.compute().item()}

    return score


def _feed(metric: Any, images: Sequence[Image.Image], device: str, real: bool) -> None:
    for start in range(0, len(images), BATCH):
        metric.update(_bytes(images[start : start + BATCH]).to(device), real=real)


def _lpips(device: str) -> Score:
    for module in ("torchmetrics", "torchvision"):
        require_module("--lpips", module, "metrics")
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    build = partial(LearnedPerceptualImagePatchSimilarity, net_type="alex", normalize=True)
    metric = _build("--lpips", build).to(device)

    @torch.no_grad()
    def score(drawing: Drawing, teacher: Drawing | None, prompts: Sequence[str]) -> dict[str, float]:
        if teacher is None:
            return {}
        metric.reset()
        for start in range(0, len(prompts), BATCH):
            chunk = slice(start, start + BATCH)
            metric.update(*(_bytes(d.images[chunk]).to(device) / 255 for d in (drawing, teacher)))
        return {"lpips": metric.compute().item()}

    return score


def _build(flag: str, make: Callable[[], Any]) -> Any:
    """A metric with its network, whose weights its package fetches once and keeps in torch's hub folder."""
    try:
        return make()
    except Exception as error:  # torch.hub raises what the network raises
        where = f"{torch.hub.get_dir()}/checkpoints"
        raise SdHyenaError(
            f"{flag}: its network's weights are neither in {where} nor to be had: {reason(error)}"
        ) from None


def _bytes(images: Sequence[Image.Image]) -> Tensor:
    """(B, 3, H, W), 8 bits."""
    return torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in images])).permute(0, 3, 1, 2)
