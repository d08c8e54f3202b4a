import pytest
import torch
from conftest import make_unet

from sd_hyena.errors import UsageError
from sd_hyena.targets import find_targets, parse_names, select

SD1 = ["IN01", "IN02", "IN04", "IN05", "IN07", "IN08", "M00", *(f"OUT{i:02d}" for i in range(3, 12))]


def sd_unet(**config):
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(**config)


def test_sd1_names_grids_and_keys():
    found = find_targets(sd_unet(cross_attention_dim=768, sample_size=64))
    assert list(found) == SD1
    assert [
        (found[n].dim, found[n].grid((64, 64))) for n in ("IN01", "IN04", "IN07", "M00", "OUT05", "OUT08", "OUT11")
    ] == [
        (320, (64, 64)),
        (640, (32, 32)),
        (1280, (16, 16)),
        (1280, (8, 8)),
        (1280, (16, 16)),
        (640, (32, 32)),
        (320, (64, 64)),
    ]
    assert found["IN04"].ldm_key == "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1"
    assert found["M00"].ldm_key == "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1"
    assert found["OUT11"].ldm_key == "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.attn1"


def test_sdxl_has_70_layers_with_suffixes():
    found = find_targets(
        sd_unet(
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
        )
    )
    assert len(found) == 70
    assert {n.split(".")[0] for n in found} == {"IN04", "IN05", "IN07", "IN08", "M00", *(f"OUT0{i}" for i in range(6))}
    assert found["IN07.3"].ldm_key.endswith("input_blocks.7.1.transformer_blocks.3.attn1")
    assert [t.name for t in select(found, "high")] == [
        f"{b}.{k}" for b in ("IN04", "IN05", "OUT03", "OUT04", "OUT05") for k in (0, 1)
    ]
    assert [t.name for t in select(found, "IN04")] == ["IN04.0", "IN04.1"]
    with pytest.raises(UsageError, match="selected twice"):
        select(found, "IN04,IN04.1")


def test_every_path_leads_to_its_attention(unet):
    for target in find_targets(unet).values():
        attention = unet.get_submodule(target.path)
        assert attention.query_dim == target.dim
        assert attention.heads == target.heads


def test_odd_grids_round_up():
    found = find_targets(make_unet())
    assert [found[n].grid((18, 22)) for n in ("IN01", "IN04", "IN07", "M00")] == [(18, 22), (9, 11), (5, 6), (3, 3)]


def test_selection_words(unet):
    found = find_targets(unet)
    assert [t.name for t in select(found, "all")] == SD1
    assert [t.name for t in select(found, "high")] == ["IN01", "IN02", "OUT09", "OUT10", "OUT11"]
    assert [t.name for t in select(found, " out11, in01")] == ["IN01", "OUT11"]
    assert parse_names("in01, HIGH") == ["IN01", "high"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("IN03", "no self-attention layer IN03; it has IN01, IN02"),
        ("IN91", "no self-attention layer IN91"),
        ("IN1", "'IN1' is not a layer name"),
        ("", "'' is not a layer name"),
        ("IN01,in01", "'in01' is given twice"),
        ("high,IN01", "IN01 is selected twice, by 'high' and 'IN01'"),
    ],
)
def test_bad_selections(unet, text, message):
    with pytest.raises(UsageError, match=message):
        select(find_targets(unet), text)


def test_not_a_unet():
    with pytest.raises(UsageError, match="Linear is no UNet of Stable Diffusion"):
        find_targets(torch.nn.Linear(2, 2))
