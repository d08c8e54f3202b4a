"""What users of peft and diffusers expect: what is attached, layers one by one, sources of every kind."""

import json
import random

import pytest
import torch
from conftest import make_unet, run_unet, trained
from safetensors import safe_open
from safetensors.torch import load_file

import sd_hyena
from sd_hyena import checkpoint, patch
from sd_hyena.config import OperatorConfig
from sd_hyena.errors import CheckpointError, UsageError
from sd_hyena.targets import find_targets


def write(path, names, seed=0, form="full", **sections):
    targets, made = find_targets(make_unet()), {}
    for number, name in enumerate(names):
        config = OperatorConfig(targets[name].dim, 4, 4, attention_heads=targets[name].heads, block=2, form=form)
        made[name] = trained(config, seed + number)
    checkpoint.save(path, made, **sections)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """a: IN01 and OUT11, of one teacher; b: IN01 (another one) and M00, of another."""
    folder = tmp_path_factory.mktemp("layers")
    a = {"teacher": {"class": "A"}, "training": {"step": 7}, "figures": {"IN01": {"relative_error": 0.25}}}
    return {
        "a": write(folder / "a.safetensors", ["IN01", "OUT11"], **a),
        "b": write(folder / "b.safetensors", ["IN01", "M00"], seed=5, form="core", teacher={"class": "B"}),
    }


@pytest.mark.compatibility("Hyena files", "`attached(pipe)`", "which layers, from which file, on or off")
def test_what_is_attached(unet, files):
    assert str(sd_hyena.attached(unet)) == "no Hyena layers"
    sd_hyena.load_hyena(unet, files["a"])
    sd_hyena.load_hyena(unet, files["b"], "M00")
    sd_hyena.set_hyena_enabled(unet, False, "OUT11")
    found = sd_hyena.attached(unet)
    assert list(found) == ["IN01", "M00", "OUT11"]
    assert found["IN01"] == sd_hyena.AttachedLayer(
        "IN01", "states full cubed_relu near 3 block 2", "full", files["a"], True, 0.25
    )
    assert (found["M00"].form, found["M00"].file, found["M00"].relative_error) == ("core", files["b"], None)
    assert [layer.enabled for layer in found.values()] == [True, True, False]
    assert str(found).splitlines() == [
        f"IN01: states full cubed_relu near 3 block 2, on, held-out error 0.2500, from {files['a']}",
        f"M00: states core cubed_relu near 3 block 2, on, from {files['b']}",
        f"OUT11: states full cubed_relu near 3 block 2, off, from {files['a']}",
    ]
    with pytest.raises(AttributeError):
        found["IN01"].enabled = False


def test_an_operator_of_no_file(unet, files):
    patch.attach(unet, {"IN01": trained(OperatorConfig(8, 4, 4, attention_heads=2))})
    assert sd_hyena.attached(unet)["IN01"].file is None
    assert "from no file" in str(sd_hyena.attached(unet))


@pytest.mark.compatibility("Hyena files", "`set_hyena_enabled(pipe, enabled, targets)`", "layer by layer")
def test_layers_are_switched_one_by_one(unet, files):
    plain = run_unet(unet)
    sd_hyena.load_hyena(unet, files["a"], "OUT11")
    alone = run_unet(unet)
    sd_hyena.load_hyena(unet, files["a"])
    both = run_unet(unet)
    sd_hyena.set_hyena_enabled(unet, False, "in01")
    assert torch.equal(run_unet(unet), alone)
    sd_hyena.set_hyena_enabled(unet, False, "high")  # what is attached of the group
    assert torch.equal(run_unet(unet), plain)
    sd_hyena.set_hyena_enabled(unet, True, "OUT11, IN01")
    assert torch.equal(run_unet(unet), both)
    with pytest.raises(UsageError, match="no Hyena layer at IN02: there are IN01, OUT11"):
        sd_hyena.set_hyena_enabled(unet, False, "IN01,IN02")
    with pytest.raises(UsageError, match="no self-attention layer IN03"):
        sd_hyena.set_hyena_enabled(unet, False, "IN03")
    assert torch.equal(run_unet(unet), both)
    sd_hyena.unload_hyena(unet)
    with pytest.raises(UsageError, match="no Hyena layer at all: nothing is attached"):
        sd_hyena.set_hyena_enabled(unet, False, "all")


@pytest.mark.compatibility("Hyena files", "layers loaded while all others are switched off", "start switched off")
def test_what_runs_on_attention_goes_on_running_on_attention(unet, files, caplog):
    plain = run_unet(unet)
    sd_hyena.load_hyena(unet, files["a"])
    sd_hyena.set_hyena_enabled(unet, False)
    assert not caplog.records
    sd_hyena.load_hyena(unet, files["b"])  # IN01 again, and a new one
    assert "loaded switched off, as what is attached is: IN01, M00" in caplog.text
    assert torch.equal(run_unet(unet), plain)
    sd_hyena.set_hyena_enabled(unet, True)
    switched = run_unet(unet)
    sd_hyena.unload_hyena(unet)
    sd_hyena.load_hyena(unet, files["a"])
    sd_hyena.load_hyena(unet, files["b"])
    assert torch.equal(run_unet(unet), switched)


class Expected:
    """What should be attached: name -> (file, on), by the rules alone."""

    holds = {"a": ["IN01", "OUT11"], "b": ["IN01", "M00"]}  # noqa: RUF012

    def __init__(self):
        self.layers = {}

    def load(self, file):
        start = not self.layers or any(on for _, on in self.layers.values())
        before = dict(self.layers)
        for name in self.holds[file]:
            self.layers[name] = (file, before[name][1] if name in before else start)

    def switch(self, on, name):
        for each in [name] if name else list(self.layers):
            self.layers[each] = (self.layers[each][0], on)

    def unload(self, name):
        for each in [name] if name else list(self.layers):
            self.layers.pop(each, None)


@pytest.mark.parametrize("seed", range(8))
def test_any_order_of_loading_switching_and_unloading(unet, files, seed):
    plain, expected, dice = run_unet(unet), Expected(), random.Random(seed)
    for _ in range(12):
        name = dice.choice([None, *expected.layers])
        kind = dice.choice(["load", "load", "on", "off", "off", "unload"])
        if kind == "load":
            file = dice.choice("ab")
            expected.load(file)
            sd_hyena.load_hyena(unet, files[file])
        elif kind == "unload":
            expected.unload(name)
            sd_hyena.unload_hyena(unet, name)
        elif expected.layers:
            expected.switch(kind == "on", name)
            sd_hyena.set_hyena_enabled(unet, kind == "on", name)
        found = {n: (layer.file.stem, layer.enabled) for n, layer in sd_hyena.attached(unet).items()}
        assert found == expected.layers
    other = make_unet()
    for name, (file, on) in expected.layers.items():
        if on:
            sd_hyena.load_hyena(other, files[file], name)
    assert torch.equal(run_unet(unet), run_unet(other))
    sd_hyena.unload_hyena(unet)
    assert torch.equal(run_unet(unet), plain)


def metadata(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.mark.compatibility("Hyena files", "a state dict and its config", "works; same output as from the file")
def test_state_dicts(unet, files):
    sd_hyena.load_hyena(unet, files["b"])
    expected, other = run_unet(unet), make_unet()
    tensors, config = sd_hyena.hyena_state_dict(unet), sd_hyena.hyena_config(unet)
    assert sd_hyena.load_hyena(other, tensors, config=json.loads(json.dumps(config))) == ["IN01", "M00"]
    assert torch.equal(run_unet(other), expected)
    assert sd_hyena.attached(other)["M00"].file is None
    sd_hyena.unload_hyena(other)
    assert sd_hyena.load_hyena(other, load_file(files["b"]), config=metadata(files["b"])) == ["IN01", "M00"]
    assert torch.equal(run_unet(other), expected)
    assert set(tensors) == set(load_file(files["b"]))
    layer = patch.attached(unet)["IN01"].operator
    tensors["layers.IN01.near.weight"].zero_()  # a copy
    assert layer.near.weight.abs().max() > 0


def test_a_state_dict_of_the_2024_program_needs_no_config(unet, tmp_path):
    operator = trained(OperatorConfig(8, 16, 16, operator="causal"))
    assert sd_hyena.load_hyena(unet, dict(operator.state_dict()), "OUT11") == ["OUT11"]
    with pytest.raises(UsageError, match="the state dict: does not say which layer it holds"):
        sd_hyena.load_hyena(unet, dict(operator.state_dict()))
    kept = sd_hyena.hyena_config(unet)
    assert kept["training"] == {"format": "sd-hyena 2024"}
    again = make_unet()
    sd_hyena.load_hyena(again, sd_hyena.hyena_state_dict(unet), config=kept)
    assert torch.equal(run_unet(again), run_unet(unet))


def test_state_dicts_that_cannot_be_used(unet, files):
    tensors, config = load_file(files["a"]), metadata(files["a"])
    for given, kind, message in [
        ({}, UsageError, "says nothing about its operators: give config="),
        (config | {"layers": "{"}, CheckpointError, "the state dict: metadata section 'layers' is not a JSON object"),
        (config | {"format": "other"}, CheckpointError, "the state dict: holds no Hyena layer"),
    ]:
        with pytest.raises(kind, match=message):
            sd_hyena.load_hyena(unet, tensors, config=given)
    key = "layers.IN01.near.weight"
    for value, message in [
        (tensors[key].to("meta"), f"{key} is on the meta device, not a tensor with values"),
        (tensors[key].numpy(), f"{key} is of type ndarray, not a tensor"),
        (tensors[key] * float("nan"), "layer IN01: near.weight holds NaN"),
    ]:
        with pytest.raises(CheckpointError, match=f"the state dict: {message}"):
            sd_hyena.load_hyena(unet, tensors | {key: value}, config=config)
    with pytest.raises(UsageError, match="there are no Hyena layers"):
        sd_hyena.hyena_state_dict(unet)
    with pytest.raises(UsageError, match=r"a\.safetensors: brings its own config: config= goes with a state dict"):
        sd_hyena.load_hyena(unet, files["a"], config=config)
    assert not patch.attached(unet)


def test_configs_that_are_none(unet, files):
    tensors, config = load_file(files["a"]), metadata(files["a"])
    for given in (json.dumps(config), files["a"], [config], 3, ""):
        with pytest.raises(UsageError, match=r"config must be a dict, as sd_hyena\.hyena_config returns it") as error:
            sd_hyena.load_hyena(unet, tensors, config=given)
        assert len(str(error.value)) < 150
    with pytest.raises(UsageError, match=r"config holds what no config\.json can: "):
        sd_hyena.load_hyena(unet, tensors, config=config | {"layers": {"IN01": {"config": object()}}})
    with pytest.raises(CheckpointError, match="the metadata's entry for layer '3' is malformed"):
        sd_hyena.load_hyena(unet, tensors, config=config | {"layers": {3: {"config": {}}}})
    with pytest.raises(CheckpointError, match="the state dict: 3 is not the name of a tensor"):
        sd_hyena.load_hyena(unet, tensors | {3: torch.zeros(1)}, config=config)
    assert not patch.attached(unet)


@pytest.mark.compatibility("Hyena files", "targets as a list, a set, a dict or a generator of names", "works")
def test_targets_may_be_any_names(unet, files):
    assert sd_hyena.load_hyena(unet, files["a"], targets=["OUT11"]) == ["OUT11"]
    assert sd_hyena.load_hyena(unet, files["a"], targets=("in01", "OUT11")) == ["IN01", "OUT11"]
    sd_hyena.set_hyena_enabled(unet, False, ["IN01"])
    sd_hyena.set_hyena_enabled(unet, False, [])
    assert [layer.enabled for layer in sd_hyena.attached(unet).values()] == [False, True]
    sd_hyena.set_hyena_enabled(unet, True, (name for name in ["IN01"]))
    with pytest.raises(UsageError, match="no Hyena layer at IN02"):
        sd_hyena.set_hyena_enabled(unet, False, ["IN01", "IN02"])
    sd_hyena.unload_hyena(unet, [])
    assert list(sd_hyena.attached(unet)) == ["IN01", "OUT11"]
    sd_hyena.unload_hyena(unet, {"IN01"})
    sd_hyena.unload_hyena(unet, sd_hyena.attached(unet))
    assert not sd_hyena.attached(unet)
    with pytest.raises(UsageError, match=r"a\.safetensors: targets names no layer"):
        sd_hyena.load_hyena(unet, files["a"], targets=[])
    for wrong, shown in ((3, "3"), ([None], "None"), (b"IN01", "73"), ([["IN01"]], "list")):
        for call in (sd_hyena.load_hyena, sd_hyena.set_hyena_enabled, sd_hyena.unload_hyena):
            given = {"load_hyena": (files["a"],), "set_hyena_enabled": (True,)}.get(call.__name__, ())
            with pytest.raises(UsageError, match=f"^targets must be text or a list of texts, got {shown}$"):
                call(unet, *given, targets=wrong)


def test_unloading_twice_is_no_error(unet, files, caplog):
    sd_hyena.load_hyena(unet, files["a"])
    for targets in ("OUT11", "OUT11", "OUT03", "high", "all", None, None):
        sd_hyena.unload_hyena(unet, targets)
    assert not sd_hyena.attached(unet)
    assert not caplog.records
    with pytest.raises(UsageError, match="no self-attention layer IN03"):
        sd_hyena.unload_hyena(unet, "IN03")


@pytest.mark.parametrize("enabled", ["no", "IN01", None, 0, 1, ["IN01"]])
def test_switches_take_true_and_false_alone(unet, files, enabled):
    sd_hyena.load_hyena(unet, files["a"])
    before = [layer.enabled for layer in sd_hyena.attached(unet).values()]
    order = r"set_hyena_enabled\(pipe, enabled, targets\): enabled must be True or False, got"
    for more in ((), (False,)):
        with pytest.raises(UsageError, match=order):
            sd_hyena.set_hyena_enabled(unet, enabled, *more)
    assert [layer.enabled for layer in sd_hyena.attached(unet).values()] == before


def test_sources_that_are_none(unet, files, caplog, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for source in (None, 3, [files["a"], files["b"]], torch.nn.Linear(1, 1), b"a.safetensors"):
        for load in (lambda source=source: sd_hyena.load_hyena(unet, source), lambda: sd_hyena.load_operator(None)):
            with pytest.raises(UsageError, match="layers are named by one file, folder or hub id, or given as a state"):
                load()
    for path in ("", None, 3):
        said = "is empty: name one" if path == "" else f"must be a path, got {path}"
        for save in (sd_hyena.save_hyena, sd_hyena.save_pretrained):
            sd_hyena.load_hyena(unet, files["a"])
            with pytest.raises(UsageError, match=said):
                save(unet, path)
    with pytest.raises(UsageError, match="the name of a Hyena file is empty"):
        sd_hyena.load_hyena(unet, "")
    assert not list(tmp_path.iterdir())
    sd_hyena.load_hyena(unet, files["a"], subfolder=None)
    assert not caplog.records
    with pytest.raises(UsageError, match="subfolder must be a folder's name, got 3"):
        sd_hyena.load_hyena(unet, files["a"], subfolder=3)
    sd_hyena.load_hyena(unet, files["a"], subfolder="high", revision="v1")
    assert "a.safetensors: is a file, so there is no subfolder to choose: high is ignored" in caplog.text
    sd_hyena.load_hyena(unet, load_file(files["a"]), config=metadata(files["a"]), subfolder="high")
    assert "a state dict has no revision and no subfolder to choose" in caplog.text
    assert "a.safetensors: is on this machine, so there is no revision to choose: v1 is ignored" in caplog.text


def test_every_layer_keeps_the_record_of_its_file(unet, files, tmp_path):
    sd_hyena.load_hyena(unet, files["a"])
    sd_hyena.load_hyena(unet, files["b"], "M00")
    patch.attach(unet, {"IN02": trained(OperatorConfig(8, 4, 4, attention_heads=2))})
    sd_hyena.save_hyena(unet, tmp_path / "c.safetensors")
    file = checkpoint.load(tmp_path / "c.safetensors")
    assert (file.teacher, file.training) == ({"class": "A"}, {"step": 7})
    taught = {name: (file.origin(name).teacher, file.origin(name).training) for name in file.layers}
    assert taught == {
        "IN01": ({"class": "A"}, {"step": 7}),
        "IN02": ({}, {}),
        "M00": ({"class": "B"}, {}),
        "OUT11": ({"class": "A"}, {"step": 7}),
    }
    assert list(json.loads(metadata(tmp_path / "c.safetensors")["layers"])["OUT11"]) == ["config", "figures"]


def test_every_public_name_is_there():
    for name in sd_hyena.__all__:
        assert getattr(sd_hyena, name) is not None


@pytest.mark.usefixtures("no_network")
def test_a_pipeline_of_anything_that_m_takes(pipe):
    loaded = sd_hyena.load_pipeline("demo", dtype=torch.bfloat16)
    assert type(loaded) is type(pipe)
    assert loaded.unet.dtype == torch.bfloat16
    with pytest.raises(UsageError, match="not found"):
        sd_hyena.load_pipeline("no-such.safetensors")


def test_a_folder_that_train_wrote_is_its_last_step(tmp_path, caplog):
    caplog.set_level("INFO", logger="sd_hyena")
    for step, name in ((5, "Hyena-00005"), (500, "Hyena-00500"), (40, "Hyena-00040")):
        write(tmp_path / f"{name}.safetensors", ["IN01"], training={"step": step})
    assert checkpoint.load(tmp_path).training["step"] == 500
    assert "taking Hyena-00500.safetensors" in caplog.text
    write(tmp_path / "IN01-00500.safetensors", ["IN01"])  # which of two is meant?
    with pytest.raises(CheckpointError, match="name one of its files, Hyena-00005"):
        checkpoint.load(tmp_path)
