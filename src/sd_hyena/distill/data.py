"""What students learn from: latents of pictures the teacher drew itself, noised to random timesteps.

Drawn latents are kept on disk in shards, so that a run that was cut off, or the next run on the same
teacher, prompts and size, goes on where the last one stopped. Every random choice of a batch follows from
(seed, step, position in the batch): batches are the same whatever was interrupted, and however many
processes share them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from safetensors.torch import save as serialise
from torch import Tensor

from ..errors import UsageError
from ..files import atomic_path

SHARD = 16
UNCONDITIONAL = 0.3  # share of inputs with the empty prompt: guidance runs half its passes on it
DRAWING_GUIDANCE = 3.0
PROMPT_STRIDE = 7919  # a prime: neighbouring pictures get prompts far apart in the list
logger = logging.getLogger(__name__)

GENERAL_PROMPTS = tuple(
    f"{medium} of {subject}"
    for subject in (
        "a mountain lake at sunrise",
        "an old man with a grey beard, portrait",
        "a crowded street market at night",
        "a cat asleep on a wooden chair",
        "a bowl of fruit on a table",
        "a lighthouse in a storm",
        "a red sports car in a city",
        "a forest path in autumn",
        "an astronaut standing on the moon",
        "a plate of spaghetti",
        "a castle on a hill",
        "a girl reading a book by a window",
        "a fishing village seen from the sea",
        "a robot in a workshop",
        "a field of sunflowers",
        "a snowy owl in flight",
    )
    for medium in ("a photograph", "an oil painting", "a detailed illustration")
)


def read_prompts(path: str) -> list[str]:
    """One prompt a line; blank lines and lines starting with # are left out. Raises UsageError."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"prompts file {path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    prompts = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not prompts:
        raise UsageError(f"prompts file {path}: holds no prompt")
    return prompts


def default_prompts(is_demo: bool) -> list[str]:
    """The bundled model's training captions, or a short general list for real checkpoints."""
    if is_demo:
        from ..demo.scenes import training_prompts

        return training_prompts()
    return list(GENERAL_PROMPTS)


def cache_root() -> Path:
    """``$SD_HYENA_CACHE``, else ``sd-hyena`` in the user's cache folder."""
    if os.environ.get("SD_HYENA_CACHE"):
        return Path(os.environ["SD_HYENA_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sd-hyena"


@dataclass
class Latents:
    """Drawn latents (N, C, h, w) and the prompt of each; the last ``held_out`` are never trained on."""

    latents: Tensor
    prompts: list[str]
    held_out: int

    @property
    def training(self) -> range:
        return range(len(self.prompts) - self.held_out)

    @property
    def validation(self) -> range:
        return range(len(self.prompts) - self.held_out, len(self.prompts))


def draw_latents(
    pipe: Any,
    teacher: dict[str, str],
    prompts: Sequence[str],
    latent_grid: tuple[int, int],
    count: int,
    held_out: int,
    steps: int,
    batch: int = SHARD,
) -> Latents:
    """``count + held_out`` latents sampled by the teacher with guidance, ``batch`` at a time, cached on disk.

    Prompts are spread evenly; the seed of picture i is i, so the cache is shared between runs.
    """
    total = count + held_out
    chosen = [prompts[(i * PROMPT_STRIDE) % len(prompts)] for i in range(total)]
    identity = {
        "teacher": teacher,
        "weights": _weights_digest(pipe),
        "scheduler": [type(pipe.scheduler).__name__, repr(sorted(pipe.scheduler.config.items(), key=str))],
        "grid": latent_grid,
        "steps": steps,
        "guidance": DRAWING_GUIDANCE,
        "prompts": chosen,
    }
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:20]
    folder = cache_root() / "latents" / key
    folder.mkdir(parents=True, exist_ok=True)
    shards = []
    for start in range(0, total, SHARD):
        stop = min(start + SHARD, total)
        path = folder / f"{start:06d}-{stop:06d}.safetensors"
        if not path.exists():
            cuts = [(i, min(i + batch, stop)) for i in range(start, stop, batch)]
            parts = [_draw(pipe, chosen[i:j], range(i, j), latent_grid, steps) for i, j in cuts]
            with atomic_path(path) as temporary:
                temporary.write_bytes(serialise({"latents": torch.cat(parts).cpu().contiguous()}))
        shards.append(load_file(path)["latents"])
    return Latents(torch.cat(shards).float(), chosen, held_out)


def _weights_digest(pipe: Any) -> str:
    """Tells models apart that share their attention: every tensor's sum, of all that shapes a latent."""
    digest = hashlib.sha256()
    for part in ("unet", "text_encoder", "text_encoder_2"):
        module = getattr(pipe, part, None)
        for name, tensor in module.state_dict().items() if module is not None else ():
            digest.update(f"{part}.{name} {tuple(tensor.shape)} {tensor.double().sum().item()!r}".encode())
    return digest.hexdigest()[:16]


def _draw(pipe: Any, prompts: Sequence[str], seeds: Sequence[int], grid: tuple[int, int], steps: int) -> Tensor:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    factor = pipe.vae_scale_factor
    result = pipe(
        list(prompts),
        height=grid[0] * factor,
        width=grid[1] * factor,
        num_inference_steps=steps,
        guidance_scale=DRAWING_GUIDANCE,
        generator=generators,
        output_type="latent",
    )
    return result.images.float()


class TeacherInputs:
    """Noised latents, timesteps and text states for the teacher's UNet, batch by batch."""

    def __init__(self, pipe: Any, data: Latents, seed: int) -> None:
        from diffusers import DDPMScheduler

        self.pipe, self.data, self.seed = pipe, data, seed
        self.noising = DDPMScheduler.from_config(pipe.scheduler.config)
        self._states: dict[str, dict[str, Tensor]] = {}

    def batch(self, step: int, positions: Sequence[int], validation: bool = False) -> dict[str, Any]:
        """Keyword arguments of one UNet call. Sample ``p`` of step ``step`` is the same in every run."""
        device, dtype = self.pipe.unet.device, self.pipe.unet.dtype
        indices = self.data.validation if validation else self.data.training
        latents, noises, times, conditions = [], [], [], []
        for position in positions:
            generator = torch.Generator().manual_seed(_mix(self.seed, step, position, validation))
            index = indices[int(torch.randint(len(indices), (1,), generator=generator))]
            latents.append(self.data.latents[index])
            noises.append(torch.randn(self.data.latents.shape[1:], generator=generator))
            times.append(torch.randint(self.noising.config.num_train_timesteps, (1,), generator=generator))
            empty = torch.rand((), generator=generator) < UNCONDITIONAL
            conditions.append(self._text("" if empty else self.data.prompts[index]))
        t = torch.cat(times)
        noisy = self.noising.add_noise(torch.stack(latents), torch.stack(noises), t)
        inputs: dict[str, Any] = {"sample": noisy.to(device, dtype), "timestep": t.to(device)}
        inputs["encoder_hidden_states"] = torch.cat([c["states"] for c in conditions]).to(device, dtype)
        if "pooled" in conditions[0]:
            h, w = (side * self.pipe.vae_scale_factor for side in self.data.latents.shape[-2:])
            ids = torch.tensor([[h, w, 0, 0, h, w]] * len(positions), device=device, dtype=dtype)
            pooled = torch.cat([c["pooled"] for c in conditions]).to(device, dtype)
            inputs["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": ids}
        return inputs

    @torch.no_grad()
    def _text(self, prompt: str) -> dict[str, Tensor]:
        if prompt not in self._states:
            encoded = self.pipe.encode_prompt(
                prompt, device=self.pipe.unet.device, num_images_per_prompt=1, do_classifier_free_guidance=False
            )
            self._states[prompt] = {"states": encoded[0].cpu()}
            if len(encoded) == 4:  # SDXL: states, negative states, pooled, negative pooled
                self._states[prompt]["pooled"] = encoded[2].cpu()
        return self._states[prompt]


def _mix(seed: int, step: int, position: int, validation: bool) -> int:
    digest = hashlib.sha256(f"{seed}/{step}/{position}/{validation}".encode()).digest()
    return int.from_bytes(digest[:7], "big")
