"""An SDXL pipeline of random weights, a few hundred thousand: two text encoders, pooled text, and sizes as inputs."""

import torch


def tiny_sdxl():
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    from sd_hyena.families import DEMO_DIR

    torch.manual_seed(0)
    width, pooled, times = 8, 16, 4
    sizes = {"hidden_size": width, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    text = CLIPTextConfig(**sizes, vocab_size=49408, projection_dim=pooled, bos_token_id=49406, eos_token_id=49407)
    tokenizer = CLIPTokenizer.from_pretrained(DEMO_DIR / "tokenizer", local_files_only=True)
    unet = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        cross_attention_dim=2 * width,
        addition_embed_type="text_time",
        addition_time_embed_dim=times,
        projection_class_embeddings_input_dim=pooled + 6 * times,
    )
    vae = AutoencoderKL(
        block_out_channels=(8,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
    )
    pipe = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        text_encoder_2=CLIPTextModelWithProjection(text),
        tokenizer=tokenizer,
        tokenizer_2=CLIPTokenizer.from_pretrained(DEMO_DIR / "tokenizer", local_files_only=True),
        unet=unet,
        scheduler=EulerDiscreteScheduler(),
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
