"""diffusers folders and hub ids: variants, shards, other kinds of folders, and nothing of theirs is ever run."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from sd_hyena import cli
from sd_hyena.errors import CheckpointError, SdHyenaError, UsageError
from sd_hyena.models import load_pipeline, locate, unet_skeleton

UNET_WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
WEIGHTS = (UNET_WEIGHTS, "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors")


@pytest.fixture
def folder(saved_folder, tmp_path):
    """A folder to be changed."""
    shutil.copytree(saved_folder("sd15"), tmp_path / "model")
    return tmp_path / "model"


def rename(folder, variant, weights=WEIGHTS):
    for name in weights:
        path = folder / name
        path.rename(path.with_suffix(f".{variant}.safetensors"))


def assert_same_model(folder, original, variant=""):
    """The folder loads and holds what the original's UNet and text encoder hold."""
    pipe = load_pipeline(locate(str(folder), variant), dtype=torch.float16)
    expected = load_file(original / UNET_WEIGHTS)
    assert all(value.equal(expected[key]) for key, value in pipe.unet.state_dict().items())
    held = {k.removeprefix("text_model."): v for k, v in load_file(original / "text_encoder/model.safetensors").items()}
    got = {k.removeprefix("text_model."): v for k, v in pipe.text_encoder.state_dict().items()}
    assert all(got[key].equal(value) for key, value in held.items() if key in got)
    assert len(got) >= len(held) - 1


@pytest.mark.compatibility(
    "Models", "diffusers folders with fp16 weights only", "found without being asked, and a line says so"
)
def test_the_only_variant_is_found(folder, saved_folder, caplog, no_network):
    rename(folder, "fp16")
    with caplog.at_level("INFO", "sd_hyena"):
        assert_same_model(folder, saved_folder("sd15"))
    assert "plain weights are missing, those of variant fp16 are taken" in caplog.text


@pytest.mark.parametrize("variant", ["", "non-ema"])
def test_variants_may_have_a_dash(variant, folder, saved_folder):
    rename(folder, "non-ema")
    assert_same_model(folder, saved_folder("sd15"), variant)


@pytest.mark.compatibility(
    "Models", "`--variant`", "chooses; a variant that is missing is refused, naming those there are"
)
def test_variants_are_chosen(folder, saved_folder, tmp_path, capsys):
    weights = load_file(folder / UNET_WEIGHTS)
    other = {key: torch.zeros_like(value) for key, value in weights.items()}
    save_file(weights, folder / "unet/diffusion_pytorch_model.fp16.safetensors")
    save_file(other, folder / UNET_WEIGHTS)
    assert_same_model(folder, saved_folder("sd15"), "fp16")
    assert not load_pipeline(locate(str(folder))).unet.conv_in.weight.any()
    assert cli.main(["targets", "-m", str(folder), "--variant", "fp16", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["targets"]) == 16
    command = ["generate", "-m", str(folder), "-p", "x", "-o", str(tmp_path), "--variant", "bf16"]
    assert cli.main(command) == 2
    assert capsys.readouterr().err == f"sd-hyena: model {folder}: has no weights of variant bf16; it has fp16\n"
    assert cli.main(["generate", "-m", "demo", "-p", "x", "-o", str(tmp_path), "--variant", "fp16"]) == 2
    assert "has no weights of variant fp16; it has plain weights only" in capsys.readouterr().err


def test_what_no_variant_covers_is_told(folder):
    rename(folder, "fp16", WEIGHTS[:1])
    rename(folder, "ema", WEIGHTS[1:2])
    with pytest.raises(UsageError, match=r"unet/ has weights of variant fp16 only: choose with --variant"):
        locate(str(folder))
    with pytest.raises(UsageError, match=r"vae/ has weights of variant ema only"):
        locate(str(folder), "fp16")


@pytest.mark.compatibility("Models", "sharded weights, `.bin` weights", "work")
def test_shards_and_pickles(folder, saved_folder, no_network):
    weights = load_file(folder / UNET_WEIGHTS)
    places = {}
    for number in range(2):
        name = f"diffusion_pytorch_model-{number + 1:05d}-of-00002.safetensors"
        part = {key: value for i, (key, value) in enumerate(weights.items()) if i % 2 == number}
        save_file(part, folder / "unet" / name, {"format": "pt"})
        places |= dict.fromkeys(part, name)
    (folder / UNET_WEIGHTS).unlink()
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / "unet/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    for name, new in ((WEIGHTS[1], "diffusion_pytorch_model.bin"), (WEIGHTS[2], "pytorch_model.bin")):
        torch.save(load_file(folder / name), (folder / name).with_name(new))
        (folder / name).unlink()
    assert_same_model(folder, saved_folder("sd15"))
    (folder / "unet" / places["conv_in.weight"]).unlink()
    with pytest.raises(CheckpointError, match=r"-of-00002\.safetensors: no such file"):
        load_pipeline(locate(str(folder)))


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"_class_name": ["pipeline", "Mine"]},
        {"_class_name": "Mine"},
        {"unet": ["mine", "UNet"]},
        {"scheduler": ["os", "system"]},
        {"unet": ["diffusers", "UNet2DConditionModel"]},
    ],
    ids=["pipeline", "class", "component", "library", "shadowed"],
)
@pytest.mark.compatibility("Models", "folders that bring code", "refused; nothing in a folder is ever run")
def test_code_in_folders_is_never_run(changes, folder):
    code = "open('ran', 'w').close()\nraise SystemExit"
    (folder / "pipeline.py").write_text(code)
    (folder / "unet" / "mine.py").write_text(code)
    if changes.get("unet", [""])[0] == "diffusers":
        (folder / "unet" / "diffusers.py").write_text(code)
    edit(folder / "model_index.json", **changes)
    with pytest.raises(UsageError, match="code in a folder is not run"):
        locate(str(folder))
    assert not list(folder.rglob("ran"))


@pytest.mark.reliability(3)
@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("pipeline.py", "open('ran', 'w')"),
        ("vae/modeling_mine.py", "open('ran', 'w')"),
        ("text_encoder/config.json", {"auto_map": {"AutoModel": "modeling_mine.Mine"}}),
        ("tokenizer/tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["mine.Mine", None]}}),
        ("model_index.json", {"custom_pipeline": "someone/pipeline"}),
        ("text_encoder/config.json", {"attn_implementation": "someone/kernels"}),
    ],
)
def test_what_asks_to_run_code_is_refused_in_our_words(path, content, folder, capsys):
    if isinstance(content, dict):
        edit(folder / path, **content)
    else:
        (folder / path).write_text(content)
    assert cli.main(["generate", "-m", str(folder), "-p", "x", "-o", str(folder / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert re.search(rf"{re.escape(path)}.* never (run|done)", line)
    assert "trust_remote_code" not in line
    assert not list(folder.rglob("ran"))


@pytest.mark.reliability(3)
def test_no_code_beside_a_folder_is_looked_for(folder, monkeypatch):
    """diffusers runs a file that is called as the custom pipeline that nobody asked for: None.py."""
    monkeypatch.chdir(folder)
    (folder / "None.py").write_text("open('ran', 'w').close()")
    load_pipeline(locate(str(folder)))
    assert not (folder / "ran").exists()
    with contextlib.suppress(Exception):
        diffusers.DiffusionPipeline.from_pretrained(str(folder), trust_remote_code=True)
    assert (folder / "ran").exists()  # else this shows nothing


@pytest.mark.reliability(2)
@pytest.mark.parametrize(
    ("path", "changes", "named"),
    [
        ("unet/config.json", {"layers_per_block": 10**6}, "layers_per_block is 1000000, but must be at most 256"),
        ("unet/config.json", {"transformer_layers_per_block": [1, 10**6, 1, 1]}, "transformer_layers_per_block is"),
        ("unet/config.json", {"layers_per_block": [[250] * 60] * 4}, "cannot be used: can't multiply"),
        ("unet/config.json", {"transformer_layers_per_block": 200, "layers_per_block": 200}, "asks for more layers"),
        ("unet/config.json", {"norm_num_groups": 0}, "norm_num_groups is 0, but must be above 0"),
        ("unet/config.json", {"block_out_channels": [64, -1]}, "block_out_channels is -1"),
        ("unet/config.json", {"sample_size": ["x", "y"]}, "sample_size is 'x', but must be a number"),
        ("vae/config.json", {"scaling_factor": 0}, "scaling_factor is 0, but must be above 0"),
        ("vae/config.json", {"latent_channels": "4"}, "latent_channels is '4', but must be a number"),
        ("text_encoder/config.json", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ("text_encoder/config.json", {"hidden_size": 2.5}, "hidden_size is 2.5, but must be a whole number"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**9}, "num_train_timesteps is 1000000000"),
        ("scheduler/scheduler_config.json", {"beta_start": 1.5}, "its betas are not from 0 to 1"),
        ("scheduler/scheduler_config.json", {"beta_end": float("inf")}, "Infinity is no number"),
        ("tokenizer/tokenizer_config.json", {"model_max_length": 10**30}, "model_max_length is 1"),
    ],
)
def test_configurations_are_bounded_and_named(path, changes, named, folder):
    edit(folder / path, **changes)
    started = time.process_time()
    with pytest.raises(CheckpointError, match=rf"{re.escape(path)}\b.*{named}") as caught:
        load_pipeline(locate(str(folder)))
    assert time.process_time() - started < 10
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("FluxPipeline", {"transformer": ["diffusers", "FluxTransformer2DModel"]}),
        ("StableDiffusion3Pipeline", {"transformer": ["diffusers", "SD3Transformer2DModel"]}),
        ("PixArtAlphaPipeline", {"transformer": ["diffusers", "PixArtTransformer2DModel"]}),
        ("KolorsPipeline", {"unet": ["diffusers", "UNet2DConditionModel"]}),
        ("TextToVideoSDPipeline", {"unet": ["diffusers", "UNet3DConditionModel"]}),
    ],
)
@pytest.mark.compatibility("Models", "folders of SD 3, FLUX, PixArt, video models", "refused: says what is supported")
def test_folders_of_other_models(kind, parts, tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": kind} | parts))
    if kind == "KolorsPipeline":
        with pytest.raises(UsageError, match="is a KolorsPipeline: sd-hyena works on Stable Diffusion"):
            locate(str(tmp_path))
        return
    what = "whose UNet is a UNet3DConditionModel" if "unet" in parts else "which has no UNet"
    with pytest.raises(
        UsageError, match=rf"is a {kind}, {what}: sd-hyena works on Stable Diffusion 1\.x, 2\.x and SDXL"
    ):
        locate(str(tmp_path))


@pytest.mark.compatibility(
    "Models", "folders of a component alone, of an adapter, of a single file", "refused: says what to do"
)
def test_folders_that_are_no_pipelines(folder, tmp_path):
    for inner, message in (
        ("unet", "is a folder of a UNet2DConditionModel alone: give the folder of the whole pipeline"),
        ("text_encoder", "is a folder of a CLIPTextModel alone"),
        ("tokenizer", "the folder has no model_index.json, so it is not a diffusers pipeline"),
    ):
        with pytest.raises(UsageError, match=message):
            locate(str(folder / inner))
    (folder / "model_index.json").unlink()
    with pytest.raises(UsageError, match=r"the folder has unet/, vae/, text_encoder/ but no model_index\.json"):
        locate(str(folder))
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a.safetensors").touch()
    with pytest.raises(UsageError, match=r"if you mean the single file in it, give .*a\.safetensors"):
        locate(str(tmp_path / "one"))
    (tmp_path / "one" / "hyena.safetensors").touch()
    with pytest.raises(UsageError, match="is a folder of Hyena layers: give it with -y/--hyena"):
        locate(str(tmp_path / "one"))
    (tmp_path / "one" / "hyena.safetensors").unlink()
    (tmp_path / "one" / "adapter_config.json").touch()
    with pytest.raises(UsageError, match="is a folder of a peft adapter"):
        locate(str(tmp_path / "one"))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("tokenizer", r"lacks the folder tokenizer/, which its model_index\.json names"),
        ("scheduler/scheduler_config.json", r"lacks scheduler/scheduler_config\.json"),
        ("vae/config.json", r"lacks vae/config\.json"),
        (UNET_WEIGHTS, r"holds no weights in unet/"),
    ],
)
@pytest.mark.compatibility(
    "Models", "folders without a tokenizer, weights or another part", "refused: says what is missing"
)
def test_missing_parts_are_told(path, message, folder):
    whole = json.loads((folder / "model_index.json").read_text())
    edit(folder / "model_index.json", vae=[None, None])
    with pytest.raises(UsageError, match=r"its model_index\.json names no vae"):
        locate(str(folder))
    edit(folder / "model_index.json", **whole)
    missing = folder / path
    shutil.rmtree(missing) if missing.is_dir() else missing.unlink()
    with pytest.raises(CheckpointError, match=message):
        locate(str(folder))


@pytest.mark.parametrize("weights", [*WEIGHTS, "text_encoder_2/model.safetensors"])
@pytest.mark.compatibility("Models", "folders whose weights lack a tensor, or do not fit", "refused: names the tensor")
def test_weights_that_do_not_fit_are_told(weights, saved_folder, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(saved_folder("sdxl" if "_2" in weights else "sd15"), folder)
    held = load_file(folder / weights)
    key = next(key for key in held if key.endswith(("q_proj.weight", "conv_out.weight")))
    usual = key.removeprefix("text_model.")
    for change, message in (({}, f"lacks .*{usual}: download"), ({key: held[key][:1]}, f"another shape of .*{usual}")):
        save_file({k: v for k, v in held.items() if k != key} | change, folder / weights, {"format": "pt"})
        assert cli.main(["generate", "-m", str(folder), "-p", "x", "-o", str(tmp_path / "out")]) == 1
        (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("sd-hyena: model "))
        assert re.search(message, line)


def test_earlier_names_of_attention_in_a_vae_are_known(folder, saved_folder):
    later = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    held = load_file(folder / WEIGHTS[1])
    for new, old in later.items():
        held = {key.replace(f".{new}.", f".{old}."): value for key, value in held.items()}
    assert any(".proj_attn." in key for key in held)
    save_file(held, folder / WEIGHTS[1], {"format": "pt"})
    assert_same_model(folder, saved_folder("sd15"))


@pytest.mark.parametrize("value", [[None, None], None], ids=["null", "absent"])
@pytest.mark.parametrize("part", ["text_encoder", "tokenizer"])
def test_pipelines_need_their_text_parts(part, value, folder):
    index = json.loads((folder / "model_index.json").read_text())
    index.pop(part)
    (folder / "model_index.json").write_text(json.dumps(index | ({part: value} if value else {})))
    with pytest.raises(UsageError, match=rf"its model_index\.json names no {part}: give a whole pipeline"):
        locate(str(folder))


def test_sdxls_refiner_has_one_text_encoder(saved_folder, tmp_path):
    assert locate(str(saved_folder("sdxl_refiner"))).kind == "folder"
    shutil.copytree(saved_folder("sdxl"), tmp_path / "xl")
    edit(tmp_path / "xl" / "model_index.json", text_encoder=[None, None])
    with pytest.raises(UsageError, match="names no text_encoder"):
        locate(str(tmp_path / "xl"))


FLOW = "FlowMatchEulerDiscreteScheduler"


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (None, {"num_train_timesteps": "1000"}, "scheduler_config.json cannot be used: num_train_timesteps is '1000'"),
        (None, {"prediction_type": "foo"}, "scheduler_config.json cannot be used: prediction_type is 'foo'"),
        (None, {"beta_schedule": "foo"}, "scheduler_config.json cannot be used: foo is not implemented"),
        ("FooScheduler", {}, "its scheduler FooScheduler is none of diffusers' schedulers"),
        ("UNet2DConditionModel", {}, "its scheduler UNet2DConditionModel is none of"),
        (FLOW, {}, f"its scheduler is a {FLOW}: sd-hyena works on Stable Diffusion"),
    ],
)
@pytest.mark.compatibility("Models", "folders with a scheduler of another kind", "refused: names the file")
def test_schedulers_that_cannot_be_used_are_told(kind, changes, message, folder):
    edit(folder / "scheduler/scheduler_config.json", **changes)
    if kind:
        edit(folder / "model_index.json", scheduler=["diffusers", kind])
    with pytest.raises((CheckpointError, UsageError), match=message):
        locate(str(folder))


def test_a_broken_tokenizer_is_told_and_the_index_alone_is_not_the_folder(folder):
    with pytest.raises(UsageError, match=rf"give the folder, {re.escape(str(folder))}$"):
        locate(str(folder / "model_index.json"))
    (folder / "tokenizer/tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer/tokenizer\.json cannot be read"):
        locate(str(folder))


def test_damaged_parts_are_told(folder):
    (folder / WEIGHTS[1]).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0")
    with pytest.raises(CheckpointError, match=r"vae/diffusion_pytorch_model\.safetensors: is a Git LFS pointer"):
        load_pipeline(locate(str(folder)))
    weights = load_file(folder / UNET_WEIGHTS)
    save_file({key: value for key, value in weights.items() if key != "conv_in.bias"}, folder / UNET_WEIGHTS)
    shutil.copy(folder / UNET_WEIGHTS, folder / WEIGHTS[1])
    with pytest.raises(CheckpointError, match=r"its unet lacks conv_in\.bias: download or copy it again"):
        load_pipeline(locate(str(folder)))
    edit(folder / "unet/config.json", block_out_channels=["x"])
    with pytest.raises(CheckpointError, match=r"unet/config\.json cannot be used"):
        unet_skeleton(locate(str(folder)))
    (folder / "model_index.json").write_text("[")
    with pytest.raises(CheckpointError, match=r"model_index\.json cannot be read"):
        locate(str(folder))


def test_weights_that_are_no_numbers_are_refused_in_folders_too(folder):
    weights = load_file(folder / WEIGHTS[1])
    weights["decoder.conv_out.bias"][0] = float("nan")
    save_file(weights, folder / WEIGHTS[1], {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"vae\.decoder\.conv_out\.bias holds NaN or infinite values"):
        load_pipeline(locate(str(folder)))


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_pickled_weights_never_run_code(component, folder, monkeypatch):
    monkeypatch.chdir(folder)
    (held,) = (folder / component).glob("*.safetensors")
    held.unlink()
    name = "pytorch_model.bin" if component == "text_encoder" else "diffusion_pytorch_model.bin"
    torch.save({"conv_in.weight": Evil()}, folder / component / name)
    with pytest.raises(CheckpointError, match=rf"{name}: asks to run code of its own \(posix\.mkdir\)"):
        load_pipeline(locate(str(folder)))
    assert not (folder / "evil").exists()


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("... to run it, pass trust_remote_code=True"), "asks to run code of its own, which is never done"),
        (ValueError("no such `variant=ema` files"), "has no weights of variant ema"),
        (ValueError("Repo id is odd\nbecause"), "cannot be downloaded: Repo id is odd because$"),
        (OSError("no route to host"), "is not in the cache of downloaded models, and the hub cannot be reached"),
    ],
    ids=["code", "variant", "other", "network"],
)
def test_what_the_hub_answers_is_told_in_one_line(error, message, cache, monkeypatch):
    def download(*args, **kwargs):
        raise error

    monkeypatch.setattr(diffusers.DiffusionPipeline, "download", download)
    with pytest.raises(SdHyenaError, match=rf"^model some/thing: {message}"):
        load_pipeline(locate("some/thing", "ema"))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of downloads, and no network."""
    import huggingface_hub.constants

    for module in (huggingface_hub.constants, diffusers.pipelines.pipeline_utils):
        for name in ("HF_HUB_CACHE", "HF_HUB_OFFLINE"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, str(tmp_path / "hub") if name == "HF_HUB_CACHE" else True)
    return tmp_path / "hub"


@pytest.mark.compatibility("Models", "hub ids, offline", "work from the cache; what is not in it is told in one line")
def test_hub_ids_offline(cache, saved_folder):
    with pytest.raises(SdHyenaError, match="model some/thing: is not in the cache of downloaded models, and the hub"):
        load_pipeline(locate("some/thing"))
    snapshot = cache / "models--some--thing" / "snapshots" / "0"
    shutil.copytree(saved_folder("sd15"), snapshot)
    refs = cache / "models--some--thing" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0")
    assert type(load_pipeline(locate("some/thing"))).__name__ == "StableDiffusionPipeline"
    rename(snapshot, "fp16")
    assert load_pipeline(locate("some/thing")).unet is not None
    with pytest.raises(UsageError, match="has no weights of variant ema; it has fp16"):
        load_pipeline(locate("some/thing", "ema"))
    edit(snapshot / "model_index.json", unet=["mine", "UNet"])
    with pytest.raises(UsageError, match="code in a folder is not run"):
        load_pipeline(locate("some/thing"))


def test_libraries_say_nothing_of_their_own():
    """In a process of its own: they speak when they are first imported."""
    command = [sys.executable, "-m", "sd_hyena", "targets", "-m", "demo", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
