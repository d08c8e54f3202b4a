"""Trains the bundled teacher: ``python -m sd_hyena.demo.train --work-dir demo-train``.

Stages run in order and each resumes where it stopped: ``vae`` (on crops of rendered scenes), ``latents``
(the training set, encoded once), ``unet`` (with the text encoder: first on 16x16-cell crops around one
subject, where a step is three times cheaper, then on whole 32x32-cell scenes), ``scorer`` (the recognition
classifier), ``export`` (writes the folder that ``-m demo`` loads) and ``card`` (measures it and writes its
model card). Step ``i`` draws its batch from ``(seed, stage, i)`` alone, so no generator state has to be
saved and a resumed run sees the same data.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..files import atomic_path
from . import architecture as arch
from .render import render
from .scenes import SUBJECTS, Scene, all_scenes
from .scorer import Scorer, evaluate_scorer, train_scorer

STAGES = ("vae", "latents", "unet", "scorer", "export", "card")
VARIATIONS = 8  # pictures per training scene
MIN_SNR_GAMMA = 5.0
# What min-SNR weights leave for pure noise is next to nothing. Crops teach detail; on whole scenes it is at
# high noise that place, number and ground are decided.
CROP_FLOOR, SCENE_FLOOR = 0.05, 0.4
EMA_DECAY = 0.995
SAVE_EVERY = 100


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work-dir", type=Path, default=Path("demo-train"), help="state of the run; safe to delete after export"
    )
    parser.add_argument("--stages", default=",".join(STAGES), help="comma list, run in the order given")
    parser.add_argument("--out", type=Path, default=arch.TEACHER_DIR, help="folder the export stage writes")
    parser.add_argument("--vae-steps", type=int, default=3000)
    parser.add_argument("--crop-steps", type=int, default=2000)
    parser.add_argument("--scene-steps", type=int, default=1300)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--card-prompts", type=int, default=96, help="held-out prompts the card's figures rest on")
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


def _to_tensor(pictures: list) -> Tensor:
    """RGB pictures -> (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.stack([np.asarray(p) for p in pictures])).permute(0, 3, 1, 2).float() / 127.5 - 1


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
        self.parameters = [p for m in modules.values() for p in m.parameters()]
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
        with atomic_path(self.path) as temporary:
            torch.save(
                {
                    "modules": {name: m.state_dict() for name, m in self.modules.items()},
                    "optimizer": self.optimizer.state_dict(),
                    "average": self.average,
                    "step": self.step,
                },
                temporary,
            )

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


def stage_vae(args: argparse.Namespace) -> None:
    """L1 + L2 reconstruction on 128 px crops, a light KL term."""
    torch.manual_seed(args.seed)
    vae = arch.make_vae()
    run = _Run(args.work_dir / "vae.pt", {"vae": vae}, 2e-3, args.vae_steps, args.device)
    scenes = _training_scenes()
    for step in run.steps():
        rng = _rng(args, "vae", step)
        crops = []
        for _ in range(args.batch_size // 2):
            picture = render(rng.choice(scenes), rng)
            x, y = rng.randint(0, 128), rng.randint(0, 128)
            crops.append(picture.crop((x, y, x + 128, y + 128)))
        pixels = _to_tensor(crops).to(args.device, memory_format=torch.channels_last)
        with _autocast(args.device):
            posterior = vae.encode(pixels).latent_dist
            decoded = vae.decode(posterior.sample()).sample
        error = decoded.float() - pixels
        kl = 0.5 * (posterior.mean.pow(2) + posterior.var - 1 - posterior.logvar).float().mean()
        run.update(error.abs().mean() + 2 * error.pow(2).mean() + 1e-4 * kl)


def _load_vae(args: argparse.Namespace):
    vae = arch.make_vae()
    run = _Run(_existing(args, "vae"), {"vae": vae}, 0, 0, args.device)
    run.use_average()
    return vae


def _existing(args: argparse.Namespace, stage: str) -> Path:
    path = args.work_dir / f"{stage}.pt"
    if not path.exists():
        raise SystemExit(f"{path} does not exist: run the {stage} stage first")
    return path


def _standardise(vae, mean: Tensor, std: Tensor) -> None:
    """Folds ``(z - mean) / std`` per channel into the 1x1 convolutions around the latent, exactly.

    After this ``scaling_factor`` is 1 and sampling code needs to know nothing about the statistics.
    """
    channels = len(mean)
    quant, post = vae.quant_conv, vae.post_quant_conv
    post.bias.data += post.weight.data[:, :, 0, 0] @ mean
    post.weight.data *= std.view(1, -1, 1, 1)
    quant.weight.data[:channels] /= std.view(-1, 1, 1, 1)
    quant.bias.data[:channels] = (quant.bias.data[:channels] - mean) / std
    quant.bias.data[channels:] -= 2 * std.log()


@torch.no_grad()
def stage_latents(args: argparse.Namespace) -> None:
    """Encodes ``VARIATIONS`` pictures of every training scene; keeps subject centres for cropping."""
    target = args.work_dir / "latents.pt"
    if target.exists():
        return
    vae, scenes = _load_vae(args), _training_scenes()
    latents, errors = [], []
    for index, scene in enumerate(scenes):
        rng = _rng(args, "latents", index)
        pixels = _to_tensor([render(scene, rng) for _ in range(VARIATIONS)]).to(
            args.device, memory_format=torch.channels_last
        )
        with _autocast(args.device):
            mode = vae.encode(pixels).latent_dist.mode()
            if index % 20 == 0:
                errors.append((vae.decode(mode).sample.float().clamp(-1, 1) - pixels).pow(2).mean().item() / 4)
        latents.append(mode.float().cpu())
    z = torch.stack(latents)
    mean, std = z.mean((0, 1, 3, 4)), z.transpose(0, 2).flatten(1).std(1)
    z = (z - mean.view(1, 1, -1, 1, 1)) / std.view(1, 1, -1, 1, 1)
    print(f"latents {tuple(z.shape)}, reconstruction {-10 * np.log10(np.mean(errors)):.1f} dB")
    with atomic_path(target) as temporary:
        torch.save({"latents": z.half(), "mean": mean, "std": std}, temporary)


_CENTRES = {
    "left": [(0.27, 0.5)],
    "right": [(0.73, 0.5)],
    "top": [(0.5, 0.27)],
    "bottom": [(0.5, 0.73)],
    "centre": [(0.5, 0.5)],
}
_CENTRES["two"] = _CENTRES["left"] + _CENTRES["right"]


def _crop(z: Tensor, scene: Scene, rng: random.Random) -> tuple[Tensor, str]:
    """A 16x16-cell window around one subject of a 32x32-cell latent, and a caption without a place."""
    x, y = rng.choice(_CENTRES[scene.layout])
    left, top = (min(16, max(0, round(32 * c) - 8 + rng.randint(-3, 3))) for c in (x, y))
    caption = Scene(scene.subject, scene.colour, "centre").caption.replace(" in the center", "")
    return z[:, top : top + 16, left : left + 16], caption


def _sample_batch(data: Tensor, rng: random.Random, size: int, whole: bool) -> tuple[Tensor, list[str]]:
    scenes, latents, captions = _training_scenes(), [], []
    for _ in range(size):
        index = rng.randrange(len(scenes))
        z, scene = data[index, rng.randrange(VARIATIONS)].float(), scenes[index]
        z, caption = (z, scene.caption) if whole else _crop(z, scene, rng)
        latents.append(z)
        captions.append("" if rng.random() < 0.1 else caption)
    return torch.stack(latents), captions


def _v_loss(
    predict: Callable[[Tensor, Tensor], Tensor], latents: Tensor, alphas_cumprod: Tensor, floor: float
) -> Tensor:
    """v-prediction, uniform timesteps, min-SNR weights (https://arxiv.org/abs/2303.09556) plus ``floor``."""
    t = torch.randint(0, len(alphas_cumprod), (len(latents),), device=latents.device)
    noise = torch.randn_like(latents)
    a = alphas_cumprod[t].sqrt().view(-1, 1, 1, 1)
    s = (1 - alphas_cumprod[t]).sqrt().view(-1, 1, 1, 1)
    v = a * noise - s * latents
    snr = (a / s).square().flatten()
    weight = snr.clamp(max=MIN_SNR_GAMMA) / (snr + 1) + floor
    error = (predict(a * latents + s * noise, t).float() - v).pow(2).mean((1, 2, 3))
    return (weight * error).mean() / weight.mean()


def _predict(unet: nn.Module, states: Tensor, x: Tensor, t: Tensor) -> Tensor:
    return unet(x, t, states).sample


def stage_unet(args: argparse.Namespace) -> None:
    """The denoiser and its text encoder, jointly, from scratch."""
    torch.manual_seed(args.seed)
    unet, text, tokenizer = arch.make_unet(), arch.make_text_encoder(), arch.make_tokenizer()
    alphas = arch.make_scheduler().alphas_cumprod.to(args.device)
    data = torch.load(args.work_dir / "latents.pt", weights_only=True)["latents"]
    total = args.crop_steps + args.scene_steps
    run = _Run(args.work_dir / "unet.pt", {"unet": unet, "text": text}, args.lr, total, args.device, 1e-4)
    for step in run.steps():
        rng = _rng(args, "unet", step)
        whole = step >= args.crop_steps
        latents, captions = _sample_batch(data, rng, args.batch_size, whole)
        tokens = tokenizer(captions, padding="max_length", max_length=arch.TOKENS, return_tensors="pt").input_ids
        latents = latents.to(args.device, memory_format=torch.channels_last)
        with _autocast(args.device):
            states = text(tokens.to(args.device)).last_hidden_state
            floor = SCENE_FLOOR if whole else CROP_FLOOR
            loss = _v_loss(functools.partial(_predict, unet, states), latents, alphas, floor)
        run.update(loss)


def stage_scorer(args: argparse.Namespace) -> None:
    target = args.work_dir / "scorer.pt"
    if target.exists():
        return
    scorer = train_scorer(seed=args.seed, device=args.device)
    print("scorer on held-out renders:", evaluate_scorer(scorer, seed=args.seed + 1))
    with atomic_path(target) as temporary:
        torch.save(scorer.state_dict(), temporary)


def stage_export(args: argparse.Namespace) -> None:
    """Writes the averaged weights as a diffusers folder in half precision, and the scorer beside it."""
    from diffusers import StableDiffusionPipeline
    from safetensors.torch import save_file

    unet, text, vae = arch.make_unet(), arch.make_text_encoder(), _load_vae(args)
    run = _Run(_existing(args, "unet"), {"unet": unet, "text": text}, 0, 0, args.device)
    run.use_average()
    statistics = torch.load(args.work_dir / "latents.pt", weights_only=True)
    _standardise(vae, statistics["mean"], statistics["std"])
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
    scorer = Scorer()
    scorer.load_state_dict(torch.load(args.work_dir / "scorer.pt", weights_only=True))
    save_file(
        {k: v.half() if v.is_floating_point() else v for k, v in scorer.state_dict().items()},
        staging / "scorer.safetensors",
    )
    shutil.copytree(staging, args.out, dirs_exist_ok=True)
    for file in args.out.rglob("*.safetensors"):
        file.chmod(0o644)
    print(f"exported step {run.step} ({len(SUBJECTS)} subjects) to {args.out}")


def stage_card(args: argparse.Namespace) -> None:
    from .card import write_card

    steps = {s: torch.load(_existing(args, s), weights_only=True, mmap=True)["step"] for s in ("vae", "unet")}
    facts = {
        "vae_batch": args.batch_size // 2,
        "vae_steps": steps["vae"],
        "batch": args.batch_size,
        "crop_steps": args.crop_steps,
        "scene_steps": steps["unet"] - args.crop_steps,
    }
    write_card(args.out, facts, args.card_prompts, seed=args.seed)


if __name__ == "__main__":
    main()
