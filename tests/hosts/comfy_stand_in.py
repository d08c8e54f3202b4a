"""What the host adapter and the node pack touch of ComfyUI, rebuilt from its documented behaviour over the bundled
UNet: a UNet in LDM's layout, a model patcher whose clones share it, model folders and the schema of nodes.

It proves our half only; test_comfy_real.py runs the same against a real tree.
"""

from __future__ import annotations

import copy
import sys
import types
import uuid

import torch
from torch import nn


class CrossAttention(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.heads = attention.heads
        self.to_q, self.to_k, self.to_v = attention.to_q, attention.to_k, attention.to_v
        self.to_out = nn.Sequential(*attention.to_out)

    def forward(self, x, context=None, value=None, mask=None, transformer_options={}):  # noqa: B006 - as there
        context = x if context is None else context
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context if value is None else value)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.to_out(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.disable_self_attn = False
        self.norm1, self.norm2, self.norm3, self.ff = block.norm1, block.norm2, block.norm3, block.ff
        self.attn1, self.attn2 = CrossAttention(block.attn1), CrossAttention(block.attn2)

    def forward(self, x, context, transformer_options):
        patches = transformer_options.get("patches", {})
        replace = transformer_options.get("patches_replace", {}).get("attn1", {})
        extra = {key: each for key, each in transformer_options.items() if not key.startswith("patches")}
        n, given, value = self.norm1(x), None, None
        for patch in patches.get("attn1_patch", ()):
            given = n if given is None else given
            n, given, value = patch(n, given, given if value is None else value, extra)
        place = transformer_options["block"]
        if place in replace:
            given = n if given is None else given
            value = given if value is None else value
            parts = self.attn1.to_q(n), self.attn1.to_k(given), self.attn1.to_v(value)
            n = self.attn1.to_out(replace[place](*parts, extra))
        else:
            n = self.attn1(n, context=given, value=value, transformer_options=transformer_options)
        for patch in patches.get("attn1_output_patch", ()):
            n = patch(n, extra)
        x = n + x
        x = self.attn2(self.norm2(x), context=context) + x
        return self.ff(self.norm3(x)) + x


class SpatialTransformer(nn.Module):
    def __init__(self, transformer):
        super().__init__()
        self.norm, self.proj_in, self.proj_out = transformer.norm, transformer.proj_in, transformer.proj_out
        self.transformer_blocks = nn.ModuleList(Block(block) for block in transformer.transformer_blocks)

    def forward(self, x, context, transformer_options):
        transformer_options["activations_shape"] = list(x.shape)
        tokens = self.proj_in(self.norm(x)).movedim(1, 3)
        size = tokens.shape[1:3]
        tokens = tokens.flatten(1, 2)
        for number, block in enumerate(self.transformer_blocks):
            transformer_options["block_index"] = number
            tokens = block(tokens, context, transformer_options)
        return self.proj_out(tokens.unflatten(1, size).movedim(3, 1)) + x


class Downsample(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.op = layer

    def forward(self, x):
        return self.op(x)


class Upsample(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.conv = layer

    def forward(self, x, size):
        return self.conv(x, size)


class UNetModel(nn.Module):
    """A diffusers UNet's own layers in LDM's layout."""

    def __init__(self, unet):
        super().__init__()
        self.time_proj, self.time_embed = unet.time_proj, unet.time_embedding
        self.out = nn.ModuleList([unet.conv_norm_out, unet.conv_act, unet.conv_out])
        blocks = [nn.ModuleList([unet.conv_in])]
        for down in unet.down_blocks:
            blocks += _pairs(down)
            blocks += [nn.ModuleList([Downsample(layer)]) for layer in down.downsamplers or ()]
        self.input_blocks = nn.ModuleList(blocks)
        middle = unet.mid_block
        self.middle_block = nn.ModuleList(
            [middle.resnets[0], SpatialTransformer(middle.attentions[0]), middle.resnets[1]]
        )
        blocks = []
        for up in unet.up_blocks:
            blocks += _pairs(up)
            blocks[-1].extend(Upsample(layer) for layer in up.upsamplers or ())
        self.output_blocks = nn.ModuleList(blocks)

    def forward(self, x, timesteps, context, transformer_options):
        emb = self.time_embed(self.time_proj(timesteps).to(x.dtype))
        passed = []
        for number, block in enumerate(self.input_blocks):
            transformer_options["block"] = ("input", number)
            x = _through(block, x, emb, context, transformer_options)
            passed.append(x)
        transformer_options["block"] = ("middle", 0)
        x = _through(self.middle_block, x, emb, context, transformer_options)
        for number, block in enumerate(self.output_blocks):
            transformer_options["block"] = ("output", number)
            x = torch.cat([x, passed.pop()], 1)
            x = _through(block, x, emb, context, transformer_options, passed[-1].shape[-2:] if passed else None)
        for layer in self.out:
            x = layer(x)
        return x


def _pairs(block):
    attentions = getattr(block, "attentions", [None] * len(block.resnets))
    return [
        nn.ModuleList([resnet] if transformer is None else [resnet, SpatialTransformer(transformer)])
        for resnet, transformer in zip(block.resnets, attentions, strict=True)
    ]


def _through(block, x, emb, context, transformer_options, size=None):
    for layer in block:
        if isinstance(layer, SpatialTransformer):
            x = layer(x, context, transformer_options)
        elif isinstance(layer, Upsample):
            x = layer(x, size)
        else:
            x = layer(x, emb) if type(layer).__name__ == "ResnetBlock2D" else layer(x)
    return x


class Sampling:
    """Of a model: noise levels fall from 10 to 0 in equal steps."""

    def percent_to_sigma(self, percent):
        return 1e9 if percent <= 0 else 10 * (1 - percent)


class BaseModel(nn.Module):
    manual_cast_dtype = None

    def __init__(self, unet, dtype=torch.float32):
        super().__init__()
        self.diffusion_model, self.model_sampling, self.dtype = unet, Sampling(), dtype

    def get_dtype(self):
        return self.dtype


class ModelPatcher:
    """Clones share ``model``, in which the patches of the one that ran last stay until another runs."""

    def __init__(self, model, load_device, offload_device):
        self.model, self.load_device, self.offload_device = model, load_device, offload_device
        self.object_patches, self.object_patches_backup, self.patches = {}, {}, {}
        self.model_options = {"transformer_options": {}}
        self.additional_models, self.patches_uuid = {}, uuid.uuid4()

    def clone(self):
        twin = ModelPatcher(self.model, self.load_device, self.offload_device)
        twin.object_patches, twin.patches = dict(self.object_patches), dict(self.patches)
        twin.object_patches_backup = self.object_patches_backup
        twin.model_options = copy.deepcopy(self.model_options)
        twin.additional_models = {key: [each.clone() for each in some] for key, some in self.additional_models.items()}
        return twin

    def add_object_patch(self, name, value):
        self.object_patches[name] = value

    def get_model_object(self, name):
        found = self.object_patches.get(name, self.object_patches_backup.get(name))
        if found is None:
            found = self.model
            for part in name.split("."):
                found = found[int(part)] if part.isdecimal() else getattr(found, part)
        return found

    def set_additional_models(self, key, models):
        self.additional_models[key] = models

    def get_additional_models_with_key(self, key):
        return self.additional_models.get(key, [])

    def add_patches(self, changes):
        """Adds to weights; returns which were there to be changed."""
        known = [key for key in changes if key in self.model.state_dict()]
        self.patches |= {key: changes[key] for key in known}
        return known

    def patch_model(self):
        for name, value in self.object_patches.items():
            place = self.model.get_submodule(name.rpartition(".")[0])
            self.object_patches_backup.setdefault(name, getattr(place, name.rpartition(".")[2]))
            setattr(place, name.rpartition(".")[2], value)
        weights = dict(self.model.named_parameters())
        self.backup = {key: weights[key].detach().clone() for key in self.patches}
        for key, change in self.patches.items():
            weights[key].data.add_(change)

    def unpatch_model(self):
        for name, value in self.object_patches_backup.items():
            place = self.model.get_submodule(name.rpartition(".")[0])
            setattr(place, name.rpartition(".")[2], value)
        self.object_patches_backup.clear()
        weights = dict(self.model.named_parameters())
        for key, value in self.backup.items():
            weights[key].data.copy_(value)

    def run(self, x, timesteps, context, **options):
        """One call as a sampler makes it."""
        given = copy.copy(self.model_options["transformer_options"]) | options
        self.patch_model()
        try:
            with torch.inference_mode():
                return self.model.diffusion_model(x, timesteps, context, given)
        finally:
            self.unpatch_model()

    def set_model_patch(self, patch, kind):
        patches = self.model_options["transformer_options"].setdefault("patches", {})
        patches[kind] = [*patches.get(kind, []), patch]

    def set_model_attn1_replace(self, patch, block):
        replace = self.model_options["transformer_options"].setdefault("patches_replace", {})
        replace.setdefault("attn1", {})[block] = patch


class Part:
    """An input or output of a node: its id, kind and options."""

    def __init__(self, kind, name=None, **options):
        self.kind, self.id, self.options = kind, name, options


def _kind(name):
    return types.SimpleNamespace(
        Input=lambda *args, **options: Part(name, *args, **options),
        Output=lambda *args, **options: Part(name, *args, **options),
    )


def install(monkeypatch, models_dir):
    """Puts stand-ins of the modules that the pack imports where it will find them; returns that of ``folder_paths``."""
    io = types.SimpleNamespace(
        ComfyNode=object,
        Schema=lambda **options: types.SimpleNamespace(**options),
        NodeOutput=lambda *results: types.SimpleNamespace(result=results),
        **{name: _kind(name.upper()) for name in ("Model", "Combo", "String", "Float", "Image")},
    )
    latest = types.ModuleType("comfy_api.latest")
    latest.io, latest.ComfyExtension = io, object
    patcher = types.ModuleType("comfy.model_patcher")
    patcher.ModelPatcher = ModelPatcher
    comfy = types.ModuleType("comfy")
    comfy.model_patcher = patcher
    folders = types.ModuleType("folder_paths")
    folders.models_dir, folders.folder_names_and_paths = str(models_dir), {}
    folders.get_filename_list = lambda name: sorted(_listed(folders, name))
    folders.get_full_path_or_raise = lambda name, file: _listed(folders, name)[file]
    named = {"comfy": comfy, "comfy.model_patcher": patcher, "folder_paths": folders, "comfy_api.latest": latest}
    for name, module in (named | {"comfy_api": types.ModuleType("comfy_api")}).items():
        monkeypatch.setitem(sys.modules, name, module)
    return folders


def _listed(folders, name):
    from pathlib import Path

    paths, endings = folders.folder_names_and_paths[name]
    files = [(file, Path(path)) for path in paths for file in Path(path).rglob("*") if file.is_file()]
    return {str(f.relative_to(path)): str(f) for f, path in files if not endings or f.suffix in endings}
