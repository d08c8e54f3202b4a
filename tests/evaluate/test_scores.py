"""Scores by other models: the bundled scorer, a tiny CLIP, and metrics whose package or weights are missing."""

import importlib.util

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from sd_hyena.demo.scenes import held_out_scenes
from sd_hyena.errors import SdHyenaError
from sd_hyena.evaluate import scores
from sd_hyena.evaluate.pictures import Drawing
from sd_hyena.evaluate.scores import make_scores
from sd_hyena.evaluate.settings import EvaluateSettings
from sd_hyena.models import DEMO_DIR

CAPTIONS = [scene.caption for scene in held_out_scenes(4)]


def drawing(seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 48, 48, 3), dtype=np.uint8)
    return Drawing([Image.fromarray(p) for p in pixels], torch.zeros(4, 4, 6, 6), 0.0)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A CLIP model of the smallest size, with random weights."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    tokenizer = CLIPTokenizer.from_pretrained(DEMO_DIR / "tokenizer")
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = small | {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(2)  # a positive mean cosine: torchmetrics cuts the score off at 0
    CLIPModel(
        CLIPConfig(text_config=text, vision_config=small | {"image_size": 32, "patch_size": 8}, projection_dim=8)
    ).save_pretrained(folder)
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPProcessor(CLIPImageProcessor(**sizes), tokenizer).save_pretrained(folder)
    return folder


def test_clip_score_is_100_times_the_mean_cosine(clip_folder):
    from transformers import CLIPModel, CLIPProcessor

    settings = EvaluateSettings(model="elsewhere", clip_model=str(clip_folder))
    (score,) = make_scores(settings, CAPTIONS, "cpu")
    drawn = drawing()
    got = score(drawn, None, CAPTIONS)["clip_score"]
    model, processor = CLIPModel.from_pretrained(clip_folder), CLIPProcessor.from_pretrained(clip_folder)
    batch = processor(text=CAPTIONS, images=drawn.images, return_tensors="pt", padding=True)
    with torch.no_grad():
        expected = 100 * torch.cosine_similarity(*(lambda o: (o.image_embeds, o.text_embeds))(model(**batch))).mean()
    assert got == pytest.approx(expected.item(), abs=1e-3)
    assert score(drawn, drawn, CAPTIONS)["clip_score"] == got
    assert score(drawn, None, CAPTIONS[::-1])["clip_score"] != got


def test_a_clip_model_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(SdHyenaError, match=r"--clip_model .*/none: cannot be loaded") as caught:
        make_scores(EvaluateSettings(model="elsewhere", clip_model=str(tmp_path / "none")), CAPTIONS, "cpu")
    assert "\n" not in str(caught.value)


def test_the_bundled_scorer_judges_its_own_captions_only():
    demo = EvaluateSettings(model="demo")
    (score,) = make_scores(demo, CAPTIONS, "cpu")
    figures = score(drawing(), None, CAPTIONS)
    shares = [figures[f"{name}_as_asked"] for name in ("subject", "ground", "place")]
    assert figures["prompt_fidelity"] == pytest.approx(sum(shares) / 3)
    assert make_scores(demo, ["a castle on a hill"], "cpu") == []
    assert make_scores(EvaluateSettings(model="elsewhere"), CAPTIONS, "cpu") == []


@pytest.mark.parametrize(("flag", "module"), [("fid", "torch_fidelity"), ("lpips", "torchvision")])
def test_a_missing_package_is_named(monkeypatch, flag, module):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == module else find(name, *rest))
    with pytest.raises(SdHyenaError, match=rf"--{flag} needs {module}: pip install 'sd-hyena\[metrics\]'"):
        make_scores(EvaluateSettings(model="elsewhere", **{flag: True}), CAPTIONS, "cpu")


@pytest.mark.parametrize(("flag", "metric"), [
    ("fid", "torchmetrics.image.fid.FrechetInceptionDistance"),
    ("lpips", "torchmetrics.image.lpip.LearnedPerceptualImagePatchSimilarity"),
])  # fmt: skip
def test_missing_weights_are_one_line(monkeypatch, flag, metric):
    def offline(*args, **kwargs):
        raise OSError("<urlopen error\n[Errno -3] Temporary failure in name resolution>")

    monkeypatch.setattr(scores, "require_module", lambda *args: None)
    monkeypatch.setattr(metric, offline)
    with pytest.raises(SdHyenaError, match=rf"--{flag}: its network's weights are neither in .*/checkpoints") as caught:
        make_scores(EvaluateSettings(model="elsewhere", **{flag: True}), CAPTIONS, "cpu")
    assert "\n" not in str(caught.value)


class Colours(nn.Module):
    """Mean colour, in place of a network's features."""

    num_features = 3

    def forward(self, pixels):
        return pixels.double().mean((2, 3)) / 255


def test_fid_is_the_distance_of_two_gaussians(monkeypatch):
    from torchmetrics.image.fid import FrechetInceptionDistance

    monkeypatch.setattr(scores, "require_module", lambda *args: None)
    monkeypatch.setattr(
        "torchmetrics.image.fid.FrechetInceptionDistance",
        lambda **options: FrechetInceptionDistance(feature=Colours(), **options).set_dtype(torch.float64),
    )
    (score,) = make_scores(EvaluateSettings(model="elsewhere", fid=True), CAPTIONS, "cpu")

    def flat(values):
        images = [Image.fromarray(np.full((16, 16, 3), v, dtype=np.uint8)) for v in values]
        return Drawing(images, torch.zeros(4, 4, 2, 2), 0.0)

    teacher = flat([0, 51, 102, 153])
    assert score(teacher, None, CAPTIONS) == {}
    # The same spread, all brighter by 0.2: the squared distance of the means, 3 * 0.2^2.
    assert score(flat([51, 102, 153, 204]), teacher, CAPTIONS)["fid"] == pytest.approx(0.12, rel=1e-3)
    assert score(teacher, teacher, CAPTIONS)["fid"] == pytest.approx(0, abs=1e-4)
