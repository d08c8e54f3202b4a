"""The table of families: each one's configs, and how its single files are recognised."""

import inspect

import diffusers
import pytest
import torch
import transformers
from demo.ldm_export import ldm_tensors, unet_key

from sd_hyena.families import FAMILIES, UNET, recognise
from sd_hyena.models.ldm import ldm_names
from sd_hyena.targets import find_targets

# Targets, and parameters of the UNet, the VAE and the text encoders.
PUBLISHED = {
    "sd15": (16, 859_520_964, 83_653_863, 123_060_480),
    "sd15_inpainting": (16, 859_535_364, 83_653_863, 123_060_480),
    "sd21": (16, 865_910_724, 83_653_863, 340_387_840),
    "sd21_inpainting": (16, 865_925_124, 83_653_863, 340_387_840),
    "sdxl": (70, 2_567_463_684, 83_653_863, 123_060_480, 694_659_840),
    "sdxl_inpainting": (70, 2_567_478_084, 83_653_863, 123_060_480, 694_659_840),
    "sdxl_refiner": (44, 2_259_526_660, 83_653_863, 694_659_840),
}


def skeleton(name, component="unet"):
    """A component without weights."""
    family = FAMILIES[name]
    library, kind = family.index()[component]
    config = family.config(component)
    with torch.device("meta"):
        if library == "transformers":
            model_class = getattr(transformers, kind)
            return model_class(model_class.config_class(**config))
        return getattr(diffusers, kind).from_config(config)


def count(module):
    return sum(p.numel() for p in module.parameters())


def single_file(name):
    """Names and shapes of a file of full size."""
    family = FAMILIES[name]
    states = {part: skeleton(name, part).state_dict() for part in ("unet", "vae", *family.text_encoders)}
    return {k: t.shape for k, t in ldm_tensors(states, family, family.config("unet"), family.config("vae")).items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_configs_build_the_unet_that_the_entry_describes(name):
    unet, family = skeleton(name), FAMILIES[name]
    config = unet.config
    assert config.cross_attention_dim == family.text_width
    times = (5 if name == "sdxl_refiner" else 6) * (config.addition_time_embed_dim or 0)
    assert (config.projection_class_embeddings_input_dim or 0) - times == family.pooled_width
    if name in PUBLISHED:
        others = [count(skeleton(name, part)) for part in ("vae", *family.text_encoders)]
        assert (len(find_targets(unet)), count(unet), *others) == PUBLISHED[name]


@pytest.mark.parametrize("name", FAMILIES)
def test_single_files_are_recognised_by_their_tensors(name):
    shapes = single_file(name)
    assert recognise(shapes) is FAMILIES[name]
    names = [key for key in shapes if key.startswith(UNET)]
    averaged = {f"model_ema.{key.removeprefix('model.').replace('.', '')}": key for key in names}
    assert {ldm: averaged[ema] for ldm, ema in ldm_names(averaged).items() if ema != ldm} == {k: k for k in names}


def test_other_files_are_of_no_family():
    shapes = single_file("sd15")
    assert recognise({key: (*shape[:1], 999, *shape[2:]) for key, shape in shapes.items()}) is None
    assert recognise(dict.fromkeys(shapes, ())) is None
    assert recognise({}) is None


@pytest.mark.parametrize("name", FAMILIES)
def test_every_component_is_described(name):
    family = FAMILIES[name]
    for component, value in family.index().items():
        if isinstance(value, list) and value[0]:
            assert family.config(component)
    kind = getattr(diffusers, family.pipeline)
    parts = {part for part in inspect.signature(kind).parameters if part in family.index()}
    assert {"unet", "vae", "scheduler", *family.text_encoders} <= parts
    assert family.config("scheduler")["beta_schedule"] == "scaled_linear"


def test_sd1_files_have_a_name_for_every_tensor_of_the_unet():
    state = skeleton("sd15").state_dict()
    keys = {unet_key(k, 2, [False, True, True, True]) for k in state}
    assert len(keys) == len(state) == 686
    assert "output_blocks.5.2.conv.weight" in keys
    assert "input_blocks.3.0.op.weight" in keys
