"""Hyena layers in a real ComfyUI: ``python comfy_real.py COMFYUI_DIR FOLDER`` prints a line for each check.

Models are the bundled one, put by hand into ComfyUI's UNet (which does not recognise its shape), and a random one with
SD1.5's widths and a single level, which it loads by itself. What is drawn with them is nothing to look at: outputs are
compared as tensors.
"""

from __future__ import annotations

import copy
import sys
import types
from collections import Counter
from pathlib import Path

import diffusers  # noqa: F401 - before a stand-in of torchvision, which it would take for the real one
import torch
from transformers import CLIPTokenizer  # noqa: F401 - likewise

TREE, FOLDER, FULL_SIZE = sys.argv[1], Path(sys.argv[2]), "--full-size" in sys.argv
sys.argv = [sys.argv[0], "--cpu"]
sys.path.insert(0, TREE)
for name in ("torchvision", "torchvision.transforms"):
    sys.modules.setdefault(name, types.ModuleType(name))

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import comfy.lora  # noqa: E402
import comfy.model_management  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy.samplers  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.supported_models  # noqa: E402
import comfy.utils  # noqa: E402
from conftest import make_unet  # noqa: E402
from demo.ldm_export import unet_key  # noqa: E402

import sd_hyena  # noqa: E402
from sd_hyena import checkpoint, targets  # noqa: E402
from sd_hyena.distill.students import configure  # noqa: E402
from sd_hyena.errors import UsageError  # noqa: E402
from sd_hyena.hosts import comfy as host  # noqa: E402
from sd_hyena.models import load_pipeline, locate  # noqa: E402
from sd_hyena.nn import build  # noqa: E402

MAX_ERROR = 2e-5


def check(name, passed, measured=""):
    print(f"{'ok' if passed else 'FAILED'} {name} {measured}".rstrip(), flush=True)


def run(patcher, x, t, context, **options):
    """The UNet as a sampler calls it, with whatever ComfyUI loads for that."""
    comfy.model_management.load_models_gpu([patcher, *patcher.get_nested_additional_models()])
    given = copy.copy(patcher.model_options["transformer_options"]) | options
    return patcher.model.diffusion_model(x, t, context=context, transformer_options=given)


def inputs(unet, h, w, batch=2):
    draw = torch.Generator().manual_seed(h * 100 + w)
    x = torch.randn(batch, unet.config.in_channels, h, w, generator=draw)
    return x, torch.tensor([300.0] * batch), torch.randn(batch, 77, unet.config.cross_attention_dim, generator=draw)


def ldm_state(unet):
    with_attention = [kind.startswith("CrossAttn") for kind in unet.config.up_block_types]
    return {unet_key(k, unet.config.layers_per_block, with_attention): v for k, v in unet.state_dict().items()}


def bundled():
    """The bundled UNet in ComfyUI's: its shape is not one that ComfyUI knows, so the configuration is by hand."""
    unet = load_pipeline(locate("demo")).unet

    class Multiple(float):
        def __mul__(self, other):
            return round(float(self) * other)

        __rmul__ = __mul__

    widths = unet.config.block_out_channels
    config = comfy.supported_models.SD15(
        {
            "image_size": 32,
            "in_channels": unet.config.in_channels,
            "out_channels": unet.config.out_channels,
            "model_channels": widths[0],
            "num_res_blocks": [2] * len(widths),
            "channel_mult": [Multiple(width / widths[0]) for width in widths],
            "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
            "transformer_depth_middle": 1,
            "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
            "context_dim": unet.config.cross_attention_dim,
            "use_spatial_transformer": True,
            "use_linear_in_transformer": False,
            "legacy": False,
            "use_checkpoint": False,
            "dtype": torch.float32,
        }
    )
    config.unet_config |= {"num_heads": -1, "num_head_channels": widths[0] // unet.config.attention_head_dim[0]}
    model = config.get_model({}, "")
    for module in model.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.num_groups = unet.config.norm_num_groups
    missing, unexpected = model.diffusion_model.load_state_dict(ldm_state(unet), strict=False)
    assert not missing, missing
    assert not unexpected, unexpected
    return unet, comfy.model_patcher.ModelPatcher(model.eval(), torch.device("cpu"), torch.device("cpu"))


def small(**changes):
    """A random UNet that ComfyUI takes for SD1.5, by default of one level."""
    one = {
        "block_out_channels": (320,),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("CrossAttnUpBlock2D",),
    }
    unet = make_unet(**({"cross_attention_dim": 768, "attention_head_dim": 8, "norm_num_groups": 32} | one | changes))
    return unet, comfy.sd.load_diffusion_model_state_dict(ldm_state(unet), {"dtype": torch.float32})


def hyena(unet, name, **choices):
    """A file of untrained operators for every layer."""
    torch.manual_seed(1)
    layers = {n: build(configure(t, (16, 16), unet, **choices)) for n, t in targets.find_targets(unet).items()}
    checkpoint.save(FOLDER / f"{name}.safetensors", layers)
    return checkpoint.load(FOLDER / f"{name}.safetensors")


def error(a, b):
    return (a - b).abs().max().item()


def against_diffusers(title, unet, model, files, sizes):
    for size in sizes:
        given = inputs(unet, *size)
        expected = unet(*given).sample
        plain = run(model, *given)
        measured = [f"attention {error(plain, expected):.1e}"]
        passed = error(plain, expected) < MAX_ERROR
        for form, file in files.items():
            patched, _ = host.attach(model, file)
            got = run(patched, *given)
            sd_hyena.load_hyena(unet, file.path)
            wanted = unet(*given).sample
            sd_hyena.unload_hyena(unet)
            on = all(dict(f.calls) == {"hyena": 1} for f in patched.object_patches.values())
            passed &= on and error(got, wanted) < MAX_ERROR and error(got, plain) > 1e-3
            measured.append(f"{form} {error(got, wanted):.1e} ({error(got, plain):.2g} from attention)")
        check(f"A1 {title} at {size[0]}x{size[1]}", passed, ", ".join(measured))


def plain_again(unet, model, files):
    given, keys = inputs(unet, 12, 16), list(model.model.state_dict())
    plain = run(model, *given)
    first = {}
    passed = True
    for _ in range(2):
        for form, file in files.items():
            patched, _ = host.attach(model, file)
            got = run(patched, *given)
            passed &= list(model.model.state_dict()) == keys
            run(patched, *inputs(unet, 9, 13))  # another size between
            passed &= torch.equal(run(patched, *given), got)
            passed &= torch.equal(first.setdefault(form, got), got)
            passed &= torch.equal(run(model, *given), plain)
    check("A2, A9 plain, Hyena, plain, under inference mode: bit for bit", passed)


def lora(unet):
    """Kohya's names; self-attention, cross-attention and feed-forward of every block."""
    tensors, draw = {}, torch.Generator().manual_seed(2)
    for key, weight in ldm_state(unet).items():
        if any(part in key for part in ("attn1.to_q.w", "attn1.to_out.0.w", "attn2.to_q.w", "ff.net.0.proj.w")):
            name = "lora_unet_" + key.removesuffix(".weight").replace(".", "_")
            tensors[f"{name}.lora_down.weight"] = torch.randn(4, weight.shape[1], generator=draw) * 0.1
            tensors[f"{name}.lora_up.weight"] = torch.randn(weight.shape[0], 4, generator=draw) * 0.1
            tensors[f"{name}.alpha"] = torch.tensor(4.0)
    return tensors


def with_lora(model, tensors):
    patched, _ = comfy.sd.load_lora_for_models(model, None, dict(tensors), 1.0, 0.0)
    assert len(patched.patches) == len(tensors) // 3, "NOT LOADED"
    return patched


def adapters(unet, model, files):
    given, tensors = inputs(unet, 12, 16), lora(unet)
    plain, expected = run(model, *given), run(with_lora(model, tensors), *given)
    passed = error(plain, expected) > 1e-3
    for form, file in files.items():
        patched, _ = host.attach(model, file)
        alone = run(patched, *given)
        other = with_lora(model, tensors)  # while Hyena is in the shared model
        after = with_lora(patched, tensors)
        before, _ = host.attach(with_lora(model, tensors), file)
        passed &= torch.equal(run(other, *given), expected)
        results = run(after, *given), run(before, *given)
        passed &= torch.equal(*results) and error(results[0], alone) > 1e-3
        attn1 = {k: v for k, v in tensors.items() if "attn1" in k}
        moved = error(run(with_lora(patched, attn1), *given), alone)
        passed &= moved > 1e-4 if form == "core" else moved == 0
    passed &= torch.equal(run(model, *given), plain)
    check("A3 LoRA before, after, on the other clone: every key, bit for bit", passed)


def two_samplers(unet, model, files):
    latent = torch.zeros(2, 4, 13, 17)
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(3))
    _, _, context = inputs(unet, 8, 8, 1)
    conds = [[context, {}]], [[context * 0, {}]]

    def sample(patcher):
        return comfy.sample.sample(
            patcher, noise, 3, 5.0, "dpmpp_2m", "karras", *conds, latent, seed=3, disable_pbar=True
        )

    plain = sample(model)
    passed, half = torch.isfinite(plain).all(), []
    for file in files.values():
        patched, _ = host.attach(model, file)
        got = sample(patched)
        passed &= torch.equal(sample(model), plain) and torch.equal(sample(patched), got) and error(got, plain) > 1e-3
        late, _ = host.attach(model, file, start=0.5)
        calls = sample(late)
        passed &= error(calls, plain) > 0 and error(calls, got) > 0
        half.append(dict(next(iter(late.object_patches.values())).calls))
    passed &= all(each == {"other steps": 1, "hyena": 2} or each == {"other steps": 2, "hyena": 1} for each in half)
    check("A4 two samplers from one loader, and half of the steps", bool(passed), str(half))


def low_memory(unet, model, files):
    given, tensors = inputs(unet, 12, 16), lora(unet)
    passed = True
    for file in files.values():
        for base in (model, with_lora(model, tensors)):
            patched, _ = host.attach(base, file)
            expected = run(patched, *given)
            comfy.model_management.unload_all_models()
            patched.patch_model(torch.device("cpu"), lowvram_model_memory=1)
            low = patched.model.diffusion_model(*given[:2], context=given[2], transformer_options={})
            passed &= patched.model.model_lowvram and error(low, expected) < 1e-5
            patched.unpatch_model(torch.device("cpu"))
    check("A5 low memory forced, with and without LoRA", bool(passed))


def neighbours(unet, model, file):
    latest = types.ModuleType("comfy_api.latest")
    latest.io = types.SimpleNamespace(ComfyNode=object, NodeOutput=lambda *r: r, Schema=object)
    latest.ComfyExtension = object
    sys.modules["comfy_api"], sys.modules["comfy_api.latest"] = types.ModuleType("comfy_api"), latest
    from comfy_extras.nodes_hypertile import HyperTile
    from comfy_extras.nodes_tomesd import TomePatchModel

    given = inputs(unet, 32, 32)
    patched, _ = host.attach(model, file)
    expected = run(patched, *given)

    def calls(changed):
        for forward in patched.object_patches.values():
            forward.calls.clear()
        return run(changed, *given), sum((f.calls for f in patched.object_patches.values()), start=Counter())

    same = patched.clone()
    same.set_model_attn1_patch(lambda n, context, value, extra: (n, context, value))
    got, count = calls(same)
    passed = torch.equal(got, expected) and count == {"hyena": len(patched.object_patches)}
    for kind, changed in (
        ("ToMe", TomePatchModel.execute(patched, 0.5)[0]),
        ("HyperTile", HyperTile.execute(patched, 64, 2, 0, False)[0]),
    ):
        _, count = calls(changed)
        check(f"A6 {kind}: layers whose tokens it changes are attention", count["attention"] > 0, str(dict(count)))
    replaced = patched.clone()
    replaced.set_model_attn1_replace(lambda q, k, v, extra: v, "middle", 0)
    _, count = calls(replaced)
    passed &= count == {"hyena": len(patched.object_patches) - 1}
    check("A6 a patch that changes nothing, and another node's block", bool(passed))


def refusals(unet, model, file):
    from comfy.ldm.flux.model import Flux

    demo, told = checkpoint.load("demo"), []
    for patcher, given, names in (
        (model, demo, None),  # other widths
        (model, file, "IN09"),
        (model, file, "M00,M00"),
    ):
        try:
            host.attach(patcher, given, names)
        except UsageError as problem:
            told.append(str(problem))
    params = {"in_channels": 16, "out_channels": 16, "vec_in_dim": 32, "context_in_dim": 32, "hidden_size": 64}
    params |= {"mlp_ratio": 2.0, "num_heads": 2, "depth": 1, "depth_single_blocks": 1, "axes_dim": [8, 12, 12]}
    params |= {"theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": False}
    holder = torch.nn.Module()
    holder.diffusion_model = Flux(**params, dtype=torch.float32, device="cpu", operations=comfy.ops.disable_weight_init)
    try:
        host.attach(comfy.model_patcher.ModelPatcher(holder, torch.device("cpu"), torch.device("cpu")), file)
    except UsageError as problem:
        told.append(str(problem))
    passed = len(told) == 4 and all("\n" not in line for line in told) and not model.object_patches
    check("A7 refusals in one line, the model untouched", passed, f"e.g. {told[-1]}")


def families():
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
    from diffusers import UNet2DConditionModel

    from sd_hyena.families import FAMILIES

    counts = {}
    for name in ("sd15", "sd21", "sdxl"):
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(FAMILIES[name].config("unet"))
        theirs = {key: value.half() for key, value in ldm_state(unet).items()}
        config = comfy.model_detection.model_config_from_unet(theirs, "")
        theirs = UNetModel(**config.unet_config, device="meta", operations=comfy.ops.disable_weight_init)
        ours, found = targets.find_targets(unet), host.find_targets(theirs)
        same = "name", "dim", "inner_dim", "heads", "downscale", "ldm_key"
        assert list(ours) == list(found)
        for target in ours.values():
            assert all(getattr(target, key) == getattr(found[target.name], key) for key in same), target
        counts[name] = len(found)
    check(
        "A8 names, widths, heads and grids of SD1.x, 2.1, XL",
        counts == {"sd15": 16, "sd21": 16, "sdxl": 70},
        str(counts),
    )


def main():
    import comfy.sample  # noqa: F401

    unet, model = bundled()
    against_diffusers("bundled model", unet, model, {"student": checkpoint.load("demo")}, [(32, 32), (9, 13)])
    unet, model = small()
    files = {"full": hyena(unet, "full", form="full"), "core": hyena(unet, "core", form="core")}
    against_diffusers("small SD1.5", unet, model, files, [(16, 16), (9, 13)])
    plain_again(unet, model, files)
    adapters(unet, model, files)
    two_samplers(unet, model, files)
    low_memory(unet, model, files)
    neighbours(unet, model, files["full"])
    refusals(unet, model, files["full"])
    families()
    if FULL_SIZE:
        unet, model = small(
            block_out_channels=(320, 640, 1280, 1280),
            layers_per_block=2,
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        )
        files = {form: hyena(unet, f"sd15-{form}", form=form) for form in ("full", "core")}
        against_diffusers("random SD1.5", unet, model, files, [(16, 16), (9, 13)])


if __name__ == "__main__":
    with torch.inference_mode():  # as nodes and samplers run
        main()
