"""Hyena layers in a diffusers pipeline of your own: python examples/load_hyena.py FILE"""

import sys

import torch
from diffusers import StableDiffusionPipeline

import sd_hyena
from sd_hyena.models import DEMO_DIR

pipe = StableDiffusionPipeline.from_pretrained(DEMO_DIR)
prompt = "a panda on the right, blue background"

print("replaced:", sd_hyena.load_hyena(pipe, sys.argv[1]))
pipe(prompt, generator=torch.Generator().manual_seed(1)).images[0].save("hyena.png")

sd_hyena.set_hyena_enabled(pipe, False)
pipe(prompt, generator=torch.Generator().manual_seed(1)).images[0].save("attention.png")
