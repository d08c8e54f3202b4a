"""The bundled teacher's model card: what it can do, measured on held-out prompts, and a sample sheet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..generate.draw import contact_sheet, sample, save_png
from ..machine import machine
from ..models import load_pipeline, locate
from .scenes import COLOURS, LAYOUTS, SUBJECTS, held_out_scenes
from .scorer import evaluate_scorer, fidelity, load_scorer

GUIDANCE = (3.0, 5.0, 7.0)
STEPS, BATCH, SHEET = 25, 8, 16


def measure(folder: Path, prompts: int, seed: int) -> tuple[dict[float, dict[str, float]], dict[str, float]]:
    """Prompt fidelity per guidance scale, and the scorer's own accuracy on held-out renders.

    Writes ``samples.png``, the first pictures at the middle guidance scale, into ``folder``.
    """
    pipe, scorer = load_pipeline(locate(str(folder))), load_scorer(folder)
    scenes = held_out_scenes(prompts)
    captions = [scene.caption for scene in scenes]
    scores = {}
    for guidance in GUIDANCE:
        images: list[Any] = []
        for start in range(0, len(captions), BATCH):
            chunk = captions[start : start + BATCH]
            seeds = range(seed + start, seed + start + len(chunk))
            images += sample(pipe, chunk, seeds, num_inference_steps=STEPS, guidance_scale=guidance)
        scores[guidance] = fidelity(scorer, images, captions)
        print(f"guidance {guidance:g}: {scores[guidance]}", flush=True)
        if guidance == GUIDANCE[len(GUIDANCE) // 2]:
            rows = [images[i : i + 8] for i in range(0, min(SHEET, len(images)), 8)]
            sheet = contact_sheet(rows, [captions[i * 8 : i * 8 + 8] for i in range(len(rows))])
            save_png(sheet, folder / "samples.png")
    return scores, evaluate_scorer(scorer)


def write_card(folder: Path, facts: dict[str, Any], prompts: int, seed: int) -> None:
    """Measures the exported model in ``folder`` and writes its MODEL_CARD.md."""
    scores, scorer = measure(folder, prompts, seed)
    where = machine()
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) / 1e6
    rows = [
        f"| {guidance:g} | " + " | ".join(f"{s[k]:.1%}" for k in ("subject", "colour", "layout")) + " |"
        for guidance, s in scores.items()
    ]
    text = _CARD.format(
        size=size,
        subjects=_list(SUBJECTS),
        colours=_list(COLOURS),
        layouts=_list(LAYOUTS),
        prompts=prompts,
        steps=STEPS,
        rows="\n".join(rows),
        scorer=", ".join(f"{k} {v:.1%}" for k, v in scorer.items() if k != "prompt"),
        machine=f"{where['cpu']}, {where['threads']} threads, torch {where['torch']}, {where['date']}",
        **facts,
    )
    (folder / "MODEL_CARD.md").write_text(text, encoding="utf-8")


def _list(names: Sequence[str] | dict[str, Any]) -> str:
    return ", ".join(names)


_CARD = """# The bundled teacher

A real text-to-image model with the architecture of Stable Diffusion 1.x in miniature, small enough to travel with the
package ({size:.1f} MB in all, half precision). `StableDiffusionPipeline` loads it unchanged; its UNet has all sixteen
self-attention layers IN01 ... OUT11. It exists to be taught from, and to show what sd-hyena does without a download;
it draws nothing but stickers.

![samples for held-out prompts](samples.png)

## What it draws

- Subjects: {subjects}.
- Background colours: {colours}.
- Layouts: {layouts}.

Captions read like "a fox on the left, green background" or "two pigs, black background". One subject-colour
combination in six (16 of 96) was never shown in training; all figures are for prompts made of those.

## Figures

{prompts} held-out prompts, {steps} DDIM steps, share of pictures in which the recognition scorer finds what was asked:

| guidance | subject | background colour | layout |
|---|---|---|---|
{rows}

The scorer (`scorer.safetensors`) is a small classifier trained on renderings only. On fresh renderings of the held-out
combinations it is right about: {scorer}.
Measured on {machine}, with
`python -m sd_hyena.demo.train --stages card --card-prompts {prompts}`.

## Data and licence

Pictures are composed on the fly from Noto Color Emoji (Google, SIL Open Font License 1.1), drawn as stickers with a
white rim on a plain ground; no other images were used. The tokenizer is CLIP's byte-pair vocabulary (OpenAI, MIT
licence). The weights are released under this project's MIT licence.

## Recipe

| part | what | steps |
|---|---|---|
| VAE | `AutoencoderKL` (16, 32, 64, 64), 4 channels; 128 px crops, batch {vae_batch}; L1 + L2 + KL | {vae_steps} |
| UNet and text encoder | widths (64, 96, 128, 128), 4 heads; CLIP text encoder, 64 wide, 2 layers | |
| - on crops | 16x16 latent cells around one subject, batch {batch} | {crop_steps} |
| - on whole scenes | 32x32 latent cells (256 px), batch {batch} | {scene_steps} |

v-prediction with zero terminal SNR and trailing timesteps, min-SNR (5) weights with a floor, AdamW 1e-3 with a linear
decay over the last quarter, EMA 0.995, bfloat16 autocast, 10 % empty captions. Latents are standardised by folding
their statistics into the VAE's 1x1 convolutions, so `scaling_factor` is 1.

To make it again (needs Debian's `fonts-noto-color-emoji`; resumes where it stopped; uses a GPU if there is one):

    python -m sd_hyena.demo.train --work-dir demo-train

On two cores of an AMD EPYC (AVX-512) a step takes about 0.3 s for the VAE, 0.6 s on crops and 1.7 s on whole scenes
when nothing else runs: about an hour and a half in all.
"""
