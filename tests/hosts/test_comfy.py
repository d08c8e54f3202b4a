"""Hyena layers on a stand-in of ComfyUI's model patcher, and the nodes of the pack on a stand-in of its schema."""

import asyncio
import importlib.util
import json
import logging
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from conftest import make_unet
from hosts import comfy_stand_in as stand_in
from safetensors.torch import save_file

import sd_hyena
from sd_hyena import checkpoint, targets
from sd_hyena.errors import CheckpointError, UsageError
from sd_hyena.fingerprint import SAMPLE, sample_of
from sd_hyena.hosts import comfy

PACK = Path(__file__).parents[2] / "comfyui"
IN01 = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1"


@pytest.fixture
def folders(monkeypatch, tmp_path):
    return stand_in.install(monkeypatch, tmp_path / "models")


@pytest.fixture
def model(pipe, folders):
    return patcher(pipe.unet)


@pytest.fixture(scope="module")
def student():
    return checkpoint.load("demo")


def patcher(unet):
    """The stand-in's patcher of a diffusers UNet, in evaluation mode."""
    return stand_in.ModelPatcher(stand_in.BaseModel(stand_in.UNetModel(unet).eval()), "cpu", "cpu")


def inputs(unet, h=9, w=13, batch=2):
    draw = torch.Generator().manual_seed(h * 100 + w)
    x = torch.randn(batch, unet.config.in_channels, h, w, generator=draw)
    return x, torch.tensor([300.0] * batch), torch.randn(batch, 7, unet.config.cross_attention_dim, generator=draw)


def calls(model):
    return {f.target.name: dict(f.calls) for f in model.object_patches.values()}


@pytest.mark.compatibility("ComfyUI", "models of the families of `-m`, any size", "the same as in diffusers to 2e-5")
@pytest.mark.parametrize("size", [(9, 13), (16, 16), (18, 10)])
def test_outputs_are_those_of_diffusers(pipe, model, student, size):
    given = inputs(pipe.unet, *size)
    patched, attached = comfy.attach(model, student)
    assert list(attached.layers) == list(student.layers)
    got = {"attention": model.run(*given), "hyena": patched.run(*given)}
    expected = {"attention": pipe.unet(*given).sample}
    sd_hyena.load_hyena(pipe, "demo")
    expected["hyena"] = pipe.unet(*given).sample
    for way, output in got.items():
        assert (output - expected[way]).abs().max() < 2e-5, way
    assert (got["hyena"] - got["attention"]).abs().max() > 1e-2
    assert calls(patched) == {name: {"hyena": 1} for name in student.layers}


@pytest.mark.parametrize("form", ["full", "core"])
def test_both_forms_and_other_architectures(folders, form, tmp_path):
    from sd_hyena.distill.students import configure
    from sd_hyena.nn import build

    unet = make_unet()
    there = targets.find_targets(unet)
    choices = {"operator": "near", "form": form} if form == "core" else {"operator": "linear"}
    operators = {n: build(configure(t, (8, 8), unet, **choices)) for n, t in there.items()}
    checkpoint.save(tmp_path / "x.safetensors", operators)
    given = inputs(unet)
    patched, _ = comfy.attach(patcher(unet), checkpoint.load(tmp_path / "x.safetensors"))
    got = patched.run(*given)
    sd_hyena.load_hyena(unet, tmp_path / "x.safetensors")
    assert (got - unet(*given).sample).abs().max() < 2e-5


@pytest.mark.parametrize("changes", [{}, {"layers_per_block": 1}, {"transformer_layers_per_block": 2}])
def test_layers_have_the_same_names_and_shapes(changes):
    unet = make_unet(**changes)
    ours = targets.find_targets(unet)
    theirs = comfy.find_targets(stand_in.UNetModel(unet))
    assert list(theirs) == list(ours)
    for name, target in theirs.items():
        same = "dim", "inner_dim", "heads", "downscale", "ldm_key"
        assert [getattr(target, key) for key in same] == [getattr(ours[name], key) for key in same]


@pytest.mark.compatibility(
    "ComfyUI", "several samplers from one loader, some with Hyena", "each as if alone, bit for bit"
)
def test_plain_again_bit_for_bit(pipe, model, student):
    given = inputs(pipe.unet)
    keys, before = list(model.model.state_dict()), model.run(*given)
    first, _ = comfy.attach(model, student)
    for _ in range(2):  # another size between
        hyena = first.run(*given)
        first.run(*inputs(pipe.unet, 16, 8))
        assert torch.equal(first.run(*given), hyena)
        assert torch.equal(model.run(*given), before)
    assert list(model.model.state_dict()) == keys
    assert model.object_patches == {}
    assert model.additional_models == {}


@pytest.mark.compatibility(
    "ComfyUI", "LoRA before or after the node, or on another branch", "loads in full; the same result in any order"
)
def test_adapters_find_every_layer_while_hyena_is_in_the_shared_model(pipe, model, student):
    """ComfyUI reads the shared model's state dict when it adds a LoRA, and Hyena may be in it then."""
    given = inputs(pipe.unet)
    change = {
        f"{IN01}.to_q.weight": torch.full((64, 64), 0.01),
        f"{IN01[:-1]}2.to_q.weight": torch.full((64, 64), 0.01),
    }
    plain = model.clone()
    assert len(plain.add_patches(change)) == 2
    expected = plain.run(*given)
    patched, _ = comfy.attach(model, student)
    patched.patch_model()
    other = model.clone()
    assert len(other.add_patches(change)) == 2
    patched.unpatch_model()
    assert torch.equal(other.run(*given), expected)
    after = patched.clone()
    assert len(after.add_patches(change)) == 2
    before, _ = comfy.attach(plain, student)
    assert torch.equal(after.run(*given), before.run(*given))


def identity(n, context, value, extra):
    return n, context, value


def merged(n, context, value, extra):
    return n[:, ::2], context, value


@pytest.mark.compatibility(
    "ComfyUI", "ToMe, HyperTile", "layers whose tokens they change go to attention, with one line"
)
@pytest.mark.parametrize(
    ("disturb", "reason"),
    [
        (lambda m: m.set_model_patch(merged, "attn1_patch"), "tokens are not the picture's 9 x 13 cells"),
        (lambda m: m.set_model_patch(lambda n, c, v, e: (n, c * 1, v), "attn1_patch"), "something else"),
    ],
)
def test_calls_that_are_not_for_hyena(pipe, model, student, disturb, reason, caplog):
    """They go to attention, with one line for each layer."""
    given = inputs(pipe.unet)
    patched, _ = comfy.attach(model, student, "IN01")
    plain = model.clone()
    for each in (patched, plain):
        disturb(each)
        if reason.startswith("tokens"):
            each.set_model_patch(lambda n, extra: n.repeat_interleave(2, 1)[:, : 9 * 13], "attn1_output_patch")
    comparable = plain.clone()
    with caplog.at_level(logging.WARNING, "sd_hyena"):
        if reason.startswith("tokens"):  # the stand-in's other layers have other token counts
            only = patched.object_patches[f"{IN01}.forward"]
            x = torch.randn(1, 60, 64)
            options = {"activations_shape": [1, 64, 9, 13]}
            assert torch.equal(only(x, transformer_options=options), only.attention.forward(x))
            only(x, transformer_options=options)
        else:
            assert torch.equal(patched.run(*given), comparable.run(*given))
            patched.run(*given)
    assert [record.getMessage() for record in caplog.records if reason in record.getMessage()] != []
    assert len(caplog.records) == 1
    assert calls(patched) == {"IN01": {"attention": 2}}


@pytest.mark.compatibility(
    "ComfyUI", "nodes that replace a block's attention (PAG, SAG)", "win in that block, in the passes that are theirs"
)
def test_neighbours_that_change_nothing(pipe, model, student):
    given = inputs(pipe.unet)
    patched, _ = comfy.attach(model, student)
    hyena = patched.run(*given)
    beside = patched.clone()
    beside.set_model_patch(identity, "attn1_patch")
    assert torch.equal(beside.run(*given), hyena)
    replaced = patched.clone()  # it is given what attention would be: this block is attention's again
    replaced.set_model_attn1_replace(lambda q, k, v, extra: v, ("middle", 0))
    replaced.run(*given)
    assert calls(patched)["M00"] == {"hyena": 2}
    assert calls(patched)["IN01"] == {"hyena": 3}


def test_a_mask_and_an_unknown_grid_go_to_attention(model, student, caplog):
    patched, _ = comfy.attach(model, student, "IN01")
    forward = patched.object_patches[f"{IN01}.forward"]
    x = torch.randn(1, 12, 64)
    known = {"transformer_options": {"activations_shape": [1, 64, 3, 4]}}
    mask = torch.zeros(12, 12)
    assert torch.equal(forward(x, mask=mask, **known), forward.attention.forward(x, mask=mask))
    assert torch.equal(forward(x), forward.attention.forward(x))
    assert forward.calls == {"attention": 2}
    assert "mask" in caplog.text
    assert not torch.allclose(forward(x, **known), forward.attention.forward(x))
    assert forward.calls["hyena"] == 1


@pytest.mark.compatibility(
    "ComfyUI", "a range of steps; two files after each other", "work; the later node wins in its range"
)
def test_a_range_of_steps_and_two_files_after_each_other(pipe, model, student):
    given = inputs(pipe.unet)

    def run(patched, sigma):
        return patched.run(*given, sigmas=torch.tensor([sigma]))

    late, _ = comfy.attach(model, student, start=0.5)
    plain, hyena = model.run(*given), comfy.attach(model, student)[0].run(*given)
    assert torch.equal(run(late, 6.0), plain)
    assert torch.equal(run(late, 5.0), hyena)
    assert torch.equal(run(late, 0.1), hyena)
    other = comfy.attach(model, student, scaling="stretch", end=0.5)[0]
    both, _ = comfy.attach(other, student, start=0.5)
    assert torch.equal(run(both, 9.0), run(other, 9.0))
    assert torch.equal(run(both, 1.0), hyena)
    assert len(both.get_additional_models_with_key(comfy.KEY)) == 2
    last, _ = comfy.attach(both, student)  # nothing of what was there is left
    assert torch.equal(run(last, 9.0), hyena)
    assert len(last.get_additional_models_with_key(comfy.KEY)) == 1


def test_one_file_for_each_layer(pipe, model, student):
    """Two nodes with different layers: both their operators are loaded with the model."""
    given = inputs(pipe.unet)
    first, _ = comfy.attach(model, student, "IN01")
    second, attached = comfy.attach(first, student, "OUT11")
    operators = [op for each in second.get_additional_models_with_key(comfy.KEY) for op in each.model]
    assert len(operators) == 2
    assert list(attached.layers) == ["OUT11"]
    assert torch.equal(second.run(*given), comfy.attach(model, student, "IN01,OUT11")[0].run(*given))


def test_another_nodes_patch_of_the_same_forward_serves_where_hyena_does_not(pipe, model, student):
    theirs = model.clone()
    theirs.add_object_patch(f"{IN01}.forward", lambda x, *args, **options: x)
    patched, _ = comfy.attach(theirs, student, "IN01", start=0.5)
    x = torch.randn(1, 12, 64)
    forward = patched.object_patches[f"{IN01}.forward"]
    assert forward(x, transformer_options={"activations_shape": [1, 64, 3, 4], "sigmas": torch.tensor([9.0])}) is x


@pytest.mark.compatibility("ComfyUI", "float16, bfloat16, `--lowvram`", "operators follow the model")
def test_operators_follow_the_type_of_the_model(pipe, folders, student):
    model = patcher(pipe.unet)
    model.model.manual_cast_dtype = torch.bfloat16
    patched, _ = comfy.attach(model, student)
    (ours,) = patched.get_additional_models_with_key(comfy.KEY)
    assert {weight.dtype for weight in ours.model.parameters()} == {torch.bfloat16}
    given = inputs(pipe.unet)
    exact = comfy.attach(patcher(pipe.unet), student)[0].run(*given)
    assert torch.nn.functional.cosine_similarity(patched.run(*given).flatten(), exact.flatten(), 0) > 0.999


@pytest.mark.parametrize("name", ["IN01", "M00"])
def test_a_layer_compiles_in_one_graph(pipe, model, student, name):
    patched, _ = comfy.attach(model, student, name)
    (forward,) = patched.object_patches.values()
    x = torch.randn(2, 12, forward.target.dim)
    options = {"activations_shape": [2, forward.target.dim, 3, 4]}
    compiled = torch.compile(forward, backend="eager", fullgraph=True)
    for _ in range(3):
        assert torch.allclose(
            compiled(x, transformer_options=options), forward(x, transformer_options=options), atol=1e-5
        )
    assert forward.calls == {"hyena": 3}


def test_layers_of_another_model_are_said(pipe, model, caplog):
    file = checkpoint.load("demo")
    file.teacher[SAMPLE] = sample_of(pipe.unet)
    _, attached = comfy.attach(model, file)
    assert attached.further == 0
    assert "another model" not in str(attached)
    file.teacher[SAMPLE] = sample_of(make_unet())
    _, attached = comfy.attach(model, file)
    assert attached.further > 0.1
    assert "taught by another model" in str(attached)
    assert "taught by another model" in caplog.text


@pytest.mark.compatibility(
    "ComfyUI",
    "Flux, SD3, video models; files of another family",
    "refused before sampling, or left alone (`on_mismatch: skip`)",
)
def test_errors_come_before_anything_is_patched(pipe, model, student, folders, tmp_path):
    for targets_, words in (
        ("IN03", "no self-attention layer IN03; it has IN01"),
        ("nonsense", "not a layer name"),
        ("IN01,IN01", "given twice"),
    ):
        with pytest.raises(UsageError, match=words):
            comfy.attach(model, student, targets_)
    half = checkpoint.load("demo")
    for name in list(half.layers)[1:]:
        del half.layers[name], half.tensors[name]
    with pytest.raises(UsageError, match=r"holds no layer OUT11; it has IN01"):
        comfy.attach(model, half, "OUT11")
    with pytest.raises(UsageError, match=r"layer IN01 has 8 channels, but the operator has 64"):
        comfy.attach(patcher(make_unet()), student)
    with pytest.raises(UsageError, match="no UNet of Stable Diffusion"):
        comfy.attach(stand_in.ModelPatcher(stand_in.BaseModel(torch.nn.Linear(2, 2)), "cpu", "cpu"), student)
    for start, end in ((0.5, 0.5), (0.8, 0.2), (-0.1, 1), (0, 2)):
        with pytest.raises(UsageError, match="shares of the denoising"):
            comfy.attach(model, student, start=start, end=end)
    assert model.object_patches == {}
    assert model.additional_models == {}


def test_what_does_not_fit_can_be_left_as_it_is(model, student):
    patched, attached = comfy.attach(model, student, "IN01,IN03", skip=True)
    assert list(attached.layers) == ["IN01"]
    assert attached.left == {"IN03": "the file has no such layer"}
    assert list(patched.object_patches) == [f"{IN01}.forward"]
    assert "IN03: as it was: the file has no such layer" in str(attached)
    none, attached = comfy.attach(patcher(make_unet()), student, skip=True)
    assert set(attached.left) == set(student.layers)
    assert none.object_patches == {}
    none, attached = comfy.attach(
        stand_in.ModelPatcher(stand_in.BaseModel(torch.nn.Linear(2, 2)), "cpu", "cpu"), student, skip=True
    )
    assert "no UNet" in str(attached)


# The pack


@pytest.fixture
def pack(folders, monkeypatch, tmp_path):
    """The pack, loaded as ComfyUI loads it, from a copy's folder name that is no module's."""
    monkeypatch.delitem(sys.modules, "sd_hyena_pack", raising=False)
    spec = importlib.util.spec_from_file_location("custom_nodes/sd-hyena", PACK / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    for name in (spec.name, f"{spec.name}.nodes"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    nodes = asyncio.run(asyncio.run(module.comfy_entrypoint()).get_node_list())
    return {node.define_schema().node_id: node for node in nodes}


DEFAULTS = {"layers": "all", "start_percent": 0.0, "end_percent": 1.0, "scaling": "file", "on_mismatch": "error"}


def test_the_node_applies_what_is_in_the_models_folder(pipe, model, pack, tmp_path):
    node = pack["HyenaApply"]
    given = inputs(pipe.unet)
    patched, report = node.execute(model, "demo", **DEFAULTS).result
    expected = patched.run(*given)
    assert report.startswith(f"{checkpoint.load('demo').label}: 16 Hyena layers\n")
    checkpoint.write(tmp_path / "models" / "hyena" / "mine.safetensors", checkpoint.load("demo"))
    (tmp_path / "models" / "hyena" / "other.ckpt").write_bytes(b"")
    (combo,) = (each for each in node.define_schema().inputs if each.id == "hyena_name")
    assert combo.options["options"] == ["mine.safetensors", "demo"]
    assert torch.equal(node.execute(model, "mine.safetensors", **DEFAULTS).result[0].run(*given), expected)
    _, report = node.execute(model, "demo", **DEFAULTS | {"layers": "high"}).result
    assert "IN01" in report
    assert "M00" not in report
    before = node.fingerprint_inputs("mine.safetensors", **DEFAULTS)
    checkpoint.write(tmp_path / "models" / "hyena" / "mine.safetensors", checkpoint.load("demo"))
    assert node.fingerprint_inputs("mine.safetensors", **DEFAULTS) != before


def test_the_node_keeps_the_folders_of_extra_model_paths(folders, tmp_path, monkeypatch):
    """Which have no endings: every file is listed, of which nothing but safetensors may be."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("a.safetensors", "b.ckpt"):
        (elsewhere / name).write_bytes(b"")
    folders.folder_names_and_paths["hyena"] = ([str(elsewhere)], set())
    spec = importlib.util.spec_from_file_location("custom_nodes/again", PACK / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    asyncio.run(module.comfy_entrypoint())
    assert folders.get_filename_list("hyena") == ["a.safetensors"]
    assert len(folders.folder_names_and_paths["hyena"][0]) == 2


def test_the_node_refuses_before_a_prompt_runs(model, pack, tmp_path):
    node = pack["HyenaApply"]
    sound = {"hyena_name": "demo", "layers": "all", "start_percent": 0.0, "end_percent": 1.0}
    assert node.validate_inputs(**sound) is True
    for change, words in (
        ({"hyena_name": "other.ckpt"}, "no such file in models/hyena"),
        ({"hyena_name": "../../secret.safetensors"}, "no such file in models/hyena"),
        ({"layers": "IN1"}, "not a layer name"),
        ({"layers": ""}, "not a layer name"),
        ({"start_percent": 1.0}, "must be below"),
    ):
        assert words in node.validate_inputs(**sound | change)
    save_file({"x": torch.zeros(1)}, tmp_path / "models" / "hyena" / "lora.safetensors")
    with pytest.raises(CheckpointError, match=r"lora.safetensors: "):
        node.execute(model, "lora.safetensors", **DEFAULTS)


def test_pictures_are_compared_pair_by_pair(pack):
    node = pack["HyenaCompare"]
    a = torch.rand(2, 16, 24, 3, generator=torch.Generator().manual_seed(0))
    b = a.clone()
    b[1] = (b[1] + 0.01).clamp(0, 1)
    difference, figures = node.execute(a, b, 4.0).result
    assert figures.splitlines()[0] == "PSNR 100.00 dB, SSIM 1.0000"
    assert figures.splitlines()[1].startswith("PSNR 40.")
    assert torch.equal(difference[0], torch.zeros_like(a[0]))
    assert difference[1].max() == pytest.approx(0.04, abs=1e-6)
    with pytest.raises(UsageError, match="2 of 24 x 16 px and 1 of 24 x 16 px"):
        node.execute(a, b[:1], 4.0)


def test_inputs_are_explained(pack):
    for node in pack.values():
        schema = node.define_schema()
        assert schema.description
        for each in schema.inputs:
            assert each.options.get("tooltip"), each.id


def test_example_workflows_use_inputs_that_exist(pack):
    """Widget values stand in the order of a node's inputs that are no sockets."""
    workflows = sorted((PACK / "example_workflows").glob("*.json"))
    assert [path.stem for path in workflows] == ["hyena_basic", "hyena_compare"]
    used = set()
    for path in workflows:
        assert path.with_suffix(".jpg").is_file()
        content = json.loads(path.read_text())
        links = {link[0]: link for link in content["links"]}
        ids = {node["id"] for node in content["nodes"]}
        assert all(link[1] in ids and link[3] in ids for link in links.values())
        for node in content["nodes"]:
            for socket in node.get("inputs", ()):
                if socket.get("link") is not None:
                    assert links[socket["link"]][3] == node["id"]
            if node["type"] not in pack:
                continue
            used.add(node["type"])
            schema = pack[node["type"]].define_schema()
            sockets = [each.id for each in schema.inputs if each.kind in ("MODEL", "IMAGE")]
            widgets = [each for each in schema.inputs if each.kind not in ("MODEL", "IMAGE")]
            assert [each["name"] for each in node["inputs"] if "widget" not in each] == sockets
            assert len(node["widgets_values"]) == len(widgets)
            for value, widget in zip(node["widgets_values"], widgets, strict=True):
                options = None if widget.id == "hyena_name" else widget.options.get("options")
                assert value in options if options else isinstance(value, str | int | float)
    assert used == set(pack)


def test_the_pack_is_ready_for_the_registry():
    content = tomllib.loads((PACK / "pyproject.toml").read_text())
    assert "comfyui" not in content["project"]["name"].lower()
    assert content["project"]["version"] == sd_hyena.__version__
    assert set(content["tool"]["comfy"]) >= {"PublisherId", "DisplayName", "requires-comfyui"}
    assert (PACK / content["project"]["license"]["file"]).read_text() == (PACK.parent / "LICENSE").read_text()
    assert (PACK / "requirements.txt").read_text().split() == content["project"]["dependencies"] == ["sd-hyena"]
    readme = (PACK / "README.md").read_text()
    for node in ("Apply Hyena Layers", "Compare Images (PSNR)"):
        assert f"## {node}" in readme


def test_the_pack_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "sd_hyena", None)
    spec = importlib.util.spec_from_file_location("custom_nodes/without", PACK / "__init__.py")
    with pytest.raises(ImportError, match="pip install --no-deps sd-hyena"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
