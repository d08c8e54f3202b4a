"""``sd-hyena anatomy`` as a user would type it."""

import json
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image

from sd_hyena import patch
from sd_hyena.anatomy.report import advice, markdown
from sd_hyena.anatomy.run import LayerAnatomy, examine
from sd_hyena.anatomy.settings import FILES, AnatomySettings
from sd_hyena.cli import main
from sd_hyena.errors import SdHyenaError, UsageError
from sd_hyena.nn import OperatorConfig, build
from sd_hyena.targets import find_targets

SMALL = ["-m", "demo", "-W", "128", "-H", "72", "-t", "IN01,OUT11", "-n", "2", "-s", "2", "--bands", "2"]


def test_writes_tables_and_figures_and_refuses_to_lose_them(tmp_path, capsys):
    out = tmp_path / "a"
    assert main(["anatomy", *SMALL, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert printed.index("head by head") < printed.index("layer by layer")  # what matters most comes last
    record = json.loads((out / "anatomy.json").read_text())
    assert [layer["layer"] for layer in record["layers"]] == ["IN01", "OUT11"]
    assert record["layers"][0]["grid"] == [9, 16]
    assert len(record["bands"]) == len(record["layers"][0]["bands"]) == 2
    for band in record["layers"][1]["bands"]:
        assert 0 <= band["errors"]["window+rank"] < 1
        for head in band["heads"]:
            assert 0 < head["entropy"] <= 1
            assert 0 < head["mass_3"] < head["mass_7"] < head["mass_13"] <= 1
    text = (out / "anatomy.md").read_text()
    assert "| IN01 | 9x16 |" in text
    assert record["command"] in text
    for name in ("anatomy.png", "displacement.png"):
        with Image.open(out / name) as image:
            assert min(image.size) > 200
    before = {name: (out / name).read_bytes() for name in FILES}
    assert main(["anatomy", *SMALL, "--out", str(out)]) == 2
    assert "exists" in capsys.readouterr().err
    assert {name: (out / name).read_bytes() for name in FILES} == before
    assert main(["anatomy", *SMALL, "--out", str(out), "--overwrite"]) == 0
    again = json.loads((out / "anatomy.json").read_text())
    assert again["layers"] == record["layers"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "either -m/--model or --random_weights"),
        (["-m", "demo", "--random_weights", "sd15"], "either -m/--model or --random_weights"),
        (["-m", "demo", "-t", "IN03"], "no self-attention layer IN03"),
        (["-m", "demo", "-W", "100"], "multiple of 8"),
        (["-m", "nothing.safetensors"], "not found"),
        (["-m", "demo", "--bands", "0"], "--bands is 0"),
        (["-m", "demo", "--cfg_scale", "0.5"], "--cfg_scale is 0.5"),
        (["-m", "demo", "--prompts", "no-such-file"], "no-such-file"),
        (["-m", "demo", "--out", __file__], "must be a folder"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_loaded(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr("sd_hyena.models.load_pipeline", lambda *a: pytest.fail("loaded"))
    assert main(["anatomy", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_an_attached_hyena_layer_is_not_taken_for_attention(pipe):
    target = find_targets(pipe.unet)["IN01"]
    config = OperatorConfig(target.dim, 32, 32, attention_heads=target.heads)
    patch.attach(pipe.unet, {"IN01": build(config)})
    with pytest.raises(UsageError, match="detach"):
        examine(pipe, AnatomySettings(model="demo", width=128, height=128))


def test_without_a_text_encoder_latents_and_states_are_random(unet):
    pipe = SimpleNamespace(unet=unet, scheduler=DDIMScheduler(), vae_scale_factor=8)
    texts = {name: torch.randn(1, 7, 8) for name in ("prompt_embeds", "negative_prompt_embeds")}
    settings = AnatomySettings(random_weights="sd15", width=104, height=72, bands=1)
    result = examine(pipe, settings, texts)
    assert len(result.layers) == 16
    assert result.layers[0].size == (9, 13)
    assert result.layers[6].rank == 1  # of 2 x 2 cells
    assert markdown(result).count("few cells") == sum(layer.cells <= 64 for layer in result.layers)


@pytest.mark.reliability(13)
def test_attention_that_is_not_finite_is_named(unet):
    pipe = SimpleNamespace(unet=unet, scheduler=DDIMScheduler(), vae_scale_factor=8)
    texts = {name: torch.randn(1, 7, 8) for name in ("prompt_embeds", "negative_prompt_embeds")}
    torch.nn.init.constant_(unet.get_submodule(find_targets(unet)["IN02"].path).to_k.weight, float("nan"))
    settings = AnatomySettings(random_weights="sd15", width=104, height=72, bands=1)
    with pytest.raises(SdHyenaError, match="IN02: its attention is not finite"):
        examine(pipe, settings, texts)


@pytest.mark.parametrize(
    ("entropy", "rank", "both", "words"),
    [
        (0.95, 0.01, 0.005, "flat: --operator linear is enough"),
        (0.3, 0.01, 0.005, "low rank: --operator linear is enough"),
        (0.95, 0.07, 0.07, "flat: --operator linear comes close"),
        (0.6, 0.07, 0.01, "local and low rank: --operator states"),
        (0.6, 0.3, 0.04, "local and low rank: --operator states"),
        (0.6, 0.6, 0.4, "high rank: keep attention"),
    ],
)
def test_advice(entropy, rank, both, words):
    errors = {"window": 0.9, "rank": rank, "window+rank": both, "displacement": 0.9}
    layer = LayerAnatomy(
        "IN01", (32, 32), 16, 1024, [{"errors": errors, "heads": [{"entropy": entropy}]}], torch.zeros(1, 63, 63)
    )
    assert advice(layer).startswith(words)
