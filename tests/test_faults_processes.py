"""The campaign's ways with processes fire on planted faults, and are silent where there is none."""

from __future__ import annotations

import random
import signal
from functools import partial

import pytest

from faults import disks, folders, hooks, kills, pairs, planted, ranks, signals, zygote
from faults.scene import Scene

COMMAND = "evaluate"  # stands for the planted one
ANY = random.Random(0)


def kill(scene, place):
    return kills.trial(scene, COMMAND, place, ANY)


def full_disk(scene, place):
    return disks.trial(scene, COMMAND, place, None)  # no disk is mounted here: files cannot grow


def asked_to_end(scene, place):
    return signals.trial(scene, COMMAND, "SIGTERM", 0, random.Random(place))


def in_the_way(scene, place):
    return folders.trial(scene, COMMAND, "somebody's files have the names", 0, ANY)


def both_at_once(scene, place):
    return pairs.meanwhile(scene, COMMAND, COMMAND, random.Random(place))


def one_is_killed(scene, place):
    return ranks.killed(scene, "generate", 0, random.Random(place))


@pytest.mark.reliability(6, 7, 8, 10, 12)
@pytest.mark.parametrize(
    ("way", "plant", "expected"),
    [
        (kill, planted.half_writes, "half written"),
        (kill, planted.forgets, "going on: "),
        (full_disk, planted.swallows, "sheet.png is another"),
        (asked_to_end, planted.dies, "exit status -15"),
        (asked_to_end, planted.half_writes, "exit status -15"),
        (in_the_way, planted.tramples, "overwritten: out/sheet.png"),
        (both_at_once, planted.tramples, "overwritten: out/sheet.png"),
        (one_is_killed, planted.waits, "hang"),
    ],
)
def test_planted_faults_are_found(way, plant, expected, monkeypatch):
    monkeypatch.setattr(ranks, "SOON", 1.0)
    monkeypatch.setattr(ranks, "LIMIT", 3.0)
    with Scene(entry=plant) as scene:
        found = [way(scene, place) for place in range(6 if way is kill else 4 if way is not one_is_killed else 1)]
    assert any(expected in each for each in found), found


@pytest.mark.parametrize("way", [kill, full_disk, asked_to_end, in_the_way, both_at_once])
def test_where_there_is_no_fault_none_is_found(way):
    with Scene(entry=planted.faultless) as scene:
        assert [way(scene, place) for place in range(3)] == [""] * 3


def test_a_command_is_a_process_of_its_own(tmp_path):
    def ends(plant, *hooks_, **options):
        return zygote.run(["--overwrite"], tmp_path, entry=plant, hooks=hooks_, **options)

    assert ends(planted.faultless).status == 0
    assert ends(planted.faultless, hooks.at_write(4, hooks.kill)).status == -signal.SIGKILL
    (half,) = tmp_path.rglob(".sd-hyena.*.tmp")
    half.unlink()
    assert ends(planted.half_writes, hooks.dies_at_limit, partial(hooks.limit, 7)).status == -signal.SIGXFSZ
    assert (tmp_path / planted.RESULT).read_bytes() == b"1234567"
    hung = ends(planted.waits, env={"RANK": "1"}, timeout=1)
    assert hung.status is None
    raw = ends(planted.half_writes, partial(hooks.limit, 7000))
    assert raw.status == 1
    assert "Traceback" in raw.stderr
