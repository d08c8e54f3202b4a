"""Every command in small: what it works on, where, and what an undisturbed run of it leaves."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from . import hooks, zygote
from .judge import files_in

SMALL = "-W 64 -H 64 -s 1"
TIMED = "--repeats 1 --budget 0.01"
# What a user types, in a folder that has nothing or only strangers' files in "out".
COMMANDS = {
    "train": "train -m {model} -W 64 -H 64 -b 2 -d 3 -t IN01 -n 4 -s 1 --data noise -o out -l logs",
    "train, stage 2": "train -m {model} -b 4 -d 3 -t IN01 -n 2 --finetune_steps 2 -s 1 --measure_on noise "
    "--data_dir {data} --draw_steps 1 -o out -l logs",
    "prepare": "prepare -m {model} --sizes 64x64,64x128,128x64 -n 6 --n_held_out 3 --draw_steps 1 -o out",
    "generate": f"generate -m {{model}} {SMALL} -n 1 -i 4 -k 5 -p fox -y {{hyena}} --grid -o out",
    "evaluate": f"evaluate -m {{model}} {SMALL} -y {{hyena}} --prompts {{prompts}} -n 2 --layer_samples 1 --bands 1 "
    "--no_yardstick -o out",
    "anatomy": f"anatomy -m {{model}} {SMALL} -t IN01 -n 1 --samples 1 --bands 1 -o out",
    "benchmark layer": f"benchmark layer -W 64 -H 64 --dim 8 --heads 2 --kinds sdp-math {TIMED} --out out/layer",
    "benchmark sizes": f"benchmark sizes --widths 64,128 --dim 8 --heads 2 --kinds sdp-math,states {TIMED} "
    "--out out/sizes",
    "benchmark image": f"benchmark image -m {{model}} {SMALL} --repeats 1 --out out/image",
    "convert": "convert {hyena} -o out/x.safetensors",
    "convert, folder": "convert {hyena} -o out",
    "merge": "merge {hyena} {other} --prefer last -o out/m.safetensors",
}
GOLDEN = (5**0.5 - 1) / 2
# They hold seconds, which two runs may have alike by chance.
TELL_TIMES = ("report.html", "evaluation.md", "evaluation.json", "layer.md", "sizes.md", "image.md")
READERS = {"info": "info {hyena}", "targets": "targets -m {model}"}
GOES_ON = {"train": "--resume", "train, stage 2": "--resume", "prepare": ""}  # the others: --overwrite, if they refuse
STRANGERS = (
    "out/notes.txt",
    "out/.mine.tmp",
    "out/.x.safetensors.tmp",
    "out/theirs/image_000.png",
    "logs/mine.txt",
)
STAGE = "SD_HYENA_FAULTS_STAGE"  # a folder that the parts of a campaign share, or they make one each
PASSING = re.compile(r"^logs(/|$)|lock|^out$|\.tmp$|-state\.pt$")  # what is no result


@dataclass(frozen=True)
class Undisturbed:
    """What a run leaves: its ``writes`` in order, how many files it ``opens``, results by path: ``exact`` ones, which
    every run makes alike, and the ``others``, which have times in them."""

    writes: list[str]
    opens: int
    exact: dict[str, str]
    others: frozenset[str]
    folder: Path
    seconds: float

    def lacks(self, folder: Path) -> str:
        """What is missing or different in a folder that a run has finished; "" if nothing is."""
        found = results_in(folder)
        for path, held in self.exact.items():
            if found.get(path) != held:
                return f"{path} is {'another' if path in found else 'missing'}"
        return next((f"{path} is missing" for path in self.others if path not in found), "")

    def holds(self, folder: Path) -> str:
        """Which result that is always alike is in no file of a folder, whatever its name; "" if all are there."""
        there = set(results_in(folder).values())
        missing = next((path for path, held in self.exact.items() if held not in there), "")
        return missing and f"exit status 0, but {missing} is nowhere"


class Scene:
    """The inputs, made once for all parts, and folders to work in; a context. ``entry`` is run in place of every
    command."""

    def __init__(self, entry: Callable[[list[str]], int] | None = None) -> None:
        self._entry = entry
        self.root = Path(tempfile.mkdtemp(prefix="faults-scene-"))
        self.stage = Path(os.environ.get(STAGE, self.root)) if entry is None else self.root
        self._finished: dict[str, Undisturbed] = {}
        self.env = {"SD_HYENA_CACHE": str(self.root / "cache"), "COLUMNS": "200"}
        self.inputs = {name: str(self.stage / name) for name in ("model", "data", "prompts")}
        self.inputs |= {name: str(self.stage / f"{name}.safetensors") for name in ("hyena", "other")}
        if entry is None:
            with FileLock(self.stage / "inputs.lock"):
                if not Path(self.inputs["other"]).exists():
                    self._make()

    def _make(self) -> None:
        (self.stage / "prompts").write_text("a red fox\na blue bird\n")
        _well(zygote.run([self.inputs["model"]], self.stage, entry=make_model))
        _well(self.run("prepare -m {model} --sizes 64x64 -n 6 --n_held_out 2 --draw_steps 1 -o data", self.stage))
        for seed, name in enumerate(("hyena", "other")):
            train = f"train -m {{model}} -W 64 -H 64 -b 2 -d {seed} -t IN01 -n 1 --data noise -o made -l made-log"
            _well(self.run(f"{train} -f {name}", self.stage))
            (self.stage / "made" / f"{name}.safetensors").rename(self.stage / f"{name}.safetensors")
            shutil.rmtree(self.stage / "made")

    def __enter__(self) -> Scene:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.root, ignore_errors=True)

    def words(self, line: str, more: str = "") -> list[str]:
        """The words of a command of COMMANDS or READERS, or of any such line."""
        line = COMMANDS.get(line) or READERS.get(line) or line
        return f"{line} {more}".format(**self.inputs).split()

    def folder(self, strangers: bool = True, under: Path | None = None) -> Path:
        """A new folder to work in, with other people's files in it."""
        folder = Path(tempfile.mkdtemp(prefix="trial-", dir=under or self.root))
        for name in STRANGERS if strangers else ():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"mine: {name}")
        return folder

    def start(self, command: str, folder: Path, more: str = "", **options: object) -> zygote.Command:
        options = {"env": self.env, "entry": self._entry} | options
        return zygote.Command(self.words(command, more), folder, **options)  # type: ignore[arg-type]

    def run(self, command: str, folder: Path, more: str = "", **options: object) -> zygote.Ending:
        return self.start(command, folder, more, **options).wait()

    def go_on(self, command: str, folder: Path) -> zygote.Ending:
        """What a user types after a crash: the way to go on, or the same again, which says if it needs --overwrite."""
        ending = self.run(command, folder, GOES_ON.get(command, ""))
        if ending.status == 2 and "--overwrite" in ending.stderr and command not in GOES_ON:
            ending = self.run(command, folder, "--overwrite")
        return ending

    def undisturbed(self, command: str) -> Undisturbed:
        """Run once for its writes, and once more to see which results are always the same."""
        if command not in self._finished:
            kept = self.stage / f"{command}.pickle"
            with FileLock(f"{kept}.lock"):
                if not kept.exists():
                    kept.write_bytes(pickle.dumps(self._run_undisturbed(command)))
                self._finished[command] = pickle.loads(kept.read_bytes())
        return self._finished[command]

    def _run_undisturbed(self, command: str) -> Undisturbed:
        logs = [self.stage / f"{command}.{what}" for what in ("writes", "opens")]
        folders: list[Path] = []
        left: list[dict[str, str]] = []
        for hook in (hooks.at_write(0, hooks.nothing, str(logs[0])), hooks.at_open(0, hooks.nothing, str(logs[1]))):
            folder = self.folder(under=self.stage)
            before = files_in(folder)
            more = "--overwrite" if folders and command in COMMANDS.keys() - GOES_ON.keys() else ""
            ending = self.run(command, folder, more, hooks=[hook])  # some results say how they were asked for
            _well(ending)
            left.append({path: held for path, held in results_in(folder).items() if path not in before})
            folders.append(folder)
        shutil.rmtree(folders[1])
        same = {path: held for path, held in left[0].items() if left[1].get(path) == held}
        exact = {path: held for path, held in same.items() if not path.endswith(TELL_TIMES)}
        others = frozenset(left[0].keys() & left[1].keys() - exact.keys())
        writes, opens = (log.read_text().splitlines() for log in logs)
        return Undisturbed(writes, len(opens), exact, others, folders[0], ending.seconds)


def results_in(folder: Path) -> dict[str, str]:
    """As :func:`.judge.files_in`, but of results alone, and a Hyena file's metadata may be in any order."""
    found = {path: held for path, held in files_in(folder).items() if not PASSING.search(path)}
    for path in found:
        if path.endswith(".safetensors"):
            data = (folder / path).read_bytes()
            end = 8 + int.from_bytes(data[:8], "little")
            with contextlib.suppress(ValueError):
                header = json.dumps(json.loads(data[8:end]), sort_keys=True).encode()
                found[path] = hashlib.sha256(header + data[end:]).hexdigest()
    return found


def _well(ending: zygote.Ending) -> None:
    if ending.status:
        raise RuntimeError(f"the scene cannot be set: {ending.stdout[-300:]} {ending.stderr[-1500:]}")


def spread(place: int, of: int) -> int:
    """One of the numbers 1 to ``of``: the first places are far apart, and all are spread evenly."""
    return 1 + int(place * GOLDEN % 1 * of)


def distinct(writes: Sequence[str]) -> list[int]:
    """The numbers of writes that are the first of their kind: what happens, and to which file."""
    kinds: dict[str, int] = {}
    for number, line in enumerate(writes, 1):
        kinds.setdefault(re.sub(r"\.?[\w]{6,10}\.tmp|\d{5,}[-.\w]*", "*", line), number)
    return list(kinds.values())


def make_model(argv: list[str]) -> int:
    """The bundled model's folder with a UNet and a VAE of few channels and random weights in it."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel

    import sd_hyena

    folder, bundled = Path(argv[0]), Path(sd_hyena.__file__).parent / "demo" / "teacher"
    shutil.copytree(bundled, folder)
    torch.manual_seed(0)
    small = {"layers_per_block": 1, "norm_num_groups": 4}
    unet = UNet2DConditionModel.load_config(bundled / "unet")
    unet |= small | {"block_out_channels": (16, 16, 32, 32), "attention_head_dim": 2}
    vae = AutoencoderKL.load_config(bundled / "vae") | small | {"block_out_channels": (8, 8, 8, 8)}
    for name, kind, config in (("unet", UNet2DConditionModel, unet), ("vae", AutoencoderKL, vae)):
        shutil.rmtree(folder / name)
        kind.from_config(config).save_pretrained(folder / name)
    return 0
