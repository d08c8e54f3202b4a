"""Reading weights by name: every kind of file, and every kind of file that is none."""

import argparse
import collections
import contextlib
import datetime
import json
import os
import pathlib
import pickle
import shutil
import sys
import tarfile
import types
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sd_hyena.errors import CheckpointError
from sd_hyena.tensors import open_tensors, weights_in

WEIGHTS = {
    "a": torch.arange(6.0).reshape(2, 3).half(),
    "b": torch.ones(2, dtype=torch.float8_e4m3fn),
    "c": torch.full((3,), 2.0).bfloat16(),
}


def assert_holds_weights(tensors, names=WEIGHTS):
    assert set(tensors) == set(names)
    assert "missing" not in tensors
    for name in names:
        got, expected = tensors.get(name), WEIGHTS[name]
        assert tensors.shapes[name] == tuple(expected.shape)
        assert tensors.dtypes[name] == got.dtype == expected.dtype
        assert got.float().equal(expected.float())


@pytest.fixture
def lightning(monkeypatch):
    """What Stable Diffusion 1's published pickles hold beside the weights: a trainer's class, and numpy's numbers."""
    names = ("pytorch_lightning", "pytorch_lightning.callbacks", "pytorch_lightning.callbacks.model_checkpoint")
    for name in names:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    kind = type("ModelCheckpoint", (), {"__module__": names[-1]})
    sys.modules[names[-1]].ModelCheckpoint = kind
    return {"callbacks": {kind: {"best": np.float64(3.0), "itself": kind()}}, "global_step": 470_000}


def test_safetensors_are_read_tensor_by_tensor(tmp_path):
    save_file(WEIGHTS, tmp_path / "x.safetensors", {"modelspec.title": "x"})
    tensors = open_tensors(tmp_path / "x.safetensors")
    assert_holds_weights(tensors)
    assert tensors.metadata == {"modelspec.title": "x"}
    with pytest.raises(CheckpointError, match=r"x\.safetensors: holds no tensor nothing"):
        tensors.get("nothing")


@pytest.mark.parametrize("new", [True, False], ids=["zip", "before torch 1.6"])
@pytest.mark.compatibility("Models", "`.ckpt`, nested, with a trainer's extras", "weights are read, no code is run")
def test_pickles_are_read_and_their_extras_dropped(tmp_path, lightning, new):
    names = WEIGHTS if new else ("a", "c")  # there were no eight-bit floats then
    weights = {name: torch.nn.Parameter(WEIGHTS[name], requires_grad=False) for name in names}
    content = {"state_dict": {"state_dict": weights | {"step": 3}}} | lightning
    torch.save(content, tmp_path / "x.ckpt", _use_new_zipfile_serialization=new)
    for module in [name for name in sys.modules if name.startswith("pytorch_lightning")]:
        del sys.modules[module]
    assert_holds_weights(open_tensors(tmp_path / "x.ckpt"), names)


EXTRAS = {
    "namespace": argparse.Namespace(a=1),
    "path": pathlib.PurePosixPath("/x"),
    "array": np.arange(3),
    "time": datetime.datetime(2020, 1, 1),
    "default": collections.defaultdict(int, {"a": 1}),
    "mapping": type("AttributeDict", (dict,), {"__module__": "trainer"})(a=1),
    "list": type("ListConfig", (list,), {"__module__": "trainer"})([1, 2]),
    "complex": complex(1, 2),
}


@pytest.mark.parametrize("kind", EXTRAS)
@pytest.mark.compatibility("Models", "`.ckpt` with any objects of its trainer", "weights are read, no code is run")
def test_extras_of_any_kind_are_inert(kind, tmp_path, monkeypatch):
    trainer = types.ModuleType("trainer")
    trainer.AttributeDict, trainer.ListConfig = (EXTRAS[extra].__class__ for extra in ("mapping", "list"))
    monkeypatch.setitem(sys.modules, "trainer", trainer)
    torch.save(
        {"state_dict": WEIGHTS, "hyper_parameters": EXTRAS[kind], "by": {EXTRAS[kind].__class__: 1}}, tmp_path / "x"
    )
    monkeypatch.delitem(sys.modules, "trainer")
    assert_holds_weights(open_tensors(tmp_path / "x"))


def test_weights_in_a_trainers_kind_of_mapping_are_read(tmp_path):
    torch.save({"state_dict": collections.defaultdict(int, WEIGHTS)}, tmp_path / "x")
    assert_holds_weights(open_tensors(tmp_path / "x"))


def test_extras_call_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number, call in enumerate((shutil.rmtree, pathlib.Path.mkdir)):
        (tmp_path / "kept").mkdir(exist_ok=True)
        torch.save({"state_dict": WEIGHTS, "extra": Calls(getattr(call, "__wrapped__", call))}, tmp_path / f"{number}")
        with contextlib.suppress(CheckpointError):
            assert_holds_weights(open_tensors(tmp_path / f"{number}"))
        assert (tmp_path / "kept").is_dir()
    torch.save({"state_dict": WEIGHTS, "extra": Calls(eval)}, tmp_path / "eval")
    with pytest.raises(CheckpointError, match=r"asks to run code of its own \(eval\)"):
        open_tensors(tmp_path / "eval")


class Calls:
    def __init__(self, function):
        self.function = function

    def __reduce__(self):
        return self.function, ("kept",)


def test_marks_beside_the_weights_are_kept(tmp_path):
    torch.save(
        {"state_dict": WEIGHTS, "v_pred": torch.tensor([]), "ztsnr": True, "ema": False, "step": 3}, tmp_path / "x"
    )
    assert set(open_tensors(tmp_path / "x")) == {*WEIGHTS, "v_pred", "ztsnr"}


def test_headers_of_any_length_are_known_for_what_they_are(tmp_path):
    for length in range(200, 520, 8):  # 8 bytes of it are length, and one of those may be that of a pickle or a text
        save_file({"a": WEIGHTS["a"]}, tmp_path / "x", {"padding": "x" * length})
        assert_holds_weights(open_tensors(tmp_path / "x"), ["a"])


def test_the_name_of_a_file_does_not_decide_what_it_is(tmp_path):
    save_file(WEIGHTS, tmp_path / "x.ckpt")
    torch.save(WEIGHTS, tmp_path / "x.safetensors")
    assert_holds_weights(open_tensors(tmp_path / "x.ckpt"))
    assert_holds_weights(open_tensors(tmp_path / "x.safetensors"))


def test_weights_within_other_things_have_names_with_dots(tmp_path):
    torch.save({"string_to_param": {"*": torch.ones(1, 4)}, "name": "cat"}, tmp_path / "x.pt")
    assert open_tensors(tmp_path / "x.pt").shapes == {"string_to_param.*": (1, 4)}


def shards(folder, stem, index, of=WEIGHTS):
    places = {}
    for number, name in enumerate(of, 1):
        places[name] = f"{stem}-{number:05d}-of-{len(of):05d}.safetensors"
        save_file({name: of[name]}, folder / places[name])
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def test_folders_of_shards_are_read_by_their_index(tmp_path):
    shards(tmp_path, "model", "model.safetensors.index.json")
    assert_holds_weights(open_tensors(tmp_path))
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003.safetensors: no such file"):
        open_tensors(tmp_path)
    save_file({"other": torch.ones(1)}, tmp_path / "model-00002-of-00003.safetensors")
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003.safetensors: lacks b, which model\.safe"):
        open_tensors(tmp_path)


@pytest.mark.parametrize("places", ['{"weight_map": {"a": "../a.safetensors"}}', '{"weight_map": 3}', "[]", "{"])
def test_indices_that_cannot_be_used_are_refused(tmp_path, places):
    (tmp_path / "model.safetensors.index.json").write_text(places)
    with pytest.raises(CheckpointError, match=r"not a readable index|outside of its folder"):
        open_tensors(tmp_path)


def test_variants_of_a_folder(tmp_path):
    one = {"a": WEIGHTS["a"]}
    with pytest.raises(CheckpointError, match="holds no weights"):
        open_tensors(tmp_path)
    shards(tmp_path, "diffusion_pytorch_model.fp16", "diffusion_pytorch_model.safetensors.index.fp16.json")
    assert_holds_weights(open_tensors(tmp_path))  # the only one
    torch.save(one, tmp_path / "diffusion_pytorch_model.bin")
    assert_holds_weights(open_tensors(tmp_path), one)
    save_file(one, tmp_path / "diffusion_pytorch_model.non-ema.safetensors")
    save_file(one, tmp_path / "diffusion_pytorch_model.safetensors")
    assert {variant: path.name for variant, path in weights_in(tmp_path).items()} == {
        "": "diffusion_pytorch_model.safetensors",
        "fp16": "diffusion_pytorch_model.safetensors.index.fp16.json",
        "non-ema": "diffusion_pytorch_model.non-ema.safetensors",
    }
    assert_holds_weights(open_tensors(tmp_path, "non-ema"), one)
    with pytest.raises(CheckpointError, match="no weights of variant fp32; there are plain ones, fp16, non-ema"):
        open_tensors(tmp_path, "fp32")
    for kind in ("bin", "safetensors"):
        (tmp_path / f"diffusion_pytorch_model.{kind}").unlink()
    with pytest.raises(CheckpointError, match="several variants, none of them plain; there are fp16, non-ema"):
        open_tensors(tmp_path)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def _tar(path):
    (path.parent / "member").write_bytes(b"x")
    with tarfile.open(path, "w") as archive:
        archive.add(path.parent / "member", "storages")


def _zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model.safetensors", "")


def _cut(save, end):
    def write(path):
        save(path)
        path.write_bytes(path.read_bytes()[:end])

    return write


def _safetensors(path):
    save_file(WEIGHTS, path)


def _torch(path):
    torch.save(WEIGHTS, path)


def _old_torch(path):
    torch.save({"a": WEIGHTS["a"]}, path, _use_new_zipfile_serialization=False)


BAD = {
    "missing": (lambda path: None, "no such file"),
    "empty": (lambda path: path.touch(), "is empty"),
    "Git LFS": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0"),
        "git lfs pull",
    ),
    "web page": (lambda path: path.write_text("\n<!DOCTYPE html>\n<html>"), "is a web page"),
    "json": (lambda path: path.write_text('{"error": "access to this model is restricted"}'), "is a text file"),
    "text": (lambda path: path.write_text("see the\tother file\r\n"), "is a text file"),
    "noise": (lambda path: path.write_bytes(bytes(range(256))), "neither a safetensors file nor"),
    "huge header": (lambda path: path.write_bytes(b"\xff" * 7 + b"\0{" + b"x" * 99), "cut short or damaged"),
    "bad header": (
        lambda path: path.write_bytes(b"\x05" + b"\0" * 7 + b'{"a":' + b"x" * 99),
        "not a readable safetensors",
    ),
    "cut safetensors": (_cut(_safetensors, -1), "cut short or damaged"),
    "cut header": (_cut(_safetensors, 40), "cut short or damaged"),
    "cut zip": (_cut(_torch, -100), "cut short or damaged"),
    "cut pickle": (_cut(_old_torch, -10), "not a readable torch file, or damaged"),
    "plain pickle": (lambda path: path.write_bytes(pickle.dumps({"a": 1})), "not a readable torch file"),
    "gguf": (lambda path: path.write_bytes(b"GGUF\x03" + b"\0" * 99), "is a GGUF file, which is quantised"),
    "hdf5": (lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + b"\0" * 99), "is an HDF5 file"),
    "picture": (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 99), "is a picture"),
    "7z": (lambda path: path.write_bytes(b"7z\xbc\xaf\x27\x1c" + b"\0" * 99), "is a 7z archive"),
    "rar": (lambda path: path.write_bytes(b"Rar!\x1a\x07\x01" + b"\0" * 99), "is a RAR archive"),
    "onnx": (lambda path: path.write_bytes(b"\x08\x07\x12\x07pytorch" + b"\0" * 99), "is an ONNX model"),
    "tar": (_tar, "tar archive"),
    "zip": (_zip, "zip archive, not weights"),
    "code": (lambda path: torch.save({"a": torch.ones(1), "b": Evil()}, path), r"run code of its own \(posix\.mkdir\)"),
    "module": (lambda path: torch.save(torch.nn.Linear(1, 1), path), r"run code of its own \(torch\.nn\.modules"),
    "one tensor": (lambda path: torch.save(torch.ones(1), path), "holds no weights by name"),
    "script": (lambda path: torch.jit.script(torch.nn.Linear(1, 1)).save(str(path)), "TorchScript"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_checkpoint_is_told_in_one_line(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write, message = BAD[kind]
    write(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=message) as caught:
        open_tensors(tmp_path / "x.safetensors")
    text = str(caught.value)
    assert text.startswith(f"{tmp_path / 'x.safetensors'}: ")
    assert "\n" not in text
    assert "weights_only" not in text
    assert not (tmp_path / "evil").exists()


def test_values_that_were_never_saved_are_missed_when_they_are_read(tmp_path):
    torch.save({"a": torch.empty(2, device="meta")}, tmp_path / "x.pt")
    tensors = open_tensors(tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="a was saved without its values"):
        tensors.get("a")


@pytest.mark.reliability(1, 3)
def test_pickles_with_more_than_one_meaning_or_no_end(tmp_path):
    path = tmp_path / "a.ckpt"

    def refused(message):
        with pytest.raises(CheckpointError, match=message) as error:
            open_tensors(path)
        assert str(path) in str(error.value)

    torch.save({"a.b": WEIGHTS["a"], "a": {"b": WEIGHTS["b"]}}, path)
    refused(r"holds two tensors of the name a\.b")
    many = [1] * 1000
    torch.save({"a": WEIGHTS["a"], "b": [[many] * 1000] * 1000}, path)
    refused("holds more than 200000 parts")
    torch.save({"a": WEIGHTS["a"]}, path)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    refused("is compressed, as torch never writes it")
    name = next(iter(parts))
    with zipfile.ZipFile(path, "w") as archive:
        for each, data in parts.items():
            archive.writestr(each, data)
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr(name, parts[name])
    refused("holds two parts of the same name")


@pytest.mark.reliability(1)
def test_an_index_of_shards_with_a_tensor_twice(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}')
    with pytest.raises(CheckpointError, match=r"index\.json: not a readable index .*the key 'a' is there twice"):
        open_tensors(tmp_path)
