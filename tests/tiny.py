"""Small random pipelines of the real diffusers classes, made on the spot: no download, a fraction of a second each."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from shapes_world import tokenizer_files

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,'-"
MAX_LENGTH = 24
WIDTH = 32


def clip_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer that spells words by letters."""
    words = [*LETTERS, *(letter + "</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    vocab = {word: index for index, word in enumerate(words)}
    return tokenizer_files.clip_tokenizer(vocab, [], MAX_LENGTH)


def t5_tokenizer() -> T5TokenizerFast:
    """A T5 tokenizer that spells words by letters."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0), *((letter, -2.0) for letter in LETTERS)]
    return tokenizer_files.t5_tokenizer(pieces, MAX_LENGTH)


def clip_text_encoder(*, projected: bool = False) -> nn.Module:
    config = CLIPTextConfig(
        vocab_size=2 * len(LETTERS) + 2,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=MAX_LENGTH,
        projection_dim=WIDTH,
        bos_token_id=2 * len(LETTERS),
        eos_token_id=2 * len(LETTERS) + 1,
        pad_token_id=2 * len(LETTERS) + 1,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def t5_encoder(width: int) -> nn.Module:
    config = T5Config(vocab_size=len(LETTERS) + 4, d_model=width, d_kv=8, d_ff=WIDTH, num_layers=2, num_heads=4)
    return T5EncoderModel(config).eval()


def vae(latent_channels: int, *, shift: bool = False) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=latent_channels,
        norm_num_groups=4,
        scaling_factor=1.3,
        shift_factor=0.1 if shift else None,
        use_quant_conv=not shift,
        use_post_quant_conv=not shift,
    ).eval()


def unet(*, xl: bool = False) -> UNet2DConditionModel:
    extra: dict[str, Any] = {"cross_attention_dim": WIDTH}
    if xl:
        extra = {
            "cross_attention_dim": 2 * WIDTH,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + WIDTH,
            "use_linear_projection": True,
            "transformer_layers_per_block": (1, 2),
        }
    return UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        norm_num_groups=8,
        **extra,
    ).eval()


def sd3_transformer() -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=4,
        attention_head_dim=16,
        num_attention_heads=3,
        caption_projection_dim=48,
        joint_attention_dim=2 * WIDTH,
        pooled_projection_dim=2 * WIDTH,
        out_channels=4,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    ).eval()


def flux_transformer(*, guidance_embeds: bool = False) -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=2 * WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
        guidance_embeds=guidance_embeds,
    ).eval()


def sd15_pipeline() -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=vae(4),
        text_encoder=clip_text_encoder(),
        tokenizer=clip_tokenizer(),
        unet=unet(),
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl_pipeline() -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline(
        vae=vae(4),
        text_encoder=clip_text_encoder(),
        text_encoder_2=clip_text_encoder(projected=True),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=unet(xl=True),
        scheduler=DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
        ),
    )


def sd3_pipeline() -> StableDiffusion3Pipeline:
    return StableDiffusion3Pipeline(
        transformer=sd3_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(4, shift=True),
        text_encoder=clip_text_encoder(projected=True),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_text_encoder(projected=True),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_encoder(2 * WIDTH),
        tokenizer_3=t5_tokenizer(),
    )


def flux_pipeline(*, guidance_embeds: bool = False) -> FluxPipeline:
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(4, shift=True),
        text_encoder=clip_text_encoder(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5_encoder(2 * WIDTH),
        tokenizer_2=t5_tokenizer(),
        transformer=flux_transformer(guidance_embeds=guidance_embeds),
    )


def generate(
    pipe: DiffusionPipeline, prompt: str = "a red cat", *, seed: int = 0, steps: int = 2, **kwargs: Any
) -> Tensor:
    """Returns what the pipeline draws in `steps` steps of 16 x 16 px, as latents unless told otherwise."""
    settings = {"height": 16, "width": 16, "num_inference_steps": steps, "output_type": "latent"} | kwargs
    if isinstance(pipe, FluxPipeline | StableDiffusion3Pipeline):
        settings.setdefault("max_sequence_length", MAX_LENGTH)
    generator = torch.Generator().manual_seed(seed)
    pipe.set_progress_bar_config(disable=True)
    return pipe(prompt, generator=generator, **settings).images


@dataclass(frozen=True)
class Family:
    """One denoiser class under test.

    Attributes:
        denoiser: Makes a small random one.
        pipeline: Makes a small random pipeline around one.
        inputs: From a batch size to the arguments of one denoiser call, timestep left out.
        scale: The denoiser's timestep for 1000.
    """

    name: str
    denoiser: Callable[[], nn.Module]
    pipeline: Callable[[], DiffusionPipeline]
    inputs: Callable[[int], dict[str, Any]]
    scale: float = 1000.0

    def call(self, denoiser: nn.Module, inputs: dict[str, Any], timestep: float | Tensor) -> Tensor:
        """Returns the denoiser's prediction; `timestep` on the 0..1000 scale, one for all or `(batch,)`."""
        batch = next(iter(inputs.values())).shape[0]
        level = torch.as_tensor(timestep, dtype=torch.float32).expand(batch) * (self.scale / 1000)
        return denoiser(**inputs, timestep=level, return_dict=False)[0]


def _unet_inputs(batch: int) -> dict[str, Any]:
    return {"sample": torch.randn(batch, 4, 8, 8), "encoder_hidden_states": torch.randn(batch, 9, WIDTH)}


def _sdxl_inputs(batch: int) -> dict[str, Any]:
    added = {"text_embeds": torch.randn(batch, WIDTH), "time_ids": torch.randn(batch, 6)}
    return {
        "sample": torch.randn(batch, 4, 8, 8),
        "encoder_hidden_states": torch.randn(batch, 9, 2 * WIDTH),
        "added_cond_kwargs": added,
    }


def _sd3_inputs(batch: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 4, 8, 8),
        "encoder_hidden_states": torch.randn(batch, 9, 2 * WIDTH),
        "pooled_projections": torch.randn(batch, 2 * WIDTH),
    }


def _flux_inputs(batch: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 16, 16),
        "encoder_hidden_states": torch.randn(batch, 9, 2 * WIDTH),
        "pooled_projections": torch.randn(batch, WIDTH),
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0)),
        "txt_ids": torch.zeros(9, 3),
    }


FAMILIES = (
    Family("sd15", unet, sd15_pipeline, _unet_inputs),
    Family("sdxl", lambda: unet(xl=True), sdxl_pipeline, _sdxl_inputs),
    Family("sd3", sd3_transformer, sd3_pipeline, _sd3_inputs),
    Family("flux", flux_transformer, flux_pipeline, _flux_inputs, scale=1.0),
)


def mapped(inputs: dict[str, Any], change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """Returns the arguments of a denoiser call with every tensor changed."""
    return {k: mapped(v, change) if isinstance(v, dict) else change(v) for k, v in inputs.items()}


def row(inputs: dict[str, Any], index: int) -> dict[str, Any]:
    """Returns the arguments of a denoiser call for one sample of the batch."""
    kept = {k: v for k, v in inputs.items() if k in ("img_ids", "txt_ids")}
    rest = {k: v for k, v in inputs.items() if k not in kept}
    return mapped(rest, lambda tensor: tensor[index : index + 1]) | kept
