"""Files that are something else: told apart by their names, by -m and by --hyena, before anything is loaded."""

import pytest
import torch
from safetensors.torch import save_file

from sd_hyena import checkpoint, cli
from sd_hyena.errors import CheckpointError, UsageError
from sd_hyena.families import UNET
from sd_hyena.models import locate
from sd_hyena.sources import STUDENT_FILE

# Names as published files have them.
KINDS = {
    "a LoRA": [
        ["lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight"],
        ["lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha", "lora_unet_input_blocks_4_1_proj_in.lora_up.weight"],
        ["unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight"],
        ["down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.down.weight"],
        ["lora_unet_mid_block_attentions_0_proj_in.hada_w1_a"],
        ["transformer.double_blocks.0.img_attn.qkv.lora_B.weight"],
        ["base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight"],
    ],
    "a UNet alone": [
        [f"{UNET}input_blocks.0.0.weight", f"{UNET}out.2.bias"],
        ["input_blocks.0.0.weight", "middle_block.0.in_layers.0.weight"],
        ["conv_in.weight", "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight", "time_embedding.x"],
        ["model_ema.diffusion_modelinput_blocks00weight"],
    ],
    "a VAE alone": [
        ["first_stage_model.decoder.conv_in.weight"],
        ["encoder.down.0.block.0.conv1.weight", "decoder.up.0.block.0.conv1.weight", "quant_conv.weight"],
        ["encoder.down_blocks.0.resnets.0.conv1.weight", "decoder.conv_in.weight"],
    ],
    "a text encoder alone": [
        ["text_model.encoder.layers.0.layer_norm1.weight"],
        ["cond_stage_model.transformer.text_model.final_layer_norm.weight"],
        ["conditioner.embedders.1.model.ln_final.weight"],
        ["transformer.resblocks.0.ln_1.weight", "token_embedding.weight"],
        ["encoder.block.0.layer.0.SelfAttention.q.weight", "shared.weight"],
    ],
    "a textual inversion embedding": [["emb_params"], ["<cat-toy>"], ["clip_g", "clip_l"]],
    "a ControlNet": [
        ["control_model.input_hint_block.0.weight"],
        ["controlnet_cond_embedding.conv_in.weight", "conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"],
        [f"{UNET}input_blocks.0.0.weight", "control_model.time_embed.0.weight"],
    ],
    "an upscaler": [
        ["conv_first.weight", "RRDB_trunk.0.RDB1.conv1.weight"],
        ["params_ema.conv_first.weight"],
        ["model.0.weight", "model.1.sub.0.RDB1.conv1.0.weight"],
        ["layers.0.residual_group.blocks.0.attn.qkv.weight"],
    ],
    "a hypernetwork": [["768.0.linear.0.weight"]],
    "a CLIP vision model": [["vision_model.encoder.layers.0.mlp.fc1.weight"], ["visual.conv1.weight"]],
    "a small VAE (TAESD)": [["encoder.layers.0.weight", "decoder.layers.1.weight"], ["0.weight", "3.conv.0.weight"]],
    "a Stable Video Diffusion model": [
        [f"{UNET}input_blocks.1.0.time_stack.in_layers.0.weight", f"{UNET}out.2.bias", "first_stage_model.x"]
    ],
    "a Kolors model": [["encoder_hid_proj.weight", "conv_in.weight"]],
    "a DeepFloyd IF model": [[f"{UNET}input_blocks.0.0.weight", "encoder_proj.weight"]],
    "a T2I-Adapter": [["adapter.body.0.resnets.0.block1.weight", "adapter.conv_in.weight"]],
    "an IP-Adapter": [["image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"]],
    "AnimateDiff's motion modules": [["down_blocks.0.motion_modules.0.temporal_transformer.norm.weight"]],
    "a Stable Diffusion 3 model": [
        [
            "model.diffusion_model.joint_blocks.0.context_block.attn.qkv.weight",
            "first_stage_model.x",
            "text_encoders.x",
        ],
        ["transformer_blocks.0.norm1_context.linear.weight", "pos_embed.proj.weight"],
    ],
    "a FLUX model": [
        ["double_blocks.0.img_attn.norm.key_norm.scale"],
        ["model.diffusion_model.single_blocks.0.linear1.weight", "vae.decoder.conv_in.weight"],
        ["single_transformer_blocks.0.attn.to_q.weight", "transformer_blocks.0.attn.to_q.weight"],
    ],
    "a PixArt model": [["adaln_single.linear.weight"], ["t_block.1.weight", "y_embedder.y_proj.fc1.weight"]],
    "a diffusion transformer": [
        ["model.diffusion_model.layers.0.adaLN_modulation.1.weight"],
        ["blocks.0.cross_attn.q.weight", "patch_embedding.weight"],
        ["transformer_blocks.0.attn.to_q.weight", "proj_out.weight"],
    ],
    "a Stable Cascade model": [["clip_txt_mapper.weight"]],
    "a quantised checkpoint": [
        [f"{UNET}input_blocks.1.1.proj_in.weight.absmax", "first_stage_model.x"],
        [f"{UNET}input_blocks.1.1.proj_in.scale_weight", "first_stage_model.x"],
        [f"{UNET}input_blocks.1.1.proj_in.SCB", "first_stage_model.x"],
    ],
    "a checkpoint with a noise schedule of its own (EDM)": [["edm_mean", f"{UNET}out.2.bias", "first_stage_model.x"]],
    "a Hyena file": [["in_proj.weight", "filter_fn.implicit_filter.0.weight", "out_proj.weight"]],
}
CASES = [pytest.param(kind, names, id=f"{kind}-{i}") for kind, each in KINDS.items() for i, names in enumerate(each)]


@pytest.fixture
def file_with(tmp_path):
    def make(names):
        path = tmp_path / "x.safetensors"
        save_file({name: torch.zeros(1) for name in names}, path)
        return path

    return make


@pytest.mark.parametrize(("kind", "names"), CASES)
@pytest.mark.compatibility(
    "Models",
    "`-m` with a LoRA, a UNet, VAE or text encoder alone, an embedding, a ControlNet, an adapter, a Hyena file, SD 3, "
    "FLUX, PixArt",
    "refused: says what it is and what to do",
)
def test_what_is_no_checkpoint_is_named(kind, names, file_with):
    path = file_with(names)
    with pytest.raises(UsageError) as caught:
        locate(str(path))
    text = str(caught.value)
    assert text.startswith(f"model {path}: is {kind}: ")
    assert "\n" not in text
    assert any(word in text for word in ("-m", "-y", "sd-hyena works on", "float16", "give a model that draws"))


@pytest.mark.parametrize(("kind", "names"), [case for case in CASES if case.values[0] != "a Hyena file"])
@pytest.mark.compatibility("Hyena files", "`--hyena` with something else", "refused: says what it is")
def test_what_is_no_hyena_file_is_named(kind, names, file_with):
    path = file_with(names)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(path)
    assert str(caught.value) == f"{path}: is {kind}, not a Hyena file"


def test_a_whole_checkpoint_is_no_hyena_file(thin_model):
    path = thin_model("sd15").path
    with pytest.raises(CheckpointError, match=r"is a whole checkpoint, not a Hyena file: give it with -m/--model"):
        checkpoint.load(path)


def test_hyena_files_are_told_by_their_metadata():
    with pytest.raises(UsageError, match="is a Hyena file: give it with -y/--hyena, and the model"):
        locate(str(STUDENT_FILE))


def test_the_command_says_it_in_one_line(file_with, capsys, tmp_path):
    lora = file_with(KINDS["a LoRA"][0])
    assert cli.main(["generate", "-m", str(lora), "-p", "x", "-o", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"sd-hyena: model {lora}: is a LoRA: give the model that it goes with by -m; in Python, pipe.load_lora_weights "
        "loads the LoRA\n"
    )
    assert cli.main(["generate", "-m", "demo", "-y", str(lora), "-p", "x", "-o", str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"sd-hyena: {lora}: is a LoRA, not a Hyena file\n"


@pytest.mark.parametrize("name", ["x.ckpt", "x.safetensors", "x.pt"])
def test_damaged_files_are_told_before_anything_is_loaded(name, tmp_path, capsys):
    (tmp_path / name).write_text("<!DOCTYPE html><html>log in</html>")
    assert cli.main(["generate", "-m", str(tmp_path / name), "-p", "x", "-o", str(tmp_path)]) == 1
    assert "is a web page, not weights: download or copy it again" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "the name of a model is empty"),
        (" ", "model   not found"),
        ("./demo", r"model \./demo not found"),
        ("a/..", r"model a/\.\. not found"),
        ("https://huggingface.co/org/thing/tree/main", "is a web address: give its hub id, org/thing, or a file"),
        ("hf.co/org/thing", "is a web address: give its hub id, org/thing, or a file"),
        ("https://example.org/models/1", "is an address: download the file, and give its path"),
        ("x" * 300, r"model 'x{57}\.\.\.': File name too long$"),
    ],
)
@pytest.mark.compatibility("Models", "`-m` with a web address, or with nothing", "refused: says what to give")
def test_names_of_nothing(name, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=message):
        locate(name)
    assert cli.main(["generate", f"--model={name}", "-p", "x", "-o", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_files_of_nothing_known(file_with):
    with pytest.raises(UsageError, match=r"is no Stable Diffusion checkpoint \(it holds a, b \.\.\.\)"):
        locate(str(file_with(["a", "b"])))
