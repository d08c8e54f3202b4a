"""What a command imports, imported once: children are forked from a process that has it. Computes nothing."""

import importlib
import os
import pkgutil

os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"  # a fork does not take threads along
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch  # noqa: E402 - it reads the environment

import sd_hyena  # noqa: E402

torch.set_num_threads(1)
for module in pkgutil.walk_packages(sd_hyena.__path__, "sd_hyena."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
