"""Prepared folders and training states from elsewhere: whatever is wrong with one is a line that names the file."""

import copy
import hashlib
import json
import os
import random

import pytest
import torch
from safetensors.torch import load_file
from safetensors.torch import save as serialise

from sd_hyena.distill.data import check_fits, open_prepared
from sd_hyena.distill.manifest import SHARDS, Manifest
from sd_hyena.distill.optimisation import make_optimizer, make_schedule
from sd_hyena.distill.resume import read_state, restore, resuming
from sd_hyena.distill.shards import MANIFEST, write_manifest, write_shard
from sd_hyena.distill.state import STATE, Average, save_state, serialised
from sd_hyena.errors import SdHyenaError
from sd_hyena.nn import OperatorConfig, build

IDENTITY = {"kind": "images", "teacher": {"class": "X"}, "weights": "", "dtype": "torch.float32", "sizes": [[64, 64]],
            "prompts_sha256": "", "n_images": 6, "n_held_out": 2, "seed": 0, "images_sha256": ""}  # fmt: skip
PROMPTS = ["", "a fox"]


@pytest.fixture
def folder(tmp_path, pipe):
    (tmp_path / SHARDS).mkdir()
    shards = []
    for number, held_out in enumerate(([2, 3], [])):
        tensors = {
            "latents": torch.randn(4, pipe.unet.config.in_channels, 8, 8),
            "states": torch.randn(2, 7, 64),
            "prompt": torch.tensor([0, 1, 1, 0]),
        }
        shards.append(write_shard(tmp_path, number, (64, 64), tensors, PROMPTS, held_out))
    write_manifest(tmp_path, Manifest(copy.deepcopy(IDENTITY), 2, shards, [0.5]))
    return tmp_path


def refused(folder, pipe):
    with pytest.raises(SdHyenaError, match=r"^.*$") as error:
        check_fits(open_prepared(folder), pipe, folder)
    line = str(error.value)
    assert "\n" not in line
    assert len(line) < 400 + len(str(folder))
    return line


def places(value, path=()):
    for key, each in value.items() if isinstance(value, dict) else enumerate(value):
        yield (*path, key)
        if isinstance(each, dict | list):
            yield from places(each, (*path, key))


def test_a_whole_folder_is_read(folder, pipe):
    check_fits(open_prepared(folder), pipe, folder)


@pytest.mark.reliability(1, 2, 5)
def test_manifests_with_a_part_missing_more_or_of_another_kind(folder, pipe):
    path = folder / MANIFEST
    document = json.loads(path.read_text())
    free = ("teacher", "weights", "dtype", "prompts_sha256", "images_sha256")  # compared with a model's, a plan's
    for place in places(document):
        for value in (None, -1, 1.5, True, [], {}, [[1, 2]], "", 10**30, "gone", "more"):
            changed = copy.deepcopy(document)
            parent = changed
            for key in place[:-1]:
                parent = parent[key]
            if value == "gone":
                del parent[place[-1]]
            elif value == "more" and isinstance(parent, dict):
                parent["more"] = 1
            else:
                parent[place[-1]] = value
            kept = "teacher_sample" in place and value not in (None, True, {}, "")
            if changed == document or kept or (set(place) & {*free} and isinstance(value, str)):
                continue
            if (place[-1], value) in (("seed", 10**30), ("n_images", 10**30), ("teacher", {})):
                continue
            path.write_text(json.dumps(changed))
            assert str(folder) in refused(folder, pipe)
    path.write_text(path.read_text().replace('"seed"', '"seed": 1, "seed"', 1))
    assert "the key 'seed' is there twice" in refused(folder, pipe)


def changes():
    yield "latents holds NaN", lambda t: t["latents"].view(-1)[0:1].fill_(torch.nan)
    yield "states holds NaN", lambda t: t["states"].view(-1)[0:1].fill_(torch.inf)
    yield "prompt names rows", lambda t: t["prompt"].fill_(2)
    yield "prompt names rows", lambda t: t["prompt"].fill_(-1)
    yield "its tensors are", lambda t: t.pop("states")
    yield "its tensors are", lambda t: t.update(more=torch.zeros(1))
    yield "not of 64x64 px", lambda t: t.update(latents=t["latents"][..., :4].clone())
    yield "px to a cell of latents: 16", lambda t: t.update(latents=t["latents"][..., :4, :4].clone())
    yield "other shapes or types than the first", lambda t: t.update(states=t["states"][..., :5].clone())
    yield "other shapes or types than the first", lambda t: t.update(latents=t["latents"][:, :3].clone())
    for name in ("latents", "states", "prompt"):
        yield f"{name} has shape", lambda t, name=name: t.update({name: t[name][:-1].clone()})
        yield f"{name} has shape", lambda t, name=name: t.update({name: t[name][None]})
        yield f"{name} has shape", lambda t, name=name: t.update({name: t[name].to(torch.int32)})


@pytest.mark.reliability(1, 4, 13)
def test_shards_with_contents_that_cannot_be(folder, pipe):
    file, manifest = folder / SHARDS / "00000.safetensors", folder / MANIFEST
    tensors, text = {name: tensor.clone() for name, tensor in load_file(file).items()}, manifest.read_text()
    digest = hashlib.sha256(file.read_bytes()).hexdigest()

    def outcome(tensors, prompts):
        data = serialise(tensors, {"prompts": prompts})
        file.write_bytes(data)
        manifest.write_text(text.replace(digest, hashlib.sha256(data).hexdigest()))
        line = refused(folder, pipe)
        assert f"{folder / SHARDS}/0000" in line
        return line

    for message, change in changes():
        changed = {name: tensor.clone() for name, tensor in tensors.items()}
        change(changed)
        assert message in outcome(changed, json.dumps(PROMPTS))
    for prompts in ("", "null", '["a fox", ""]', '["", 1]', '{"": 1}', '[""]', '["", "a", "b"]', "[" * 9999):
        assert "its contents are not those of a shard" in outcome(tensors, prompts)
    with pytest.raises(SdHyenaError, match=r"00000\.safetensors: not written: latents holds NaN"):
        write_shard(folder, 0, (64, 64), tensors | {"latents": tensors["latents"] * torch.nan}, PROMPTS, [])


@pytest.fixture
def state():
    """A state after one step, and what makes the parts that take it."""

    def parts():
        torch.manual_seed(0)
        operator = build(OperatorConfig(8, 4, 4, attention_heads=2))
        optimizer = make_optimizer([operator], 0.01, 1.0, 0.01)
        return operator, optimizer, make_schedule(optimizer, "cosine", 2, 5, 1), Average(operator, 0.9)

    operator, optimizer, schedule, average = parts()
    for parameter in operator.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    schedule.step()
    average.update()
    whole = {
        "step": 1,
        "stage": 2,
        "micro_batch_size": 1,
        "seed": 1,
        "settings": "{}",
        "identity": "{}",
        "students": operator.state_dict(),
    }
    held = {"optimizer": optimizer.state_dict(), "scheduler": schedule.state_dict(), "average": average.state_dict()}
    return whole | held | {"scaler": {}}, lambda: parts()[1:]


def edit(state, place, value):
    changed = parent = copy.deepcopy(state)
    for key in place[:-1]:
        parent = parent[key]
    parent[place[-1]] = value
    return changed


@pytest.mark.reliability(1, 5, 9)
def test_states_that_cannot_be_resumed_from(tmp_path, state):
    whole, parts = state

    def outcome(changed):
        (tmp_path / STATE).write_bytes(serialised(changed))
        found = read_state(tmp_path)
        with resuming(tmp_path / STATE):
            restore(*parts(), found)

    outcome(whole)
    with pytest.raises(SdHyenaError, match=r"not written: students\.in_proj\.bias holds NaN"):
        save_state(tmp_path, edit(whole, ("students", "in_proj.bias"), torch.full((24,), torch.nan)))
    moments = whole["optimizer"]["state"][0]
    for place, value in [
        *(((name,), value) for name in whole for value in (None, "x", torch.zeros(1), -1)),
        (("more",), 1), (("stage",), 3), (("seed",), 2**63), (("settings",), '{"a": 1, "a": 1}'), (("identity",), "[]"),
        (("students", "in_proj.bias"), torch.full((24,), torch.nan)),
        (("optimizer", "state"), {}), (("optimizer", "state", 0), {}), (("optimizer", "param_groups"), []),
        (("optimizer", "state", 0, "exp_avg"), torch.zeros(3)), (("optimizer", "state", 0, "step"), "x"),
        (("optimizer", "state", 0, "exp_avg_sq"), -moments["exp_avg_sq"] - 1),
        (("optimizer", "param_groups", 0, "lr"), 1e5), (("optimizer", "param_groups", 0, "betas"), (2, 3)),
        (("optimizer", "param_groups", 0, "eps"), torch.inf),
        (("scheduler",), {}), (("scheduler", "last_epoch"), 4), (("scheduler", "last_epoch"), "x"),
        (("scheduler", "base_lrs"), [1.0]), (("scheduler", "optimizer"), 1),
        (("average",), {}), (("average", "shadow_params"), [torch.zeros(1)]), (("average", "decay"), 0.1),
    ]:  # fmt: skip
        if place == ("optimizer", "state", 0) or (place == ("step",) and value == "x"):
            continue  # the former is a weight that has had no gradient yet
        with pytest.raises(SdHyenaError, match=r"\.train-state\.pt: cannot resume from it \(.+\): remove it") as error:
            outcome(edit(whole, place, value))
        assert "\n" not in str(error.value), place


@pytest.mark.reliability(1)
def test_a_pipe_in_a_states_place_is_told_at_once(tmp_path):
    os.mkfifo(tmp_path / STATE)
    with pytest.raises(SdHyenaError, match=r"\.train-state\.pt: cannot resume from it \(it is no file\)"):
        read_state(tmp_path)


@pytest.mark.reliability(1, 5)
def test_states_with_any_byte_changed(tmp_path, state):
    save_state(tmp_path, state[0])
    path = tmp_path / STATE
    good, chance, refusals = path.read_bytes(), random.Random(0), 0
    for _ in range(60):
        data = bytearray(good)
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        path.write_bytes(data[: chance.choice([len(data), chance.randrange(len(data))])])
        try:
            read_state(tmp_path)
        except SdHyenaError:
            refusals += 1
        else:  # what no reader looks at
            assert str(torch.load(path, weights_only=True)) == str(state[0])
    assert refusals > 30
