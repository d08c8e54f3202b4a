"""The bundled teacher's model card: what it can do, measured on held-out prompts, and a sample sheet."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from render import render, to_tensor
from scorer_training import evaluate_scorer

from sd_hyena.demo.scenes import COLOURS, PLACES, SUBJECTS, TEXTURES, all_scenes, held_out_scenes
from sd_hyena.demo.scorer import fidelity, load_scorer
from sd_hyena.files import write_file
from sd_hyena.generate.draw import contact_sheet, to_png
from sd_hyena.generate.sampling import sample
from sd_hyena.machine import machine
from sd_hyena.models import load_pipeline, locate

GUIDANCE = (3.0, 5.0, 7.0)
STEPS, BATCH, SHEET = 25, 8, 16


def measure(folder: Path, prompts: int, seed: int) -> tuple[dict[float, dict[str, float]], dict[str, float], float]:
    """Prompt fidelity per guidance scale, the scorer's own accuracy on held-out renders, and the VAE's PSNR in dB.

    ``prompts`` are drawn at the middle guidance scale, a quarter of them at the others. Writes ``samples.png``, the
    first pictures at the middle guidance scale, into ``folder``.
    """
    pipe, scorer = load_pipeline(locate(str(folder))), load_scorer(folder)
    captions = [scene.caption for scene in held_out_scenes(prompts)]
    middle, scores = GUIDANCE[len(GUIDANCE) // 2], {}
    for guidance in GUIDANCE:
        asked = captions if guidance == middle else captions[: -(-prompts // 4)]
        images: list[Any] = []
        for start in range(0, len(asked), BATCH):
            chunk = asked[start : start + BATCH]
            seeds = range(seed + start, seed + start + len(chunk))
            images += sample(pipe, chunk, seeds, num_inference_steps=STEPS, guidance_scale=guidance)
        scores[guidance] = fidelity(scorer, images, asked)
        print(f"guidance {guidance:g}: {scores[guidance]}", flush=True)
        if guidance == middle:
            rows = [images[i : i + 8] for i in range(0, min(SHEET, len(images)), 8)]
            sheet = contact_sheet(rows, [asked[i * 8 : i * 8 + 8] for i in range(len(rows))])
            write_file(folder / "samples.png", to_png(sheet))
    return scores, evaluate_scorer(scorer), reconstruction(pipe.vae, seed)


@torch.no_grad()
def reconstruction(vae: Any, seed: int, pictures: int = 36) -> float:
    """Mean PSNR in dB of what the VAE makes of fresh textured scenes that it was not trained on."""
    rng = random.Random(f"card/{seed}")
    scenes = [s for s in all_scenes() if s.held_out and s.ground in TEXTURES]
    values = []
    for scene in rng.sample(scenes, pictures):
        pixels = to_tensor([render(scene, rng)]).contiguous()
        decoded = vae.decode(vae.encode(pixels).latent_dist.mode()).sample.clamp(-1, 1)
        values.append(-10 * (decoded - pixels).square().mean().div(4).log10().item())
    return sum(values) / len(values)


def write_card(folder: Path, facts: dict[str, Any], prompts: int, seed: int) -> None:
    """Measures the exported model in ``folder`` and writes its MODEL_CARD.md."""
    scores, scorer, decibels = measure(folder, prompts, seed)
    where = machine()
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) / 1e6
    rows = [
        f"| {guidance:g} | " + " | ".join(f"{s[k]:.1%}" for k in ("subject", "ground", "place")) + " |"
        for guidance, s in scores.items()
    ]
    text = _CARD.format(
        size=size,
        subjects=", ".join(SUBJECTS),
        colours=", ".join(COLOURS),
        textures=", ".join(TEXTURES),
        places=", ".join(PLACES),
        prompts=prompts,
        quarter=-(-prompts // 4),
        decibels=decibels,
        steps=STEPS,
        rows="\n".join(rows),
        scorer=", ".join(f"{k} {v:.1%}" for k, v in scorer.items() if k != "prompt"),
        machine=f"{where['cpu']}, {where['threads']} threads, torch {where['torch']}, {where['date']}",
        **facts,
    )
    (folder / "MODEL_CARD.md").write_text(text, encoding="utf-8")


_CARD = """# The bundled teacher

A real text-to-image model with the architecture of Stable Diffusion 1.x in miniature, small enough to travel with the
package ({size:.1f} MB in all, half precision). `StableDiffusionPipeline` loads it unchanged; its UNet has all sixteen
self-attention layers IN01 ... OUT11, with heads of 32 channels. It exists to be taught from, and to show what sd-hyena
does without a download; it draws nothing but stickers.

![samples for held-out prompts](samples.png)

## What it draws

- Subjects: {subjects}.
- Grounds: plain {colours}; textured {textures}.
- Places: {places}.

Captions read like "a fox on the left, brick wall" or "two pigs, black background". One combination of subject and
ground in six (34 of 204) was never shown in training; all figures are for prompts made of those.

## Figures

{prompts} held-out prompts at guidance 5, {quarter} at the others, {steps} DDIM steps: the share of pictures in which
the recognition scorer finds what was asked.

| guidance | subject | ground | place |
|---|---|---|---|
{rows}

The scorer (`scorer.safetensors`) is a small classifier trained on renderings only. On fresh renderings of the held-out
combinations it is right about: {scorer}. The VAE keeps fresh textured scenes at
{decibels:.1f} dB. Measured on {machine}, with
`python teacher/train.py --stages card --card-prompts {prompts}`.

What its self-attention looks like: `sd-hyena anatomy -m demo`.

## Data and licence

Pictures are composed on the fly: subjects from Noto Color Emoji (Google, SIL Open Font License 1.1), as stickers with a
white rim; grounds drawn by code (`teacher/grounds.py`). No other images were used. The tokenizer is CLIP's byte-pair
vocabulary (OpenAI, MIT licence). The weights are released under this project's MIT licence.

## Recipe

| part | what | steps |
|---|---|---|
| VAE encoder | 12 principal components of 8x8-pixel patches, written into `AutoencoderKL`'s weights | - |
| VAE decoder | (32, 64, 64, 64); small scenes and crops, 128 px, batch {decoder_batch}; L1 + L2 | {decoder_steps} |
| UNet and text encoder | widths (64, 96, 128, 128), heads of 32; CLIP text encoder, 64 wide, 2 layers | |
| - first | half small scenes (128 px), half crops, 16x16 latent cells, batch {batch} | {small_steps} |
| - then | a step on large scenes (256 px, 32x32 cells), two on crops, in turn, batch {batch} | {large_steps} |

v-prediction with zero terminal SNR and trailing timesteps, min-SNR (5) weights with a floor of 0.4, AdamW 1e-3 with a
linear decay over the last quarter, EMA 0.995, bfloat16 autocast, 10 % empty captions.

Places are learned from the first step on, on whole scenes; crops are around one subject, teach detail, and their
captions name no place. A quarter of the samples are taken from the noisiest fifth of the timesteps alone, where places
are decided. (The first edition trained on nothing but crops for its first two thirds, without that quarter, and put
its subject where it was asked to in less than half of its pictures.)

Local attention is planted: a model of this size leaves what is near to its convolutions, and its attention stays flat.
On large scenes a term of the loss (weight 0.05) asks the first head of OUT09, OUT10 and OUT11 to keep 85 % of its
attention within 7x7 cells. Nothing but ordinary attention remains: the bias is in the weights.

To make it again, in a clone of the repository (needs Debian's `fonts-noto-color-emoji`; resumes where it stopped; uses
a GPU if there is one):

    python teacher/train.py --work-dir demo-train
"""
