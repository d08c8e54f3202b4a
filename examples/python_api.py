"""Hyena layers in a diffusers pipeline of your own: python examples/python_api.py [FILE, folder or hub id]"""

import sys
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

import sd_hyena
from sd_hyena.models import DEMO_DIR

source = sys.argv[1] if len(sys.argv) > 1 else "demo"
out = Path(sys.argv[2] if len(sys.argv) > 2 else "out/python_api")
out.mkdir(parents=True, exist_ok=True)
# Or your own; on a GPU dtype=torch.float16 and .to("cuda").
pipe = StableDiffusionPipeline.from_pretrained(DEMO_DIR)
prompt = "a panda on the right, blue background"


def draw(name: str) -> None:
    pipe(prompt, generator=torch.Generator().manual_seed(1), num_inference_steps=20).images[0].save(out / name)


names = sd_hyena.load_hyena(pipe, source)
print(sd_hyena.attached(pipe))
draw("hyena.png")

sd_hyena.set_hyena_enabled(pipe, False, names[0])  # attention in one layer, Hyena in the others
draw("but_one.png")

sd_hyena.set_hyena_enabled(pipe, False)
draw("attention.png")

sd_hyena.set_hyena_enabled(pipe, True)
sd_hyena.save_pretrained(pipe, out / "layers")  # a folder with weights, config and a card, to share
sd_hyena.unload_hyena(pipe)
