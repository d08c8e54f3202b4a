"""What the three ``sd-hyena benchmark`` commands can be told. Light: imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..config import OPERATORS, OperatorChoices
from ..errors import UsageError
from ..families import ARCHITECTURES
from ..files import refuse_existing
from ..generate.settings import check_guidance, split_entries
from ..models.choices import ModelChoices
from ..settings import BATCH, SIDE, STEPS, check_bounds, check_path, option
from ..sources import hyena_path
from ..targets import parse_names

RIVALS = ("linear", "windows")  # operators that are no Hyena
ALL_KINDS = (
    "naive",
    "sdp-math",
    "sdp-flash",
    "sdp-cudnn",
    "sdp-efficient",
    "xformers",
    "flash-attn",
    "tomesd",
    "hypertile",
    "linear-elu",
    *OPERATORS,
    "states-core",
    "projections",
)
GROUPS = {
    "attention": ALL_KINDS[:7],
    "sdp": ALL_KINDS[1:5],
    "peers": (*ALL_KINDS[7:10], *RIVALS),
    "hyena": tuple(name for name in ALL_KINDS[10:-1] if name not in RIVALS),
    "all": ALL_KINDS,
}
DTYPES = ("auto", "float32", "float16", "bfloat16")


@dataclass
class _Common:
    """Settings of all three commands."""

    dtype: str = option("auto", "auto: float16 on a GPU, float32 on the CPU", choices=DTYPES)
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    threads: int = option(0, "CPU threads; 0: PyTorch's own choice", within=(0, 1024))
    out: str = option("", "write OUT.json, OUT.csv, OUT.md, OUT.png and OUT.svg", written=True)
    compare: str = option("", "the .json of an earlier run to compare with", path=True)
    overwrite: bool = option(False, "replace files that are already there")

    def validate(self) -> None:
        """Raises UsageError for the first setting that cannot work."""
        check_bounds(self)
        if self.compare and not Path(self.compare).is_file():
            raise UsageError(f"--compare {self.compare}: no such file")
        if self.out:
            check_path("--out", str(Path(self.out).parent), folder=True)
        refuse_existing(self.outputs(), self.overwrite, "--out")

    def outputs(self) -> list[Path]:
        """The files this run will write."""
        return [Path(self.out + suffix) for suffix in (".json", ".csv", ".md", ".png", ".svg")] if self.out else []


@dataclass
class _Layers(_Common):
    """Settings of the commands that time one layer."""

    kinds: str = option("all", f"comma list of {', '.join(ALL_KINDS)}, or of the groups {', '.join(GROUPS)}")
    dim: int = option(320, "channels of the layer; IN01 of SD 1.x: 320", within=(1, 8192))
    heads: int = option(8, "attention heads", within=(1, 8192))
    extent: int = option(512, "image width in px that the operators were made for", within=(1, SIDE))
    backward: bool = option(False, "time forward and backward together, as in training")
    repeats: int = option(15, "rounds at most", within=(1, 100000))
    budget: float = option(15.0, "seconds of timing per size; one round is always made", within=(0, 1e6))
    max_seconds: float = option(60.0, "skip a kind whose call would take longer", within=(0.001, 1e6))

    def validate(self) -> None:
        super().validate()
        if self.dim % self.heads:
            raise UsageError(f"--dim {self.dim} is not a multiple of --heads {self.heads}")
        _check_pixels("extent", self.extent)
        self.chosen_kinds()

    def chosen_kinds(self) -> list[str]:
        """The kinds asked for, in their usual order. Raises UsageError for a name that is none."""
        asked: set[str] = set()
        for name in (part.strip() for part in self.kinds.split(",")):
            if name not in GROUPS and name not in ALL_KINDS:
                raise UsageError(f"--kinds: {name!r} is no kind; there are {', '.join((*ALL_KINDS, *GROUPS))}")
            asked |= set(GROUPS.get(name, (name,)))
        return [kind for kind in ALL_KINDS if kind in asked]


@dataclass
class LayerSettings(_Layers):
    """``sd-hyena benchmark layer``."""

    width: int = option(512, "image width in px", short="-W", within=(1, SIDE))
    height: int = option(512, "image height in px", short="-H", within=(1, SIDE))
    batch_size: int = option(8, "images at once", short="-b", within=(1, BATCH))

    def validate(self) -> None:
        super().validate()
        _check_pixels("width", self.width)
        _check_pixels("height", self.height)


@dataclass
class SizesSettings(_Layers):
    """``sd-hyena benchmark sizes``."""

    widths: str = option("256,512,768,1024,1280,2048,4096", "image widths in px")
    batch_size: int = option(1, "images at once", short="-b", within=(1, BATCH))

    def validate(self) -> None:
        super().validate()
        self.chosen_widths()

    def chosen_widths(self) -> list[int]:
        """In px, ascending. Raises UsageError."""
        return parse_widths(self.widths)


@dataclass
class ImageSettings(_Common, ModelChoices, OperatorChoices):
    """``sd-hyena benchmark image``; the operator's choices are those of untrained layers."""

    model: str = option("", "demo, a diffusers folder, a single file, a hub id", short="-m", path=True)
    random_weights: str = option("", "instead of a model: this architecture, untrained", choices=("", *ARCHITECTURES))
    hyena: str = option(
        "",
        "Hyena file(s), folders, hub ids: comma-separated entries are timed in turn, a+b stacks; all next to attention",
        short="-y",
    )
    target: str = option("", "layers to replace; with random weights, by untrained Hyena layers", short="-t")
    attention: str = option("sdpa", "comma list of the attentions to compare with: sdpa, naive, xformers")
    width: int = option(512, "image width in px", short="-W", within=(1, SIDE))
    height: int = option(512, "image height in px", short="-H", within=(1, SIDE))
    steps: int = option(10, "diffusion steps", short="-s", within=(1, STEPS))
    cfg_scale: float = option(7.0, "classifier-free guidance scale; 0 disables guidance", short="-c", within=(0, 100))
    num_images: int = option(1, "images at once", short="-n", within=(1, BATCH))
    repeats: int = option(2, "generations of each entry, in turns, after a warm-up of one step", within=(1, 100000))

    def validate(self) -> None:
        super().validate()
        self.check_choices()
        if bool(self.model) == bool(self.random_weights):
            raise UsageError("give either -m/--model or --random_weights")
        self.check_model_choices(self.model)
        if self.random_weights and self.hyena:
            raise UsageError("--hyena needs a model: with --random_weights, --target says what is replaced")
        if self.target:
            parse_names(self.target)
        check_guidance(self.cfg_scale)
        _check_pixels("width", self.width)
        _check_pixels("height", self.height)
        unknown = [name for name in self.attentions() if name not in ("sdpa", "naive", "xformers")]
        if unknown:
            raise UsageError(f"--attention: {unknown[0]!r} is none of sdpa, naive, xformers")
        for entry in self.entries():
            for file in entry:
                if not hyena_path(file).is_file():
                    raise UsageError(f"--hyena: no file {file}")

    def attentions(self) -> list[str]:
        return [part.strip() for part in self.attention.split(",")]

    def entries(self) -> list[list[str]]:
        """The Hyena files of each entry; none without ``--hyena``."""
        return [entry for entry in split_entries(self.hyena) if entry]


def parse_widths(text: str) -> list[int]:
    """A comma list of image widths in px, sorted. Raises UsageError."""
    try:
        widths = [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"--widths {text!r}: give widths in px separated by commas") from None
    if len(set(widths)) < len(widths):
        raise UsageError(f"--widths {text!r}: the same width twice")
    for width in widths:
        _check_pixels("widths", width)
    return sorted(widths)


def _check_pixels(name: str, value: int) -> None:
    if value < 16 or value % 8 or value > 16384:
        raise UsageError(f"--{name} {value}: must be a multiple of 8 from 16 to 16384")
