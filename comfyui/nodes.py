"""Apply Hyena Layers, and Compare Images (PSNR)."""

from __future__ import annotations

import os
from typing import Any

import folder_paths
from comfy_api.latest import ComfyExtension, io

from sd_hyena import checkpoint, likeness
from sd_hyena.errors import UsageError
from sd_hyena.hosts import comfy as host
from sd_hyena.targets import parse_names

FOLDER = "hyena"  # of models/, and of extra_model_paths.yaml
BUNDLED = "demo"  # for the model that comes with sd-hyena
ENDING = ".safetensors"  # nothing else is opened


def _register() -> None:
    """``models/hyena`` beside what ``extra_model_paths.yaml`` names."""
    paths, _ = folder_paths.folder_names_and_paths.get(FOLDER, ([], set()))
    standard = os.path.join(folder_paths.models_dir, FOLDER)
    folder_paths.folder_names_and_paths[FOLDER] = (list(dict.fromkeys([*paths, standard])), {ENDING})
    os.makedirs(standard, exist_ok=True)


def _files() -> list[str]:
    return [*folder_paths.get_filename_list(FOLDER), BUNDLED]


def _path(name: str) -> str:
    return name if name == BUNDLED else folder_paths.get_full_path_or_raise(FOLDER, name)


class HyenaApply(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HyenaApply",
            display_name="Apply Hyena Layers",
            category="model_patches/unet",
            description="Replaces self-attention layers of a Stable Diffusion 1, 2 or XL model by Hyena operators "
            "that were taught by them. Put it between the loader and the sampler.",
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model that taught the Hyena file. LoRAs may come before or after."
                ),
                io.Combo.Input(
                    "hyena_name",
                    options=_files(),
                    tooltip="A .safetensors file in models/hyena, as sd-hyena train writes it; demo goes with the "
                    "model that is bundled with sd-hyena.",
                ),
                io.String.Input(
                    "layers",
                    default="all",
                    tooltip="all: everything the file holds. high: its layers at the highest resolution. Or names, "
                    "such as IN01,OUT11.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="The share of the denoising after which Hyena is on; before, attention.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="The share of the denoising up to which Hyena is on; after, attention.",
                ),
                io.Combo.Input(
                    "scaling",
                    options=["file", "extend", "stretch"],
                    default="file",
                    tooltip="How operators grow with pictures larger than those they learned with. file: as it says.",
                ),
                io.Combo.Input(
                    "on_mismatch",
                    options=["error", "skip"],
                    default="error",
                    tooltip="What to do with a layer that the model or the file lacks, or that does not fit: stop "
                    "with a message, or leave that layer as it is.",
                ),
            ],
            outputs=[
                io.Model.Output(),
                io.String.Output(display_name="report", tooltip="What was attached, and what was left as it was."),
            ],
        )

    @classmethod
    def validate_inputs(cls, hyena_name: str, layers: str, start_percent: float, end_percent: float) -> bool | str:
        if hyena_name not in _files():
            return f"{hyena_name}: no such file in models/{FOLDER}: put a {ENDING} file there, or choose another"
        try:
            parse_names(layers)
        except UsageError as error:
            return str(error)
        if not start_percent < end_percent:
            return f"start_percent must be below end_percent, got {start_percent:g} and {end_percent:g}"
        return True

    @classmethod
    def fingerprint_inputs(cls, hyena_name: str, **others: Any) -> tuple[Any, ...]:
        """A file that was written anew is read anew."""
        if hyena_name == BUNDLED:
            return (hyena_name, *others.values())
        state = os.stat(_path(hyena_name))
        return hyena_name, state.st_mtime_ns, state.st_size

    @classmethod
    def execute(
        cls,
        model: Any,
        hyena_name: str,
        layers: str,
        start_percent: float,
        end_percent: float,
        scaling: str,
        on_mismatch: str,
    ) -> io.NodeOutput:
        file = checkpoint.load(_path(hyena_name))
        patched, attached = host.attach(
            model,
            file,
            None if layers.strip().lower() == "all" and "" not in file.layers else layers,
            None if scaling == "file" else scaling,
            start_percent,
            end_percent,
            skip=on_mismatch == "skip",
        )
        return io.NodeOutput(patched, str(attached))


class HyenaCompare(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HyenaCompare",
            display_name="Compare Images (PSNR)",
            category="image",
            description="How far two pictures of the same size are apart: with attention and with Hyena, for instance.",
            inputs=[
                io.Image.Input("image_a", tooltip="One picture, or a batch."),
                io.Image.Input("image_b", tooltip="Another of the same size, or a batch of as many."),
                io.Float.Input(
                    "gain",
                    default=4.0,
                    min=1.0,
                    max=64.0,
                    step=1.0,
                    tooltip="What the difference is multiplied by before it is shown.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="difference", tooltip="|a - b| times the gain."),
                io.String.Output(display_name="figures", tooltip="PSNR in dB and SSIM of each pair."),
            ],
        )

    @classmethod
    def execute(cls, image_a: Any, image_b: Any, gain: float) -> io.NodeOutput:
        if image_a.shape != image_b.shape:
            raise UsageError(
                "image_a and image_b must be of the same size and number, got "
                f"{_described(image_a)} and {_described(image_b)}"
            )
        lines = []
        for a, b in zip(image_a.movedim(-1, 1), image_b.movedim(-1, 1), strict=True):
            lines.append(f"PSNR {likeness.psnr(a, b):.2f} dB, SSIM {likeness.ssim(a, b):.4f}")
        return io.NodeOutput(((image_a - image_b).abs() * gain).clamp(0, 1), "\n".join(lines))


def _described(images: Any) -> str:
    count, height, width, _ = images.shape
    return f"{count} of {width} x {height} px"


class HyenaExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [HyenaApply, HyenaCompare]


async def comfy_entrypoint() -> HyenaExtension:
    _register()
    return HyenaExtension()
