"""What a command imports, and libraries work out once: children are forked from a process that has it. Starts no
thread, for a fork takes none along."""

import contextlib
import gc
import importlib
import io
import os
import pkgutil

os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"  # a fork does not take threads along
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # as the command line has it before it imports torch

import matplotlib
import torch
from PIL import Image

import sd_hyena

matplotlib.use("Agg")
torch.set_num_threads(1)
with contextlib.redirect_stderr(io.StringIO()):  # what libraries say of what is not installed
    for module in pkgutil.walk_packages(sd_hyena.__path__, "sd_hyena."):
        if not module.name.endswith("__main__") and not module.name.startswith("sd_hyena.ui."):
            importlib.import_module(module.name)
    for name in (  # what they import later
        "diffusers.optimization",
        "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
        "diffusers.schedulers.scheduling_ddpm",
        "matplotlib.backends.backend_agg",
        "matplotlib.backends.backend_svg",
        "matplotlib.pyplot",
        "torch.utils.tensorboard",
        "torchmetrics.functional.image",
        "transformers.models.clip.modeling_clip",
        "transformers.models.clip.tokenization_clip",
    ):
        importlib.import_module(name)
    Image.init()
    conversions = importlib.import_module("transformers.conversion_mapping")
    conversions.get_checkpoint_conversion_mapping("clip_text_model")  # compiles a thousand patterns
    figure, _ = importlib.import_module("matplotlib.pyplot").subplots(constrained_layout=True)
    figure.savefig(io.BytesIO())  # looks for fonts
    importlib.import_module("matplotlib.pyplot").close(figure)
gc.collect()
gc.freeze()  # or each child's collector would touch, and so copy, what it shares with this process
