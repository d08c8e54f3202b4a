"""diffusers' pipelines and add-ons with Hyena layers: active, right, and gone without a trace."""

import contextlib
import copy
import logging

import diffusers
import numpy as np
import pytest
import torch
from conftest import assert_close, make_unet, trained
from PIL import Image

import sd_hyena
from sd_hyena import checkpoint, hyena_attention, patch
from sd_hyena.config import OperatorConfig
from sd_hyena.errors import UsageError
from sd_hyena.families import VOCABULARY
from sd_hyena.grid import grid_mask
from sd_hyena.targets import find_targets

SIZE = 32
NAMES = ["IN01", "OUT03"]
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (SIZE, SIZE, 3), np.uint8))
MASK = Image.fromarray(np.tri(SIZE, dtype=np.uint8) * 255)


def small_unet(in_channels=4, layers_per_block=1):
    """With one layer a block it has four of self-attention: IN01, M00, OUT02, OUT03."""
    return make_unet(
        in_channels=in_channels,
        layers_per_block=layers_per_block,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        sample_size=SIZE // 8,
    )


@pytest.fixture(scope="module")
def parts():
    """Everything a pipeline needs but the UNet, tiny and random."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    text = CLIPTextConfig(
        hidden_size=8, intermediate_size=16, num_attention_heads=2, num_hidden_layers=1, vocab_size=49408
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4, 4, 4, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=2,
    )
    return {
        "text_encoder": CLIPTextModel(text).eval(),
        "tokenizer": CLIPTokenizer.from_pretrained(VOCABULARY, local_files_only=True),
        "vae": vae.eval(),
        "scheduler": diffusers.DDIMScheduler(),
        "safety_checker": None,
        "feature_extractor": None,
    }


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path, targets = tmp_path_factory.mktemp("file") / "two.safetensors", find_targets(small_unet())
    operators = {
        name: trained(OperatorConfig(targets[name].dim, 4, 4, attention_heads=targets[name].heads, block=2), number)
        for number, name in enumerate(NAMES)
    }
    checkpoint.save(path, operators)
    return path


@pytest.fixture(autouse=True)
def _said():
    hyena_attention.say_once.cache_clear()


def build(kind, parts, unet=None, **more):
    pipe = kind(unet=unet or small_unet(), requires_safety_checker=False, **copy.copy(parts), **more)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@contextlib.contextmanager
def watched(unet):
    """Yields the shapes of each operator's calls within the block; the first is held to the operator's definition."""
    calls, handles = {}, []
    for name, layer in patch.attached(unet).items():

        def check(operator, args, output, name=name):
            x, size, given = args
            if name not in calls and not hasattr(operator.in_proj, "_diffusers_hook"):  # hooks cannot be copied
                assert_close(name, operator.expected(x, size, None, given).to(output.dtype), output, 1e-3)
            calls.setdefault(name, []).append(tuple(x.shape))

        handles.append(layer.operator.register_forward_hook(check))
    yield calls
    for handle in handles:
        handle.remove()


def draw(pipe, **options):
    call = {"num_inference_steps": 2, "output_type": "np", "generator": torch.Generator().manual_seed(1)} | options
    result = pipe("a fox", **call)
    return np.asarray(result.frames if hasattr(result, "frames") else result.images)


def check_active_and_gone(pipe, file, call, names=NAMES):
    """``call`` draws: with attention, with Hyena, with attention again."""
    before = call()
    sd_hyena.load_hyena(pipe, file)
    with watched(patch.get_unet(pipe)) as calls:
        during = call()
    assert sorted(calls) == sorted(names)
    assert np.isfinite(during).all()
    assert not np.array_equal(before, during)
    sd_hyena.set_hyena_enabled(pipe, False)
    assert np.array_equal(before, call())
    sd_hyena.set_hyena_enabled(pipe, True)
    assert np.array_equal(during, call())
    sd_hyena.unload_hyena(pipe)
    assert np.array_equal(before, call())
    return calls


@pytest.mark.compatibility("Pipelines", "text to picture, img2img, inpainting (4 and 9 channels)", "works")
@pytest.mark.compatibility("Pipelines", "InstructPix2Pix", "works")
@pytest.mark.parametrize(
    ("kind", "channels", "options"),
    [
        ("StableDiffusionPipeline", 4, {"width": SIZE, "height": SIZE}),
        ("StableDiffusionImg2ImgPipeline", 4, {"image": PICTURE, "strength": 1.0}),
        ("StableDiffusionInpaintPipeline", 4, {"image": PICTURE, "mask_image": MASK, "width": SIZE, "height": SIZE}),
        ("StableDiffusionInpaintPipeline", 9, {"image": PICTURE, "mask_image": MASK, "width": SIZE, "height": SIZE}),
        ("StableDiffusionInstructPix2PixPipeline", 8, {"image": PICTURE}),
    ],
)
def test_pipelines_of_pictures(kind, channels, options, parts, file):
    pipe = build(getattr(diffusers, kind), parts, small_unet(channels))
    check_active_and_gone(pipe, file, lambda: draw(pipe, **options))


@pytest.mark.compatibility("Pipelines", "from_pipe", "shares the UNet, and so the Hyena layers")
def test_a_pipeline_made_of_another_has_its_layers(parts, file):
    pipe = build(diffusers.StableDiffusionPipeline, parts)
    sd_hyena.load_hyena(pipe, file)
    other = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    with watched(other.unet) as calls:
        draw(other, image=PICTURE, strength=1.0)
    assert sorted(calls) == NAMES


@pytest.mark.compatibility("Pipelines", "ControlNet", "works; the ControlNet's own self-attention stays")
@pytest.mark.compatibility("Pipelines", "ControlNetModel.from_unet of a patched UNet", "has the original attention")
def test_controlnet(parts, file, caplog):
    unet = small_unet()
    sd_hyena.load_hyena(unet, file)
    patched = diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4,) * 4)
    assert "copy has the original attention" in caplog.text
    sd_hyena.unload_hyena(unet)
    controlnet = diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4,) * 4)
    for name, tensor in controlnet.state_dict().items():
        if not name.startswith("controlnet_"):
            assert torch.equal(tensor, patched.state_dict()[name]), name
    for block in [*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block]:
        torch.nn.init.normal_(block.weight)  # they begin as zeros
    pipe = build(diffusers.StableDiffusionControlNetPipeline, parts, controlnet=controlnet.eval())
    check_active_and_gone(pipe, file, lambda: draw(pipe, image=PICTURE))


@pytest.mark.compatibility("Pipelines", "T2I-Adapter", "works")
def test_t2i_adapter(parts, file):
    torch.manual_seed(0)
    adapter = diffusers.T2IAdapter(channels=(8, 16), num_res_blocks=1, downscale_factor=8, adapter_type="full_adapter")
    pipe = build(diffusers.StableDiffusionAdapterPipeline, parts, adapter=adapter.eval())
    check_active_and_gone(pipe, file, lambda: draw(pipe, image=PICTURE))


@pytest.mark.compatibility("Pipelines", "AnimateDiff", "works; layers are loaded after the pipeline is made")
@pytest.mark.compatibility("Pipelines", "UNetMotionModel of a patched UNet", "has the original attention")
def test_animatediff(parts, file, caplog):
    adapter = diffusers.MotionAdapter(
        block_out_channels=(8, 16), motion_layers_per_block=1, motion_norm_num_groups=2, motion_num_attention_heads=2
    )
    unet = small_unet()
    sd_hyena.load_hyena(unet, file)
    taken = {name: parts[name] for name in ("text_encoder", "tokenizer", "vae", "scheduler")}
    pipe = diffusers.AnimateDiffPipeline(unet=unet, motion_adapter=adapter, **taken)
    pipe.set_progress_bar_config(disable=True)
    assert "copy has the original attention" in caplog.text
    pipe.unet.eval()
    assert not sd_hyena.patch.attached(pipe.unet)
    call = check_active_and_gone(pipe, file, lambda: draw(pipe, num_frames=2, width=SIZE, height=SIZE))
    assert call["IN01"][0] == (4, 16, 8)  # frames and guidance


@pytest.mark.compatibility("Pipelines", "AnimateDiff, FreeNoise with split inference", "layers load, switch and unload")
@pytest.mark.parametrize("split_first", [True, False])
def test_free_noise_in_splits(split_first, parts, file):
    torch.manual_seed(0)
    adapter = diffusers.MotionAdapter(
        block_out_channels=(8, 16), motion_layers_per_block=1, motion_norm_num_groups=2, motion_num_attention_heads=2
    )
    taken = {name: parts[name] for name in ("text_encoder", "tokenizer", "vae", "scheduler")}
    pipe = diffusers.AnimateDiffPipeline(unet=small_unet(), motion_adapter=adapter, **taken)
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.eval()
    pipe.enable_free_noise(context_length=2, context_stride=1)

    def call():
        return draw(pipe, num_frames=4, width=SIZE, height=SIZE)

    if not split_first:
        sd_hyena.load_hyena(pipe, file)
    pipe.enable_free_noise_split_inference(spatial_split_size=4, temporal_split_size=2)
    if split_first:
        sd_hyena.load_hyena(pipe, file)
    assert list(sd_hyena.attached(pipe)) == NAMES
    with watched(patch.get_unet(pipe)) as calls:
        hyena = call()
    assert sorted(calls) == NAMES
    sd_hyena.set_hyena_enabled(pipe, False)
    assert not np.array_equal(call(), hyena)
    sd_hyena.set_hyena_enabled(pipe, True)
    assert np.array_equal(call(), hyena)
    sd_hyena.unload_hyena(pipe)
    assert not sd_hyena.attached(pipe)


@pytest.mark.compatibility("Pipelines", "LCM and TCD", "works")
@pytest.mark.parametrize("scheduler", ["LCMScheduler", "TCDScheduler"])
def test_few_step_samplers(scheduler, parts, file):
    pipe = build(diffusers.StableDiffusionPipeline, parts | {"scheduler": getattr(diffusers, scheduler)()})
    check_active_and_gone(pipe, file, lambda: draw(pipe, width=SIZE, height=SIZE, guidance_scale=1.0))


@pytest.mark.compatibility("Pipelines", "IP-Adapter", "works; loading and unloading it changes no layer of ours")
def test_ip_adapter(parts, file):
    pipe = build(diffusers.StableDiffusionPipeline, parts, image_encoder=None)
    plain = draw(pipe, width=SIZE, height=SIZE)
    torch.manual_seed(0)
    cross = [name for name in pipe.unet.attn_processors if "attn2" in name]
    dims = [pipe.unet.get_submodule(name.removesuffix(".processor")).inner_dim for name in cross]
    weights = {f"{2 * n + 1}.to_{k}_ip.weight": torch.randn(dim, 8) for n, dim in enumerate(dims) for k in "kv"}
    projection = {
        "proj.weight": torch.randn(4 * 8, 6),
        "proj.bias": torch.zeros(32),
        "norm.weight": torch.ones(8),
        "norm.bias": torch.zeros(8),
    }
    state = {"image_proj": projection, "ip_adapter": weights}
    embeds = [torch.randn(2, 1, 6)]

    def call():
        return draw(pipe, width=SIZE, height=SIZE, ip_adapter_image_embeds=embeds)

    pipe.unet._load_ip_adapter_weights([copy.deepcopy(state)])
    check_active_and_gone(pipe, file, call)
    guided = call()
    pipe.unload_ip_adapter()
    sd_hyena.load_hyena(pipe, file)
    pipe.unet._load_ip_adapter_weights([copy.deepcopy(state)])
    with watched(pipe.unet) as calls:
        call()
    assert sorted(calls) == NAMES
    sd_hyena.unload_hyena(pipe)
    assert np.array_equal(call(), guided)
    pipe.unload_ip_adapter()
    assert np.array_equal(draw(pipe, width=SIZE, height=SIZE), plain)


@pytest.mark.compatibility("Pipelines", "textual inversion", "works")
def test_textual_inversion(parts, file):
    pipe = build(diffusers.StableDiffusionPipeline, copy.deepcopy(parts))
    sd_hyena.load_hyena(pipe, file)
    pipe.load_textual_inversion({"<thing>": torch.randn(1, 8)})
    with watched(pipe.unet) as calls:
        a, b = (
            pipe(p, num_inference_steps=1, width=SIZE, height=SIZE, output_type="np",
                 generator=torch.Generator().manual_seed(1)).images for p in ("<thing>", "a")
        )  # fmt: skip
    assert sorted(calls) == NAMES
    assert not np.array_equal(a, b)


@pytest.mark.compatibility("Pipelines", "FreeU", "works")
def test_freeu(parts, file):
    pipe = build(diffusers.StableDiffusionPipeline, parts)
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    check_active_and_gone(pipe, file, lambda: draw(pipe, width=SIZE, height=SIZE))


@pytest.mark.compatibility("Pipelines", "VAE slicing and tiling", "works")
def test_vae_slicing_and_tiling(parts, file):
    pipe = build(diffusers.StableDiffusionPipeline, parts)
    pipe.vae.enable_slicing()
    pipe.vae.enable_tiling()
    check_active_and_gone(pipe, file, lambda: draw(pipe, width=SIZE, height=SIZE, num_images_per_prompt=2))


@pytest.mark.compatibility("Hosts", "attention slicing", "works; other layers are sliced")
def test_attention_slicing(parts, file):
    pipe = build(diffusers.StableDiffusionPipeline, parts)
    pipe.enable_attention_slicing(1)
    check_active_and_gone(pipe, file, lambda: draw(pipe, width=SIZE, height=SIZE))
    sd_hyena.load_hyena(pipe, file)
    pipe.disable_attention_slicing()
    with watched(pipe.unet) as calls:
        draw(pipe, width=SIZE, height=SIZE)
    assert sorted(calls) == NAMES
    sd_hyena.unload_hyena(pipe)
    assert not {type(p).__name__ for p in pipe.unet.attn_processors.values()} & {"SlicedAttnProcessor"}


@pytest.mark.compatibility("Hosts", "fuse_qkv_projections and unfuse around loading and unloading", "works")
@pytest.mark.parametrize(
    "steps",
    [
        ("fuse", "load", "unfuse", "unload"),
        ("load", "fuse", "unload", "unfuse"),
        ("fuse", "load", "unload", "unfuse"),
        ("load", "fuse", "unfuse", "unload"),
    ],
)
def test_fused_projections(steps, parts, file):
    pipe = build(diffusers.StableDiffusionPipeline, parts)
    plain = draw(pipe, width=SIZE, height=SIZE)
    sd_hyena.load_hyena(pipe, file)
    hyena = draw(pipe, width=SIZE, height=SIZE)
    sd_hyena.unload_hyena(pipe)
    do = {
        "fuse": pipe.fuse_qkv_projections,
        "unfuse": pipe.unfuse_qkv_projections,
        "load": lambda: sd_hyena.load_hyena(pipe, file),
        "unload": lambda: sd_hyena.unload_hyena(pipe),
    }
    loaded = False
    for step in steps:
        do[step]()
        loaded = {"load": True, "unload": False}.get(step, loaded)
        np.testing.assert_allclose(draw(pipe, width=SIZE, height=SIZE), hyena if loaded else plain, atol=2e-5)


@pytest.mark.compatibility("Hosts", "a dictionary of processors taken before loading", "can be set again")
def test_processors_taken_before_loading(parts, file):
    pipe = build(diffusers.StableDiffusionPipeline, parts)
    processors = pipe.unet.attn_processors
    sd_hyena.load_hyena(pipe, file)
    assert pipe.unet.attn_processors == processors
    pipe.unet.set_attn_processor(dict(processors))
    with watched(pipe.unet) as calls:
        draw(pipe, width=SIZE, height=SIZE)
    assert sorted(calls) == NAMES


@pytest.mark.compatibility("Hosts", "processors that do more than attention", "one line: no effect on replaced layers")
def test_processors_with_a_purpose_are_told_that_they_have_none(parts, file, caplog):
    from diffusers.models.attention_processor import AttnProcessor2_0

    class StoryProcessor(AttnProcessor2_0):
        pass

    unet = small_unet()
    sd_hyena.load_hyena(unet, file)
    unet.set_attn_processor(AttnProcessor2_0())
    assert not caplog.records
    unet.set_attn_processor(StoryProcessor())
    assert [r.getMessage() for r in caplog.records if "StoryProcessor does nothing" in r.getMessage()]
    sd_hyena.unload_hyena(unet)
    assert {type(p) for p in unet.attn_processors.values()} == {StoryProcessor}
    hyena_attention.say_once.cache_clear()
    caplog.clear()
    sd_hyena.load_hyena(unet, file)  # set before loading
    assert [r.getMessage() for r in caplog.records if "StoryProcessor does nothing" in r.getMessage()]


def test_a_processor_that_is_a_module_comes_and_goes(parts, file):
    from diffusers.models.attention_processor import AttnProcessor2_0

    class Learned(torch.nn.Module):
        def __call__(self, attn, hidden_states, *args, **kwargs):
            return 2 * AttnProcessor2_0()(attn, hidden_states, *args, **kwargs)

    unet, own = small_unet(), Learned()
    sd_hyena.load_hyena(unet, file)
    path = find_targets(unet)["IN01"].path
    unet.get_submodule(path).set_processor(own)
    assert unet.attn_processors[f"{path}.processor"] is own
    sd_hyena.unload_hyena(unet)
    assert unet.get_submodule(path).processor is own
    sd_hyena.load_hyena(unet, file)
    unet.get_submodule(path).set_processor(AttnProcessor2_0())
    assert own not in unet.modules()
    sd_hyena.unload_hyena(unet)
    assert type(unet.get_submodule(path).processor) is AttnProcessor2_0


@pytest.mark.compatibility("Pipelines", "perturbed-attention guidance on a replaced layer", "works")
@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_perturbed_attention_guidance(scale, parts, file):
    pipe = build(diffusers.StableDiffusionPAGPipeline, parts, pag_applied_layers=["down"])
    calls = check_active_and_gone(
        pipe, file, lambda: draw(pipe, width=SIZE, height=SIZE, guidance_scale=scale, pag_scale=2.0)
    )
    guided = 2 if scale > 1 else 1  # the perturbed samples do not come by the operator
    assert {shape[0] for shape in calls["IN01"]} == {guided}
    assert {shape[0] for shape in calls["OUT03"]} == {guided + 1}
    sd_hyena.load_hyena(pipe, file)
    attention = patch.attached(pipe.unet)["IN01"].attention
    seen = []
    handle = attention.register_forward_hook(lambda m, a, k, y: seen.append((a[0], y)), with_kwargs=True)
    draw(pipe, width=SIZE, height=SIZE, guidance_scale=scale, pag_scale=2.0)
    handle.remove()
    x, y = seen[0]
    assert_close("identity", attention.to_out[0](attention.to_v(x[-1:])), y[-1:], 1e-5)


@pytest.mark.compatibility(
    "Hosts", "layer skip, and guiders of diffusers that perturb layers", "work on replaced layers"
)
@pytest.mark.parametrize("skip", ["skip_attention", "skip_attention_scores"])
@pytest.mark.parametrize("skip_first", [True, False])
def test_layer_skip(skip, skip_first, parts, file):
    def guide(unet):
        config = {"skip_attention": False, "skip_ff": False} | {skip: True}
        fqn = "down_blocks.0.attentions.0.transformer_blocks"
        diffusers.hooks.apply_layer_skip(unet, diffusers.LayerSkipConfig(indices=[0], fqn=fqn, **config))

    unet = small_unet()
    x = torch.randn(2, 16, 8)
    attention = unet.get_submodule(find_targets(unet)["IN01"].path)
    skipped = x if skip == "skip_attention" else attention.to_out[0](attention.to_v(x))
    if skip_first:
        guide(unet)
    sd_hyena.load_hyena(unet, file)
    if not skip_first:
        guide(unet)
    with watched(unet) as calls:
        assert_close(skip, skipped, attention(hidden_states=x, attention_mask=grid_mask(torch.empty(2, 8, 4, 4))), 1e-5)
    assert not calls


@pytest.mark.compatibility(
    "Hosts", "smoothed-energy guidance on a replaced layer", "its calls go to the attention; a line says so"
)
def test_smoothed_energy_guidance(parts, file, caplog):
    from diffusers.hooks.smoothed_energy_guidance_utils import (
        SmoothedEnergyGuidanceConfig,
        _apply_smoothed_energy_guidance_hook,
    )

    results = []
    for loaded in (False, True):
        unet = small_unet()
        if loaded:
            sd_hyena.load_hyena(unet, file)
        config = SmoothedEnergyGuidanceConfig(indices=[0], fqn="down_blocks.0.attentions.0.transformer_blocks")
        _apply_smoothed_energy_guidance_hook(unet, config, 1.0)
        attention = unet.get_submodule(find_targets(unet)["IN01"].path)
        mask = {"attention_mask": grid_mask(torch.empty(2, 8, 4, 4))} if loaded else {}
        results.append(attention(torch.ones(2, 16, 8) * torch.arange(16)[:, None], **mask))
    assert torch.equal(*results)
    assert "smoothed-energy guidance" in caplog.text


@pytest.mark.compatibility(
    "Pipelines", "self-attention guidance (SAG)", "works; the layer it reads is attention; a line says so"
)
def test_self_attention_guidance(parts, file, tmp_path, caplog):
    if not hasattr(diffusers, "StableDiffusionSAGPipeline"):
        pytest.skip("this diffusers has no such pipeline")
    unet = small_unet()
    target = find_targets(unet)["M00"]
    operator = trained(OperatorConfig(target.dim, 2, 2, attention_heads=target.heads, block=2))
    checkpoint.save(tmp_path / "middle.safetensors", {"M00": operator})
    pipe = build(diffusers.StableDiffusionSAGPipeline, parts | {"image_encoder": None}, unet)
    plain = draw(pipe, width=64, height=64)
    sd_hyena.load_hyena(pipe, tmp_path / "middle.safetensors")
    assert np.array_equal(draw(pipe, width=64, height=64), plain)
    assert "reads attention" in caplog.text
    sd_hyena.load_hyena(pipe, file)
    with watched(pipe.unet) as calls:
        draw(pipe, width=64, height=64)
    assert sorted(calls) == NAMES


@pytest.mark.compatibility("Hosts", "pyramid attention broadcast", "works: replaced layers are skipped too")
@pytest.mark.compatibility("Hosts", "hooks of diffusers set before loading", "see Hyena's output")
@pytest.mark.parametrize("hook_first", [True, False])
def test_pyramid_attention_broadcast(hook_first, parts, file):
    pipe = build(diffusers.StableDiffusionPipeline, parts)
    config = diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        spatial_attention_block_identifiers=("attn1",),
        current_timestep_callback=lambda: 500,
    )
    if not hook_first:
        sd_hyena.load_hyena(pipe, file)
    diffusers.apply_pyramid_attention_broadcast(pipe.unet, config)
    if hook_first:
        sd_hyena.load_hyena(pipe, file)
    with watched(pipe.unet) as calls:
        draw(pipe, width=SIZE, height=SIZE, num_inference_steps=4)
    assert {name: len(shapes) for name, shapes in calls.items()} == dict.fromkeys(NAMES, 2)


@pytest.mark.compatibility("Hosts", "DeepCache", "works: blocks that it skips skip Hyena too")
def test_deepcache(parts, file):
    from DeepCache import DeepCacheSDHelper

    pipe = build(diffusers.StableDiffusionPipeline, parts)
    plain = draw(pipe, width=SIZE, height=SIZE, num_inference_steps=4)
    sd_hyena.load_hyena(pipe, file)
    helper = DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=2, cache_branch_id=0)
    helper.enable()
    with watched(pipe.unet) as calls:
        cached = draw(pipe, width=SIZE, height=SIZE, num_inference_steps=4)
    helper.disable()
    assert {name: len(shapes) for name, shapes in calls.items()} == {"IN01": 2, "OUT03": 4}
    with watched(pipe.unet) as calls:
        uncached = draw(pipe, width=SIZE, height=SIZE, num_inference_steps=4)
    assert {name: len(shapes) for name, shapes in calls.items()} == {"IN01": 4, "OUT03": 4}
    assert not np.array_equal(cached, uncached)
    sd_hyena.unload_hyena(pipe)
    assert np.array_equal(draw(pipe, width=SIZE, height=SIZE, num_inference_steps=4), plain)


@pytest.mark.compatibility("Hosts", "tomesd", "merged tokens go to the original attention, with one warning")
@pytest.mark.parametrize("merge_first", [True, False])
def test_tomesd(merge_first, parts, file, caplog):
    import tomesd

    pipe = build(diffusers.StableDiffusionPipeline, parts)
    if merge_first:
        tomesd.apply_patch(pipe, ratio=0.5, use_rand=False)
        plain = draw(pipe, width=64, height=64)
        sd_hyena.load_hyena(pipe, file)
    else:
        sd_hyena.load_hyena(pipe, file)
        tomesd.apply_patch(pipe, ratio=0.5, use_rand=False)
    with watched(pipe.unet) as calls:
        merged = draw(pipe, width=64, height=64)
    assert not calls
    assert len([r for r in caplog.records if "original attention, not to Hyena" in r.getMessage()]) == 1
    if merge_first:
        assert np.array_equal(merged, plain)
    tomesd.remove_patch(pipe)
    with watched(pipe.unet) as calls:
        draw(pipe, width=64, height=64)
    assert sorted(calls) == NAMES


@pytest.mark.compatibility(
    "Pipelines", "UNetControlNetXSModel, SD3, FLUX, PixArt, Stable Video Diffusion", "refused: says what is supported"
)
def test_other_models_are_refused(file):
    unet = small_unet(layers_per_block=2)
    controlnet = diffusers.ControlNetXSAdapter.from_unet(
        unet, size_ratio=1.0, conditioning_embedding_out_channels=(4,) * 4
    )
    joined = diffusers.UNetControlNetXSModel.from_unet(unet, controlnet)
    with torch.device("meta"):
        flux = diffusers.FluxTransformer2DModel(num_layers=1, num_single_layers=1, attention_head_dim=16,
                                                num_attention_heads=2, axes_dims_rope=(4, 4, 8))  # fmt: skip
    video = diffusers.UNetSpatioTemporalConditionModel(
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        block_out_channels=(32, 64), num_attention_heads=(2, 2), layers_per_block=1, cross_attention_dim=8,
        projection_class_embeddings_input_dim=24, addition_time_embed_dim=8,
    )  # fmt: skip
    for model in (joined, flux, video, torch.nn.Linear(1, 1)):
        with pytest.raises(UsageError, match="Stable Diffusion 1, 2 and XL"):
            sd_hyena.load_hyena(model, file)

    class FluxPipeline:
        transformer = flux

    with pytest.raises(UsageError, match=r"FluxPipeline has no UNet.*Stable Diffusion 1, 2 and XL"):
        sd_hyena.load_hyena(FluxPipeline(), file)


@pytest.mark.compatibility("Hosts", "group offloading, before or after loading", "works; operators are offloaded too")
@pytest.mark.parametrize("offload_first", [True, False])
@pytest.mark.parametrize("level", ["leaf_level", "block_level"])
def test_group_offloading(level, offload_first, parts, file):
    pipe = build(diffusers.StableDiffusionPipeline, parts)
    plain = draw(pipe, width=SIZE, height=SIZE)
    sd_hyena.load_hyena(pipe, file)
    hyena = draw(pipe, width=SIZE, height=SIZE)
    more = {"num_blocks_per_group": 1} if level == "block_level" else {}
    if offload_first:
        sd_hyena.unload_hyena(pipe)
    pipe.unet.enable_group_offload(torch.device("cpu"), torch.device("cpu"), level, **more)
    if offload_first:
        sd_hyena.load_hyena(pipe, file)
    operator = patch.attached(pipe.unet)["IN01"].operator
    modules = [operator.in_proj, operator.near] if level == "leaf_level" else [pipe.unet.down_blocks[0]]
    assert all(module._diffusers_hook.get_hook("group_offloading") for module in modules)
    with watched(pipe.unet) as calls:
        assert np.array_equal(draw(pipe, width=SIZE, height=SIZE), hyena)
    assert sorted(calls) == NAMES
    sd_hyena.unload_hyena(pipe)
    assert np.array_equal(draw(pipe, width=SIZE, height=SIZE), plain)


def test_logging_is_quiet_otherwise(parts, file, caplog):
    pipe = build(diffusers.StableDiffusionPipeline, parts)
    with caplog.at_level(logging.WARNING, "sd_hyena"):
        check_active_and_gone(pipe, file, lambda: draw(pipe, width=SIZE, height=SIZE))
    assert not [r for r in caplog.records if r.name.startswith("sd_hyena")]
