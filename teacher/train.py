"""Trains the bundled teacher: ``python teacher/train.py --work-dir demo-train``.

Stages run in order and each resumes where it stopped: ``encoder`` (principal components of patches), ``latents``
(the training set, encoded once), ``unet`` (with the text encoder: on crops of 16x16 cells all the time, beside small
scenes first and large ones of 32x32 cells later), ``decoder`` (of the VAE; may run beside the two before),
``scorer`` (the recognition classifier), ``export`` (writes the folder that ``-m demo`` loads) and ``card`` (measures
it and writes its model card). Step ``i`` draws its batch from ``(seed, stage, i)`` alone, so no generator state has
to be saved and a resumed run sees the same data.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import architecture as arch
import numpy as np
import torch
from card import write_card
from diffusers import AutoencoderKL
from local_heads import plant_local_heads
from patch_encoder import principal_components, set_encoder, start_decoder
from PIL import Image
from render import CENTRES, SIZE, render, to_tensor
from safetensors.torch import save_file
from scorer_training import evaluate_scorer, train_scorer
from torch import Tensor, nn

from sd_hyena.demo.scenes import GROUNDS, SUBJECTS, Scene, all_scenes
from sd_hyena.distill.state import serialised
from sd_hyena.files import write_file
from sd_hyena.models import DEMO_DIR

STAGES = ("encoder", "latents", "unet", "decoder", "scorer", "export", "card")
ENCODER_PICTURES = 240
VARIATIONS = 6  # pictures per training scene
MIN_SNR_GAMMA = 5.0
# What min-SNR weights leave for pure noise is next to nothing, and there place, number and ground are decided.
WEIGHT_FLOOR = 0.4
NOISIEST, NOISIEST_SHARE = 0.8, 0.25  # so many more of the samples are from the last fifth of the timesteps
LOCAL_WEIGHT = 0.05
EMA_DECAY = 0.995
SAVE_EVERY = 50


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work-dir", type=Path, default=Path("demo-train"), help="state of the run; safe to delete after export"
    )
    parser.add_argument("--stages", default=",".join(STAGES), help="comma list, run in the order given")
    parser.add_argument("--out", type=Path, default=DEMO_DIR, help="folder the export stage writes")
    parser.add_argument("--decoder-steps", type=int, default=2000)
    parser.add_argument("--small-steps", type=int, default=2200, help="half on scenes of 128 px, half on crops")
    parser.add_argument(
        "--large-steps", type=int, default=2400, help="a third on scenes of 256 px, the others on crops"
    )
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--card-prompts", type=int, default=64, help="held-out prompts the card's figures rest on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    unknown = set(args.stages.split(",")) - set(STAGES)
    if unknown:
        parser.error(f"unknown stages {sorted(unknown)}; there are {', '.join(STAGES)}")
    args.work_dir.mkdir(parents=True, exist_ok=True)
    for stage in args.stages.split(","):
        globals()[f"stage_{stage}"](args)


def _rng(args: argparse.Namespace, stage: str, step: int) -> random.Random:
    rng = random.Random(f"{args.seed}/{stage}/{step}")
    torch.manual_seed(rng.getrandbits(48))
    return rng


def _autocast(device: str) -> contextlib.AbstractContextManager:
    return torch.autocast(torch.device(device).type, dtype=torch.bfloat16)


class _Run:
    """A resumable loop over optimiser steps: modules, optimiser, averaged weights and the step counter."""

    def __init__(
        self, path: Path, modules: dict[str, nn.Module], lr: float, total: int, device: str, weight_decay: float = 0.0
    ):
        self.path, self.modules, self.lr, self.total, self.step = path, modules, lr, total, 0
        for module in modules.values():
            module.to(device).to(memory_format=torch.channels_last).train()
        self.parameters = [p for m in modules.values() for p in m.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr, betas=(0.9, 0.99), weight_decay=weight_decay)
        self.average = [p.detach().clone() for p in self.parameters]
        if path.exists():
            saved = torch.load(path, map_location=device, weights_only=True)
            for name, module in modules.items():
                module.load_state_dict(saved["modules"][name])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.average, self.step = saved["average"], saved["step"]

    def _rate(self) -> float:
        warm = min(1.0, (self.step + 1) / 100)
        decay = min(1.0, (self.total - self.step) / (0.25 * self.total))
        return self.lr * warm * decay

    def save(self) -> None:
        state = {
            "modules": {name: m.state_dict() for name, m in self.modules.items()},
            "optimizer": self.optimizer.state_dict(),
            "average": self.average,
            "step": self.step,
        }
        write_file(self.path, serialised(state))

    def steps(self) -> Iterator[int]:
        """Yields step numbers; the caller calls ``update(loss)`` once for each."""
        started, first = time.time(), self.step
        self.losses: list[float] = []
        while self.step < self.total:
            yield self.step
            if self.step % SAVE_EVERY == 0 or self.step == self.total:
                self.save()
                rate = (self.step - first) / (time.time() - started)
                print(
                    f"{self.path.stem} {self.step}/{self.total} loss {np.mean(self.losses):.4f} {rate:.2f} steps/s",
                    flush=True,
                )
                self.losses = []

    def update(self, loss: Tensor) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.step += 1
        self.losses.append(loss.item())
        decay = min(EMA_DECAY, self.step / (self.step + 10))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - decay)

    def use_average(self) -> None:
        for p, mean in zip(self.parameters, self.average, strict=True):
            p.data.copy_(mean)
        for module in self.modules.values():
            module.eval().requires_grad_(False)


def _training_scenes() -> list[Scene]:
    return [scene for scene in all_scenes() if not scene.held_out]


def _small(scene: Scene, rng: random.Random) -> Image.Image:
    """A whole scene at half the size, its texture as coarse as in a large picture."""
    return render(scene, rng, size=SIZE // 2, scale=1.0)


def stage_encoder(args: argparse.Namespace) -> None:
    target = args.work_dir / "encoder.pt"
    if target.exists():
        return
    rng, scenes = _rng(args, "encoder", 0), _training_scenes()
    pictures = [draw(rng.choice(scenes), rng) for _ in range(ENCODER_PICTURES) for draw in (render, _small)]
    large, small = (to_tensor(pictures[start::2]) for start in range(2))
    weight, bias = principal_components([large, small], arch.LATENT_CHANNELS)
    write_file(target, serialised({"weight": weight, "bias": bias}))


def _load_encoder(args: argparse.Namespace) -> AutoencoderKL:
    """The VAE with its encoder, the decoder untrained."""
    torch.manual_seed(args.seed)
    vae, components = arch.make_vae(), torch.load(_existing(args, "encoder"), weights_only=True)
    set_encoder(vae, **components)
    start_decoder(vae, **components)
    return vae.to(args.device).to(memory_format=torch.channels_last)


def stage_decoder(args: argparse.Namespace) -> None:
    """L1 + L2 reconstruction of small scenes, and of crops of large ones."""
    vae = _load_encoder(args)
    run = _Run(args.work_dir / "decoder.pt", {"vae": vae}, 2e-3, args.decoder_steps, args.device)
    scenes = _training_scenes()
    for step in run.steps():
        rng = _rng(args, "decoder", step)
        pictures = []
        for _ in range(args.batch_size // 8):
            pictures += [_small(rng.choice(scenes), rng) for _ in range(2)]
            large = render(rng.choice(scenes), rng)
            for _ in range(2):
                x, y = rng.randint(0, 128), rng.randint(0, 128)
                pictures.append(large.crop((x, y, x + 128, y + 128)))
        pixels = to_tensor(pictures).to(args.device, memory_format=torch.channels_last)
        with _autocast(args.device):
            error = vae.decode(vae.encode(pixels).latent_dist.mode()).sample.float() - pixels
        run.update(error.abs().mean() + 4 * error.pow(2).mean())


def _load_vae(args: argparse.Namespace) -> AutoencoderKL:
    vae = _load_encoder(args)
    _Run(_existing(args, "decoder"), {"vae": vae}, 0, 0, args.device).use_average()
    return vae


def _existing(args: argparse.Namespace, stage: str) -> Path:
    path = args.work_dir / f"{stage}.pt"
    if not path.exists():
        raise SystemExit(f"{path} does not exist: run the {stage} stage first")
    return path


@torch.no_grad()
def stage_latents(args: argparse.Namespace) -> None:
    """Encodes ``VARIATIONS`` pictures of every training scene, small and large."""
    target = args.work_dir / "latents.pt"
    if target.exists():
        return
    vae = _load_encoder(args)
    latents: dict[str, list[Tensor]] = {"small": [], "large": []}
    for index, scene in enumerate(_training_scenes()):
        rng = _rng(args, "latents", index)
        for name, draw in (("small", _small), ("large", render)):
            pixels = to_tensor([draw(scene, rng) for _ in range(VARIATIONS)])
            pixels = pixels.to(args.device, memory_format=torch.channels_last)
            with _autocast(args.device):
                latents[name].append(vae.encode(pixels).latent_dist.mode().half().cpu())
    write_file(target, serialised({name: torch.stack(each) for name, each in latents.items()}))


def _crop(latent: Tensor, scene: Scene, rng: random.Random) -> Tensor:
    """Half the width and height of a large scene's latent, around one subject."""
    cells = latent.shape[-1] // 2
    starts = [round(2 * cells * c) - cells // 2 + rng.randint(-2, 2) for c in rng.choice(CENTRES[scene.place])]
    left, top = (min(cells, max(0, start)) for start in starts)
    return latent[:, top : top + cells, left : left + cells]


def _placeless(scene: Scene) -> str:
    """The caption of a crop around one subject, wherever it stands."""
    return f"{scene.one}, {GROUNDS[scene.ground]}"


def _sample_batch(
    data: dict[str, Tensor], rng: random.Random, size: int, kinds: Sequence[str]
) -> tuple[Tensor, list[str]]:
    """Latents and captions: "small" and "large" scenes, or every "crop" of large ones, the kinds in turn."""
    scenes, latents, captions = _training_scenes(), [], []
    for number in range(size):
        index, kind = rng.randrange(len(scenes)), kinds[number % len(kinds)]
        scene = scenes[index]
        latent = data["small" if kind == "small" else "large"][index, rng.randrange(VARIATIONS)].float()
        latents.append(_crop(latent, scene, rng) if kind == "crop" else latent)
        caption = _placeless(scene) if kind == "crop" else scene.caption
        captions.append("" if rng.random() < 0.1 else caption)
    return torch.stack(latents), captions


def _kinds(step: int, small_steps: int) -> tuple[str, ...]:
    """What a step of the UNet learns from. Crops teach detail at a third of a large scene's cost."""
    if step < small_steps:
        return "small", "crop"
    return ("large",) if step % 3 == 0 else ("crop",)


def _v_loss(predict: Callable[[Tensor, Tensor], Tensor], latents: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """v-prediction, min-SNR weights (https://arxiv.org/abs/2303.09556) plus a floor, more samples at high noise."""
    share = torch.rand(len(latents))
    share = torch.where(torch.rand(len(latents)) < NOISIEST_SHARE, NOISIEST + (1 - NOISIEST) * share, share)
    t = (share * len(alphas_cumprod)).long().to(latents.device)
    noise = torch.randn_like(latents)
    a = alphas_cumprod[t].sqrt().view(-1, 1, 1, 1)
    s = (1 - alphas_cumprod[t]).sqrt().view(-1, 1, 1, 1)
    v = a * noise - s * latents
    snr = (a / s).square().flatten()
    weight = snr.clamp(max=MIN_SNR_GAMMA) / (snr + 1) + WEIGHT_FLOOR
    error = (predict(a * latents + s * noise, t).float() - v).pow(2).mean((1, 2, 3))
    return (weight * error).mean() / weight.mean()


def _predict(unet: nn.Module, states: Tensor, x: Tensor, t: Tensor) -> Tensor:
    return unet(x, t, states).sample


def stage_unet(args: argparse.Namespace) -> None:
    """The denoiser and its text encoder, jointly, from scratch."""
    torch.manual_seed(args.seed)
    unet, text, tokenizer = arch.make_unet(), arch.make_text_encoder(), arch.make_tokenizer()
    alphas = arch.make_scheduler().alphas_cumprod.to(args.device)
    data = torch.load(args.work_dir / "latents.pt", weights_only=True)
    total = args.small_steps + args.large_steps
    run = _Run(args.work_dir / "unet.pt", {"unet": unet, "text": text}, args.lr, total, args.device, 1e-4)
    local = plant_local_heads(unet)
    for step in run.steps():
        rng = _rng(args, "unet", step)
        kinds = _kinds(step, args.small_steps)
        large = "large" in kinds
        latents, captions = _sample_batch(data, rng, args.batch_size, kinds)
        tokens = tokenizer(captions, padding="max_length", max_length=arch.TOKENS, return_tensors="pt").input_ids
        latents = latents.to(args.device, memory_format=torch.channels_last)
        for head in local:
            head.active = large
        with _autocast(args.device):
            states = text(tokens.to(args.device)).last_hidden_state
            loss = _v_loss(functools.partial(_predict, unet, states), latents, alphas)
        if large:
            loss = loss + LOCAL_WEIGHT * sum(head.loss for head in local) / len(local)
        run.update(loss)


def stage_scorer(args: argparse.Namespace) -> None:
    target = args.work_dir / "scorer.pt"
    if target.exists():
        return
    scorer = train_scorer(seed=args.seed, device=args.device)
    print("scorer on held-out renders:", evaluate_scorer(scorer, seed=args.seed + 1))
    write_file(target, serialised(scorer.state_dict()))


def stage_export(args: argparse.Namespace) -> None:
    """Writes the averaged weights as a diffusers folder in half precision, and the scorer beside it."""
    from diffusers import StableDiffusionPipeline

    unet, text, vae = arch.make_unet(), arch.make_text_encoder(), _load_vae(args)
    run = _Run(_existing(args, "unet"), {"unet": unet, "text": text}, 0, 0, args.device)
    run.use_average()
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=arch.make_tokenizer(),
        unet=unet,
        scheduler=arch.make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    for module in (vae, text, unet):
        module.to("cpu", torch.float16).to(memory_format=torch.contiguous_format)
    staging = args.work_dir / "export"
    shutil.rmtree(staging, ignore_errors=True)
    pipe.save_pretrained(staging)
    shutil.rmtree(staging / "tokenizer")
    config = staging / "text_encoder" / "config.json"  # halves on disk; transformers would compute in them too
    config.write_text(config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))
    scorer = torch.load(_existing(args, "scorer"), weights_only=True)
    save_file({k: v.half() for k, v in scorer.items()}, staging / "scorer.safetensors")
    shutil.copytree(staging, args.out, dirs_exist_ok=True)
    for file in args.out.rglob("*.safetensors"):
        file.chmod(0o644)
    print(f"exported step {run.step} ({len(SUBJECTS)} subjects) to {args.out}")


def stage_card(args: argparse.Namespace) -> None:
    steps = {s: torch.load(_existing(args, s), weights_only=True, mmap=True)["step"] for s in ("decoder", "unet")}
    facts = {
        "decoder_batch": args.batch_size // 2,
        "decoder_steps": steps["decoder"],
        "batch": args.batch_size,
        "small_steps": args.small_steps,
        "large_steps": steps["unet"] - args.small_steps,
    }
    write_card(args.out, facts, args.card_prompts, seed=args.seed)


if __name__ == "__main__":
    main()
