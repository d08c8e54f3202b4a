"""Which teacher is which: the same through rounding, another for a fine-tune or a fused LoRA."""

import copy
import logging
import shlex

import pytest
import torch
from conftest import TensorBytes, make_unet
from demo.ldm_export import export
from torch import nn

import sd_hyena
from sd_hyena import checkpoint, patch
from sd_hyena.cli import main
from sd_hyena.distill.prepare import check_teacher
from sd_hyena.distill.shards import finished_manifest
from sd_hyena.distill.students import configure
from sd_hyena.errors import UsageError
from sd_hyena.fingerprint import HASH, SAMPLE, SIZE, describe, difference, distance, exact, fingerprint, sample_of
from sd_hyena.models import load_pipeline, locate
from sd_hyena.models.layers import read_layers
from sd_hyena.nn import build
from sd_hyena.targets import find_targets

TYPES = [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.fixture(scope="module")
def taught_by():
    """A UNet whose weights need all of float32's digits."""
    return make_unet(block_out_channels=(16, 24, 32, 32), norm_num_groups=8)


def record(unet):
    return describe("StableDiffusionPipeline", unet, unet.state_dict().__getitem__)


def changed(unet, change):
    """A copy with every self-attention weight replaced by ``change`` of it."""
    unet = copy.deepcopy(unet)
    for target in find_targets(unet).values():
        for weight in unet.get_submodule(target.path).parameters():
            weight.data = change(weight.data)
    return unet


def fine_tuned(weight, share=0.01):
    return weight + share * weight.std() * torch.randn_like(weight) if weight.dim() > 1 else weight


def with_lora(weight, share=0.02):
    if weight.dim() == 1:
        return weight
    update = torch.randn(len(weight), 2) @ torch.randn(2, weight.shape[1])
    return weight + share * weight.std() * update / update.std()


@pytest.mark.parametrize("stored", TYPES)
@pytest.mark.parametrize("recorded", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("loaded", [None, torch.float32])
def test_the_same_model_in_any_type_is_the_same(taught_by, stored, recorded, loaded):
    if {stored, recorded} >= {torch.float8_e4m3fn, torch.float8_e5m2}:
        loaded = torch.float32
    teacher = record(changed(taught_by, lambda w: w.to(recorded).float()))
    assert difference(teacher, changed(taught_by, lambda w: w.to(stored).to(loaded or stored))) == 0
    by_way = changed(taught_by, lambda w: w.to(torch.bfloat16).to(stored).to(loaded or stored))
    assert difference(teacher, by_way) == 0


@pytest.mark.parametrize("stored", [torch.float32, *TYPES])
@pytest.mark.parametrize("change", [fine_tuned, with_lora])
def test_a_fine_tune_or_a_fused_lora_is_another_model_in_any_type(taught_by, stored, change):
    torch.manual_seed(5)
    other = changed(taught_by, lambda w: change(w).to(stored))
    assert 0.005 < difference(record(taught_by), other) < 0.1


def test_one_layer_of_sixteen_is_enough(taught_by):
    for name in ("IN01", "M00", "OUT11"):
        unet = copy.deepcopy(taught_by)
        for weight in unet.get_submodule(find_targets(unet)[name].path).parameters():
            weight.data = fine_tuned(weight.data, 0.05)
        assert difference(record(taught_by), unet) > 0


@pytest.mark.parametrize("changes", [{}, {"layers_per_block": 1}, {"transformer_layers_per_block": 3}])
def test_a_sample_is_spread_over_all_layers_and_is_of_the_hashed_weights(changes):
    unet = make_unet(**changes)
    assert sample_of(unet) == record(unet)[SAMPLE]
    assert len(set(sample_of(unet))) == SIZE
    targets = list(find_targets(unet).values())
    touched = 0
    for target in targets:
        before = sample_of(unet)
        for weight in unet.get_submodule(target.path).parameters():
            weight.data = 2 * weight.data
        touched += sample_of(unet) != before
    assert touched >= min(len(targets), SIZE) * 0.9
    assert record(unet)[HASH] != record(changed(unet, lambda w: w * 1.0001))[HASH]


def test_of_a_part_read_from_a_file_it_is_that_of_the_loaded_pipeline(tmp_path, demo_pipe):
    export(demo_pipe, tmp_path / "one.safetensors")
    for model in ("demo", str(tmp_path / "one.safetensors")):
        source = locate(model)
        for dtype in (torch.float32, torch.bfloat16):
            whole = fingerprint(load_pipeline(source, dtype=dtype))
            assert read_layers(source, "IN01", dtype=dtype).record == whole
    assert fingerprint(demo_pipe)[HASH] != whole[HASH]
    assert distance(fingerprint(demo_pipe)[SAMPLE], whole[SAMPLE]) == 0


def test_weights_are_read_one_after_the_other(demo_pipe):
    largest = max(
        p.numel() * 4
        for t in find_targets(demo_pipe.unet).values()
        for p in demo_pipe.unet.get_submodule(t.path).parameters()
    )
    half = {name: tensor.half() for name, tensor in demo_pipe.unet.state_dict().items()}
    with TensorBytes() as memory:
        describe("StableDiffusionPipeline", demo_pipe.unet, half.__getitem__)
    assert memory.peak < 2.5 * largest


def written_for(unet, path, teacher):
    """A Hyena file for two layers, with a teacher's record."""
    targets = find_targets(unet)
    operators = {name: build(configure(targets[name], (16, 16), unet)) for name in ("IN01", "OUT11")}
    checkpoint.save(path, operators, teacher=teacher)
    return path


def warnings(caplog):
    return [
        r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING and "switched off" not in r.getMessage()
    ]


@pytest.mark.compatibility(
    "Hyena files", "loaded into another model than it was taught by", "works; warns, by how much"
)
def test_loading_into_another_model_is_warned_of_in_one_line(tmp_path, taught_by, caplog):
    file = written_for(taught_by, tmp_path / "h.safetensors", record(taught_by))
    sd_hyena.load_hyena(changed(taught_by, lambda w: w.half()).half(), file)
    unet = copy.deepcopy(taught_by)
    sd_hyena.load_hyena(unet, file)
    sd_hyena.load_hyena(unet, file)  # onto replaced layers
    sd_hyena.set_hyena_enabled(unet, False)
    sd_hyena.load_hyena(unet, file)
    assert not warnings(caplog)
    torch.manual_seed(1)
    other = changed(taught_by, lambda w: fine_tuned(w, 0.2))
    assert sd_hyena.load_hyena(other, file) == ["IN01", "OUT11"]
    (line,) = warnings(caplog)
    assert str(file) in line
    assert "taught by another model" in line
    assert 10 < float(line.split(", by ")[1].split("%")[0]) < 30


@pytest.mark.parametrize(
    "teacher",
    [
        {},
        {"class": "StableDiffusionPipeline", "widths": "64-96-128-128", HASH: "0123456789abcdef"},
        {SAMPLE: "x" * SIZE},
        {SAMPLE: [1.0] * (SIZE - 1)},
        {SAMPLE: [[1.0]] * SIZE},
        {SAMPLE: None},
    ],
)
def test_where_nothing_usable_is_recorded_nothing_is_said(tmp_path, taught_by, caplog, teacher):
    sd_hyena.load_hyena(copy.deepcopy(taught_by), written_for(taught_by, tmp_path / "h.safetensors", teacher))
    assert not warnings(caplog)


class Packed(nn.Parameter):
    """Stands for the parameters of quantisation libraries."""


class OtherAttention(nn.Module):
    query_dim = inner_dim = 32
    heads = 2


@pytest.mark.parametrize("case", ["meta", "packed", "integers", "offloaded", "another kind"])
def test_where_weights_cannot_be_read_nothing_is_said(taught_by, case):
    teacher = record(changed(taught_by, lambda w: 2 * w))
    unet = copy.deepcopy(taught_by)
    assert difference(teacher, unet) > 0
    if case == "meta":
        unet.to("meta")
    elif case == "offloaded":
        from accelerate import cpu_offload

        cpu_offload(unet, torch.device("cpu"))
    elif case == "another kind":
        unet.mid_block.attentions[0].transformer_blocks[0].attn1 = OtherAttention()
    else:
        layer = unet.get_submodule(find_targets(unet)["M00"].path).to_q
        data = layer.weight.data
        layer.weight = Packed(data) if case == "packed" else nn.Parameter(data.to(torch.int8), requires_grad=False)
    assert difference(teacher, unet) == 0


def test_a_lora_that_is_not_fused_is_not_the_models(taught_by):
    from peft import LoraConfig

    unet = copy.deepcopy(taught_by)
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    assert sample_of(unet) == sample_of(taught_by)
    unet.fuse_lora()
    assert difference(record(taught_by), unet) > 0


def test_a_folder_of_pictures_is_the_teachers_in_any_type_and_no_others(tmp_path, caplog):
    small = shlex.split("-m demo --sizes 64x64 -n 2 --n_held_out 1 --draw_steps 1")
    assert main(["prepare", *small, "-o", str(tmp_path)]) == 0
    manifest = finished_manifest(tmp_path)
    half = fingerprint(load_pipeline(locate("demo"), dtype=torch.bfloat16))
    check_teacher(manifest, tmp_path, half, "torch.bfloat16")
    assert not warnings(caplog)
    manifest.teacher_sample = [1.01 * value for value in manifest.teacher_sample]
    with pytest.raises(UsageError, match="was made by another teacher"):
        check_teacher(manifest, tmp_path, half, "torch.bfloat16")
    manifest.teacher_sample = []  # as earlier versions wrote it
    check_teacher(manifest, tmp_path, half, "torch.bfloat16")
    assert "only class and widths are compared" in "".join(warnings(caplog))


def test_the_bundled_students_record_is_still_its_teachers(pipe):
    assert checkpoint.load("demo").teacher == exact(fingerprint(pipe))
    whole = fingerprint(pipe)
    sd_hyena.load_hyena(pipe, "demo")
    assert fingerprint(pipe) == whole  # of the attention that is replaced
    patch.detach(pipe.unet)
