"""Single files of every family: loaded offline, from whatever layout and type their tensors have."""

import pytest
import torch
from PIL import Image, ImageChops
from safetensors.torch import load_file, save_file

from sd_hyena import cli
from sd_hyena.errors import CheckpointError, UsageError
from sd_hyena.families import FAMILIES, UNET
from sd_hyena.models import load_pipeline, locate

NAMES = [name for name in FAMILIES if name != "demo"]
CLIP = "cond_stage_model.transformer."


def states_of(pipe, states):
    """The pipeline's tensors by component, under the names that the states have."""
    return {part: getattr(pipe, part).state_dict() for part in states}


def assert_holds(pipe, states):
    for part, got in states_of(pipe, states).items():
        for key, expected in states[part].items():
            assert got[key].equal(expected.to(got[key].dtype)), f"{part}.{key}"


def assert_same_pictures(a, b):
    assert ImageChops.difference(Image.open(a), Image.open(b)).getbbox() is None


def draw(model, out, *options):
    words = ["generate", "-m", model, "-p", "a red cat!", "-W", 64, "-H", 64, "-s", 2, "-n", 1, "-k", 5, "-o", out]
    return cli.main([str(word) for word in (*words, "--device", "cpu", *options)])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.compatibility(
    "Models", "single files of SD 1.x, 2.x, SDXL, their inpainting versions and SDXL's refiner", "work, offline"
)
def test_single_files_load_without_a_network(name, thin_model, no_network):
    model = thin_model(name)
    source = locate(str(model.path))
    assert source.family is FAMILIES[name]
    pipe = load_pipeline(source)
    assert type(pipe).__name__ == FAMILIES[name].pipeline
    assert pipe.unet.dtype == torch.float32
    assert not pipe.unet.training
    assert_holds(pipe, model.states)


@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl"])
@pytest.mark.compatibility("Models", "a single file, and the diffusers folder saved from it", "draw the same pixels")
def test_file_and_folder_draw_the_same(name, thin_model, saved_folder, tmp_path, no_network):
    model = thin_model(name)
    assert draw(model.path, tmp_path / "file") == 0
    assert draw(saved_folder(name), tmp_path / "folder") == 0
    assert_same_pictures(tmp_path / "file" / "image_000.png", tmp_path / "folder" / "image_000.png")


def test_second_tokenizers_fill_up_with_exclamation_marks(thin_model):
    pipe = load_pipeline(locate(str(thin_model("sdxl").path)))
    ids = [
        tokenizer("a cat", padding="max_length", max_length=6).input_ids
        for tokenizer in (pipe.tokenizer, pipe.tokenizer_2)
    ]
    assert ids == [[49406, 320, 2368, 49407, 49407, 49407], [49406, 320, 2368, 49407, 0, 0]]
    pipe = load_pipeline(locate(str(thin_model("sd21").path)))
    assert pipe.tokenizer("a cat", padding="max_length", max_length=6).input_ids == ids[1]


@pytest.fixture
def rewrite(thin_model, tmp_path):
    """``rewrite(name, change, file)``: a file like the family's thin one with its tensors changed."""

    def make(name, change, file="x.safetensors", metadata=None):
        model = thin_model(name)
        tensors = change(load_file(model.path))
        if file.endswith(".ckpt"):
            torch.save({"state_dict": tensors, "epoch": 3}, tmp_path / file)
        else:
            save_file(tensors, tmp_path / file, metadata)
        return str(tmp_path / file)

    return make


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
@pytest.mark.compatibility("Models", "tensors of float32, bfloat16, float8", "work; computed in the type asked for")
def test_files_of_every_type(dtype, rewrite, thin_model):
    path = rewrite("sd15", lambda tensors: {key: value.to(dtype) for key, value in tensors.items()})
    states = {part: {k: v.to(dtype) for k, v in state.items()} for part, state in thin_model("sd15").states.items()}
    pipe = load_pipeline(locate(path), dtype=torch.bfloat16)
    assert {p.dtype for part in states for p in getattr(pipe, part).parameters()} == {torch.bfloat16}
    assert_holds(pipe, states)


def averaged(tensors):
    return {
        f"model_ema.{key.removeprefix('model.').replace('.', '')}" if key.startswith(UNET) else key: value
        for key, value in tensors.items()
    }


@pytest.mark.parametrize("name", ["sd15", "sd21"])
@pytest.mark.compatibility("Models", "files with averaged weights (EMA) only", "work")
def test_files_with_averaged_weights_only(name, rewrite, thin_model):
    path = rewrite(name, averaged)
    assert_holds(load_pipeline(locate(path)), thin_model(name).states)


def test_averaged_weights_beside_others_are_left_alone(rewrite, thin_model):
    path = rewrite("sd15", lambda tensors: {k: torch.zeros_like(v) for k, v in averaged(tensors).items()} | tensors)
    assert_holds(load_pipeline(locate(path)), thin_model("sd15").states)


def test_pickles(rewrite, thin_model):
    assert_holds(load_pipeline(locate(rewrite("sd15", dict, "x.ckpt"))), thin_model("sd15").states)


@pytest.mark.parametrize("keys", [("model",), ("ema",), ("module", "state_dict"), ("state_dict", "model")], ids=str)
@pytest.mark.compatibility("Models", "weights under any key of a `.ckpt`, or with a prefix", "work")
def test_weights_under_any_key_or_prefix(keys, thin_model, tmp_path):
    content = load_file(thin_model("sd15").path)
    save_file({f"{keys[0]}.{name}": value for name, value in content.items()}, tmp_path / "x.safetensors")
    for key in reversed(keys):
        content = {key: content}
    torch.save(content | {"epoch": 3}, tmp_path / "x.ckpt")
    for file in ("x.ckpt", "x.safetensors"):
        assert_holds(load_pipeline(locate(str(tmp_path / file))), thin_model("sd15").states)


def test_averaged_weights_may_keep_their_dots(rewrite, thin_model):
    path = rewrite(
        "sd15",
        lambda t: {f"model_ema.{k.removeprefix('model.')}" if k.startswith(UNET) else k: v for k, v in t.items()},
    )
    assert_holds(load_pipeline(locate(path)), thin_model("sd15").states)


def test_what_is_left_of_companions_is_passed_over(rewrite, thin_model):
    stray = {"lora_unet_x.alpha": torch.ones(1), "control_model.time_embed.0.weight": torch.ones(1)}
    path = rewrite("sd15", lambda tensors: tensors | stray, "no suffix")
    assert_holds(load_pipeline(locate(path)), thin_model("sd15").states)


def test_text_encoders_as_transformers_saves_them(rewrite, thin_model):
    key = "conditioner.embedders.1.model.text_projection"
    turned = rewrite(
        "sdxl", lambda t: {k: v for k, v in t.items() if k != key} | {f"{key}.weight": t[key].T.contiguous()}
    )
    assert_holds(load_pipeline(locate(turned)), thin_model("sdxl").states)
    text = {
        f"{CLIP}text_model.{key.removeprefix('text_model.')}": value
        for key, value in thin_model("sd21").states["text_encoder"].items()
    }
    named = rewrite("sd21", lambda tensors: without("cond_stage_model.")(tensors) | text)
    assert_holds(load_pipeline(locate(named)), thin_model("sd21").states)


NOISE = ("train", "-t", "IN01", "--data", "noise", "-n", 1, "-W", 64, "-H", 64, "-b", 2, "-s", 0, "-d", 1)


def test_layers_alone_need_a_unet_alone(rewrite, tmp_path, capsys):
    path = rewrite("sd15", without("first_stage_model.", "cond_stage_model."))
    assert cli.main(["targets", "-m", path, "--json"]) == 0
    out = ["-o", tmp_path / "out", "-l", tmp_path / "log", "--device", "cpu"]
    assert cli.main([str(word) for word in (*NOISE, "-m", path, *out)]) == 0
    capsys.readouterr()
    assert draw(path, tmp_path / "pictures") == 2
    assert "is a UNet alone" in capsys.readouterr().err


def test_text_encoders_with_older_and_newer_names(rewrite, thin_model):
    old = rewrite("sd15", lambda tensors: {k.replace(f"{CLIP}text_model.", CLIP): v for k, v in tensors.items()})
    assert_holds(load_pipeline(locate(old)), thin_model("sd15").states)
    turbo = rewrite(
        "sd21",
        lambda tensors: {k.replace("cond_stage_model.", "conditioner.embedders.0."): v for k, v in tensors.items()},
    )
    assert_holds(load_pipeline(locate(turbo)), thin_model("sd21").states)


def without(*prefixes):
    return lambda tensors: {key: value for key, value in tensors.items() if not key.startswith(prefixes)}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("sd15", without("first_stage_model."), "lacks its VAE"),
        ("sd15", without("cond_stage_model."), "lacks its text encoder"),
        ("sdxl", without("conditioner.embedders.1."), "lacks its text encoder 2"),
        ("sd15", without(f"{UNET}out."), r"its unet lacks conv_norm_out\.weight, conv_norm_out\.bias \.\.\."),
        ("sd15", lambda t: t | {f"{UNET}out.2.bias": torch.ones(9)}, r"its unet has another shape of conv_out\.bias"),
        (
            "sd15",
            lambda t: t | {f"{UNET}input_blocks.1.1.lora.weight": torch.ones(1)},
            r"its unet has, unlike others, down_blocks\.0\.attentions\.0\.lora",
        ),
        ("sd15", lambda t: t | {f"{UNET}extra.weight": torch.ones(1)}, "its unet has, unlike others, .*extra"),
        ("sdxl", without(f"{UNET}middle_block.1."), "is a pruned SDXL"),
        (
            "sd15",
            lambda t: t | {f"{UNET}out.2.weight": t[f"{UNET}out.2.weight"].to(torch.int8)},
            "is a quantised checkpoint",
        ),
        ("sd15", lambda t: t | {f"{UNET}input_blocks.0.0.weight": torch.ones(8, 8, 3, 3)}, "InstructPix2Pix"),
        ("sd21", lambda t: t | {f"{UNET}label_emb.0.0.weight": torch.ones(1)}, "is an unCLIP model"),
    ],
    ids=[
        "VAE",
        "text encoder",
        "second text encoder",
        "tensors",
        "shape",
        "more tensors",
        "unknown tensors",
        "pruned",
        "bytes",
        "relative",
        "unCLIP",
    ],
)
@pytest.mark.compatibility(
    "Models", "files without a VAE, a text encoder or some tensors", "refused: says what is missing"
)
def test_incomplete_files_are_told(name, change, message, rewrite, capsys, tmp_path):
    path = rewrite(name, change)
    assert draw(path, tmp_path / "out") in (1, 2)
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"sd-hyena: model {path}: ")
    assert "\n" not in error
    with pytest.raises((CheckpointError, UsageError), match=message):
        load_pipeline(locate(path))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (f"{UNET}middle_block.1.transformer_blocks.0.attn1.to_q.weight", float("nan")),
        ("first_stage_model.decoder.conv_out.bias", float("inf")),
        ("cond_stage_model.transformer.text_model.final_layer_norm.bias", float("-inf")),
    ],
)
@pytest.mark.compatibility("Models", "NaN or infinite weights", "refused: names the tensor")
def test_weights_that_are_no_numbers_are_refused(key, value, rewrite, tmp_path, capsys):
    def poison(tensors):
        tensors[key].view(-1)[-1] = value
        return tensors

    assert draw(rewrite("sd15", poison), tmp_path) == 1
    assert f"{key} holds NaN or infinite values" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.png"))


def test_weights_beyond_half_precision_are_told_apart(rewrite):
    key = f"{UNET}out.2.bias"
    path = rewrite("sd15", lambda tensors: tensors | {key: torch.full((4,), 1e6)})
    load_pipeline(locate(path))
    with pytest.raises(CheckpointError, match=r"unet\.conv_out\.bias has values beyond the range of float16"):
        load_pipeline(locate(path), dtype=torch.float16)


def test_a_variant_is_nothing_to_ask_of_a_file(thin_model):
    with pytest.raises(UsageError, match="--variant chooses among the weights of a folder"):
        locate(str(thin_model("sd15").path), "fp16")
