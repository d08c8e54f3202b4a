"""Folders and hub repositories of Hyena layers: written whole or not at all, and read again."""

import errno
import json
import os
import re
import signal
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import make_unet, run_unet, trained
from huggingface_hub import HfApi, ModelCard, constants, errors
from PIL import Image

import sd_hyena
from sd_hyena import checkpoint, files, interrupts, patch
from sd_hyena.cli import main
from sd_hyena.config import OperatorConfig
from sd_hyena.errors import CheckpointError, SdHyenaError, UsageError
from sd_hyena.files import atomic_folder
from sd_hyena.share.card import MARK, TAGS
from sd_hyena.share.folder import write_folder

RECORDS = {
    "teacher": {"class": "StableDiffusionPipeline", "widths": "8-16", "attention_sha256": "0123"},
    "training": {"teacher_model": "someone/model", "step": 90, "batch_size": 4, "width": 64, "height": 32, "seed": 3},
    "figures": {"IN01": {"relative_error": 0.25, "cosine": 0.9}},
}


@pytest.fixture
def patched(unet, tmp_path):
    """A UNet with two layers of a file that says how they were trained."""
    layers = {name: trained(OperatorConfig(8, 4, 4, attention_heads=2, block=2)) for name in ("IN01", "OUT11")}
    checkpoint.save(tmp_path / "trained.safetensors", layers, **RECORDS)
    sd_hyena.load_hyena(unet, tmp_path / "trained.safetensors")
    return unet


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.compatibility("Hyena files", "a folder by `save_pretrained`", "works; same output as from the file")
def test_a_folder_is_read_again(patched, tmp_path):
    folder = tmp_path / "deep" / "layers"
    assert sd_hyena.save_pretrained(patched, folder) is None
    assert sorted(contents(folder)) == ["README.md", "config.json", "hyena.safetensors"]
    assert {stat.S_IMODE(os.stat(path).st_mode) for path in folder.iterdir()} == {0o644}
    assert list((tmp_path / "deep").iterdir()) == [folder]
    config = json.loads((folder / "config.json").read_text())
    assert (config["format"], config["format_version"], config["sd_hyena_version"]) == (
        "sd-hyena",
        1,
        sd_hyena.__version__,
    )
    assert list(config["layers"]) == ["IN01", "OUT11"]
    assert {key: config[key] for key in ("teacher", "training")} | {"figures": RECORDS["figures"]} == RECORDS
    for source, options in ((folder, {}), (tmp_path / "deep", {"subfolder": "layers"})):
        other = make_unet()
        assert sd_hyena.load_hyena(other, source, **options) == ["IN01", "OUT11"]
        assert torch.equal(run_unet(other), run_unet(patched))
        assert sd_hyena.attached(other)["IN01"].file == folder / "hyena.safetensors"
    assert main(["info", str(folder)]) == 0


def test_the_card(patched, tmp_path):
    sd_hyena.save_pretrained(patched, tmp_path / "layers")
    text = (tmp_path / "layers" / "README.md").read_text()
    data = ModelCard(text).data
    assert (data.library_name, data.base_model, data.license, data.tags) == ("sd-hyena", "someone/model", None, TAGS)
    assert "| IN01 | states full cubed_relu near 3 block 2 | 8 | 4x4 |" in text
    assert "| 0.2500 | 0.9000 |" in text
    assert "| all | 90 | 4 | - | 64x32 | 3 | StableDiffusionPipeline 8-16 0123 |" in text
    assert 'from_pretrained("someone/model")\nsd_hyena.load_hyena(pipe, "layers")' in text
    assert 'sd-hyena generate -m someone/model -y layers -p "a fox"' in text
    assert "## Licence" in text
    sd_hyena.save_pretrained(patched, tmp_path / "layers", base_model="other/base", license="mit")
    text = (tmp_path / "layers" / "README.md").read_text()
    assert (ModelCard(text).data.base_model, ModelCard(text).data.license) == ("other/base", "mit")
    assert "# Hyena layers for other/base" in text
    assert "## Licence" not in text


def test_the_card_says_no_more_than_a_file_may(tmp_path):
    hostile = "x | y\n# <script>\n---"
    layers = {"IN01": trained(OperatorConfig(8, 4, 4, attention_heads=2))}
    records = {"class": hostile, "widths": hostile}, {"teacher_model": "/home/me/secret.safetensors", "step": hostile}
    checkpoint.save(tmp_path / "a.safetensors", layers, teacher=records[0], training=records[1])
    write_folder(tmp_path / "out", checkpoint.load(tmp_path / "a.safetensors"))
    text = (tmp_path / "out" / "README.md").read_text()
    assert "<script>" not in text
    assert "secret" not in text
    assert "\n# <" not in text
    assert ModelCard(text).data.base_model is None
    assert 'DiffusionPipeline.from_pretrained("MODEL")' in text


def test_figures_that_were_measured_on_noise_say_so(patched, tmp_path):
    sd_hyena.save_pretrained(patched, tmp_path / "a")
    assert "on latents that were not learned from," in (tmp_path / "a" / "README.md").read_text()
    patch.attached(patched)["IN01"].operator.origin.training["measure_on"] = "noise"
    sd_hyena.save_pretrained(patched, tmp_path / "b")
    assert "on noise, which pictures are not," in (tmp_path / "b" / "README.md").read_text()


def test_the_cards_lines_work(pipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sd_hyena.load_hyena(pipe, "demo", "high")
    expected = patch.attached(pipe.unet)["IN01"].operator.state_dict()
    options = {"num_inference_steps": 1, "width": 64, "height": 64}
    sd_hyena.set_hyena_enabled(pipe, False, "OUT11")
    sd_hyena.save_pretrained(pipe, "layers", sample_prompts=["a fox", "a cat"], sample_options=options)
    assert [layer.enabled for layer in sd_hyena.attached(pipe).values()] == [True, True, True, True, False]
    text = (tmp_path / "layers" / "README.md").read_text()
    assert "![samples](sheet.png)" in text
    sheet = Image.open(tmp_path / "layers" / "sheet.png")
    assert sheet.width > 2 * 64
    assert sheet.height > 2 * 64
    names = {}
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], names)
    loaded = patch.attached(names["pipe"].unet)
    assert list(loaded) == ["IN01", "IN02", "OUT09", "OUT10", "OUT11"]
    assert all(torch.equal(value, expected[key]) for key, value in loaded["IN01"].operator.state_dict().items())


def test_a_sheet_that_is_given(patched, tmp_path):
    picture = Image.new("RGB", (8, 8), "red")
    picture.save(tmp_path / "mine.jpg")
    for given in (picture, tmp_path / "mine.jpg"):
        sd_hyena.save_pretrained(patched, tmp_path / "layers", sheet=given)
        assert Image.open(tmp_path / "layers" / "sheet.png").size == (8, 8)
    with pytest.raises(UsageError, match=r"sheet .*none\.png: cannot be read: No such file"):
        sd_hyena.save_pretrained(patched, tmp_path / "layers", sheet=tmp_path / "none.png")
    for wrong in (torch.zeros(8, 8, 3).numpy(), [picture], 3):
        with pytest.raises(UsageError, match=r"sheet must be a picture \(PIL.Image.Image\) or its file, got"):
            sd_hyena.save_pretrained(patched, tmp_path / "layers", sheet=wrong)
    with pytest.raises(UsageError, match="sheet is empty"):
        sd_hyena.save_pretrained(patched, tmp_path / "layers", sheet="")
    with pytest.raises(UsageError, match="needs a pipeline to draw with"):
        sd_hyena.save_pretrained(patched, tmp_path / "layers", sample_prompts=["a fox"])
    with pytest.raises(UsageError, match="sample_prompts must be text or a list of texts, got 3"):
        sd_hyena.save_pretrained(patched, tmp_path / "layers", sample_prompts=3)
    with pytest.raises(UsageError, match="sample_options must be a dict of the pipeline's options, got list"):
        sd_hyena.save_pretrained(patched, tmp_path / "layers", sample_prompts=["a fox"], sample_options=[3])


@pytest.mark.compatibility("Hyena files", "`save_pretrained` without samples over one with", "the old sheet goes")
def test_a_sheet_goes_with_the_card_that_showed_it(patched, tmp_path, monkeypatch):
    folder, picture = tmp_path / "layers", Image.new("RGB", (8, 8), "red")
    sd_hyena.save_pretrained(patched, folder, sheet=picture)
    before, fsync, calls = contents(folder), os.fsync, []

    def failing(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            return fsync(handle)
        calls.append(handle)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        fsync(handle)

    with monkeypatch.context() as full:
        full.setattr(os, "fsync", failing)
        with pytest.raises(SdHyenaError):
            sd_hyena.save_pretrained(patched, folder, base_model="a/b")
    assert contents(folder) == before
    sd_hyena.save_pretrained(patched, folder)
    assert sorted(contents(folder)) == ["README.md", "config.json", "hyena.safetensors"]
    picture.save(folder / "sheet.png")  # not of a save
    sd_hyena.save_pretrained(patched, folder)
    assert (folder / "sheet.png").exists()
    sd_hyena.save_pretrained(patched, folder, sheet=picture)
    card = folder / "README.md"
    card.write_text(card.read_text().replace(MARK, "My words."))
    sd_hyena.save_pretrained(patched, folder)  # keeps the card, and so what it shows
    assert (folder / "sheet.png").exists()
    sd_hyena.save_pretrained(patched, folder, overwrite=True)
    assert not (folder / "sheet.png").exists()


def test_a_removed_file_comes_back_if_the_rest_fails(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("old")
    (tmp_path / "gone").write_text("old")
    unlink = Path.unlink

    def late(path, **options):
        unlink(path, **options)
        if path.name == "gone":
            raise KeyboardInterrupt

    monkeypatch.setattr(Path, "unlink", late)
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path, ["gone", "never"]) as new:
        (new / "a").write_text("new")
    assert contents(tmp_path) == {"a": b"old", "gone": b"old"}


@pytest.mark.parametrize("full", [False, True])
def test_two_signals_while_a_folder_is_cleaned_up_leave_nothing_beside_it(tmp_path, monkeypatch, full):
    """Once it is written, or while it becomes what it was since the disk is full."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").write_text("old")

    def disturbed(action):
        def act(*arguments, **options):
            for _ in range(2):
                signal.raise_signal(signal.SIGTERM)
            action(*arguments, **options)

        return act

    def no_room(*_):
        raise OSError(errno.ENOSPC, "full")

    with interrupts.handled(), monkeypatch.context() as patched:
        patched.setattr(os, "rmdir", disturbed(os.rmdir))
        if full:
            patched.setattr(os, "replace", disturbed(os.replace))
            patched.setattr(files, "write_file", no_room)
        stopped = pytest.raises(OSError if full else interrupts.Interrupted, match="full" if full else "SIGTERM")
        with stopped, interrupts.unit("file"), atomic_folder(tmp_path / "out") as new:
            (new / "a").write_text("new")
    assert contents(tmp_path / "out") == {"a": b"old" if full else b"new"}
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.compatibility("Hyena files", "`save_pretrained` over an earlier save", "replaced; an edited card is kept")
def test_saving_again(patched, tmp_path, caplog):
    folder = tmp_path / "layers"
    sd_hyena.save_pretrained(patched, folder)
    (folder / "notes.txt").write_text("mine")
    card = folder / "README.md"
    card.write_text(card.read_text().replace("library_name", "license: mit\nlanguage: en\nlibrary_name"))
    sd_hyena.unload_hyena(patched, "OUT11")
    sd_hyena.save_pretrained(patched, folder)
    assert list(checkpoint.load(folder).layers) == ["IN01"]
    assert list(json.loads((folder / "config.json").read_text())["layers"]) == ["IN01"]
    assert (ModelCard(card.read_text()).data.license, ModelCard(card.read_text()).data.language) == ("mit", "en")
    assert (folder / "notes.txt").read_text() == "mine"
    assert not caplog.records
    edited = card.read_text().replace(MARK, "My words.")
    card.write_text(edited)
    sd_hyena.save_pretrained(patched, folder)
    assert card.read_text() == edited
    assert "README.md: kept" in caplog.text
    sd_hyena.save_pretrained(patched, folder, overwrite=True)
    assert "My words" not in card.read_text()
    assert ModelCard(card.read_text()).data.license == "mit"


@pytest.mark.parametrize("name", ["hyena.safetensors", "config.json"])
def test_files_of_others_are_not_replaced(patched, tmp_path, name):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / name).write_text('{"format": "theirs"}')
    before = contents(tmp_path / "theirs")
    with pytest.raises(UsageError, match=f"{name} was not written by save_pretrained"):
        sd_hyena.save_pretrained(patched, tmp_path / "theirs")
    assert contents(tmp_path / "theirs") == before
    sd_hyena.save_pretrained(patched, tmp_path / "theirs", overwrite=True)
    assert list(checkpoint.load(tmp_path / "theirs").layers) == ["IN01", "OUT11"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file: give a folder"):
        sd_hyena.save_pretrained(patched, tmp_path / "file")


@pytest.mark.compatibility("Hyena files", "`save_pretrained` that is interrupted", "what was there is untouched")
@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("after", [0, 1, 2, 5])
@pytest.mark.parametrize(
    "stop", [KeyboardInterrupt, OSError(28, "No space left on device")], ids=["ctrl-c", "disk full"]
)
def test_an_interrupted_save_leaves_what_was_there(patched, tmp_path, monkeypatch, stop, after, there):
    folder = tmp_path / "layers"
    if there:
        sd_hyena.save_pretrained(patched, folder)
        sd_hyena.unload_hyena(patched, "OUT11")
    before = contents(folder) if there else None
    fsync, calls = os.fsync, []

    def failing(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            return fsync(handle)
        calls.append(handle)
        if len(calls) > after:
            raise stop
        fsync(handle)

    monkeypatch.setattr(os, "fsync", failing)
    if after < 3:
        with pytest.raises(KeyboardInterrupt if stop is KeyboardInterrupt else SdHyenaError) as error:
            sd_hyena.save_pretrained(patched, folder)
        assert (contents(folder) if folder.exists() else None) == before
        if stop is not KeyboardInterrupt:
            names = "README.md", "config.json", "hyena.safetensors"
            assert str(error.value) == f"{folder / names[after]}: cannot write: No space left on device"
    else:  # it takes three
        sd_hyena.save_pretrained(patched, folder)
        assert contents(folder) != before
    assert {path.name for path in tmp_path.iterdir()} <= {"layers", "trained.safetensors"}


def test_folders_that_hold_no_layers(unet, tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(CheckpointError, match=r"run: the folder has no hyena.safetensors$"):
        sd_hyena.load_hyena(unet, tmp_path / "run")
    for name in ("Hyena-00160.safetensors", "other.safetensors"):
        (tmp_path / "run" / name).touch()
    with pytest.raises(
        CheckpointError, match=r"no hyena\.safetensors: name one of its files, Hyena-00160\.safetensors"
    ):
        sd_hyena.load_hyena(unet, tmp_path / "run")
    (tmp_path / "run" / "model_index.json").touch()
    with pytest.raises(CheckpointError, match="is a diffusers model, for -m/--model"):
        sd_hyena.load_hyena(unet, tmp_path / "run")
    with pytest.raises(UsageError, match="there are no Hyena layers to save"):
        sd_hyena.save_pretrained(unet, tmp_path / "out")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The hub's cache, offline, with layers by someone/layers: at main, and at v1 in a subfolder."""
    root = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(root))
    repository = root / "models--someone--layers"
    for revision, commit, folder in (("main", "a" * 40, "."), ("v1", "b" * 40, "high")):
        layers = {"IN01" if revision == "main" else "OUT11": trained(OperatorConfig(8, 4, 4, attention_heads=2))}
        path = repository / "snapshots" / commit / folder
        path.mkdir(parents=True)
        checkpoint.save(path / "hyena.safetensors", layers)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
    return root


@pytest.mark.compatibility("Hyena files", "a hub id", "works; offline from the hub's cache")
def test_a_hub_id_from_the_cache(unet, cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sd_hyena.load_hyena(unet, "someone/layers") == ["IN01"]
    assert sd_hyena.attached(unet)["IN01"].file.is_relative_to(cache)
    assert sd_hyena.load_hyena(unet, "someone/layers", revision="v1", subfolder="high") == ["OUT11"]
    assert main(["info", "someone/layers"]) == 0


@pytest.mark.compatibility("Hyena files", "a hub id that is not in the cache, offline", "refused: one line")
def test_hub_ids_that_cannot_be_had(unet, cache, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"^someone/else: no such file or folder; as a hub id: not in the hub's "):
        sd_hyena.load_hyena(unet, "someone/else")
    with pytest.raises(CheckpointError, match="no such file"):
        sd_hyena.load_hyena(unet, "someone/layers.safetensors")
    for command in ("generate -m demo -p x -y someone/else -o pictures", "convert someone/else -o out"):
        assert main(command.split()) == 1
        error = capsys.readouterr().err
        assert "someone/else: no such file or folder; as a hub id: not in the hub's local cache" in error
        assert error.count("\n") == 1
    assert not patch.attached(unet)
    assert [path.name for path in tmp_path.iterdir()] == ["hub"]


def test_generate_draws_with_a_hub_id(cache, tmp_path, monkeypatch, pipe):
    monkeypatch.chdir(tmp_path)
    sd_hyena.load_hyena(pipe, "demo", "IN01")
    sd_hyena.save_hyena(pipe, cache / "models--someone--layers" / "snapshots" / ("a" * 40) / "hyena.safetensors")
    sd_hyena.save_pretrained(pipe, "layers")
    command = ["generate", "-m", "demo", "-p", "x", "-n", "1", "-s", "1", "-W", "64", "-H", "64", "-k", "1", "-o"]
    for folder, layers in (("a", "someone/layers"), ("b", "layers"), ("c", "layers/hyena.safetensors")):
        assert main([*command, folder, "-y", layers]) == 0
    pictures = [Image.open(tmp_path / name / "image_000.png") for name in "abc"]
    assert pictures[0].tobytes() == pictures[1].tobytes() == pictures[2].tobytes()
    assert pictures[0].text["parameters"].endswith("Hyena layers: IN01")


class Hub:
    """A hub in memory, in place of huggingface_hub's client."""

    def __init__(self, monkeypatch, files=()):
        self.files, self.calls = dict(files), []
        for name in ("create_repo", "upload_folder", "file_exists"):
            monkeypatch.setattr(HfApi, name, getattr(self, name))
        monkeypatch.setattr("huggingface_hub.hf_hub_download", self.download)
        self.folder = None

    def file_exists(self, repo_id, name):
        return name in self.files

    def download(self, repo_id, name, token=None):
        path = self.folder / name
        path.write_bytes(self.files[name])
        return str(path)

    def create_repo(self, repo_id, **options):
        self.calls.append(("create_repo", repo_id, options))
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, *, repo_id, folder_path, allow_patterns, delete_patterns, **options):
        self.calls.append(("upload_folder", repo_id, options))
        for name in delete_patterns or ():
            del self.files[name]
        self.files |= {name: (folder_path / name).read_bytes() for name in allow_patterns}
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    made = Hub(monkeypatch)
    made.folder = tmp_path / "downloads"
    made.folder.mkdir()
    return made


@pytest.mark.compatibility("Hyena files", "`push_to_hub` (huggingface_hub's client replaced)", "works")
def test_push_to_hub(patched, hub, tmp_path):
    url = sd_hyena.push_to_hub(patched, "me/layers", private=True, commit_message="first", license="mit")
    assert url == "https://hub/me/layers/commit/1"
    assert hub.calls == [
        ("create_repo", "me/layers", {"private": True, "exist_ok": True}),
        ("upload_folder", "me/layers", {"commit_message": "first", "create_pr": False}),
    ]
    assert sorted(hub.files) == ["README.md", "config.json", "hyena.safetensors"]
    assert b'sd_hyena.load_hyena(pipe, "me/layers")' in hub.files["README.md"]
    (tmp_path / "layers").mkdir()
    (tmp_path / "layers" / "notes.txt").write_text("mine")
    sd_hyena.save_pretrained(patched, tmp_path / "layers", push_to_hub=True, repo_id="me/layers")
    assert "notes.txt" not in hub.files
    assert hub.files["hyena.safetensors"] == (tmp_path / "layers" / "hyena.safetensors").read_bytes()
    assert ModelCard(hub.files["README.md"].decode()).data.license == "mit"  # of the first card


def test_the_hubs_sheet_goes_too(patched, hub):
    sd_hyena.push_to_hub(patched, "me/layers", sheet=Image.new("RGB", (8, 8)))
    assert b"(sheet.png)" in hub.files["README.md"]
    sd_hyena.push_to_hub(patched, "me/layers", sheet=Image.new("RGB", (16, 8)))
    assert "sheet.png" in hub.files
    sd_hyena.push_to_hub(patched, "me/layers")
    assert sorted(hub.files) == ["README.md", "config.json", "hyena.safetensors"]


def test_push_to_hub_keeps_what_is_anothers(patched, hub, caplog):
    hub.files["README.md"] = b"---\nlicense: mit\n---\n\nMy words."
    sd_hyena.push_to_hub(patched, "me/layers")
    assert hub.files["README.md"].endswith(b"My words.")
    assert "README.md: kept" in caplog.text
    hub.files["config.json"] = b'{"_class_name": "UNet2DConditionModel"}'
    count = len(hub.calls)
    with pytest.raises(UsageError, match=r"me/layers: has a config\.json of something else"):
        sd_hyena.push_to_hub(patched, "me/layers")
    assert len(hub.calls) == count
    sd_hyena.push_to_hub(patched, "me/layers", overwrite=True)
    assert b"My words" not in hub.files["README.md"]


def test_pushes_that_cannot_be(patched, tmp_path):
    with pytest.raises(UsageError, match="push_to_hub needs a repo_id such as user/name, got 'layers'"):
        sd_hyena.push_to_hub(patched, "layers")
    with pytest.raises(UsageError, match="got None"):
        sd_hyena.save_pretrained(patched, tmp_path / "layers", push_to_hub=True)
    with pytest.raises(
        SdHyenaError, match="hub repository me/layers: the hub cannot be reached, being in offline mode"
    ):
        sd_hyena.push_to_hub(patched, "me/layers")
    assert not (tmp_path / "layers").exists()


def test_what_the_hub_refuses_is_one_line(patched, hub, monkeypatch):
    def response(status):
        return SimpleNamespace(status_code=status, headers={}, request=None)

    for raised, message in [
        (errors.HfHubHTTPError("403 Forbidden\n\nURL", response=response(403)), "refuses it .HTTP 403.: log in with"),
        (errors.RepositoryNotFoundError("404", response=response(404)), "there is none, or it is private"),
        (errors.GatedRepoError("403", response=response(403)), "its owner has to give access first"),
        (ConnectionResetError("[Errno -2]"), "the hub cannot be used .ConnectionResetError."),
    ]:

        def refuse(*args, raised=raised, **options):
            raise raised

        monkeypatch.setattr(HfApi, "create_repo", refuse)
        with pytest.raises(SdHyenaError, match=f"hub repository me/layers: .*{message}") as error:
            sd_hyena.push_to_hub(patched, "me/layers")
        assert "\n" not in str(error.value)
