"""Our files and the 2024 original's: round trips, and one clear line for everything that is wrong."""

import json
import os
import stat
import struct
from pathlib import Path

import pytest
import torch
from conftest import run_unet
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import sd_hyena
from sd_hyena import checkpoint, patch
from sd_hyena.errors import CheckpointError, SdHyenaError, UsageError
from sd_hyena.nn import OperatorConfig, build

GOLDEN = Path(__file__).parent / "golden"
LEGACY = GOLDEN / "legacy_IN01_64px.safetensors"


def write(path, names=("IN01",), dim=8, **sections):
    operators = {}
    for i, name in enumerate(names):
        torch.manual_seed(i)
        operators[name] = build(OperatorConfig(dim, 4, 4, attention_heads=2))
    checkpoint.save(path, operators, **sections)
    return operators


def test_round_trip(tmp_path):
    path = tmp_path / "a.safetensors"
    operators = write(
        path,
        ("IN01", "OUT07.3"),
        teacher={"class": "X"},
        training={"step": 7},
        figures={"IN01": {"relative_error": 0.5}},
    )
    file = checkpoint.load(path)
    assert list(file.layers) == ["IN01", "OUT07.3"]
    assert file.teacher == {"class": "X"}
    assert file.training == {"step": 7}
    assert file.layers["IN01"].figures == {"relative_error": 0.5}
    for name, operator in operators.items():
        assert file.layers[name].config == operator.config
        for key, value in file.build(name).state_dict().items():
            assert torch.equal(value, operator.state_dict()[key])
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o644
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_legacy_layers_load_bit_exact_with_inferred_settings():
    for name, expected in (
        ("legacy_IN01_64px", {"hyena_order": 2, "hyena_filter_order": 64, "hyena_short_filter_order": 3}),
        ("legacy_IN02_order3", {"hyena_order": 3, "hyena_filter_order": 32, "hyena_short_filter_order": 5}),
    ):
        file = checkpoint.load(GOLDEN / f"{name}.safetensors")
        (target,) = file.layers
        assert target == name.split("_")[1]
        config = file.layers[target].config
        assert (config.operator, config.dim, config.height, config.width) == ("causal", 320, 8, 8)
        assert {key: getattr(config, key) for key in expected} == expected
        state = file.build(target).state_dict()
        for key, value in load_file(GOLDEN / f"{name}.safetensors").items():
            assert torch.equal(state[key], value)
        assert (
            state["filter_fn.implicit_filter.5.freq"].data_ptr() == state["filter_fn.implicit_filter.1.freq"].data_ptr()
        )


@pytest.mark.parametrize(
    "hostile",
    [
        {"train_width": "1e9", "train_height": "-1"},
        {"train_width": "nan"},
        {"train_width": "99999999999999999999", "train_height": "8"},
        {"target": "../IN01"},
        {},
    ],
)
def test_legacy_metadata_is_not_trusted(tmp_path, hostile):
    path = tmp_path / "a.safetensors"
    save_file(load_file(LEGACY), path, hostile or None)
    file = checkpoint.load(path)
    assert list(file.layers) == [""]
    config = file.layers[""].config
    assert config.height * config.width == 64


def header(path):
    raw = path.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    return raw, size


def truncated(path):
    path.write_bytes(path.read_bytes()[:-3])


def too_long(path):
    path.write_bytes(path.read_bytes() + b"xx")


def empty(path):
    path.write_bytes(b"")


def five_bytes(path):
    path.write_bytes(b"hello")


def absurd_header(path):
    path.write_bytes(struct.pack("<Q", 2**62) + path.read_bytes()[8:])


def lfs_pointer(path):
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")


def not_a_number(path):
    edit_tensors(path, lambda t: t | {"layers.IN01.in_proj.weight": t["layers.IN01.in_proj.weight"] * float("nan")})


def missing_tensor(path):
    edit_tensors(path, lambda t: {k: v for k, v in t.items() if "blocks" not in k})


def extra_tensor(path):
    edit_tensors(path, lambda t: t | {"layers.IN02.x": torch.zeros(1)})


def wrong_shape(path):
    edit_tensors(path, lambda t: t | {"layers.IN01.in_proj.weight": torch.zeros(3)})


def integers(path):
    edit_tensors(path, lambda t: t | {"layers.IN01.in_proj.weight": t["layers.IN01.in_proj.weight"].int()})


def newer_version(path):
    edit_tensors(path, lambda t: t, format_version="99")


def bad_json(path):
    edit_tensors(path, lambda t: t, layers="{")


def hostile_order(path):
    config = {"dim": 8, "height": 4, "width": 4, "operator": "causal", "hyena_order": 10**6}
    layers = json.dumps({"IN01": {"config": config}})
    edit_tensors(path, lambda t: t, layers=layers)


def unknown_operator(path):
    config = {"dim": 8, "height": 4, "width": 4, "operator": "hyena9"}
    edit_tensors(path, lambda t: t, layers=json.dumps({"IN01": {"config": config}}))


def hostile_name(path):
    edit_tensors(path, lambda t: t, layers=json.dumps({"../x": {"config": {}}}))


def other_safetensors(path):
    save_file({"weight": torch.zeros(3)}, path)


def beyond_float32(path):
    edit_tensors(path, lambda t: {k: v.double() * (1e300 if "in_proj.weight" in k else 1) for k, v in t.items()})


def twice_in_metadata(path):
    edit_tensors(path, lambda t: t, teacher='{"a": 1, "a": 2}')


def not_a_number_in_metadata(path):
    edit_tensors(path, lambda t: t, training='{"lr": NaN}')


def nested(path):
    edit_tensors(path, lambda t: t, training='{"a":' * 5000)


def tensor_twice(path):
    edit_header(path, lambda text: text.replace(b'"layers.IN01.in_proj.bias"', b'"layers.IN01.in_proj.weight"'))


def metadata_twice(path):
    edit_header(path, lambda text: text.replace(b'"__metadata__":{', b'"__metadata__":{"format":"x",'))


def edit_header(path, change):
    raw, size = header(path)
    text = change(raw[8 : 8 + size])
    assert text != raw[8 : 8 + size]
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])


def edit_tensors(path, change, **metadata):
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        old = file.metadata()
    tensors = {k: v.clone().contiguous() for k, v in change(load_file(path)).items()}
    save_file(tensors, path, old | metadata)


DAMAGE = [
    (truncated, "cut short or damaged"),
    (too_long, "cut short or damaged"),
    (empty, "is empty"),
    (five_bytes, "is a text file, not weights"),
    (absurd_header, "cut short or damaged"),
    (lfs_pointer, "Git LFS pointer"),
    (not_a_number, "in_proj.weight holds NaN"),
    (missing_tensor, "missing tensors: blocks.weight"),
    (extra_tensor, "belong to no described layer"),
    (wrong_shape, r"shape \(3,\), expected"),
    (integers, "expected floating point"),
    (newer_version, "format version '99'"),
    (bad_json, "'layers' is not a JSON object"),
    (hostile_order, "hyena_order must be a whole number from 2 to 16"),
    (unknown_operator, "operator must be one of states, near, .*, got 'hyena9'"),
    (hostile_name, "'../x' is malformed"),
    (other_safetensors, "holds no Hyena layer"),
    (beyond_float32, "in_proj.weight has values beyond the range of float32"),
    (twice_in_metadata, "'teacher' is not a JSON object: the key 'a' is there twice"),
    (not_a_number_in_metadata, "'training' is not a JSON object: NaN is no number"),
    (nested, "'training' is not a JSON object: is nested more than 64 deep"),
    (tensor_twice, "the key 'layers.IN01.in_proj.weight' is there twice"),
    (metadata_twice, "the key 'format' is there twice"),
]


@pytest.mark.reliability(1, 2, 4)
@pytest.mark.parametrize(("damage", "message"), DAMAGE, ids=[d.__name__ for d, _ in DAMAGE])
def test_damaged_files_are_refused_and_nothing_is_attached(tmp_path, unet, damage, message):
    path = tmp_path / "a.safetensors"
    write(path)
    damage(path)
    with pytest.raises(CheckpointError, match=message) as error:
        sd_hyena.load_hyena(unet, path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert not patch.attached(unet)


@pytest.mark.reliability(5)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 3000), value=st.integers(0, 255), cut=st.integers(0, 200))
def test_mutated_headers_never_escape_as_other_errors(tmp_path, position, value, cut):
    path = tmp_path / "m.safetensors"
    if not (tmp_path / "good.safetensors").exists():
        write(tmp_path / "good.safetensors")
    raw = bytearray((tmp_path / "good.safetensors").read_bytes())
    raw[position % len(raw)] = value
    path.write_bytes(raw[: len(raw) - cut])
    try:
        checkpoint.load(path)
    except CheckpointError:
        return
    assert cut == 0


def test_a_full_disk_is_one_clear_line_and_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    write(path)
    old = path.read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SdHyenaError, match=r"a\.safetensors: cannot write: No space left"):
        write(path)
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.reliability(13)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_never_written(tmp_path, unet, value):
    path = tmp_path / "a.safetensors"
    operators = write(path)
    old = path.read_bytes()
    with pytest.raises(SdHyenaError, match=r"a\.safetensors: layers: not written: IN01\.figures\.cosine is not finite"):
        checkpoint.save(path, operators, figures={"IN01": {"cosine": value}})
    sd_hyena.load_hyena(unet, path)
    with torch.no_grad():
        for operator in (operators["IN01"], patch.attached(unet)["IN01"].operator):
            operator.in_proj.weight[0, 0] = value
    named = r"layers\.IN01\.in_proj\.weight holds NaN or infinite values"
    with pytest.raises(CheckpointError, match=rf"a\.safetensors: not written: {named}"):
        checkpoint.save(path, operators)
    with pytest.raises(CheckpointError, match=rf"hyena\.safetensors: not written: {named}"):
        sd_hyena.save_pretrained(unet, tmp_path / "folder")
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.reliability(4, 13)
def test_weights_beyond_the_unets_type_are_refused_before_anything_is_attached(tmp_path, unet):
    path = tmp_path / "a.safetensors"
    write(path, ("IN01", "OUT11"))
    edit_tensors(path, lambda t: {k: v * (1e6 if k == "layers.OUT11.out_proj.weight" else 1) for k, v in t.items()})
    message = r"a\.safetensors: layer OUT11: the operator's out_proj\.weight has values beyond the range of float16"
    with pytest.raises(UsageError, match=message):
        sd_hyena.load_hyena(unet.half(), path)
    assert not patch.attached(unet)
    sd_hyena.load_hyena(unet.float(), path)
    sd_hyena.set_hyena_enabled(unet, False)
    with pytest.raises(UsageError, match=message):  # and its weights are as they were
        sd_hyena.set_hyena_enabled(unet.half(), True)
    assert patch.attached(unet)["OUT11"].operator.out_proj.weight.abs().max() > 1e5


def test_a_vanished_folder_is_one_clear_line(tmp_path):
    with pytest.raises(SdHyenaError, match="cannot write: No such file"):
        write(tmp_path / "gone" / "a.safetensors")


def test_api_round_trip_through_a_unet(unet, tmp_path):
    before = run_unet(unet)
    path, again = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    write(path, ("IN01", "OUT11"))
    assert sd_hyena.load_hyena(unet, path) == ["IN01", "OUT11"]
    student = run_unet(unet)
    sd_hyena.save_hyena(unet, again)
    sd_hyena.unload_hyena(unet)
    assert torch.equal(run_unet(unet), before)
    sd_hyena.load_hyena(unet, again, scaling="extend")
    assert {layer.operator.config.scaling for layer in patch.attached(unet).values()} == {"extend"}
    assert sd_hyena.load_hyena(unet, again) == ["IN01", "OUT11"]
    assert torch.equal(run_unet(unet), student)
    sd_hyena.unload_hyena(unet, "IN01")
    assert list(patch.attached(unet)) == ["OUT11"]


def test_other_head_counts_are_another_architecture(unet, tmp_path):
    path = tmp_path / "a.safetensors"
    checkpoint.save(path, {"IN01": build(OperatorConfig(8, 4, 4, attention_heads=4))})
    with pytest.raises(UsageError, match="IN01 has 2 attention heads, but the operator was taught by one with 4"):
        sd_hyena.load_hyena(unet, path)


def test_saving_again_keeps_the_records(unet, tmp_path):
    path, again = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    write(path, teacher={"class": "X"}, training={"step": 7}, figures={"IN01": {"relative_error": 0.5}})
    sd_hyena.load_hyena(unet, path)
    sd_hyena.save_hyena(unet, again)
    file = checkpoint.load(again)
    assert (file.teacher, file.training["step"]) == ({"class": "X"}, 7)
    assert file.layers["IN01"].figures == {"relative_error": 0.5}


def test_unknown_scaling(unet, tmp_path):
    write(tmp_path / "a.safetensors")
    with pytest.raises(UsageError, match="scaling must be one of stretch, extend"):
        sd_hyena.load_hyena(unet, tmp_path / "a.safetensors", scaling="shrink")


def test_scaling_overrides_the_file_and_is_warned_of_where_nothing_scales(unet, tmp_path, caplog):
    path = tmp_path / "a.safetensors"
    write(path)
    sd_hyena.load_hyena(unet, path, scaling="extend")
    assert patch.attached(unet)["IN01"].operator.block((16, 16)) == (8, 8)
    sd_hyena.load_hyena(unet, path)
    assert patch.attached(unet)["IN01"].operator.block((16, 16)) == (16, 16)
    assert not caplog.records
    checkpoint.save(path, {"IN01": build(OperatorConfig(8, 4, 4, attention_heads=2, operator="linear"))})
    sd_hyena.load_hyena(unet, path, scaling="extend")
    assert ["the scaling is ignored" in r.message for r in caplog.records] == [True]


def test_choosing_layers_of_a_file(unet, tmp_path):
    path = tmp_path / "a.safetensors"
    write(path, ("IN01", "OUT11"))
    assert sd_hyena.load_hyena(unet, path, "OUT11") == ["OUT11"]
    sd_hyena.unload_hyena(unet)
    assert sd_hyena.load_hyena(unet, path, "all") == ["IN01", "OUT11"]
    with pytest.raises(UsageError, match="holds no layer IN02; it has IN01, OUT11"):
        sd_hyena.load_hyena(unet, path, "IN02")


def test_a_file_of_another_architecture_names_both(unet):
    with pytest.raises(UsageError, match=r"legacy_IN01.*IN01 has 8 channels, but the operator has 320"):
        sd_hyena.load_hyena(unet, LEGACY)
    assert not patch.attached(unet)


def test_a_file_that_does_not_name_its_layer_needs_a_target(unet, tmp_path):
    operator = build(OperatorConfig(8, 16, 16, operator="causal"))
    path = tmp_path / "nameless.safetensors"
    state = {
        k: v
        for k, v in operator.state_dict().items()
        if k not in ("filter_fn.implicit_filter.3.freq", "filter_fn.implicit_filter.5.freq")
    }
    save_file(state, path)
    with pytest.raises(UsageError, match="does not say which layer"):
        sd_hyena.load_hyena(unet, path)
    with pytest.raises(UsageError, match="'high' selects 5"):
        sd_hyena.load_hyena(unet, path, "high")
    assert sd_hyena.load_hyena(unet, path, "OUT11") == ["OUT11"]
    run_unet(unet)


def test_load_operator(tmp_path):
    one, two = tmp_path / "1.safetensors", tmp_path / "2.safetensors"
    write(one)
    write(two, ("IN01", "IN02"))
    x = torch.randn(1, 15, 8)
    assert sd_hyena.load_operator(one)(x, size=(3, 5)).shape == x.shape
    with pytest.raises(UsageError, match="holds 2 layers"):
        sd_hyena.load_operator(two)
    checkpoint.save(one, {"IN01": build(OperatorConfig(8, 4, 4, attention_heads=2, form="core"))})
    with pytest.raises(UsageError, match="core operator"):
        sd_hyena.load_operator(one)
