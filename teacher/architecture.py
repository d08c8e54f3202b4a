"""The bundled teacher's architecture: Stable Diffusion 1.x in miniature, untrained.

Every component is the class that ``StableDiffusionPipeline`` expects, so nothing about loading or
sampling is special. What differs from SD1.x is width, twelve latent channels, the text encoder's depth, the
256 px native size and v-prediction with zero terminal SNR (plain noise prediction cannot learn solid grounds,
https://arxiv.org/abs/2305.08891).
"""

from __future__ import annotations

from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sd_hyena.models import DEMO_DIR

LATENT_CELLS = 32
LATENT_CHANNELS = 12  # four blur textures
VAE_FACTOR = 8
TEXT_DIM = 64
TOKENS = 77


def make_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 64, 64, 64),
        layers_per_block=1,
        norm_num_groups=2,  # with more, colours of large areas are normalised away
        latent_channels=LATENT_CHANNELS,
        sample_size=LATENT_CELLS * VAE_FACTOR,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )


def make_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=LATENT_CELLS,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        layers_per_block=2,
        block_out_channels=(64, 96, 128, 128),
        cross_attention_dim=TEXT_DIM,
        attention_head_dim=(2, 3, 4, 4),  # diffusers means the number of heads: 32 channels each
        norm_num_groups=16,
    )


def make_text_encoder() -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408,
            hidden_size=TEXT_DIM,
            intermediate_size=4 * TEXT_DIM,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            hidden_act="quick_gelu",
            bos_token_id=49406,
            eos_token_id=49407,
        )
    )


def make_tokenizer() -> CLIPTokenizer:
    """CLIP's own tokenizer, from the vocabulary beside the weights."""
    return CLIPTokenizer.from_pretrained(DEMO_DIR / "tokenizer", local_files_only=True)


def make_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        steps_offset=1,
        rescale_betas_zero_snr=True,
    )
