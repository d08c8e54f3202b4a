"""``sd-hyena targets``, ``merge``, ``convert`` and ``info`` as a user types them."""

import json
from pathlib import Path

import pytest
import torch
from conftest import make_unet, run_unet, trained
from diffusers import UNet2DConditionModel

import sd_hyena
from sd_hyena import checkpoint, models
from sd_hyena.cli import main
from sd_hyena.config import OperatorConfig
from sd_hyena.families import FAMILIES
from sd_hyena.targets import find_targets

GOLDEN = Path(__file__).parent.parent / "golden"
LEGACY = GOLDEN / "legacy_IN01_64px.safetensors"


def write(path, names, teacher="A", seed=0):
    targets, made = find_targets(make_unet()), {}
    for number, name in enumerate(names):
        config = OperatorConfig(targets[name].dim, 4, 4, attention_heads=targets[name].heads, block=2)
        made[name] = trained(config, seed + number)
    figures = {name: {"relative_error": 0.125} for name in names}
    checkpoint.save(path, made, teacher={"class": teacher}, training={"step": seed}, figures=figures)
    return path


@pytest.fixture
def files(tmp_path, monkeypatch):
    """a: IN01, OUT11; b: M00, of another teacher; c: OUT11 and IN02. The run is in their folder."""
    monkeypatch.chdir(tmp_path)
    write("a.safetensors", ["IN01", "OUT11"])
    write("b.safetensors", ["M00"], "B", seed=5)
    write("c.safetensors", ["IN02", "OUT11"], seed=9)
    return tmp_path


def tensors(source, name):
    return checkpoint.load(source).tensors[name]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def refused(capsys, arguments, status, message):
    """The command fails and ends with a line that has ``message`` in it, after warnings at most; it changes nothing."""
    before = {path: path.read_bytes() for path in Path.cwd().rglob("*") if path.is_file()}
    assert main(arguments.split()) == status
    *warnings, error = capsys.readouterr().err.splitlines()
    assert message in error
    assert all("taught by different models" in line for line in warnings)
    assert {path: path.read_bytes() for path in Path.cwd().rglob("*") if path.is_file()} == before


@pytest.fixture
def no_weights(monkeypatch):
    """Has ``-m`` take the name of a family: its UNet, and nothing that would load."""

    def skeleton(source):
        with torch.device("meta"):
            return UNet2DConditionModel.from_config(FAMILIES[source.name].config("unet"))

    monkeypatch.setattr(models, "locate", lambda name, variant="", whole=True: models.ModelSource(name, "file", name))
    monkeypatch.setattr(models, "unet_skeleton", skeleton)


def report(capsys, *arguments):
    assert main(["targets", "--json", *map(str, arguments)]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.compatibility("Hyena files", "`sd-hyena targets -m MODEL`", "works without weights for SD1.x, SD2.x, SDXL")
def test_targets_of_stable_diffusion_1(capsys, no_weights):
    at_512 = report(capsys, "-m", "sd15")
    assert (at_512["width"], at_512["height"], len(at_512["targets"])) == (512, 512, 16)
    first = at_512["targets"][0]
    assert {
        key: first[key] for key in ("name", "groups", "path", "ldm_key", "channels", "heads", "grid", "tokens")
    } == {
        "name": "IN01",
        "groups": ["all", "high"],
        "path": "down_blocks.0.attentions.0.transformer_blocks.0.attn1",
        "ldm_key": "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1",
        "channels": 320,
        "heads": 8,
        "grid": [64, 64],
        "tokens": 4096,
    }
    assert first["quadratic_flops"] == 4 * 4096**2 * 320
    assert first["flops"] == first["quadratic_flops"] + 8 * 4096 * 320**2
    assert first["share"] == first["flops"] / at_512["flops"]
    assert 780e9 < at_512["flops"] < 830e9  # 401.7 billion multiplications and additions, as others count them
    wide = report(capsys, "-m", "sd15", "-W", 1024, "-H", 504)
    assert [row["grid"] for row in wide["targets"] if row["name"] in ("IN01", "IN04", "M00")] == [
        [63, 128],
        [32, 64],
        [8, 16],
    ]
    assert [row["name"] for row in wide["targets"] if "high" in row["groups"]] == [
        "IN01",
        "IN02",
        "OUT09",
        "OUT10",
        "OUT11",
    ]


@pytest.mark.parametrize(("name", "count", "tokens"), [("sdxl", 70, 4096), ("sd21", 16, 9216)])
def test_targets_of_other_families(capsys, no_weights, name, count, tokens):
    found = report(capsys, "-m", name)
    assert len(found["targets"]) == count
    assert found["targets"][0]["tokens"] == tokens
    assert 0.15 < sum(row["share"] for row in found["targets"]) < 0.6


def test_targets_as_a_table(capsys):
    assert main(["targets", "-m", "demo"]) == 0
    text = capsys.readouterr().out
    assert "demo: self-attention at 256x256 px" in text
    assert "│ OUT11 │ high  │" in text
    assert "middle_block.1.transformer_blocks.0.attn1" in text
    assert "multiplication and addition" in text


def test_targets_of_a_model_whose_config_is_not_at_hand(capsys, monkeypatch):
    expected = report(capsys, "-m", "demo")
    monkeypatch.setattr(models, "unet_skeleton", lambda source: None)
    assert report(capsys, "-m", "demo") == expected


@pytest.fixture
def demo_as(monkeypatch):
    """Has ``-m demo`` stand for a tiny UNet of any configuration."""

    def stand(**config):
        with torch.device("meta"):
            unet = UNet2DConditionModel(**(dict(make_unet().config) | config))
        monkeypatch.setattr(models, "unet_skeleton", lambda source: unet)

    return stand


def test_targets_of_unets_that_are_told_more(capsys, demo_as):
    small = {
        "block_out_channels": (8, 16),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
    }
    demo_as(**small)
    plain = report(capsys, "-m", "demo")
    for config in (
        {"num_class_embeds": 10},
        {"class_embed_type": "timestep"},
        {"class_embed_type": "identity"},
        {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 12},
        {"class_embed_type": "simple_projection", "projection_class_embeddings_input_dim": 12},
        {"addition_embed_type": "text", "addition_embed_type_num_heads": 2},
    ):
        demo_as(**small, **config)
        told = report(capsys, "-m", "demo")
        assert [row["flops"] for row in told["targets"]] == [row["flops"] for row in plain["targets"]], config
        assert plain["flops"] <= told["flops"] < 1.1 * plain["flops"], config


@pytest.mark.compatibility("Hyena files", "`sd-hyena targets` of a UNet that cannot be counted", "names without shares")
@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"addition_embed_type": "text"}, "shape"),  # 8 channels for 64 heads
        (
            {"addition_embed_type": "image", "encoder_hid_dim_type": "image_proj", "encoder_hid_dim": 8},
            "it is told pictures",
        ),
    ],
)
def test_targets_without_shares(capsys, caplog, demo_as, config, reason):
    demo_as(**config)
    found = report(capsys, "-m", "demo")
    assert [found["flops"], found["targets"][0]["share"], found["targets"][0]["flops"]] == [None] * 3
    assert [row["name"] for row in found["targets"] if "high" in row["groups"]][::4] == ["IN01", "OUT11"]
    assert len(caplog.messages) == 1
    assert "demo: names and sizes without costs: the operations of this UNet cannot be counted" in caplog.text
    assert reason in caplog.text
    assert main(["targets", "-m", "demo"]) == 0
    text = capsys.readouterr().out
    assert "│ OUT11 │ high  │" in text
    assert "quadratic" not in text


def test_targets_that_cannot_be(capsys, files):
    refused(capsys, "targets -m demo --variant fp16", 2, "model demo: has no weights of variant fp16")
    refused(capsys, "targets -m none", 2, "model none not found")
    refused(capsys, "targets -m demo -W 100", 2, "width 100 px: model demo needs a positive multiple of 8, such as 96")
    refused(capsys, "targets -m demo -H 0", 2, "height 0 px")


@pytest.mark.compatibility("Hyena files", "`sd-hyena merge A B -o C`", "works; a layer in both needs `--prefer`")
def test_merge(files, capsys, caplog):
    assert main(["merge", "a.safetensors", "b.safetensors", "-o", "all.safetensors"]) == 0
    assert "all.safetensors: 3 layers" in capsys.readouterr().out
    assert "taught by different models (IN01 and M00, for instance)" in caplog.text
    unets = make_unet(), make_unet()
    assert sd_hyena.load_hyena(unets[0], "all.safetensors") == ["IN01", "OUT11", "M00"]
    for file in ("a", "b"):
        sd_hyena.load_hyena(unets[1], f"{file}.safetensors")
    assert torch.equal(run_unet(unets[0]), run_unet(unets[1]))
    merged = checkpoint.load("all.safetensors")
    assert (merged.teacher, merged.origin("M00").teacher) == ({"class": "A"}, {"class": "B"})
    assert (merged.training, merged.origin("M00").training) == ({"step": 0}, {"step": 5})
    assert merged.origin("M00").figures == {"relative_error": 0.125}
    assert main(["info", "all.safetensors"]) == 0
    printed = capsys.readouterr().out
    assert "teacher of IN01, OUT11: class=A" in printed
    assert "training of M00: step=5" in printed
    assert main(["info", "--json", "all.safetensors"]) == 0
    layers = json.loads(capsys.readouterr().out)["layers"]
    assert layers["M00"]["teacher"] == {"class": "B"}
    assert "teacher" not in layers["IN01"]
    assert layers["IN01"]["dtype"] == "float32"


@pytest.mark.parametrize(("prefer", "taken"), [("first", "a"), ("last", "c")])
def test_merging_the_same_layer(files, capsys, prefer, taken):
    refused(
        capsys,
        "merge a.safetensors c.safetensors -o all.safetensors",
        2,
        "layer OUT11 is in both a.safetensors and c.safetensors: give --prefer first or --prefer last",
    )
    assert main(f"merge a.safetensors c.safetensors -o all.safetensors --prefer {prefer}".split()) == 0
    assert set(checkpoint.load("all.safetensors").layers) == {"IN01", "IN02", "OUT11"}
    assert same(tensors("all.safetensors", "OUT11"), tensors(f"{taken}.safetensors", "OUT11"))
    assert checkpoint.load("all.safetensors").origin("OUT11").training == {"step": {"a": 0, "c": 9}[taken]}


def test_layers_of_one_teacher_are_merged_without_a_word(files, capsys, caplog):
    assert main(["merge", "a.safetensors", "c.safetensors", "--prefer", "last", "-o", "all.safetensors"]) == 0
    assert main(["convert", "a.safetensors", "-t", "IN01", "-o", "in.safetensors"]) == 0
    assert main(["convert", "a.safetensors", "-t", "OUT11", "-o", "out.safetensors"]) == 0
    assert main(["merge", "in.safetensors", "out.safetensors", "-o", "a.safetensors", "--overwrite"]) == 0
    assert not caplog.records
    assert checkpoint.load("a.safetensors").layers["OUT11"].training is None


@pytest.mark.compatibility("Hyena files", "a file of the 2024 sd-hyena, `sd-hyena convert`", "works; same weights")
def test_a_legacy_file_becomes_one_of_ours(files, capsys):
    assert main(["convert", str(LEGACY), "-o", "ours.safetensors"]) == 0
    old, new = checkpoint.load(LEGACY), checkpoint.load("ours.safetensors")
    assert (old.version, new.version) == (0, 1)
    assert new.layers["IN01"].config == old.layers["IN01"].config
    assert new.training == old.training
    assert same(old.build("IN01").state_dict(), new.build("IN01").state_dict())


def test_a_legacy_file_without_a_name_is_given_one(files, capsys):
    operator = trained(OperatorConfig(8, 16, 16, operator="causal"))
    from safetensors.torch import save_file

    save_file({k: v.clone() for k, v in operator.state_dict().items()}, "nameless.safetensors")
    for command in ("convert nameless.safetensors", "merge nameless.safetensors a.safetensors"):
        refused(capsys, f"{command} -o x.safetensors", 2, "does not say which layer it holds: name it with")
    for target in ("IN01,IN02", "all"):
        refused(capsys, f"convert nameless.safetensors -o x.safetensors -t {target}", 2, "is not one name")
    assert main(["convert", "nameless.safetensors", "-o", "named.safetensors", "-t", "out10"]) == 0
    unet, other = make_unet(), make_unet()
    sd_hyena.load_hyena(unet, "named.safetensors")
    sd_hyena.load_hyena(other, "nameless.safetensors", "OUT10")
    assert torch.equal(run_unet(unet), run_unet(other))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_types(files, capsys, dtype):
    assert main(f"convert a.safetensors -o x.safetensors --dtype {dtype}".split()) == 0
    for name in ("IN01", "OUT11"):
        wanted = {key: value.to(getattr(torch, dtype)) for key, value in tensors("a.safetensors", name).items()}
        assert same(tensors("x.safetensors", name), wanted)
    assert main(["info", "x.safetensors"]) == 0
    assert f"sd-hyena format 1, {dtype}" in capsys.readouterr().out
    assert sd_hyena.load_hyena(make_unet(), "x.safetensors") == ["IN01", "OUT11"]


def test_values_that_a_type_cannot_hold(files, capsys):
    file = checkpoint.load("a.safetensors")
    file.tensors["OUT11"]["near.weight"][0] = 1e6
    checkpoint.write("large.safetensors", file)
    message = "layer OUT11: near.weight has values up to 1e+06, too large for float16: take bfloat16 or float32"
    refused(capsys, "convert large.safetensors -o x.safetensors --dtype float16", 2, message)
    assert main(["convert", "large.safetensors", "-o", "x.safetensors", "--dtype", "bfloat16"]) == 0


def test_some_of_the_layers(files, capsys):
    assert main(["convert", "a.safetensors", "-o", "x.safetensors", "-t", "out11"]) == 0
    assert list(checkpoint.load("x.safetensors").layers) == ["OUT11"]
    assert same(tensors("x.safetensors", "OUT11"), tensors("a.safetensors", "OUT11"))
    write_blocks = {f"IN07.{k}": trained(OperatorConfig(8, 4, 4, attention_heads=2)) for k in range(2)}
    checkpoint.save("blocks.safetensors", write_blocks | {"IN08.0": write_blocks["IN07.0"]})
    assert main(["convert", "blocks.safetensors", "-o", "y.safetensors", "-t", "IN07"]) == 0
    assert list(checkpoint.load("y.safetensors").layers) == ["IN07.0", "IN07.1"]
    refused(capsys, "convert a.safetensors -o z.safetensors -t IN02", 2, "holds no layer IN02; it has IN01, OUT11")
    refused(capsys, "convert a.safetensors -o z.safetensors -t high", 2, "'high' depends on the model; name its layers")
    refused(capsys, "convert a.safetensors -o z.safetensors -t IN3", 2, "'IN3' is not a layer name")


@pytest.mark.compatibility("Hyena files", "`sd-hyena convert` from file to folder and back", "works; same weights")
def test_file_to_folder_and_back(files, capsys):
    assert main(["convert", "a.safetensors", "-o", "deep/folder"]) == 0
    assert "deep/folder: 2 layers (README.md, config.json, hyena.safetensors)" in capsys.readouterr().out
    assert 'load_hyena(pipe, "folder")' in Path("deep/folder/README.md").read_text()
    assert main(["convert", "deep/folder", "-o", "back.safetensors"]) == 0
    there, back = checkpoint.load("a.safetensors"), checkpoint.load("back.safetensors")
    assert all(same(there.tensors[name], back.tensors[name]) for name in there.layers)
    assert checkpoint.describe(back) == checkpoint.describe(there)
    assert main(["merge", "deep/folder", "b.safetensors", "-o", "merged"]) == 0
    assert main(["info", "merged"]) == 0


def test_nothing_is_overwritten_unasked(files, capsys):
    refused(capsys, "convert a.safetensors -o b.safetensors", 2, "b.safetensors exists: choose another --out")
    refused(capsys, "merge a.safetensors b.safetensors -o a.safetensors", 2, "a.safetensors exists")
    assert main(["convert", "a.safetensors", "-o", "folder"]) == 0
    refused(capsys, "convert b.safetensors -o folder", 2, "folder/hyena.safetensors exists")
    assert main(["convert", "b.safetensors", "-o", "folder", "--overwrite"]) == 0
    assert list(checkpoint.load("folder").layers) == ["M00"]
    assert main(["convert", "a.safetensors", "-t", "IN01", "-o", "a.safetensors", "--overwrite"]) == 0  # itself
    assert list(checkpoint.load("a.safetensors").layers) == ["IN01"]


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ("merge a.safetensors -o x.safetensors", 2, "merge takes two or more"),
        ("merge a.safetensors none.safetensors -o x.safetensors", 1, "none.safetensors: no such file"),
        ("convert damaged.safetensors -o x.safetensors", 1, "damaged.safetensors: is cut short or damaged"),
        ("convert a.safetensors -o x.ckpt", 2, "--out x.ckpt: a Hyena file ends in .safetensors"),
        ("convert a.safetensors -o damaged", 2, "damaged is a file: give a folder"),
        ("convert a.safetensors -o folder.safetensors", 2, "folder.safetensors is a folder"),
        ("convert a.safetensors -o damaged/x.safetensors", 1, "damaged: cannot write"),
        ("convert plain -o x.safetensors", 1, "plain: the folder has no hyena.safetensors"),
        ("info plain", 1, "plain: the folder has no hyena.safetensors"),
    ],
)
def test_what_cannot_be_is_one_line(files, capsys, arguments, status, message):
    Path("damaged").write_bytes(Path("a.safetensors").read_bytes()[:-3])
    Path("damaged.safetensors").write_bytes(Path("damaged").read_bytes())
    Path("folder.safetensors").mkdir()
    Path("plain").mkdir()
    refused(capsys, arguments, status, message)


@pytest.mark.compatibility("Prompts and paths", "an empty name, `-o ''`", "refused; the working folder is `.`")
@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ("merge a.safetensors b.safetensors -o", "--out"),
        ("convert a.safetensors --out", "--out"),
        ("convert -o x.safetensors", "the name of a Hyena file"),
        ("info", "the name of a Hyena file"),
        ("targets -m", "the name of a model"),
        ("generate -p fox -m", "the name of a model"),
        ("generate -m demo -p fox -o", "--out_dir"),
        ("prepare -m demo -o", "--out_dir"),
        ("train -m demo -o", "--out_dir"),
        ("train -m demo --log_dir", "--log_dir"),
        ("train -m demo --config", "--config"),
        ("evaluate -m demo -y a.safetensors -o", "--out_dir"),
        ("anatomy -m demo -o", "--out"),
        ("benchmark layer --out", "--out"),
        ("demo -o", "--out_dir"),
    ],
)
def test_empty_names_do_not_mean_the_working_folder(files, capsys, arguments, what):
    assert main([*arguments.split(), ""]) == 2
    assert capsys.readouterr().err == f"sd-hyena: {what} is empty: name one; . is the working folder\n"
    assert sorted(path.name for path in files.iterdir()) == ["a.safetensors", "b.safetensors", "c.safetensors"]


def test_a_full_disk_keeps_the_old_file(files, capsys, monkeypatch):
    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    refused(
        capsys,
        "merge a.safetensors b.safetensors -o a.safetensors --overwrite",
        1,
        "a.safetensors: cannot write: No space left on device",
    )
    refused(capsys, "convert a.safetensors -o folder", 1, "cannot write: No space left on device")
